"""Is it worth something to be told which test failed, and not only that a program is incorrect?

    python -m experiments.told                                # `make programs`: one seed
    python -m experiments.told SEEDS=2,3,4 OUT=runs/told      # t-intervals over the seeds

For each seed, in the world of programs.py: PPO with five attempts whose feedback quotes the failing test, PPO with five
attempts and "incorrect" alone, and PPO with one attempt, each with the same budget of generated tokens; then all of
them on held-out questions. Every program runs in the sandbox, which takes most of the time.
"""

import sys
from pathlib import Path
from typing import Any

from experiments import runs
from experiments.runs import Training, format_curve, format_share

SEEDS: tuple[int, ...] = (0,)  # each has its own questions, its own held-out ones, and its own training
OUT: str = "runs/told"  # folder of the results
TOKEN_BUDGET: int = 24_000  # generated tokens of each training, six a program
TEST_PROBLEMS: int = 100  # of a seed
TOLD: int = 100  # characters of the failing test and its error that are told
MOST: int = 5  # attempts

ARMS = {  # run -> its arguments for ppo.py
    "told": [f"TOLD_CHARACTERS={TOLD}"],
    "incorrect": [],
    "single_turn": ["MAX_ATTEMPTS=1", "DIALOGUES=64", "MINI_BATCH=64"],  # as many tokens in an update
}
SHARED = ["PRESET=toy", "DIALOGUES=32", "MINI_BATCH=32", "EPOCHS=2", "DEV_PROBLEMS=0", "MAX_ATTEMPT_TOKENS=16"]
SHARED += ["ACTOR_LR=2e-4", "CRITIC_LR=1e-3", "ENTROPY_COEF=0"]  # few programs: with the toy's rate the policy drifted
READERS = {"told": "careful reader, told", "untold": "careful reader, incorrect alone"}
ROWS = {  # of the table -> (model, whether it is told)
    "RL, told": ("told", True),
    "RL, incorrect alone": ("incorrect", False),
    "single-turn RL, incorrect alone": ("single_turn", False),
    "warm start, told": ("warm_start", True),
    "warm start, incorrect alone": ("warm_start", False),
}
LEGEND = (
    f"Percent of the held-out problems that are solved within 1 to {MOST} greedy attempts. told: the feedback quotes "
    "the public test that failed first, and the error; incorrect alone: it does not. careful reader: one who writes "
    "any function that passes all tests seen and has not failed, all equally likely."
)


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """World, trainings and evaluations of one seed."""
    world = runs.make_world("programs", folder / "programs", f"SEED={seed}", f"TEST_PROBLEMS={TEST_PROBLEMS}")
    shared = [*SHARED, f"TOKEN_BUDGET={TOKEN_BUDGET}"]
    runs.run_trainings([Training(arm, folder / arm, seed, world, [*shared, *own]) for arm, own in ARMS.items()])
    rows: dict[str, Any] = {}
    for told in (True, False):
        names = {row: model for row, (model, is_told) in ROWS.items() if is_told == told}
        models = [world / name if name == "warm_start" else folder / name / "policy" for name in names.values()]
        arguments = [f"TOLD_CHARACTERS={TOLD if told else 0}", f"MAX_ATTEMPTS={MOST}", f"SEED={seed}"]
        arguments += ["PROTOCOL=prefix", "RESAMPLES=0"]
        out = folder / f"evaluation-{'told' if told else 'incorrect'}"
        found = runs.evaluate_models(models, world, out, arguments)["models"]
        rows |= {row: found[name]["test"] for row, name in names.items()}
    pairs = zip(rows["RL, told"]["accuracy"], rows["RL, incorrect alone"]["accuracy"], strict=True)
    gain = {
        "accuracy": [a - b for a, b in pairs],
        "low": [None] * MOST,
        "high": [None] * MOST,
    }  # of several seeds alone
    readers = runs.read_json(world / "made.json")["careful"]
    return {"n": TEST_PROBLEMS, "rows": rows, "difference": gain, "readers": readers}


def make_table(results: dict[str, Any]) -> str:
    """Markdown, in percent."""
    table = [["attempts", *map(str, range(1, MOST + 1))]]
    table += [[row, *format_curve(results["rows"][row])] for row in ROWS]
    table.append(["told minus incorrect alone (RL)", *format_curve(results["difference"], "+")])
    table += [[label, *map(format_share, results["readers"][name])] for name, label in READERS.items()]
    return runs.format_table(table)


if __name__ == "__main__":
    runs.main(sys.modules[__name__])
