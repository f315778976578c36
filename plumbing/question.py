r"""Which words and units are known, and what a question says about its answer: its formulas, an order, a base, units.

Which words may stand beside a value is written down here, in BEFORE, COUNTED and the units; what is not in a list is
not ignored.
"""

import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from plumbing import tree
from plumbing.latex import BASES, read_tree
from plumbing.tokens import tokenize
from plumbing.tree import Node, Unreadable

# Words and units ------------------------------------------------------------------------------------------------------
BEFORE = set(  # harmless before a value
    tree.words(
        "a an the option choice answer final result is are be equals equal to so thus hence therefore it its we "
        "get have there of total value exactly approximately about solution solutions only area perimeter volume set"
    )
)
COUNTED = set(  # beside those that the question counts
    tree.words(
        "apple arrangement ball boy case children choice coin color combination committee cube different digit "
        "distinct divisor edge element face factor function girl handshake integer intersection interval line lines "
        "man match matches member men move multiple number odd ordered outcome pair path people permutation person "
        "piece player point polygon positive possibility possible prime problem question real region right root row "
        "sequence side single solution sphere square step student subset term ticket triangle triple value vertex "
        "vertices vote way women word"
    )
)
METRIC = {"m": "meter", "g": "gram", "s": "second", "l": "liter", "hz": "hertz", "j": "joule", "w": "watt"}
METRIC |= {"v": "volt", "n": "newton", "pa": "pascal", "mol": "mole", "k": "kelvin"}
METRIC |= {"a": "ampere", "t": "tesla", "c": "coulomb"}
PREFIXES = {("", ""): 0, ("k", "kilo"): 3, ("c", "centi"): -2, ("m", "milli"): -3, ("d", "deci"): -1, ("n", "nano"): -9}
PREFIXES |= {("u", "micro"): -6, ("micro", "micro"): -6, ("mega", "mega"): 6}
OTHER_UNITS = """
1 meter metre; 0.0254 meter inch in inche; 12 inch foot ft feet; 3 foot yard yd; 1760 yard mile mi; 1e-6 meter micron
1e-10 meter angstrom; 3.0857e16 meter parsec pc; 1 gram gm; 453.59237 gram pound lb; 1/16 pound ounce oz
2000 pound ton; 1 liter litre; 1 second sec; 60 second minute min; 60 minute hour h hr
24 hour day; 7 day week; 1 month month; 12 month year yr; 1 dollar dollar usd; 1/100 dollar cent; 1e-5 newton dyne dyn
1.602176634e-19 joule electronvolt ev; 1e3 electronvolt kev; 1e6 electronvolt mev
1 quart quart; 1/2 quart pint; 1/4 quart cup; 4 quart gallon; 1 sterling sterling
1 rupee rupee rs; 1 euro euro; 1 yen yen; 1 acre acre; 1 am am; 1 pm pm; 1e-7 joule erg; 1 ohm ohm; 1 gauss gauss
1 atmosphere atmosphere atm; 1 degree degree; 1 percent percent; 1 radian radian rad
"""  # how many of which unit the other names are


class Unit(NamedTuple):
    """How many of a product of basic units: km/h is 5/18 of meter^1 second^-1. A counted noun has the power 0."""

    size: Fraction = Fraction(1)
    powers: tuple[tuple[str, int], ...] = ()


def list_units() -> dict[str, Unit]:
    """The units by their names and abbreviations."""
    units = {}
    for short, name in METRIC.items():
        for (letter, prefix), exponent in PREFIXES.items():
            units[letter + short] = units[prefix + name] = Unit(Fraction(10) ** exponent, ((name, 1),))
    for size, base, *names in map(str.split, OTHER_UNITS.replace("\n", ";").strip(";").split(";")):
        one = units.get(base, Unit(Fraction(1), ((base, 1),)))
        units |= dict.fromkeys(names, Unit(Fraction(size) * one.size, one.powers))
    return units


NO_UNIT = Unit()
UNITS = list_units()
UNIT_PART = re.compile(r" *(?:(/|\bper\b) *)?([a-z]+)(?: *\^ *(-? *\d\d?))?")
UNIT_SPELLINGS = {  # other ways to write a unit
    r"\\frac \{ (.*) \} \{ (.*) \}": r"\1 / \2", r"[(){}*]": "", r"\bsq(?:uare)? (\w+)": r"\1 ^2",
    r"\bcubic (\w+)": r"\1 ^3", " squared": " ^2", " cubed": " ^3", r"\\mu ": "micro", r"\bM(?=W|Hz|J|V|N|Pa)": "mega",
    r"\bmph\b": "mile / hour", r"\bkph\b": "km / h", r"\bk\b": "?",  # 42 k is no 42
    r"degrees? +(?:[CF]|celsius|fahrenheit)\b": "degree",
}  # fmt: skip


def singular(word: str) -> str:
    """metres -> metre, inches -> inche (which UNITS knows)"""
    return word[:-1] if len(word) > 2 and word[-1] == "s" and word[-2] != "s" else word


@functools.lru_cache(maxsize=1024)
def read_unit(text: str) -> Unit | None:
    r"""A unit from its tokens or its words; None if one of them is no unit. "Square units" are none that counts.

    >>> read_unit(r"\frac { km } { min }"), read_unit("thousand")
    (Unit(size=Fraction(50, 3), powers=(('meter', 1), ('second', -1))), None)
    """
    for pattern, replacement in UNIT_SPELLINGS.items():
        text = re.sub(pattern, replacement, text)
    text = text.casefold().strip()
    if modulus := re.fullmatch(r"\\?p?mod +(\d+)", text):
        return Unit(powers=((f"mod {modulus[1]}", 1),))
    size, powers = Fraction(1), Counter[str]()
    for slash, name, power in UNIT_PART.findall(text):
        unit = NO_UNIT if name in ("unit", "units") else UNITS.get(name) or UNITS.get(singular(name))
        if not unit:
            return None
        times = int(power.replace(" ", "") or 1) * (-1 if slash else 1)
        size *= unit.size**times
        powers.update({base: exponent * times for base, exponent in unit.powers})
    return None if UNIT_PART.sub("", text) else Unit(size, tuple(sorted(powers.items())))


def convert_mixed(node: Node) -> list[Node]:
    """2 hours 30 minutes in each of its units: 2.5 hours, 150 minutes. Each must be smaller than the one before it."""
    if node.kind != "list" or any(item.kind != "said" for item in node.args):
        return []
    units = [read_unit(item.args[2]) or NO_UNIT for item in node.args]
    if any(one.powers != other.powers or one.size <= other.size for one, other in itertools.pairwise(units)):
        return []
    sizes = [tree.multiply(item.args[0], tree.number(unit.size)) for item, unit in zip(node.args, units, strict=True)]
    totals = [tree.divide(tree.add(*sizes), tree.number(unit.size)) for unit in units]
    return [Node("said", (total, *item.args[1:])) for total, item in zip(totals, node.args, strict=True)]


def read_product(node: Node) -> tuple[Node, Unit] | None:
    """5 m/s, which is read as a product of a number and letters, as a quantity."""
    if node.kind != "mul":
        return None
    words, values = [], []
    for part in node.args:
        base, power = part.args if part.kind == "pow" else (part, tree.ONE)
        if base.kind == "sym" and power.kind == "num":
            words.append(f"{base.args[0]} ^{power.args[0]}" if power != tree.ONE else base.args[0])
        else:
            values.append(part)
    unit = read_unit(" ".join(words))
    if not unit or unit == NO_UNIT or not values or tree.find_unknowns(*values):
        return None
    return tree.multiply(*values), unit


# The question ---------------------------------------------------------------------------------------------------------
FORMULA = re.compile(r"(?<!\\)\$\$?(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
BARE_FORMULA = re.compile(r"(?<!\S)[^\s,;:?]*\d[^\s,;:?]*(?:\s*[-+*/^=]\s*[^\s,;:?]+)*")
ORDERED = re.compile(
    r"in \w+ order\b|\border (?:of|from)|from (?:the )?(?:least|small|great|larg|low|high)|arrange|rank", re.I
)
DECREASING = re.compile(r"decreasing|descending|from (?:the )?(?:great|larg|high)", re.I)
ASKED_NAMES = re.compile(
    r"(?:find|determine|what|values? of|compute|solve)[^.?]*?"
    r"((?:\$[a-zA-Z]\$(?:,? and |, ))+\$[a-zA-Z]\$|\$\((?:[a-zA-Z], ?)+[a-zA-Z]\)\$)",
    re.I,
)
POINT = re.compile(r"ordered (?:pair|triple)|coordinates|\bpoint\b|\bvector\b", re.I)
BASE = re.compile(rf"\bbase[- ]?\$?_?\{{?(\d+|{'|'.join(BASES)})\b|\b(binary)\b")
NAMED_UNIT = re.compile(  # 5 m, a meter, in $\mathrm{km/s}$
    r"(?:\d|\b[Ii]n\b(?: units of)?)(?:[\s$~-]|\\[ ,;]|\\(?:text|mathrm|mbox)\{)*([A-Za-z]+(?:(?: ?/ ?| per )[a-z]+)?)"
    r"|\b([a-z]{4,}(?: per [a-z]+)?)|\\(AA)\b"
)
NO_UNITS = {"in", "am", "pm", "us", "at", "Ms", "a", "A", "c", "t"}  # words that are also abbreviations
ANGLES = {"degree", "radian"}
FREE_SIGNS = {
    *"()[]{}|+-*/=,;:&'<>%",
    *(rf"\{name}" for name in tree.words("frac { } \\ $ circ le ge in binom choose")),
}
RELATION_SIGNS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\approx", r"\in", ",", ";"}


def list_pieces(text: str) -> list[tuple[str, ...]]:
    """The numbers, letters and signs of a formula, in alphabetical order; first of all of it, then of each side of a
    relation in it. Brackets, +, -, *, / and fractions are left out: they can be changed without changing a thing."""
    pieces: list[list[str]] = [[], []]
    for token in tokenize(text):
        if token.value in RELATION_SIGNS:
            pieces.append([])
        elif token.kind != "word" and token.value not in FREE_SIGNS:
            value, mark, period = token.value.partition("…")  # 0.\overline{3} is a formula, too
            if token.kind == "num" and "." in value and "e" not in value.lower():
                value = value.rstrip("0").rstrip(".")
            value = value.replace("^", r"\sqrt")  # (8 * 27)^{1/3}
            for piece in (pieces[0], pieces[-1]):
                piece += [value, mark + period] if period else [value]
    return [tuple(sorted(piece)) for piece in pieces]


class Question:
    """What the question says about the form of its answer."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"\[asy\].*?\[/asy\]", "", text, flags=re.S)
        self.text = text
        self.formulas = ["".join(part or "" for part in match) for match in FORMULA.findall(text)]
        self.formulas += [run for run in BARE_FORMULA.findall(FORMULA.sub(" ", text)) if re.search(r"[-+*/^=]", run)]
        self.is_ordered = bool(ORDERED.search(text))
        self.is_decreasing = bool(DECREASING.search(text))
        names = ASKED_NAMES.search(text)
        self.names = re.findall(r"[a-zA-Z](?![a-z])", names[1].replace("and", "")) if names else []
        self.wants_point = bool(POINT.search(text)) and "interval" not in text
        self.bases = {BASES.get(name or "binary", name) for name, _ in BASE.findall(text)}
        plurals = set(map(singular, re.findall(r"[a-z]+s\b", text.casefold())))
        asked = set(map(singular, re.findall(r"(?<=how many )\w+", text.casefold())))
        self.counted = plurals - {"hundred", "thousand", "million", "billion", "dozen", "half", "third", "time"} | asked
        self.nouns = set(re.findall(r"\b(?:which|what) (\w+)", text.casefold()))
        words = ["angstrom" if match[2] else match[0] or match[1] for match in NAMED_UNIT.findall(text)]
        self.units = [unit for word in words if word not in NO_UNITS and (unit := read_unit(word)) and unit.powers]

    @functools.cached_property
    def pieces(self) -> set[tuple[str, ...]]:
        return {piece for formula in self.formulas for piece in list_pieces(formula) if len(piece) > 1}

    @functools.cached_property
    def calls(self) -> set[Node]:
        """The function values in the formulas."""
        calls: set[Node] = set()
        for formula in self.formulas:
            with contextlib.suppress(Unreadable, RecursionError):
                calls |= {part for part in tree.iterate_parts(read_tree(formula)) if part.kind == "call"}
        return calls

    def allows(self, unit: Unit) -> bool:
        """Whether an answer may have this unit: one that the question names, if it names any of the same quantity."""
        name, power = unit.powers[0]
        same = [other for other in self.units if other.powers == unit.powers or {name, other.powers[0][0]} == ANGLES]
        if len(unit.powers) == 1:  # square feet, where the question has feet
            same += [Unit(other.size**power, unit.powers) for other in self.units if other.powers == ((name, 1),)]
        return power == 0 or not same or unit in same

    def split_quantity(self, node: Node) -> tuple[Node, Unit] | None:
        """(value, unit), or None if there are words that cannot be ignored."""
        if node.kind == "unit":
            return node.args[0], Unit(powers=((node.args[1], 1),))
        if node.kind != "said":
            return node, NO_UNIT
        value, before, after = node.args
        if read_unit(before) not in (None, NO_UNIT):  # \$5 per hour
            before, after = "", f"{before} {after}"
        unit = read_unit(after)
        if not unit:  # only what is counted: known nouns, or those that the question counts
            words = after.split()
            is_asked = singular(words[-1]) in self.counted and after in self.text.casefold()
            if not is_asked and not all({word, singular(word)} & COUNTED for word in words):
                return None
            unit = Unit(powers=((singular(words[-1]), 0),))
        if value.kind == "unit" or any(word not in BEFORE | self.nouns for word in before.split()):
            return None
        if unit.powers and unit.powers[0][0].startswith("mod "):  # 42 mod 5 is no residue
            residue = value.args[-1] if value.kind == "rel" else value
            is_below = residue.kind == "num" and 0 <= residue.args[0] < int(unit.powers[0][0][4:])
            if not is_below or residue.args[0].denominator > 1:
                return None
        return value, unit

    def is_repeated_by(self, answer: str, gold: str, node: Node | None, gold_node: Node | None) -> bool:
        """Whether the answer is a formula of the question, and the gold answer is not.

        A formula, or one side of a relation in it, is repeated by what has the same numbers, letters and signs, and
        perhaps a 0 or a 1 more, in any order. A single number or letter is no formula.
        """
        is_number = gold_node is not None and gold_node.kind == "num"
        if is_number and node and any(part in self.calls for part in tree.iterate_parts(node)):
            return True
        whole, *sides = list_pieces(answer)
        gold_pieces = [list_pieces(gold)[0], list_pieces(gold.rpartition("=")[2])[0]]
        if any(repeats(piece, gold_pieces, True) for piece in (whole, list_pieces(answer.rpartition("=")[2])[0])):
            return False
        if len(sides) == 1:
            return repeats(whole, self.pieces)
        sides = [side for side in sides if len(side) > 1 or (side and side[0][0].isdigit())]
        return whole in self.pieces or (bool(sides) and all(repeats(side, self.pieces) for side in sides))


def repeats(piece: tuple[str, ...], others: Iterable[tuple[str, ...]], named: bool = False) -> bool:
    """Whether a piece is one of the others, but for one 0 or 1 more, or a letter: 0 < x < 1 for (0, 1)."""
    for other in others:
        more = list((Counter(piece) - Counter(other)).elements())
        if len(piece) == len(other) + len(more) and (
            more in ([], ["0"], ["1"]) or (named and len(more) == 1 and more[0].isalpha())
        ):
            return True
    return False


read_question = functools.lru_cache(maxsize=1024)(Question)
