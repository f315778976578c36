"""experiments/runs.py and demo.py: trainings side by side, the probe, what is shown."""

import time
from pathlib import Path
from types import SimpleNamespace

import rollout
from experiments import demo, median, runs, warm

import pytest

# Trainings side by side -----------------------------------------------------------------------------------------------
STUB = """
import json, pathlib, sys, threading
given = dict(a.split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path("runs") / given["RUN"]
if (folder / "policy").is_dir():
    sys.exit("finished, with other constants" if given["MODEL"] == "other" else 0)
folder.mkdir(parents=True)
if given["MODEL"] == "broken":
    sys.exit("this arm is broken")
if given["MODEL"] == "after":
    assert (folder.parent / "first" / "policy").is_dir()
row = {"step": 1, "generated_tokens": 120, "token_budget": 100, "reward": 0.5, "accuracy": 0.5}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n" + '{"half of a li')
if given["MODEL"] == "slow":
    threading.Event().wait(600)
if given["MODEL"] != "stopped":
    (folder / "policy").mkdir()
"""


def make_training(name: str, model: str, after: str = "") -> runs.Training:
    """Its ppo.py is STUB; the model says what becomes of it."""
    folder = Path("runs/demo")
    return runs.Training(name, folder / name, [f"MODEL={model}"], folder / after if after else None)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ppo.py").write_text(STUB)


def test_trainings_run_side_by_side_and_in_order(stub, capsys):
    trainings = [make_training("first", "fine"), make_training("last", "after", "first"), make_training("two", "fine")]
    runs.run_trainings(trainings)
    assert all((training.folder / "policy").is_dir() for training in trainings)
    assert capsys.readouterr().err.count("100%") >= 3
    runs.run_trainings([make_training("first", "fine")])  # finished: ppo.py ends at once
    with pytest.raises(SystemExit, match=r"with other constants\n.*first was not finished"):
        runs.run_trainings([make_training("first", "other")])


def test_a_training_that_fails_ends_the_others(stub):
    trainings = [make_training("first", "slow"), make_training("second", "broken"), make_training("third", "fine")]
    start = time.monotonic()
    with pytest.raises(SystemExit, match=r"this arm is broken\n.*second was not finished.*second\.log"):
        runs.run_trainings(trainings)
    assert time.monotonic() - start < 60  # the other one was ended, not waited for
    assert not Path("runs/demo/first/policy").exists() and not Path("runs/demo/third").exists()
    with pytest.raises(SystemExit, match="fourth was not finished"):  # it ended without an error, but has no policy
        runs.run_trainings([make_training("fourth", "stopped")])


# The probe ------------------------------------------------------------------------------------------------------------
def test_a_forced_answer_reads_like_one_that_was_sampled():
    """The ids are those that the model would have sampled and been answered, but none is an action."""
    chat = rollout.make_chat(median.make_tokenizer())
    problem = median.make_problems(1, 0, held_out=True)[0]
    dialogue = demo.force_first_answer(chat, problem, "13")
    prompt, answer = warm.prompt_text(problem["question"], 2), median.response_text(13)
    assert chat.decode(dialogue.ids) == prompt + answer + warm.feedback_text(1)
    assert dialogue.mask == [0] * len(dialogue.ids)
    first = dialogue.attempts[0]
    assert chat.decode(dialogue.ids[first.start : first.end]) == answer
    assert (first.answer, first.status, dialogue.attempts_left) == ("13", "wrong", 1)


def test_probes_take_wrong_shown_numbers():
    problems = median.make_problems(50, 0, held_out=True)

    def record(problem: dict, K: int, *answers: str | None) -> dict:
        return {"id": problem["id"], "K": K, "attempts": [{"answer": answer} for answer in answers]}

    played = [record(problem, K, "1", "24") for problem in problems[:48] for K in (1, 2)]
    played += [record(problems[48], 2, problems[48]["answer"]), record(problems[49], 2, "1", None)]
    probes = demo.choose_probes(problems, played)
    assert [problem["id"] for problem, _, _ in probes] == [problem["id"] for problem in problems[:48]]
    for problem, own, other in probes:
        assert own == "24" and other not in ("1", "24", problem["answer"])
        assert int(other) in median.read_question(problem["question"])[0]
    assert probes == demo.choose_probes(problems, played)


def test_a_probe_counts_repeats(change):
    """With a model that repeats its own usual second answer, and no other."""

    def play(engine, chat, dialogues, *_):
        for dialogue in dialogues:
            answer = "24" if dialogue.attempts[0].answer == "24" else "23"
            dialogue.attempts.append(rollout.Attempt(0, 0, answer, "wrong", "stop"))

    change(rollout, play=play)
    engine = SimpleNamespace(tokenizer=median.make_tokenizer(), shutdown=lambda: None)
    change(demo, Engine=lambda *_: engine)
    problems = [p for p in median.make_problems(20, 0, held_out=True) if " 23" not in p["question"]]
    records = [{"id": p["id"], "K": 2, "attempts": [{"answer": "1"}, {"answer": "24"}]} for p in problems]
    result = demo.probe_model("model", Path("model"), problems, records)
    assert (result["n"], result["own"]["accuracy"], result["other"]["accuracy"]) == (len(problems), [1.0], [0.0])


# What is shown --------------------------------------------------------------------------------------------------------
def test_the_demo_says_and_draws_its_numbers():
    def curve(*accuracy: float) -> dict:
        bounds = {"low": [a - 0.03 for a in accuracy], "high": [a + 0.031 for a in accuracy]}
        return {"n": 1000, "accuracy": list(accuracy)} | bounds

    results = {
        "models": {name: {"test": curve(0.4, 0.65, 0.75, 0.76, 0.77)} for name in demo.MODELS},
        "control": {name: curve(0.3, 0.4, 0.5, 0.6, 0.7) for name in demo.MODELS},
        "repeats": {name: curve(0.05, 0.24) for name in demo.MODELS},
        "ideal": {"accuracy": [0.53, 0.75, 0.83, 0.91, 0.95]},
        "probe": {name: {"n": 500, "own": curve(0.06), "other": curve(0.004)} for name in demo.MODELS},
    }
    rows = demo.make_table(results).split("\n")
    cells = [cell.strip() for cell in rows[2].split("|")]
    assert (cells[2], cells[-2]) == ("40.0 ±3.1", "24.0 ±3.1") and len({len(row) for row in rows}) == 1
    text = demo.describe_results(results)
    assert "+25.0 points after multi-attempt RL (to 0.65, and 0.77 at 5 attempts)" in text
    assert "reach 0.70; multi-attempt RL is +7.0 points from there" in text
    curves = {c.label: c.accuracy for c in demo.make_curves(results)}
    assert curves["multi-attempt RL"][-1] == 0.77 and curves["single-turn RL, resampled"][-1] == 0.7
    assert curves["ideal reader"] == results["ideal"]["accuracy"] and len(curves) == 6


def test_the_page_is_renewed_between_its_markers(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    change(demo, OUT="out")
    begin, end = demo.MARKERS
    for name in ("out/accuracy.png", "out/accuracy.svg", "docs/results.md", "README.md"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)
    Path("README.md").write_text(f"# x\n{begin}\nold\n{end}\nrest")
    for text in ("first", r"| \1 new |"):  # docs/results.md has no markers
        demo.renew_page(text)
        assert Path("README.md").read_text() == f"# x\n{begin}\n\n{text}\n{end}\nrest"
    assert Path("docs/results.md").read_text() == "docs/results.md"
    assert Path("docs/figures/toy.svg").read_text() == "out/accuracy.svg"
