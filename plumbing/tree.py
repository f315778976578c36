"""The tree that an answer is read into, and exact arithmetic on it."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_BITS: int = 30_000  # size of a number: 2^{30000} and 1e10000 are beyond
MAX_FACTORIAL: int = 3000  # of what factorials and binomials are computed exactly
MAX_ROWS: int = 5  # of a determinant


class Node(NamedTuple):
    """A tree: x^2 is Node("pow", (Node("sym", ("x",)), Node("num", (Fraction(2),))))."""

    kind: str
    args: tuple = ()


class Unreadable(Exception):
    """The text is no answer that the reader knows; it can still agree as text."""


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


def is_name(node: Node) -> bool:
    """Whether this may stand before "=" and be left out: x, f(x), (x, y), AB, AB/CD, |AB|, A:B."""
    if node.kind in ("mul", "pow"):
        leaves = [part for part in parts_of(node) if part.kind not in ("mul", "pow") and part != MINUS_ONE]
        return all(leaf.kind == "sym" and leaf.args[0].isupper() for leaf in leaves)
    if node.kind in ("tuple", "ratio") or node.args[:1] == ("abs",):
        return all(is_name(part) for part in node.args if isinstance(part, Node))
    return node.kind in ("sym", "opaque")


SCALES = {"percent": number(Fraction(1, 100)), "degree": multiply(number(Fraction(1, 180)), PI)}
