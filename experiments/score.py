"""SCoRe in small (arXiv 2409.12917): does a model correct its answer when nobody says whether it is right?

    python -m experiments.score                                    # `make score`: minutes on two cores
    python -m experiments.score SEEDS=1,2,3 OUT=runs/score-seeds   # t-intervals over the seeds

For each seed, in a world where checking is easier than finding (arrows.py): SCoRe (stage I, then stage II from the
policy of stage I), plain multi-turn RL and single-turn RL, each with the same budget of generated tokens. Then two
greedy attempts at each held-out problem; the second is asked for in SCoRe's words, whatever the first one was.

What the paper takes out one by one are further METHODS, each with SCoRe's budget of tokens: see ABLATIONS.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.problems import load_problems
from evaluate import wilson
from experiments import runs
from experiments.arrows import read_question
from experiments.runs import Training, format_share
from plumbing.files import read_jsonl
from plumbing.report import Curve, color_models, draw

SEEDS: tuple[int, ...] = (0,)  # each has its own questions, its own held-out ones, and its own training
OUT: str = "runs/score"  # folder of the results
TOKEN_BUDGET: int = 400_000  # generated tokens of each method, SCoRe's two stages together
METHODS: tuple[str, ...] = ("score_stage1", "score_stage2", "multi_turn", "single_turn")  # to train; no stage II alone
WORLD: str = ""  # arguments for arrows.py, spaces between, such as "EAGER=0.3 CHAINS=1,2,2,3"
STAGE_1: float = 0.5  # share of the tokens in stage I (not in the paper)
BETA_1: float = 0.01  # weight of the KL to the warm start, everywhere (paper 0.01)
BETA_2: float = 0.1  # the same for stage I's first attempts, which should not change (paper 0.1; 0.25 for code)

MODELS = {  # run -> its name
    "score_stage2": "SCoRe",
    "multi_turn": "plain multi-turn RL",
    "single_turn": "single-turn RL",
    "score_stage1": "SCoRe's stage I",
    "warm_start": "warm start",
}
ABLATIONS = {  # run -> SCoRe with one change
    "alpha_0": "SCORE_ALPHA=0",
    "alpha_1": "SCORE_ALPHA=1",
    "loose_stage2": "first attempts free in stage I",
    "loose_stage1": "... its stage I",
    "stage2_alone": "without stage I",
}
NAMES = MODELS | ABLATIONS
AFTER = {  # run -> the stage I from whose policy it begins
    "score_stage2": "score_stage1",
    "alpha_0": "score_stage1",
    "alpha_1": "score_stage1",
    "loose_stage2": "loose_stage1",
}
COLUMNS = {  # of the table -> a metric of evaluate.py, and the attempt that it is about, from 0
    "Acc@t1": ("accuracy", 0),
    "Acc@t2": ("accuracy", 1),
    "Δ(t1,t2)": ("gain", 1),
    "i→c": ("i_to_c", 1),
    "c→i": ("c_to_i", 1),
    "changed": ("changed", 1),
}
CURVES = [run for run in NAMES if run not in ("score_stage1", "loose_stage1", "warm_start")]
PLACES = 40  # of a learning curve, at equal distances in tokens
PAIRS = [("score_stage2", "multi_turn"), ("score_stage2", "single_turn"), ("multi_turn", "single_turn")]
PAIRS += [(run, "score_stage2") for run in ABLATIONS if run != "loose_stage1"]
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
    first = ["PRESET=toy,score_stage1", f"TOKEN_BUDGET={stage_1}"]
    second = ["PRESET=toy,score_stage2", f"TOKEN_BUDGET={TOKEN_BUDGET - stage_1}"]
    arguments = {
        "score_stage1": [*first, f"KL_COEF={BETA_2},{BETA_1}"],
        # Half as many attempts in a dialogue: with twice as many dialogues an update sees as many tokens.
        "single_turn": ["PRESET=toy,multi_turn,single_turn", "MIN_ATTEMPTS=1", "DIALOGUES=256", "MINI_BATCH=128"],
        "multi_turn": ["PRESET=toy,multi_turn"],
        "score_stage2": second,
        "alpha_0": [*second, "SCORE_ALPHA=0"],
        "alpha_1": [*second, "SCORE_ALPHA=1"],
        "loose_stage1": first,
        "loose_stage2": second,
        "stage2_alone": ["PRESET=toy,score_stage2"],
    }
    warm_start = f"{world}/warm_start"
    shared = [f"SEED={seed}", f"MODEL={warm_start}", f"TRAIN_DATA={world}/train.jsonl", "DEV_PROBLEMS=0"]
    shared += [f"KL_COEF={BETA_1}", f"TOKEN_BUDGET={TOKEN_BUDGET}"]
    for run, stage in AFTER.items():
        arguments[run] = [*arguments[run], f"MODEL={folder}/{stage}/policy", f"REFERENCE={warm_start}"]
    return [
        Training(
            f"seed {seed}, {NAMES[run]}", folder / run, [*shared, *own], folder / AFTER[run] if run in AFTER else None
        )
        for run, own in arguments.items()
        if run in METHODS
    ]


def run_seed(seed: int) -> dict[str, Any]:
    """World, trainings and evaluation of one seed."""
    folder = Path(OUT) / f"seed-{seed}"
    world = runs.make_world("arrows", folder / "arrows", f"SEED={seed}", *WORLD.split())
    runs.run_trainings(list_trainings(seed, world, folder))
    names = [name for name in NAMES if name in METHODS or name == "warm_start"]
    models = [world / "warm_start" if name == "warm_start" else folder / name / "policy" for name in names]
    config = runs.read_config(folder / METHODS[-1])
    settings = ("PROMPT", "FEEDBACK", "MAX_ATTEMPT_TOKENS")  # as in training
    arguments = [*(f"{name}={config[f'rollout.{name}']}" for name in settings), "MAX_ATTEMPTS=2", "RESAMPLES=0"]
    evaluation = runs.evaluate_models(models, world, folder / "evaluation", [*arguments, f"SEED={seed}"])
    problems = load_problems(world / "test.jsonl")
    lengths = {problem["id"]: len(read_question(problem["question"])) - 1 for problem in problems}
    played = {name: read_jsonl(folder / "evaluation" / f"dialogues-{name}.jsonl") for name in names}
    return {
        "n": len(problems),
        "ideal": json.loads((world / "made.json").read_text(encoding="utf-8"))["ceilings"],
        "models": {name: select_columns(evaluation["models"][name]["test"]) for name in names},
        "differences": {
            f"{a} - {b}": select_difference(evaluation["comparisons"], a, b) for a, b in PAIRS if {a, b} <= {*names}
        },
        "by_arrows": {name: split_by_arrows(played[name], lengths) for name in names},
        "curves": {name: read_curves(folder, name) for name in names if name in CURVES},
        "dialogues": show_dialogues(played, problems, lengths),
    }


def split_by_arrows(records: list[dict], lengths: dict[str, int]) -> dict[str, dict[str, dict[str, Any]]]:
    """{arrows of the chain: {"Acc@t1": {"value", "low", "high"}, "Acc@t2": ...}}."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for length in sorted(set(lengths.values())):
        attempts = [record["attempts"] for record in records if lengths[record["id"]] == length]
        result[str(length)] = {}
        for attempt, column in enumerate(("Acc@t1", "Acc@t2")):
            right = sum(each[attempt]["status"] == "correct" for each in attempts)
            low, high = wilson(right, len(attempts))
            result[str(length)][column] = {"value": right / len(attempts), "low": low, "high": high}
    return result


def read_curves(folder: Path, name: str) -> dict[str, list[float]]:
    """{"accuracy_at_1", "accuracy_at_2"} of the sampled training dialogues at PLACES places of the token budget, from
    stage I on; each is the mean of the steps around it, or the nearest step's."""
    rows, before = [], 0
    for run in [AFTER[name], name] if name in AFTER else [name]:
        rows += [row | {"at": before + row["generated_tokens"]} for row in read_jsonl(folder / run / "metrics.jsonl")]
        before = rows[-1]["at"]
    curves: dict[str, list[float]] = {}
    for metric in ("accuracy_at_1", "accuracy_at_2"):
        for number in range(PLACES if metric in rows[0] else 0):
            place, width = TOKEN_BUDGET * (number + 0.5) / PLACES, TOKEN_BUDGET / PLACES / 2
            nearest = min(rows, key=lambda row: abs(row["at"] - place))
            near = [row[metric] for row in rows if abs(row["at"] - place) <= width] or [nearest[metric]]
            curves.setdefault(metric, []).append(statistics.fmean(near))
    return curves


def show_dialogues(played: dict[str, list[dict]], problems: list[dict], lengths: dict[str, int]) -> list[str]:
    """A question whose chain has two arrows or more, and what each model said."""
    problem = next(problem for problem in problems if lengths[problem["id"]] > 1)
    lines = [f"{problem['question']} ({problem['answer']})"]
    for name, records in played.items():
        (record,) = (record for record in records if record["id"] == problem["id"])
        said = [f"{attempt['text']} [{attempt['status']}]" for attempt in record["attempts"]]
        lines.append(f"{NAMES[name]}: " + " then".join(said))
    return lines


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
def make_tables(results: dict[str, Any]) -> str:
    """Markdown, in percent: the columns of each model, and accuracy by the number of arrows."""
    rows, lengths = [["model", *COLUMNS]], list(results["by_arrows"]["warm_start"])
    by_arrows = [["model", *(f"{length} arrows, {t}" for length in lengths for t in ("t1", "t2"))]]
    for name, shown in results["models"].items():
        columns = shown.items()
        cells = [format_share(**x, sign="+" if column == "Δ(t1,t2)" else "") for column, x in columns]
        rows.append([NAMES[name], *cells])
        split = results["by_arrows"][name]
        by_arrows.append([NAMES[name], *(format_share(**x) for length in lengths for x in split[length].values())])
    return f"{runs.format_table(rows)}\n\n{runs.format_table(by_arrows)}"


def draw_curves(results: dict[str, Any], out: Path) -> None:
    """Accuracy of first (dotted) and of second answers by generated tokens, in out/curves.png and .svg."""
    lines, colors = [], color_models(results["curves"])
    places = [TOKEN_BUDGET * (number + 0.5) / PLACES / 1000 for number in range(PLACES)]
    for name, curves in results["curves"].items():
        for metric, values in reversed(curves.items()):  # a method is named at its second answers, if it has any
            look = {"color": colors[name], "line": ":" if metric == "accuracy_at_1" else "-", "steps": places}
            lines.append(Curve("" if metric == "accuracy_at_1" and len(curves) > 1 else NAMES[name], values, **look))
    title = "Accuracy of second answers; dotted: of first ones"
    draw({title: lines}, out, "curves", "thousand generated tokens")


def compare_with_zero(x: dict[str, float], above: str, below: str, neither: str) -> str:
    """One of the three phrases, by where the interval lies."""
    if x["low"] > 0:
        return above
    return below if x["high"] < 0 else neither


def describe_results(results: dict[str, Any]) -> str:
    """What the measured numbers say, and what they do not."""
    sentences = []
    for pair, columns in results["differences"].items():
        a, b = (NAMES[name] for name in pair.split(" - "))
        x = columns["Acc@t2"]
        value, low, high = (f"{100 * x[bound]:+.1f}" for bound in BOUNDS)
        words = compare_with_zero(x, "above", "below", "within noise of")
        sentences.append(f"At the second attempt {a} is {words} {b} ({value} points, {low} to {high}).")
    first, second = results["ideal"]
    return (
        f"{' '.join(sentences)} First answers that follow no more arrows than the authors of the warm start do, and "
        f"second ones that follow one more, are right in at most {first:.0%} and {second:.0%} of the cases. Where "
        "checking is so much easier than finding, a gain says that a method can teach to check, and how fast; it is no "
        "evidence about language models on mathematics."
    )


def main() -> None:
    runs.start({"score": sys.modules[__name__], "runs": runs})
    out = Path(OUT)
    results = runs.run_seeds(SEEDS, run_seed, out)
    results["meaning"] = describe_results(results)
    dialogues = "\n".join(results["seeds"][str(SEEDS[0])]["dialogues"])
    words = f"{LEGEND} Intervals: {results['interval']}.\n\n{results['meaning']}\n\n```\n{dialogues}\n```"
    draw_curves(results, out)
    runs.write_report(out, results, make_tables(results), words)


if __name__ == "__main__":
    main()
