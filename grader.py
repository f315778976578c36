r"""Decide whether a model's answer to a math problem is right.

    response --extract_answer--> answer --tidy_answer--> text --read_answer--> tree --is_same--> verdict

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

How: cheap checks first. Most verdicts need only a comparison of texts or of exact rational numbers. The other answers
are read into small trees (plumbing/latex.py; nothing is ever executed) and evaluated at a few points with many more
digits than they have (plumbing/numeric.py). Sets of real numbers go to sympy, in processes that the kernel ends after a
time limit (plumbing/workers.py), so that no answer can hang or exhaust the caller.

    python grader.py < cases.jsonl    # a line {"pred" or "response", "gold"} -> a line {"answer", "correct", "status"}
"""

import functools
import itertools
import json
import logging
import math
import os
import re
import sys
from concurrent.futures import Future
from dataclasses import asdict, dataclass

from plumbing import numeric, tree
from plumbing.latex import MAX_ITEMS, read_tree, undress
from plumbing.tree import Node, Unreadable
from plumbing.workers import Pool, serve_requests

MAX_CHARS: int = 1000  # longer answers are only compared as text; the longest gold of the usual sets has 210
MAX_SIGNS: int = 4  # \pm signs in one answer; each doubles the values
VERDICT_SECONDS: float = 0.3  # processor time of a verdict that takes a worker; if that is too little: "timeout"
WALL_FACTOR: float = 10.0  # and this many times as long by the clock, for a machine that is busy
WORKER_BYTES: int = 2**30  # address space of a worker; a verdict that wants more is a "timeout", too


@dataclass(frozen=True)
class Verdict:
    """What grade() says: the extracted answer, whether it counts, and correct, wrong, no_answer or timeout."""

    answer: str | None
    correct: bool
    status: str


# Response -> answer ---------------------------------------------------------------------------------------------------
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
BETWEEN_BOXES = re.compile(  # commas, a few words that end in "and", the name of the next value; not a new paragraph
    r"(?!.*\$\$)[ ,;&$]*(?:[^.?!:\n]{0,24}\band\b)?(?:[ $,;(}]|\\[(, ;]|\\q?quad)*(?:\w+\s*=\s*)?"
)
MAX_BETWEEN: int = 80  # characters
END_OF_TURN = "<|im_end|>"  # what follows it is another turn


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


# Answer -> text -> tree -----------------------------------------------------------------------------------------------
FENCES = re.compile(r"\${1,2}([^$]+)\${1,2}|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.*)\*\*|`([^`]*)`", re.S)  # around all
CLAUSE = re.compile(r"\b(?:where|such that|for (?:all|any|some|every|each|integers?))\b")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,/])(?! \d+(?![\d/]))")


def find_closing_brace(text: str) -> int:
    """Where the brace that the text starts with is closed, or -1."""
    depths = itertools.accumulate((character == "{") - (character == "}") for character in text)
    return next((at for at, depth in enumerate(depths) if not depth), -1)


@functools.lru_cache(maxsize=8192)
def tidy_answer(answer: str, thousands: bool = True) -> str:
    r"""The answer without its dress; with `thousands`, 1,234 is one number.

    >>> tidy_answer(r"$\left(\dfrac12,\;1{,}000\text{ cm}\right).$")
    '(\\frac12, 1000\\text{cm})'
    """
    text = answer.strip().rstrip("\\")
    while match := FENCES.fullmatch(text):
        text = next(part for part in match.groups() if part is not None).strip()
    text = undress(text).lstrip(' ,;:`"').rstrip(' .,;:`"')
    while text[:1] == "{" and find_closing_brace(text) == len(text) - 1:
        text = text[1:-1].lstrip().rstrip(" .,;")
    if clause := CLAUSE.search(text):
        text = text[: clause.start()].rstrip(" ,;").removesuffix(r"\text{").rstrip(" ,;") or text
    if thousands and not re.search(r"[(\[]|\\\{", text):  # (1,234) is a pair
        text = THOUSANDS.sub(lambda m: re.sub(r"[ ,]", "", m[0]), text)
    return re.sub(r"(?<![\d./])(\d+) (\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}", text)  # 3 3/4


PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")


def choose_signs(text: str) -> list[str]:
    r"""1 \pm \sqrt{2} as two texts; each \pm has its own sign unless \mp ties them together."""
    signs, parts = PLUS_MINUS.findall(text), PLUS_MINUS.split(text)
    upper = ["+ " if sign == r"\pm" else "- " for sign in signs]
    lower = ["- " if sign == r"\pm" else "+ " for sign in signs]
    choices = [upper, lower] if r"\mp" in signs else itertools.product("+-", repeat=len(signs))
    return ["".join(itertools.chain(*zip(["", *choice], parts, strict=True))) for choice in choices]


@functools.lru_cache(maxsize=8192)
def read_answer(text: str) -> Node | None:
    """The tree of a tidied answer, or None where it cannot be read."""
    if len(text) > MAX_CHARS or len(PLUS_MINUS.findall(text)) > MAX_SIGNS:
        return None
    try:
        trees = [read_tree(choice) for choice in choose_signs(text)]
    except Unreadable:
        return None
    return trees[0] if len(trees) == 1 else Node("list", tuple(trees))


# Two trees -> the same answer or not: units, names, sets, relations ---------------------------------------------------
NO_SCALAR = {"list", "set", "tuple", "matrix", "row", "text", "rel", "based", "union", "intersection", "minus"}
LISTS = {"list", "set"}
REGIONS = {"union", "intersection", "minus"}


def is_same(a: Node, b: Node) -> bool:
    """Whether two trees are the same answer; NeedsWorker where the calling process should not find out."""
    kinds = {a.kind, b.kind}
    if a == b:
        return True
    if "unit" in kinds:
        return is_same_quantity(a, b)
    left, right = split_definition(a), split_definition(b)
    named_alike = left and right and (left[0] == right[0] or "opaque" in (left[0].kind, right[0].kind))
    if named_alike and is_same(left[1], right[1]):
        return True
    if bool(left) != bool(right) and kinds != {"rel"}:
        return is_same(left[1] if left else a, right[1] if right else b)
    if is_region(a) or is_region(b):
        return is_same_region(a, b)
    if kinds & LISTS:
        return has_same_elements(a, b)
    if kinds == {"rel"}:
        return is_same_relation(a, b)
    if len(kinds) == 1 and kinds & (NO_SCALAR | {"ratio"}):
        return len(a.args) == len(b.args) and all(
            is_same(x, y) if isinstance(x, Node) and isinstance(y, Node) else x == y
            for x, y in zip(a.args, b.args, strict=True)
        )
    if kinds & NO_SCALAR:
        return False
    if choice_letter(a) and choice_letter(b):
        return choice_letter(a) == choice_letter(b)
    return numeric.have_same_value(a, b)


def choice_letter(node: Node) -> str:
    """The letter of a choice, A to H in either case, or nothing."""
    name = node.args[0] if node.kind == "sym" or node == tree.EULER else ""
    return name.upper() if len(name) == 1 and name in "ABCDEFGHabcdefgh" else ""


def split_quantity(node: Node) -> tuple[Node, str]:
    """(value, unit); of 5 m, which is read as a product, too, if nothing says otherwise."""
    if node.kind == "mul" and [part.kind for part in node.args] == ["sym", "num"]:
        return node.args[1], tree.normalize_unit(node.args[0].args[0])
    return node.args if node.kind == "unit" else (node, "")


def is_same_quantity(a: Node, b: Node) -> bool:
    """A unit on one side only is ignored, or counts with its scale: 30 degrees is 30 and pi/6."""
    (value_a, unit_a), (value_b, unit_b) = split_quantity(a), split_quantity(b)
    if (value_a.kind == "ratio") != (value_b.kind == "ratio"):  # 4:30 p.m. is no fraction
        return False
    for one, other in ((a, b), (b, a)):
        if one.kind != "unit" and is_same(one, other.args[0]):  # 2k is no quantity beside "2k units"
            return True
    if unit_a and unit_b:
        return unit_a == unit_b and is_same(value_a, value_b)
    scale = tree.SCALES.get(unit_a or unit_b)
    if scale is None or {value_a.kind, value_b.kind} & NO_SCALAR:
        return False
    if unit_a:
        return numeric.have_same_value(tree.multiply(value_a, scale), value_b)
    return numeric.have_same_value(value_a, tree.multiply(value_b, scale))


def split_definition(node: Node) -> tuple[Node, Node] | None:
    """(name, value) of x = 5, 5 = x and x = 2 + 3 = 5; of 2 + 3 = 5, too, if it is true."""
    if node.kind != "rel" or set(node.args[0]) != {"="}:
        return None
    _, first, *_, last = node.args
    if tree.is_name(first):
        return first, last
    if tree.is_name(last):
        return last, first
    return (first, last) if not tree.find_unknowns(first, last) and is_same(first, last) else None


def list_elements(node: Node) -> list[Node]:
    return [value for item in node.args for value in list_elements(item)] if node.kind in LISTS else [node]


def has_same_elements(a: Node, b: Node) -> bool:
    """Sets: each element of one is in the other. The list x = 1, y = 2 is also the point (1, 2)."""
    for one, other in ((a, b), (b, a)):
        named = [split_definition(item) for item in list_elements(one)] if other.kind == "tuple" else []
        if len(named) > 1 and all(named):
            values = [value for _, value in sorted(named, key=lambda pair: str(pair[0]))]
            return is_same(Node("tuple", ("(", ")", *values)), other)
    left, right = list_elements(a), list_elements(b)
    if max(len(left), len(right)) > MAX_ITEMS:
        return False
    pairs = ((left, right), (right, left))
    return all(x in others or any(is_same(x, y) for y in others) for some, others in pairs for x in some)


def is_same_relation(a: Node, b: Node) -> bool:
    """Equations up to a factor that is not zero, inequalities up to a positive one or by their solutions."""
    (signs_a, *terms_a), (signs_b, *terms_b) = a.args, b.args
    if signs_a != signs_b:
        return False
    if all(is_same(x, y) for x, y in zip(terms_a, terms_b, strict=True)):
        return True
    if len(signs_a) > 1 or {part.kind for term in terms_a + terms_b for part in tree.iterate_parts(term)} & NO_SCALAR:
        return False
    side_a, side_b = (tree.add(first, tree.negative(second)) for first, second in (terms_a, terms_b))
    return numeric.are_proportional(side_a, side_b, positive=signs_a[0] in tree.FLIPPED.values())


def is_region(node: Node) -> bool:
    """A set of real numbers that is no single interval, or is written as an inequality."""
    inequality = node.kind == "rel" and set(node.args[0]) <= {"<", r"\le", r"\ne"}
    several = node.kind == "list" and any(map(is_region, node.args))
    return node.kind in REGIONS or node == tree.REALS or inequality or several


def make_interval(node: Node) -> Node:
    r"""(1, 2] of 1 < x \le 2: of inequalities in which one side is a bare name that the others do not have."""
    if node.kind != "rel" or not set(node.args[0]) <= {"<", r"\le"} or len(node.args) > 4:
        return node
    signs, *terms = node.args
    bare = [at for at, term in enumerate(terms) if term.kind in ("sym", "opaque")]
    if len(bare) != 1:
        return node
    at = bare[0]
    if terms[at] in [part for term in terms[:at] + terms[at + 1 :] for part in tree.iterate_parts(term)]:
        return node
    opening = "[" if at and signs[at - 1] == r"\le" else "("
    closing = "]" if signs[at:] and signs[at] == r"\le" else ")"
    start = terms[at - 1] if at else tree.negative(tree.INFINITY)
    end = terms[at + 1] if terms[at + 1 :] else tree.INFINITY
    return Node("tuple", (opening, closing, start, end))


def is_same_region(a: Node, b: Node) -> bool:
    """Unions part by part, relations by their sides, everything else by sympy's sets."""
    if a.kind == b.kind == "rel" and is_same_relation(a, b):
        return True
    unknowns_a, unknowns_b = tree.find_unknowns(a), tree.find_unknowns(b)
    if unknowns_a and unknowns_b and unknowns_a != unknowns_b:
        return False
    a, b = make_interval(a), make_interval(b)
    if a.kind == b.kind == "tuple":
        return is_same(a, b) if tree.REALS not in (a, b) else a == b
    if {a.kind, b.kind} <= {"union", "list"} and has_same_elements(Node("list", a.args), Node("list", b.args)):
        return True
    if not all(is_set_of_reals(node) and len(tree.find_unknowns(node)) <= 1 for node in (a, b)):
        return False
    numeric.CONTEXT.require_worker_for(math.inf)
    return numeric.make_sympy_set(a) == numeric.make_sympy_set(b)


def is_set_of_reals(node: Node) -> bool:
    return node.kind == "set" or (node.kind == "tuple" and len(node.args) == 4) or is_region(node)


# Two answers -> right or wrong ----------------------------------------------------------------------------------------
PLAIN_NUMBER = re.compile(r"\s*([+-]?)0*(\d*)(?:\.(\d*?)0*)?\s*")
LABELLED = re.compile(  # (B) 12 but not (B) or (C)
    r"(?:\\text\{)?(?:(?:option|choice) )?\(?([A-H])(?:[).:](?![^ }\\]|\\(?!text))(?!.*\b(?:or|and)\b).*|\}?)",
    re.S | re.I,
)
DECIMAL_COMMA = re.compile(r"\s*-?(?:\d+,\d\d+|0,\d+)\s*")  # 1,22 is 1.22 where a decimal answers it
WORDS = re.compile(r"\\text\{|(?<![\\A-Za-z])[A-Za-z]{4}|^[A-Za-z '-]{3,}$")


def split_number(text: str) -> tuple[str, ...] | None:
    """Sign, digits and decimals of a number without any dress; of any length, for they are compared as text."""
    match = PLAIN_NUMBER.fullmatch(text)
    if not match or not any(character.isdigit() for character in text):
        return None
    sign, digits, decimals = (part or "" for part in match.groups())
    return ("-" if sign == "-" and digits + decimals else "", digits, decimals)


def is_same_text(a: str, b: str) -> bool:
    """Whether two texts differ only in spaces that are not between digits and, if they have words, in case."""
    bare_a, bare_b = (re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"\\text\{([^{}]*)\}", r"\1", text)) for text in (a, b))
    if WORDS.search(a) or WORDS.search(b):
        bare_a, bare_b = bare_a.casefold(), bare_b.casefold()
    return bare_a == bare_b


def judge(answer: str, gold: str, tolerance: float | None = None, seconds: float = numeric.LOCAL_SECONDS) -> bool:
    """Whether an answer is right; NeedsWorker where that takes sympy, or more processor time than `seconds`, unless
    these are math.inf, as in a worker."""
    numeric.CONTEXT.start_verdict(seconds)
    number_a, number_b = split_number(answer), split_number(gold)
    if number_a and number_b and tolerance is None:
        return number_a == number_b
    if max(len(answer), len(gold)) > MAX_CHARS:
        return bool(gold.strip()) and answer.strip() == gold.strip()
    text_a, text_b = tidy_answer(answer), tidy_answer(gold)
    if not text_a or not text_b:
        return False
    if is_same_text(text_a, text_b):
        return True
    a, b = read_answer(text_a), read_answer(text_b)
    for node, text in ((a, text_b), (b, text_a)):
        if node and choice_letter(node) and (label := LABELLED.fullmatch(text)):
            return label[1].upper() == choice_letter(node)
    if a is None or b is None:
        return False
    if tolerance is not None and is_within(a, b, tolerance):
        return True
    if {a.kind, b.kind} == {"list", "num"} and "," in answer + gold:  # 123,456 is also the list 123, 456
        a, b = (read_answer(tidy_answer(text, thousands=False)) or node for text, node in ((answer, a), (gold, b)))
        commas = DECIMAL_COMMA.fullmatch(answer) or DECIMAL_COMMA.fullmatch(gold)
        if commas and split_number(answer.replace(",", ".")) == split_number(gold.replace(",", ".")):
            return True
    if a.kind == b.kind == "num":
        return a == b
    if seconds < math.inf:
        POOL.start()  # sympy is imported there while the next answers are read: the first hard verdict waits less
    return is_same(a, b)


def is_within(a: Node, b: Node, tolerance: float) -> bool:
    """Whether two constants differ by at most the tolerance that the problem states."""
    values = [node.args[0] if node.kind == "unit" else node for node in (a, b)]
    mp = numeric.CONTEXT.mp
    mp.prec = 100
    try:
        x, y = (numeric.evaluate(value, {}, mp, real=False) for value in values)
    except numeric.Undefined:
        return False
    return bool(abs(x - y) <= tolerance)


# Verdicts -------------------------------------------------------------------------------------------------------------
def make_verdict(answer: str, correct: bool | None) -> Verdict:
    """`correct` is None if a worker did not find out in time."""
    if correct is None:
        return Verdict(answer, False, "timeout")
    return Verdict(answer, correct, "correct" if correct else "wrong")


def finished(verdict: Verdict) -> Future[Verdict]:
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


def submit_answer(answer: str, gold: str, tolerance: float | None = None) -> Future[Verdict]:
    """The verdict on a bare answer as a future: already done where it is cheap, else it comes from a worker."""
    try:
        return finished(make_verdict(answer, judge(answer, gold, tolerance)))
    except numeric.NeedsWorker:
        return POOL.submit([answer, gold, tolerance], lambda correct: make_verdict(answer, correct))
    except Exception:  # a fault of ours must cost one verdict, not the run that waits for it
        logging.getLogger(__name__).exception("grading failed: %.200r against %.200r", answer, gold)
        return finished(make_verdict(answer, False))


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


# Workers and the command line -----------------------------------------------------------------------------------------
def worker_command() -> list[str]:
    limits = (VERDICT_SECONDS, VERDICT_SECONDS * WALL_FACTOR, WORKER_BYTES)
    return [sys.executable, os.path.abspath(__file__), "--worker", *map(str, limits)]


POOL = Pool(worker_command)


def judge_in_worker(answer: str, gold: str, tolerance: float | None) -> bool:
    try:
        return judge(answer, gold, tolerance, seconds=math.inf)
    except MemoryError:
        raise  # no verdict
    except Exception:  # noqa: BLE001  sympy gives up in many ways; none of them is a proof
        return False


def run_worker(seconds: str, clock_seconds: str, address_space: str) -> None:
    judge_in_worker("|x| < 1", "(-1, 1)", None)  # imports sympy, before there are requests
    serve_requests(judge_in_worker, float(seconds), float(clock_seconds), int(address_space))


def main() -> None:
    """Verdicts for the cases on stdin, in their order."""
    futures = []
    for case in map(json.loads, sys.stdin):
        if "response" in case:
            futures.append(submit(case["response"], case["gold"]))
        else:
            futures.append(submit_answer(case["pred"], case["gold"]))
    for future in futures:
        print(json.dumps(asdict(future.result())))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_worker(*sys.argv[2:])
    else:
        main()
