r"""LaTeX -> tokens.

clean() gives one notation to what has several. tokenize() leaves out what only decorates (\left, spaces, \text around
mathematics). Words stay words; which of them may stand beside a value says question.py.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple

from plumbing import tree


class Token(NamedTuple):
    kind: str  # "num", "name" (one letter), "cmd", "word", "char" or "end"
    value: str


END = Token("end", "")

# Text -> tokens -------------------------------------------------------------------------------------------------------
GREEK = tree.words("alpha beta gamma delta epsilon zeta eta theta lambda mu nu xi pi rho sigma tau phi chi psi omega")
UNICODE = str.maketrans({  # signs and their LaTeX
    **dict.fromkeys("−–—‐‑", "-"), **dict.fromkeys("×✕", r"\times "), **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("’‘′ʹ", "'"), **dict.fromkeys("÷∕⁄", "/"), **dict.fromkeys("≤⩽", r"\le "), "″": "''", "、": ",",
    **dict.fromkeys("≥⩾", r"\ge "), "∞": r"\infty ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "≈": r"\approx ", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "∖": r"\setminus ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "√": r"\sqrt ", "µ": r"\mu ", "Å": r"\AA ", "∉": r"\notin ", "∀": r"\forall ", "Ω": r"\Omega ",
    "€": r"\text{euros}", "£": r"\text{pounds sterling}", "¥": r"\text{yen}", "¢": r"\text{cents}",
    "\u200b": "", "\ufeff": "",
    **dict(zip("αβγδεζηθλμνξπρστφχψω", (f"\\{name} " for name in GREEK), strict=True)),
})  # fmt: skip
RAISED, LOWERED, FRACTION = (re.compile(signs) for signs in ("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ]+", "[₀-₉₊₋₍₎ₙ]+", "[¼-¾⅐-⅞]"))
to_ascii = functools.partial(unicodedata.normalize, "NFKC")  # ² is 2, ½ is 1⁄2, ３ is 3


def replace_unicode(text: str) -> str:
    r"""ASCII and LaTeX for other signs.

    >>> replace_unicode("½x² ≤ ３")
    '\\frac{1}{2}x^{2} \\le  3'
    """
    text = RAISED.sub(lambda m: f"^{{{to_ascii(m[0])}}}", text)
    text = LOWERED.sub(lambda m: f"_{{{to_ascii(m[0])}}}", text)
    text = FRACTION.sub(lambda m: r"\frac{{{}}}{{{}}}".format(*to_ascii(m[0]).split("⁄")), text)
    return to_ascii(text.translate(UNICODE)).translate(UNICODE)


SCRIPT = r"\{?((?<=\{)\w+(?=\})|\w)\}?"  # a group or one sign
LETTER = r"(\\[A-Za-z]+|[A-Za-z])"
REWRITES: list[tuple[re.Pattern, str | Callable[[re.Match], str]]] = [  # independent of each other
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[hv]?phantom\s*\{[^{}]*\}|\\(?:text)?color\s*\{[^{}]*\}|\\[hv]space\*?\s*\{[^{}]*\}", ""),  # not seen
        (r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|\\,)\s*\d{3})+(?!\d)", lambda m: re.sub(r"\D", "", m[0])),  # 1{,}234
        (r"(\d+\.\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", r"\1…\2"),  # 0.\overline{3}
        (r"\b([apAP])\. ?([mM])\b\.?", r"\1\2"),  # p.m.
        (r"(\\[dtc]?frac|\\[dt]?binom)\s*(\d)(?:\s*(\d)|(?=\{))", r"\1{\2}\3 "),  # \frac12
        (r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}"),  # {1 \over 2}
        (r"\{([^{}]*)\\choose\b([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"-\s*\\\$", r"\\$-"),  # -\$5
        (r"\\mathring\s*\{(?:\\mathrm\s*\{)?A\}?\}", r"\\AA "),  # the angstrom
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)(\s*([CF]\b|\\(?:text|mathrm)\s*\{\s*[CF]\s*\}))?", r"\\circ "),
        (r"\\(sin|cos|tan|cot|sec|csc)\s*\^\s*\{\s*-\s*1\s*\}", r"\\arc\1 "),  # \sin^{-1}
        (rf"(?<![\w}}])(?:\{{\s*\}})?_{SCRIPT}\s*C_{SCRIPT}", r"\\binom{\1}{\2}"),  # {}_{10}C_3
        (rf"(?<![\w}}])(?:\{{\s*\}})?_{SCRIPT}\s*P_{SCRIPT}", r"\\frac{\1!}{(\1-\2)!}"),  # {}_5P_2
        (rf"\bC_{SCRIPT}\^{SCRIPT}", r"\\binom{\1}{\2}"),  # C_{10}^3
        (r"-\s*(?=\\\{)", r"\\setminus "),  # \mathbb{R} - \{0\}
        (r"\{:\}", ":"),
        (r"\b(?:np|math|sympy)\.", ""),
        (r"\\log_(\d)(\d+)(?!\s*[\w({\\|.])", r"\\log_{\1}{\2}"),  # \log_264, as TeX reads it
        (r"\\(d?)dot\s*\{?\s*" + LETTER + r"\}?", lambda m: f"{m[2]}'{'d' and len(m[1]) * chr(39)}"),  # \ddot{x}
        (r"\\d?frac\s*\{\s*d\s*(?:\^\s*\{?(\d)\}?)?\s*" + LETTER + r"(_\{?\w+\}?)?\s*\}\s*\{\s*d[^{}]*(?:\{\d\})?\s*\}",
         lambda m: f"{m[2]}{m[3] or ''}{chr(39) * int(m[1] or 1)} "),  # \frac{d^2 x}{dt^2}
        (r"\bd([A-Za-z])/d[a-z]\b", r"\1'"),  # dx/dt
        (r"\^\s*(?:\{\s*((?:\\prime\s*|')+)\}|\\prime|')",
         lambda m: "'" * max(1, len(re.findall("prime|'", m[0])))),  # x^{\prime}
        (r"(\d+) ?\\circ\s*(\d+)\s*'(?:\s*(\d+)\s*'')?", r"(\1+\\frac{\2}{60}+\\frac{0\3}{3600})\\circ "),  # 5\circ 7'
    )
]  # fmt: skip


@functools.lru_cache(maxsize=8192)
def clean(text: str) -> str:
    r"""The text in one notation, with LaTeX in place of other signs; x'(t) is x' in an equation with derivatives.

    >>> clean(r"\ddot{x} + 2x(t) = 1{,}000²")
    "x'' + 2x = 1000^{2}"
    """
    text = replace_unicode(text).replace(r",\!", "{,}").replace(r"\!", "").replace("\\\n", " ")
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
        "ways pts yes no Yes No not kJ kW Pa kPa atm mol erg dyn gm mod two one zero four five six nine ten half true "
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
