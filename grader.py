r"""Decide whether a model's answer to a math problem is right.

    response --extract_answer--> answer --read_answer--> tree --Judge.is_same--> verdict

What "correct" means here:
- The answer is the content of the last complete \boxed{} or \fbox{} (its braces balance); without one the status is
  "no_answer", which never counts. Boxes with only commas or a few words that end in "and" between them are one answer,
  the list 1, 2; so are boxes with "or" or "alternatively" between them, which therefore is not one of its values.
- Equal means mathematically equal, exactly. 1/3 is not 0.333, 0.1 is not 0.10001, 0.5 is not 50. Two exceptions: a
  tolerance that a problem's own data states, and a decimal of 12 digits or more that rounds an exact value.
- 4.5e33, 4.5 \times 10^{33} and 10^{33} \cdot 4.5 are one number; 3\frac{3}{4} is a sum; 0.\overline{3} is 1/3; "two
  thirds", "negative 5" and "5 million" are numbers.
- A value without a unit has any; but where the question names units of the same quantity, only one of them. Two units
  must be the same; degrees, radians, percent and 2 hours 30 minutes are converted, so 50\% is 50 and 0.5 (but no
  length, for that would pay the question's 3 feet for 36 inches). "mod 7" is ignored beside 0 to 6.
- Words beside a value are ignored only if they are known to be harmless: the list BEFORE, units, what is counted
  (COUNTED, and what the question counts), "quadrant" where the question says "which quadrant". Any other word makes the
  answer wrong: not, thousand, half of, at least, over. After the letter of a choice, words must be the question's.
- "x = 5" agrees with 5, and what stands before "=" may be a function of anything (P(X = 2), \lim, \sin x), a sum of
  different letters (m + n, 100m + n), or what the question has, but not 2x or x^2. "x \approx 5" is x = 5; otherwise
  what follows \approx must round what stands before it, which is the answer.
- Letters of choices agree in any dress and case, words agree in any case, "(B) 27" agrees with B and with 27.
- A comma list is a set and \pm is two values, hence the hedge "42 or 43" is not 42; where the question asks for an
  order, it counts. Tuples, intervals and matrices are ordered, and the brackets of the first two count. Bases are kept:
  204_5 is neither 204_6 nor 204, unless the question asks for base 5.
- Equations are equal up to a non-zero factor, inequalities up to a positive one. An inequality of one unknown is the
  set that it describes: x < 1 is (-\infty, 1). Several hold together, unless nothing satisfies them all: then x < 1,
  x > 2 are the parts of a union.
- Expressions are equal when they have the same value at each of a list of points (plumbing/numeric.py): small ones, 0
  and those that the answers name, and some beyond all numbers in the answers. Letters in factorials are whole numbers.
  Sums and integrals are not computed; they agree when bounds and terms do.
- The question is no answer (Question.is_repeated_by): what has the numbers, letters and signs of a formula of it is
  wrong, unless the gold answer has them, too. So is a function value of it (\sin 20^\circ) for a plain number.

How: cheap checks first. Most verdicts need only a comparison of texts or of exact rational numbers. The other answers
are read into small trees (plumbing/latex.py; nothing is ever executed) and evaluated at a few points with many more
digits than they have. What a verdict may cost is counted in work, not in time: "timeout" is the same on every machine.

A program is right when it passes all of its tests, which plumbing/sandbox.py runs; there a verdict takes time, and
"timeout" depends on the machine.

    python grader.py < cases.jsonl    # {"pred" or "response", "gold", perhaps "question"} a line -> a verdict a line
                                      # or, for programs, {"response", "tests", perhaps "setup"}
"""

import functools
import json
import logging
import re
import sys
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from plumbing import numeric, sandbox, tree
from plumbing.constants import Count
from plumbing.latex import MAX_CHARS, read_answer, split_name
from plumbing.question import NO_UNIT, Question, convert_mixed, list_pieces, read_product, read_question, singular
from plumbing.sandbox import ProgramTests
from plumbing.tokens import replace_unicode, tokenize
from plumbing.tree import NO_SCALAR, Node, is_name, is_region, is_set_of_reals, is_sum_of_letters, list_elements

RUN_SECONDS: Count = 5  # by the clock on the wall; for a program with all of its tests
RUN_MEMORY: Count = 1024  # MiB; of a program


@dataclass(frozen=True)
class Verdict:
    """What grade() says: the extracted answer, whether it counts, and correct, wrong, no_answer or timeout."""

    answer: str | None  # or the program
    correct: bool
    status: str
    failed: str = field(default="", repr=False)  # of a program: the test that failed first, and the error
    told: str = field(default="", repr=False)  # the same where it may be told: a public test, or none was reached


# Response -> answer ---------------------------------------------------------------------------------------------------
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s+([^\s{}\\$]+)|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
BETWEEN_BOXES = re.compile(  # commas, a few words that end in "and", the name of the next value; not a new paragraph
    r"(?!.*\$\$)[ ,;&$]*(?:[^.?!:\n]{0,24}\band\b)?(?:[ $,;(}]|\\[(, ;]|\\q?quad)*(?:\w+\s*=\s*)?"
)
HEDGE = re.compile(
    r"[^?!\n]{0,30}\b(?:or|alternatively|maybe|perhaps|possibly|also be)\b[^.?!\n]{0,30}|[ $]*/[ $]*", re.I
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
        if match[1]:
            boxes.append((match.start(), match.start(1), match.end() - (match[1][-1] in ".,;")))
        elif match[0] == "{" or match[0].startswith(("\\boxed", "\\fbox")):
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
        if box[2] > last[0][0] or len(between) > MAX_BETWEEN:
            break
        if not BETWEEN_BOXES.fullmatch(between) and not HEDGE.fullmatch(between):
            break
        last.insert(0, box)
    return ", ".join(response[start:end].strip() for _, start, end in last)


# Answer -> text -> tree -----------------------------------------------------------------------------------------------
FENCES = re.compile(  # around all
    r"\${1,2}([^$]+)\${1,2}|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.*)\*\*|`([^`]*)`"
    r"|(?:\\boxed|\\fbox)?\{((?!.*\\(?:over|choose)\b)(?:[^{}]|\{[^{}]*\})*)\}",
    re.S,
)
CLAUSE = re.compile(  # and (n \in \mathbb{Z})
    r"\b(?:where|such that|for (?:all|any|some|every|each|integers?))\b|\\forall\b|(?<![A-Za-z])\([a-z] ?\\in\b"
)
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,/])(?! \d+(?![\d/]))")


@functools.lru_cache(maxsize=8192)
def tidy_answer(answer: str, thousands: bool = True) -> str:
    r"""The answer without what stands around it; with `thousands`, 1,234 is one number.

    >>> tidy_answer(r"$\boxed{1,234}.$")
    '1234'
    """
    text = replace_unicode(answer).strip().rstrip("\\")
    while match := FENCES.fullmatch(text.rstrip(" .,;")):
        text = next(part for part in match.groups() if part is not None).strip()
    text = text.lstrip(" ,;:").rstrip(" .,;:\\")
    if clause := CLAUSE.search(text):
        before, after = text[: clause.start()].rstrip(" ,;"), text[clause.end() :].strip(" ,;}$")
        text = after if "real numbers" in before else before.removesuffix(r"\text{").rstrip(" ,;$\\") or text
    if thousands and not re.search(r"[(\[]|\\\{", text):  # (1,234) is a pair
        text = THOUSANDS.sub(lambda m: re.sub(r"[ ,]", "", m[0]), text)
    return re.sub(r"^\](?=.*,)|(?<=\w)\[$", lambda m: ")" if m.start() else "(", text)  # ]0,1[ is (0,1)


# Two trees -> the same answer or not ----------------------------------------------------------------------------------
class Judge:
    """The comparison of one answer with one gold answer: what the question says, and the work that is left."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.budget = numeric.Budget()

    def drop_rounded(self, node: Node) -> Node | None:
        r"""x = 1/3 \approx 0.33 as x = 1/3, and x \approx 5 as x = 5; None where a value does not round the one before
        it: 42 \approx 43."""
        signs, terms = list(node.args[0]), list(node.args[1:])
        if is_name(terms[0]):
            signs[0] = "="
        steps = zip(signs, terms, terms[1:], strict=False)
        if not all(numeric.is_close(y, x, self.budget) for sign, x, y in steps if sign == r"\approx"):
            return None
        end = signs.index(r"\approx") if r"\approx" in signs else len(signs)
        return tree.make_relation(signs[:end], terms[: end + 1])

    def is_same(self, a: Node, b: Node) -> bool:
        """Whether two trees are the same answer."""
        if a == b:
            return True
        kinds = {a.kind, b.kind}
        for one, other in ((a, b), (b, a)):
            if one.kind == "rel" and r"\approx" in one.args[0]:
                exact = self.drop_rounded(one)
                return exact is not None and self.is_same(exact, other)
            if forms := convert_mixed(one):
                return any(self.is_same(form, other) for form in forms[: 1 if other.kind == "num" else None])
        if kinds & {"said", "unit"}:
            return self.is_same_quantity(a, b)
        left, right = self.split_definition(a), self.split_definition(b)
        if (
            left and right and self.is_same(left[1], right[1])
        ):  # f(x) and y can stand for each other, f(x) and g(x) cannot
            (name, _), (other, _) = left, right
            if name == other or {name.kind, other.kind} == {"text", "sym"}:
                return True
        if bool(left) != bool(right) and kinds != {"rel"}:
            return self.is_same(left[1] if left else a, right[1] if right else b)
        if "list" in kinds:
            for named, other in ((a, b), (b, a)):
                if (same := self.is_same_point(named, other)) is not None:
                    return same
        if is_region(a) or is_region(b):
            return self.is_same_region(a, b)
        if "list" in kinds or "set" in kinds:
            return self.has_same_elements(a, b)
        if kinds == {"rel"}:
            return self.is_same_relation(a, b)
        if len(kinds) == 1 and kinds & (NO_SCALAR | {"ratio"}):
            return len(a.args) == len(b.args) and all(
                self.is_same(x, y) if isinstance(x, Node) and isinstance(y, Node) else x == y
                for x, y in zip(a.args, b.args, strict=True)
            )
        if "based" in kinds and "num" in kinds:  # 204 for 204_5, where the question asks for base 5
            based, number = (a, b) if a.kind == "based" else (b, a)
            return based.args[1] in self.question.bases and str(number.args[0]) == based.args[0]
        if kinds & NO_SCALAR:
            return False
        if numeric.have_same_value(a, b, self.budget):
            return True
        return numeric.is_rounded(a, b, self.budget) or numeric.is_rounded(b, a, self.budget)

    # Units, names and lists
    def is_same_quantity(self, a: Node, b: Node) -> bool:
        """Values with units. A value without one has the unit that the question asks for or names, if any, else the
        other's; only degrees, radians, percent and mixed units (2 hours 30 minutes) are converted."""
        left, right = self.question.split_quantity(a), self.question.split_quantity(b)
        if left and right and left[1] != NO_UNIT == right[1]:
            right = read_product(b) or right
        if left and right and right[1] != NO_UNIT == left[1]:
            left = read_product(a) or left
        if not left or not right:
            return False
        (value_a, unit_a), (value_b, unit_b) = left, right
        if unit_a == unit_b:
            return self.is_same(value_a, value_b)
        units = {unit_a, unit_b} - {NO_UNIT}
        if not all(map(self.question.allows, units)):
            return False
        if len(units) == 1 and self.is_same(value_a, value_b):
            return True
        scale_a, scale_b = (numeric.SCALES.get(unit.powers[0][0] if unit.powers else "") for unit in (unit_a, unit_b))
        if not scale_a or not scale_b or {value_a.kind, value_b.kind} & NO_SCALAR:
            return False
        return numeric.have_same_value(tree.multiply(value_a, scale_a), tree.multiply(value_b, scale_b), self.budget)

    def split_definition(self, node: Node) -> tuple[Node, Node] | None:
        """(name, value) of x = 5, 5 = x and x = 2 + 3 = 5; of 2 + 3 = 5, too. All values must be the same."""
        if node.kind != "rel" or set(node.args[0]) != {"="}:
            return None
        _, first, *_, last = node.args
        named = is_name(first) or is_name(last)
        name, value = (last, first) if is_name(last) and not is_name(first) else (first, last)
        values = [term for term in node.args[1:] if term != name or not named]
        if not all(self.is_same(value, other) for other in values):
            return None
        return (name, value) if named or not tree.find_unknowns(*values) else None

    def is_same_point(self, named: Node, other: Node) -> bool | None:
        """x = 1, y = 2 is the point (1, 2), or the list 1, 2: values in the order of the question, or of their letters.
        f(1) < f(2) is the list f(1), f(2). None if these are no such pair."""
        if other.kind not in ("tuple", "list") or any(x.kind == "rel" for x in other.args if isinstance(x, Node)):
            return None
        values = list(other.args[2:] if other.kind == "tuple" else other.args)
        if named.kind == "rel" and set(named.args[0]) == {"<"} and other.kind == "list":
            found = list(named.args[1:])[:: -1 if self.question.is_decreasing else 1]
        else:
            pairs = [self.split_definition(item) for item in named.args] if named.kind == "list" else []
            by_name = {str(pair[0].args[0]).replace("\\", "~"): pair[1] for pair in pairs if pair}
            if len(by_name) < 2 or len(by_name) < len(pairs):
                return None
            order = self.question.names if set(self.question.names) == by_name.keys() else sorted(by_name)
            found = [by_name[name] for name in order]
        return len(found) == len(values) and all(map(self.is_same, found, values))

    def has_same_elements(self, a: Node, b: Node) -> bool:
        """Sets: each element of one is in the other; where the question asks for an order, one by one."""
        left, right = list_elements(a), list_elements(b)
        asked = self.question.is_ordered or len(self.question.names) == len(right) > 1
        if asked and a.kind == b.kind == "list" and len(left) == len(right):
            return all(map(self.is_same, left, right))
        return all(any(self.is_same(x, y) for y in right) for x in left) and all(
            any(self.is_same(x, y) for x in left) for y in right
        )

    # Relations and sets of numbers
    def is_same_relation(self, a: Node, b: Node) -> bool:
        """Equations up to a factor that is not zero, inequalities up to a positive one."""
        (signs_a, *terms_a), (signs_b, *terms_b) = a.args, b.args
        if signs_a != signs_b:
            return False
        if len(signs_a) > 1:
            return all(map(self.is_same, terms_a, terms_b))
        side_a, side_b = (tree.add(first, tree.negative(second)) for first, second in (terms_a, terms_b))
        return numeric.are_proportional(side_a, side_b, signs_a != ("=",), self.budget)

    def is_same_region(self, a: Node, b: Node) -> bool:
        """Sets of real numbers, unions, inequalities, by their members."""
        if a.kind == b.kind == "rel" and self.is_same_relation(a, b):
            return True
        if not is_set_of_reals(a) or not is_set_of_reals(b) or len(tree.find_unknowns(a, b)) > 1:
            return False
        if self.question.wants_point and "tuple" in (a.kind, b.kind):
            return False
        return numeric.have_same_members(a, b, self.budget)


# Two answers -> right or wrong ----------------------------------------------------------------------------------------
LABEL = re.compile(  # (B) 27, \textbf{(B)} 27, B. 27, Option B
    r"(?:\\(?:text|textbf|mathrm|mathbf) ?\{)? ?(?:(?:option|choice) )?(?:\(([A-H])\)|([A-H])[).:]|([A-H])(?=\}?$))"
    r"(?:[\s~}:$]|\\[ ,;:!]|\\q?quad)*(?:(?<=[\s~}:,;!d$])(-?(?:[A-Za-z\d({|]|\\(?:[dt]?frac|sqrt|pi|text|[$({])).*))?",
    re.S | re.I,
)
OTHER_LABEL = re.compile(r"\([A-H]\)|\b(?:or|and|not|is|incorrect|wrong)\b")
FILLERS = ("the", "an", "answer", "is")  # words that no text needs
DECIMAL_COMMA = re.compile(r"\s*-?(?:\d+,\d\d+|0,\d+)\s*")  # 1,22 is 1.22 where a decimal answers it


def is_same_text(a: str, b: str) -> bool:
    """Whether two texts have the same tokens; words in any case, and without their articles."""
    one, other = (list(tokenize(text)) for text in (a, b))
    if all(token.kind in ("word", "name") for token in one + other) and "word" in {token.kind for token in one + other}:
        words = []
        for tokens in (one, other):
            values = [token.value.casefold() for token in tokens if token.kind == "name" or token.value not in FILLERS]
            words.append("".join(map(singular, values[1:] if values[:1] == ["a"] else values)))
        return words[0] == words[1]
    return bool(one) and one == other


def split_label(text: str) -> tuple[str, str]:
    """(letter, what follows it) of a choice, perhaps with its value: (B) 27; not of several choices."""
    match = LABEL.fullmatch(text)
    if not match or OTHER_LABEL.search(match[4] or ""):
        return "", ""
    return (match[1] or match[2] or match[3]).upper(), match[4] or ""


def is_right(answer: str, gold: str, tolerance: float | None = None, question: str = "") -> bool:
    """Whether an answer is right; OutOfWork where that takes too much to find out."""
    if max(len(answer), len(gold)) > MAX_CHARS:
        return bool(gold.strip()) and answer.strip() == gold.strip()
    text_a, text_b = tidy_answer(answer), tidy_answer(gold)
    if not text_a or not text_b:
        return False
    if text_a == text_b or is_same_text(text_a, text_b):
        return True
    (letter_a, rest_a), (letter_b, _) = split_label(text_a), split_label(text_b)
    about = read_question(question)
    if letter_a and letter_b:
        value = read_answer(tidy_answer(rest_a))
        is_value = not rest_a or (value is not None and value.kind not in NO_SCALAR)
        return letter_a == letter_b and (is_value or rest_a.strip(" $.}") in question or not question)
    text_a = tidy_answer(rest_a or text_a)
    name, after = split_name(text_a)
    if after and list_pieces(name)[0] in about.pieces and not split_name(text_b)[1]:
        text_a = after
    a, b = read_answer(text_a), read_answer(text_b)
    if a is None or b is None:
        return False
    if {a.kind, b.kind} == {"list", "num"} and "," in answer + gold:  # 123,456 is also the list 123, 456
        a, b = (read_answer(tidy_answer(text, thousands=False)) or node for text, node in ((answer, a), (gold, b)))
        if DECIMAL_COMMA.fullmatch(answer) and read_answer(answer.replace(",", ".")) == b:
            return True
    if a.kind == "rel" != b.kind and (a.args[1].kind == "text" or is_sum_of_letters(a.args[1])):
        text_a, a = after, a.args[-1]
    judge = Judge(about)
    near, exact = (split[0] if (split := about.split_quantity(node)) else node for node in (a, b))
    is_near = tolerance is not None and numeric.are_within(near, exact, tolerance, judge.budget)
    return (is_near or judge.is_same(a, b)) and not about.is_repeated_by(text_a, text_b, a, b)


# Verdicts -------------------------------------------------------------------------------------------------------------
def grade_answer(answer: str, gold: str, tolerance: float | None = None, question: str = "") -> Verdict:
    """The verdict on a bare answer."""
    try:
        with numeric.LOCK:
            correct = is_right(answer, gold, tolerance, question)
    except numeric.OutOfWork:
        return Verdict(answer, False, "timeout")
    except Exception:  # a fault of ours must cost one verdict, not the run that waits for it
        logging.getLogger(__name__).exception("grading failed: %.200r against %.200r", answer, gold)
        correct = False
    return Verdict(answer, correct, "correct" if correct else "wrong")


def grade_program(response: str, tests: ProgramTests) -> Verdict:
    """The verdict on a response that should be a program."""
    program = sandbox.extract_program(response.split(END_OF_TURN, 1)[0])
    if program is None:
        return Verdict(None, False, "no_answer")
    outcome = sandbox.run_tests(program, tests, RUN_SECONDS, RUN_MEMORY)
    test = tests.tests[outcome.passed] if 0 <= outcome.passed < len(tests.tests) else ""
    failed = f"{test}\n{outcome.error}".strip()
    told = failed if outcome.passed < tests.public else ""
    return Verdict(program, outcome.status == "correct", outcome.status, failed, told)


def read_gold(problem: dict[str, Any]) -> str | ProgramTests:
    """What a response to a problem is measured by, for grade(): the right answer or, for a program, the tests."""
    return sandbox.read_tests(problem) if "tests" in problem else problem["answer"]


def grade(response: str, gold: str | ProgramTests, tolerance: float | None = None, question: str = "") -> Verdict:
    r"""The verdict on a response; gold: the right answer, or what a program is tested by.

    >>> grade(r"so it is \boxed{\frac{2}{4}}.", "0.5")
    Verdict(answer='\\frac{2}{4}', correct=True, status='correct')
    >>> grade(r"\boxed{1 + 99^2 + 99}", "9901", question="Compute $99^2+99+1$.").status
    'wrong'
    """
    if isinstance(gold, ProgramTests):
        return grade_program(response, gold)
    answer = extract_answer(response)
    return Verdict(None, False, "no_answer") if answer is None else grade_answer(answer, gold, tolerance, question)


def finished(verdict: Verdict) -> Future[Verdict]:
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


def submit(
    response: str, gold: str | ProgramTests, tolerance: float | None = None, question: str = ""
) -> Future[Verdict]:
    """The verdict on a response as a future: at once, or when a program has run, several at a time."""
    if isinstance(gold, ProgramTests):
        return sandbox.workers().submit(grade, response, gold)
    return finished(grade(response, gold, tolerance, question))


def is_equivalent(prediction: str, gold: str, tolerance: float | None = None) -> bool:
    """Whether two bare answers are the same; never raises, never hangs, never executes what it reads.

    >>> is_equivalent("(-oo, 1)", "x < 1"), is_equivalent("42 or 43", "42")
    (True, False)
    """
    return grade_answer(prediction, gold, tolerance).correct


def read_case(line: str) -> Verdict:
    """The verdict on a line of the command line's input; ValueError says what is wrong with it."""
    case = json.loads(line, parse_int=str, parse_float=str)
    if isinstance(case, dict) and "tests" in case and isinstance(case.get("response"), str):
        return grade_program(case["response"], sandbox.read_tests(json.loads(line)))
    if not isinstance(case, dict) or "gold" not in case or not {"pred", "response"} & case.keys():
        raise ValueError('write an object with "gold" and either "pred" or "response", or with "response" and "tests"')
    for name in ("gold", "pred", "response", "question"):
        if not isinstance(case.get(name, ""), str):
            raise ValueError(f'"{name}" must be a text or a number')
    tolerance = case.get("tolerance")
    options = {"tolerance": None if tolerance is None else float(tolerance), "question": case.get("question", "")}
    if "response" in case:
        return grade(case["response"], case["gold"], **options)
    return grade_answer(case["pred"], case["gold"], **options)


def main() -> None:
    """Verdicts for the cases on stdin, in their order."""
    for at, line in enumerate(sys.stdin, 1):
        try:
            verdict = asdict(read_case(line))
            told = ("answer", "correct", "status", *(["failed"] if verdict["failed"] else []))
            print(json.dumps({name: verdict[name] for name in told}))
        except (ValueError, TypeError) as error:
            sys.exit(f"line {at}: {error}")


if __name__ == "__main__":
    main()
