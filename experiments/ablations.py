"""Change one constant, see what it does: a table of ablations of multi-attempt RL in the toy world.

    python -m data.ablations                                # hours on two cores; it shows the time left
    python -m data.ablations ONLY=LAMBDA=1,grpo SEEDS=1,2   # some rows (the base is always there), fewer seeds

Each row is a training of ppo.py with one change, on the same budget of generated tokens, for each seed; then
evaluate.py on the seed's held-out problems. Differences from the base are paired by seed. Stopped at any time (Ctrl-C
costs nothing) it goes on where it was. Table, figure and results.json are there after the first seed, renewed after
each.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rollout
from data import demo
from data.demo import ARMS, Training, markdown, t_interval
from data.report import OKABE_ITO
from evaluate import to_json, write_atomically

SEEDS: str = "1,2,3"  # comma-separated; each has its own questions, its own held-out ones, and its own trainings
OUT: str = "runs/ablations"  # folder of the results
ONLY: str = ""  # comma-separated rows of ABLATIONS; "" = all
TOKEN_BUDGET: int = 120_000  # generated tokens of each run; `make demo` has 400,000
TRAINING: str = ""  # more arguments for ppo.py in all runs, spaces between

BASE = "base"
GROUPS = ["SAMPLES_PER_PROMPT=4"]  # what estimators that compare the dialogues of a problem need
ABLATIONS = {  # row -> its arguments for ppo.py, on top of PRESET=toy
    BASE: [],
    "MAX_ATTEMPTS=1": ARMS["single_turn"],  # which has as many tokens per update as the base
    "MAX_ATTEMPTS=2": ["MAX_ATTEMPTS=2"],
    "MAX_ATTEMPTS=3": ["MAX_ATTEMPTS=3"],
    "LAMBDA=1": ["LAMBDA=1"],
    "LAMBDA=0.9": ["LAMBDA=0.9"],
    "KL_COEF=0.02": ["KL_COEF=0.02"],  # first attempts not held near the start
    "KL_COEF=0.05": ["KL_COEF=0.05"],
    "ENTROPY_COEF=0": ["ENTROPY_COEF=0"],
    "REWARD_WRONG=0": ["REWARD_WRONG=0"],
    "REWARD_WRONG=-1": ["REWARD_WRONG=-1"],
    "WHITEN=0": ["WHITEN=0"],
    "ATTEMPT_GAMMA=0.8": ["ATTEMPT_GAMMA=0.8"],
    "ATTEMPT_GAMMA=0": ["ATTEMPT_GAMMA=0"],
    "ATTEMPT_DISCOUNT=0.8": ["ATTEMPT_DISCOUNT=0.8"],
    "CRITIC_WARMUP=20": ["CRITIC_WARMUP=20"],
    "gae in groups": GROUPS,
    "rloo": ["ESTIMATOR=rloo", *GROUPS],
    "grpo": ["ESTIMATOR=grpo", *GROUPS],
    "dr_grpo": ["ESTIMATOR=dr_grpo", "WHITEN=0", *GROUPS],  # it is meant to do without a deviation
    "reinforce": ["ESTIMATOR=reinforce"],
}
MOST = rollout.MAX_ATTEMPTS  # attempts that the evaluation grants at the most
COLUMNS = {  # of the table -> a metric of evaluate.py, and for how many allowed attempts
    "at 1": ("accuracy", 1),
    f"at {MOST}": ("accuracy", MOST),
    "repeats": ("repeat", MOST),
}
LEGEND = (
    f"Percent of the held-out questions solved within 1 and within {MOST} attempts, greedy; repeats: retries that give "
    f"an answer which that dialogue has given before. Behind each its difference from the base in points, paired by "
    "seed. The last column names the differences whose 95 % t-interval over the seeds leaves out zero; with that many "
    "intervals, about one in twenty would without any effect."
)


# One seed ------------------------------------------------------------------------------------------------------------
def chosen() -> list[str]:
    """The rows of this call. Raises SystemExit for a name that is none."""
    wanted = ONLY.split(",") if ONLY else list(ABLATIONS)
    if unknown := [name for name in wanted if name not in ABLATIONS]:
        raise SystemExit(f"ONLY: no row {unknown[0]}; there are {', '.join(ABLATIONS)}")
    return [name for name in ABLATIONS if name in (BASE, *wanted)]


def run_seed(seed: int, rows: Sequence[str], seeds_left: int) -> dict[str, dict[str, float]]:
    """World, trainings and evaluation of one seed -> {row: {column: value}}; what is done already is not done again."""
    folder = Path(OUT) / f"seed-{seed}"
    world = demo.make_world(seed, folder)
    shared = ["PRESET=toy", f"SEED={seed}", f"MODEL={world}/warm_start", f"TRAIN_DATA={world}/train.jsonl"]
    shared += [f"TOKEN_BUDGET={TOKEN_BUDGET}", "DEV_PROBLEMS=0"]
    folders = {row: folder / row.replace(" ", "_") for row in rows}
    runs = [
        Training(f"seed {seed}, {row}", folders[row], [*shared, *ABLATIONS[row], *TRAINING.split()]) for row in rows
    ]
    demo.train(runs, later=seeds_left * len(rows) * TOKEN_BUDGET)
    limit = demo.constants_of(["PRESET=toy"])["rollout.MAX_ATTEMPT_TOKENS"]
    how = [f"MAX_ATTEMPTS={MOST}", "RESAMPLES=0", f"MAX_ATTEMPT_TOKENS={limit}", f"SEED={seed}"]
    policies = [folders[row] / "policy" for row in rows]
    models = demo.evaluate_all(policies, world, folder / "evaluation", how)["models"]
    return {row: columns(models[folders[row].name]["test"]) for row in rows}


def columns(result: dict[str, Any]) -> dict[str, float]:
    return {column: result["metrics"][metric]["value"][k - 1] for column, (metric, k) in COLUMNS.items()}


# All seeds -----------------------------------------------------------------------------------------------------------
def summarise(seeds: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{row: {column: {"value", "difference", "low", "high"}}} from {seed: {row: {column: value}}}.

    Value and difference from the base are means over the seeds, low and high the bounds of the difference; None where
    there is but one seed.

    >>> two = {"1": {"base": {"at 1": 0.4}, "rloo": {"at 1": 0.5}}, "2": {"base": {"at 1": 0.2}, "rloo": {"at 1": 0.3}}}
    >>> summarise(two)["rloo"]
    {'at 1': {'value': 0.4, 'difference': 0.1, 'low': 0.1, 'high': 0.1}}
    """

    def one(row: str, column: str) -> dict[str, Any]:
        values = [results[row][column] for results in seeds.values()]
        ahead = [results[row][column] - results[BASE][column] for results in seeds.values()]
        mean, low, high = t_interval(ahead) if len(ahead) > 1 else (ahead[0], None, None)
        numbers = {"value": sum(values) / len(values), "difference": mean, "low": low, "high": high}
        return {name: number if number is None else round(number, 6) for name, number in numbers.items()}

    first = next(iter(seeds.values()))
    return {row: {column: one(row, column) for column in COLUMNS if column in first[row]} for row in first}


def beyond_noise(x: dict[str, Any]) -> bool:
    return x["low"] is not None and (x["low"] > 0 or x["high"] < 0)


def table(results: dict[str, Any]) -> str:
    """Markdown, in percent and points."""

    def cells(row: str, x: dict[str, Any]) -> list[str]:
        if row == BASE:
            return [f"{100 * x['value']:.1f}", ""]
        half = "" if x["low"] is None else f" ±{100 * (x['high'] - x['difference']):.1f}"
        return [f"{100 * x['value']:.1f}", f"{100 * x['difference']:+.1f}{half}"]

    rows = [["change", *(words for column in COLUMNS for words in (column, "from base")), "beyond noise"]]
    for row, by_column in results["rows"].items():
        found = [column for column, x in by_column.items() if beyond_noise(x)]
        said = ", ".join(found) or ("within noise" if len(results["seeds"]) > 1 else "one seed: unknown")
        rows.append([row, *(cell for x in by_column.values() for cell in cells(row, x)), "" if row == BASE else said])
    return markdown(rows)


def draw(results: dict[str, Any], out: Path) -> None:
    """out/ablations.png and .svg: differences from the base with their intervals, a panel a column; grey: noise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "ablations"})
    rows = [row for row in results["rows"] if row != BASE]
    size = (3.4 * len(COLUMNS) + 1.4, 0.28 * len(rows) + 1.2)
    figure, panels = plt.subplots(1, len(COLUMNS), figsize=size, sharey=True, layout="constrained")
    for axes, column in zip(panels, COLUMNS, strict=True):
        for height, row in enumerate(rows):
            x = results["rows"][row][column]
            points = [100 * x[bound] for bound in ("low", "difference", "high") if x[bound] is not None]
            color = OKABE_ITO[0] if beyond_noise(x) else "#888888"
            axes.plot(points, [height] * len(points), "-o", color=color, markersize=5, markevery=[len(points) // 2])
        axes.axvline(0, color="#333333", linewidth=0.8)
        base = results["rows"][BASE][column]["value"]
        axes.set(title=f"{column} (base {100 * base:.1f})", xlabel="points from the base", yticks=range(len(rows)))
        axes.set_yticklabels(rows)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].invert_yaxis()
    for kind in ("png", "svg"):
        beside = out / f".ablations.writing.{kind}"
        figure.savefig(beside, dpi=160, metadata={"Date": None} if kind == "svg" else None)
        beside.rename(out / f"ablations.{kind}")
    plt.close(figure)


def report(seeds: dict[str, dict[str, dict[str, float]]], out: Path) -> None:
    """Write down, draw and print what is known of so many seeds."""
    interval = f"t over {len(seeds)} seeds, 95 %" if len(seeds) > 1 else "none: one seed"
    results = {"seeds": seeds, "token_budget": TOKEN_BUDGET, "rows": summarise(seeds), "interval": interval}
    results["arguments"] = {row: ABLATIONS[row] for row in results["rows"]}
    write_atomically(out / "results.json", to_json(results))
    legend = f"{LEGEND} {TOKEN_BUDGET:,} generated tokens a run; seeds {', '.join(seeds)}. Intervals: {interval}."
    write_atomically(out / "table.md", f"{table(results)}\n\n{legend}\n")
    draw(results, out)
    print(f"\n{table(results)}\n\n{legend}\n\n{out}/table.md  {out}/ablations.png  {out}/results.json")


def is_complete(path: Path, seeds: Sequence[int], rows: Sequence[str]) -> bool:
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seeds": {}, "rows": {}}
    return there["seeds"].keys() >= set(map(str, seeds)) and there["rows"].keys() >= set(rows)


def main() -> None:
    rollout.override_constants(sys.argv[1:], {"ablations": sys.modules[__name__], "demo": demo})
    seeds, rows, out = demo.parse_seeds(SEEDS), chosen(), Path(OUT)
    per_seed: dict[str, dict[str, dict[str, float]]] = {}
    with demo.stopwatch(out, complete=is_complete(out / "results.json", seeds, rows)):
        for seeds_left, seed in zip(reversed(range(len(seeds))), seeds, strict=True):
            per_seed[str(seed)] = run_seed(seed, rows, seeds_left)
            report(per_seed, out)
    minutes = float((out / "seconds").read_text()) / 60
    print(f"{minutes:.0f} minutes on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
