"""evaluate.py: metrics of hand-made dialogues against numbers from other computations, and runs of the real engine."""

import ast
import itertools
import json
import math
import random
import re
import signal
import statistics
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import evaluate
import rollout
from data.problems import load_problems
from experiments import median, warm
from plumbing import report
from plumbing.constants import list_constants
from plumbing.files import read_jsonl, to_json, to_line
from tests.conftest import ROOT, run_python
from tests.test_nodes import start_nodes

import numpy as np
import pytest


def attempt(answer: str | None, gold: str = "7", ending: str = "stop", tokens: int = 4) -> dict:
    status = "no_answer" if answer is None else "correct" if answer == gold else "wrong"
    return {"text": f"It is {answer}", "answer": answer, "status": status, "ending": ending, "tokens": tokens}


def played(
    name: str, K: int, *answers: str | None, benchmark: str = "b", control: bool = False, sample: int = 0, **how: object
) -> dict:
    attempts = [attempt(answer, **how) for answer in answers]
    return evaluate.Item(benchmark, name, K, control, sample)._asdict() | {"attempts": attempts}


def metric(estimates: dict, name: str) -> list[float | None]:
    return [None if v is None else round(v, 9) for v in estimates[name].as_json()["value"]]


# Numbers -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [(15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(successes, n, low, high):
    assert evaluate.wilson(successes, n) == pytest.approx((low, high), abs=6e-5)
    assert evaluate.wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=6e-5)
    assert evaluate.wilson(0, n)[0] == 0.0 and evaluate.wilson(n, n)[1] == 1.0  # without a rounding error
    assert evaluate.share_interval([(successes, n)]) == pytest.approx(evaluate.wilson(successes, n), abs=1e-12)


@pytest.mark.parametrize("rates", [(0.02, 0.05), (0.3, 0.6), (0.5, 0.5), (0.9, 1.0)])
def test_the_interval_of_a_mean_of_shares_covers_it(rates):
    """The probability, over all outcomes of 12 and 30 problems, that it contains the mean of the true rates."""
    inside = 0.0
    for a, b in itertools.product(range(13), range(31)):
        low, high = evaluate.share_interval([(a, 12), (b, 30)])
        chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for n, k, p in ((12, a, rates[0]), (30, b, rates[1]))]
        inside += chances[0] * chances[1] * (low <= sum(rates) / 2 <= high)
    assert inside > 0.92


def test_majority_is_the_mean_over_all_draws():
    def won(draw: tuple[str, ...]) -> float:
        votes = Counter(a for a in draw if a)
        first = [a for a, count in votes.items() if count == max(votes.values())]
        return ("right" in first) / len(first) if first else 0.0

    for correct, wrong, silent in itertools.product(range(4), [(), (1,), (2,), (1, 2), (1, 1, 1), (3, 2)], range(3)):
        samples = ["right"] * correct + [f"w{i}" for i, n in enumerate(wrong) for _ in range(n)] + [""] * silent
        expected = [statistics.fmean(map(won, itertools.combinations(samples, k))) for k in range(len(samples) + 1)]
        assert evaluate.majority_by_k(correct, wrong, silent) == pytest.approx(expected)


def test_cost_until_right_is_the_mean_over_all_orders():
    for right, wrong in ([3, 8], [5, 1]), ([], [4, 4, 1]), ([2, 9], []), ([6], [1, 2, 3]):
        samples = [(tokens, True) for tokens in right] + [(tokens, False) for tokens in wrong]
        for j in range(len(samples) + 1):
            costs = []
            for order in itertools.permutations(samples):
                stop = next((i + 1 for i, (_, correct) in enumerate(order[:j]) if correct), j)
                costs.append(sum(tokens for tokens, _ in order[:stop]))
            assert evaluate.cost_until_right(right, wrong)[j] == pytest.approx(statistics.fmean(costs))


def test_the_bootstrap_of_a_share_has_its_deviation(change):
    change(evaluate, BOOTSTRAP=20_000)
    resamples = evaluate.draw_resamples("a", 40)
    assert (resamples.sum(1) == 40).all() and np.array_equal(resamples, evaluate.draw_resamples("a", 40))
    solved = np.array([[1.0]] * 12 + [[0.0]] * 28)
    estimate = evaluate.estimate_ratio(solved, np.ones_like(solved), resamples)
    assert estimate.value == [0.3] and estimate.resampled.mean() == pytest.approx(0.3, abs=0.003)
    assert estimate.resampled.std() == pytest.approx(math.sqrt(0.3 * 0.7 / 40), rel=0.03)
    assert (evaluate.estimate_ratio(solved, solved, resamples).resampled == 1).all()  # the same problems in both sums


# Metrics of hand-made dialogues --------------------------------------------------------------------------------------
def test_paper_protocol():
    records = [
        *(played("a", 1, "7"), played("b", 1, "8"), played("c", 1, None, ending="length", tokens=64), played("d", 1)),
        *(played("a", 2, "9", "7"), played("b", 2, "8", "8"), played("c", 2, "6", ending="context"), played("d", 2)),
        *(played("a", 3, "7"), played("b", 3, "8", "9", "8.0"), played("c", 3, None, None, "7"), played("d", 3)),
    ]
    random.Random(0).shuffle(records)
    metrics = evaluate.measure(records)
    assert metric(metrics, "accuracy") == [0.25, 0.25, 0.5]
    known = metrics["accuracy"].as_json()
    for low, high, solved in zip(known["low"], known["high"], (1, 1, 2), strict=True):
        assert (low, high) == pytest.approx(evaluate.wilson(solved, 4))
    assert metric(metrics, "gain") == [0.0, 0.0, 0.25]
    assert metric(metrics, "repeat") == [None, 0.5, 0.25]  # b's 8 of two retries; b's 8.0 of four: silence is no answer
    assert metrics["repeat"].as_json()["low"][0] is None
    assert metric(metrics, "attempts") == [0.75, 1.25, 1.75]
    assert metric(metrics, "tokens") == [18.0, 5.0, 7.0]
    assert metric(metrics, "truncated") == [round(1 / 3, 9), 0.2, 0.0]
    assert metric(metrics, "out_of_context") == [0.25, 0.5, 0.25]  # d; with K = 2 also c
    assert set(metrics) == {"accuracy", "gain", "repeat", "attempts", "tokens", "truncated", "out_of_context"}


def test_prefix_protocol_and_sampled_dialogues():
    records = [played("a", 3, "8", "7"), played("a", 3, "7", sample=1)]
    records += [played("b", 3, "8", "9", "8"), played("b", 3, "8", "8", "7", sample=1)]
    metrics = evaluate.measure(records)
    assert metric(metrics, "accuracy") == [0.25, 0.5, 0.75]  # of the four: one, two, three within 1, 2, 3 attempts
    assert not metrics["accuracy"].outcomes  # means over samples: the bootstrap's interval, not Wilson's
    known = metrics["accuracy"].as_json()
    assert (known["low"][0], known["high"][0]) == (0.0, 0.5)  # all resamples draw a alone, b alone, or both
    assert metric(metrics, "tokens") == [4.0, 7.0, 9.0]
    assert metric(metrics, "attempts") == [1.0, 1.75, 2.25]
    assert metric(metrics, "repeat") == [None, round(1 / 3, 9), 0.4]  # b's 8 8; then also its 8 9 8


def test_intrinsic_numbers(change):
    change(rollout, FEEDBACK="intrinsic")
    records = [
        played("both", 3, "7", "7", "7"),
        played("gained", 3, "8", "7", "8"),
        played("lost", 3, "7", "8", "7"),
        played("never", 3, "8", "8.0", "9"),
        played("silent", 3, None, None, "7"),
        played("short", 3, "7"),  # the context was full: no answer at 2 and 3
        played("other", 3, "1", "2", None),
        played("same", 3, "7", "7", "9"),
    ]
    expected = {
        "accuracy": [4 / 8, 3 / 8, 3 / 8],  # right at attempt k, whatever was said before
        "gain": [0.0, -1 / 8, -1 / 8],
        "i_to_c": [0.0, 1 / 8, 1 / 8],
        "c_to_i": [0.0, 2 / 8, 2 / 8],
        "changed": [0.0, 3 / 8, 4 / 8],  # gained, lost, other; never, silent, other, same
        "out_of_context": [0.0, 1 / 8, 1 / 8],
    }
    metrics = evaluate.measure(records)
    assert {name: metric(metrics, name) for name in expected} == expected
    # No oracle ends these dialogues: no control that one would end is set beside them.
    metrics = evaluate.measure([*records, *(played(r["id"], 1, "7", control=True) for r in records)])
    assert {"majority", "majority_same_tokens"} <= set(metrics)
    assert not {"over_pass", "pass_same_tokens", "over_pass_same_tokens", "samples_same_tokens"} & set(metrics)


def test_controls_by_hand():
    """Samples cost 10; until one is right, at most 0, 1, 2 of them: expected 0, 10, 15 for a; 0, 10, 20 for b."""
    records = [
        *(played("a", 1, "7", control=True, tokens=10), played("a", 1, "8", control=True, sample=1, tokens=10)),
        *(played("b", 1, "8", control=True, tokens=10), played("b", 1, None, control=True, sample=1, tokens=10)),
        *(played("a", 1, "7", tokens=10), played("b", 1, "8", tokens=10)),
        *(played("a", 2, "8", "7", tokens=5), played("b", 2, "8", "9", tokens=9)),
        *(played("a", 3, "8", "8", "7", tokens=10), played("b", 3, "8", "9", "9", tokens=10)),
    ]
    metrics = evaluate.measure(records)
    f = (14 - 10) / (17.5 - 10)  # at k = 2: 14 tokens, between one sample and two
    assert {name: metric(metrics, name) for name in metrics if re.search("sample|pass|majority", name)} == {
        "pass": [0.25, 0.5, None],  # there is no third sample
        "over_pass": [0.25, 0.0, None],
        "pass_same_tokens": [0.25, round(0.25 + f * 0.25, 9), None],
        "over_pass_same_tokens": [0.25, round(0.25 - f * 0.25, 9), None],
        "samples_same_tokens": [1.0, round(1 + f, 9), None],  # 30 tokens: more than two samples
        "majority": [0.25, 0.25, None],  # a: 7 against 8 is a toss-up, with one vote and with two
        "majority_same_tokens": [0.25, 0.25, None],
        "sample_tokens": [10.0, 20.0, None],
    }
    known = metrics["samples_same_tokens"].as_json()  # b alone spends 18, and no sample of it is right
    assert known["low"] == [1.0, 1.0, None] and known["high"] == pytest.approx([1.0, 1.8, None])


def noisy(seed: int, benchmark: str, n: int, chance: float) -> list[dict]:
    rng = random.Random(seed)
    return [played(f"{i}", 1, rng.choices("78", (chance, 1 - chance))[0], benchmark=benchmark) for i in range(n)]


def test_average_counts_benchmarks_alike():
    result = evaluate.summarise({"m": noisy(0, "small", 30, 0.3) + noisy(1, "large", 300, 0.8)})["models"]["m"]
    assert list(result) == ["small", "large", "average"] and result["average"]["n"] == 330
    small, large, average = ({x: result[name][x][0] for x in ("accuracy", "low", "high")} for name in result)
    assert average["accuracy"] == (small["accuracy"] + large["accuracy"]) / 2
    below = math.hypot(*(r["accuracy"] - r["low"] for r in (small, large))) / 2
    assert average["accuracy"] - average["low"] == pytest.approx(below)


def test_comparisons_are_paired():
    first = noisy(0, "x", 200, 0.5)
    second = [r if i >= 12 else played(r["id"], 1, "7", benchmark="x") for i, r in enumerate(first)]
    won = sum(r["attempts"][0]["answer"] != "7" for r in first[:12])
    better, same, worse = evaluate.summarise({"a": first, "b": second, "c": first})["comparisons"]
    assert (better["models"], worse["models"]) == (["a", "b"], ["b", "c"])
    assert better["difference"] == [pytest.approx(won / 200)] == [-worse["difference"][0]]
    assert (better["only_second"], better["only_first"], better["p"]) == ([won], [0], [pytest.approx(2 / 2**won)])
    assert 0 < better["low"][0] < better["difference"][0] < better["high"][0] < 0.08  # unpaired, it would be ±0.1
    assert (same["difference"], same["low"], same["high"], same["p"]) == ([0.0], [0.0], [0.0], [1.0])
    sampled = [r | {"sample": i} for r in first for i in range(2)]
    assert "p" not in evaluate.summarise({"a": sampled, "b": first})["comparisons"][0]  # means are no counts


def test_the_table_says_what_the_results_say():
    control = [r | {"control": True, "sample": i} for r in noisy(2, "x", 40, 0.5) for i in range(2)]
    models = {"first": noisy(0, "x", 40, 0.3) + control, "second": noisy(1, "x", 40, 0.0) + control}
    results = {"settings": {"MAX_ATTEMPTS": 1, "CONTEXT": 9}} | evaluate.summarise(models)
    (compared,), first = results["comparisons"], results["models"]["first"]["x"]
    text, half = report.make_table(results), evaluate.wilson(0, 40)[1]  # the longer side of the interval
    for said in (f"{first['accuracy'][0]:.3f} ±", f"0.000 ±{half:.3f}", "pass@k", f"{compared['p'][0]:.3f}"):
        assert said in text


# Settings and files ---------------------------------------------------------------------------------------------------
def test_results_of_other_weights_are_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(to_json({"settings": {"K": 5}, "weights": {"a": "1"}}))
    for asked in ({"a": "1", "b": "2"}, {"b": "2"}):  # b is new, or a not asked for: no conflict
        assert evaluate.load_results(path, {"K": 5}, asked)["weights"] == {"a": "1"}
    with pytest.raises(SystemExit, match="K: 5 there, 6 now\n  a: 1 there, 3 now"):
        evaluate.load_results(path, {"K": 6}, {"a": "3"})


def test_the_fingerprint_covers_every_file_that_grades():
    """They are grader.py and what it imports of plumbing, also indirectly, but for constants and files."""
    grading, left = set(), ["grader.py"]
    while left:
        file = left.pop()
        grading.add(file)
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            files = {name.replace(".", "/") + ".py" for name in names if name.startswith("plumbing.")}
            left += [f for f in files - grading if (ROOT / f).is_file()]
    assert set(evaluate.GRADING_FILES) == grading - {"plumbing/constants.py", "plumbing/files.py"}


# Runs of evaluate.py --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Two random models with the toy's tokenizer, and problems: toy, real mathematics, one longer than the context."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = median.make_tokenizer()
    for seed, name in enumerate(("one", "two/policy")):
        warm.make_model(tokenizer, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    problems = median.make_problems(5, 0, held_out=True)
    texts = r"Compute $\sqrt{49}\,$ – “exactly”.", r"Let $f(x)=x^2-\frac{1}{2}$. Find $f(3)$.\n", "9" * 600
    problems += [{"id": f"real/{i}", "question": text, "answer": r"\frac{17}{2}"} for i, text in enumerate(texts)]
    (folder / "mixed.jsonl").write_text("".join(map(to_line, problems)), encoding="utf-8")
    return folder


def list_arguments(tiny: Path, out: Path) -> list[str]:
    arguments = [f"MODEL={tiny}/one,{tiny}/two/policy", f"OUT={out}", f"BENCHMARKS={tiny}/mixed.jsonl"]
    return [*arguments, "MAX_ATTEMPTS=2", f"RESAMPLES={SAMPLES}", "CONTEXT=512", "MAX_ATTEMPT_TOKENS=32"]


SAMPLES = 3  # of each problem, as control
RUNS = [(K, False, 0) for K in (1, 2)] + [(1, True, i) for i in range(SAMPLES)]  # of each problem
MADE = {"accuracy.png", "accuracy.svg", "results.json", "report.html"}
MADE |= {f"dialogues-{name}.jsonl" for name in ("one", "two")}
MARK = ', "kept": true'
KILLED = """
import os, signal, sys, evaluate
inner, ended = evaluate.append_jsonl, []
def append(path, rows):
    inner(path, rows)
    ended.extend(rows)
    if len(ended) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
evaluate.append_jsonl = append
evaluate.main()
"""


@pytest.fixture(scope="module")
def evaluated(tiny) -> str:
    """What an evaluation prints that was killed and is resumed. What had ended then is marked."""
    out = tiny / "out"
    out.mkdir()
    (out / "dialogues-one.jsonl").touch()  # of an evaluation whose results.json was deleted
    run_python("-c", KILLED, *list_arguments(tiny, out), "MAX_SEQUENCES=4", code=-signal.SIGKILL)
    (part,) = out.glob(".one.*/rank-0.jsonl")
    played = part.read_text(encoding="utf-8").replace("]}\n", f"]{MARK}}}\n")
    part.with_name("rank-5.jsonl").write_text(played, encoding="utf-8")  # of a rank that is not there this time
    part.write_text('{"benchmark": "mi')  # cut in two
    return run_python("evaluate.py", *list_arguments(tiny, out)).stdout


def test_evaluation_end_to_end(tiny, evaluated):
    results = json.loads((tiny / "out" / "results.json").read_text())
    models = {name: read_jsonl(tiny / "out" / f"dialogues-{name}.jsonl") for name in ("one", "two")}
    assert {k: results[k] for k in ("models", "comparisons")} == evaluate.summarise(models)  # all follows from these
    names = [p["id"] for p in read_jsonl(tiny / "mixed.jsonl")]
    for records in models.values():
        assert len(records) == len(names) * len(RUNS)
        assert {evaluate.item_of(r) for r in records} == {("mixed", name, *run) for name in names for run in RUNS}
        for r in records:  # a random model is never right
            assert len(r["attempts"]) == (0 if r["id"] == "real/2" else r["K"])
            assert all(0 < a["tokens"] <= 32 for a in r["attempts"])
    one, two = ([a["text"] for r in records for a in r["attempts"]] for records in models.values())
    assert one != two
    assert sum("kept" in r for r in models["one"]) == 12  # these were not played again
    assert "CONTEXT=512 ended 12.5% of the dialogues of 2 attempts early" in evaluated
    assert {p.name for p in (tiny / "out").iterdir()} == MADE  # nothing half-done is left


def test_two_nodes_that_nobody_kills_give_the_same(tiny, evaluated, tmp_path):
    with start_nodes(tmp_path, "evaluate.py", *list_arguments(tiny, tmp_path / "out")) as nodes:
        assert [node.wait() for node in nodes] == [0, 0]
    said = [(tmp_path / f"node-{node}.log").read_text() for node in range(2)]
    assert said[0].count("pass@k") == 2 and "pass@k" not in said[1]  # rank 0 speaks for all
    assert {path.name for path in (tmp_path / "out").iterdir()} == MADE
    for name in ("dialogues-one.jsonl", "dialogues-two.jsonl", "results.json"):
        assert (tmp_path / "out" / name).read_text() == (tiny / "out" / name).read_text().replace(MARK, "")


@pytest.fixture
def call(monkeypatch):
    """Calls evaluate.py's main() in this process, where it must not come to play; constants are restored afterwards."""
    modules = {"evaluate": evaluate, "rollout": rollout, "report": report, "engine": evaluate.plumbing.engine}
    for module, name, _ in list_constants(modules):
        monkeypatch.setattr(modules[module], name, getattr(modules[module], name))
    monkeypatch.setattr(evaluate, "evaluate_model", Mock(side_effect=AssertionError("it plays")))

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        evaluate.main()

    return call


def test_second_call_plays_nothing(tiny, evaluated, call, capsys):
    before = {p: p.read_bytes() for p in (tiny / "out").iterdir()}
    call(*list_arguments(tiny, tiny / "out"), "MAX_SEQUENCES=200")  # decides on speed only
    printed = capsys.readouterr().out
    assert printed.split("benchmark  ")[1] == evaluated.split("benchmark  ")[1]
    assert "engine.MAX_SEQUENCES = 200 (command line; the file says 512)" in printed
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "report.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL=/no/such"], "MODEL=/no/such: neither a folder with a model"),
        (["BENCHMARKS=no/such.jsonl"], "no/such.jsonl: no such problem file"),
        (["BENCHMARKS=x/a.jsonl,y/a.jsonl"], r"x/a.jsonl and y/a\.jsonl would both"),
        (["BENCHMARKS=average.jsonl"], "own word and aver"),
        (["TEMPERATURE=0"], "TEMPERATURE=0.0: must be above 0"),
        (["MAX_ATTEMPTS=3", "PROMPT=single_turn"], "MAX_ATTEMPTS: 2 there, 3 now\n  PROMPT: multi_attempt there, "),
    ],
)
def test_bad_input_is_refused_before_anything_is_played(tiny, evaluated, call, arguments, message):
    with pytest.raises(SystemExit, match=message):
        call(*list_arguments(tiny, tiny / "out"), *arguments)


@pytest.mark.parametrize("feedback", ["verified", "intrinsic"])
def test_any_part_of_the_plan_gives_the_same_dialogues(toy, engine, change, feedback):
    """What a dialogue becomes does not depend on what else is played: sampled ones, the prefix protocol, controls."""
    change(rollout, FEEDBACK=feedback, MAX_ATTEMPTS=3)
    change(evaluate, PROTOCOL="prefix", SAMPLES=2, RESAMPLES=3)
    problems = {("test", p["id"]): p for p in load_problems(toy / "test.jsonl")[:12]}
    items, records, part = evaluate.list_items(problems), [], []
    assert [(i.K, i.control) for i in items] == [(3, False)] * 24 + [(1, True)] * 36 and len(set(items)) == 60
    evaluate.play_items(engine, items, problems, records.append, "")
    whole = {evaluate.item_of(r): r for r in records}
    evaluate.play_items(engine, items[1::3], problems, part.append, "")
    assert whole.keys() == set(items) and {evaluate.item_of(r) for r in part} == set(items[1::3])
    assert all(r == whole[evaluate.item_of(r)] for r in part)
    first, second = ({r["id"]: r["attempts"] for r in records if r["K"] == 3 and r["sample"] == i} for i in (0, 1))
    assert first != second
    assert feedback == "verified" or all(len(r["attempts"]) == r["K"] for r in records)
