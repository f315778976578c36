r"""LaTeX -> tokens, and which words and units are known.

clean() gives one notation to what has several. tokenize() leaves out what only decorates (\left, spaces, \text around
mathematics). Words stay words: which of them may stand beside a value is written down here, in BEFORE, COUNTED and
UNITS; what is not in a list is not ignored.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from plumbing import tree
from plumbing.tree import Node


class Token(NamedTuple):
    kind: str  # "num", "name" (one letter), "cmd", "word", "char" or "end"
    value: str


END = Token("end", "")

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
    "Ω": r"\Omega ", "\u200b": "", "\ufeff": "",
}  # fmt: skip
GREEK = tree.words("alpha beta gamma delta epsilon zeta eta theta lambda mu nu xi pi rho sigma tau phi chi psi omega")
UNICODE |= dict(zip("αβγδεζηθλμνξπρστφχψω", (f"\\{name} " for name in GREEK), strict=True))
UNICODE_TABLE = str.maketrans(UNICODE)
RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ"
ON_THE_LINE = str.maketrans(RAISED + LOWERED, "0123456789+-()n" * 2)


SCRIPT = r"\{?((?<=\{)\w+(?=\})|\w)\}?"  # a group or one sign
LETTER = r"(\\[A-Za-z]+|[A-Za-z])"
REWRITES: list[tuple[re.Pattern, str | Callable[[re.Match], str]]] = [  # independent of each other
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[hv]?phantom\s*\{[^{}]*\}|\\(?:text)?color\s*\{[^{}]*\}|\\[hv]space\*?\s*\{[^{}]*\}", ""),  # not seen
        (r"(\\\\)\s*\[-?[\d.]+\s*[a-z]{2}\]", r"\1 "),  # \\[2mm]
        (r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|\\,)\s*\d{3})+(?!\d)", lambda m: re.sub(r"\D", "", m[0])),  # 1{,}234
        (r"(\d+\.\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", r"\1…\2"),  # 0.\overline{3}
        (f"[{RAISED}]+", lambda m: f"^{{{m[0].translate(ON_THE_LINE)}}}"),  # x²
        (f"[{LOWERED}]+", lambda m: f"_{{{m[0].translate(ON_THE_LINE)}}}"),  # x₁
        (r"\b([apAP])\. ?([mM])\b\.?", r"\1\2"),  # p.m.
        (r"(\\[dtc]?frac|\\[dt]?binom)\s*(\d)(?:\s*(\d)|(?=\{))", r"\1{\2}\3 "),  # \frac12
        (r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}"),  # {1 \over 2}
        (r"\{([^{}]*)\\choose\b([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"-\s*\\\$", r"\\$-"),  # -\$5
        (r"\\mathring\s*\{(?:\\mathrm\s*\{)?A\}?\}", r"\\AA "),  # the angstrom
        (
            r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)(?:\s*(?:[CF]\b|\\(?:text|mathrm)\s*\{\s*[CF]\s*\}))?",
            r"\\circ ",
        ),  # 5^{\circ}
        (r"\\(sin|cos|tan|cot|sec|csc)\s*\^\s*\{\s*-\s*1\s*\}", r"\\arc\1 "),  # \sin^{-1}
        (r"\\log_(\d)(\d+)(?!\s*[\w({\\|.])", r"\\log_{\1}{\2}"),  # \log_264, as TeX reads it
        (rf"(?<![\w}}])(?:\{{\s*\}})?_{SCRIPT}\s*C_{SCRIPT}", r"\\binom{\1}{\2}"),  # {}_{10}C_3
        (rf"(?<![\w}}])(?:\{{\s*\}})?_{SCRIPT}\s*P_{SCRIPT}", r"\\frac{\1!}{(\1-\2)!}"),  # {}_5P_2
        (r"-\s*(?=\\\{)", r"\\setminus "),  # \mathbb{R} - \{0\}
        (r"\b(?:np|math|sympy)\.", ""),
        (r"\{:\}", ":"),
        (rf"\bC_{SCRIPT}\^{SCRIPT}", r"\\binom{\1}{\2}"),  # C_{10}^3
        (r"\\(d?)dot\s*\{?\s*" + LETTER + r"\}?", lambda m: f"{m[2]}'{'d' and len(m[1]) * chr(39)}"),  # \ddot{x}
        (
            r"\\d?frac\s*\{\s*d\s*(?:\^\s*\{?(\d)\}?)?\s*"
            + LETTER
            + r"(_\{?\w+\}?)?\s*\}\s*\{\s*d[^{}]*(?:\{\d\})?\s*\}",
            lambda m: f"{m[2]}{m[3] or ''}{chr(39) * int(m[1] or 1)} ",  # \frac{d^2 x}{dt^2}
        ),
        (r"\bd([A-Za-z])/d[a-z]\b", r"\1'"),  # dx/dt
        (
            r"\^\s*(?:\{\s*((?:\\prime\s*|')+)\}|\\prime|')",
            lambda m: "'" * max(1, len(re.findall("prime|'", m[0]))),
        ),  # x^{\prime}
        (
            r"(\d+) ?\\circ\s*(\d+)\s*'(?:\s*(\d+)\s*'')?",
            r"(\1+\\frac{\2}{60}+\\frac{0\3}{3600})\\circ ",  # 30\circ 15' 20''
        ),
    )
]


@functools.lru_cache(maxsize=8192)
def clean(text: str) -> str:
    r"""The text in one notation, with LaTeX in place of other signs; x'(t) is x' in an equation with derivatives.

    >>> clean(r"\ddot{x} + 2x(t) = 1{,}000²")
    "x'' + 2x = 1000^{2}"
    """
    text = text.translate(UNICODE_TABLE).replace(r",\!", "{,}").replace(r"\!", "").replace("\\\n", " ")
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return re.sub(r"(?<=[A-Za-z'}])\s*\([tx]\)", "", text) if "'" in text else text


TEXT_COMMANDS = r"text(?!color)[a-z]*|[mh]box|math(?:rm|bf|it|sf|cal|scr)|operatorname\*?|bm|boldsymbol|emph"
TOKEN = re.compile(
    r"""(?P<num>(?:\d+\.\d*…\d+|\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,5}(?![A-Za-z\d.]))?)
    |(?P<font>\\(?:COMMANDS))\s*\{(?P<text>(?:[^{}]|\{[^{}]*\})*)\}
    |(?P<cmd>\\(?:[A-Za-z]+|.))|(?P<run>[A-Za-z]+)
    |(?P<char>\*\*|<=|>=|(?<![\d)}])!=|&&|\.{2,}|\S)""".replace("COMMANDS", TEXT_COMMANDS),
    re.S | re.X,
)
NAMES = dict.fromkeys(("infty", "infinity", "inf", "oo", "Infinity"), "infty") | {name: name for name in GREEK}
COMMANDS = {  # other names of one command, or of a sign
    r"\cdot": "*", r"\times": "*", r"\ast": "*", r"\div": "/", r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge",
    r"\geqslant": r"\ge", r"\lt": "<", r"\gt": ">", r"\neq": r"\ne", r"\lbrace": r"\{", r"\rbrace": r"\}",
    r"\lbrack": "[", r"\rbrack": "]", r"\varnothing": r"\emptyset", r"\dots": r"\ldots", r"\cdots": r"\ldots",
    r"\colon": ":", r"\backslash": r"\setminus", r"\varphi": r"\phi", r"\varepsilon": r"\epsilon",
    r"\degree": r"\circ", r"\land": ",", r"\lor": ",", r"\wedge": ",", r"\vee": ",", r"\equiv": "=",
    r"\overrightarrow": r"\vec", r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\|": "|", r"\mid": "|",
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom", r"\tbinom": r"\binom",
    r"\cr": r"\\", r"\bmod": r"\pmod", r"\mod": r"\pmod", r"\%": "%", r"\simeq": r"\approx", r"\prime": "'", r"\&": "&",
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
        "ways pts yes no Yes No not kJ kW Pa kPa atm mol erg dyn gm mod two one zero four five six nine ten true "
        "True or odd even None none"
    )
)


def is_unit_letter(letter: str, before: Token) -> bool:
    r"""Whether a letter in \text{...} is the unit of what stands before it: 5\text{ K}, \text{kg}/\text{m}"""
    after_unit = before.kind == "word" or before.value in (")", "}", "{", "/", "*", r"\mu")
    is_unit = before.kind == "num" or (after_unit and (letter.islower() or letter in "JNKVW"))
    return is_unit and letter not in ("e", "i", "d")


def split_run(run: str, in_text: bool, in_braces: bool, before: Token) -> Iterator[Token]:
    r"""A run of letters is "and", a known name, a word, or a product of letters; \frac{x}{2mL} has no unit."""
    is_unit = run in UNIT_WORDS and not (in_braces and before.kind == "num")
    is_name = len(run) < 5 and run.isupper()  # \text{MR}
    if run in ("and", "or"):
        yield Token("char", ",")
    elif run in tree.FUNCTIONS or run in NAMES:
        yield Token("cmd", "\\" + NAMES.get(run, run))
    elif (
        is_unit
        or len(run) > 4
        or (in_text and not is_name and len(run) > 1)
        or (in_text and is_unit_letter(run, before))
    ):
        yield Token("word", run)
    else:
        yield from (Token("name", letter) for letter in run)


def scan(text: str, in_text: bool, before: Token) -> Iterator[Token]:
    r"""The tokens of a clean text, which may be the one in \text{}; `before` is the token before it."""
    depth = 0  # of braces
    for match in TOKEN.finditer(text):
        kind = match.lastgroup or ""
        value = match[kind]
        if kind == "text":  # \mathbf{v} is a letter, \text{v} may be a unit
            is_name = len(value.strip()) == 1 and not match["font"].startswith((r"\text", r"\mathrm", r"\mbox"))
            found = scan(value, not is_name, before)
        elif kind == "run":
            found = split_run(value, in_text, depth > 0, before)
        elif value in DRESS:
            continue
        else:
            depth += (value == "{") - (value == "}")
            value = COMMANDS.get(value, value)
            found = iter([Token("cmd" if value[0] == "\\" else "num" if kind == "num" else "char", value)])
        for before in found:
            yield before


@functools.lru_cache(maxsize=8192)
def tokenize(text: str) -> tuple[Token, ...]:
    r"""The tokens of a text, without its dress.

    >>> [token.value for token in tokenize(r"\left(\dfrac{x}2,\;1{,}000\text{ cm}\right)")]
    ['(', '\\frac', '{', 'x', '}', '2', ',', '1000', 'cm', ')']
    """
    return tuple(scan(clean(text), False, END))


# Words and units ------------------------------------------------------------------------------------------------------
BEFORE = set(  # harmless before a value
    tree.words(
        "a an the option choice answer final result is are be equals equal to so thus hence therefore it its we "
        "get have there of total value exactly approximately about solution solutions only area perimeter volume set"
    )
)
COUNTED = set(
    tree.words(
        "apple ball balls book box boxes boy call card case children cookie coin combination couple customer "
        "different digit distinct divisor edge element employee face factor function game girl handshake hat "
        "homework integer interval line lines man marble match matches meal member men move multiple number odd "
        "ordered orange outcome page pair path people pencil pen permutation person piece player point possible "
        "positive possibility prime problem question real region right root row side single solution sock "
        "sphere square step student subset term ticket toy triangle triple truck value vertex vertices way women "
        "word votes votes cat dog car chair tree house song sequence arrangement diagonal polygon rectangle circle "
        "intersection committee team table seat stamp flower bead color colour choice candy candies tile cube "
        "block brick guest gift egg shirt bird fish horse sheep cow"
    )
)
METRIC = {"m": "meter", "g": "gram", "s": "second", "l": "liter", "hz": "hertz", "j": "joule", "w": "watt"}
METRIC |= {"v": "volt", "n": "newton", "pa": "pascal", "ev": "electronvolt", "mol": "mole", "k": "kelvin"}
METRIC |= {"a": "ampere", "t": "tesla", "c": "coulomb"}
PREFIXES = {("", ""): 0, ("k", "kilo"): 3, ("c", "centi"): -2, ("m", "milli"): -3, ("d", "deci"): -1, ("n", "nano"): -9}
PREFIXES |= {("u", "micro"): -6, ("micro", "micro"): -6, ("mega", "mega"): 6}
OTHER_UNITS = """
1 meter metre; 0.0254 meter inch in inche; 12 inch foot ft feet; 3 foot yard yd; 1760 yard mile mi; 1e-6 meter micron
1e-10 meter angstrom; 3.0857e16 meter parsec pc; 1 gram gm; 453.59237 gram pound lb; 1/16 pound ounce oz
2000 pound ton; 1 liter litre; 1 second sec; 60 second minute min; 60 minute hour h hr
24 hour day; 7 day week; 1 month month; 12 month year yr; 1 dollar dollar usd; 1/100 dollar cent; 1 dyne dyne dyn
1e6 electronvolt mev; 1 quart quart; 1/2 quart pint; 1/4 quart cup; 4 quart gallon; 1 sterling sterling
1 rupee rupee rs; 1 euro euro; 1 yen yen; 1 acre acre; 1 am am; 1 pm pm; 1 erg erg; 1 ohm ohm; 1 gauss gauss
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


NUMERALS = tree.words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen")
NUMERALS += tree.words("sixteen seventeen eighteen nineteen")
BASES = {name: str(at) for at, name in enumerate(NUMERALS[2:10], 2)} | {"binary": "2"}
TENS = tree.words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def read_words(words: list[str]) -> Node:
    """Words alone: a number (five, twenty-five, five apples), or a text."""
    value, used = 0, 1
    if words[0] in TENS[2:]:
        value = 10 * TENS.index(words[0])
        used = 2 if words[1:] and words[1] in NUMERALS[1:10] else 1
    if words[used - 1] in NUMERALS:
        value += NUMERALS.index(words[used - 1])
    elif not value:
        return Node("text", (" ".join(words),))
    rest = " ".join(words[used:])
    return Node("said", (tree.number(value), "", rest)) if rest else tree.number(value)
