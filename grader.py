r"""Decide whether a model's answer to a math problem is right.

    response --extract_answer--> answer --tidy--> text --read--> tree --same--> verdict

What "correct" means here:
- The answer is the content of the last complete \boxed{} or \fbox{} (its braces balance); without one the status is
  "no_answer", which never counts. Boxes with only commas or a few words that end in "and" between them (\boxed{1} and
  \boxed{2}) are one answer, the list 1, 2.
- Equal means mathematically equal, exactly. 1/3 is not 0.333, 0.1 is not 0.10001, 0.5 is not 50; a decimal equals an
  exact value only when it is that value. A tolerance exists only where a problem's own data states one (`tolerance=`).
- 4.5e33, 4.5 \times 10^{33} and 10^{33} \cdot 4.5 are one number; 3\frac{3}{4} is a sum; 0.\overline{3} is 1/3.
- A unit, currency sign, degree mark, percent sign, "mod 7" or words on one side only are ignored; different units on
  the two sides differ. So 50\% agrees with 50 (the sign is a unit) and with 0.5 (its value). Words that change the
  meaning are not ignored: "not 42", "at least 42" and "42 or more" are wrong.
- "x = 5" agrees with 5, letters of choices agree in any dress and case, words agree in any case.
- A comma list is a set and \pm is two values, hence the hedge "42 or 43" is not 42. Tuples, intervals and matrices are
  ordered, and the brackets of the first two count. Bases are kept: 204_5 is neither 204_6 nor 204.
- Equations are equal up to a non-zero factor, inequalities up to a positive one. An inequality of one unknown is the
  set that it describes: x < 1 is (-\infty, 1). Several hold together, unless nothing satisfies them all: then x < 1,
  x > 2 are the parts of a union.
- Expressions are equal when they have the same value wherever both are real (complex where i occurs in them). Sums and
  integrals are not computed; they agree when bounds and terms do.
- Dress never matters: \dfrac, \frac43, \left, spaces, {,} and , as thousands, $...$, \text{}, outer braces, a trailing
  period, leading zeros, .5 and 110., unicode signs. 1,22 is 1.22 where a decimal answers it, else two numbers.

How: layers from cheap to dear. Most verdicts need only a comparison of texts or of exact rationals. What remains is
read by a recursive-descent reader into a small tree (nothing is ever executed) and evaluated at a few points with many
more digits than the answers have. Sets of real numbers go to sympy, in processes that the kernel ends after a time
limit, so that no answer can hang or exhaust the caller.

    python grader.py < cases.jsonl    # a line {"pred" or "response", "gold"} -> a line {"answer", "correct", "status"}
"""

import atexit
import collections
import contextlib
import functools
import itertools
import json
import logging
import math
import operator
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, NamedTuple, NoReturn

import mpmath

MAX_CHARS: int = 1000  # longer answers are only compared as text; the longest gold of the usual sets has 210
MAX_DEPTH: int = 40  # nesting of brackets, fractions, exponents and functions that the reader follows
MAX_ITEMS: int = 100  # items of a list, cells of a matrix, terms of a sum
MAX_BITS: int = 30_000  # size of a number: 2^{30000} and 1e10000 are beyond
MAX_FACTORIAL: int = 3000  # of what factorials and binomials are computed exactly
MAX_MATRICES: int = 6  # in one answer; the product of many is a huge expression
MAX_ROWS: int = 5  # of a determinant
MAX_SIGNS: int = 4  # \pm signs in one answer; each doubles the values
POINTS: int = 8  # places at which two expressions must agree; a difference mostly shows at the first
GUARD_BITS: int = 192  # agreement beyond what the numbers in the answers can explain
LOCAL_WORK: int = 500_000_000  # tree nodes x bits^2 of one evaluation in the calling process (some ms)
LOCAL_SECONDS: float = 0.05  # processor time of one verdict in the calling process; a longer one goes to a worker
WORKERS: int = 2  # processes for the hard verdicts; each holds sympy, about 60 MB
VERDICT_SECONDS: float = 0.3  # processor time of one hard verdict; then its process ends and the status is "timeout"
WALL_FACTOR: float = 10.0  # and this many times as long by the clock, for a machine that is busy
WORKER_BYTES: int = 2**30  # address space of a worker; a verdict that wants more is a "timeout", too


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What grade() says: the extracted answer, whether it counts, and correct, wrong, no_answer or timeout."""

    answer: str | None
    correct: bool
    status: str


class Node(NamedTuple):
    """A tree: x^2 is Node("pow", (Node("sym", ("x",)), Node("num", (Fraction(2),))))."""

    kind: str
    args: tuple = ()


class Token(NamedTuple):
    kind: str  # "num", "name" (one letter), "cmd", "word", "char" or "end"
    value: str


class Unreadable(Exception):
    """The text is no answer that the reader knows; it can still agree as text."""


class Undefined(Exception):
    """The expression has no value here: outside its domain, or too large."""


class NeedsWorker(Exception):
    """The verdict needs sympy, or more work than the calling process should do."""


# ---------------------------------------------------------------------------------------------------------------------
# Response -> answer
# ---------------------------------------------------------------------------------------------------------------------

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
BETWEEN_BOXES = re.compile(  # commas, a few words that end in "and", the name of the next value; not a new paragraph
    r"(?!.*\$\$)[ ,;&$]*(?:[^.?!:\n]{0,24}\band\b)?(?:[ $,;(}]|\\[(, ;]|\\q?quad)*(?:\w+\s*=\s*)?"
)
MAX_BETWEEN: int = 80  # characters
END_OF_TURN = "<|im_end|>"  # a text that goes on behind it is another turn


def extract_answer(response: str) -> str | None:
    r"""The content of the last complete box, or None.

    >>> extract_answer(r"First \boxed{41}, no: \boxed{\frac{1}{2}} and then \boxed{4")
    '\\frac{1}{2}'
    >>> extract_answer(r"The roots are $\boxed{1}$ and $\boxed{2}$.")
    '1, 2'
    """
    response = response.split(END_OF_TURN, 1)[0]
    opened: list[re.Match] = []
    boxes: list[tuple[int, int, int]] = []  # where the command starts, its content starts, its content ends
    for match in BOX.finditer(response):
        if match[0] == "{" or match[0].startswith(("\\boxed", "\\fbox")):
            opened.append(match)
        elif match[0] == "}" and opened:
            opening = opened.pop()
            if opening[0] != "{":
                boxes.append((opening.start(), opening.end(), match.start()))
    if not boxes:
        return None
    boxes.sort()
    last = [boxes.pop()]
    for box in reversed(boxes):
        between = response[box[2] + 1 : last[0][0]]
        if box[2] > last[0][0] or len(between) > MAX_BETWEEN or not BETWEEN_BOXES.fullmatch(between):
            break
        last.insert(0, box)
    return ", ".join(response[start:end].strip() for _, start, end in last)


# ---------------------------------------------------------------------------------------------------------------------
# Answer -> text without dress
# ---------------------------------------------------------------------------------------------------------------------

UNICODE = {  # signs and their LaTeX
    **dict.fromkeys("−–—‐‑﹣－", "-"), **dict.fromkeys("×✕", r"\times "), **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u200a\u3000", " "), **dict.fromkeys("’‘′ʹ", "'"),
    "÷": "/", "∕": "/", "⁄": "/", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ",
    "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "°": r"^\circ ", "≈": r"\approx ", "ℝ": r"\mathbb{R}", "，": ",", "（": "(", "）": ")", "、": ",", "；": ";",
    "％": "%", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅔": r"\frac{2}{3}",
    "∖": r"\setminus ", "…": r"\ldots ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "€": r"\text{euros}", "£": r"\text{pounds sterling}", "¥": r"\text{yen}", "¢": r"\text{cents}",
    "\u200b": "", "\ufeff": "",
}  # fmt: skip
words = str.split
GREEK = words("alpha beta gamma delta epsilon zeta eta theta lambda mu nu xi pi rho sigma tau phi chi psi omega")
UNICODE |= dict(zip("αβγδεζηθλμνξπρστφχψω", (f"\\{name} " for name in GREEK), strict=True))
UNICODE_TABLE = str.maketrans(UNICODE)
SUPERSCRIPTS, SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ"
LIFTED = str.maketrans(SUPERSCRIPTS + SUBSCRIPTS, "0123456789+-()n" * 2)
FENCES = re.compile(r"\${1,2}([^$]+)\${1,2}|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.*)\*\*|`([^`]*)`", re.S)  # around all
TEXT = re.compile(r"\\(?:text[a-z]*|[mh]box|math(?:rm|bf|it|sf)|operatorname\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
AFTER_VALUE = re.compile(r"[\d})!]$|\\(?:text|mathrm|mbox)\s*\{[^{}]*\}\s*(?:/|\\cdot)$")
CLAUSE = re.compile(r"\b(?:where|such that|for (?:all|any|some|every|each|integers?))\b")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,/])(?! \d+(?![\d/]))")


def repeating(match: re.Match) -> str:
    r"""0.1\overline{6} -> \frac{15}{90}"""
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    top = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


def undress_text(match: re.Match) -> str:
    r"""What \text{...} stands for: a comma (and), mathematics (225; A,C,F), or words, which stay \text{words}."""
    content = re.sub(r"\\[,;:! ]|[~{}$]", " ", match[1]).strip()
    if re.fullmatch(r"(?:,?\s*(?:and|or)|&)\s*,?", content):
        return " , "
    if "\\" in content or not content:
        return f" {TEXT.sub(undress_text, match[1])} "
    before = match.string[: match.start()].rstrip(" ~\\,;:")
    vector = len(content) == 1 and match[0].startswith(r"\mathbf")
    unit = AFTER_VALUE.search(before) and content[0].isalpha() and content not in ("e", "i", "d") and not vector
    if not unit and (not re.search(r"[A-Za-z]{2}", content) or content[0].isdigit() or content[-1] == "="):
        return f" {match[1]} "
    return ",".join(rf"\text{{{part.strip()}}}" for part in content.split(","))


DRESS = [  # what to replace by what, in this order
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\\\(?:\[-?[\d.]+\s*[a-z]{2}\])?", r"\\cr "),
        (rf"([{SUPERSCRIPTS}]+)", lambda m: "^{" + m[1].translate(LIFTED) + "}"),
        (rf"([{SUBSCRIPTS}]+)", lambda m: "_{" + m[1].translate(LIFTED) + "}"),
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"(?<=\d)(?:\{,\}(?:\\!)?|\\!|\\,|,\s*\\!)\s*(?=\d{3}(?!\d))", ""),  # thousands
        (r"\\!", ""),
        (r"\\\$(?=\})", "dollars"),  # \text{\$}
        (TEXT.pattern, undress_text),
        (r"\^\{?\s*\\circ\s*\}?\s*(C|F)(?![A-Za-z])", r"\\text{degrees \1}"),
        (r"\\(?:left|right)\s*\.", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![A-Za-z])", ""),
        (r"\\(?:(?:display|text|script)style|(?:no)?limits|rm|bf|it|small|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])", " "),
        (r"\\(?:[hv]?phantom|color)\s*(?:\{[^{}]*\}|\S)|\\[hv]space\*?\{[^{}]*\}|\\q?quad|\\[,;:> ]|[~\s]+", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\(?:math(?!bb)[a-z]+|text[a-z]+|boldsymbol|bm|pmb|underline|boxed|fbox)\s*(?=\{)", ""),
        (r"^(-?)\\\$", r"\\text{dollars}\1"),
        (r"\\\$", " "),
        (r"\$|\\[()\[\]]", " "),
        (r"\\%|\\text\{\s*%\s*\}|(?<![a-z])(?:percent(?:age)?|pct)\b|\\text\{percent\}", "%"),
        (r"\\lvert|\\rvert|\\vert|\\mid(?![A-Za-z])", "|"),
        (r"\^\{?\s*\\prime\s*\}?", "'"),
        (r"\\text\{(?:all )?real(?: number)?s\}", r"\\mathbb{R}"),
        (r"\b([apAP])\.\s?([mM])\b\.?", r"\1\2"),
        (r"(?<!\.)\.(?=\s*[)\]}])", ""),  # a period inside brackets
        (r"\b(?:np|math|numpy|sympy)\.", ""),
        (r"(?<=\d)\s*((?:[kcm]?m|ft|mi|k?g|k?J|N|L)/(?:s|h|hr|min|kg|mol|m)(?:\^\{?\d\}?)?)$", r"\\text{\1}"),
        (r"\b([fgh])\s*\^\s*\{?\s*-1\s*\}?\s*(?=\()", r"\1'"),  # an inverse function is a name, not a power
        (r"\\\{ ?[a-z] ?(?:\\in ?\\mathbb ?\{?R\}? ?)?[:|](?=[^:]*(?:[<>=|]|\\[lgn]e))", r"\\{"),  # {x : x > 1}
        (r"^\](?=.*,)", "("),  # ]0,1[ is (0,1)
        (r"(?<=\w)\[$", ")"),
        (r"\*\*", "^"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"\.\.\.+", r"\\ldots "),
        (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))", repeating),
    ]
]


def closing_brace(text: str) -> int:
    """Where the group that the text starts with ends, or -1."""
    depths = itertools.accumulate((character == "{") - (character == "}") for character in text)
    return next((at for at, depth in enumerate(depths) if not depth), -1)


@functools.lru_cache(maxsize=8192)
def tidy(answer: str, thousands: bool = True) -> str:
    r"""The answer without its dress.

    >>> tidy(r"$\left(\dfrac12,\;1{,}000\text{ cm}\right).$")
    '(\\frac12, 1000\\text{cm})'
    """
    text = answer.strip().rstrip("\\")
    while match := FENCES.fullmatch(text):
        text = next(part for part in match.groups() if part is not None).strip()
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # \\frac, escaped once too often
    text = text.translate(UNICODE_TABLE)
    for pattern, replacement in DRESS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\s+", " ", text).lstrip(' ,;:`"').rstrip(' .,;:`"')
    while text[:1] == "{" and closing_brace(text) == len(text) - 1:
        text = text[1:-1].lstrip().rstrip(" .,;")
    if clause := CLAUSE.search(text):
        text = text[: clause.start()].rstrip(" ,;").removesuffix(r"\text{").rstrip(" ,;") or text
    if thousands and not re.search(r"[(\[]|\\\{", text):  # (1,234) is a pair
        text = THOUSANDS.sub(lambda m: re.sub(r"[ ,]", "", m[0]), text)
    return re.sub(r"(?<![\d./])(\d+) (\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}", text)  # 3 3/4


# ---------------------------------------------------------------------------------------------------------------------
# Text -> tree: constructors that keep rational arithmetic exact, tokens, and a recursive-descent reader
# ---------------------------------------------------------------------------------------------------------------------


def number(value: int | Fraction) -> Node:
    return Node("num", (Fraction(value),))


ONE, MINUS_ONE = number(1), number(-1)
IMAGINARY, EULER, PI, INFINITY = (Node("const", (name,)) for name in ("i", "e", "pi", "oo"))


def bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def combine(kind: str, parts: tuple[Node, ...], neutral: int) -> Node:
    """A sum or a product, flat and with its numbers folded into one."""
    parts = tuple(inner for part in parts for inner in (part.args if part.kind == kind else (part,)))
    numbers = [part.args[0] for part in parts if part.kind == "num"]
    if sum(map(bits, numbers)) > 4 * MAX_BITS:
        raise Unreadable("too large")
    folded = number(sum(numbers) if kind == "add" else math.prod(numbers))
    kept = tuple(part for part in parts if part.kind != "num")
    if not kept:
        return folded
    kept += (folded,) * (folded.args[0] != neutral)
    return kept[0] if len(kept) == 1 else Node(kind, kept)


def add(*terms: Node) -> Node:
    """A sum; of matrices of one shape cell by cell."""
    if shape(terms[0]) and len(set(map(shape, terms))) == 1:
        rows = zip(*(term.args for term in terms), strict=True)
        return matrix(map(add, *(row.args for row in summands)) for summands in rows)
    return combine("add", terms, 0)


def multiply(*factors: Node) -> Node:
    """A product; of matrices in their order, with numbers and expressions before or behind them."""
    matrices = [factor for factor in factors if shape(factor)]
    if not matrices:
        return combine("mul", factors, 1)
    scalar = multiply(*(factor for factor in factors if not shape(factor)))
    product, *others = matrices
    for other in others:
        if shape(product)[1] != shape(other)[0]:
            raise Unreadable("matrices that do not fit")
        columns = list(zip(*(row.args for row in other.args), strict=True))
        product = matrix((add(*map(multiply, row.args, column)) for column in columns) for row in product.args)
    return matrix((multiply(scalar, cell) for cell in row.args) for row in product.args)


def matrix(rows: Iterable[Iterable[Node]]) -> Node:
    return Node("matrix", tuple(Node("row", tuple(row)) for row in rows))


def shape(node: Node) -> tuple[int, int] | None:
    return (len(node.args), len(node.args[0].args)) if node.kind == "matrix" else None


def determinant(rows: Sequence[Sequence[Node]]) -> Node:
    """By its first row, which is quick enough for MAX_ROWS."""
    if not rows:
        return ONE
    minors = (determinant([row[:at] + row[at + 1 :] for row in rows[1:]]) for at in range(len(rows)))
    return add(*(multiply(number((-1) ** at), rows[0][at], minor) for at, minor in enumerate(minors)))


def negative(value: Node) -> Node:
    if value.kind == "unit":  # -5 degrees
        return Node("unit", (negative(value.args[0]), value.args[1]))
    return multiply(MINUS_ONE, value)


def power(base: Node, exponent: Node) -> Node:
    if exponent == ONE:
        return base
    if base.kind == exponent.kind == "num" and exponent.args[0].denominator == 1:
        value, times = base.args[0], exponent.args[0].numerator
        if (abs(times) == 1 or abs(times) * bits(value) <= MAX_BITS) and (value or times > 0):
            return number(value**times)
    return Node("pow", (base, exponent))


REALS = Node("tuple", ("(", ")", multiply(MINUS_ONE, INFINITY), INFINITY))


def divide(top: Node, bottom: Node) -> Node:
    return multiply(top, power(bottom, MINUS_ONE))


def call(name: str, *args: Node) -> Node:
    """A function; factorials and binomials of small whole numbers are computed."""
    exact = {"factorial": math.factorial, "binom": math.comb}.get(name)
    whole = [arg.args[0] for arg in args if arg.kind == "num" and arg.args[0].denominator == 1]
    if exact and len(whole) == len(args) and all(0 <= value <= MAX_FACTORIAL for value in whole):
        return number(exact(*map(int, whole)))
    return Node("call", (name, *args))


FUNCTIONS = set(
    words("sin cos tan cot sec csc sinh cosh tanh coth sech csch arcsin arccos arctan arccot arcsec arccsc arcsinh")
    + words("arccosh arctanh asin acos atan ln log lg exp sqrt abs floor ceil gcd lcm max min arg Re Im sgn sign")
)
SPELLINGS = {f"arc{name}": f"a{name}" for name in words("sin cos tan cot sec csc sinh cosh tanh")}
SPELLINGS |= {"log": "ln", "sgn": "sign"}
NAMES = dict.fromkeys(("infty", "infinity", "inf", "oo"), "infty") | {name: name for name in GREEK}
UNITS = set(  # words that are no product of letters; any run of five letters is a word, too
    words("cm mm km ft in kg lb lbs oz ml mL mi yd sq cups unit inch feet foot mile yard gram cent hr hrs hour mins")
    + words("sec secs day days week year mph kph rad deg Hz eV USD Rs am pm AM PM per men boys ways pts yes no Yes No")
)
COMMANDS = {  # other names of one command
    r"\cdot": "*", r"\times": "*", r"\ast": "*", r"\div": "/", r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge",
    r"\geqslant": r"\ge", r"\lt": "<", r"\gt": ">", r"\neq": r"\ne", r"\lbrace": r"\{",
    r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\varnothing": r"\emptyset", r"\dots": r"\ldots",
    r"\cdots": r"\ldots", r"\colon": ":", r"\backslash": r"\setminus", r"\varphi": r"\phi", r"\land": ",",
    r"\varepsilon": r"\epsilon", r"\degree": r"\circ", r"\lor": ",", r"\equiv": "=", r"\overrightarrow": r"\vec",
}  # fmt: skip
FLIPPED = {">": "<", r"\ge": r"\le"}
RELATIONS = {"=", r"\approx", "<", ">", r"\le", r"\ge", r"\ne", r"\in"}
SET_SIGNS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "minus"}
CLOSING = {"(": ")", "[": "]", r"\{": r"\}", "{": "}", "|": "|", r"\langle": r"\rangle"}
CLOSING |= {r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
BARS = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}
ACCENTS = {r"\overline", r"\bar", r"\hat", r"\vec", r"\dot", r"\ddot", r"\tilde", r"\widehat"}
MATRICES = {"pmatrix", "bmatrix", "Bmatrix", "matrix", "smallmatrix", "array", "vmatrix"}
NO_FACTOR = {r"\cr", r"\end", r"\circ", r"\pm", r"\mp", r"\to", r"\rightarrow", r"\implies", r"\Rightarrow", r"\pmod"}
NO_FACTOR |= RELATIONS | set(SET_SIGNS) | set(CLOSING.values())
CHANGES_MEANING = re.compile(r"\b(?:not?|non|never|without|except|undefined|wrong|than|least|most|or)\b", re.I)
TOKEN = re.compile(
    r"(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,5}(?![A-Za-z\d.]))?)|\\text\{(?P<word>[^{}]*)\}"
    r"|(?P<cmd>\\(?:[A-Za-z]+|.))|(?P<run>[A-Za-z]+)|(?P<char>\S)",
    re.S,
)


def tokens_of(text: str) -> Iterator[Token]:
    """Numbers, commands, words and letters; a run of letters is a known name, a word, or a product of letters."""
    for match in TOKEN.finditer(text):
        kind, value = match.lastgroup, match[match.lastgroup]
        if kind == "run":
            if value in ("and", "or"):
                yield Token("char", ",")
            elif value in FUNCTIONS or value in NAMES:
                yield Token("cmd", "\\" + NAMES.get(value, value))
            elif value in UNITS or len(value) > 4:
                yield Token("word", value)
            else:
                yield from (Token("name", letter) for letter in value)
        elif kind in ("cmd", "char"):
            value = COMMANDS.get(value, value)
            yield Token("cmd" if value[0] == "\\" else "char", value)
        else:
            yield Token(kind, value)


class Reader:
    """Recursive descent over the tokens of one answer; each method reads one level of the grammar."""

    def __init__(self, text: str) -> None:
        self.tokens = list(tokens_of(text))
        self.at = 0
        self.depth = self.matrices = 0
        self.in_bars = False  # inside |...|, where a bar closes and does not open

    def peek(self, ahead: int = 0) -> Token:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else Token("end", "")

    def take(self) -> Token:
        self.at += 1
        return self.peek(-1)

    def accept(self, *values: str) -> str | None:
        token = self.peek()
        if token.kind in ("char", "cmd") and token.value in values:
            return self.take().value
        return None

    def expect(self, value: str) -> None:
        if not self.accept(value):
            raise Unreadable(f"{value!r} is missing")

    def answer(self) -> Node:
        items = self.items("")
        if self.peek().kind != "end" or not items:
            raise Unreadable(f"unexpected {self.peek().value!r}")
        return items[0] if len(items) == 1 else Node("list", tuple(items))

    def items(self, *closing: str) -> list[Node]:
        """Items between commas up to a closing sign, which is left, or the end."""
        found: list[Node] = []
        while True:
            while self.accept(",", ";"):
                pass
            if self.peek().kind == "end" or self.peek().value in closing:
                return found
            found.append(self.item())
            if len(found) > MAX_ITEMS:
                raise Unreadable("too many items")
            if self.peek().value not in (",", ";"):
                return found

    def item(self) -> Node:
        """Words, then mathematics, then a unit: The answer is 5 cm."""
        found = []
        while self.peek().kind == "word":
            found.append(self.take().value)
            self.accept(":")  # Answer: 5
        before = " ".join(found)
        if found and (self.peek().kind == "end" or self.peek().value in (",", ";", ")", "]", "}", r"\}")):
            return Node("text", (re.sub(r"[\s.'\"-]+", " ", before).strip().casefold(),))
        value = self.relation()
        behind = f"mod {self.argument()}" if self.accept(r"\pmod") else self.unit()
        if CHANGES_MEANING.search(f"{before} {behind}"):
            raise Unreadable("words that cannot be ignored")
        unit = plain_unit(behind or before)
        unit = unit if behind or unit in CURRENCIES else ""
        return Node("unit", (value, unit)) if unit else value

    def unit(self) -> str:
        parts = []
        while True:
            if self.peek().kind == "word" or (parts and self.peek().value in "/*" and self.peek(1).kind == "word"):
                parts.append(self.take().value)
            elif parts and self.accept("^"):
                exponent = self.argument()
                parts.append(f"^{exponent.args[0]}" if exponent.kind == "num" else "^?")
            else:
                return " ".join(parts)

    def relation(self) -> Node:
        self.accept("=", r"\approx")  # "= 5"
        terms, signs = [self.ratio()], []
        while sign := self.accept(*RELATIONS):
            signs.append(sign)
            terms.append(self.ratio())
        if r"\approx" in signs:  # x = 1/3 \approx 0.33 is x = 1/3, but x \approx 3 is x = 3
            end = signs.index(r"\approx")
            exact = end > 0 or not is_name(terms[0])
            signs, terms = (signs[:end], terms[: end + 1]) if exact else (["="], terms[:2])
        if signs == [r"\in"]:
            return terms[1]
        if r"\in" in signs:
            raise Unreadable("mixed relations")
        if signs and all(sign in FLIPPED for sign in signs):  # a > b is b < a
            signs, terms = [FLIPPED[sign] for sign in reversed(signs)], terms[::-1]
        return Node("rel", (tuple(signs), *terms)) if signs else terms[0]

    def ratio(self) -> Node:
        parts = [self.union()]
        while self.accept(":"):
            parts.append(self.union())
        return Node("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def union(self) -> Node:
        value = self.sum()
        while sign := self.accept(*SET_SIGNS):
            parts = value.args if value.kind == SET_SIGNS[sign] == "union" else (value,)
            value = Node(SET_SIGNS[sign], (*parts, self.sum()))
        return value

    def sum(self) -> Node:
        terms = [self.product()]
        while sign := self.accept("+", "-"):
            terms.append(negative(self.product()) if sign == "-" else self.product())
        return add(*terms) if len(terms) > 1 else terms[0]

    def product(self) -> Node:
        start = self.at  # of the last factor
        factors = [self.signed()]
        while True:
            if sign := self.accept("*", "/"):
                start = self.at
                factors.append(self.signed() if sign == "*" else power(self.signed(), MINUS_ONE))
            elif self.starts_factor():
                if self.peek().kind == self.peek(-1).kind == "num" and start == self.at - 1:
                    raise Unreadable("two numbers side by side")
                start = self.at
                factors.append(self.powered())
            else:
                return multiply(*factors) if len(factors) > 1 else factors[0]

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind == "cmd":
            return token.value not in NO_FACTOR
        opens = token.value in ("(", "[", "{") or (token.value == "|" and not self.in_bars)
        return token.kind in ("num", "name") or (token.kind == "char" and opens)

    def signed(self) -> Node:
        minus = False
        while sign := self.accept("+", "-"):
            minus ^= sign == "-"
        return negative(self.powered()) if minus else self.powered()

    def powered(self) -> Node:
        r"""A base with what is written behind it: x^2, n!, 50%, 30^\circ."""
        value = self.atom()
        for _ in range(MAX_DEPTH):
            if self.accept("^"):
                if self.peek().value == "{" and self.peek(1).value == r"\circ" and self.peek(2).value == "}":
                    self.at += 3
                    value = Node("unit", (value, "degree"))
                elif self.peek().value != r"\circ":
                    value = power(value, self.exponent())
            elif self.accept(r"\circ"):
                value = Node("unit", (value, "degree"))
            elif self.accept("!"):
                value = call("factorial", value)
            elif self.accept("%"):
                value = Node("unit", (value, "percent"))
            else:
                return value
        raise Unreadable("too many signs")

    def exponent(self) -> Node:
        sign = self.accept("+", "-")
        value = self.argument()
        return negative(value) if sign == "-" else value

    def argument(self, one_digit: bool = False) -> Node:
        r"""An argument as TeX takes it, a group or one token; \frac43 takes one digit, but 10^23 means 10^{23}."""
        token = self.peek()
        if one_digit and token.kind == "num" and len(token.value) > 1 and token.value.isdigit():
            self.tokens[self.at] = Token("num", token.value[1:])
            return number(int(token.value[0]))
        return self.atom(is_argument=True)

    def group(self, opening: str) -> list[Node]:
        outside, self.in_bars = self.in_bars, opening == "|"
        items = self.items(CLOSING[opening])
        self.in_bars = outside
        return items

    def atom(self, is_argument: bool = False) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        token = self.take()
        if token.kind == "num":
            value = self.numeral(token.value, is_argument)
        elif token.kind == "name":
            value = self.symbol(token.value, is_argument)
        elif token.value in CLOSING:
            value = self.bracket(token.value)
        elif token.kind == "cmd":
            value = self.command(token.value, is_argument)
        else:
            raise Unreadable(f"unexpected {token.value!r}")
        self.depth -= 1
        return value

    def bracket(self, opening: str) -> Node:
        items = self.group(opening)
        closing = self.take().value
        if closing not in (CLOSING[opening], *(")", "]") * (opening in "([")):
            raise Unreadable("a bracket is open")
        if len(items) == 1 and opening == "{":
            return items[0]
        if opening == r"\{" and items and all(item.kind == "rel" for item in items):  # {x : 1 < x}
            return items[0] if len(items) == 1 else Node("list", tuple(items))
        if opening in ("{", r"\{"):
            return Node("set", tuple(items))
        if not items or (opening in BARS and len(items) > 1):
            raise Unreadable("brackets around nothing")
        if opening in BARS:
            return call(BARS[opening], items[0])
        if len(items) > 1 or closing != CLOSING[opening]:
            return Node("tuple", (opening, closing, *items))
        if items[0].kind == "num" and self.peek().value == "_":
            return self.with_base(str(items[0].args[0]))
        return items[0]

    def with_base(self, digits: str) -> Node:
        self.expect("_")
        return Node("based", (digits.lstrip("0"), self.argument()))

    def numeral(self, text: str, is_argument: bool) -> Node:
        r"""A number; a mixed number (3\frac{3}{4} is a sum); digits with a base."""
        if "e" in text.lower() and abs(int(re.split("[eE]", text)[1])) * 3 > MAX_BITS:
            raise Unreadable("too large")
        value = number(Fraction(re.sub(r"\.(?=[eE]|$)", "", text)))
        if not is_argument and self.peek().value == "_":
            return self.with_base(text)
        if is_argument or not text.isdigit():
            return value
        start = self.at
        if self.accept(r"\frac"):
            part = divide(self.argument(True), self.argument(True))
            if part.kind == "num" and 0 <= part.args[0] < 1:
                return add(value, part)
            self.at = start
        return value

    def symbol(self, name: str, is_argument: bool) -> Node:
        """A letter with its primes and subscript; f(x) is one thing, n(n+1) a product."""
        if name in ("i", "e") and self.peek().value not in ("_", "'"):
            return IMAGINARY if name == "i" else EULER
        while mark := self.accept("'", "_"):
            name += "'" if mark == "'" else "_" + self.plain_group()
        if not is_argument and self.peek().value == "(":
            inside = list(itertools.takewhile(lambda token: token.value != ")", self.tokens[self.at + 1 :]))
            named = all(token.kind == "name" or token.value == "," or token.value[1:] in GREEK for token in inside)
            if name[0] in "fgFG" or (inside and named) or (name.isupper() and len(inside) == 1):
                self.take()
                arguments = self.group("(")
                self.expect(")")
                return Node("opaque", (name, *arguments))
        return Node("sym", (name,))

    def plain_group(self) -> str:
        """A subscript, or a name in braces, as text."""
        if not self.accept("{"):
            return self.take().value
        parts = []
        while not self.accept("}"):
            if self.peek().kind == "end" or self.peek().value == "{":
                raise Unreadable("a brace is open")
            parts.append(self.take().value.lstrip("\\"))
        return "".join(parts)

    def command(self, name: str, is_argument: bool) -> Node:
        bare = name[1:]
        if name == r"\frac":
            return divide(self.argument(True), self.argument(True))
        if name == r"\binom":
            return call("binom", self.argument(True), self.argument(True))
        if name == r"\sqrt":
            index = number(2)
            if self.accept("["):
                index = self.sum()
                self.expect("]")
            return call("root", self.argument(), index)
        if bare in FUNCTIONS:
            return self.function(bare)
        if name == r"\begin":
            return self.matrix()
        if name in (r"\pi", r"\infty", r"\emptyset"):
            return {r"\pi": PI, r"\infty": INFINITY, r"\emptyset": Node("set")}[name]
        if name == r"\mathbb":
            letter = self.plain_group()
            return REALS if letter == "R" else Node("sym", (name + letter,))
        if name in ACCENTS:
            return self.symbol(name + self.plain_group(), is_argument)
        if name in (r"\angle", r"\triangle"):
            return self.atom(is_argument)
        if bare.isalpha() and name not in NO_FACTOR:
            return self.symbol(name, is_argument)
        raise Unreadable(f"unexpected {name!r}")

    def function(self, name: str) -> Node:
        r"""\sin^2 2x, \log_2 8, \ln|x|, \max(1, 2): without brackets the argument is the product that follows."""
        exponent = base = None
        while mark := self.accept("^", "_"):
            if mark == "^":
                exponent = self.exponent()
            else:
                base = self.argument()
        if self.peek().value in ("(", "[", "{", "|"):
            inner = self.atom(is_argument=True)
            args = inner.args[2:] if inner.kind == "tuple" else inner.args if inner.kind == "set" else (inner,)
        else:
            factors = [self.signed()]
            while self.starts_factor() and self.peek().value[1:] not in FUNCTIONS:
                factors.append(self.powered())
            args = (multiply(*factors),)
        if name == "sqrt":
            value = call("root", *args, number(2))
        elif name == "lg" or (name == "log" and base):
            value = divide(call("ln", *args), call("ln", base or number(10)))
        elif name in ("tanh", "coth"):  # by functions whose size shows how many digits are needed
            top, bottom = ("sinh", "cosh") if name == "tanh" else ("cosh", "sinh")
            value = divide(call(top, *args), call(bottom, *args))
        else:
            value = call(SPELLINGS.get(name, name), *args)
        if exponent == MINUS_ONE and "a" + name in SPELLINGS.values():
            return call("a" + name, *args)
        return power(value, exponent) if exponent else value

    def matrix(self) -> Node:
        name = self.plain_group()
        self.matrices += 1
        if self.matrices > MAX_MATRICES:
            raise Unreadable("too many matrices")
        if name == "array":
            self.plain_group()
        rows: list[list[Node]] = [[]]
        while not self.accept(r"\end"):
            if self.accept(r"\cr"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].extend(self.items("&"))
            if self.peek().kind == "end" or sum(map(len, rows)) > MAX_ITEMS:
                raise Unreadable("a matrix without end")
        rows = [row for row in rows if row]
        if self.plain_group() != name or name not in MATRICES | {"cases"}:
            raise Unreadable("no matrix")
        if name == "cases":
            return Node("list", tuple(cell for row in rows for cell in row))
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of different lengths")
        if name == "vmatrix":
            if not rows or len(rows) != len(rows[0]) or len(rows) > MAX_ROWS:
                raise Unreadable("no square")
            return determinant(rows)
        if not rows:
            raise Unreadable("an empty matrix")
        return matrix(rows)


CURRENCIES = {"dollar", "euro", "yen", "pound sterling", "rupee"}
UNIT_NAMES = {
    "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "m": "meter", "ft": "foot", "feet": "foot",
    "in": "inch", "inche": "inch", "kg": "kilogram", "g": "gram", "lb": "pound", "oz": "ounce", "s": "second",
    "sec": "second", "h": "hour", "hr": "hour", "min": "minute", "mi": "mile", "yd": "yard", "deg": "degree",
    "sq": "square", "per": "/", "mph": "mile / hour", "kph": "kilometer / hour", "centimetre": "centimeter",
    "metre": "meter", "kilometre": "kilometer", "l": "liter", "ml": "milliliter", "litre": "liter", "rs": "rupee",
    "usd": "dollar", "squared": "^2", "cubed": "^3",
}  # fmt: skip


def plain_unit(unit: str) -> str:
    """
    >>> plain_unit("square cm"), plain_unit("centimeters ^2")
    ('centimeter ^2', 'centimeter ^2')
    """
    found = re.findall(r"[a-z']+|\^-?\d+|/", unit.casefold())
    singular = [word[:-1] if len(word) > 2 and word[-1] == "s" and word[-2] != "s" else word for word in found]
    text = " ".join(UNIT_NAMES.get(word, word) for word in singular)
    return re.sub(r"\b(square|cubic) (\w+)", lambda m: f"{m[2]} ^{2 if m[1] == 'square' else 3}", text)


def sign_choices(text: str) -> list[str]:
    r"""1 \pm \sqrt{2} as two texts; each \pm has its own sign unless \mp ties them together."""
    signs = re.findall(r"\\(?:pm|mp)(?![A-Za-z])", text)
    if len(signs) > MAX_SIGNS:
        raise Unreadable("too many signs")
    tied = r"\mp" in signs
    choices = ["+" * len(signs), "-" * len(signs)] if tied else itertools.product("+-", repeat=len(signs))
    texts = []
    for choice in choices:
        pairs = zip(signs, choice, strict=True)
        values = iter([sign if name == r"\pm" else {"+": "-", "-": "+"}[sign] for name, sign in pairs])
        texts.append(re.sub(r"\\(?:pm|mp)(?![A-Za-z])", lambda m, values=values: next(values) + " ", text))
    return texts


@functools.lru_cache(maxsize=8192)
def read(text: str) -> Node | None:
    """The tree of a tidied answer, or None where the reader does not know it."""
    if len(text) > MAX_CHARS:
        return None
    try:
        trees = [Reader(choice).answer() for choice in sign_choices(text)]
    except Unreadable:
        return None
    return trees[0] if len(trees) == 1 else Node("list", tuple(trees))


# ---------------------------------------------------------------------------------------------------------------------
# Two trees -> equal or not: numbers first
# ---------------------------------------------------------------------------------------------------------------------


def rewrite(node: Node, rule: dict[Node, Node]) -> Node:
    if node in rule:
        return rule[node]
    return Node(node.kind, tuple(rewrite(arg, rule) if isinstance(arg, Node) else arg for arg in node.args))


def parts_of(node: Node) -> Iterator[Node]:
    yield node
    for arg in node.args:
        if isinstance(arg, Node):
            yield from parts_of(arg)


def symbols(*nodes: Node) -> list[Node]:
    return sorted({part for node in nodes for part in parts_of(node) if part.kind == "sym"})


def rounded(name: str):
    """floor or ceil; a value that is a whole number must not miss it by a rounding error."""

    def apply(mp, value):
        nearest = mp.nint(value)
        return nearest if abs(value - nearest) < mp.ldexp(1, -mp.prec // 2) else getattr(mp, name)(value)

    return apply


def raised(mp, base, exponent):
    if not base and mp.re(exponent) <= 0:
        raise Undefined("0 to a power that is not positive")
    if base and abs(exponent) * (abs(mp.mag(base)) + 1) > 4 * MAX_BITS:
        raise Undefined("too large")
    return mp.power(base, exponent)


def root(mp, value, index):
    """The real root where there is one: the cube root of -8 is -2."""
    if not mp.im(value) and value < 0 and mp.isint(index) and int(index) % 2:
        return -mp.power(-value, 1 / index)
    return mp.power(value, 1 / index)


def bounded(exact, general):
    """A function that is exact for small whole numbers and otherwise dear: mpmath's gamma at high precision."""

    def apply(mp, *values):
        if all(mp.isint(value) and 0 <= mp.re(value) <= MAX_FACTORIAL for value in values):
            return mp.mpf(exact(*(int(mp.re(value)) for value in values)))
        if max(map(abs, values)) > MAX_BITS or mp.prec > 1000:
            raise Undefined("too large")
        return general(mp, *values)

    return apply


RULES = {  # how a node is computed from its parts
    "add": lambda mp, *terms: mp.fsum(terms),
    "mul": lambda mp, *factors: mp.fprod(factors),
    "pow": raised,
    "ratio": lambda mp, a, b: a / b,
    "root": root,
    "abs": lambda mp, value: abs(value),
    "floor": rounded("floor"),
    "ceil": rounded("ceil"),
    "factorial": bounded(math.factorial, lambda mp, value: mp.gamma(value + 1)),
    "binom": bounded(math.comb, lambda mp, n, k: mp.binomial(n, k)),
    "min": lambda mp, *values: min(values),
    "max": lambda mp, *values: max(values),
    "Re": lambda mp, value: mp.re(value),
    "Im": lambda mp, value: mp.im(value),
}
for _name in words("sin cos tan cot sec csc sinh cosh tanh coth sech csch ln exp arg sign"):
    RULES[_name] = lambda mp, value, name=_name: getattr(mp, name)(value)
    if "a" + _name in SPELLINGS.values():
        RULES["a" + _name] = lambda mp, value, name="a" + _name: getattr(mp, name)(value)
SCALES = {"percent": number(Fraction(1, 100)), "degree": multiply(number(Fraction(1, 180)), PI)}


def evaluate(node: Node, values: dict[Node, Any], mp: Any, real: bool) -> Any:
    """The value of an expression in the context mp; Undefined outside its (real) domain and where it is too large."""
    kind, args = node
    if kind == "num":
        return mp.mpf(args[0].numerator) / args[0].denominator
    if node in values:
        return values[node]
    if kind == "const" and args[0] != "oo":
        return {"pi": +mp.pi, "e": +mp.e, "i": mp.j}[args[0]]
    if kind == "unit" and args[1] in SCALES:
        return evaluate(multiply(args[0], SCALES[args[1]]), values, mp, real)
    parts = [evaluate(arg, values, mp, real) for arg in args if isinstance(arg, Node)]
    name = args[0] if kind == "call" else kind
    try:
        if kind == "opaque":  # an unknown function: any fixed one that has no symmetries
            seed = mp.mpf(zlib.crc32(args[0].encode())) / 2**24
            value = seed + mp.fsum(mp.cos(seed * part + at) for at, part in enumerate(parts, 1))
        elif name in RULES:
            value = RULES[name](mp, *parts)
        else:
            raise Undefined(name)
        size = abs(int(mp.mag(value))) if value and mp.isfinite(value) else 0
        too_large = size > 2 * MAX_BITS or not mp.isfinite(value)
        mp.peak = max(mp.peak, size)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise Undefined(name) from error
    if too_large or (real and mp.im(value)):
        raise Undefined(name)
    return value


class Context(threading.local):
    """mpmath keeps its precision in a context, one for each thread; `peak` is the largest magnitude met, in bits.

    `deadline` is when, by the thread's processor time, the verdict must go to a worker.
    """

    def __init__(self) -> None:
        self.mp = mpmath.MPContext()
        self.mp.peak = 0
        self.deadline = 0.0


CONTEXT = Context()


def place(name: str, position: int, index: int) -> Fraction:
    """The value of the symbol at this position at one of the places where expressions are compared."""
    if name[0] in "nmkN":  # by custom a whole number
        return Fraction(
            index + 2 if position == 0 else (index * (2 * position + 3) + position) % (2 * position + 5) + 1
        )
    top = (7919 * position + 2741 * (position + 1) * (index + 1)) % 9973 + 1200
    return Fraction(top, -4096 if index % 4 == 3 else 4096)  # 0.3 to 2.7, now and then negative


def same_value(a: Node, b: Node, local: bool) -> bool:
    r"""Whether two expressions have the same value at every place where both have one, of which there must be some.

    The precision grows with the numbers in the answers and with those met on the way, so that neither 10^{-200} nor
    e^{-500} is lost beside 1. A difference of two tiny values counts unless it vanishes with more precision, as
    rounding errors do.
    """
    if a == b or a.kind == b.kind == "num":
        return a == b
    parts = [*parts_of(a), *parts_of(b)]
    names = symbols(a, b)
    steps = {"floor", "ceil"} & {part.args[0] for part in parts if part.kind == "call"}
    points = (5 * POINTS if steps else POINTS) if names else 1
    lowest = 2 * (sum(bits(part.args[0]) for part in parts if part.kind == "num") + GUARD_BITS)
    mp = CONTEXT.mp

    def values(index: int, real: bool, precision: int) -> tuple[Any, Any]:
        if local and (len(parts) * precision**2 > LOCAL_WORK or time.thread_time() > CONTEXT.deadline):
            raise NeedsWorker("long numbers, or many comparisons")
        mp.prec, mp.peak = precision, 0
        places = [place(name.args[0], position, index) for position, name in enumerate(names)]
        at = {name: mp.mpf(value.numerator) / value.denominator for name, value in zip(names, places, strict=True)}
        return evaluate(a, at, mp, real), evaluate(b, at, mp, real)

    def differ(index: int, real: bool) -> bool:
        if lowest > 4 * GUARD_BITS:  # a difference mostly shows with few digits, too
            left, right = values(index, real, 2 * GUARD_BITS)
            if abs(left - right) > mp.ldexp(1, 2 * mp.peak - GUARD_BITS):
                return True
        precision = lowest
        left, right = values(index, real, precision)
        if mp.peak > GUARD_BITS // 2:
            precision += 4 * mp.peak
            left, right = values(index, real, precision)
            if lowest + mp.peak > precision:
                raise Undefined("a pole, where values grow with the precision")
        difference, largest = abs(left - right), max(abs(left), abs(right))
        if difference <= mp.ldexp(largest, -precision // 2) or largest > mp.ldexp(1, -precision // 4):
            return difference > mp.ldexp(largest, -precision // 2)
        finer_left, finer_right = values(index, real, 2 * precision)
        return abs(finer_left - finer_right) > mp.ldexp(difference, -precision // 2)

    for real in (True, False) if names and IMAGINARY not in parts else (False,):
        found = False
        for index in range(points):
            try:
                if differ(index, real):
                    return False
                found = True
            except Undefined:
                continue
        if found:
            return True
    return False


def proportional(a: Node, b: Node, positive: bool, local: bool) -> bool:
    """Whether a = c b with a constant c != 0 (> 0), that is a(x) b(y) = a(y) b(x) for all x and y."""
    names = symbols(a, b)
    if not names or same_value(a, number(0), local) or same_value(b, number(0), local):
        return False
    other = {name: Node("sym", (name.args[0] + "'",)) for name in names}
    if not same_value(multiply(a, rewrite(b, other)), multiply(rewrite(a, other), b), local):
        return False
    return not positive or same_value(multiply(a, call("abs", b)), multiply(call("abs", a), b), local)


# ---------------------------------------------------------------------------------------------------------------------
# Then structure: units, names, sets, relations
# ---------------------------------------------------------------------------------------------------------------------

NO_SCALAR = {"list", "set", "tuple", "matrix", "row", "text", "rel", "based", "union", "intersection", "minus"}
LISTS = {"list", "set"}
REGIONS = {"union", "intersection", "minus"}


def same(a: Node, b: Node, local: bool = True) -> bool:
    """Whether two trees are the same answer; NeedsWorker (if `local`) where that takes sympy."""
    kinds = {a.kind, b.kind}
    if a == b:
        return True
    if "unit" in kinds:
        return same_quantity(a, b, local)
    left, right = definition(a, local), definition(b, local)
    named_alike = left and right and (left[0] == right[0] or "opaque" in (left[0].kind, right[0].kind))
    if named_alike and same(left[1], right[1], local):
        return True
    if bool(left) != bool(right) and kinds != {"rel"}:
        return same(left[1] if left else a, right[1] if right else b, local)
    if is_region(a) or is_region(b):
        return same_region(a, b, local)
    if kinds & LISTS:
        return same_elements(a, b, local)
    if kinds == {"rel"}:
        return same_relation(a, b, local)
    if len(kinds) == 1 and kinds & (NO_SCALAR | {"ratio"}):
        return len(a.args) == len(b.args) and all(
            same(x, y, local) if isinstance(x, Node) and isinstance(y, Node) else x == y
            for x, y in zip(a.args, b.args, strict=True)
        )
    if kinds & NO_SCALAR:
        return False
    if choice_letter(a) and choice_letter(b):
        return choice_letter(a) == choice_letter(b)
    return same_value(a, b, local)


def choice_letter(node: Node) -> str:
    """The letter of a choice, A to H in either case, or nothing."""
    name = node.args[0] if node.kind == "sym" or node == EULER else ""
    return name.upper() if len(name) == 1 and name in "ABCDEFGHabcdefgh" else ""


def quantity(node: Node) -> tuple[Node, str]:
    """(value, unit); of 5 m, which is read as a product, too, if nothing says otherwise."""
    if node.kind == "mul" and [part.kind for part in node.args] == ["sym", "num"]:
        return node.args[1], plain_unit(node.args[0].args[0])
    return node.args if node.kind == "unit" else (node, "")


def same_quantity(a: Node, b: Node, local: bool) -> bool:
    """A unit on one side only is ignored, or counts with its scale: 30 degrees is 30 and pi/6."""
    (value_a, unit_a), (value_b, unit_b) = quantity(a), quantity(b)
    if (value_a.kind == "ratio") != (value_b.kind == "ratio"):  # 4:30 p.m. is no fraction
        return False
    for one, other in ((a, b), (b, a)):
        if one.kind != "unit" and same(one, other.args[0], local):  # 2k is no quantity beside "2k units"
            return True
    if unit_a and unit_b:
        return unit_a == unit_b and same(value_a, value_b, local)
    scale = SCALES.get(unit_a + unit_b)
    if scale is None or {value_a.kind, value_b.kind} & NO_SCALAR:
        return False
    scaled = [multiply(value, scale) if unit else value for value, unit in ((value_a, unit_a), (value_b, unit_b))]
    return same_value(*scaled, local)


def is_name(node: Node) -> bool:
    """Whether this may stand before "=" and be left out: x, f(x), (x, y), AB, AB/CD, |AB|, A:B."""
    if node.kind in ("mul", "pow"):
        leaves = [part for part in parts_of(node) if part.kind not in ("mul", "pow") and part != MINUS_ONE]
        return all(leaf.kind == "sym" and leaf.args[0].isupper() for leaf in leaves)
    if node.kind in ("tuple", "ratio") or node.args[:1] == ("abs",):
        return all(is_name(part) for part in node.args if isinstance(part, Node))
    return node.kind in ("sym", "opaque")


def definition(node: Node, local: bool) -> tuple[Node, Node] | None:
    """(name, value) of x = 5, 5 = x and x = 2 + 3 = 5; of 2 + 3 = 5, too, if it is true."""
    if node.kind != "rel" or set(node.args[0]) != {"="}:
        return None
    _, first, *_, last = node.args
    if is_name(first) or is_name(last):
        return (first, last) if is_name(first) else (last, first)
    return (first, last) if not symbols(first, last) and same(first, last, local) else None


def elements(node: Node) -> list[Node]:
    return [value for item in node.args for value in elements(item)] if node.kind in LISTS else [node]


def same_elements(a: Node, b: Node, local: bool) -> bool:
    """Sets: each element of one is in the other. The list x = 1, y = 2 is also the point (1, 2)."""
    for one, other in ((a, b), (b, a)):
        named = [definition(item, local) for item in elements(one)] if other.kind == "tuple" else []
        if len(named) > 1 and all(named):
            values = [value for _, value in sorted(named, key=lambda pair: str(pair[0]))]
            return same(Node("tuple", ("(", ")", *values)), other, local)
    left, right = elements(a), elements(b)
    if max(len(left), len(right)) > MAX_ITEMS:
        return False
    pairs = ((left, right), (right, left))
    return all(x in others or any(same(x, y, local) for y in others) for some, others in pairs for x in some)


def same_relation(a: Node, b: Node, local: bool) -> bool:
    """Equations up to a factor that is not zero, inequalities up to a positive one or by their solutions."""
    (signs_a, *terms_a), (signs_b, *terms_b) = a.args, b.args
    if signs_a != signs_b:
        return False
    if all(same(x, y, local) for x, y in zip(terms_a, terms_b, strict=True)):
        return True
    if len(signs_a) > 1 or {part.kind for term in terms_a + terms_b for part in parts_of(term)} & NO_SCALAR:
        return False
    side_a, side_b = (add(first, multiply(MINUS_ONE, second)) for first, second in (terms_a, terms_b))
    return proportional(side_a, side_b, positive=signs_a[0] in FLIPPED.values(), local=local)


def is_region(node: Node) -> bool:
    """A set of real numbers that is no single interval, or is written as an inequality."""
    inequality = node.kind == "rel" and set(node.args[0]) <= {"<", r"\le", r"\ne"}
    several = node.kind == "list" and any(map(is_region, node.args))
    return node.kind in REGIONS or node == REALS or inequality or several


def as_interval(node: Node) -> Node:
    r"""(1, 2] of 1 < x \le 2: of inequalities in which one side is a bare name that the others do not have."""
    bare = [at for at, part in enumerate(node.args[1:]) if part.kind in ("sym", "opaque")] if node.kind == "rel" else []
    if len(bare) != 1 or not set(node.args[0]) <= {"<", r"\le"} or len(node.args) > 4:
        return node
    (at,), (signs, *terms) = bare, node.args
    if terms[at] in [part for term in terms[:at] + terms[at + 1 :] for part in parts_of(term)]:
        return node
    opening = "[" if at and signs[at - 1] == r"\le" else "("
    closing = "]" if signs[at:] and signs[at] == r"\le" else ")"
    return Node("tuple", (opening, closing, terms[at - 1] if at else REALS.args[2], *terms[at + 1 :], INFINITY)[:4])


def same_region(a: Node, b: Node, local: bool) -> bool:
    """Unions part by part, relations by their sides, everything else by sympy's sets."""
    if a.kind == b.kind == "rel" and same_relation(a, b, local):
        return True
    if symbols(a) and symbols(b) and symbols(a) != symbols(b):
        return False
    a, b = as_interval(a), as_interval(b)
    if a.kind == b.kind == "tuple":
        return same(a, b, local) if REALS not in (a, b) else a == b
    if {a.kind, b.kind} <= {"union", "list"} and same_elements(Node("list", a.args), Node("list", b.args), local):
        return True
    intervals = [node.kind == "set" or (node.kind == "tuple" and len(node.args) == 4) for node in (a, b)]
    if len(symbols(a)) > 1 or len(symbols(b)) > 1 or not all(map(operator.or_, intervals, map(is_region, (a, b)))):
        return False
    if local:
        raise NeedsWorker("sets")
    algebra = Algebra()
    return algebra.region(a) == algebra.region(b)  # sympy keeps sets in one form


class Algebra:
    """Trees as sympy's sets; only workers make one, and only out of what Reader has read and bounded."""

    def __init__(self) -> None:
        import sympy

        self.sp, self.x = sympy, sympy.Symbol("x", real=True)
        self.functions = {"add": sympy.Add, "mul": sympy.Mul, "pow": sympy.Pow, "root": sympy.root, "abs": sympy.Abs}
        self.functions |= {"ln": sympy.log, "exp": sympy.exp, "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan}
        self.constants = {"pi": sympy.pi, "e": sympy.E, "oo": sympy.oo}

    def scalar(self, node: Node) -> Any:
        kind, args = node
        if kind == "num":
            return self.sp.Rational(args[0].numerator, args[0].denominator)
        if kind == "sym":
            return self.x
        if kind == "const" and args[0] in self.constants:
            return self.constants[args[0]]
        function = self.functions.get(args[0] if kind == "call" else kind)
        if function is None:
            raise Unreadable(kind)
        return function(*(self.scalar(arg) for arg in args if isinstance(arg, Node)))

    def region(self, node: Node) -> Any:
        sp, (kind, args) = self.sp, node
        if kind == "tuple":
            return sp.Interval(self.scalar(args[2]), self.scalar(args[3]), args[0] == "(", args[1] == ")")
        if kind == "set":
            return sp.FiniteSet(*map(self.scalar, args))
        if kind in REGIONS or kind == "list":
            joined = {"intersection": sp.Intersection, "minus": sp.Complement}.get(kind, sp.Union)
            regions = [self.region(part) for part in args]
            if kind == "list" and all(part.kind == "rel" for part in args) and sp.Intersection(*regions):
                joined = sp.Intersection  # 1 < x, x < 2; but x < 1, x > 2 are two parts
            return joined(*regions)
        if kind != "rel":
            raise Unreadable(kind)
        relations = {"<": sp.Lt, r"\le": sp.Le, r"\ne": sp.Ne, "=": sp.Eq}
        values = [self.scalar(term) for term in args[1:]]
        steps = zip(args[0], values, values[1:], strict=False)
        return sp.Intersection(*(sp.solveset(relations[sign](a, b), self.x, sp.S.Reals) for sign, a, b in steps))


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------

PLAIN_NUMBER = re.compile(r"\s*([+-]?)0*(\d*)(?:\.(\d*?)0*)?\s*")
LABELLED = re.compile(  # (B) 12 but not (B) or (C)
    r"(?:\\text\{)?(?:(?:option|choice) )?\(?([A-H])(?:[).:](?![^ }\\]|\\(?!text))(?!.*\b(?:or|and)\b).*|\}?)",
    re.S | re.I,
)
DECIMAL_COMMA = re.compile(r"\s*-?(?:\d+,\d\d+|0,\d+)\s*")  # 1,22 is 1.22 where a decimal answers it
WORDS = re.compile(r"\\text\{|(?<![\\A-Za-z])[A-Za-z]{4}|^[A-Za-z '-]{3,}$")


def plain_number(text: str) -> tuple[str, ...] | None:
    """Sign, digits and decimals of a number without any dress; of any length, for they are compared as text."""
    match = PLAIN_NUMBER.fullmatch(text)
    if not match or not any(character.isdigit() for character in text):
        return None
    sign, digits, decimals = (part or "" for part in match.groups())
    return ("-" if sign == "-" and digits + decimals else "", digits, decimals)


def same_text(a: str, b: str) -> bool:
    """Whether two texts agree but for spaces, those between digits excepted, and words but for case, too."""
    bare_a, bare_b = (re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"\\text\{([^{}]*)\}", r"\1", text)) for text in (a, b))
    if WORDS.search(a) or WORDS.search(b):
        bare_a, bare_b = bare_a.casefold(), bare_b.casefold()
    return bare_a == bare_b


def judge(answer: str, gold: str, tolerance: float | None = None, local: bool = True) -> bool:
    """Whether an answer is right; NeedsWorker (if `local`) where this is too much for the calling process."""
    CONTEXT.deadline = time.thread_time() + LOCAL_SECONDS
    number_a, number_b = plain_number(answer), plain_number(gold)
    if number_a and number_b and tolerance is None:
        return number_a == number_b
    if max(len(answer), len(gold)) > MAX_CHARS:
        return bool(gold.strip()) and answer.strip() == gold.strip()
    text_a, text_b = tidy(answer), tidy(gold)
    if not text_a or not text_b:
        return False
    if same_text(text_a, text_b):
        return True
    a, b = read(text_a), read(text_b)
    for tree, text in ((a, text_b), (b, text_a)):
        if tree and choice_letter(tree) and (label := LABELLED.fullmatch(text)):
            return label[1].upper() == choice_letter(tree)
    if a is None or b is None:
        return False
    if tolerance is not None and within(a, b, tolerance):
        return True
    if {a.kind, b.kind} == {"list", "num"} and "," in answer + gold:  # 123,456 is also the list 123, 456
        a, b = (read(tidy(text, thousands=False)) or tree for text, tree in ((answer, a), (gold, b)))
        commas = DECIMAL_COMMA.fullmatch(answer) or DECIMAL_COMMA.fullmatch(gold)
        if commas and plain_number(answer.replace(",", ".")) == plain_number(gold.replace(",", ".")):
            return True
    if a.kind == b.kind == "num":
        return a == b
    if local:
        pool()  # sympy is imported there while the next answers are read, so that the first hard verdict waits less
    return same(a, b, local)


def within(a: Node, b: Node, tolerance: float) -> bool:
    """Whether two constants differ by at most the tolerance that the problem states."""
    CONTEXT.mp.prec = 100
    try:
        x, y = (evaluate(node.args[0] if node.kind == "unit" else node, {}, CONTEXT.mp, False) for node in (a, b))
    except Undefined:
        return False
    return bool(abs(x - y) <= tolerance)


def verdict_of(answer: str, correct: bool) -> Verdict:
    return Verdict(answer, correct, "correct" if correct else "wrong")


def finished(verdict: Verdict) -> Future[Verdict]:
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


def submit_answer(answer: str, gold: str, tolerance: float | None = None) -> Future[Verdict]:
    """The verdict on a bare answer as a future: already done where it is cheap, else it comes from a worker."""
    try:
        return finished(verdict_of(answer, judge(answer, gold, tolerance)))
    except NeedsWorker:
        return pool().submit(answer, gold, tolerance)
    except Exception:  # a fault of ours must cost one verdict, not the run that waits for it
        logging.getLogger(__name__).exception("grading failed: %.200r against %.200r", answer, gold)
        return finished(verdict_of(answer, False))


def submit(response: str, gold: str, tolerance: float | None = None) -> Future[Verdict]:
    """The verdict on a response as a future."""
    answer = extract_answer(response)
    if answer is None:
        return finished(Verdict(None, False, "no_answer"))
    return submit_answer(answer, gold, tolerance)


def grade(response: str, gold: str, tolerance: float | None = None) -> Verdict:
    r"""The verdict on a response.

    >>> grade(r"so it is \boxed{\frac{2}{4}}.", "0.5")
    Verdict(answer='\\frac{2}{4}', correct=True, status='correct')
    """
    return submit(response, gold, tolerance).result()


def is_equivalent(prediction: str, gold: str, tolerance: float | None = None) -> bool:
    """Whether two bare answers are the same; never raises, never hangs, never executes what it reads.

    >>> is_equivalent("(-oo, 1)", "x < 1"), is_equivalent("42 or 43", "42")
    (True, False)
    """
    return submit_answer(prediction, gold, tolerance).result().correct


# ---------------------------------------------------------------------------------------------------------------------
# Workers: fresh interpreters behind pipes, which inherit nothing of the caller (threads, CUDA, __main__). For each
# verdict a worker forks a child with an alarm, by which the kernel ends it whatever it is stuck in and whoever is gone.
# To replace a child takes a millisecond; to replace a worker, the second in which it imports sympy.
# ---------------------------------------------------------------------------------------------------------------------


def worker(seconds: float, address_space: int) -> None:
    """Answer requests on stdin, by true, false or null (no verdict in time), until it is closed or the caller gone."""
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    print(judge("|x| < 1", "(-1, 1)", local=False), flush=True)  # sympy is imported now, in no verdict's time: ready
    caller = os.getppid()
    while True:
        while not select.select([sys.stdin], [], [], 5)[0]:
            if os.getppid() != caller:  # a forked sibling may still hold the pipe open
                return
        line = sys.stdin.readline()
        if not line:
            return
        child = os.fork()
        if not child:
            answer_request(json.loads(line), seconds)
        if os.waitpid(child, 0)[1] != 0:
            print("null", flush=True)


def answer_request(case: list, seconds: float) -> NoReturn:
    """In a worker's child: print the verdict, or end without one."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # either signal ends the process
    signal.setitimer(signal.ITIMER_REAL, seconds * WALL_FACTOR)
    try:
        correct = judge(*case, local=False)
    except MemoryError:
        os._exit(1)
    except Exception:  # noqa: BLE001  sympy gives up in many ways; none of them is a proof
        correct = False
    signal.setitimer(signal.ITIMER_PROF, 0)  # from here on it is answered: one request, one line
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(sys.stdout.fileno(), f"{json.dumps(correct)}\n".encode())
    os._exit(0)


def start_worker() -> subprocess.Popen:
    command = [sys.executable, os.path.abspath(__file__), "--worker", str(VERDICT_SECONDS), str(WORKER_BYTES)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # Ctrl-C is not for the worker
    process.stdout.readline()  # until it is ready, its requests are for the other workers
    return process


def stop_worker(process: subprocess.Popen | None) -> None:
    if process is None:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()


class Pool:
    """Daemon threads, each with a worker of its own, that take requests from one queue."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self.serve, daemon=True) for _ in range(WORKERS)]
        for thread in self.threads:
            thread.start()

    def submit(self, answer: str, gold: str, tolerance: float | None) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        self.requests.put((future, answer, gold, tolerance))
        return future

    def serve(self) -> None:
        """Pass requests to a worker; one that ends instead of answering, which none should, is replaced."""
        process = None
        while True:
            with contextlib.suppress(OSError):  # no process to be had now: try again at the next request
                process = process or start_worker()
            request = self.requests.get()
            if request is None:
                break
            future, *case = request
            if not future.set_running_or_notify_cancel():
                continue
            reply = ""
            if process:
                with contextlib.suppress(OSError):
                    process.stdin.write(json.dumps(case) + "\n")
                    process.stdin.flush()
                    reply = process.stdout.readline()
            correct = json.loads(reply) if reply.endswith("\n") else None
            if not reply.endswith("\n"):
                stop_worker(process)
                process = None
            future.set_result(Verdict(case[0], False, "timeout") if correct is None else verdict_of(case[0], correct))
        stop_worker(process)

    def close(self) -> None:
        while not self.requests.empty():
            with contextlib.suppress(queue.Empty):
                self.requests.get_nowait()[0].cancel()
        for _ in self.threads:
            self.requests.put(None)
        for thread in self.threads:
            thread.join()


_pool: Pool | None = None
_pool_lock = threading.Lock()


def pool() -> Pool:
    """The pool of this process, started when the first hard verdict comes."""
    global _pool
    with _pool_lock:
        _pool = _pool or Pool()
        return _pool


def shutdown() -> None:
    """End the workers; the next hard verdict starts new ones."""
    global _pool
    with _pool_lock:
        old, _pool = _pool, None
    if old:
        old.close()


def forget_pool() -> None:
    """A forked child has none of the threads; it starts a pool of its own when it needs one."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


atexit.register(shutdown)
os.register_at_fork(after_in_child=forget_pool)


EXAMPLES = [
    {"response": r"so it is \boxed{\frac{2}{4}}.", "gold": "0.5"},
    {"pred": r"(-\infty, 1)", "gold": "x < 1"},
    {"pred": "42 or 43", "gold": "42"},
]


def main() -> None:
    """Verdicts for the cases on stdin (for the examples, if that is a terminal), in order."""
    lines = map(json.dumps, EXAMPLES) if sys.stdin.isatty() else sys.stdin
    waiting: collections.deque[Future[Verdict]] = collections.deque()
    for line in itertools.chain(lines, [None]):
        if line is not None:
            case = json.loads(line)
            submitted = submit if "response" in case else submit_answer
            waiting.append(submitted(case.get("response", case.get("pred")), case["gold"]))
        while waiting and (line is None or waiting[0].done() or len(waiting) > 1000):
            print(json.dumps(asdict(waiting.popleft().result())))


if __name__ == "__main__":
    worker(float(sys.argv[2]), int(sys.argv[3])) if sys.argv[1:2] == ["--worker"] else main()
