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
import itertools
import json
import logging
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
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import NoReturn

from plumbing.latex import FLIPPED, MAX_CHARS, MAX_ITEMS, read, tidy
from plumbing.numeric import (
    CONTEXT,
    LOCAL_SECONDS,
    REGIONS,
    Algebra,
    NeedsWorker,
    Undefined,
    evaluate,
    proportional,
    same_value,
)
from plumbing.tree import (
    EULER,
    INFINITY,
    MINUS_ONE,
    REALS,
    SCALES,
    Node,
    add,
    is_name,
    multiply,
    parts_of,
    plain_unit,
    symbols,
)

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
# Then structure: units, names, sets, relations
# ---------------------------------------------------------------------------------------------------------------------

NO_SCALAR = {"list", "set", "tuple", "matrix", "row", "text", "rel", "based", "union", "intersection", "minus"}
LISTS = {"list", "set"}


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
