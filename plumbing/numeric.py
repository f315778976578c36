"""The value of a tree: a number to as many digits as a comparison takes, or a set of real numbers as sympy has it."""

import math
import threading
import time
import zlib
from fractions import Fraction
from typing import Any

from plumbing import tree
from plumbing.tree import INVERSES, MAX_BITS, MAX_FACTORIAL, Node, Unreadable, words

import mpmath

POINTS: int = 8  # places at which two expressions must agree; a difference mostly shows at the first
GUARD_BITS: int = 192  # agreement beyond what the numbers in the answers can explain
LOCAL_WORK: int = 500_000_000  # tree nodes x bits^2 of one evaluation in the calling process (some ms)
LOCAL_SECONDS: float = 0.05  # processor time of one verdict in the calling process; a longer one goes to a worker


class Undefined(Exception):
    """The expression has no value here: outside its domain, or too large."""


class NeedsWorker(Exception):
    """The verdict needs sympy, or more work than the calling process should do."""


class Context(threading.local):
    """What each thread has of its own: mpmath's context, which holds the precision, and when a verdict takes too long.

    `mp.peak` is the largest magnitude that an evaluation met, in bits. `deadline` is in processor time of the thread.
    """

    def __init__(self) -> None:
        self.mp = mpmath.MPContext()
        self.mp.peak = 0
        self.deadline = math.inf

    def start_verdict(self, seconds: float) -> None:
        """Limit the processor time from now on; with math.inf, that is in a worker, the amount of work as well."""
        self.deadline = time.thread_time() + seconds

    def require_worker_for(self, work: float) -> None:
        """Raises NeedsWorker if this much work, or the time that has passed, is too much for the calling process."""
        if self.deadline < math.inf and (work > LOCAL_WORK or time.thread_time() > self.deadline):
            raise NeedsWorker


CONTEXT = Context()


# Tree -> number -------------------------------------------------------------------------------------------------------
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
    """A function that is exact for small whole numbers; for others mpmath's, which is slow with many digits."""

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
for _name in words("sin cos tan cot sec csc sinh cosh tanh coth sech csch ln exp arg sign") + sorted(INVERSES):
    RULES[_name] = lambda mp, value, name=_name: getattr(mp, name)(value)


def evaluate(node: Node, values: dict[Node, Any], mp: Any, real: bool) -> Any:
    """The value of an expression in the context mp; Undefined outside its (real) domain and where it is too large."""
    kind, args = node
    if kind == "num":
        return mp.mpf(args[0].numerator) / args[0].denominator
    if node in values:
        return values[node]
    if kind == "const" and args[0] != "oo":
        return {"pi": +mp.pi, "e": +mp.e, "i": mp.j}[args[0]]
    if kind == "unit" and args[1] in tree.SCALES:
        return evaluate(tree.multiply(args[0], tree.SCALES[args[1]]), values, mp, real)
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


# Two trees -> whether their values agree ------------------------------------------------------------------------------
def choose_value(name: str, position: int, index: int) -> Fraction:
    """The value of the unknown at this position in the list of all, at one of the places of comparison."""
    if name[0] in "nmkN":  # by custom a whole number
        value = index + 2 if position == 0 else (index * (2 * position + 3) + position) % (2 * position + 5) + 1
        return Fraction(value)
    top = (7919 * position + 2741 * (position + 1) * (index + 1)) % 9973 + 1200
    return Fraction(top, -4096 if index % 4 == 3 else 4096)  # 0.3 to 2.7, now and then negative


class Comparison:
    """Two expressions, their unknowns, and the precision that the numbers in them ask for."""

    def __init__(self, a: Node, b: Node) -> None:
        self.a, self.b = a, b
        self.parts = [*tree.iterate_parts(a), *tree.iterate_parts(b)]
        self.unknowns = tree.find_unknowns(a, b)
        bits = sum(tree.count_bits(part.args[0]) for part in self.parts if part.kind == "num")
        self.precision = 2 * (bits + GUARD_BITS)

    def evaluate_at(self, index: int, real: bool, precision: int) -> tuple[Any, Any]:
        CONTEXT.require_worker_for(len(self.parts) * precision**2)
        mp = CONTEXT.mp
        mp.prec, mp.peak = precision, 0
        values = {}
        for position, unknown in enumerate(self.unknowns):
            value = choose_value(unknown.args[0], position, index)
            values[unknown] = mp.mpf(value.numerator) / value.denominator
        return evaluate(self.a, values, mp, real), evaluate(self.b, values, mp, real)

    def differ_at(self, index: int, real: bool) -> bool:
        """Whether the values differ at one place. The precision grows with the numbers that are met on the way, so that
        neither 10^{-200} nor e^{-500} is lost beside 1."""
        mp, precision = CONTEXT.mp, self.precision
        left, right = self.evaluate_at(index, real, precision)
        if mp.peak > GUARD_BITS // 2:
            precision += 4 * mp.peak
            left, right = self.evaluate_at(index, real, precision)
            if self.precision + mp.peak > precision:
                raise Undefined("a pole, where values grow with the precision")
        difference, largest = abs(left - right), max(abs(left), abs(right))
        if difference <= mp.ldexp(largest, -precision // 2):
            return False
        if largest > mp.ldexp(1, -precision // 4):
            return True
        # Both are tiny. Their difference counts unless it vanishes with more digits, as rounding errors do.
        left, right = self.evaluate_at(index, real, 2 * precision)
        return abs(left - right) > mp.ldexp(difference, -precision // 2)


def have_same_value(a: Node, b: Node) -> bool:
    """Whether two expressions agree at every place where both have a value, of which there must be one; among the real
    numbers if they have values there, else among the complex ones."""
    if a == b or a.kind == b.kind == "num":
        return a == b
    comparison = Comparison(a, b)
    has_steps = any(part.kind == "call" and part.args[0] in ("floor", "ceil") for part in comparison.parts)
    points = 1
    if comparison.unknowns:
        points = 5 * POINTS if has_steps else POINTS
    for real in (True, False) if comparison.unknowns and tree.IMAGINARY not in comparison.parts else (False,):
        compared = False
        for index in range(points):
            try:
                if comparison.differ_at(index, real):
                    return False
                compared = True
            except Undefined:
                continue
        if compared:
            return True
    return False


def are_proportional(a: Node, b: Node, positive: bool) -> bool:
    """Whether a = c b with a constant c != 0 (> 0), that is a(x) b(y) = a(y) b(x) for all x and y."""
    unknowns, zero = tree.find_unknowns(a, b), tree.number(0)
    if not unknowns or have_same_value(a, zero) or have_same_value(b, zero):
        return False
    renamed = {unknown: Node("sym", (unknown.args[0] + "'",)) for unknown in unknowns}
    a_of_y, b_of_y = tree.substitute(a, renamed), tree.substitute(b, renamed)
    if not have_same_value(tree.multiply(a, b_of_y), tree.multiply(a_of_y, b)):
        return False
    return not positive or have_same_value(tree.multiply(a, tree.call("abs", b)), tree.multiply(tree.call("abs", a), b))


# Tree -> set of real numbers; only workers import sympy ---------------------------------------------------------------
def make_sympy_term(node: Node) -> Any:
    """An expression in one unknown, whatever its name."""
    import sympy

    kind, args = node
    if kind == "num":
        return sympy.Rational(args[0].numerator, args[0].denominator)
    if kind == "sym":
        return sympy.Symbol("x", real=True)
    constants = {"pi": sympy.pi, "e": sympy.E, "oo": sympy.oo}
    if kind == "const" and args[0] in constants:
        return constants[args[0]]
    functions = {"add": sympy.Add, "mul": sympy.Mul, "pow": sympy.Pow, "root": sympy.root, "abs": sympy.Abs}
    functions |= {"ln": sympy.log, "exp": sympy.exp, "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan}
    function = functions.get(args[0] if kind == "call" else kind)
    if function is None:
        raise Unreadable(kind)
    return function(*(make_sympy_term(arg) for arg in args if isinstance(arg, Node)))


def make_sympy_set(node: Node) -> Any:
    """An interval, a set, what an inequality describes, or several of these, as sympy has them in one form."""
    import sympy

    kind, args = node
    if kind == "tuple":
        return sympy.Interval(make_sympy_term(args[2]), make_sympy_term(args[3]), args[0] == "(", args[1] == ")")
    if kind == "set":
        return sympy.FiniteSet(*map(make_sympy_term, args))
    if kind == "rel":
        relations = {"<": sympy.Lt, r"\le": sympy.Le, r"\ne": sympy.Ne, "=": sympy.Eq}
        values = [make_sympy_term(term) for term in args[1:]]
        steps = [relations[sign](a, b) for sign, a, b in zip(args[0], values, values[1:], strict=False)]
        x = sympy.Symbol("x", real=True)
        return sympy.Intersection(*(sympy.solveset(step, x, sympy.S.Reals) for step in steps))
    join = {"union": sympy.Union, "list": sympy.Union, "intersection": sympy.Intersection, "minus": sympy.Complement}
    if kind not in join:
        raise Unreadable(kind)
    parts = [make_sympy_set(part) for part in args]
    if kind == "list" and all(part.kind == "rel" for part in args):  # 1 < x, x < 2; but x < 1, x > 2 are two parts
        return sympy.Intersection(*parts) or sympy.Union(*parts)
    return join[kind](*parts)
