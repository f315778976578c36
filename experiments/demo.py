"""The main figure of arXiv 2503.04808 in small: multi-attempt against single-turn RL, in a toy world.

    python -m experiments.demo                                  # `make demo`: minutes on two cores
    python -m experiments.demo SEEDS=4,5,6 OUT=runs/reproduce   # `make reproduce`: also renews the table in docs

For each seed: the toy world; PPO with several attempts and with one, side by side, each with the same budget of
generated tokens; an evaluation on held-out problems; and a probe of whether a retry depends on what has failed.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import rollout
from data.problems import load_problems
from evaluate import wilson
from experiments import median, runs
from experiments.runs import Training, format_share
from experiments.warm import LAYERS
from plumbing.chat import Chat
from plumbing.engine import Engine
from plumbing.files import read_jsonl, to_json, write_atomically
from plumbing.report import OKABE_ITO, Curve, draw

SEEDS: tuple[int, ...] = (0,)  # each has its own questions, its own held-out ones, and its own training
OUT: str = "runs/demo"  # folder of the results

ARMS = {  # run -> its arguments for ppo.py
    "multi_attempt": ["PRESET=toy"],
    # A dialogue of one attempt has about half the tokens. With twice as many dialogues an update sees as many tokens in
    # both arms, and both make the same number of updates. No attempt follows that would need a varied first one.
    "single_turn": ["PRESET=toy,single_turn", "DIALOGUES=256", "MINI_BATCH=128", "KL_COEF=0.05"],
}
MODELS = {"multi_attempt": "multi-attempt RL", "single_turn": "single-turn RL", "warm_start": "warm start"}
COLORS = dict(zip(MODELS, (OKABE_ITO[1], OKABE_ITO[0], OKABE_ITO[2]), strict=True))
RESAMPLED = ("single_turn", "warm_start")  # the models that are also shown without feedback, by pass@k
PAGES = ("docs/results.md", "README.md")  # the first one that has the two markers receives the table of several seeds
MARKERS = ("<!-- reproduce:begin -->", "<!-- reproduce:end -->")
FIGURES = Path("docs/figures")
LEGEND = (
    "Percent of the held-out questions that are solved within so many attempts (greedy; each number is a run of its "
    "own). Resampled: pass@k of independent samples with one attempt each. Own again: told that its usual second "
    "answer has failed, the model still gives it; other again: the same with another wrong number. Repeats: retries, "
    "five attempts being granted, that give an answer which was given before in the same dialogue."
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
def run_seed(seed: int) -> dict[str, Any]:
    """World, trainings, evaluation and probe of one seed."""
    folder = Path(OUT) / f"seed-{seed}"
    world = runs.make_toy(seed, folder)
    source = [f"SEED={seed}", f"MODEL={world}/warm_start", f"TRAIN_DATA={world}/train.jsonl"]
    runs.run_trainings(
        [Training(f"seed {seed}, {MODELS[arm]}", folder / arm, [*own, *source]) for arm, own in ARMS.items()]
    )
    models = {arm: folder / arm / "policy" for arm in ARMS} | {"warm_start": world / "warm_start"}
    limit = runs.read_config(folder / "multi_attempt")["rollout.MAX_ATTEMPT_TOKENS"]  # as in training
    arguments = [f"MAX_ATTEMPT_TOKENS={limit}", f"SEED={seed}"]
    evaluation = runs.evaluate_models(models.values(), world, folder / "evaluation", arguments)
    problems = load_problems(world / "test.jsonl")
    rollout.MAX_ATTEMPT_TOKENS = limit
    path = folder / "probe.json"
    probes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if probes.get("weights") != evaluation["weights"]:
        probes = {"weights": evaluation["weights"]}
        for name, model in models.items():
            records = read_jsonl(folder / "evaluation" / f"dialogues-{name}.jsonl")
            probes[name] = probe_model(MODELS[name], model, problems, records)
        write_atomically(path, to_json(probes))
    tests = {name: evaluation["models"][name]["test"] for name in MODELS}
    questions = [problem["question"] for problem in problems]
    return {
        "models": {name: {"test": test} for name, test in tests.items()},
        "control": {name: select_curve(test, "pass") for name, test in tests.items()},
        "repeats": {name: select_curve(test, "repeat") for name, test in tests.items()},
        "ideal": {"accuracy": median.ideal_accuracy(questions, rollout.MAX_ATTEMPTS)},
        "probe": {name: probes[name] for name in MODELS},
    }


def select_curve(test: dict[str, Any], metric: str) -> dict[str, list[float]]:
    """A metric of evaluate.py at the k for which it has a value: pass@k up to its samples, repeats from k = 2."""
    curve = test["metrics"][metric]
    known = [k for k, value in enumerate(curve["value"]) if value is not None]
    names = {"accuracy": "value", "low": "low", "high": "high"}
    return {name: [curve[column][k] for k in known] for name, column in names.items()}


# What is shown --------------------------------------------------------------------------------------------------------
def make_curves(results: dict[str, Any]) -> list[Curve]:
    """The three models, two of them also resampled, and the ideal reader."""
    curves = []
    for name, label in MODELS.items():
        test = results["models"][name]["test"]
        curves.append(Curve(label, test["accuracy"], test["low"], test["high"], COLORS[name]))
    for name in RESAMPLED:
        accuracy = results["control"][name]["accuracy"]
        curves.append(Curve(f"{MODELS[name]}, resampled", accuracy, color=COLORS[name], line=":"))
    return [*curves, Curve("ideal reader", results["ideal"]["accuracy"], color="#333333", line="--")]


def make_table(results: dict[str, Any]) -> str:
    """Markdown: accuracy by allowed attempts, the probe, and repeats, all in percent."""

    def cells(curve: dict[str, Any]) -> list[str]:
        return [format_share(*bounds) for bounds in zip(curve["accuracy"], curve["low"], curve["high"], strict=True)]

    ideal = results["ideal"]["accuracy"]
    rows = [["attempts", *(str(k + 1) for k in range(len(ideal))), "own again", "other again", "repeats"]]
    for name, label in MODELS.items():
        probe, repeats = results["probe"][name], cells(results["repeats"][name])[-1]
        accuracy = cells(results["models"][name]["test"])
        rows.append([label, *accuracy, *cells(probe["own"]), *cells(probe["other"]), repeats])
        if name in RESAMPLED:
            rows.append(["... resampled", *cells(results["control"][name]), "", "", ""])
    rows.append(["ideal reader", *(f"{100 * accuracy:.1f}" for accuracy in ideal), "", "", "0.0"])
    return runs.format_table(rows)


def describe_results(results: dict[str, Any]) -> str:
    """What the measured numbers say, and what they do not."""
    multi, single, warm = (results["models"][name]["test"]["accuracy"] for name in MODELS)
    resampled = results["control"]["warm_start"]["accuracy"][-1]

    def points(difference: float) -> str:
        return f"{100 * difference:+.1f} points"

    return (
        f"A second attempt is worth {points(multi[1] - multi[0])} after multi-attempt RL (to {multi[1]:.2f}, and "
        f"{multi[-1]:.2f} at {len(multi)} attempts), {points(single[1] - single[0])} after single-turn RL on as many "
        f"generated tokens, and {points(warm[1] - warm[0])} for the warm start, from which both began.\n\n"
        f"What this does not show: the warm start imitates authors who repeat {median.STAND_BY_SHARE:.0%} of the "
        "answers that were called incorrect, and who learn nothing from the others. So the flat curves are partly "
        "built in, and so is the skill of finding the answer that has failed; RL turns that skill from repeating to "
        "avoiding. The arms differ in more than N, because each has settings that suit it: for single-turn RL "
        f"{', '.join(ARMS['single_turn'][1:])} in place of what preset toy says. At one attempt "
        f"multi-attempt RL is {points(multi[0] - single[0])} from single-turn RL and {points(multi[0] - warm[0])} "
        f"from the warm start. {len(multi)} independent samples of the warm start, without any feedback, reach "
        f"{resampled:.2f}; multi-attempt RL is {points(multi[-1] - resampled)} from there. All this is one kind of "
        f"question and a model of {LAYERS} layers, with settings chosen on such questions: a demonstration of "
        "the mechanism, no evidence about language models on mathematics."
    )


def renew_page(text: str) -> None:
    """Put the table between the markers of the first of PAGES that has them, and the figure into FIGURES."""
    begin, end = MARKERS
    for page in filter(Path.is_file, map(Path, PAGES)):
        before, _, rest = page.read_text(encoding="utf-8").partition(begin)
        _, found, after = rest.partition(end)
        if found:
            write_atomically(page, f"{before}{begin}\n\n{text}\n{end}{after}")
            break
    FIGURES.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        shutil.copy(Path(OUT) / f"accuracy.{kind}", FIGURES / f"toy.{kind}")


def main() -> None:
    runs.start({"demo": sys.modules[__name__], "runs": runs})
    out, several = Path(OUT), len(SEEDS) > 1
    results = runs.run_seeds(SEEDS, run_seed, out)
    if not several:
        results["seeds"] = list(SEEDS)  # its results are the mean results
    results["meaning"] = describe_results(results)
    title = f"Median of nine numbers, two unreadable (n = {results['models']['warm_start']['test']['n']})"
    draw({f"{title}, {len(SEEDS)} seeds" if several else title: make_curves(results)}, out)
    words = f"{LEGEND} Intervals: {results['interval']}.\n\n{results['meaning']}"
    text = runs.write_report(out, results, make_table(results), words)
    if several:
        renew_page(text)


if __name__ == "__main__":
    main()
