"""experiments/: trainings side by side, the probe, and what demo.py, score.py and ablations.py show."""

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import ppo
import rollout
from experiments import ablations, arrows, demo, median, runs, score, warm
from plumbing.constants import parse_changes, snapshot
from plumbing.files import read_jsonl
from tests.conftest import run_python

import pytest


def read_table(markdown: str) -> dict[str, list[str]]:
    """First cell of each row of the first Markdown table -> the others."""
    first = markdown[markdown.index("| --- ") :].split("\n\n")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in first.splitlines()]
    return {row[0]: row[1:] for row in rows[1:]}


def constants_of(arguments: list[str]) -> dict[str, object]:
    """Those that ppo.py runs with."""
    changes = parse_changes(arguments, ppo.MODULES, ppo.PRESETS)
    return snapshot(ppo.MODULES) | {name: change.value for name, change in changes.items()}


# Trainings side by side -----------------------------------------------------------------------------------------------
STUB = """
import pathlib, sys, threading
given = dict(a.split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path("runs") / given["RUN"]
folder.mkdir(parents=True, exist_ok=True)
row = '{"step": 1, "generated_tokens": 120, "token_budget": 100, "reward": 0.5, "accuracy": 0.5}'
(folder / "metrics.jsonl").write_text(row + '\\n{"half of a li')
exec(given["MODEL"])
(folder / "policy").mkdir(exist_ok=True)
"""


def make_training(name: str, does: str = "", after: str = "") -> runs.Training:
    """Its ppo.py is STUB."""
    folder = Path("runs/demo")
    return runs.Training(name, folder / name, 0, Path("w"), [f"MODEL={does}"], folder / after if after else None)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ppo.py").write_text(STUB)


def test_trainings_run_side_by_side_and_in_order(stub, capsys):
    looks = "assert pathlib.Path('runs/demo/first/policy').is_dir()"
    trainings = [make_training("first"), make_training("last", looks, "first"), make_training("two")]
    runs.run_trainings(trainings)
    assert all((training.folder / "policy").is_dir() for training in trainings)
    assert capsys.readouterr().err.count("100%") >= 3
    with pytest.raises(SystemExit, match=r"with other constants\n.*first was not finished"):
        runs.run_trainings([make_training("first", "sys.exit('finished, with other constants')")])


def test_a_training_that_fails_ends_the_others(stub):
    slow, broken = "threading.Event().wait(600)", "sys.exit('this arm is broken')"
    trainings = [make_training("first", slow), make_training("second", broken), make_training("third")]
    start = time.monotonic()
    with pytest.raises(SystemExit, match=r"this arm is broken\n.*second was not finished.*second\.log"):
        runs.run_trainings(trainings)
    assert time.monotonic() - start < 60  # the other one was ended, not waited for
    assert not Path("runs/demo/first/policy").exists() and not Path("runs/demo/third").exists()
    with pytest.raises(SystemExit, match="fourth was not finished"):  # it ended without an error, but has no policy
        runs.run_trainings([make_training("fourth", "sys.exit()")])


# demo.py --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attempts_left", [1, None])
def test_a_forced_answer_reads_like_one_that_was_sampled(change, attempts_left):
    """As the warm start's authors wrote it, too: with verdicts, and asked to check (None). But none is an action."""
    if attempts_left is None:
        change(rollout, FEEDBACK="intrinsic", PROMPT="single_turn")
    chat = rollout.make_chat(median.make_tokenizer())
    dialogue = demo.force_first_answer(chat, {"id": "p", "question": "?", "answer": "1"}, "13")
    prompt = warm.prompt_text("?", 2 if attempts_left else None)
    assert chat.decode(dialogue.ids) == prompt + median.response_text(13) + warm.feedback_text(attempts_left)
    assert dialogue.attempts[0].answer == "13" and sum(dialogue.mask) == 0


def test_a_probe_counts_repeats(change):
    """With a model that repeats its own usual second answer, which it gave to all but two problems, and no other."""
    others = []

    def play(engine, chat, dialogues, *_):
        for dialogue in dialogues:
            first = dialogue.attempts[0].answer
            others.extend([(first, dialogue.problem)] if first != "24" else [])
            dialogue.attempts.append(rollout.Attempt(0, 0, "24" if first == "24" else "23", "wrong", "stop"))

    change(rollout, play=play)
    change(demo, Engine=lambda *_: SimpleNamespace(tokenizer=median.make_tokenizer(), shutdown=lambda: None))
    problems = [p for p in median.make_problems(50, 0, held_out=True) if " 23" not in p["question"]]
    records = [{"id": p["id"], "K": 2, "attempts": [{"answer": "1"}, {"answer": "24"}]} for p in problems]
    records[0]["attempts"] = [{"answer": problems[0]["answer"]}]
    records[1]["attempts"][1] = {"answer": None}
    result = demo.probe_model("model", Path("model"), problems, records)
    assert (result["n"], result["own"]["accuracy"], result["other"]["accuracy"]) == (len(problems) - 2, [1.0], [0.0])
    for other, problem in others:
        assert int(other) in median.read_question(problem["question"])[0] and other not in ("1", problem["answer"])


def test_the_demo_says_and_draws_its_numbers():
    def curve(*accuracy: float) -> dict:
        bounds = {"low": [a - 0.03 for a in accuracy], "high": [a + 0.031 for a in accuracy]}
        return {"n": 1000, "accuracy": list(accuracy)} | bounds

    metrics = {"pass": curve(0.3, 0.4, 0.5, 0.6, 0.7), "repeat": curve(0.05, 0.24)}
    results = {
        "models": {name: {"test": curve(0.4, 0.65, 0.75, 0.76, 0.77) | {"metrics": metrics}} for name in demo.MODELS},
        "ideal": {"accuracy": [0.53, 0.75, 0.83, 0.91, 0.95]},
        "probe": {name: {"n": 500, "own": curve(0.06), "other": curve(0.004)} for name in demo.MODELS},
    }
    cells = read_table(demo.make_table(results))["multi-attempt RL"]
    assert (cells[0], *cells[4:]) == ("40.0 ±3.1", "77.0 ±3.1", "6.0 ±3.1", "0.4 ±3.1", "24.0 ±3.1")
    metrics["pass"]["value"] = metrics["pass"]["accuracy"]
    curves = {c.label: c.accuracy[-1] for c in demo.make_curves(results)}
    assert list(curves.values()) == [0.77, 0.77, 0.77, 0.7, 0.7, 0.95]


# score.py -------------------------------------------------------------------------------------------------------------
def test_score_trains_what_the_paper_says_on_one_budget():
    trainings = score.list_trainings(3, Path("world"), Path("runs/s"))
    config = {training.folder.name: constants_of(training.arguments) for training in trainings}
    rewards = {"score_stage1": "score_stage1", "score_stage2": "score_stage2"}
    rewards |= dict.fromkeys(("multi_turn", "single_turn"), "per_attempt")
    assert {run: c["rollout.REWARD"] for run, c in config.items()} == rewards
    assert config["score_stage1"]["ppo.KL_COEF"] == (0.1, 0.01)
    for run, c in config.items():
        assert run == "score_stage1" or c["ppo.KL_COEF"] == (0.01,)
        assert (c["ppo.ESTIMATOR"], c["ppo.ATTEMPT_GAMMA"], c["rollout.PROMPT"]) == ("rloo", 0.0, "single_turn")
        attempts = 1 if run == "single_turn" else 2
        assert (c["rollout.MIN_ATTEMPTS"], c["rollout.MAX_ATTEMPTS"], c["ppo.SEED"]) == (attempts, attempts, 3)
    stage_2 = config["score_stage2"]
    assert (stage_2["ppo.MODEL"], stage_2["ppo.REFERENCE"]) == ("runs/s/score_stage1/policy", "world/warm_start")
    assert {t.folder.name: t.after for t in trainings if t.after} == {"score_stage2": Path("runs/s/score_stage1")}
    spent = {run: c["ppo.TOKEN_BUDGET"] for run, c in config.items()}
    spent["SCoRe"] = spent.pop("score_stage1") + spent.pop("score_stage2")
    assert set(spent.values()) == {score.TOKEN_BUDGET}


def test_the_ablations_are_score_with_one_change(change):
    """Stage I and II spend SCoRe's budget together; each second stage begins from the policy of its first."""
    change(score, METHODS=tuple(score.RUNS))
    config = {t.folder.name: constants_of(t.arguments) for t in score.list_trainings(3, Path("w"), Path("runs/s"))}

    def differences(run: str, base: str) -> dict[str, object]:
        return {n: v for n, v in config[run].items() if v != config[base][n] and n != "ppo.RUN"}

    assert differences("alpha_0", "score_stage2") == {"rollout.SCORE_ALPHA": 0.0}
    assert differences("alpha_1", "score_stage2") == {"rollout.SCORE_ALPHA": 1.0}
    assert differences("loose_stage1", "score_stage1") == {"ppo.KL_COEF": (0.01,)}
    assert differences("loose_stage2", "score_stage2") == {"ppo.MODEL": "runs/s/loose_stage1/policy"}
    alone = {"ppo.MODEL": "w/warm_start", "ppo.REFERENCE": "", "ppo.TOKEN_BUDGET": score.TOKEN_BUDGET}
    assert differences("stage2_alone", "score_stage2") == alone


def test_score_says_what_was_played(tmp_path):
    """From end to end at a tiny size, without the baselines: every number again, from the dialogues."""
    small = ["WORLD=WARM_STEPS=100 TRAIN_PROBLEMS=300 TEST_PROBLEMS=40", "TOKEN_BUDGET=1500", "EVALUATION_RANKS=1"]
    small += ["TRAINING=DIALOGUES=32 MINI_BATCH=16 EPOCHS=1 SAVE_EVERY=100", "METHODS=score_stage1,score_stage2"]
    printed = run_python("-m", "experiments.score", f"OUT={tmp_path}", *small).stdout
    seed, results = tmp_path / "seed-0", json.loads((tmp_path / "results.json").read_text())
    lengths = {p["id"]: len(arrows.read_question(p["question"])) - 1 for p in read_jsonl(seed / "arrows/test.jsonl")}
    assert (tmp_path / "table.md").read_text() in printed and "SCoRe: " in printed
    for name in ("score_stage2", "score_stage1", "warm_start"):
        records = read_jsonl(seed / f"evaluation/dialogues-{name}.jsonl")
        two = [r["attempts"][1]["status"] == "correct" for r in records if lengths[r["id"]] == 2]
        assert results["by_arrows"][name]["2"]["Acc@t2"]["value"] == pytest.approx(sum(two) / len(two))
        right = [[a["status"] == "correct" for a in r["attempts"]] for r in records]
        counts = [
            sum(first for first, _ in right),
            sum(second for _, second in right),
            sum(second - first for first, second in right),
            sum(second and not first for first, second in right),
            sum(first and not second for first, second in right),
            sum(len({a["answer"] for a in r["attempts"]}) == 2 for r in records),  # whole numbers: equal as text
        ]
        assert len(records) == results["n"] == 40
        assert [x["value"] for x in results["models"][name].values()] == pytest.approx([n / 40 for n in counts])
        shown = [float(cell.split(" ±")[0]) for cell in read_table(printed)[score.NAMES[name]] if cell]
        of_score = 100 * results["models"]["score_stage2"]["Acc@t2"]["value"]
        points = [2.5 * counts[1] - of_score] if name != "score_stage2" else []
        assert shown == pytest.approx([*(2.5 * n for n in counts), *points], abs=0.051)
    rows = [row for run in ("score_stage1", "score_stage2") for row in read_jsonl(seed / run / "metrics.jsonl")]
    seconds = results["curves"]["score_stage2"]["accuracy_at_2"]
    assert seconds[0] == rows[0]["accuracy_at_2"] and len(seconds) == score.PLACES
    assert max(seconds) <= max(row["accuracy_at_2"] for row in rows)


# ablations.py ---------------------------------------------------------------------------------------------------------
def test_ablations_show_what_was_measured(tmp_path, change):
    """Of trainings and evaluations that are not made: what is measured is drawn."""
    trained, measured, rng = {}, [], random.Random(0)

    def evaluate(policies: list[Path], *_: object) -> dict:
        models = {}
        for path in policies:
            metrics = {m: {"value": [rng.random() for _ in range(ablations.MOST)]} for m in ("accuracy", "repeat")}
            models[path.parent.name] = {"test": {"metrics": metrics}}
        measured.append(models)
        return {"models": models}

    change(ablations, OUT=str(tmp_path), ONLY="rloo", SEEDS=(1, 2))
    change(runs, make_world=lambda *_: tmp_path)
    change(runs, run_trainings=lambda its: trained.update({t.folder.name: t for t in its}), evaluate_models=evaluate)
    results = runs.run_seeds(ablations)
    base, rloo = (constants_of(trained[row].arguments) for row in ("base", "rloo"))
    different = {name for name in base if base[name] != rloo[name]}
    assert different == {"ppo.ESTIMATOR", "rollout.SAMPLES_PER_PROMPT", "ppo.RUN"} and base["ppo.SEED"] == 2
    shown = read_table(ablations.make_table(results))["rloo"]
    columns = [("at 1", "accuracy", 1), ("at 5", "accuracy", 5), ("repeats", "repeat", 5)]
    for place, (column, metric, k) in enumerate(columns):
        a, b = ([m[row]["test"]["metrics"][metric]["value"][k - 1] for m in measured] for row in ("rloo", "base"))
        first, second = (x - y for x, y in zip(a, b, strict=True))
        mean, half = (first + second) / 2, 12.706 * abs(first - second) / 2  # t(1) times s / sqrt(2), by hand
        x = results["differences"]["rloo"][column]
        assert [x["value"], x["low"], x["high"]] == pytest.approx([mean, mean - half, mean + half], abs=2e-6)
        assert float(shown[2 * place]) == pytest.approx(50 * sum(a), abs=0.051)
        numbers = [float(number) for number in shown[2 * place + 1].split(" ±")]
        assert numbers == pytest.approx([100 * mean, 100 * half], abs=0.051)


def test_noise_is_called_noise():
    """An interval that contains zero or touches it is noise; one beyond it, on either side, is not."""
    bounds = {"base": (0, 0), "LAMBDA=1": (-0.2, -0.1), "rloo": (-0.3, 0.3), "grpo": (0, 0.1), "WHITEN=0": (0.1, 1)}
    differences = {
        row: {column: {"value": (low + high) / 2, "low": low, "high": high} for column in ablations.COLUMNS}
        for row, (low, high) in bounds.items()
    }
    results = {"values": {row: dict.fromkeys(ablations.COLUMNS, 0.5) for row in bounds}, "differences": differences}
    words = read_table(ablations.make_table(results | {"seeds": {"1": {}, "2": {}}}))
    every, noise = ", ".join(ablations.COLUMNS), "within noise"
    assert [row[-1] for row in words.values()] == ["", every, noise, noise, every]
    differences["rloo"] = {column: {"value": 0.1, "low": None, "high": None} for column in ablations.COLUMNS}
    row = read_table(ablations.make_table(results | {"seeds": {"1": {}}}))["rloo"]
    assert row[-1] == "one seed: unknown" and not any("±" in cell for cell in row)


def test_rows_are_known_and_each_is_another_experiment(change):
    made = {json.dumps(constants_of(["PRESET=toy", *arguments])) for arguments in ablations.ABLATIONS.values()}
    assert len(made) == len(ablations.ABLATIONS)
    change(ablations, ONLY="grpo,LAMBDA=1")
    assert ablations.choose_rows() == ["base", "LAMBDA=1", "grpo"]
    change(ablations, ONLY="LAMBDA=7")
    with pytest.raises(SystemExit, match="no row LAMBDA=7; there are base, MAX_ATTEMPTS=1"):
        ablations.choose_rows()
