r"""The tree that an answer is read into, and exact arithmetic on it.

A node has a kind and arguments, which are nodes or texts:
- "num", a rational number; "const", one of i, e, pi and oo; "sym", an unknown; "opaque", an unknown function: f(x).
- "add", "mul", "pow"; "call", a known function, its name first; "ratio": 3:2; "unit", degrees or percent; "based".
- "rel", a chain of relations, its signs first; "list", values between commas; "set"; "matrix" of "row"s.
- "tuple", opening and closing bracket first: a point, or an interval; "union", "intersection", "minus" of sets.
- "text", words only; "said", a value, the words before it and those after it.
- "piece", a value and its condition in a function by cases; "clause", what an unknown ranges over: k \in \mathbb{Z}.

The functions below build nodes. They compute rational numbers exactly and leave everything else as it is.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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


ZERO, ONE, MINUS_ONE = number(0), number(1), number(-1)
IMAGINARY, EULER, PI, INFINITY = (Node("const", (name,)) for name in ("i", "e", "pi", "oo"))


def count_bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def combine(kind: str, parts: tuple[Node, ...], neutral: int) -> Node:
    """A sum or a product, flat and with its numbers combined into one.

    >>> combine("add", (number(1), Node("sym", ("x",)), number(2)), 0)
    Node(kind='add', args=(Node(kind='sym', args=('x',)), Node(kind='num', args=(Fraction(3, 1),))))
    """
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
    return combine("add", terms, 0)


def multiply(*factors: Node) -> Node:
    """A product; a matrix is scaled cell by cell. Products of matrices are left as they are."""
    matrices = [factor for factor in factors if factor.kind == "matrix"]
    if len(matrices) != 1 or len(factors) == 1:
        return combine("mul", factors, 1)
    scalar = multiply(*(factor for factor in factors if factor.kind != "matrix"))
    return matrix((multiply(scalar, cell) for cell in row.args) for row in matrices[0].args)


def negative(value: Node) -> Node:
    if value.kind == "unit":  # -5 degrees
        return Node("unit", (negative(value.args[0]), value.args[1]))
    return multiply(MINUS_ONE, value)


def power(base: Node, exponent: Node) -> Node:
    if exponent == ONE:
        return base
    if exponent.kind == "num" and exponent.args[0].denominator % 2 and exponent.args[0].denominator > 1:
        top, bottom = exponent.args[0].as_integer_ratio()
        return call("root", power(base, number(top)), number(bottom))  # of negative numbers the real one
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


# Functions ------------------------------------------------------------------------------------------------------------
words = str.split  # so that long lists of names stay readable
TRIGONOMETRIC = words("sin cos tan cot sec csc sinh cosh tanh coth sech csch")
FUNCTIONS = {*TRIGONOMETRIC, *(f"arc{name}" for name in TRIGONOMETRIC), *(f"a{name}" for name in TRIGONOMETRIC)}
FUNCTIONS |= set(words("ln log lg exp sqrt abs floor ceil max min arg Re Im sgn sign cis"))
SPELLINGS = {f"arc{name}": f"a{name}" for name in TRIGONOMETRIC} | {"log": "ln", "sgn": "sign"}


EXACT: dict[str, Callable[..., int]] = {
    "factorial": math.factorial,
    "double_factorial": lambda value: math.prod(range(value, 0, -2)),  # 8!! = 8 * 6 * 4 * 2
    "binom": math.comb,
}


def call(name: str, *args: Node) -> Node:
    """A function by the name that evaluation knows; factorials and binomials of small whole numbers are computed."""
    whole = [arg.args[0] for arg in args if arg.kind == "num" and arg.args[0].denominator == 1]
    if name in EXACT and len(whole) == len(args) and all(0 <= value <= MAX_FACTORIAL for value in whole):
        return number(EXACT[name](*map(int, whole)))
    return Node("call", (name, *args))


def apply_function(name: str, args: Sequence[Node], base: Node | None, exponent: Node | None) -> Node:
    r"""A function of FUNCTIONS by what it means: \log_2 8 is ln 8 / ln 2, \sin^2 x a power, \sin^{-1} x an inverse."""
    if exponent == MINUS_ONE and name in TRIGONOMETRIC:
        return call("a" + name, *args)
    if name == "sqrt":
        value = call("root", *args, number(2))
    elif name == "cis":
        value = add(call("cos", *args), multiply(IMAGINARY, call("sin", *args)))
    elif name == "lg" or (name == "log" and base):
        value = divide(call("ln", *args), call("ln", base or number(10)))
    elif name == "tanh":  # sinh and cosh are huge where tanh is almost 1, which shows how many digits it takes
        value = divide(call("sinh", *args), call("cosh", *args))
    elif name == "coth":
        value = divide(call("cosh", *args), call("sinh", *args))
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
    if opening == r"\langle" and len(items) > 1:  # a vector
        return matrix([item] for item in items)
    if len(items) > 1 or opening + closing in ("(]", "[)"):
        return Node("tuple", (opening, closing, *items))
    return items[0]


def make_relation(signs: list[str], terms: list[Node]) -> Node:
    r"""A chain of relations whose signs all point one way: b > a is a < b; x \in M is M, x \notin M the rest."""
    if signs == [r"\in"]:
        if terms[0].kind not in ("sym", "opaque", "list", "tuple"):
            raise Unreadable("no name of a member")
        is_range = terms[0].kind in ("sym", "list") and terms[1].kind == "sym"
        return Node("clause", tuple(terms)) if is_range or terms[1] == REALS else terms[1]
    if signs == [r"\notin"]:
        return Node("minus", (REALS, terms[1]))
    if {r"\in", r"\notin"} & set(signs):
        raise Unreadable("mixed relations")
    if signs and all(sign in FLIPPED for sign in signs):
        signs, terms = [FLIPPED[sign] for sign in reversed(signs)], terms[::-1]
    return Node("rel", (tuple(signs), *terms)) if signs else terms[0]


def make_list(items: Sequence[Node]) -> Node:
    r"""Values between commas; a clause beside them (k \in \mathbb{Z}) says nothing that is compared."""
    kept = [item for item in items if item.kind != "clause"]
    if not kept:
        kept = [item.args[1] for item in items]
    return kept[0] if len(kept) == 1 else Node("list", tuple(kept))


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


# What kind of answer a tree is ----------------------------------------------------------------------------------------
NO_SCALAR = {"list", "set", "tuple", "matrix", "row", "text", "rel", "based", "union", "intersection", "minus", "piece"}
NO_SCALAR |= {"clause", "said"}


def is_length(node: Node) -> bool:
    """A product of powers of capital letters: AB, AB/CD, AB^2."""
    if node.kind == "pow":
        return node.args[1].kind == "num" and is_length(node.args[0])
    return all(map(is_length, node.args)) if node.kind == "mul" else node.kind == "sym" and node.args[0].isupper()


def is_name(node: Node) -> bool:
    r"""Whether this may stand before "=" and be left out: x, f(x), (x, y), AB, AB/CD, |AB|, A:B."""
    if node.kind in ("mul", "pow"):
        return is_length(node)
    if node.kind in ("tuple", "ratio") or node.args[:1] == ("abs",):
        return all(is_name(part) for part in node.args if isinstance(part, Node))
    return node.kind in ("sym", "opaque", "text")


def is_sum_of_letters(node: Node) -> bool:
    """What an answer may have before "=", besides: different letters, added, multiplied or divided (m + n, x/y), and
    sums of multiples of letters that are not x, y, z, the unknowns of equations: 100m + n."""
    parts = [part for part in iterate_parts(node) if part.kind not in ("add", "mul", "pow") and part != MINUS_ONE]
    letters = [part.args[0] for part in parts if part.kind == "sym"]
    numbers = [part for part in parts if part.kind == "num"]
    multiples = not numbers or (node.kind == "add" and not {"x", "y", "z"} & set(letters))
    return multiples and len(set(letters)) == len(letters) == len(parts) - len(numbers) > 1


def list_elements(node: Node) -> list[Node]:
    """The elements of a list or a set; of a value that stands alone, itself. Lists in lists are flat, sets are not."""
    if node.kind not in ("list", "set"):
        return [node]
    return [value for item in node.args for value in (list_elements(item) if item.kind == "list" else [item])]


def is_region(node: Node) -> bool:
    """A set of real numbers that is no single interval, or is written as an inequality."""
    inequality = node.kind == "rel" and set(node.args[0]) <= {"<", r"\le", r"\ne"}
    several = node.kind == "list" and any(map(is_region, node.args))
    return node.kind in ("union", "intersection", "minus") or node == REALS or inequality or several


def is_set_of_reals(node: Node) -> bool:
    """Whether members of this can be found: of sets and intervals of numbers, relations between numbers, and unions."""
    if node.kind in ("union", "intersection", "minus", "list"):
        return all(map(is_set_of_reals, node.args))
    terms = [arg for arg in node.args if isinstance(arg, Node)]
    scalar = all(part.kind not in NO_SCALAR for term in terms for part in iterate_parts(term))
    return scalar and (node.kind in ("set", "rel") or (node.kind == "tuple" and len(terms) == 2))
