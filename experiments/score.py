"""SCoRe in small (arXiv 2409.12917): does a model mend its answer when nobody says whether it is right?

    python -m data.score                                    # `make score`: minutes on two cores
    python -m data.score SEEDS=1,2,3 OUT=runs/score-seeds   # t-intervals over the seeds

For each seed, in the toy world: SCoRe (stage I, then stage II from stage I's policy), plain multi-turn RL and
single-turn RL, each on the same budget of generated tokens; then two greedy attempts at each held-out problem, the
second asked for in SCoRe's words whatever the first one was. A second call goes on where the first one was stopped.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rollout
from data import demo, toy
from data.demo import Training, markdown, t_interval
from data.report import OKABE_ITO, Curve, draw
from evaluate import to_json, write_atomically

SEEDS: str = "0"  # comma-separated; each has its own questions, its own held-out ones, and its own training
OUT: str = "runs/score"  # folder of the results
TOKEN_BUDGET: int = 400_000  # generated tokens of each method, SCoRe's two stages together
STAGE_1: float = 0.5  # share of them in stage I (not in the paper)
BETA_1: float = 0.01  # weight of the KL to the warm start, everywhere (paper 0.01)
BETA_2: float = 0.1  # the same on stage I's first attempts, which it is to hold in place (paper 0.1; 0.25 for code)
TRAINING: str = ""  # more arguments for ppo.py in all runs, spaces between, such as "ACTOR_LR=3e-4 SCORE_ALPHA=1"

MODELS = {  # run -> its name
    "score_stage2": "SCoRe",
    "multi_turn": "plain multi-turn RL",
    "single_turn": "single-turn RL",
    "score_stage1": "SCoRe's stage I",
    "warm_start": "warm start",
}
COLUMNS = {  # of the table -> a metric of evaluate.py, and after which attempt (from 0)
    "Acc@t1": ("accuracy", 0),
    "Acc@t2": ("accuracy", 1),
    "Δ(t1,t2)": ("gain", 1),
    "i→c": ("i_to_c", 1),
    "c→i": ("c_to_i", 1),
    "changed": ("changed", 1),
}
PAIRS = (("score_stage2", "multi_turn"), ("score_stage2", "single_turn"), ("multi_turn", "single_turn"))
LEGEND = (
    "Percent of the held-out questions, two greedy attempts at each, no verdict in between. Acc@t1, Acc@t2: right at "
    "the first, the second attempt; Δ(t1,t2): the second less the first; i→c: wrong, then right; c→i: right, then "
    "wrong; changed: another answer at the second attempt."
)


# One seed ------------------------------------------------------------------------------------------------------------
def trainings(seed: int, world: Path, folder: Path) -> list[Training]:
    """The runs in an order in which two side by side end together: half a budget and a whole one on each side."""
    stage_1 = round(STAGE_1 * TOKEN_BUDGET)
    arguments = {
        "score_stage1": ["PRESET=toy,score_stage1", f"KL_COEF={BETA_2},{BETA_1}", f"TOKEN_BUDGET={stage_1}"],
        # Half as many attempts a dialogue: twice as many dialogues make as many tokens per update.
        "single_turn": ["PRESET=toy,multi_turn,single_turn", "MIN_ATTEMPTS=1", "DIALOGUES=256", "MINI_BATCH=128"],
        "multi_turn": ["PRESET=toy,multi_turn"],
        "score_stage2": [
            "PRESET=toy,score_stage2",
            f"MODEL={folder}/score_stage1/policy",
            f"REFERENCE={world}/warm_start",
            f"TOKEN_BUDGET={TOKEN_BUDGET - stage_1}",
        ],
    }
    shared = [f"MODEL={world}/warm_start", f"KL_COEF={BETA_1}", f"TOKEN_BUDGET={TOKEN_BUDGET}", "DEV_PROBLEMS=0"]
    shared += [f"TRAIN_DATA={world}/train.jsonl", f"SEED={seed}"]
    after = {"score_stage2": folder / "score_stage1"}
    return [
        Training(f"seed {seed}, {run}", folder / run, [*shared, *own, *TRAINING.split()], after.get(run))
        for run, own in arguments.items()
    ]


def run_seed(seed: int) -> dict[str, Any]:
    """World, training and evaluation of one seed; what is done already is not done again."""
    folder = Path(OUT) / f"seed-{seed}"
    world = demo.make_world(seed, folder)
    demo.train(trainings(seed, world, folder))
    models = [world / "warm_start" if name == "warm_start" else folder / name / "policy" for name in MODELS]
    config = json.loads((folder / "multi_turn" / "config.json").read_text(encoding="utf-8"))
    names = ("PROMPT", "FEEDBACK", "MAX_ATTEMPTS", "MAX_ATTEMPT_TOKENS")  # the same in training and in evaluation
    how = [f"{name}={config[f'rollout.{name}']}" for name in names]
    results = demo.evaluate_all(models, world, folder / "evaluation", [*how, "RESAMPLES=0", f"SEED={seed}"])
    questions = [problem["question"] for problem in rollout.load_problems(world / "test.jsonl")]
    return {
        "n": len(questions),
        "ideal": toy.ideal_accuracy(questions, 1)[0],
        "models": {name: columns(results["models"][name]["test"]) for name in MODELS},
        "differences": {f"{a} - {b}": difference(results["comparisons"], a, b) for a, b in PAIRS},
    }


def columns(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{column: {"value", "low", "high"}} from what evaluate.py says of a model."""
    return {
        name: {bound: result["metrics"][metric][bound][k] for bound in ("value", "low", "high")}
        for name, (metric, k) in COLUMNS.items()
    }


def difference(comparisons: Sequence[dict[str, Any]], a: str, b: str) -> dict[str, dict[str, float]]:
    """a less b at both attempts, from evaluate.py's comparisons, each of which is its second model less its first."""
    (found,) = (c for c in comparisons if set(c["models"]) == {a, b} and c["benchmark"] == "test")
    bounds = [found["difference"], found["low"], found["high"]]
    if found["models"] == [a, b]:  # b less a: the other way round
        bounds = [[-x for x in bounds[i]] for i in (0, 2, 1)]
    return {
        name: dict(zip(("value", "low", "high"), (x[k] for x in bounds), strict=True))
        for k, name in enumerate(("Acc@t1", "Acc@t2"))
    }


def over_seeds(results: Sequence[Any]) -> Any:
    """The per-seed results as one of the same form: means with t-intervals over the seeds; n is a sum.

    >>> over_seeds([{"n": 10, "x": {"value": v, "low": 0, "high": 1}} for v in (0.4, 0.5)])
    {'n': 20, 'x': {'value': 0.45, 'low': -0.1853, 'high': 1.0853}}
    """
    first = results[0]
    if len(results) == 1:
        return first
    if not isinstance(first, dict):
        return sum(results) if isinstance(first, int) else sum(results) / len(results)
    if "value" in first:
        interval = t_interval([r["value"] for r in results])
        return dict(zip(("value", "low", "high"), (round(x, 6) for x in interval), strict=True))
    return {key: over_seeds([r[key] for r in results]) for key in first}


# Report --------------------------------------------------------------------------------------------------------------
def table(results: dict[str, Any]) -> str:
    """Markdown, in percent, each with the larger half of its interval."""

    def cell(x: dict[str, float], sign: str) -> str:
        return f"{100 * x['value']:{sign}.1f} ±{100 * max(x['high'] - x['value'], x['value'] - x['low']):.1f}"

    rows = [["model", *COLUMNS]]
    for name, label in MODELS.items():
        rows.append([label, *(cell(x, "+" if c == "Δ(t1,t2)" else "") for c, x in results["models"][name].items())])
    return markdown(rows)


def meaning(results: dict[str, Any]) -> str:
    """What the measured numbers say, and what they do not."""
    models, said = results["models"], []
    for name in ("score_stage2", "multi_turn"):
        x = models[name]
        gain, changed = x["Δ(t1,t2)"], x["changed"]["value"]
        what = "better than" if gain["low"] > 0 else "worse than" if gain["high"] < 0 else "not to be told apart from"
        said.append(
            f"After {MODELS[name]} second answers are {what} first ones ({100 * gain['value']:+.1f} points; "
            f"{100 * x['i→c']['value']:.1f} mended, {100 * x['c→i']['value']:.1f} spoilt, {changed:.0%} changed)."
        )
    for pair, by_attempt in results["differences"].items():
        a, b = (MODELS[name] for name in pair.split(" - "))
        last = by_attempt["Acc@t2"]
        what = "above" if last["low"] > 0 else "below" if last["high"] < 0 else "within noise of"
        bounds = f"{100 * last['value']:+.1f} points, {100 * last['low']:+.1f} to {100 * last['high']:+.1f}"
        said.append(f"At the second attempt {a} is {what} {b} ({bounds}).")
    return (
        " ".join(said)
        + f" The best possible reader is right in {results['ideal']:.0%} of the cases at either attempt: nothing is "
        "said in between that it did not know. All that a second attempt can do is to read the question once more. And "
        f"this is one kind of question and a model of {toy.LAYERS} layers: it shows what the methods do to such a "
        "model, and is no evidence about language models on mathematics."
    )


def panel(results: dict[str, Any]) -> list[Curve]:
    """Accuracy at the first and the second attempt, and the ceiling."""
    lines = []
    for (name, label), color in zip(MODELS.items(), OKABE_ITO, strict=False):
        points = [results["models"][name][column] for column in ("Acc@t1", "Acc@t2")]
        lines.append(Curve(label, *([x[bound] for x in points] for bound in ("value", "low", "high")), color))
    return [*lines, Curve("ideal reader", [results["ideal"]] * 2, color="#333333", line="--")]


def main() -> None:
    rollout.override_constants(sys.argv[1:], {"score": sys.modules[__name__], "demo": demo})
    seeds, out = demo.parse_seeds(SEEDS), Path(OUT)
    with demo.stopwatch(out, complete=(out / "results.json").is_file()):
        per_seed = {str(seed): run_seed(seed) for seed in seeds}
    minutes = float((out / "seconds").read_text()) / 60
    interval = f"t over {len(seeds)} seeds" if len(seeds) > 1 else "Wilson or bootstrap over problems"
    results = over_seeds(list(per_seed.values())) | {"seeds": per_seed, "interval": f"95 %, {interval}"}
    results |= {"minutes": round(minutes, 1), "cores": os.cpu_count(), "meaning": meaning(results)}
    title = f"Two attempts, no verdict (n = {results['n']}" + (f", {len(seeds)} seeds)" if len(seeds) > 1 else ")")
    draw({title: panel(results)}, out)
    write_atomically(out / "results.json", to_json(results))
    write_atomically(out / "table.md", f"{table(results)}\n\n{LEGEND} Intervals: {results['interval']}.\n")
    print("\n" + table(results), f"\n{LEGEND}\nIntervals: {results['interval']}.\n", results["meaning"], sep="\n")
    print(f"\n{out}/accuracy.png  {out}/results.json  ({minutes:.1f} minutes on {os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
