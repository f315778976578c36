"""A toy world: questions that no reader can answer for certain.

    python -m experiments.median SEED=0 OUT=data/toy      # a second call finds it there and returns at once

A question asks for the median of nine numbers, two of which cannot be read:

    What is the median of 12 4 _ 9 15 7 _ 11 6?     ->     It is \\boxed{ 9}

The nine are distinct and come from 18 consecutive numbers somewhere in 1..24. Even the best reader can only say how
likely each answer is, so a second attempt is worth something. Those probabilities can be computed, and with them the
best possible accuracy at every number of attempts (`ideal_accuracy`). The folder OUT, the tokenizer and the model, as
far as they do not depend on the questions, are warm.py's; made.json says how good the ideal reader is.
"""

import math
import random
import sys
from collections.abc import Iterable
from functools import partial
from itertools import combinations
from typing import Any

from experiments import warm
from experiments.warm import Row, feedback_text, is_held_out, prompt_text

from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

OUT: str = "data/toy"  # the folder to make

# The problems
LARGEST: int = 24  # numbers are 1..LARGEST
WINDOW: int = 18  # a list comes from this many consecutive numbers: the readable ones hint at the others
LIST_LENGTH: int = 9  # numbers in a list, the unreadable ones among them; odd, so the median is one of them
UNREADABLE: int = 2  # numbers shown as BLANK
BLANK: str = "_"  # how an unreadable number looks

# The warm start
WARM_STEPS: int = 1000  # about a minute on two cores
MUON_UNTIL: float = 0.25  # share of the steps in which Muon, not AdamW, updates the layers' matrices
# With AdamW from the start one seed in three stays on a plateau. But PPO often turned a model that Muon had trained to
# the end into a fixed order of answers, which ignores what has failed; never one that AdamW had trained further.
MATRIX_LR: float = 2e-2  # peak, of Muon
WARM_LR: float = 4e-3  # peak, of AdamW on the matrices
EMBEDDING_LR: float = 4e-3  # peak, of AdamW on embeddings and norms
SINGLE_ROWS: int = 128  # dialogues in a batch of single attempts
DIALOGUE_ROWS: int = 64  # dialogues in a batch of several attempts
DIALOGUE_SHARE: float = 0.6  # share of batches with several attempts
PLAIN_SHARE: float = 0.25  # share of batches that state no number of attempts and ask to check, without a verdict
MOST_FAILURES: int = 4  # failed attempts in a dialogue: 1..MOST_FAILURES
STAND_BY_SHARE: float = 0.5  # share of "incorrect" verdicts after which the author repeats his answer
BLIND_SHARE: float = 0.5  # share of the other failed answers that are any readable number (and not trained on)
SHARPNESS: tuple[float, float] = (2.0, 1.0)  # first, later: an expert answers x with P ~ P(x is the median)^sharpness
SHARP_UNTIL: float = 0.6  # share of the steps with the first sharpness: clearer labels are learned much faster
CURRICULUM: tuple[tuple[int, int], ...] = ((3, 0), (5, 0), (5, 1), (7, 1), (7, 2), (9, 2), (9, 2), (9, 2))
# (length, unreadable), drawn for each batch; without the short lists one seed in two stays on a plateau


# Problems -------------------------------------------------------------------------------------------------------------
def draw_list(rng: random.Random, length: int, unreadable: int) -> tuple[list[int | None], int]:
    """What is shown (None: unreadable) and the median of the true list."""
    low = rng.randint(1, LARGEST - WINDOW + 1)
    numbers = rng.sample(range(low, low + WINDOW), length)
    hidden = rng.sample(range(length), unreadable)
    return [None if i in hidden else number for i, number in enumerate(numbers)], sorted(numbers)[length // 2]


def write_question(shown: list[int | None]) -> str:
    return f"What is the median of {' '.join(BLANK if number is None else str(number) for number in shown)}?"


def read_question(question: str) -> tuple[list[int], int]:
    """The readable numbers of a question, and how many are unreadable."""
    words = question.removeprefix("What is the median of ").removesuffix("?").split()
    return [int(word) for word in words if word != BLANK], words.count(BLANK)


def draw_problem(rng: random.Random) -> dict[str, str]:
    shown, answer = draw_list(rng, LIST_LENGTH, UNREADABLE)
    return {"question": write_question(shown), "answer": str(answer)}


make_problems = partial(warm.draw_problems, "toy", draw_problem)


def median_probabilities(readable: list[int], unreadable: int) -> dict[int, float]:
    """P(median | the readable numbers): all windows that hold them are equally likely, and all ways to complete them.

    >>> median_probabilities([1, 2], 1)  # the third number is larger, whatever it is
    {2: 1.0}
    """
    readable = sorted(readable)
    # Only the middle readable numbers can be the median or next to it: the others drop out in pairs.
    middle = readable[(len(readable) - unreadable - 1) // 2 : (len(readable) + unreadable + 1) // 2]
    lows = range(max(1, readable[-1] - WINDOW + 1), min(readable[0], LARGEST - WINDOW + 1) + 1)
    probabilities: dict[int, float] = {}
    for low in lows:
        rest = [number for number in range(low, low + WINDOW) if number not in readable]
        share = 1 / (len(lows) * math.comb(len(rest), unreadable))
        for completion in combinations(rest, unreadable):
            median = sorted([*middle, *completion])[unreadable]
            probabilities[median] = probabilities.get(median, 0.0) + share
    return probabilities


def ideal_accuracy(questions: Iterable[str], k_max: int) -> list[float]:
    """Expected accuracy at 1..k_max attempts of a reader who names the likeliest answers first; none is better."""
    sets = [sorted(median_probabilities(*read_question(q)).values(), reverse=True) for q in questions]
    return [sum(sum(probabilities[:k]) for probabilities in sets) / len(sets) for k in range(1, k_max + 1)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A number and the space before it are one token, the same in a question and in a box."""
    numbers = [f" {number}" for number in range(1, LARGEST + 1)]
    return warm.build_tokenizer([*numbers, *warm.PHRASES, "What is the median of", "It is \\boxed{", f" {BLANK}"])


# Warm start -----------------------------------------------------------------------------------------------------------
def response_text(answer: int | str) -> str:
    return f"It is \\boxed{{ {answer}}}<|im_end|>"


def draw_answers(
    rng: random.Random, readable: list[int], unreadable: int, count: int, sharpness: float
) -> list[tuple[int, bool]]:
    """The answers of `count` attempts, all but the last called incorrect, and for each whether it is trained on.

    They are called incorrect whether they are or not, so the history says nothing about the right answer: that failed
    answers should be avoided is left for PPO to find out. After half of the verdicts the author repeats his answer. In
    dialogues where nobody does, a model still repeats its greedy answers, but PPO then taught it a fixed order of
    answers instead of looking at which one failed. The blind answers make the histories differ.
    """
    probabilities = median_probabilities(readable, unreadable)
    answers: list[tuple[int, bool]] = []
    for left in reversed(range(count)):
        if answers and rng.random() < STAND_BY_SHARE:
            answers.append((answers[-1][0], True))
        elif left and (not answers or rng.random() < BLIND_SHARE):
            answers.append((rng.choice(readable), False))
        else:
            weights = [probability**sharpness for probability in probabilities.values()]
            answers.append((rng.choices(list(probabilities), weights)[0], True))
    return answers


def draw_batch(seed: int, rng: random.Random, step: int) -> list[Row]:
    """Dialogues of one length."""
    sharpness = SHARPNESS[step >= SHARP_UNTIL * WARM_STEPS]
    length, unreadable = rng.choice(CURRICULUM)
    failures = rng.randint(1, MOST_FAILURES) if rng.random() < DIALOGUE_SHARE else 0
    plain = rng.random() < PLAIN_SHARE
    rows: list[Row] = []
    while len(rows) < (DIALOGUE_ROWS if failures else SINGLE_ROWS):
        shown, _ = draw_list(rng, length, unreadable)
        question = write_question(shown)
        if is_held_out(question, seed):
            continue
        left = rng.randint(failures + 1, MOST_FAILURES + 1)
        row = [(prompt_text(question, None if plain else left), False)]
        for answer, trained in draw_answers(rng, *read_question(question), failures + 1, sharpness):
            left -= 1
            row += [(response_text(answer), trained), (feedback_text(None if plain else left), False)]
        rows.append(row[:-1])  # the last attempt gets no feedback
    return rows


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[dict]) -> dict[str, Any]:
    """Accuracy of greedy first responses, with one attempt granted; that of the ideal reader with 1 to 5 attempts."""
    prompts = [prompt_text(problem["question"], 1) for problem in problems]
    responses = [response_text(problem["answer"]) for problem in problems]
    accuracy = warm.share_said(model, tokenizer, prompts, responses)
    return {"warm_start_accuracy": accuracy, "ideal_accuracy": ideal_accuracy((p["question"] for p in problems), 5)}


if __name__ == "__main__":
    warm.main(sys.modules[__name__])
