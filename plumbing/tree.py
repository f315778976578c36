r"""The tree that an answer is read into, and exact arithmetic on it.

A node has a kind and arguments, which are nodes or texts:
- "num", a rational number; "const", one of i, e, pi and oo; "sym", an unknown; "opaque", an unknown function: f(x).
- "add", "mul", "pow"; "call", a known function, its name first; "ratio": 3:2; "unit", a value and the unit's name.
- "rel", a chain of relations, its signs first; "list", values between commas; "set"; "matrix" of "row"s.
- "tuple", opening and closing bracket first: a point, or an interval; "union", "intersection", "minus" of sets.
- "text", words; "based", digits and their base.

The functions below build nodes. They compute rational numbers exactly and leave everything else as it is.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_BITS: int = 30_000  # size of a number: 2^{30000} and 1e10000 are beyond
MAX_FACTORIAL: int = 3000  # factorials and binomials of whole numbers up to this are computed exactly


class Node(NamedTuple):
    """A tree: x^2 is Node("pow", (Node("sym", ("x",)), Node("num", (Fraction(2),))))."""

    kind: str
    args: tuple = ()


class Unreadable(Exception):
    """The text is no answer that the reader knows; it can still agree as text."""


# Numbers, sums, products, powers --------------------------------------------------------------------------------------
def number(value: int | Fraction) -> Node:
    return Node("num", (Fraction(value),))


ONE, MINUS_ONE = number(1), number(-1)
IMAGINARY, EULER, PI, INFINITY = (Node("const", (name,)) for name in ("i", "e", "pi", "oo"))


def count_bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def combine(kind: str, parts: tuple[Node, ...], neutral: int) -> Node:
    """A sum or a product, flat and with its numbers combined into one."""
    parts = tuple(inner for part in parts for inner in (part.args if part.kind == kind else (part,)))
    numbers = [part.args[0] for part in parts if part.kind == "num"]
    if sum(map(count_bits, numbers)) > 4 * MAX_BITS:
        raise Unreadable("too large")
    total = sum(numbers) if kind == "add" else math.prod(numbers)
    kept = [part for part in parts if part.kind != "num"]
    if total != neutral or not kept:
        kept.append(number(total))
    return kept[0] if len(kept) == 1 else Node(kind, tuple(kept))


def add(*terms: Node) -> Node:
    """A sum; of matrices of one shape cell by cell."""
    if shape(terms[0]) and len(set(map(shape, terms))) == 1:
        rows = zip(*(term.args for term in terms), strict=True)
        return matrix(map(add, *(row.args for row in summands)) for summands in rows)
    return combine("add", terms, 0)


def multiply(*factors: Node) -> Node:
    """A product; a matrix is scaled cell by cell. Products of matrices are left as they are."""
    matrices = [factor for factor in factors if shape(factor)]
    if len(matrices) != 1:
        return combine("mul", factors, 1)
    scalar = multiply(*(factor for factor in factors if not shape(factor)))
    return matrix((multiply(scalar, cell) for cell in row.args) for row in matrices[0].args)


def negative(value: Node) -> Node:
    if value.kind == "unit":  # -5 degrees
        return Node("unit", (negative(value.args[0]), value.args[1]))
    return multiply(MINUS_ONE, value)


def power(base: Node, exponent: Node) -> Node:
    if exponent == ONE:
        return base
    if base.kind == exponent.kind == "num" and exponent.args[0].denominator == 1:
        value, times = base.args[0], exponent.args[0].numerator
        if (abs(times) == 1 or abs(times) * count_bits(value) <= MAX_BITS) and (value or times > 0):
            return number(value**times)
    return Node("pow", (base, exponent))


def divide(top: Node, bottom: Node) -> Node:
    return multiply(top, power(bottom, MINUS_ONE))


# Matrices -------------------------------------------------------------------------------------------------------------
def matrix(rows: Iterable[Iterable[Node]]) -> Node:
    nodes = tuple(Node("row", tuple(row)) for row in rows)
    if len({len(row.args) for row in nodes}) != 1:
        raise Unreadable("no rows, or of different lengths")
    return Node("matrix", nodes)


def shape(node: Node) -> tuple[int, int] | None:
    return (len(node.args), len(node.args[0].args)) if node.kind == "matrix" else None


# Functions ------------------------------------------------------------------------------------------------------------
words = str.split  # so that long lists of names stay readable
FUNCTIONS = set(
    words("sin cos tan cot sec csc sinh cosh tanh coth sech csch arcsin arccos arctan arccot arcsec arccsc arcsinh")
    + words("arccosh arctanh asin acos atan ln log lg exp sqrt abs floor ceil gcd lcm max min arg Re Im sgn sign")
)
SPELLINGS = {f"arc{name}": f"a{name}" for name in words("sin cos tan cot sec csc sinh cosh tanh")}
INVERSES = set(SPELLINGS.values())
SPELLINGS |= {"log": "ln", "sgn": "sign"}


def call(name: str, *args: Node) -> Node:
    """A function by the name that evaluation knows; factorials and binomials of small whole numbers are computed."""
    exact = {"factorial": math.factorial, "binom": math.comb}.get(name)
    whole = [arg.args[0] for arg in args if arg.kind == "num" and arg.args[0].denominator == 1]
    if exact and len(whole) == len(args) and all(0 <= value <= MAX_FACTORIAL for value in whole):
        return number(exact(*map(int, whole)))
    return Node("call", (name, *args))


def apply_function(name: str, args: Sequence[Node], base: Node | None, exponent: Node | None) -> Node:
    r"""A function of FUNCTIONS by what it means: \log_2 8 is ln 8 / ln 2, \sin^2 x a power, \sin^{-1} x an inverse."""
    if exponent == MINUS_ONE and "a" + name in INVERSES:
        return call("a" + name, *args)
    if name == "sqrt":
        value = call("root", *args, number(2))
    elif name == "lg" or (name == "log" and base):
        value = divide(call("ln", *args), call("ln", base or number(10)))
    elif name in (
        "tanh",
        "coth",
    ):  # sinh and cosh are huge where tanh is almost 1, which shows how many digits it takes
        top, bottom = ("sinh", "cosh") if name == "tanh" else ("cosh", "sinh")
        value = divide(call(top, *args), call(bottom, *args))
    else:
        value = call(SPELLINGS.get(name, name), *args)
    return power(value, exponent) if exponent else value


# Brackets and relations -----------------------------------------------------------------------------------------------
BARS = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}
FLIPPED = {">": "<", r"\ge": r"\le"}
REALS = Node("tuple", ("(", ")", negative(INFINITY), INFINITY))


def make_bracket(opening: str, closing: str, items: list[Node]) -> Node:
    r"""What brackets mean: a point, an interval, a set, |x|, or nothing but their content."""
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
    if len(items) > 1 or opening + closing in ("(]", "[)"):
        return Node("tuple", (opening, closing, *items))
    return items[0]


def make_relation(signs: list[str], terms: list[Node]) -> Node:
    r"""A chain of relations whose signs all point one way: b > a is a < b; x \in M is M."""
    if r"\approx" in signs:  # x = 1/3 \approx 0.33 is x = 1/3, but x \approx 3 is x = 3
        end = signs.index(r"\approx")
        exact = end > 0 or not is_name(terms[0])
        signs, terms = (signs[:end], terms[: end + 1]) if exact else (["="], terms[:2])
    if signs == [r"\in"]:
        return terms[1]
    if r"\in" in signs:
        raise Unreadable("mixed relations")
    if signs and all(sign in FLIPPED for sign in signs):
        signs, terms = [FLIPPED[sign] for sign in reversed(signs)], terms[::-1]
    return Node("rel", (tuple(signs), *terms)) if signs else terms[0]


# Units ----------------------------------------------------------------------------------------------------------------
UNIT_WORDS = set(  # words that are no product of letters, as xy is
    words("cm mm km ft in kg lb lbs oz ml mL mi yd sq cups unit inch feet foot mile yard gram cent hr hrs hour mins")
    + words("sec secs day days week year mph kph rad deg Hz eV USD Rs am pm AM PM per men boys ways pts yes no Yes No")
)
CURRENCIES = {"dollar", "euro", "yen", "pound sterling", "rupee"}
UNIT_NAMES = {
    "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "m": "meter", "ft": "foot", "feet": "foot",
    "in": "inch", "inche": "inch", "kg": "kilogram", "g": "gram", "lb": "pound", "oz": "ounce", "s": "second",
    "sec": "second", "h": "hour", "hr": "hour", "min": "minute", "mi": "mile", "yd": "yard", "deg": "degree",
    "sq": "square", "per": "/", "mph": "mile / hour", "kph": "kilometer / hour", "centimetre": "centimeter",
    "metre": "meter", "kilometre": "kilometer", "l": "liter", "ml": "milliliter", "litre": "liter", "rs": "rupee",
    "usd": "dollar", "squared": "^2", "cubed": "^3",
}  # fmt: skip
SCALES = {"percent": number(Fraction(1, 100)), "degree": divide(PI, number(180))}


def normalize_unit(unit: str) -> str:
    """One name for all spellings of a unit.

    >>> normalize_unit("square cm"), normalize_unit("centimeters ^2")
    ('centimeter ^2', 'centimeter ^2')
    """
    found = re.findall(r"[a-z']+|\^-?\d+|/", unit.casefold())
    singular = [word[:-1] if len(word) > 2 and word[-1] == "s" and word[-2] != "s" else word for word in found]
    text = " ".join(UNIT_NAMES.get(word, word) for word in singular)
    return re.sub(r"\b(square|cubic) (\w+)", lambda m: f"{m[2]} ^{2 if m[1] == 'square' else 3}", text)


# What a tree consists of ----------------------------------------------------------------------------------------------
def substitute(node: Node, values: dict[Node, Node]) -> Node:
    """The tree with some of its parts replaced."""
    if node in values:
        return values[node]
    return Node(node.kind, tuple(substitute(arg, values) if isinstance(arg, Node) else arg for arg in node.args))


def iterate_parts(node: Node) -> Iterator[Node]:
    """The node and everything below it."""
    yield node
    for arg in node.args:
        if isinstance(arg, Node):
            yield from iterate_parts(arg)


def find_unknowns(*nodes: Node) -> list[Node]:
    return sorted({part for node in nodes for part in iterate_parts(node) if part.kind == "sym"})


def is_name(node: Node) -> bool:
    """Whether this may stand before "=" and be left out: x, f(x), (x, y), AB, AB/CD, |AB|, A:B."""
    if node.kind in ("mul", "pow"):
        leaves = [part for part in iterate_parts(node) if part.kind not in ("mul", "pow") and part != MINUS_ONE]
        return all(leaf.kind == "sym" and leaf.args[0].isupper() for leaf in leaves)
    if node.kind in ("tuple", "ratio") or node.args[:1] == ("abs",):
        return all(is_name(part) for part in node.args if isinstance(part, Node))
    return node.kind in ("sym", "opaque")
