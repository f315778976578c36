r"""LaTeX -> tokens, and what words and units are known.

tokenize() leaves out what only decorates (\left, spaces, \text around mathematics) and gives one name to what has
several spellings. Words stay words: which of them may stand beside a value is written down here, in HARMLESS, COUNTED
and UNITS; what is not in a list is not ignored.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from plumbing import tree
from plumbing.tree import Node


class Token(NamedTuple):
    kind: str  # "num", "name" (one letter), "cmd", "word", "char" or "end"
    value: str


# Text -> tokens -------------------------------------------------------------------------------------------------------
UNICODE = {  # signs and their LaTeX
    **dict.fromkeys("−–—‐‑﹣－", "-"), **dict.fromkeys("×✕", r"\times "), **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u200a\u3000", " "), **dict.fromkeys("’‘′ʹ", "'"), "″": "''",
    "÷": "/", "∕": "/", "⁄": "/", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ",
    "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "°": r"^\circ ", "≈": r"\approx ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "，": ",", "（": "(", "）": ")",
    "、": ",", "；": ";", "％": "%", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅔": r"\frac{2}{3}", "∖": r"\setminus ", "…": r"\ldots ", "⌊": r"\lfloor ",
    "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "√": r"\sqrt ", "µ": r"\mu ", "Å": r"\AA ", "∉": r"\notin ",
    "€": r"\text{euros}", "£": r"\text{pounds sterling}", "¥": r"\text{yen}", "¢": r"\text{cents}", "∀": r"\forall ",
    "Ω": r"\Omega ", "\u200b": "", "\ufeff": "", "\\\n": " ",
}  # fmt: skip
GREEK = tree.words("alpha beta gamma delta epsilon zeta eta theta lambda mu nu xi pi rho sigma tau phi chi psi omega")
UNICODE |= dict(zip("αβγδεζηθλμνξπρστφχψω", (f"\\{name} " for name in GREEK), strict=True))
UNICODE_TABLE = str.maketrans({sign: latex for sign, latex in UNICODE.items() if len(sign) == 1})
RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ"
ON_THE_LINE = str.maketrans(RAISED + LOWERED, "0123456789+-()n" * 2)

TEXT_COMMANDS = r"text(?!color)[a-z]*|[mh]box|math(?:rm|bf|it|sf|cal|scr|ring)|operatorname\*?|bm|boldsymbol|emph"
TOKEN = re.compile(
    r"""(?P<num>(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}(?:\\!)?|\\!|\\,|,\s?\\!)\s*\d{3})+(?:\.\d+)?(?!\d)  # 1{,}234
        |(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,5}(?![A-Za-z\d.]))?)
    |\\(?:COMMANDS)\s*\{(?P<text>(?:[^{}]|\{[^{}]*\})*)\}
    |\\[hv]?phantom\s*\{[^{}]*\}|\\(?:text)?color\s*\{[^{}]*\}|\\[hv]space\*?\s*\{[^{}]*\}|\b(?:np|math|sympy)\.
    |(?P<row>\\\\(?:\[-?[\d.]+\s*[a-z]{2}\])?)
    |(?P<cmd>\\(?:[A-Za-z]+|.))|(?P<run>[A-Za-z]+)|(?P<raised>[RAISED]+)|(?P<lowered>[LOWERED]+)
    |(?P<char>\*\*|<=|>=|(?<![\d)}])!=|&&|\.{2,}|\S)""".replace("COMMANDS", TEXT_COMMANDS)
    .replace("RAISED", RAISED)
    .replace("LOWERED", LOWERED),
    re.S | re.X,
)
NAMES = dict.fromkeys(("infty", "infinity", "inf", "oo", "Infinity"), "infty") | {name: name for name in GREEK}
COMMANDS = {  # other names of one command, or of a sign
    r"\cdot": "*", r"\times": "*", r"\ast": "*", r"\div": "/", r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge",
    r"\geqslant": r"\ge", r"\lt": "<", r"\gt": ">", r"\neq": r"\ne", r"\lbrace": r"\{", r"\rbrace": r"\}",
    r"\lbrack": "[", r"\rbrack": "]", r"\varnothing": r"\emptyset", r"\dots": r"\ldots", r"\cdots": r"\ldots",
    r"\colon": ":", r"\backslash": r"\setminus", r"\varphi": r"\phi", r"\varepsilon": r"\epsilon",
    r"\degree": r"\circ", r"\land": ",", r"\lor": ",", r"\wedge": ",", r"\vee": ",", r"\equiv": "=",
    r"\overrightarrow": r"\vec", r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\mid": "|", r"\dfrac": r"\frac",
    r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom", r"\tbinom": r"\binom", r"\cr": r"\\",
    r"\bmod": r"\pmod", r"\mod": r"\pmod", r"\%": "%", r"\simeq": r"\approx", r"\prime": "'", r"\&": "&",
    "**": "^", "<=": r"\le", ">=": r"\ge", "!=": r"\ne", "&&": ",", "..": r"\ldots", "...": r"\ldots",
    r"\tg": r"\tan", r"\ctg": r"\cot", r"\arctg": r"\arctan", r"\ell": "l",
}  # fmt: skip
DRESS = {f"\\{name}" for name in tree.words(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle "
    "limits scriptstyle nolimits rm bf it small large Large LARGE huge Huge quad qquad boxed fbox underline "
    "mathbf boldsymbol mathit text textbf mathrm mbox hbox bm pmb angle triangle , ; : ! > ( ) [ ] "
)} | {"\\ ", "~", "$", "\\\n", "`", '"', "."}  # fmt: skip
UNIT_WORDS = set(  # words in formulas that are no product of letters, as xy is
    tree.words(
        "cm mm km nm ft in kg lb lbs oz mL mi yd sq cups unit inch feet foot mile yard gram cent hr hrs hour mins "
        "min sec secs day days week year mph kph rad deg Hz kHz MHz eV keV MeV USD am pm AM PM per men boys girls "
        "ways pts yes no Yes No not kJ kW Pa kPa atm mol erg dyn gm five four six nine ten zero one two true false "
        "True False or and odd even None none"
    )
)


def may_be_unit(letter: str, before: Token) -> bool:
    r"""Whether a letter in \text{...} is the unit of what stands before it: 5\text{ K}, \text{kg}/\text{m}"""
    after_unit = before.kind == "word" or before.value in (")", "}", "{", "/", "*", r"\mu")
    return letter not in ("e", "i", "d") and (
        before.kind == "num" or (after_unit and (letter.islower() or letter in "JNKVW"))
    )


def name_run(run: str, in_text: bool, before: Token) -> Iterator[Token]:
    """A run of letters is "and", a known name, a word, or a product of letters."""
    if run in ("and", "or"):
        yield Token("char", ",")
    elif run in tree.FUNCTIONS or run in NAMES:
        yield Token("cmd", "\\" + NAMES.get(run, run))
    elif run in UNIT_WORDS or len(run) > 4 or (in_text and (len(run) > 1 or may_be_unit(run, before))):
        yield Token("word", run)
    else:
        yield from (Token("name", letter) for letter in run)


def tokenize(text: str, in_text: bool = False, before: Token = Token("end", "")) -> Iterator[Token]:  # noqa: B008
    r"""The tokens of a text, without its dress.

    >>> [token.value for token in tokenize(r"\left(\dfrac{x}2,\;1{,}000\text{ cm}\right)")]
    ['(', '\\frac', '{', 'x', '}', '2', ',', '1000', 'cm', ')']
    """
    text = re.sub(r"\b([apAP])\. ?([mM])\b\.?", r"\1\2", text)  # p.m.
    text = re.sub(r"(\\[dtc]?frac|\\[dt]?binom)\s*(\d)(?:\s*(\d)|(?=\{))", r"\1{\2}\3 ", text)  # \frac12
    for match in TOKEN.finditer(text):
        kind, value = match.lastgroup, match[match.lastgroup] if match.lastgroup else ""
        if kind == "num":
            found: Iterator[Token] = iter([Token("num", re.sub(r"[^\d.eE+-]|\\[!,]", "", value))])
        elif kind == "text":
            if match[0].startswith(r"\mathring") and "A" in value:
                found = iter([Token("word", "angstrom")])
            else:
                vector = len(value.strip()) == 1 and not match[0].startswith(("\\text", "\\mathrm", "\\mbox"))
                found = tokenize(value, in_text=not vector, before=before)
        elif kind == "run":
            found = name_run(value, in_text, before)
        elif kind in ("raised", "lowered"):
            inner = tokenize(value.translate(ON_THE_LINE))
            mark = "^" if kind == "raised" else "_"
            found = iter([Token("char", mark), Token("char", "{"), *inner, Token("char", "}")])
        elif kind == "row":
            found = iter([Token("cmd", r"\\")])
        elif kind in ("cmd", "char") and value not in DRESS:
            value = COMMANDS.get(value, value)
            found = iter([Token("cmd" if value[0] == "\\" else "char", value)])
        else:
            continue
        for before in found:
            yield before


# Words and units ------------------------------------------------------------------------------------------------------
HARMLESS = set(
    tree.words(
        "a an the option choice answer final result is are be equals equal to so thus hence therefore it its we "
        "get have there of total value exactly approximately about solution solutions each only unit units square "
        "cubic radian radians rad in mod if when for x y n"
    )
)
COUNTED = set(
    tree.words(
        "apple ball balls book box boxes boy call card case children cookie coin combination couple customer "
        "different digit distinct divisor edge element employee face factor function game girl handshake hat "
        "homework integer interval line lines man marble match matches meal member men move multiple number odd "
        "ordered orange outcome page pair path people pencil pen permutation person piece player point possible "
        "positive possibility prime problem question real region right root row score side single solution sock "
        "sphere square step student subset term ticket toy triangle triple truck value vertex vertices way women "
        "word votes votes cat dog car chair tree house song sequence arrangement diagonal polygon rectangle circle "
        "intersection committee team table seat stamp flower bead color colour choice candy candies tile cube "
        "block brick guest gift egg shirt bird fish horse sheep cow"
    )
)
PREFIXES = {"k": "kilo", "c": "centi", "m": "milli", "n": "nano", "d": "deci", "u": "micro", "micro": "micro"}
METRIC = {
    "m": "meter", "g": "gram", "s": "second", "l": "liter", "hz": "hertz", "j": "joule", "w": "watt", "v": "volt",
    "n": "newton", "pa": "pascal", "ev": "electronvolt", "mol": "mole", "k": "kelvin", "a": "ampere", "t": "tesla",
    "c": "coulomb",
}  # fmt: skip
UNITS = METRIC | {p + u: PREFIXES[p] + METRIC[u] for p in PREFIXES for u in METRIC}
UNITS |= {
    "ft": "foot", "feet": "foot", "in": "inch", "inche": "inch", "lb": "pound", "oz": "ounce", "sec": "second",
    "h": "hour", "hr": "hour", "min": "minute", "mi": "mile", "yd": "yard", "metre": "meter", "litre": "liter",
    "gm": "gram", "rs": "rupee", "usd": "dollar", "kph": "kmh", "atm": "atmosphere", "mev": "megaelectronvolt",
    "day": "day", "week": "week", "month": "month", "year": "year", "yr": "year", "acre": "acre", "gallon": "gallon",
    "euro": "euro", "yen": "yen", "cent": "cent", "dollar": "dollar", "am": "am", "pm": "pm", "erg": "erg",
    "dyne": "dyne", "dyn": "dyne", "ohm": "ohm", "angstrom": "angstrom", "degree": "degree", "pint": "pint",
    "quart": "quart", "cup": "cup", "ton": "ton", "mph": "mile / hour", "kmph": "kilometer / hour", "cc": "cm3",
    "pound sterling": "pound", "parsec": "parsec", "pc": "parsec", "gauss": "gauss", "micron": "micrometer",
    "percent": "percent",
}  # fmt: skip
UNITS |= {name: name for name in UNITS.values()}
SIDES = {"square": 2, "sq": 2, "cubic": 3, "squared": 2, "cubed": 3}


def singular(word: str) -> str:
    """metres -> metre, inches -> inche (which UNITS knows)"""
    return word[:-1] if len(word) > 2 and word[-1] == "s" and word[-2] != "s" else word


def read_unit(text: str) -> tuple[tuple[str, int], ...] | None:
    """A unit as its parts with their powers, or None if a word is no unit.

    >>> read_unit("square cm"), read_unit("centimeters ^2"), read_unit("km / h"), read_unit("thousand")
    ((('centimeter', 2),), (('centimeter', 2),), (('hour', -1), ('kilometer', 1)), None)
    """
    powers: Counter[str] = Counter()
    sign, side, last = 1, 1, ""
    text = re.sub(r"\b([ap]) m\b", r"\1m", text).replace("mph", "mile / hour").replace("kph", "kilometer / hour")
    for part in re.findall(r"\^-?\d+|[a-z]+|/", text):
        if part in ("/", "per"):
            sign = -1
        elif part[0] == "^" and last:
            powers[last] *= int(part[1:])
        elif part in SIDES and not part.endswith("ed"):
            side = SIDES[part]
        elif part in SIDES and last:
            powers[last] *= SIDES[part]
        else:
            last = UNITS.get(part) or UNITS.get(singular(part)) or ("unit" if part in ("unit", "units") else "")
            if not last:
                return None
            powers[last] += sign * side
            sign, side = 1, 1
    return tuple(sorted(powers.items())) if powers else None


NUMERALS = tree.words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen")
NUMERALS += tree.words("sixteen seventeen eighteen nineteen")
TENS = tree.words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def read_words(words: list[str]) -> Node:
    """Words alone: a number (five, twenty-five, five apples), or a text."""
    value, used = None, 1
    if words[0] in NUMERALS:
        value = NUMERALS.index(words[0])
    elif words[0] in TENS:
        used = 2 if words[1:] and words[1] in NUMERALS[1:10] else 1
        value = 10 * TENS.index(words[0]) + (NUMERALS.index(words[1]) if used == 2 else 0)
    if value is None:
        return Node("text", (" ".join(words),))
    rest = " ".join(words[used:])
    return Node("said", (tree.number(value), "", rest)) if rest else tree.number(value)
