"""The main figure of arXiv 2503.04808 in small: multi-attempt against single-turn RL, in a toy world.

    python -m experiments.demo                                  # `make demo`: minutes on two cores
    python -m experiments.demo SEEDS=4,5,6 OUT=runs/reproduce   # `make reproduce`: also renews the table in docs

For each seed: the toy world; PPO with several attempts and with one, side by side, each with the same budget of
generated tokens; an evaluation on held-out problems; and a probe of whether a retry depends on what has failed.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import rollout
from data.problems import load_problems
from evaluate import wilson
from experiments import median, runs
from experiments.runs import Training, format_curve, format_share
from plumbing.chat import Chat
from plumbing.engine import Engine
from plumbing.files import read_jsonl, write_atomically
from plumbing.report import Curve, color_models, draw

SEEDS: tuple[int, ...] = (0,)  # each has its own questions, its own held-out ones, and its own training
OUT: str = "runs/demo"  # folder of the results

ARMS = {  # run -> its arguments for ppo.py
    "multi_attempt": ["PRESET=toy"],
    # A dialogue of one attempt has about half the tokens. With twice as many dialogues an update sees as many tokens in
    # both arms, and both make the same number of updates. No attempt follows that would need a varied first one.
    "single_turn": ["PRESET=toy,single_turn", "DIALOGUES=256", "MINI_BATCH=128", "KL_COEF=0.05"],
}
MODELS = {"multi_attempt": "multi-attempt RL", "single_turn": "single-turn RL", "warm_start": "warm start"}
RESAMPLED = ("single_turn", "warm_start")  # the models that are also shown without feedback, by pass@k
PAGE = Path("docs/results.md")  # receives the table of several seeds, between the two markers
MARKERS = ("<!-- reproduce:begin -->", "<!-- reproduce:end -->")
FIGURES = Path("docs/figures")
LEGEND = (
    "Percent of the held-out questions that are solved within so many attempts, greedy; resampled: pass@k of samples "
    "with one attempt. Own again: told that its usual second answer has failed, the model still gives it; other again: "
    "the same with another wrong number. Repeats: retries, five attempts being granted, that give an answer which was "
    "given before in the same dialogue. What this shows, and what it does not: docs/results.md."
)


# The probe: does the second answer depend on what has just failed? ----------------------------------------------------
def choose_probes(problems: list[dict], records: list[dict]) -> list[tuple[dict, str, str]]:
    """(problem, the model's usual second answer, another wrong number that is shown), where the first answer was wrong.

    records: of evaluate.py. The usual second answer is the one that the model gave when it was granted two attempts.
    """
    by_problem = {record["id"]: record for record in records if record["K"] == 2}
    probes = []
    for problem in problems:
        answers = [attempt["answer"] for attempt in by_problem[problem["id"]]["attempts"]]
        if len(answers) < 2 or answers[1] is None:
            continue
        shown, _ = median.read_question(problem["question"])
        others = [str(number) for number in shown if str(number) not in (problem["answer"], *answers)]
        probes.append((problem, answers[1], others[rollout.random_number("probe", problem["id"]) % len(others)]))
    return probes


def force_first_answer(chat: Chat, problem: dict[str, Any], answer: str) -> rollout.Dialogue:
    """A dialogue of two attempts; the first is not the model's: it gives this answer and was called wrong."""
    dialogue = rollout.new_dialogue(chat, problem, 2)
    text = median.response_text(answer).removesuffix("<|im_end|>")
    rollout.place_attempt(chat, dialogue, text, answer, "wrong")
    return dialogue


def probe_model(name: str, model: Path, problems: list[dict], records: list[dict]) -> dict[str, Any]:
    """How often the model repeats the first answer that was put into its mouth: {"n", "own", "other"}."""
    probes = choose_probes(problems, records)
    engine = Engine(str(model), rollout.CONTEXT)
    chat = rollout.make_chat(engine.tokenizer)
    dialogues = [force_first_answer(chat, problem, answer) for problem, *answers in probes for answer in answers]
    rollout.play(engine, chat, dialogues, [0] * len(dialogues), 0.0, f"probe, {name}")
    engine.shutdown()
    result: dict[str, Any] = {"n": len(probes)}
    for kind, played in ("own", dialogues[0::2]), ("other", dialogues[1::2]):
        answers = [[attempt.answer for attempt in dialogue.attempts] for dialogue in played]
        repeats = sum(len(given) > 1 and given[1] == given[0] for given in answers)
        low, high = wilson(repeats, len(played)) if played else (0.0, 1.0)
        result[kind] = {"accuracy": [repeats / max(1, len(played))], "low": [low], "high": [high]}
    return result


# One seed -------------------------------------------------------------------------------------------------------------
def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """World, trainings, evaluation and probe of one seed."""
    world = runs.make_world("median", folder / "toy", f"SEED={seed}")
    runs.run_trainings([Training(MODELS[arm], folder / arm, seed, world, own) for arm, own in ARMS.items()])
    models = {arm: folder / arm / "policy" for arm in ARMS} | {"warm_start": world / "warm_start"}
    evaluation = runs.evaluate_models(list(models.values()), world, folder / "evaluation", [f"SEED={seed}"])
    rollout.MAX_ATTEMPT_TOKENS = evaluation["settings"]["MAX_ATTEMPT_TOKENS"]
    problems, probes = load_problems(world / "test.jsonl"), {}
    for name, model in models.items():
        records = read_jsonl(folder / "evaluation" / f"dialogues-{name}.jsonl")
        probes[name] = probe_model(MODELS[name], model, problems, records)
    ideal = runs.read_json(world / "made.json")["ideal_accuracy"]
    return {"models": evaluation["models"], "ideal": {"accuracy": ideal}, "probe": probes}


# What is shown --------------------------------------------------------------------------------------------------------
def make_curves(results: dict[str, Any]) -> list[Curve]:
    """The three models, two of them also resampled, and the ideal reader."""
    curves, colors = [], color_models(MODELS)
    for name, label in MODELS.items():
        test = results["models"][name]["test"]
        curves.append(Curve(label, test["accuracy"], test["low"], test["high"], colors[name]))
    for name in RESAMPLED:
        accuracy = results["models"][name]["test"]["metrics"]["pass"]["value"]
        curves.append(Curve(f"{MODELS[name]}, resampled", accuracy, color=colors[name], line=":"))
    return [*curves, Curve("ideal reader", results["ideal"]["accuracy"], color="#333333", line="--")]


def make_table(results: dict[str, Any]) -> str:
    """Markdown: accuracy by allowed attempts, the probe, and repeats, all in percent."""
    ideal = results["ideal"]["accuracy"]
    rows = [["attempts", *(str(k + 1) for k in range(len(ideal))), "own again", "other again", "repeats"]]
    for name, label in MODELS.items():
        test, probe = results["models"][name]["test"], results["probe"][name]
        repeats = format_curve(test["metrics"]["repeat"])[-1]
        rows.append([label, *format_curve(test), *format_curve(probe["own"]), *format_curve(probe["other"]), repeats])
        if name in RESAMPLED:
            rows.append(["... resampled", *format_curve(test["metrics"]["pass"]), "", "", ""])
    rows.append(["ideal reader", *map(format_share, ideal), "", "", "0.0"])
    return runs.format_table(rows)


def renew_page(text: str) -> None:
    """Put the table between the markers of PAGE, and the figure into FIGURES."""
    begin, end = MARKERS
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    write_atomically(PAGE, f"{before}{begin}\n\n{text}\n{end}{after}")
    for kind in ("png", "svg"):
        shutil.copy(Path(OUT) / f"accuracy.{kind}", FIGURES / f"toy.{kind}")


def main() -> None:
    results = runs.main(sys.modules[__name__])
    questions = results["models"]["warm_start"]["test"]["n"]
    draw({f"Median of nine numbers, two unreadable (n = {questions})": make_curves(results)}, Path(OUT))
    if len(SEEDS) > 1:
        renew_page((Path(OUT) / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
