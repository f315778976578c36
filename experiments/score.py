"""SCoRe in small (arXiv 2409.12917): does a model correct its answer when nobody says whether it is right?

    python -m experiments.score                                    # `make score`: minutes on two cores
    python -m experiments.score SEEDS=1,2,3 OUT=runs/score-seeds   # t-intervals over the seeds

For each seed, in a world where checking is easier than finding (arrows.py): SCoRe (stage I, then stage II from the
policy of stage I), plain multi-turn RL and single-turn RL, each with the same budget of generated tokens. Then two
greedy attempts at each held-out problem; the second is asked for in SCoRe's words, whatever the first one was.

What the paper takes out one by one are further METHODS, each with SCoRe's budget of tokens: see RUNS.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from data.problems import load_problems
from evaluate import wilson
from experiments import runs
from experiments.arrows import read_question
from experiments.runs import Training, format_share
from plumbing.files import read_jsonl
from plumbing.report import Curve, color_models, draw, running_mean

import numpy as np

SEEDS: tuple[int, ...] = (0,)  # each has its own questions, its own held-out ones, and its own training
OUT: str = "runs/score"  # folder of the results
TOKEN_BUDGET: int = 400_000  # generated tokens of each method, SCoRe's two stages together
METHODS: tuple[str, ...] = ("score_stage1", "score_stage2", "multi_turn", "single_turn")  # to train; no stage II alone
WORLD: str = ""  # arguments for arrows.py, spaces between, such as "EAGER=0.3 CHAINS=1,2,2,3"
STAGE_1: float = 0.5  # share of the tokens in stage I (not in the paper)

SCORE = "score_stage2"  # what the others are compared with
RUNS = {  # run -> its name, its arguments for ppo.py, and the stage I from whose policy it begins; "": the warm start.
    # Their order is one in which two at a time take equally long: half a budget and a whole one each.
    "score_stage1": ("SCoRe's stage I", ["PRESET=toy,score_stage1"], ""),
    # Half as many attempts in a dialogue: with twice as many dialogues an update sees as many tokens.
    "single_turn": (
        "single-turn RL",
        ["PRESET=toy,multi_turn,single_turn", "MIN_ATTEMPTS=1", "DIALOGUES=256", "MINI_BATCH=128"],
        "",
    ),
    "multi_turn": ("plain multi-turn RL", ["PRESET=toy,multi_turn"], ""),
    SCORE: ("SCoRe", ["PRESET=toy,score_stage2"], "score_stage1"),
    # Ablations: SCoRe with one change
    "loose_stage1": ("stage I with free first attempts", ["PRESET=toy,score_stage1", "KL_COEF=0.01"], ""),
    "alpha_0": ("SCORE_ALPHA=0", ["PRESET=toy,score_stage2", "SCORE_ALPHA=0"], "score_stage1"),
    "alpha_1": ("SCORE_ALPHA=1", ["PRESET=toy,score_stage2", "SCORE_ALPHA=1"], "score_stage1"),
    "loose_stage2": ("first attempts free in stage I", ["PRESET=toy,score_stage2"], "loose_stage1"),
    "stage2_alone": ("without stage I", ["PRESET=toy,score_stage2"], ""),
}
FIRST_STAGES = ("score_stage1", "loose_stage1")
NAMES = {run: name for run, (name, _, _) in RUNS.items()} | {"warm_start": "warm start"}
COLUMNS = {  # of the table -> a metric of evaluate.py, and the attempt that it is about, from 0
    "Acc@t1": ("accuracy", 0),
    "Acc@t2": ("accuracy", 1),
    "Δ(t1,t2)": ("gain", 1),
    "i→c": ("i_to_c", 1),
    "c→i": ("c_to_i", 1),
    "changed": ("changed", 1),
}
PLACES = 40  # of a learning curve, at equal distances in tokens
LEGEND = (
    "Percent of the held-out questions, two greedy attempts at each, no verdict in between. Acc@t1, Acc@t2: right at "
    "the first, at the second attempt; Δ(t1,t2): the difference of the two; i→c: wrong, then right; c→i: right, then "
    "wrong; changed: another answer at the second attempt; from SCoRe: difference of Acc@t2."
)


# One seed -------------------------------------------------------------------------------------------------------------
def list_trainings(seed: int, world: Path, folder: Path) -> list[Training]:
    """The runs of METHODS."""
    stage_1, trainings = round(STAGE_1 * TOKEN_BUDGET), []
    for run, (name, own, first) in RUNS.items():
        if run not in METHODS:
            continue
        tokens, start = stage_1 if run in FIRST_STAGES else TOKEN_BUDGET, list[str]()
        if first:
            tokens -= stage_1
            start = [f"MODEL={folder}/{first}/policy", f"REFERENCE={world}/warm_start"]
        arguments = [*own, *start, "DEV_PROBLEMS=0", f"TOKEN_BUDGET={tokens}"]
        trainings.append(Training(name, folder / run, seed, world, arguments, folder / first if first else None))
    return trainings


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """World, trainings and evaluation of one seed."""
    world = runs.make_world("arrows", folder / "arrows", f"SEED={seed}", *WORLD.split())
    runs.run_trainings(list_trainings(seed, world, folder))
    names = [name for name in NAMES if name in METHODS or name == "warm_start"]
    names.sort(key=lambda name: name != SCORE)  # first in the table
    models = [world / "warm_start" if name == "warm_start" else folder / name / "policy" for name in names]
    arguments = ["MAX_ATTEMPTS=2", "RESAMPLES=0", f"SEED={seed}"]
    evaluation = runs.evaluate_models(models, world, folder / "evaluation", arguments)
    problems = load_problems(world / "test.jsonl")
    lengths = {problem["id"]: len(read_question(problem["question"])) - 1 for problem in problems}
    played = {name: read_jsonl(folder / "evaluation" / f"dialogues-{name}.jsonl") for name in names}
    return {
        "n": len(problems),
        "ideal": runs.read_json(world / "made.json")["ceilings"],
        "models": {name: select_columns(evaluation["models"][name]["test"]) for name in names},
        "differences": select_differences(evaluation["comparisons"]),
        "by_arrows": {name: split_by_arrows(played[name], lengths) for name in names},
        "places": np.linspace(0, TOKEN_BUDGET, PLACES).tolist(),
        "curves": {name: read_curves(folder, name) for name in names if name not in (*FIRST_STAGES, "warm_start")},
        "dialogues": show_dialogues(played, problems, lengths),
    }


def select_columns(test: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{column: {"value", "low", "high"}} from a model's results."""
    return {
        column: {bound: values[attempt] for bound, values in test["metrics"][metric].items()}
        for column, (metric, attempt) in COLUMNS.items()
    }


def select_differences(comparisons: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{"a - b": {"Acc@t1": {"value", "low", "high"}, "Acc@t2": ...}} of any two models."""
    differences: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for c in comparisons:
        first, second = c["models"]
        for attempt, column in enumerate(("Acc@t1", "Acc@t2")):
            value, low, high = (c[bound][attempt] for bound in ("difference", "low", "high"))
            differences[f"{second} - {first}"][column] = {"value": value, "low": low, "high": high}
            differences[f"{first} - {second}"][column] = {"value": -value, "low": -high, "high": -low}
    return differences


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
    """{"accuracy_at_1", "accuracy_at_2"} of the sampled training dialogues, running means over a twentieth of the
    steps, at PLACES places of the token budget, from stage I on."""
    rows, tokens, before = [], [], 0
    for run in filter(None, (RUNS[name][2], name)):
        steps = read_jsonl(folder / run / "metrics.jsonl")
        rows += steps
        tokens += [before + step["generated_tokens"] for step in steps]
        before = tokens[-1]
    curves = {}
    for metric in ("accuracy_at_1", "accuracy_at_2"):
        if metric in rows[0]:
            smooth = running_mean([row[metric] for row in rows], 1 + len(rows) // 20)
            curves[metric] = np.interp(np.linspace(0, TOKEN_BUDGET, PLACES), tokens, smooth).tolist()
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


# What is shown --------------------------------------------------------------------------------------------------------
def make_table(results: dict[str, Any]) -> str:
    """Markdown, in percent: the columns of each model, accuracy by the number of arrows, and a dialogue of each."""
    lengths, none = list(results["by_arrows"]["warm_start"]), {"Acc@t2": {"value": None}}
    rows = [["model", *COLUMNS, "from SCoRe"]]
    by_arrows = [["model", *(f"{length} arrows, {t}" for length in lengths for t in ("t1", "t2"))]]
    for name, columns in results["models"].items():
        cells = [format_share(**x, sign="+" if column == "Δ(t1,t2)" else "") for column, x in columns.items()]
        difference = results["differences"].get(f"{name} - {SCORE}", none)["Acc@t2"]
        rows.append([NAMES[name], *cells, format_share(**difference, sign="+")])
        split = results["by_arrows"][name]
        by_arrows.append([NAMES[name], *(format_share(**x) for length in lengths for x in split[length].values())])
    dialogues = "\n".join(["```", *results["dialogues"], "```"])
    return f"{runs.format_table(rows)}\n\n{runs.format_table(by_arrows)}\n\n{dialogues}"


def draw_curves(results: dict[str, Any]) -> None:
    """Accuracy of first and of second answers by generated tokens, in OUT/curves.png and .svg."""
    colors, panels = color_models(results["curves"]), {}
    for metric, title in ("accuracy_at_1", "Accuracy of first answers"), ("accuracy_at_2", "... of second answers"):
        panels[title] = [
            Curve(NAMES[name], curves[metric], color=colors[name], steps=results["places"])
            for name, curves in results["curves"].items()
            if metric in curves
        ]
    draw(panels, Path(OUT), "curves", "generated tokens")


def main() -> None:
    draw_curves(runs.main(sys.modules[__name__]))


if __name__ == "__main__":
    main()
