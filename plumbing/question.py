r"""What a question says about its answer: the formulas that are no answer, an order, a base, a unit, names."""

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Iterable

from plumbing import tree
from plumbing.latex import read_tree
from plumbing.numeric import SCALES
from plumbing.tokens import BASES, BEFORE, COUNTED, NO_UNIT, Unit, read_unit, singular, tokenize
from plumbing.tree import Node, Unreadable

FORMULA = re.compile(r"(?<!\\)\$\$?(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
BARE_FORMULA = re.compile(r"(?<!\S)[^\s,;:?]*\d[^\s,;:?]*(?:\s*[-+*/^=]\s*[^\s,;:?]+)*")
ORDERED = re.compile(
    r"in \w+ order\b|\border (?:of|from)|from (?:the )?(?:least|small|great|larg|low|high)|arrange|rank", re.I
)
DECREASING = re.compile(r"decreasing|descending|from (?:the )?(?:great|larg|high)", re.I)
POINT = re.compile(r"ordered (?:pair|triple)|coordinates|\bpoint\b|\bvector\b", re.I)
BASE = re.compile(rf"\bbase[- ]?\$?_?\{{?(\d+|{'|'.join(BASES)})\b|\b(binary)\b")
ASKED_UNIT = re.compile(  # in meters, how many square feet, (in $\mathrm{km/s}$), degree measure
    r"\b(?:in(?! how\b)|to(?= [a-z]+s\b)|how many|number of|nearest|units? of)\s+"
    r"(?:units of\s+)?(?:\$?\\?(?:mathrm|text|mbox)?\{?)?"
    r"(\\AA\b|(?:square |cubic |sq\.? )?[a-z]{2,}\b(?:(?:\s*/\s*|\s+per\s+)[a-z]+\b(?: squared)?)?"
    r"|(?<!\$)(?-i:[mgsJKVWN])(?=[}?.,)]))"
    r"|\b(degree)(?= measure)",
    re.I,
)
NAMED_UNIT = re.compile(r"\d(?:[\s$~-]|\\[ ,;]|\\(?:text|mathrm|mbox)\{)*([A-Za-z]+)|\b([a-z]{4,})")  # 5 m, a meter
NO_UNITS = {"in", "am", "pm", "us", "at", "Ms"}  # words that are also abbreviations
ASKED_NAMES = re.compile(
    r"(?:find|determine|what|values? of|compute|solve)[^.?]*?"
    r"((?:\$[a-zA-Z]\$(?:,? and |, ))+\$[a-zA-Z]\$|\$\((?:[a-zA-Z], ?)+[a-zA-Z]\)\$)",
    re.I,
)
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
        self.wants_point = bool(POINT.search(text)) and "interval" not in text
        self.bases = {BASES.get(name or "binary", name) for name, _ in BASE.findall(text)}
        plurals = set(map(singular, re.findall(r"[a-z]+s\b", text.casefold())))
        asked = set(map(singular, re.findall(r"(?<=how many )\w+", text.casefold())))
        self.counted = plurals - {"hundred", "thousand", "million", "billion", "dozen", "half", "third", "time"} | asked
        self.nouns = set(re.findall(r"\b(?:which|what) (\w+)", text.casefold()))
        words = ["angstrom" if "AA" in unit else unit or "degree" for unit, _ in ASKED_UNIT.findall(text)]
        self.asked_units = [
            unit for word in words if word not in NO_UNITS and (unit := read_unit(word)) and unit.powers
        ]
        words = ["".join(match) for match in NAMED_UNIT.findall(text)]
        self.named_units = [unit for word in words if (unit := read_unit(word)) and unit.powers]
        names = ASKED_NAMES.search(text)
        self.names = re.findall(r"[a-zA-Z](?![a-z])", names[1].replace("and", "")) if names else []

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
        """Whether an answer may have this unit: one that the question asks for, if it asks for any, else one that it
        names, if it names any of the same quantity; what is counted always."""
        asked = [other for other in self.asked_units if is_scale(other) == is_scale(unit)]
        names = [name for name, _ in unit.powers]
        named = [other for other in self.named_units if [other.powers[0][0]] == names and not is_scale(other)]
        raised = [Unit(other.size ** unit.powers[0][1], unit.powers) for other in named]
        return unit.powers[0][1] == 0 or unit in (asked or raised or [unit])

    def split_quantity(self, node: Node) -> tuple[Node, Unit] | None:
        """(value, unit), or None if there are words that cannot be ignored."""
        unit = NO_UNIT
        if node.kind == "mixed":  # 2 hours 30 minutes
            left, right = map(self.split_quantity, node.args)
            if not left or not right or left[1].powers != right[1].powers:
                return None
            return tree.add(left[0], tree.multiply(right[0], tree.number(right[1].size / left[1].size))), left[1]
        if node.kind == "said":
            node, before, after = node.args
            if read_unit(before) not in (None, NO_UNIT):  # \$5 per hour
                before, after = "", f"{before} {after}"
            if found := read_unit(after):
                unit = found
            else:  # only what is counted: known nouns, or those that the question counts
                words = after.split()
                is_asked = singular(words[-1]) in self.counted and after in self.text.casefold()
                if not is_asked and not all({word, singular(word)} & COUNTED for word in words):
                    return None
                unit = Unit(powers=((singular(words[-1]), 0),))
            if any(word not in BEFORE | self.nouns for word in before.split()):
                return None
        if node.kind == "unit":
            return (node.args[0], Unit(powers=((node.args[1], 1),))) if unit == NO_UNIT else None
        if unit.powers and unit.powers[0][0].startswith("mod "):  # 42 mod 5 is no residue
            value = node.args[-1] if node.kind == "rel" else node
            below = value.kind == "num" and 0 <= value.args[0] < int(unit.powers[0][0][4:])
            if not below or value.args[0].denominator > 1:
                return None
        return node, unit

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


def is_scale(unit: Unit) -> bool:
    """Whether this is an angle or a share: degrees, radians, percent."""
    return unit.powers[0][0] in SCALES


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
