"""The value of a tree to many digits, and whether two trees have the same values.

How many: twice as many bits as all numbers in both answers have together, and 2 GUARD_BITS more. A value on the way
that is larger than 2^(bits / 4), or smaller than 2^-(bits / 4) and not 0, is beyond what is computed. Hence one rule
says what is zero: a sum whose terms cancel to less than half of the digits. Two constants are equal if their difference
is zero in this sense, two expressions if they are equal at every point of a fixed list (choose_points).

Work is counted, not timed: each evaluation costs tree nodes x bits^2. A verdict that needs more than its Budget ends in
OutOfWork, on every machine and under any load at the same place.
"""

import itertools
import operator
import random
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

from plumbing import tree
from plumbing.tree import MAX_FACTORIAL, Node

import mpmath

MAX_WORK: float = 1.5e9  # tree nodes x bits^2 of one verdict: some 50 ms
GUARD_BITS: int = 400  # agreement beyond what the numbers in the answers can explain
MAX_PLACES: int = 40  # of a decimal that may be a rounded value
MP = mpmath.MPContext()  # its precision changes from one evaluation to the next, hence
LOCK = threading.Lock()  # one verdict at a time
DEGREE = tree.divide(tree.PI, tree.number(180))
SCALES = {"percent": tree.number(Fraction(1, 100)), "degree": DEGREE, "radian": tree.ONE, "": tree.ONE}


class Undefined(Exception):
    """The expression has no (real) value here."""


class TooLarge(Exception):
    """The value is beyond what is computed, which says nothing about it."""


class OutOfWork(Exception):
    """The verdict would take more work than MAX_WORK."""


class Budget:
    """What is left of the work of one verdict."""

    def __init__(self) -> None:
        self.left = MAX_WORK

    def spend(self, nodes: int, bits: int) -> None:
        self.left -= nodes * bits**2
        if self.left < 0:
            raise OutOfWork


# Tree -> number -------------------------------------------------------------------------------------------------------
def add_up(terms: Iterable[Any]) -> Any:
    """A sum; zero if its terms cancel to less than half of the digits."""
    terms = list(terms)
    total, largest = MP.fsum(terms), max(map(abs, terms))
    return MP.zero if abs(total) <= MP.ldexp(largest, -MP.prec // 2) else total


def round_with(name: str) -> Callable[[Any], Any]:
    """floor or ceil; a value that is a whole number must not miss it by a rounding error."""

    def apply(value: Any) -> Any:
        nearest = MP.nint(value)
        return nearest if abs(value - nearest) < MP.ldexp(1, -MP.prec // 2) else getattr(MP, name)(value)

    return apply


def raise_to(base: Any, exponent: Any) -> Any:
    if not base and MP.re(exponent) <= 0:
        raise Undefined("0 to a power that is not positive")
    if base and abs(base) != 1 and abs(exponent) * (abs(MP.mag(base)) + 1) > MP.prec:
        raise TooLarge
    return MP.power(base, exponent)


def take_root(value: Any, index: Any) -> Any:
    """The real root where there is one: the cube root of -8 is -2."""
    if not MP.im(value) and value < 0 and MP.isint(index) and int(index) % 2:
        return -MP.power(-value, 1 / index)
    return MP.power(value, 1 / index)


def count_with(exact: Callable[..., int]) -> Callable[..., Any]:
    """A function of natural numbers; of large ones nothing is known."""

    def apply(*values: Any) -> Any:
        if not all(MP.isint(value) and MP.re(value) >= 0 for value in values):
            raise Undefined("no natural number")
        if any(MP.re(value) > MAX_FACTORIAL for value in values):
            raise TooLarge
        return MP.mpf(exact(*(int(MP.re(value)) for value in values)))

    return apply


def circular(name: str) -> Callable[[Any], Any]:
    """sin, cos, tan, ...: their zeros are zero, as those of sums are."""

    def apply(value: Any) -> Any:
        result = getattr(MP, name)(value)
        return MP.zero if abs(result) < MP.ldexp(max(1, abs(value)), -MP.prec // 2) else result

    return apply


def unknown_function(name: str, *values: Any) -> Any:
    """f(x): a fixed function without symmetries stands for any."""
    seed = MP.mpf(zlib.crc32(name.encode())) / 2**24
    return seed + MP.fsum(MP.cos(seed * value + at) for at, value in enumerate(values, 1))


RULES: dict[str, Callable[..., Any]] = {  # how a node is computed from the values of its parts
    "add": lambda *terms: add_up(terms),
    "mul": lambda *factors: MP.fprod(factors),
    "pow": raise_to,
    "ratio": lambda a, b: a / b,
    "root": take_root,
    "abs": abs,
    "floor": round_with("floor"),
    "ceil": round_with("ceil"),
    "min": min,
    "max": max,
    "Re": lambda value: MP.re(value),
    "Im": lambda value: MP.im(value),
    **{name: count_with(rule) for name, rule in tree.EXACT.items()},
    **{name: circular(name) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
}


def to_float(value: Fraction) -> Any:
    return MP.mpf(value.numerator) / value.denominator


def has_pole(node: Node, values: dict[Node, Fraction], real: bool) -> bool:
    """Whether a factor is the factorial of a negative whole number, 1 over which is 0 by custom: n!/(n - 3)!"""
    factorials = [part for part in (node, *node.args) if isinstance(part, Node) and part.args[:1] == ("factorial",)]
    found = [compute(part.args[1], values, real) for part in factorials if node.kind in ("call", "mul")]
    return any(MP.isint(value) and MP.re(value) < 0 for value in found)


def compute(node: Node, values: dict[Node, Fraction], real: bool) -> Any:
    """The value of a tree at a point; Undefined outside the (real) domain."""
    kind, args = node
    if kind == "num":
        return to_float(args[0])
    if node in values:
        return to_float(values[node])
    if kind == "const" and args[0] != "oo":
        return {"pi": +MP.pi, "e": +MP.e, "i": MP.j}[args[0]]
    if kind == "unit":
        return compute(tree.multiply(args[0], SCALES[args[1]]), values, real)
    if kind == "pow" and args[1] == tree.MINUS_ONE and has_pole(args[0], values, real):
        return MP.zero
    name = args[0] if kind == "call" else kind
    parts = [compute(arg, values, real) for arg in args if isinstance(arg, Node)]
    rule = RULES.get(name) or (kind == "call" and getattr(MP, name, None))
    if not rule and kind != "opaque":
        raise Undefined(name)
    try:
        value = rule(*parts) if rule else unknown_function(args[0], *parts)
    except (ArithmeticError, ValueError, TypeError, NotImplementedError) as error:  # all are of mpmath
        raise Undefined(name) from error
    if not MP.isfinite(value) or (real and MP.im(value)):
        raise Undefined(name)
    if value and abs(MP.mag(value)) > MP.prec // 4:
        raise TooLarge
    return value


def evaluate(nodes: list[Node], values: dict[Node, Fraction], real: bool, budget: Budget) -> list[Any]:
    """The values of some trees at one point, None for one that is undefined there, to enough digits for all of them."""
    parts = [part for node in nodes for part in tree.iterate_parts(node)]
    MP.prec = 2 * (GUARD_BITS + sum(tree.count_bits(part.args[0]) for part in parts if part.kind == "num"))
    budget.spend(len(parts), MP.prec)
    results: list[Any] = []
    for node in nodes:
        try:
            results.append(compute(node, values, real))
        except Undefined:
            results.append(None)
    return results


# Two trees -> whether their values agree ------------------------------------------------------------------------------
WHOLE = [2, 3, 5, 1, 4, 6, 7, 8, 9, 10, 12, 23, 50, 101, 1009, 100_003]
REAL = [
    Fraction(top, 64) for top in (83, 37, -45, 149, 1999, -467, -2503, 5, -7, 301, 64_007, -1201, 8009, -9001, -70_001)
]
MAX_NAMED: int = 4  # numbers in the answers at which they are compared, too
MIN_POINTS: int = 3  # at which two expressions must have values
WHOLE_NAMES = set("nmkN")
SIGNED_NAMES = set("abcdfghpqstuvwxyz") | {r"\alpha", r"\beta", r"\theta", r"\phi", r"\gamma", "X", "Y", "Z"}


def find_whole(*nodes: Node) -> set[Node]:
    """The unknowns that are natural numbers: n, m, k, N by custom, and those in factorials and binomials."""
    parts = [part for node in nodes for part in tree.iterate_parts(node)]
    counted = [part for part in parts if part.kind == "call" and part.args[0] in tree.EXACT]
    named = {unknown for unknown in tree.find_unknowns(*nodes) if unknown.args[0][0] in WHOLE_NAMES}
    return named | set(tree.find_unknowns(*counted))


def choose_points(a: Node, b: Node) -> Iterator[tuple[dict[Node, Fraction], bool]]:
    r"""The points at which two expressions are compared, and whether they are special.

    Natural numbers are small and far out; x and most small letters are real numbers of both signs and of several sizes;
    other letters (r, R, G, M, \rho: lengths, masses, ...) are positive. Far out is beyond all numbers in the answers.
    Special points are 0, 1, -1 and the numbers that expressions of one real unknown name.
    """
    unknowns, whole = tree.find_unknowns(a, b), find_whole(a, b)
    numbers = [abs(part.args[0]) for part in (*tree.iterate_parts(a), *tree.iterate_parts(b)) if part.kind == "num"]
    far = 2 ** min(20 + sum(map(tree.count_bits, numbers)), GUARD_BITS // 2) + 1
    rng, columns = random.Random(0), []
    for unknown in unknowns:
        column = [*WHOLE, far] if unknown in whole else [*REAL, far + REAL[0], -far - REAL[1]]
        is_signed = unknown in whole or unknown.args[0].split("_")[0].rstrip("'") in SIGNED_NAMES
        columns.append([value if is_signed else abs(value) for value in rng.sample(column, len(column))])
    for point in zip(*columns, strict=True) if unknowns else [()]:
        yield dict(zip(unknowns, map(Fraction, point), strict=True)), False
    if len(unknowns) == 1 and not whole:
        for value in (Fraction(0), Fraction(1), *sorted({*numbers} - {0, 1})[:MAX_NAMED]):
            yield from (({unknowns[0]: sign * value}, True) for sign in (1, -1))


def compare_at(
    values: dict[Node, Fraction], a: Node, b: Node, real: bool, is_special: bool, budget: Budget
) -> bool | None:
    """Whether two expressions agree at a point, or None if that is unknown: values are too large, or there are none.

    Where one side alone has a value, they differ, but not at special points (x^2/x is x at 0, too), and of several
    unknowns only where all are positive: ln ab has a value where ln a + ln b has none.
    """
    try:
        left, right = evaluate([a, b], values, real, budget)
    except TooLarge:
        return None
    if left is not None and right is not None:
        return not add_up([left, -right])
    return None if left is right or is_special or (len(values) > 1 and min(values.values()) < 0) else False


def have_same_value(a: Node, b: Node, budget: Budget) -> bool:
    """Whether two expressions agree at every point, of which there must be MIN_POINTS where they have values: among the
    real numbers if they have values there, else among the complex ones."""
    if a == b or a.kind == b.kind == "num":
        return a == b
    unknowns = tree.find_unknowns(a, b)
    parts = [*tree.iterate_parts(a), *tree.iterate_parts(b)]
    for real in (True, False) if unknowns and tree.IMAGINARY not in parts else (False,):
        agreed = 0
        for values, is_special in choose_points(a, b):
            verdict = compare_at(values, a, b, real, is_special, budget)
            if verdict is False:
                return False
            agreed += verdict is True and not is_special
        if agreed >= (MIN_POINTS if unknowns else 1):
            return True
    return False


def are_proportional(a: Node, b: Node, positive: bool, budget: Budget) -> bool:
    """Whether a = c b with a constant c != 0 (> 0), that is a(x) b(y) = a(y) b(x) for all x and y."""
    unknowns = tree.find_unknowns(a, b)
    if not unknowns or have_same_value(a, tree.ZERO, budget) or have_same_value(b, tree.ZERO, budget):
        return False
    renamed = {unknown: Node("sym", (unknown.args[0] + "'",)) for unknown in unknowns}
    a_of_y, b_of_y = tree.substitute(a, renamed), tree.substitute(b, renamed)
    if not have_same_value(tree.multiply(a, b_of_y), tree.multiply(a_of_y, b), budget):
        return False
    sizes = tree.multiply(a, tree.call("abs", b)), tree.multiply(tree.call("abs", a), b)
    return not positive or have_same_value(*sizes, budget)


def are_within(a: Node, b: Node, tolerance: float, budget: Budget) -> bool:
    """Whether two constants differ by at most the tolerance that a problem states."""
    try:
        left, right = evaluate([a, b], {}, False, budget)
    except TooLarge:
        return False
    return left is not None and right is not None and bool(abs(left - right) <= MP.mpf(tolerance))


def count_places(value: Fraction) -> int:
    """How many decimals a number has; 0 for one that has very many."""
    return next((places for places in range(MAX_PLACES) if (value * 10**places).denominator == 1), 0)


def is_close(decimal: Node, exact: Node, budget: Budget, error: float = 0.99) -> bool:
    r"""Whether a number differs from a value by at most so much of its last decimal, so that it may follow \approx."""
    return decimal.kind == "num" and are_within(decimal, exact, error / 10 ** count_places(decimal.args[0]), budget)


def is_rounded(decimal: Node, exact: Node, budget: Budget) -> bool:
    """Whether a decimal of at least 12 digits is an exact value that no decimal equals, rounded to just these digits;
    of 16 digits, as a computer prints them, the last one may be another.

    >>> third = tree.number(Fraction(1, 3))
    >>> [is_rounded(tree.number(Fraction(text)), third, Budget()) for text in ("0.333333333333", "0.333333333334")]
    [True, False]
    """
    if decimal.kind != "num" or (exact.kind == "num" and 10**MAX_PLACES % exact.args[0].denominator == 0):
        return False
    places = count_places(decimal.args[0])
    digits = len(str(int(abs(decimal.args[0]) * 10**places)))
    return places > 0 and digits >= 12 and is_close(decimal, exact, budget, 0.5 if digits < 16 else 1)


# Sets of real numbers -------------------------------------------------------------------------------------------------
BESIDE = Fraction(1, 2**20)  # how far beside an end point
SPREAD = [Fraction(top, 7) for top in (-7_000_003, -701, -22, -3, 1, 10, 99, 7_000_003)]  # points of no one's choosing
SIGNS = {"<": operator.lt, r"\le": operator.le, "=": operator.eq, r"\ne": operator.ne}


def holds(sign: str, left: Node, right: Node, budget: Budget) -> bool:
    """Whether a relation between two constants holds; not where one of them has no value."""
    if tree.INFINITY in (*tree.iterate_parts(left), *tree.iterate_parts(right)):
        return sign != "=" and (left == tree.negative(tree.INFINITY) or right == tree.INFINITY)
    difference = evaluate([tree.add(left, tree.negative(right))], {}, True, budget)[0]
    return difference is not None and SIGNS[sign](difference, 0)


def is_member(region: Node, point: Node, budget: Budget) -> bool:
    """Whether a number is in an interval, in a finite set, or fulfils a chain of relations of one unknown."""
    kind, args = region
    if kind == "set":
        return any(holds("=", point, element, budget) for element in args)
    if kind == "tuple":
        signs, terms = ["<" if args[0] == "(" else r"\le", "<" if args[1] == ")" else r"\le"], [args[2], point, args[3]]
    else:
        named = {part: point for part in tree.iterate_parts(region) if part.kind in ("sym", "opaque")}
        signs, terms = args[0], [tree.substitute(term, named) for term in args[1:]]
    return all(holds(*step, budget) for step in zip(signs, terms, terms[1:], strict=False))


def list_members(region: Node, points: list[Node], budget: Budget) -> list[bool]:
    """Which of the points are in a set. The parts of a list hold together, unless no point is in all of them."""
    if region.kind not in ("union", "intersection", "minus", "list"):
        return [is_member(region, point, budget) for point in points]
    columns = list(zip(*(list_members(part, points, budget) for part in region.args), strict=True))
    if region.kind == "minus":
        return [column[0] and not any(column[1:]) for column in columns]
    together = list(map(all, columns))
    if region.kind == "intersection" or (region.kind == "list" and any(together)):
        return together
    return list(map(any, columns))


def list_end_points(region: Node) -> list[Node]:
    """The constants that bound a set: ends of intervals, elements, sides of relations, with either sign."""
    terms = [arg for part in tree.iterate_parts(region) if part.kind in ("tuple", "set", "rel") for arg in part.args]
    ends = [term for term in terms if isinstance(term, Node) and not tree.find_unknowns(term)]
    return [end for term in ends for end in (term, tree.negative(term))]


def have_same_members(a: Node, b: Node, budget: Budget) -> bool:
    r"""Whether two sets of real numbers have the same members among: the end points that both name, points just beside
    them, between them and far out. (-2, 2) and x^2 < 4 agree at -2, 2, -2 - d, -2 + d, ... and so are the same set."""
    points, values = [], set(SPREAD)
    for end in dict.fromkeys(list_end_points(a) + list_end_points(b)):
        value = evaluate([end], {}, True, budget)[0]
        if value is not None:
            points.append(end)
            value = Fraction(int(MP.nint(value * 2**30)), 2**30)
            values |= {value - BESIDE, value + BESIDE}
    ordered = sorted(values)
    values |= {(low + high) / 2 for low, high in itertools.pairwise(ordered)}
    points += map(tree.number, values)
    return list_members(a, points, budget) == list_members(b, points, budget)
