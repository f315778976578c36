"""SCoRe in small (arXiv 2409.12917): does a model correct its answer when nobody says whether it is right?

    python -m experiments.score                                    # `make score`: minutes on two cores
    python -m experiments.score SEEDS=1,2,3 OUT=runs/score-seeds   # t-intervals over the seeds

For each seed, in the toy world: SCoRe (stage I, then stage II from the policy of stage I), plain multi-turn RL and
single-turn RL, each with the same budget of generated tokens. Then two greedy attempts at each held-out problem; the
second is asked for in SCoRe's words, whatever the first one was.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.problems import load_problems
from experiments import median, runs
from experiments.runs import Training, format_share

SEEDS: tuple[int, ...] = (0,)  # each has its own questions, its own held-out ones, and its own training
OUT: str = "runs/score"  # folder of the results
TOKEN_BUDGET: int = 400_000  # generated tokens of each method, SCoRe's two stages together
STAGE_1: float = 0.5  # share of them in stage I (not in the paper)
BETA_1: float = 0.01  # weight of the KL to the warm start, everywhere (paper 0.01)
BETA_2: float = 0.1  # the same for stage I's first attempts, which should not change (paper 0.1; 0.25 for code)

MODELS = {  # run -> its name
    "score_stage2": "SCoRe",
    "multi_turn": "plain multi-turn RL",
    "single_turn": "single-turn RL",
    "score_stage1": "SCoRe's stage I",
    "warm_start": "warm start",
}
COLUMNS = {  # of the table -> a metric of evaluate.py, and the attempt that it is about, from 0
    "Acc@t1": ("accuracy", 0),
    "Acc@t2": ("accuracy", 1),
    "Δ(t1,t2)": ("gain", 1),
    "i→c": ("i_to_c", 1),
    "c→i": ("c_to_i", 1),
    "changed": ("changed", 1),
}
PAIRS = (("score_stage2", "multi_turn"), ("score_stage2", "single_turn"), ("multi_turn", "single_turn"))
BOUNDS = ("value", "low", "high")
LEGEND = (
    "Percent of the held-out questions, two greedy attempts at each, no verdict in between. Acc@t1, Acc@t2: right at "
    "the first, at the second attempt; Δ(t1,t2): the difference of the two; i→c: wrong, then right; c→i: right, then "
    "wrong; changed: another answer at the second attempt."
)


# One seed -------------------------------------------------------------------------------------------------------------
def list_trainings(seed: int, world: Path, folder: Path) -> list[Training]:
    """The runs, in an order in which two at a time take equally long: half a budget and a whole one each."""
    stage_1 = round(STAGE_1 * TOKEN_BUDGET)
    warm_start = f"{world}/warm_start"
    arguments = {
        "score_stage1": ["PRESET=toy,score_stage1", f"KL_COEF={BETA_2},{BETA_1}", f"TOKEN_BUDGET={stage_1}"],
        # Half as many attempts in a dialogue: with twice as many dialogues an update sees as many tokens.
        "single_turn": ["PRESET=toy,multi_turn,single_turn", "MIN_ATTEMPTS=1", "DIALOGUES=256", "MINI_BATCH=128"],
        "multi_turn": ["PRESET=toy,multi_turn"],
        "score_stage2": ["PRESET=toy,score_stage2", f"TOKEN_BUDGET={TOKEN_BUDGET - stage_1}"],
    }
    arguments["score_stage2"] += [f"MODEL={folder}/score_stage1/policy", f"REFERENCE={warm_start}"]
    shared = [f"SEED={seed}", f"MODEL={warm_start}", f"TRAIN_DATA={world}/train.jsonl", "DEV_PROBLEMS=0"]
    shared += [f"KL_COEF={BETA_1}", f"TOKEN_BUDGET={TOKEN_BUDGET}"]
    after = {"score_stage2": folder / "score_stage1"}
    return [
        Training(f"seed {seed}, {MODELS[run]}", folder / run, [*shared, *own], after.get(run))
        for run, own in arguments.items()
    ]


def run_seed(seed: int) -> dict[str, Any]:
    """World, trainings and evaluation of one seed."""
    folder = Path(OUT) / f"seed-{seed}"
    world = runs.make_world(seed, folder)
    runs.run_trainings(list_trainings(seed, world, folder))
    models = [world / "warm_start" if name == "warm_start" else folder / name / "policy" for name in MODELS]
    config = runs.read_config(folder / "multi_turn")
    names = ("PROMPT", "FEEDBACK", "MAX_ATTEMPTS", "MAX_ATTEMPT_TOKENS")  # as in training
    arguments = [*(f"{name}={config[f'rollout.{name}']}" for name in names), "RESAMPLES=0", f"SEED={seed}"]
    evaluation = runs.evaluate_models(models, world, folder / "evaluation", arguments)
    questions = [problem["question"] for problem in load_problems(world / "test.jsonl")]
    return {
        "n": len(questions),
        "ideal": median.ideal_accuracy(questions, 1)[0],
        "models": {name: select_columns(evaluation["models"][name]["test"]) for name in MODELS},
        "differences": {f"{a} - {b}": select_difference(evaluation["comparisons"], a, b) for a, b in PAIRS},
    }


def select_columns(test: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{column: {"value", "low", "high"}} from a model's results."""
    return {
        column: {bound: test["metrics"][metric][bound][attempt] for bound in BOUNDS}
        for column, (metric, attempt) in COLUMNS.items()
    }


def select_difference(comparisons: Sequence[dict[str, Any]], a: str, b: str) -> dict[str, dict[str, float]]:
    """Model a minus model b at both attempts. evaluate.py compares each pair once: its second model minus its first."""
    (found,) = (c for c in comparisons if set(c["models"]) == {a, b} and c["benchmark"] == "test")
    differences = {}
    for attempt, column in enumerate(("Acc@t1", "Acc@t2")):
        value, low, high = (found[bound][attempt] for bound in ("difference", "low", "high"))
        if found["models"] == [a, b]:  # b minus a
            value, low, high = -value, -high, -low
        differences[column] = {"value": value, "low": low, "high": high}
    return differences


# What is shown --------------------------------------------------------------------------------------------------------
def make_table(results: dict[str, Any]) -> str:
    """Markdown, in percent."""
    rows = [["model", *COLUMNS]]
    for name, label in MODELS.items():
        columns = results["models"][name].items()
        rows.append([label, *(format_share(**x, sign="+" if column == "Δ(t1,t2)" else "") for column, x in columns)])
    return runs.format_table(rows)


def compare_with_zero(x: dict[str, float], above: str, below: str, neither: str) -> str:
    """One of the three phrases, by where the interval lies."""
    if x["low"] > 0:
        return above
    return below if x["high"] < 0 else neither


def describe_results(results: dict[str, Any]) -> str:
    """What the measured numbers say, and what they do not."""
    sentences = []
    for name in ("score_stage2", "multi_turn"):
        x = results["models"][name]
        words = compare_with_zero(x["Δ(t1,t2)"], "better than", "worse than", "not distinguishable from")
        sentences.append(
            f"After {MODELS[name]} second answers are {words} first ones ({100 * x['Δ(t1,t2)']['value']:+.1f} points; "
            f"{100 * x['i→c']['value']:.1f} corrected, {100 * x['c→i']['value']:.1f} made wrong, "
            f"{x['changed']['value']:.0%} changed)."
        )
    for pair, columns in results["differences"].items():
        a, b = (MODELS[name] for name in pair.split(" - "))
        x = columns["Acc@t2"]
        value, low, high = (f"{100 * x[bound]:+.1f}" for bound in BOUNDS)
        words = compare_with_zero(x, "above", "below", "within noise of")
        sentences.append(f"At the second attempt {a} is {words} {b} ({value} points, {low} to {high}).")
    return (
        f"{' '.join(sentences)} The best possible reader is right in {results['ideal']:.0%} of the cases at either "
        "attempt, for it learns nothing in between: a second attempt can only read the question once more. And this is "
        f"one kind of question and a model of {median.LAYERS} layers: it shows what the methods do to such a model, "
        "and is no evidence about language models on mathematics."
    )


def main() -> None:
    runs.start({"score": sys.modules[__name__], "runs": runs})
    out = Path(OUT)
    results = runs.run_seeds(SEEDS, run_seed, out)
    results["meaning"] = describe_results(results)
    words = f"{LEGEND} Intervals: {results['interval']}.\n\n{results['meaning']}"
    runs.write_report(out, results, make_table(results), words)


if __name__ == "__main__":
    main()
