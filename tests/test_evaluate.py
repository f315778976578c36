"""evaluate.py and data/demo.py: metrics against hand-made dialogues, the figure, and runs of the real engine."""

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import evaluate
import rollout
from data import demo, toy
from evaluate import Curve

ROOT = Path(__file__).parent.parent


def said(answer: str | None, gold: str = "7", ending: str = "stop", tokens: int = 4) -> dict:
    status = "no_answer" if answer is None else "correct" if answer == gold else "wrong"
    return {"text": f"It is {answer}", "answer": answer, "status": status, "ending": ending, "tokens": tokens}


def spoke(name: str, K: int, *answers: str | None, sample: int | None = None, **how: object) -> dict:
    return {"id": name, "K": K, "sample": sample, "attempts": [said(answer, **how) for answer in answers]}


# Numbers -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(successes, n, low, high):
    assert evaluate.wilson(successes, n) == pytest.approx((low, high), abs=6e-5)
    assert evaluate.wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_pass_at_k_is_the_mean_over_all_draws():
    for n, correct in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1) if correct <= n else ():
            draws = list(itertools.combinations([i < correct for i in range(n)], k))
            assert evaluate.pass_at_k(n, correct, k) == pytest.approx(statistics.fmean(map(any, draws)))


def test_summarise_hand_made_dialogues():
    records = [
        *(spoke("a", 1, "7"), spoke("b", 1, "8"), spoke("c", 1, None, ending="length", tokens=64), spoke("d", 1)),
        *(spoke("a", 2, "9", "7"), spoke("b", 2, "8", "8"), spoke("c", 2, "6", ending="context"), spoke("d", 2)),
        *(spoke("a", 3, "7"), spoke("b", 3, "8", "9", "7"), spoke("c", 3, None, None, "7"), spoke("d", 3)),
        *(spoke(name, 1, answer, sample=i) for name in "abcd" for i, answer in enumerate("78")),
    ]
    random.Random(0).shuffle(records)
    result = evaluate.summarise(records)
    assert result["n"] == 4
    assert result["accuracy"] == [0.25, 0.25, 0.75]
    assert list(zip(result["low"], result["high"], strict=True)) == [evaluate.wilson(s, 4) for s in (1, 1, 3)]
    assert result["repeat"] == [None, 0.5, 0.0]  # of K = 3: b says 8 and 9; c has no answer to repeat
    assert result["tokens"] == [18.0, 5.0, 7.0]
    assert result["truncated"] == [1 / 3, 1 / 5, 0.0]
    assert result["too_long"] == 1  # d
    assert result["out_of_context"] == [1, 2, 1]  # d; with K = 2 also c
    assert result["resampling"]["samples"] == 2
    assert result["resampling"]["accuracy"] == [
        0.5,
        1.0,
    ]  # one of two samples was right everywhere; K = 3 is not covered
    assert result["resampling"]["low"] == result["resampling"]["high"] == [0.5, 1.0]


def test_record_keeps_what_was_said():
    class Letters:
        tokenizer = type("T", (), {"decode": staticmethod(lambda ids, skip_special_tokens: "".join(map(chr, ids)))})

    dialogue = rollout.Dialogue({"benchmark": "b", "id": "x", "question": "?", "answer": "7"}, 3)
    dialogue.extend([1, 2, 3])
    dialogue.extend([ord(c) for c in "it's 7"], [0.0] * 6)
    dialogue.attempts.append(rollout.Attempt(3, 9, "7", "correct", "stop"))
    attempt = {"text": "it's 7", "answer": "7", "status": "correct", "ending": "stop", "tokens": 6}
    expected = {"benchmark": "b", "id": "x", "K": 3, "sample": None, "attempts": [attempt]}
    assert evaluate.record(Letters, dialogue, None) == expected
    assert evaluate.is_solved(expected)


def test_names_and_settings(tmp_path):
    assert list(evaluate.by_name("runs/a/policy,m/b/,c.jsonl", "models")) == ["a", "b", "c"]
    with pytest.raises(SystemExit, match=r"x/a and y/a\.jsonl: two benchmarks named a"):
        evaluate.by_name("x/a,y/a.jsonl", "benchmarks")
    path = tmp_path / "results.json"
    results = evaluate.load_results(path, {"K": 5}, {"a": "1"})
    path.write_text(evaluate.to_json(results | {"weights": {"a": "1"}}))
    assert evaluate.load_results(path, {"K": 5}, {"a": "1", "b": "2"})["weights"] == {"a": "1"}  # b is new: no conflict
    with pytest.raises(SystemExit, match="K: 5 there, 6 now\n  a: 1 there, 3 now"):
        evaluate.load_results(path, {"K": 6}, {"a": "3"})


def test_fingerprint_sees_every_file(tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    prints = {evaluate.fingerprint(tmp_path)}
    (tmp_path / "tokenizer").write_bytes(b"2")
    prints.add(evaluate.fingerprint(tmp_path))
    (tmp_path / "weights").write_bytes(b"3")
    prints |= {evaluate.fingerprint(tmp_path), evaluate.fingerprint(tmp_path)}
    assert len(prints) == 3


# The figure ----------------------------------------------------------------------------------------------------------
def test_figure_shows_the_results(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    first = [spoke("a", 1, "7"), spoke("b", 1, "8"), spoke("a", 2, "7"), spoke("b", 2, "7")]
    second = [spoke("a", 1, "6"), spoke("b", 1, "7"), spoke("a", 2, "6"), spoke("b", 2, "7")]
    said_by = {"first": evaluate.summarise(first), "second": evaluate.summarise(second)}
    models = {name: {"x": result, "y": result} for name, result in said_by.items()}
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    evaluate.draw(evaluate.curves(models), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["accuracy.png", "accuracy.svg"]
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert ">first<" in (tmp_path / "accuracy.svg").read_text()
    axes = drawn[0].axes
    assert [a.get_title() for a in axes] == ["x (n = 2)", "y (n = 2)"]
    for panel in axes:
        shown = {tuple(line.get_ydata()) for line in panel.lines}
        assert shown == {tuple(r["x"]["accuracy"]) for r in models.values()} == {(0.5, 1.0), (0.5, 0.5)}
        assert {text.get_text() for text in panel.texts} == {"first", "second"}
        bands = [band.get_paths()[0].vertices[:, 1] for band in panel.collections]
        assert {round(float(b.max()), 6) for b in bands} == {round(r["x"]["high"][-1], 6) for r in models.values()}


def test_labels_keep_their_distance_and_order():
    draw = random.Random(0)
    for _ in range(200):
        heights = [draw.random() for _ in range(draw.randint(1, 8))]
        placed = evaluate.spread(heights, 0.07)
        assert [placed[i] for i in sorted(range(len(heights)), key=heights.__getitem__)] == sorted(placed)
        assert all(b - a > 0.07 - 1e-9 for a, b in itertools.pairwise(sorted(placed)))


# The real engine -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two random models with the toy's tokenizer, and problems: toy, real mathematics, one longer than the context."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = toy.make_tokenizer()
    for seed, name in enumerate(("one", "two/policy")):
        toy.make_model(tokenizer, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    problems = toy.make_problems(5, 0, held_out=True)
    texts = (
        r"Compute $\sqrt{49}\,$ – “exactly”.",
        r"Let $f(x)=x^2-\frac{1}{2}$ for $x\ge 0$. Find $f(3)$.\n",
        "9" * 600,
    )
    problems += [{"id": f"real/{i}", "question": text, "answer": r"\frac{17}{2}"} for i, text in enumerate(texts)]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems), encoding="utf-8")
    return folder


def evaluation(tiny: Path, out: Path, *arguments: str, ranks: int = 0) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launch, "evaluate.py", f"MODEL={tiny}/one,{tiny}/two/policy", f"OUT={out}"]
    command += [
        f"BENCHMARKS={tiny}/mixed.jsonl",
        "MAX_ATTEMPTS=2",
        "RESAMPLES=3",
        "CONTEXT=512",
        "MAX_ATTEMPT_TOKENS=8",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def evaluated(tiny):
    done = evaluation(tiny, tiny / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_evaluation_end_to_end(tiny, evaluated):
    results = json.loads((tiny / "out" / "results.json").read_text())
    assert list(results["models"]) == ["one", "two"]
    for name in ("one", "two"):
        lines = (tiny / "out" / f"dialogues-{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        records = [json.loads(line) for line in lines]
        assert len(records) == 8 * (2 + 3)
        assert results["models"][name] == {
            "mixed": evaluate.summarise(records)
        }  # everything follows from the dialogues
        assert {r["benchmark"] for r in records} == {"mixed"}
        assert [len(r["attempts"]) for r in records if r["id"] == "real/2"] == [0] * 5
        assert all(
            len(r["attempts"]) == r["K"] for r in records if r["id"] != "real/2"
        )  # a random model is never right
        assert all(0 < a["tokens"] <= 8 for r in records for a in r["attempts"])
    assert results["models"]["one"]["mixed"]["n"] == 8
    assert results["models"]["one"]["mixed"]["too_long"] == 1
    assert "too short for 1 of 8 problems" in evaluated.stdout
    assert sorted(p.suffix for p in (tiny / "out").iterdir()) == [".json", ".jsonl", ".jsonl", ".png", ".svg"]


def test_two_ranks_give_the_same(tiny, evaluated):
    done = evaluation(tiny, tiny / "ranks", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("dialogues-one.jsonl", "dialogues-two.jsonl"):
        assert (tiny / "ranks" / name).read_bytes() == (tiny / "out" / name).read_bytes()
    one, two = (json.loads((tiny / out / "results.json").read_text()) for out in ("out", "ranks"))
    assert one["models"] == two["models"]
    assert one["settings"] == two["settings"]


def test_second_call_skips_and_other_settings_stop(tiny, evaluated):
    before = (tiny / "out" / "results.json").stat().st_mtime_ns
    start = time.monotonic()
    again = evaluation(tiny, tiny / "out")
    assert again.returncode == 0
    assert again.stdout == evaluated.stdout
    assert time.monotonic() - start < 10
    assert (tiny / "out" / "results.json").stat().st_mtime_ns == before
    other = evaluation(tiny, tiny / "out", "MAX_ATTEMPTS=3", "PROMPT=single_turn")
    assert other.returncode == 1
    assert "MAX_ATTEMPTS: 2 there, 3 now" in other.stderr
    assert "PROMPT: multi_attempt there, single_turn now" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("MODEL=no/such", "no/such: no model folder"),
        ("BENCHMARKS=no/such.jsonl", "no/such.jsonl: no such problem file"),
        ("MAX_ATTEMPT=3", "MAX_ATTEMPT: no such constant; the nearest is MAX_ATTEMPTS"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, argument, message):
    done = evaluation(tiny, tmp_path / "out", argument)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# data/demo.py --------------------------------------------------------------------------------------------------------
def test_t_intervals_over_seeds():
    def seed(*accuracy: float) -> dict:
        return {
            "a": {"n": 10, "accuracy": list(accuracy), "low": [0, 0], "high": [1, 1]},
            "ideal": {"accuracy": [0.5, 0.75]},
        }

    merged = demo.over_seeds([seed(0.3, 0.99), seed(0.4, 1.0), seed(0.5, 1.0)])
    assert merged["a"]["n"] == 30
    assert merged["a"]["accuracy"] == pytest.approx([0.4, 0.99667], abs=1e-5)
    half = 4.303 * 0.1 / 3**0.5  # t at 2 degrees of freedom
    assert (merged["a"]["low"][0], merged["a"]["high"][0]) == pytest.approx((0.4 - half, 0.4 + half), abs=6e-4)
    assert merged["a"]["high"][1] == 1.0
    assert merged["ideal"]["accuracy"] == [0.5, 0.75]
    assert demo.over_seeds([seed(0.3, 0.4)]) == seed(0.3, 0.4)


def test_forced_dialogue_equals_a_played_one():
    """What the probe puts there are the very ids that the model would have sampled and been answered, but no action."""
    chat = rollout.Chat(toy.make_tokenizer())
    problem = toy.make_problems(1, 0, held_out=True)[0]
    dialogue = demo.forced(chat, problem, "13")
    assert chat.tokenizer.decode(dialogue.ids) == toy.prompt_text(problem["question"], 2) + toy.failure_text(13, 1)
    assert dialogue.mask == [0] * len(dialogue.ids)
    first = dialogue.attempts[0]
    assert chat.tokenizer.decode(dialogue.ids[first.start : first.end]) == toy.response_text(13)
    assert dialogue.max_attempts - len(dialogue.attempts) == 1


def test_probe_takes_wrong_shown_numbers():
    problems = toy.make_problems(50, 0, held_out=True)
    played = [spoke(p["id"], K, "1", "24") for p in problems[:48] for K in (1, 2)]
    played += [spoke(problems[48]["id"], 2, problems[48]["answer"]), spoke(problems[49]["id"], 2, "1", None)]
    cases = demo.probe_cases(problems, played)
    assert [problem["id"] for problem, _, _ in cases] == [p["id"] for p in problems[:48]]
    for problem, own, other in cases:
        assert own == "24"
        assert other not in ("1", "24", problem["answer"])
        assert int(other) in toy.shown_numbers(problem["question"])[0]
    assert cases == demo.probe_cases(problems, played)


def test_last_row_of_a_file_that_is_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert demo.last_row(path) is None
    path.write_text('{"step": 1}')
    assert demo.last_row(path) is None
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert demo.last_row(path) == {"step": 2}


def test_report_says_the_numbers(tmp_path):
    def curve(*accuracy: float) -> dict:
        bounds = [evaluate.wilson(round(a * 1000), 1000) for a in accuracy]
        return {"n": 1000, "accuracy": list(accuracy), "low": [b[0] for b in bounds], "high": [b[1] for b in bounds]}

    share = {"n": 500, "own": curve(0.06), "other": curve(0.004)}
    results = {
        "models": {name: {"test": curve(0.4, 0.65, 0.75, 0.76, 0.77)} for name in demo.MODELS},
        "control": {name: curve(0.3, 0.4, 0.5, 0.6, 0.7) for name in demo.MODELS},
        "ideal": {"accuracy": [0.53, 0.75, 0.83, 0.91, 0.95]},
        "probe": dict.fromkeys(demo.MODELS, share),
    }
    rows = demo.table(results).split("\n")
    assert rows[2].split("|")[2].strip() == "40.0 ±3.1"  # the longer side of Wilson's 36.98 to 43.06
    assert len({len(row) for row in rows}) == 1
    text = demo.meaning(results)
    assert "+25.0 points after multi-attempt RL (to 0.65, and 0.77 at 5 attempts)" in text
    assert "reach 0.70; multi-attempt RL is +7.0 points from there" in text
    evaluate.draw({"toy": demo.panel(results)}, tmp_path)
    svg = (tmp_path / "accuracy.svg").read_text()
    labels = ("multi-attempt RL", "single-turn RL", "warm start", "single-turn RL, resampled", "ideal reader")
    assert all(f">{label}<" in svg for label in labels)
    assert isinstance(demo.panel(results)[-1], Curve)


def test_readme_between_its_markers():
    readme = "# x\n<!-- reproduce:begin -->\nold\n<!-- reproduce:end -->\nrest"
    once = demo.renew_readme(readme, r"| \1 new |")
    assert once == "# x\n<!-- reproduce:begin -->\n| \\1 new |\n<!-- reproduce:end -->\nrest"
    assert demo.renew_readme(once, r"| \1 new |") == once
    assert demo.renew_readme("no markers", "new") == "no markers"


STUB = """
import json, pathlib, sys, threading
given = dict(a.split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path("runs") / given["RUN"]
folder.mkdir(parents=True, exist_ok=True)
if given["PRESET"] == given.get("FAIL"):
    sys.exit("this arm is broken")
row = {"step": 1, "generated_tokens": 120, "token_budget": 100, "reward": 0.5, "accuracy": 0.5}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
if "FAIL" in given:
    threading.Event().wait(600)
(folder / "policy").mkdir()
"""


@pytest.mark.parametrize("fail", [False, True])
def test_arms_run_side_by_side_and_end_together(tmp_path, monkeypatch, capsys, fail):
    monkeypatch.chdir(tmp_path)
    Path("ppo.py").write_text(STUB)
    folder = Path("runs/demo/seed-0")
    folder.mkdir(parents=True)
    if not fail:
        demo.train(0, Path("toy"), folder)
        assert all((folder / arm / "policy").is_dir() for arm in demo.ARMS)
        assert capsys.readouterr().err.count("100%") >= 2
        return
    monkeypatch.setattr(demo, "TRAINING", "FAIL=toy,single_turn")
    start = time.monotonic()
    with pytest.raises(
        SystemExit, match=r"this arm is broken(.|\n)*single_turn failed; all of it is in .*single_turn\.log"
    ):
        demo.train(0, Path("toy"), folder)
    assert time.monotonic() - start < 60  # the other arm was ended, not waited for
    assert not (folder / "multi_attempt" / "policy").exists()


def test_random_model_is_what_the_tests_take_it_for(tiny):
    """The fixture's models differ, or the tests above would not see one model's results under the other's name."""
    one, two = (toy.AutoModelForCausalLM.from_pretrained(tiny / name) for name in ("one", "two/policy"))
    assert not torch.equal(one.model.embed_tokens.weight, two.model.embed_tokens.weight)
