"""Change one constant, see what it does: a table of ablations of multi-attempt RL in the toy world.

    python -m experiments.ablations                                # hours on two cores
    python -m experiments.ablations ONLY=LAMBDA=1,grpo SEEDS=1,2   # some rows (the base is always there), fewer seeds

Each row is, for each seed, a training of ppo.py with one change, on the same budget of generated tokens, and an
evaluation on the seed's held-out problems. Differences from the base are paired by seed. It can be stopped at any time,
and called with fewer seeds first.
"""

import sys
from pathlib import Path
from typing import Any

from experiments import runs
from experiments.demo import ARMS
from experiments.runs import Training

SEEDS: tuple[int, ...] = (1, 2, 3)  # each has its own questions, its own held-out ones, and its own trainings
OUT: str = "runs/ablations"  # folder of the results
ONLY: str = ""  # comma-separated rows of ABLATIONS; "" = all
TOKEN_BUDGET: int = 120_000  # generated tokens of each run; `make demo` has 400,000

BASE = "base"
ONE_CHANGE = (  # rows that are called like their one argument; with one KL_COEF it is the same for all attempts
    "MAX_ATTEMPTS=2 MAX_ATTEMPTS=3 LAMBDA=1 LAMBDA=0.9 KL_COEF=0.02 KL_COEF=0.05 ENTROPY_COEF=0 REWARD_WRONG=0 "
    "REWARD_WRONG=-1 WHITEN=0 ATTEMPT_GAMMA=0.8 ATTEMPT_GAMMA=0 ATTEMPT_DISCOUNT=0.8 CRITIC_WARMUP=20"
)
GROUPS = "SAMPLES_PER_PROMPT=4"  # what estimators that compare the dialogues of a problem need
ABLATIONS: dict[str, list[str]] = {  # row -> its arguments for ppo.py, on top of PRESET=toy
    BASE: [],
    "MAX_ATTEMPTS=1": ARMS["single_turn"],  # which has as many tokens per update as the base
    **{change: [change] for change in ONE_CHANGE.split()},
    "gae in groups": [GROUPS],
    "rloo": ["ESTIMATOR=rloo", GROUPS],
    "grpo": ["ESTIMATOR=grpo", GROUPS],
    "dr_grpo": ["ESTIMATOR=dr_grpo", "WHITEN=0", GROUPS],  # it is meant to work without dividing by a deviation
    "reinforce": ["ESTIMATOR=reinforce"],
}
MOST = 5  # attempts that the evaluation grants at the most
COLUMNS = {  # of the table -> a metric of evaluate.py, and for how many allowed attempts
    "at 1": ("accuracy", 1),
    f"at {MOST}": ("accuracy", MOST),
    "repeats": ("repeat", MOST),
}
LEGEND = (
    f"Percent of the held-out questions solved within 1 and within {MOST} attempts, greedy; repeats: retries that give "
    "an answer which was given before in the same dialogue. Next to each is its difference from the base in points, "
    "paired by seed. The last column names the differences whose interval does not contain zero; with that many "
    "intervals, about one in twenty would not even if nothing had an effect."
)


def choose_rows() -> list[str]:
    """The rows of this call. Raises SystemExit for a name that does not exist."""
    wanted = ONLY.split(",") if ONLY else list(ABLATIONS)
    if unknown := [name for name in wanted if name not in ABLATIONS]:
        raise SystemExit(f"ONLY: no row {unknown[0]}; there are {', '.join(ABLATIONS)}")
    return [name for name in ABLATIONS if name in (BASE, *wanted)]


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """World, trainings and evaluation of one seed: the value of each row and column, and its difference from the base,
    whose interval is known only when there are several seeds."""
    folders = {row: folder / row.replace(" ", "_") for row in choose_rows()}
    world = runs.make_world("median", folder / "toy", f"SEED={seed}")
    shared = ["PRESET=toy", f"TOKEN_BUDGET={TOKEN_BUDGET}", "DEV_PROBLEMS=0"]
    runs.run_trainings([Training(row, run, seed, world, [*shared, *ABLATIONS[row]]) for row, run in folders.items()])
    arguments = [f"MAX_ATTEMPTS={MOST}", "RESAMPLES=0", f"SEED={seed}"]
    policies = [run / "policy" for run in folders.values()]
    models = runs.evaluate_models(policies, world, folder / "evaluation", arguments)["models"]
    values: dict[str, dict[str, float]] = {}
    differences: dict[str, dict[str, Any]] = {}
    for row, run in folders.items():
        metrics = models[run.name]["test"]["metrics"]
        values[row] = {column: metrics[metric]["value"][k - 1] for column, (metric, k) in COLUMNS.items()}
        differences[row] = {
            column: {"value": value - values[BASE][column], "low": None, "high": None}
            for column, value in values[row].items()
        }
    return {"values": values, "differences": differences}


def make_table(results: dict[str, Any]) -> str:
    """Markdown, in percent and points."""
    rows = [["change", *(head for column in COLUMNS for head in (column, "from base")), "beyond noise"]]
    nothing = "within noise" if len(results["seeds"]) > 1 else "one seed: unknown"
    for row, values in results["values"].items():
        cells, beyond = [], []
        for column, value in values.items():
            x = results["differences"][row][column]
            cells += [f"{100 * value:.1f}", "" if row == BASE else runs.format_share(**x, sign="+")]
            if x["low"] is not None and not x["low"] <= 0 <= x["high"]:
                beyond.append(column)
        rows.append([row, *cells, "" if row == BASE else ", ".join(beyond) or nothing])
    return runs.format_table(rows)


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
