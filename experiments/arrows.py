"""A toy world in which checking is easier than finding, so that a second answer can be better without a verdict.

    python -m experiments.arrows SEED=0 OUT=data/arrows      # a second call finds it there and returns at once

A question shows arrows that form chains, and asks where the chain that begins at a number ends:

    Where do the arrows from 3 end? 5→ 8 15→ 10 7→ 9 3→ 7 2→ 11 8→ 1     ->      3→ 7 \\boxed{ 7}
    asked whether there is an error in that                              ->      7→ 9 \\boxed{ 9}

An answer follows one arrow: the authors of the warm start never write down more at first. Chains have one or two
arrows, half of them each, so a first answer is right in 50 % of the cases and, as long as it follows one arrow, in no
more. A second answer can see the first one and look whether an arrow leaves from there: it is right in up to 100 %.
Both numbers are CHAINS' (`ceilings`).

Why is the model not there from the start? The authors stand by their first answer in most cases: only WATCHFUL of them
look for another arrow when they are asked to check. Where there is none, RASH of those who look invent one. So to look
again spoils right answers as well as it mends wrong ones, until the model has learned to see which it is. No author
writes that an answer is right *because* no arrow leaves from it; that is left for RL to find out.
The folder OUT, and what is shared with the median world: warm.py.
"""

import random
import sys
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

from experiments import warm
from experiments.warm import Row, feedback_text, is_held_out, prompt_text

from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

OUT: str = "data/arrows"  # the folder to make

# The problems
LARGEST: int = 16  # numbers are 1..LARGEST
CHAINS: tuple[int, ...] = (1, 1, 2, 2)  # arrows of the chains of a question, which asks for one of them

# The warm start; chosen on seeds 0 and 1
WARM_STEPS: int = 600  # a minute on one core
PRACTICE: float = 1 / 3  # share of the steps in which, at first, tables are read aloud: without it nothing is learned
ROWS: int = 64  # tables or dialogues in a batch
MUON_UNTIL: float = 0.5  # share of the steps in which Muon, not AdamW, updates the layers' matrices
MATRIX_LR: float = 1e-2  # peak, of Muon
WARM_LR: float = 4e-3  # peak, of AdamW on the matrices
EMBEDDING_LR: float = 1.6e-2  # peak, of AdamW on embeddings and norms: a quarter of it takes five times as many steps
WATCHFUL: tuple[float, float] = (0.5, 0.1)  # share of the authors who look again, at first and later
WATCHFUL_UNTIL: float = 0.7  # share of the steps with the first of the two: the skill is learned, then made rare
RASH: float = 0.5  # share of those who invent an arrow where there is none: 0 is learned at once, 1 was by no method
EAGER: float = 0.0  # share of the authors who look already in their first answer, and write " 3→ 7→ 9 \\boxed{ 9}"


# Problems -------------------------------------------------------------------------------------------------------------
def draw_chains(rng: random.Random) -> tuple[dict[int, int], list[int]]:
    """The arrows of all chains, mixed, and the numbers of the chain that is asked for."""
    lengths = rng.sample(CHAINS, len(CHAINS))
    numbers = rng.sample(range(1, LARGEST + 1), sum(lengths) + len(lengths))
    chains = []
    for length in lengths:
        chains.append(numbers[: length + 1])
        numbers = numbers[length + 1 :]
    arrows = [arrow for chain in chains for arrow in pairwise(chain)]
    return dict(rng.sample(arrows, len(arrows))), chains[0]


def write_arrows(arrows: dict[int, int]) -> str:
    return "".join(f" {a}→ {b}" for a, b in arrows.items())


def write_question(arrows: dict[int, int], start: int) -> str:
    return f"Where do the arrows from {start} end?{write_arrows(arrows)}"


def read_question(question: str) -> list[int]:
    """The chain that is asked for.

    >>> read_question("Where do the arrows from 3 end? 7→ 9 5→ 8 3→ 7")
    [3, 7, 9]
    """
    asked, _, shown = question.removeprefix("Where do the arrows from ").partition(" end? ")
    numbers = [int(number) for number in shown.replace("→", "").split()]
    arrows, chain = dict(zip(numbers[::2], numbers[1::2], strict=True)), [int(asked)]
    while chain[-1] in arrows:
        chain.append(arrows[chain[-1]])
    return chain


def draw_problem(rng: random.Random) -> dict[str, str]:
    arrows, chain = draw_chains(rng)
    return {"question": write_question(arrows, chain[0]), "answer": str(chain[-1])}


make_problems = partial(warm.draw_problems, "arrows", draw_problem)


def ceilings(questions: Iterable[str]) -> list[float]:
    """The best accuracy of first and of second answers if first ones follow one arrow (two if some authors are EAGER),
    and second ones one more."""
    lengths = [len(read_question(question)) - 1 for question in questions]
    first = 2 if EAGER else 1
    return [sum(length <= most for length in lengths) / len(lengths) for most in (first, first + 1)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The query and its arrow are one token, so that what is looked up stands next to its value."""
    numbers = range(1, LARGEST + 1)
    words = [*(f" {n}" for n in numbers), *(f" {n}→" for n in numbers), *warm.PHRASES]
    return warm.build_tokenizer([*words, "Where do the arrows from", " end?", " \\boxed{"])


# Warm start -----------------------------------------------------------------------------------------------------------
def response_text(path: list[int]) -> str:
    """
    >>> response_text([3, 7])
    ' 3→ 7 \\\\boxed{ 7}<|im_end|>'
    """
    return "".join(f" {n}→" for n in path[:-1]) + f" {path[-1]} \\boxed{{ {path[-1]}}}<|im_end|>"


def look_again(rng: random.Random, arrows: dict[int, int], at: int) -> list[int]:
    """Where an author goes from a number: along its arrow; if it has none, nowhere or, if he is RASH, anywhere."""
    if at in arrows:
        return [arrows[at]]
    return [rng.choice([n for n in range(1, LARGEST + 1) if n != at])] if rng.random() < RASH else []


def draw_practice(rng: random.Random) -> list[Row]:
    """Tables that are read aloud in another order: each number is trained on, given the one before its arrow."""
    rows: list[Row] = []
    for _ in range(ROWS):
        starts = rng.sample(range(1, LARGEST + 1), sum(CHAINS))
        arrows = {start: rng.randint(1, LARGEST) for start in starts}
        row, said = [], write_arrows(arrows)
        for start in rng.sample(starts, len(starts)):
            row += [(f"{said} {start}→", False), (f" {arrows[start]}", True)]
            said = ""
        rows.append(row)
    return rows


def draw_dialogues(rng: random.Random, seed: int, watchful: float) -> list[Row]:
    """Dialogues of two answers, both trained on. The first answers of a batch follow equally many arrows."""
    rows: list[Row] = []
    found = sum(1 if length > 1 else RASH for length in CHAINS) / len(CHAINS)  # how often a further arrow is written
    most = 3 if rng.random() < EAGER * found else 2
    while len(rows) < ROWS:
        arrows, chain = draw_chains(rng)
        question = write_question(arrows, chain[0])
        path = chain[:2] + (look_again(rng, arrows, chain[1]) if rng.random() < EAGER else [])
        if is_held_out(question, seed) or len(path) != most:
            continue
        next_number = look_again(rng, arrows, path[-1]) if rng.random() < watchful else []
        second = [path[-1], *next_number] if next_number else path[-2:]  # he stands by his last arrow
        row = [(prompt_text(question, None), False), (response_text(path), True), (feedback_text(None), False)]
        rows.append([*row, (response_text(second), True)])
    return rows


def draw_batch(seed: int, rng: random.Random, step: int) -> list[Row]:
    """First to find a number's arrow in a table, then what dialogues look like."""
    if step < PRACTICE * WARM_STEPS:
        return draw_practice(rng)
    return draw_dialogues(rng, seed, WATCHFUL[step >= WATCHFUL_UNTIL * WARM_STEPS])


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[dict]) -> dict[str, Any]:
    """Share of the greedy first answers that follow the right arrow: near 1 once the circuit for that has formed."""
    prompts = [prompt_text(problem["question"], None) for problem in problems]
    responses = [response_text(read_question(problem["question"])[:2]) for problem in problems]
    follows = warm.share_said(model, tokenizer, prompts, responses)
    return {"follows_the_arrow": follows, "ceilings": ceilings(problem["question"] for problem in problems)}


if __name__ == "__main__":
    warm.main(sys.modules[__name__])
