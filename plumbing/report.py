"""How results.json is shown: table, CSV, figures (the demo's, too) and the page, whose template is report.html."""

import base64
import csv
import dataclasses
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by colour-blind readers too
TRAINING = (
    "reward",
    "accuracy",
    "attempts_used",
    "attempt_length",
    "entropy",
    "kl_k1",
    "clipped",
    "explained_variance",
)


@dataclasses.dataclass
class Curve:
    """One line of a figure, with a band where low and high are given."""

    label: str  # "" = not named in the figure
    accuracy: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    color: str = "#555555"
    line: str = "-"  # "-", "--" or ":"
    at: Sequence[float] | None = None  # where the values lie on the x axis; None = at 1, 2, ...


# Numbers: results is results.json ------------------------------------------------------------------------------------
def to_csv(results: dict[str, Any]) -> str:
    """results.csv: each metric and each difference of two models by k, with its interval; p without one."""
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


def table(results: dict[str, Any]) -> str:
    """For a terminal: accuracy by allowed attempts; indented under a model its controls, then differences of models."""
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
            row[-1] += f" ±{max(high - value, value - low):.3f}"  # Wilson's interval is longer on one side
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


def losses(results: dict[str, Any]) -> list[str]:
    """A line for each result that the context's length has spoilt."""
    given = results["settings"]
    return [
        f"{name} on {benchmark}: CONTEXT={given['CONTEXT']} ended {ended:.1%} of the dialogues of "
        f"{given['MAX_ATTEMPTS']} attempts early; they count as not solved"
        for name, each in results["models"].items()
        for benchmark, r in each.items()
        if (ended := r["metrics"]["out_of_context"]["value"][-1])
    ]


# Figures -------------------------------------------------------------------------------------------------------------
def colors(models: Iterable[str]) -> dict[str, str]:
    """Of each model, one for all figures."""
    return dict(zip(models, itertools.cycle(OKABE_ITO), strict=False))


def curves(models: dict[str, dict[str, dict[str, Any]]]) -> dict[str, list[Curve]]:
    """One panel per benchmark, one curve per model; dotted and without a name the control, its pass@k. Intrinsic
    dialogues have no oracle to choose among the samples; their control is the vote."""
    panels: dict[str, list[Curve]] = {}
    for name, color in colors(models).items():
        for benchmark, r in models[name].items():
            panel = panels.setdefault(f"{benchmark} (n = {r['n']})", [])
            panel.append(Curve(name, r["accuracy"], r["low"], r["high"], color))
            control = r["metrics"].get("majority" if "i_to_c" in r["metrics"] else "pass", {"value": []})
            values = [v for v in control["value"] if v is not None]
            panel += [Curve("", values, color=color, line=":")] if values else []
    return panels


def draw(panels: dict[str, list[Curve]], out: Path, stem: str = "accuracy") -> None:
    """A figure: out/stem.png and out/stem.svg. Curves are named at their right ends. By step if their `at` is given."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": stem, "axes.titlesize": 11})
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6.4 * columns, 4.2 * rows), squeeze=False, layout="constrained")
    for number, (axes, (title, lines)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
        by_step = any(curve.at is not None for curve in lines)
        places = [curve.at or range(1, len(curve.accuracy) + 1) for curve in lines]
        for order, (curve, x) in enumerate(zip(reversed(lines), reversed(places), strict=True), 2):  # the first on top
            if curve.low is not None and curve.high is not None:
                axes.fill_between(x, curve.low, curve.high, color=curve.color, alpha=0.13, linewidth=0, zorder=order)
            mark = "o" if curve.line == "-" and not by_step else None
            look = {"color": curve.color, "marker": mark, "markersize": 4, "linewidth": 1.2 if by_step else 1.8}
            # The id tells a reader of the SVG which line is which: panel, place of the curve in it.
            axes.plot(
                x, curve.accuracy, curve.line, **look, zorder=order, gid=f"curve-{number}-{len(lines) + 1 - order}"
            )
        last = max(x[-1] for x in places)
        if by_step:
            axes.set(title=title, xlabel="training step", xmargin=0)
        else:
            top = min(1.0, max(max(curve.high or curve.accuracy) for curve in lines) * 1.08 + 0.01)
            axes.set(title=title, xlabel="allowed attempts", ylabel="accuracy", xticks=range(1, last + 1))
            axes.set(xlim=(0.9, last + 0.1), ylim=(0, top))
        named = [(curve, x) for curve, x in zip(lines, places, strict=True) if curve.label]
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        heights = spread([curve.accuracy[-1] for curve, _ in named], 0.062 * (top - bottom))
        for (curve, x), height in zip(named, heights, strict=True):
            end = (x[-1] + 0.01 * (right - left), curve.accuracy[-1])
            leader = {"arrowstyle": "-", "color": curve.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
            place = {"xytext": (last + 0.05 * (right - left), height), "va": "center", "arrowprops": leader}
            axes.annotate(curve.label, end, color=curve.color, annotation_clip=False, **place)
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


def learning_curves(runs: dict[str, Sequence[dict[str, Any]]], color_of: dict[str, str]) -> dict[str, list[Curve]]:
    """Panels by training step from the rows of each run's metrics.jsonl."""
    panels: dict[str, list[Curve]] = {}
    for metric in TRAINING:
        for name, rows in runs.items():
            if points := [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]:
                steps, values = zip(*points, strict=True)
                panels.setdefault(metric, []).append(Curve(name, values, color=color_of[name], at=steps))
    return panels


# The page ------------------------------------------------------------------------------------------------------------
def page(out: Path, data: dict[str, Any], runs: dict[str, Sequence[dict[str, Any]]]) -> str:
    """The report as one HTML file: the template with out/accuracy.svg, the learning curves and, compressed, the data.

    What a model said is data to the page's script, never part of its HTML; the page's policy lets no other script run.
    """
    figures = {
        "accuracy": "Accuracy by allowed attempts, with its interval. Dotted: pass@k of independent samples "
        "(intrinsic: maj@k). Where the dialogues are greedy (SAMPLES = 0) the two differ at k = 1 already."
    }
    if panels := learning_curves(runs, colors(data["results"]["models"])):
        draw(panels, out, "training")
        figures["training"] = "Training, by step."
    drawings = ""
    for stem, words in figures.items():
        svg = (out / f"{stem}.svg").read_text(encoding="utf-8")
        drawings += f"<figure>{svg[svg.index('<svg') :]}<figcaption>{html.escape(words)}</figcaption></figure>"
    packed = gzip.compress(json.dumps(data, ensure_ascii=False).encode(), 9, mtime=0)
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = text.replace("__SCRIPT_HASH__", allowed).replace("__FIGURES__", drawings)
    return text.replace("__DATA__", base64.b64encode(packed).decode())
