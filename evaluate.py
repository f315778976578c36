"""Measure accuracy by the number of allowed attempts (arXiv 2503.04808, section 3), with the controls it needs.

1. Protocols: "paper" plays the problems once for each K, and its prompts grant K attempts (all K and benchmarks of a
   model share one queue); "prefix" plays them once, with the largest K, and counts what the first k attempts solved.
2. Feedback (rollout.FEEDBACK): "verified" ends a dialogue at a right answer; "intrinsic" (SCoRe, arXiv 2409.12917)
   never says whether an answer was right.
3. Controls: what independent samples without feedback reach, with as many attempts and with as many tokens.
4. OUT gets results.json and .csv, dialogues-<model>.jsonl, the figure (PNG, SVG) and report.html.

    python evaluate.py                              # the toy model on problems that it was not trained on
    python evaluate.py MODEL=name-or-folder[,...] BENCHMARKS=file.jsonl[,...] MAX_ATTEMPTS=5 OUT=folder
    torchrun --nproc-per-node 8 evaluate.py ...     # each rank plays a part of the dialogues on an engine of its own

A run that was stopped resumes with the dialogues that are missing. A second call plays only models that OUT lacks.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grader
import plumbing.engine
import rollout
from data.problems import load_problems
from plumbing import report, sandbox
from plumbing.chat import Chat, load_tokenizer
from plumbing.constants import Count, Share, require, set_constants
from plumbing.engine import Engine
from plumbing.files import append_jsonl, fingerprint, name_paths, read_jsonl, to_json, to_line, write_atomically
from rollout import Dialogue, make_chat, new_dialogue, play, random_number

import numpy as np

# What is measured -----------------------------------------------------------------------------------------------------
MODEL: str = "data/toy/warm_start"  # Hugging Face folders or hub names, separated by commas
BENCHMARKS: str = "data/toy/test.jsonl"  # problem files, separated by commas
OUT: str = "runs/evaluate"  # folder of the results; all ranks must see it
PROTOCOL: Literal["paper", "prefix"] = "paper"  # "prefix" takes a third to half of the time
SAMPLES: int = 0  # sampled dialogues for each problem and K (avg@n; 16 or more for 30 problems); 0: one, greedy (paper)
RESAMPLES: int = 8  # one-attempt samples of each problem, for the controls at up to 8 samples; 0: none, 1/3 less time
TEMPERATURE: float = 1.0  # of everything that is sampled; greedy dialogues have none
SEED: int = 0  # of sampling and of the bootstrap
CONFIDENCE: Share = 0.95  # level of all intervals
BOOTSTRAP: Count = 2000  # resamples of the problems, for the intervals that are not Wilson's
DTYPE: Literal["float32", "bfloat16", "float16"] = "float32"  # of the engine; bfloat16 for models trained in it

# The files that decide on verdicts: all results in OUT come from one version of them.
GRADING = ("tokens", "latex", "tree", "numeric", "question", "sandbox", "inside")
GRADING_FILES = ("grader.py", *(f"plumbing/{name}.py" for name in GRADING))
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
AVERAGE = "average"  # stands beside the benchmarks in results.json: their mean, in which each counts the same
Problems = dict[tuple[str, str], dict[str, Any]]  # by benchmark and id
Quantity = Callable[[Sequence[dict[str, Any]], int], int]  # of a dialogue's first k attempts, and k


class Item(NamedTuple):
    """A dialogue to play, and the fields of its record that name it."""

    benchmark: str
    id: str  # of the problem
    K: int  # attempts that the prompt grants
    control: bool  # whether it is an independent sample of the one-attempt prompt
    sample: int  # number of the sample; 0 for a greedy dialogue


@dataclasses.dataclass
class Estimate:
    """A metric for k = 1..K, with what it would be on resampled problems."""

    value: np.ndarray  # (K,) float64; nan where it is not defined
    resampled: np.ndarray  # (BOOTSTRAP, K) float64
    outcomes: tuple[np.ndarray, ...] = ()  # if it is a share of problems: (problems, K) of 0 and 1 for each benchmark

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference on the same problems: both were resampled alike, so its interval is a paired one."""
        return Estimate(self.value - other.value, self.resampled - other.resampled)

    def as_json(self) -> dict[str, list[float | None]]:
        """{"value", "low", "high"}, each for k = 1..K; None where the metric is not defined."""
        intervals, tail = [], (1 - CONFIDENCE) / 2
        for k, value in enumerate(self.value):
            if math.isnan(value):
                intervals.append((math.nan, math.nan))
            elif self.outcomes:
                intervals.append(share_interval([(int(o[:, k].sum()), len(o)) for o in self.outcomes]))
            else:
                intervals.append(np.nanquantile(self.resampled[:, k], (tail, 1 - tail)))
        low, high = zip(*intervals, strict=True)
        columns = {"value": self.value, "low": low, "high": high}
        return {name: [None if math.isnan(x) else float(x) for x in column] for name, column in columns.items()}


# Intervals and estimators ---------------------------------------------------------------------------------------------
def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion. Unlike p ± z sd it stays inside [0, 1] and has a width at p = 0 and 1.

    >>> [round(x, 4) for x in wilson(81, 263)]  # Newcombe 1998, table I
    [0.2553, 0.3662]
    """
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    p, zz = successes / n, z * z / n
    center, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    low, high = (center - half) / (1 + zz), (center + half) / (1 + zz)
    return low if successes > 0 else 0.0, high if successes < n else 1.0  # exactly, without a rounding error


def share_interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The interval of the mean of proportions, (successes, n) of each benchmark: their distances from Wilson's bounds
    add up as standard errors do (MOVER, Zou and Donner 2008). It, too, has a width where nothing or all is solved.

    >>> [round(x, 4) for x in share_interval([(0, 30), (0, 40)])]  # the upper bounds of the two are 0.1135 and 0.0876
    [0.0, 0.0717]
    """
    shares, bounds = [successes / n for successes, n in counts], [wilson(*count) for count in counts]
    mean = statistics.fmean(shares)
    below = math.hypot(*(p - low for p, (low, _) in zip(shares, bounds, strict=True))) / len(counts)
    above = math.hypot(*(high - p for p, (_, high) in zip(shares, bounds, strict=True))) / len(counts)
    return mean - below, mean + above


def draw_resamples(benchmark: str, n: int) -> np.ndarray:
    """(BOOTSTRAP, n) how often each problem is in each resample of the n problems. They depend on SEED and the name of
    the benchmark only, so that all metrics and models share them: differences are paired."""
    rng = np.random.default_rng(random_number("bootstrap", SEED, benchmark))
    return rng.multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP).astype(np.float64)


def estimate_ratio(part: np.ndarray, whole: np.ndarray, resamples: np.ndarray) -> Estimate:
    """The sum over problems of `part`, divided by that of `whole`; both are (problems, K)."""
    with np.errstate(invalid="ignore"):  # 0 / 0, such as repeats among no retries, is nan: not defined
        value, resampled = part.sum(0) / whole.sum(0), (resamples @ part) / (resamples @ whole)
    is_share_of_problems = bool((whole == 1).all() and np.isin(part, (0, 1)).all())
    return Estimate(value, resampled, (part,) if is_share_of_problems else ())


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided test: the probability that the problems which one of two models alone solved fall at
    least as unevenly to the two, if both are equally good.

    >>> mcnemar(1, 5), mcnemar(3, 3)  # 2 (1 + 6) / 64
    (0.21875, 1.0)
    """
    n = only_first + only_second
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1)) / 2**n)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimator of pass@k: the probability that a right one is among k of the n samples.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_by_k(correct: int, wrong: Sequence[int], silent: int) -> list[float]:
    """The probability that a vote among k = 0..n samples, drawn without replacement, elects the right answer. Ties are
    decided at random.

    correct: samples with the right answer. wrong: samples with each wrong answer. silent: samples without an answer.

    >>> majority_by_k(2, [1], 0)
    [0.0, 0.6666666666666666, 0.6666666666666666, 1.0]
    """
    n = correct + sum(wrong) + silent
    elected = [0.0] * (n + 1)  # how many draws of k samples elect the right answer, by k
    for votes in range(1, correct + 1):  # for the right answer; a wrong one must not have more
        # How many draws of answered samples there are, by (samples drawn, wrong answers with as many votes).
        draws = Counter({(votes, 0): math.comb(correct, votes)})
        for size in wrong:
            extended: Counter[tuple[int, int]] = Counter()
            for (drawn, tied), count in draws.items():
                for taken in range(min(size, votes) + 1):
                    tied_then = tied + 1 if taken == votes else tied
                    extended[drawn + taken, tied_then] += count * math.comb(size, taken)
            draws = extended
        for (drawn, tied), count in draws.items():
            for unanswered in range(silent + 1):
                elected[drawn + unanswered] += count * math.comb(silent, unanswered) / (1 + tied)
    return [count / math.comb(n, k) for k, count in enumerate(elected)]


def cost_until_right(right: Sequence[int], wrong: Sequence[int]) -> list[float]:
    """Expected tokens of j = 0..n samples at most, drawn in random order until one is right.

    right, wrong: the tokens of each right and of each wrong sample.

    >>> cost_until_right([10], [4, 6])  # a second sample is needed in 2/3 of all orders, a third in 1/3
    [0.0, 6.666666666666667, 11.666666666666668, 15.0]
    """
    n, cost = len(right) + len(wrong), [0.0]
    for drawn in range(n):
        all_wrong = math.comb(len(wrong), drawn) / math.comb(n, drawn)  # the probability that all before it were wrong
        wrong_left = (len(wrong) - drawn) * sum(wrong) / max(1, len(wrong))  # expected tokens of those not yet drawn
        cost.append(cost[-1] + all_wrong * (sum(right) + wrong_left) / (n - drawn))
    return cost


# Metrics, from the records in dialogues-<model>.jsonl -----------------------------------------------------------------
def make_record(chat: Chat, dialogue: Dialogue, item: Item) -> dict[str, Any]:
    """A dialogue that was played, as a line of dialogues-<model>.jsonl."""
    attempts = []
    for a in dialogue.attempts:
        text = chat.decode(dialogue.ids[a.start : a.end], skip_special_tokens=True)
        answer = f"```python\n{a.answer}```" if a.answer and "tests" in dialogue.problem else a.answer
        ended = {"status": a.status, "ending": a.ending, "tokens": a.end - a.start}
        attempts.append({"text": text, "answer": answer} | ended | ({"failed": a.failed} if a.failed else {}))
    return item._asdict() | {"attempts": attempts}


def item_of(record: dict[str, Any]) -> Item:
    return Item(*(record[field] for field in Item._fields))


@functools.cache
def same_answer(a: str | None, b: str | None) -> bool:
    """Whether the grader takes two answers for the same; of programs, whether they are the same text. A missing one
    equals nothing, not even another missing one."""
    if a and b and a.startswith("```"):
        return a == b
    return a is not None and b is not None and (a == b or grader.is_equivalent(a, b))


def find_repeats(attempts: Sequence[dict[str, Any]]) -> list[bool]:
    """For each attempt, whether an earlier one gave the same answer.

    >>> find_repeats([{"answer": a} for a in ("7", "8", "7.0", None, None)])
    [False, False, True, False, False]
    """
    answers = [a["answer"] for a in attempts]
    return [any(same_answer(answer, earlier) for earlier in answers[:i]) for i, answer in enumerate(answers)]


def is_solved(attempts: Sequence[dict[str, Any]], k: int) -> bool:
    """Whether one of the first k attempts is right; with intrinsic feedback, whether attempt k is."""
    first = k - 1 if rollout.FEEDBACK == "intrinsic" else 0
    return any(a["status"] == "correct" for a in attempts[first:k])


def is_cut_short(attempts: Sequence[dict[str, Any]], k: int) -> bool:
    """Whether a full context ended the dialogue before attempt k."""
    ended_by_success = rollout.FEEDBACK == "verified" and is_solved(attempts, k)
    return len(attempts) < k and not ended_by_success


def is_changed(attempts: Sequence[dict[str, Any]], k: int) -> bool:
    """Whether attempt k gives another answer than attempt 1. From an answer to none, or back, is a change, too."""
    if k == 1 or len(attempts) < k:
        return False
    first, last = attempts[0]["answer"], attempts[k - 1]["answer"]
    return first != last and not same_answer(first, last)


def measure(records: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """All of report.METRICS, for one model on one benchmark, that its records allow."""
    row_of = {name: row for row, name in enumerate(sorted({r["id"] for r in records}))}
    resamples = draw_resamples(records[0]["benchmark"], len(row_of))
    dialogues = [r for r in records if not r["control"]]
    samples = defaultdict(list)  # of each problem
    for r in records:
        if r["control"]:
            samples[r["id"]].append(r)
    most = max(r["K"] for r in dialogues)
    played_for_each_k = len({r["K"] for r in dialogues}) == most  # the paper's protocol; else the prefixes of one run

    def count(quantity: Quantity) -> np.ndarray:
        """(problems, K) the sum over a problem's dialogues of quantity(their first k attempts, k)."""
        sums = np.zeros((len(row_of), most))
        for r in dialogues:
            for k in [r["K"]] if played_for_each_k else range(1, most + 1):
                sums[row_of[r["id"]], k - 1] += quantity(r["attempts"][:k], k)
        return sums

    def ratio(part: Quantity, whole: Quantity = lambda attempts, k: 1) -> Estimate:
        """Per dialogue, unless another whole is given."""
        return estimate_ratio(count(part), count(whole), resamples)

    metrics = {
        "accuracy": ratio(is_solved),
        "repeat": ratio(lambda attempts, k: sum(find_repeats(attempts)), lambda attempts, k: len(attempts[1:])),
        "attempts": ratio(lambda attempts, k: len(attempts)),
        "tokens": ratio(lambda attempts, k: sum(a["tokens"] for a in attempts)),
        "truncated": ratio(
            lambda attempts, k: sum(a["ending"] != "stop" for a in attempts), lambda attempts, k: len(attempts)
        ),
        "out_of_context": ratio(is_cut_short),
    }
    accuracy = metrics["accuracy"]
    metrics["gain"] = accuracy - Estimate(accuracy.value[[0]], accuracy.resampled[:, [0]])
    if rollout.FEEDBACK == "intrinsic":
        metrics["i_to_c"] = ratio(lambda attempts, k: is_solved(attempts, k) and not is_solved(attempts, 1))
        metrics["c_to_i"] = ratio(lambda attempts, k: is_solved(attempts, 1) and not is_solved(attempts, k))
        metrics["changed"] = ratio(is_changed)
    if samples:
        metrics |= measure_controls([samples[name] for name in row_of], metrics["tokens"], resamples)
        if rollout.FEEDBACK == "intrinsic":  # no verdict ends these dialogues, so none may end the samples either
            del metrics["pass_same_tokens"], metrics["samples_same_tokens"]
        else:
            metrics["over_pass"] = accuracy - metrics["pass"]
            metrics["over_pass_same_tokens"] = accuracy - metrics["pass_same_tokens"]
    return {name: metrics[name] for name in report.METRICS if name in metrics}


def sample_curves(samples: Sequence[dict[str, Any]]) -> dict[str, Sequence[float]]:
    """From one problem's n independent samples, by the number of them that is drawn, 0..n: that number ("samples"); the
    probability that one of them is right ("pass") and that their vote is ("majority"); their expected tokens ("cost"),
    and what these are if drawing ends at a right one ("cost_until_right")."""
    # Where the question fills the context there is no attempt.
    nothing: dict[str, Any] = {"answer": None, "status": "no_answer", "tokens": 0}
    attempts = [r["attempts"][0] if r["attempts"] else nothing for r in samples]
    right = [a["tokens"] for a in attempts if a["status"] == "correct"]
    wrong = [a["tokens"] for a in attempts if a["status"] != "correct"]
    answers = [a["answer"] for a in attempts if a["status"] != "correct" and a["answer"] is not None]
    votes = Counter(next(b for b in answers if same_answer(a, b)) for a in answers)  # for each wrong answer
    n = len(samples)
    return {
        "samples": range(n + 1),
        "pass": [pass_at_k(n, len(right), j) for j in range(n + 1)],
        "majority": majority_by_k(len(right), list(votes.values()), len(wrong) - len(answers)),
        "cost": [j * (sum(right + wrong) / n) for j in range(n + 1)],
        "cost_until_right": cost_until_right(right, wrong),
    }


def measure_controls(
    samples: Sequence[Sequence[dict[str, Any]]], spent: Estimate, resamples: np.ndarray
) -> dict[str, Estimate]:
    """The controls for each k, from each problem's n independent samples. spent: the tokens of the dialogues at k.

    For the same tokens: as many samples as are expected to cost what the dialogues spent. That number is a fraction,
    j + f, and stands for j + 1 samples with probability f and j otherwise. For pass@k samples are drawn until one is
    right, because a right answer ends the dialogues, too.
    """
    curves = [sample_curves(of_problem) for of_problem in samples]
    means = {}  # over problems
    for name in curves[0]:
        values = np.array([curve[name] for curve in curves], dtype=np.float64)
        means[name] = estimate_ratio(values, np.ones_like(values), resamples)

    def read(name: str, scale: str, at: Estimate, limit: float) -> Estimate:
        """The curve `name` where the curve `scale` reaches `at`; nan where that is beyond the limit."""
        value = np.interp(at.value, means[scale].value, means[name].value)
        rows = zip(at.resampled, means[scale].resampled, means[name].resampled, strict=True)
        return Estimate(np.where(at.value <= limit, value, np.nan), np.array([np.interp(*row) for row in rows]))

    n = len(samples[0])
    k = np.arange(1.0, len(spent.value) + 1)
    attempts = Estimate(k, np.tile(k, (BOOTSTRAP, 1)))
    # n samples are the limit, unless they solve every problem: then more tokens would change nothing.
    limit = math.inf if means["pass"].value[n] == 1 else means["cost_until_right"].value[n]
    return {
        "pass": read("pass", "samples", attempts, n),
        "majority": read("majority", "samples", attempts, n),
        "sample_tokens": read("cost", "samples", attempts, n),
        "pass_same_tokens": read("pass", "cost_until_right", spent, limit),
        "samples_same_tokens": read("samples", "cost_until_right", spent, limit),
        "majority_same_tokens": read("majority", "cost", spent, means["cost"].value[n]),
    }


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of a metric over benchmarks. Each was resampled by itself: the bootstrap is stratified."""
    outcomes = tuple(o for e in estimates for o in e.outcomes) if all(e.outcomes for e in estimates) else ()
    return Estimate(np.mean([e.value for e in estimates], 0), np.mean([e.resampled for e in estimates], 0), outcomes)


def compare(first: Estimate, second: Estimate) -> dict[str, Any]:
    """Second minus first on the same problems, for each k, with paired intervals. For shares of problems also McNemar's
    exact test; its p-values are not corrected for the number of comparisons."""
    difference = (second - first).as_json()
    result: dict[str, Any] = {"difference": difference["value"], "low": difference["low"], "high": difference["high"]}
    if len(first.outcomes) == len(second.outcomes) == 1:  # not of the average over benchmarks
        of_first, of_second = first.outcomes[0], second.outcomes[0]
        only_second = [int(x) for x in (of_second > of_first).sum(0)]
        only_first = [int(x) for x in (of_first > of_second).sum(0)]
        p = [mcnemar(a, b) for a, b in zip(only_first, only_second, strict=True)]
        result |= {"only_second": only_second, "only_first": only_first, "p": p}
    return result


def summarise(models: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """{"models", "comparisons"} of results.json, from the records of each model."""
    measured: dict[str, dict[str, dict[str, Estimate]]] = {}  # model -> benchmark -> metric
    sizes: dict[str, int] = {}  # problems of each benchmark
    for name, records in models.items():
        by_benchmark = defaultdict(list)
        for r in records:
            by_benchmark[r["benchmark"]].append(r)
        measured[name] = {benchmark: measure(its) for benchmark, its in by_benchmark.items()}
        sizes = {benchmark: len({r["id"] for r in its}) for benchmark, its in by_benchmark.items()}
        if len(by_benchmark) > 1:
            several = list(measured[name].values())
            measured[name][AVERAGE] = {metric: average([m[metric] for m in several]) for metric in several[0]}
            sizes[AVERAGE] = sum(sizes.values())
    results: dict[str, Any] = {name: {} for name in measured}
    for name, benchmark in itertools.product(measured, sizes):
        metrics = {metric: estimate.as_json() for metric, estimate in measured[name][benchmark].items()}
        accuracy = metrics["accuracy"]  # also at the top: most readers want nothing else
        top = {"n": sizes[benchmark], "accuracy": accuracy["value"], "low": accuracy["low"], "high": accuracy["high"]}
        results[name][benchmark] = top | {"metrics": metrics}
    comparisons = []
    for (a, b), benchmark in itertools.product(itertools.combinations(measured, 2), sizes):
        compared = compare(measured[a][benchmark]["accuracy"], measured[b][benchmark]["accuracy"])
        comparisons.append({"benchmark": benchmark, "models": [a, b]} | compared)
    return {"models": results, "comparisons": comparisons}


# Playing --------------------------------------------------------------------------------------------------------------
def list_items(problems: Problems) -> list[Item]:
    """All dialogues that are played with one model, the longest first, so that short ones are left when the engine's
    queue runs empty. Intrinsic ones are played with the largest K only, as SCoRe takes all its numbers from one run."""
    for_each_k = PROTOCOL == "paper" and rollout.FEEDBACK == "verified"
    granted = range(rollout.MAX_ATTEMPTS, 0, -1) if for_each_k else [rollout.MAX_ATTEMPTS]
    items = [Item(*name, K, False, i) for K in granted for name in problems for i in range(max(1, SAMPLES))]
    return items + [Item(*name, 1, True, i) for name in problems for i in range(RESAMPLES)]


def play_items(
    engine: Engine, items: Sequence[Item], problems: Problems, on_end: Callable[[dict[str, Any]], None], progress: str
) -> None:
    """Play dialogues, and give on_end the record of each that ends. progress: label of a progress bar, "" for none."""
    chat = make_chat(engine.tokenizer)

    def play_queue(label: str, queue: list[Item], temperature: float) -> None:
        dialogues = [new_dialogue(chat, problems[item.benchmark, item.id], item.K) for item in queue]
        seeds = [random_number("resample" if item.control else "evaluate", SEED, *item) for item in queue]
        bar = f"{progress}, {label}" if progress else None

        def end(index: int) -> None:
            on_end(make_record(chat, dialogues[index], queue[index]))

        play(engine, chat, dialogues, seeds, temperature, bar, end)

    play_queue("greedy", [item for item in items if SAMPLES == 0 and not item.control], 0.0)
    play_queue("sampled", [item for item in items if SAMPLES > 0 or item.control], TEMPERATURE)


# Settings and files ---------------------------------------------------------------------------------------------------
def identify_weights(model: Path) -> str:
    """A folder's fingerprint, or the commit that a hub name stands for. Raises SystemExit if there is no such model."""
    load_tokenizer(str(model))
    if model.is_dir():
        return fingerprint(*sorted(p for p in model.iterdir() if p.is_file()))
    from transformers import AutoConfig

    return str(AutoConfig.from_pretrained(str(model))._commit_hash)


def list_settings(benchmarks: dict[str, Path]) -> dict[str, Any]:
    """What the numbers depend on, besides the model."""
    of_rollout = ("MAX_ATTEMPTS", "PROMPT", "FEEDBACK", "TOLD_CHARACTERS", "SYSTEM_TURNS", "MAX_ATTEMPT_TOKENS")
    settings = {name: getattr(rollout, name) for name in (*of_rollout, "CONTEXT")}
    own = ("SEED", "PROTOCOL", "SAMPLES", "RESAMPLES", "TEMPERATURE", "CONFIDENCE", "BOOTSTRAP", "DTYPE")
    settings |= {name: globals()[name] for name in own}
    settings["grader"] = fingerprint(*(Path(__file__).parent / file for file in GRADING_FILES))
    return settings | {f"benchmark {name}": fingerprint(path) for name, path in benchmarks.items()}


def load_results(path: Path, settings: dict[str, Any], weights: dict[str, str]) -> dict[str, Any]:
    """results.json of an earlier call. Raises SystemExit, with the differences, if it has other settings or weights."""
    if not path.is_file():
        return {"settings": settings, "weights": {}, "versions": report.list_versions(), "models": {}}
    results = json.loads(path.read_text(encoding="utf-8"))
    then = results["settings"] | weights | results["weights"]  # a model that only one of them has is no difference
    now = settings | results["weights"] | weights
    differ = [f"\n  {x}: {then.get(x)} there, {now.get(x)} now" for x in then | now if then.get(x) != now.get(x)]
    require(not differ, f"{path} was made with other settings; choose another OUT or delete it" + "".join(differ))
    return results


# python evaluate.py ---------------------------------------------------------------------------------------------------
def evaluate_model(name: str, model: Path, problems: Problems, out: Path, parts: Path) -> None:
    """Play one model's dialogues on an engine, which ends on return; rank 0 then writes dialogues-<name>.jsonl.

    parts: a folder with each rank's ended dialogues; any number of ranks can resume and play those that are missing.
    """
    if "RANK" in os.environ:
        import torch.distributed as dist

        # One group for each model, as the engine's shutdown also ends it. A fast rank may wait long for a slow one.
        store = dist.PrefixStore(name, next(dist.rendezvous("env://"))[0])
        dist.init_process_group("gloo", timeout=timedelta(days=7), store=store, rank=RANK, world_size=RANKS)

    def wait_for_all() -> None:
        if "RANK" in os.environ:
            dist.barrier()

    def read_parts() -> list[dict[str, Any]]:
        return [record for part in parts.glob("*.jsonl") for record in read_jsonl(part)]

    parts.mkdir(exist_ok=True)
    items = list_items(problems)
    ended = {item_of(record) for record in read_parts()}
    missing = [item for item in items if item not in ended]
    wait_for_all()  # before one of them adds to what is there
    own_part = parts / f"rank-{RANK}.jsonl"
    write_atomically(own_part, "".join(map(to_line, read_jsonl(own_part))))  # without a last line that was cut off
    engine = Engine(str(model), rollout.CONTEXT, DTYPE, SEED)
    progress = name if RANK == 0 else ""
    play_items(engine, missing[RANK::RANKS], problems, lambda record: append_jsonl(own_part, [record]), progress)
    wait_for_all()
    if RANK == 0:
        place = {item: i for i, item in enumerate(items)}
        records = sorted(read_parts(), key=lambda record: place[item_of(record)])
        write_atomically(out / f"dialogues-{name}.jsonl", "".join(map(to_line, records)))
        shutil.rmtree(parts)
    engine.shutdown()


def main() -> None:
    modules = {"evaluate": sys.modules[__name__], "rollout": rollout, "grader": grader}
    modules |= {"engine": plumbing.engine, "report": report, "sandbox": sandbox}
    changes = set_constants(sys.argv[1:], modules)
    rollout.check_constants()
    if SAMPLES > 0 or RESAMPLES > 0:
        require(TEMPERATURE > 0, f"TEMPERATURE={TEMPERATURE}: must be above 0, because SAMPLES or RESAMPLES are drawn")
    folders, benchmarks = name_paths(MODEL, AVERAGE), name_paths(BENCHMARKS, AVERAGE)
    problems = {(name, p["id"]): p for name, path in benchmarks.items() for p in load_problems(path)}
    sandbox.check_problems(problems.values())
    weights = {name: identify_weights(model) for name, model in folders.items()}
    out, settings = Path(OUT), list_settings(benchmarks)
    results = load_results(out / "results.json", settings, weights)
    if changes and RANK == 0:
        print(changes, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    dialogues = {name: out / f"dialogues-{name}.jsonl" for name in results["weights"] | weights}
    missing = [name for name in folders if name not in results["weights"] or not dialogues[name].is_file()]
    for name in missing:
        results["weights"][name] = weights[name]
        if RANK == 0:  # dialogues that a deleted results.json has left may be of other settings: played again
            dialogues[name].unlink(missing_ok=True)
            write_atomically(out / "results.json", to_json(results))
        # The folder's name holds settings and weights: what a stopped run has left there was played with these.
        tag = hashlib.sha256(json.dumps([settings, weights[name]]).encode()).hexdigest()[:8]
        evaluate_model(name, folders[name], problems, out, out / f".{name}.{tag}")
    if RANK == 0:
        records = {name: read_jsonl(dialogues[name]) for name in results["weights"] if dialogues[name].is_file()}
        results |= summarise(records)
        write_atomically(out / "results.json", to_json(results))
        report.write_files(out, results, problems, records, folders, find_repeats)
        print(report.make_table(results), *report.list_warnings(results), f"{out}/report.html", sep="\n")


if __name__ == "__main__":
    main()
