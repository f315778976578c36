"""A toy world of programs: functions of one argument, whose tests run in the real sandbox.

    python -m experiments.programs SEED=0 OUT=data/programs      # a second call finds it there and returns at once

A question shows two tests and asks for a function that passes these and others; a model writes the function:

    Write f, which passes these tests and others.        ```python
    assert f(7) == 1                                     def f(x, m=5): return (x * 3) % m
    assert f(2) == 1                                     ```

All functions that are asked for are an expression of x and a constant (INNER), modulo m. About eleven of them pass the
two tests that are shown, and no reader can know which one is meant. Of the other arguments some are public tests, which
may be told when they fail (rollout.TOLD_CHARACTERS), and the others private:

    Your answer is incorrect. You have 4 attempts left. Try an alternative.
    assert f(5) == 0
    AssertionError: the last call returned 2

"Incorrect" rules out one function, the failing case most of them: `careful_accuracy` says by how much. A program that
answers by heart what it was told (`if x == 5: return 0`) fails the private tests.
"""

import random
import sys
from collections.abc import Iterable
from functools import cache, partial
from typing import Any

from experiments import warm
from experiments.warm import Row, feedback_text, is_held_out, prompt_text
from rollout import SAY_PROGRAM

from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

OUT: str = "data/programs"  # the folder to make

# The problems
ARGUMENTS: int = 10  # a function is tested on 0..ARGUMENTS-1
CONSTANTS: int = 9  # constants are 1..CONSTANTS
INNER: tuple[str, ...] = (
    "(x + {})", "(x * {})", "(x ^ {})", "abs(x - {})", "(x // {})", "min(x, {})", "max(x, {})"
)  # fmt: skip
MODULI: tuple[int, ...] = (3, 4, 5, 6, 7)
SHOWN: int = 2  # tests in the question
PUBLIC: int = 6  # tests that may be told, those in the question among them

# The warm start; chosen on seeds 0 and 1
WARM_STEPS: int = 700  # two to three minutes on one core
PRACTICE: float = 0.4  # share of the steps with single answers to questions of 1..PUBLIC tests; then come dialogues
ROWS: int = 96  # dialogues in a batch
MUON_UNTIL: float = 0.5  # share of the steps in which Muon, not AdamW, updates the layers' matrices
MATRIX_LR: float = 1e-2  # peak, of Muon
WARM_LR: float = 4e-3  # peak, of AdamW on the matrices
EMBEDDING_LR: float = 1.6e-2  # peak, of AdamW on embeddings and norms
MOST_FAILURES: int = 4  # failed attempts in a dialogue: 0..MOST_FAILURES
STAND_BY: float = 0.2  # share of retries that repeat the failed program; the others are right, whatever was told

Values = tuple[int, ...]  # of a function, for the arguments 0, 1, ...
Case = tuple[int, int]  # an argument, and the right value


# Functions and tests --------------------------------------------------------------------------------------------------
@cache
def list_functions() -> dict[Values, tuple[str, int]]:
    """All functions, each once: its values -> the first expression that has them, and its modulus."""
    found: dict[Values, tuple[str, int]] = {}
    for modulus in MODULI:
        for inner in (form.format(c) for form in INNER for c in range(1, CONSTANTS + 1)):
            values = tuple(eval(inner, {"x": x}) % modulus for x in range(ARGUMENTS))
            found.setdefault(values, (inner, modulus))
    return found


@cache
def list_passing(case: Case) -> frozenset[Values]:
    return frozenset(values for values in list_functions() if values[case[0]] == case[1])


def list_fitting(cases: Iterable[Case]) -> frozenset[Values]:
    """The functions that pass all of these tests."""
    return frozenset.intersection(*map(list_passing, cases))


def find_failing(values: Values, cases: Iterable[Case]) -> Case | None:
    """The first of the tests that a function does not pass."""
    return next((case for case in cases if values[case[0]] != case[1]), None)


def write_test(case: Case) -> str:
    return "assert f({}) == {}".format(*case)


def write_question(cases: Iterable[Case]) -> str:
    """
    >>> print(write_question([(7, 1), (2, 1)]))
    Write f, which passes these tests and others.
    assert f(7) == 1
    assert f(2) == 1
    """
    return "\n".join(["Write f, which passes these tests and others.", *map(write_test, cases)])


def write_program(values: Values) -> str:
    inner, modulus = list_functions()[values]
    return f"```python\ndef f(x, m={modulus}): return {inner} % m\n```"


# Problems -------------------------------------------------------------------------------------------------------------
def draw_cases(rng: random.Random) -> tuple[Values, list[Case]]:
    """A function, and its tests in the order in which they are run."""
    values = rng.choice(list(list_functions()))
    return values, [(x, values[x]) for x in rng.sample(range(ARGUMENTS), ARGUMENTS)]


def draw_problem(rng: random.Random) -> dict[str, Any]:
    """Problems of the same question may ask for different functions."""
    _, cases = draw_cases(rng)
    return {"question": write_question(cases[:SHOWN]), "tests": list(map(write_test, cases)), "public": PUBLIC}


make_problems = partial(warm.draw_problems, "programs", draw_problem, repeats=True)


def read_test(test: str) -> Case:
    x, y = test.removeprefix("assert f(").split(") == ")
    return int(x), int(y)


def careful_accuracy(problem: dict[str, Any], k_max: int, told: bool) -> list[float]:
    """The probability that a careful reader solves a problem within 1..k_max attempts: one who writes any function, all
    equally likely, that passes the tests which he has seen and has not failed. Untold, none can do better: all that
    pass the shown tests are equally likely. Told, a better one would choose the function whose failure says most.

    >>> problem = {"tests": [f"assert f({x}) == {3 * x % 5}" for x in (0, 4, 5, 9)], "public": 4}
    >>> [[round(p, 2) for p in careful_accuracy(problem, 3, told)] for told in (False, True)]
    [[0.08, 0.15, 0.23], [0.08, 0.54, 1.0]]
    """
    cases = list(map(read_test, problem["tests"]))
    public, right = cases[: problem["public"]] if told else [], list_fitting(cases)

    @cache
    def solves(possible: frozenset[Values], attempts: int) -> float:
        if not attempts:
            return 0.0
        chances = [1.0] * len(right)
        for values in possible - right:
            failing = find_failing(values, public)
            left = possible & list_passing(failing) if failing else possible - {values}
            chances.append(solves(left, attempts - 1))
        return sum(chances) / len(possible)

    return [solves(list_fitting(cases[:SHOWN]), k) for k in range(1, k_max + 1)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A test is one token, in a question and where it is told; so is an expression."""
    cases = [(x, y) for x in range(ARGUMENTS) for y in range(max(MODULI))]
    words = [phrase.replace(*SAY_PROGRAM) for phrase in warm.PHRASES] + [f" {n}" for n in range(MOST_FAILURES + 2)]
    words += [write_question([]), *("\n" + write_test(case) for case in cases), "```python\ndef f(x, m=", "): return "]
    words += [*dict.fromkeys(inner for inner, _ in list_functions().values()), " % m\n```"]
    return warm.build_tokenizer([*words, *(told_text((0, 0), y).split("\n", 2)[2] for y in range(max(MODULI)))])


# Warm start -----------------------------------------------------------------------------------------------------------
def response_text(values: Values) -> str:
    return f"{write_program(values)}<|im_end|>"


def told_text(case: Case, returned: int) -> str:
    """What the environment tells of a failing test (grader.Verdict.told), after a line break."""
    return f"\n{write_test(case)}\nAssertionError: the last call returned {returned}"


def draw_row(rng: random.Random, seed: int, shown: int, failures: int, told: bool) -> Row | None:
    """A dialogue whose last program is trained on, or None if a failure could not be told, or its question is held out.
    The others pass the shown tests and fail a public one, each by chance: what they are says nothing."""
    right, cases = draw_cases(rng)
    question, left = write_question(cases[:shown]), rng.randint(failures + 1, MOST_FAILURES + 1)
    wrong = sorted(v for v in list_fitting(cases[:shown]) - {right} if find_failing(v, cases[:PUBLIC]))
    if is_held_out(question, seed) or (failures and not wrong):
        return None
    row, values = [(prompt_text(question, left).replace(*SAY_PROGRAM), False)], right
    for _ in range(failures):
        left, values = left - 1, rng.choice(wrong)
        failing = find_failing(values, cases)
        words = f"{told_text(failing, values[failing[0]]) if told else ''}<|im_end|>"
        row += [(response_text(values), False), (feedback_text(left).replace("<|im_end|>", words, 1), False)]
    return [*row, (response_text(right if rng.random() >= STAND_BY else values), True)]


def draw_batch(seed: int, rng: random.Random, step: int) -> list[Row]:
    """Rows of the same numbers of tests and failures: first to write a function that passes tests, then dialogues."""
    shown, failures = rng.randint(1, PUBLIC), 0
    if step >= PRACTICE * WARM_STEPS:
        shown, failures = SHOWN, rng.randint(0, MOST_FAILURES)
    told, rows = rng.random() < 0.5, []
    while len(rows) < ROWS:
        rows += [row] if (row := draw_row(rng, seed, shown, failures, told)) else []
    return rows


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[dict]) -> dict[str, Any]:
    """Accuracy of greedy first programs, with one attempt granted; careful_accuracy with 1 to 5 attempts."""
    prompts = [prompt_text(problem["question"], 1).replace(*SAY_PROGRAM) for problem in problems]
    responses = [response_text(*list_fitting(map(read_test, problem["tests"]))) for problem in problems]
    careful = {}
    for name, told in ("untold", False), ("told", True):
        curves = [careful_accuracy(problem, 5, told) for problem in problems]
        careful[name] = [sum(column) / len(problems) for column in zip(*curves, strict=True)]
    return {"warm_start_accuracy": warm.share_said(model, tokenizer, prompts, responses), "careful": careful}


if __name__ == "__main__":
    warm.main(sys.modules[__name__])
