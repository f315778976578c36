"""The value of a tree to many digits."""

import math
import threading
import time
import zlib
from fractions import Fraction
from typing import Any

from plumbing.latex import SPELLINGS, words
from plumbing.tree import (
    IMAGINARY,
    MAX_BITS,
    MAX_FACTORIAL,
    SCALES,
    Node,
    Unreadable,
    bits,
    call,
    multiply,
    number,
    parts_of,
    rewrite,
    symbols,
)

import mpmath

POINTS: int = 8  # places at which two expressions must agree; a difference mostly shows at the first
GUARD_BITS: int = 192  # agreement beyond what the numbers in the answers can explain
LOCAL_WORK: int = 500_000_000  # tree nodes x bits^2 of one evaluation in the calling process (some ms)
LOCAL_SECONDS: float = 0.05  # processor time of one verdict in the calling process; a longer one goes to a worker


class Undefined(Exception):
    """The expression has no value here: outside its domain, or too large."""


class NeedsWorker(Exception):
    """The verdict needs sympy, or more work than the calling process should do."""


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


REGIONS = {"union", "intersection", "minus"}


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
