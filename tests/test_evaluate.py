"""evaluate.py and data/demo.py: metrics against hand-made dialogues, the figure, and runs of the real engine."""

import contextlib
import csv
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import ppo
import rollout
from data import demo, report, toy
from data.report import Curve
from tests.conftest import ROOT


def said(answer: str | None, gold: str = "7", ending: str = "stop", tokens: int = 4) -> dict:
    status = "no_answer" if answer is None else "correct" if answer == gold else "wrong"
    return {"text": f"It is {answer}", "answer": answer, "status": status, "ending": ending, "tokens": tokens}


def spoke(name: str, K: int, *answers: str | None, control: bool = False, sample: int = 0, **how: object) -> dict:
    key = {"benchmark": how.pop("benchmark", "b"), "id": name, "K": K, "control": control, "sample": sample}
    return key | {"attempts": [said(answer, **how) for answer in answers]}


def metric(estimates: dict, name: str) -> list[float | None]:
    return [None if v is None else round(v, 9) for v in estimates[name].as_json()["value"]]


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


def test_mcnemar_is_the_exact_binomial():
    # By hand: 5 against 0 is 2/2^5; 9 against 1 is 2 (1 + 10) / 2^10.
    assert [evaluate.mcnemar(*x) for x in ((0, 0), (0, 5), (9, 1), (4, 4))] == [1.0, 0.0625, 22 / 1024, 1.0]
    for first, second in itertools.product(range(9), repeat=2):  # outcomes at least as far from the middle
        n = first + second
        far = [i for i in range(n + 1) if abs(2 * i - n) >= abs(first - second)]
        assert evaluate.mcnemar(first, second) == pytest.approx(sum(math.comb(n, i) for i in far) / 2**n)


def test_bootstrap_of_a_proportion_is_the_binomial(monkeypatch):
    """Resampled, 12 of 40 is Binomial(40, 0.3): the interval's ends are the quantiles of that distribution."""
    monkeypatch.setattr(evaluate, "BOOTSTRAP", 20_000)
    values = np.array([[1.0]] * 12 + [[0.0]] * 28)
    estimate = evaluate.mean(values, evaluate.problem_weights("binomial", 40))
    chances = list(itertools.accumulate(math.comb(40, i) * 0.3**i * 0.7 ** (40 - i) for i in range(41)))
    exact = [next(i for i, chance in enumerate(chances) if chance >= q) / 40 for q in (0.025, 0.975)]
    known = estimate.as_json()
    assert known["value"] == [0.3]
    assert [known["low"][0], known["high"][0]] == pytest.approx(exact, abs=0.026)  # one problem of 40
    assert estimate.resampled.std() == pytest.approx(math.sqrt(0.3 * 0.7 / 40), rel=0.03)


def test_resamples_depend_on_seed_and_benchmark_alone(monkeypatch):
    weights = evaluate.problem_weights
    assert (weights("a", 9).sum(1) == 9).all()
    assert np.array_equal(weights("a", 9), weights("a", 9))
    assert not np.array_equal(weights("a", 9), weights("b", 9))
    before = weights("a", 9)
    monkeypatch.setattr(rollout, "SEED", 1)
    assert not np.array_equal(weights("a", 9), before)


# Metrics of hand-made dialogues --------------------------------------------------------------------------------------
def test_paper_protocol():
    records = [
        *(spoke("a", 1, "7"), spoke("b", 1, "8"), spoke("c", 1, None, ending="length", tokens=64), spoke("d", 1)),
        *(spoke("a", 2, "9", "7"), spoke("b", 2, "8", "8"), spoke("c", 2, "6", ending="context"), spoke("d", 2)),
        *(spoke("a", 3, "7"), spoke("b", 3, "8", "9", "8.0"), spoke("c", 3, None, None, "7"), spoke("d", 3)),
    ]
    random.Random(0).shuffle(records)
    found = evaluate.measure(records)
    assert metric(found, "accuracy") == [0.25, 0.25, 0.5]
    known = found["accuracy"].as_json()
    assert list(zip(known["low"], known["high"], strict=True)) == [evaluate.wilson(s, 4) for s in (1, 1, 2)]
    assert metric(found, "gain") == [0.0, 0.0, 0.25]
    assert metric(found, "repeat") == [None, 0.5, 0.25]  # b's 8 of two retries; b's 8.0 of four: silence is no answer
    assert found["repeat"].as_json()["low"][0] is None
    assert metric(found, "attempts") == [0.75, 1.25, 1.75]
    assert metric(found, "tokens") == [18.0, 5.0, 7.0]
    assert metric(found, "truncated") == [round(1 / 3, 9), 0.2, 0.0]
    assert metric(found, "out_of_context") == [0.25, 0.5, 0.25]  # d; with K = 2 also c
    assert set(found) == {"accuracy", "gain", "repeat", "attempts", "tokens", "truncated", "out_of_context"}


def test_prefix_protocol_and_sampled_dialogues():
    records = [
        spoke("a", 3, "8", "7"),
        spoke("a", 3, "7", sample=1),
        spoke("b", 3, "8", "9", "8"),
        spoke("b", 3, "8", "8", "7", sample=1),
    ]
    found = evaluate.measure(records)
    assert metric(found, "accuracy") == [0.25, 0.5, 0.75]  # of four dialogues: one, two, three within 1, 2, 3 attempts
    assert found["accuracy"].outcomes is None  # means over samples: the bootstrap's interval, not Wilson's
    known = found["accuracy"].as_json()
    assert (known["low"][0], known["high"][0]) == (0.0, 0.5)  # all resamples draw a alone, b alone, or both
    assert metric(found, "tokens") == [4.0, 7.0, 9.0]
    assert metric(found, "attempts") == [1.0, 1.75, 2.25]
    assert metric(found, "repeat") == [None, round(1 / 3, 9), 0.4]  # b's 8 8; then also its 8 9 8


def test_intrinsic_numbers(monkeypatch):
    monkeypatch.setattr(rollout, "FEEDBACK", "intrinsic")
    records = [
        spoke("both", 3, "7", "7", "7"),
        spoke("gained", 3, "8", "7", "8"),
        spoke("lost", 3, "7", "8", "7"),
        spoke("never", 3, "8", "8.0", "9"),
        spoke("silent", 3, None, None, "7"),
        spoke("short", 3, "7"),  # the context was full: no answer at 2 and 3
        spoke("other", 3, "1", "2", None),
        spoke("same", 3, "7", "7", "9"),
    ]
    found = evaluate.measure(records)
    assert metric(found, "accuracy") == [4 / 8, 3 / 8, 3 / 8]  # right at attempt k, whatever was said before
    assert metric(found, "gain") == [0.0, -1 / 8, -1 / 8]
    assert metric(found, "i_to_c") == [0.0, 1 / 8, 1 / 8]
    assert metric(found, "c_to_i") == [0.0, 2 / 8, 2 / 8]
    gain = np.array(metric(found, "i_to_c")) - np.array(metric(found, "c_to_i"))
    assert gain.tolist() == metric(found, "gain")  # SCoRe's delta
    assert metric(found, "changed") == [0.0, 3 / 8, 4 / 8]  # gained, lost, other; never, silent, other, same
    assert metric(found, "out_of_context") == [0.0, 1 / 8, 1 / 8]
    known = found["i_to_c"].as_json()
    assert (known["low"][1], known["high"][1]) == evaluate.wilson(1, 8)
    # No oracle ends these dialogues: no control that one would end is set beside them.
    found = evaluate.measure([*records, *(spoke(r["id"], 1, "7", control=True) for r in records)])
    assert "majority" in found
    assert "majority_same_tokens" in found
    assert not {"over_pass", "pass_same_tokens", "over_pass_same_tokens", "samples_same_tokens"} & set(found)


def test_controls_by_hand():
    """Samples cost 10; until one is right, at most 0, 1, 2 of them: expected 0, 10, 15 for a; 0, 10, 20 for b."""
    records = [
        *(spoke("a", 1, "7", control=True, tokens=10), spoke("a", 1, "8", control=True, sample=1, tokens=10)),
        *(spoke("b", 1, "8", control=True, tokens=10), spoke("b", 1, None, control=True, sample=1, tokens=10)),
        *(spoke("a", 1, "7", tokens=10), spoke("b", 1, "8", tokens=10)),
        *(spoke("a", 2, "8", "7", tokens=5), spoke("b", 2, "8", "9", tokens=9)),
        *(spoke("a", 3, "8", "8", "7", tokens=10), spoke("b", 3, "8", "9", "9", tokens=10)),
    ]
    found = evaluate.measure(records)
    assert metric(found, "tokens") == [10.0, 14.0, 30.0]
    assert metric(found, "pass") == [0.25, 0.5, None]  # there is no third sample
    assert metric(found, "majority") == [0.25, 0.25, None]  # a: 7 against 8 is a toss-up, with one vote and with two
    assert metric(found, "sample_tokens") == [10.0, 20.0, None]
    j = 1 + (14 - 10) / (17.5 - 10)
    assert metric(found, "samples_same_tokens") == [1.0, round(j, 9), None]  # 30 tokens: more than two samples
    assert metric(found, "pass_same_tokens") == [0.25, round(0.25 + (j - 1) * 0.25, 9), None]
    assert metric(found, "majority_same_tokens") == [0.25, 0.25, None]
    assert metric(found, "over_pass") == [0.25, 0.0, None]
    assert metric(found, "over_pass_same_tokens") == [0.25, round(0.25 - (j - 1) * 0.25, 9), None]
    # Every interval reaches from the resample of one problem alone to that of the other: each is a quarter of them all.
    for name, low, high in (
        ("pass", [0.0, 0.0], [0.5, 1.0]),
        ("over_pass", [0.0, 0.0], [0.5, 0.0]),
        ("pass_same_tokens", [0.0, 0.0], [0.5, 0.5]),  # a alone spends 10 tokens at k = 2, on one sample
        ("over_pass_same_tokens", [0.0, 0.0], [0.5, 0.5]),
        ("samples_same_tokens", [1.0, 1.0], [1.0, 1.8]),  # b alone spends 18, and no sample of it is right
    ):
        known = found[name].as_json()
        assert known["low"] == pytest.approx([*low, None])
        assert known["high"] == pytest.approx([*high, None])


def test_where_every_problem_has_a_right_sample_more_tokens_buy_nothing():
    right = [spoke(name, 1, "7", control=True, sample=i, tokens=10) for name in "ab" for i in range(3)]
    played = [spoke("a", 1, "7", tokens=11), spoke("b", 1, "7", tokens=10)]
    found = evaluate.measure(right + played)
    assert metric(found, "pass_same_tokens") == [1.0]
    assert metric(found, "over_pass_same_tokens") == [0.0]
    assert found["pass_same_tokens"].as_json()["low"] == [1.0]


def noisy(seed: int, benchmark: str, n: int, chance: float) -> list[dict]:
    rng = random.Random(seed)
    return [spoke(f"{i}", 1, rng.choices("78", (chance, 1 - chance))[0], benchmark=benchmark) for i in range(n)]


def test_average_counts_benchmarks_alike():
    records = noisy(0, "small", 30, 0.3) + noisy(1, "large", 300, 0.8)
    result = evaluate.summarise({"m": records})["models"]["m"]
    assert list(result) == ["small", "large", "average"]
    assert result["average"]["n"] == 330
    small, large = result["small"]["accuracy"][0], result["large"]["accuracy"][0]
    assert result["average"]["accuracy"] == [(small + large) / 2]
    # The stratified bootstrap once more, problem by problem.
    rng = random.Random(2)
    right = {b: [r["attempts"][0]["answer"] == "7" for r in records if r["benchmark"] == b] for b in ("small", "large")}
    means = [statistics.fmean(statistics.fmean(rng.choices(x, k=len(x))) for x in right.values()) for _ in range(4000)]
    low, high = np.quantile(means, (0.025, 0.975))
    assert result["average"]["low"][0] == pytest.approx(low, abs=0.012)
    assert result["average"]["high"][0] == pytest.approx(high, abs=0.012)


def test_comparisons_are_paired():
    first = noisy(0, "x", 200, 0.5)
    second = [r if i >= 12 else spoke(r["id"], 1, "7", benchmark="x") for i, r in enumerate(first)]
    won = sum(r["attempts"][0]["answer"] != "7" for r in first[:12])
    found = evaluate.summarise({"first": first, "second": second, "third": first})["comparisons"]
    assert [c["models"] for c in found] == [["first", "second"], ["first", "third"], ["second", "third"]]
    better, same, worse = found
    assert better["difference"] == [pytest.approx(won / 200)]
    assert (better["only_second"], better["only_first"]) == ([won], [0])
    assert better["p"] == [pytest.approx(2 / 2**won)]
    assert 0 < better["low"][0] < better["difference"][0] < better["high"][0] < 0.08  # unpaired, it would be ±0.1
    assert (same["difference"], same["low"], same["high"], same["p"]) == ([0.0], [0.0], [0.0], [1.0])
    assert worse["difference"] == [-better["difference"][0]]
    sampled = [r | {"sample": i} for r in first for i in range(2)]
    assert "p" not in evaluate.summarise({"a": sampled, "b": first})["comparisons"][0]  # means are no counts


def test_csv_and_table_say_what_the_results_say():
    records = [*noisy(0, "x", 20, 0.5), *(spoke(f"{i}", 1, "7", benchmark="x", control=True) for i in range(20))]
    models = {"first": records, "second": noisy(1, "x", 20, 0.5)}
    results = {"settings": {"MAX_ATTEMPTS": 1, "CONTEXT": 9}} | evaluate.summarise(models)
    rows = list(csv.DictReader(report.to_csv(results).splitlines()))
    for row in rows:
        if " - " not in row["model"]:
            r = results["models"][row["model"]][row["benchmark"]]
            m = r["metrics"][row["metric"]]
            for column in ("value", "low", "high"):
                assert float(row[column]) == pytest.approx(m[column][int(row["k"]) - 1], rel=1e-5)
    paired = {row["metric"]: row for row in rows if row["model"] == "second - first"}
    compared = results["comparisons"][0]
    assert float(paired["accuracy"]["high"]) == pytest.approx(compared["high"][0], rel=1e-5)
    assert float(paired["p (McNemar)"]["value"]) == pytest.approx(compared["p"][0], rel=1e-5)
    metrics = {row["metric"] for row in rows if row["model"] == "first"}
    assert metrics == {*results["models"]["first"]["x"]["metrics"]} - {"repeat"}  # one attempt: no retries
    first = results["models"]["first"]["x"]
    assert {"value": first["accuracy"], "low": first["low"], "high": first["high"]} == first["metrics"]["accuracy"]
    text = report.table(results)
    assert f"{results['models']['second']['x']['accuracy'][0]:.3f} ±" in text
    assert "pass@k" in text
    assert f"{compared['p'][0]:.3f}" in text
    never = {"settings": {"MAX_ATTEMPTS": 1}} | evaluate.summarise({"m": noisy(0, "x", 30, 0.0)})
    assert f"0.000 ±{evaluate.wilson(0, 30)[1]:.3f}" in report.table(never)  # the longer side of an uneven interval


def test_record_keeps_what_was_said():
    class Letters:
        tokenizer = type("T", (), {"decode": staticmethod(lambda ids, skip_special_tokens: "".join(map(chr, ids)))})

    dialogue = rollout.Dialogue({"benchmark": "b", "id": "x", "question": "?", "answer": "7"}, 3)
    dialogue.extend([1, 2, 3])
    dialogue.extend([ord(c) for c in "it's 7"], [0.0] * 6)
    dialogue.attempts.append(rollout.Attempt(3, 9, "7", "correct", "stop"))
    attempt = {"text": "it's 7", "answer": "7", "status": "correct", "ending": "stop", "tokens": 6}
    item = evaluate.Item(dialogue.problem, 3, False, 2)
    expected = {"benchmark": "b", "id": "x", "K": 3, "control": False, "sample": 2, "attempts": [attempt]}
    assert evaluate.record(Letters, dialogue, item) == expected
    assert evaluate.key_of(expected) == item.key


def test_names_and_settings(tmp_path):
    assert list(evaluate.by_name("runs/a/policy,m/b/,c.jsonl", "models")) == ["a", "b", "c"]
    assert list(evaluate.by_name("a/best,b/best,b/policy", "models")) == ["a-best", "b-best", "b"]
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


def test_old_dialogues_are_not_taken_for_new_ones(tmp_path, monkeypatch):
    """results.json deleted, other settings, stopped in the middle: what is published was played under these."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "p.jsonl").write_text('{"id": "x", "question": "?", "answer": "7"}\n')
    out, stopped = tmp_path / "out", []

    def play(model, problems, name, out, parts, store):
        if stopped:
            raise KeyboardInterrupt
        answer = str(rollout.SEED)
        (out / f"dialogues-{name}.jsonl").write_text(evaluate.to_line(spoke("x", 1, answer, benchmark="p")))

    def run(seed: int) -> list[dict]:
        for module, name, value in (
            *((evaluate, "MODEL", f"{tmp_path}/m"), (evaluate, "BENCHMARKS", f"{tmp_path}/p.jsonl")),
            *((evaluate, "OUT", str(out)), (rollout, "MAX_ATTEMPTS", 1), (rollout, "SEED", seed)),
        ):
            monkeypatch.setattr(module, name, value)
        evaluate.main()
        return records_of(out / "dialogues-m.jsonl")

    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    monkeypatch.setattr(evaluate, "evaluate_model", play)
    assert run(6)[0]["attempts"][0]["answer"] == "6"
    (out / "results.json").unlink()
    stopped.append(True)
    with pytest.raises(KeyboardInterrupt):
        run(7)
    stopped.clear()
    assert run(7)[0]["attempts"][0]["answer"] == "7"
    assert json.loads((out / "results.json").read_text())["models"]["m"]["p"]["accuracy"] == [1.0]


def test_a_line_cut_inside_a_character_is_dropped(tmp_path):
    path = tmp_path / "rank-0.jsonl"
    whole = evaluate.to_line({"text": "größer"})
    path.write_bytes(whole.encode() + whole.encode().split(b"\x9f")[0])  # ß is C3 9F
    assert evaluate.read_records(path) == evaluate.last_rows(path) == [{"text": "größer"}]


def test_ranks_that_share_an_engine_play_one_stripe(tmp_path, monkeypatch):
    """And one of them writes: four ranks on two engines."""
    problems = [{"benchmark": "b", "id": str(i)} for i in range(7)]
    monkeypatch.setattr(rollout, "TENSOR_PARALLEL", 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(evaluate, "Engine", lambda *_, **__: SimpleNamespace(tokenizer=None, shutdown=lambda: None))
    monkeypatch.setattr(evaluate, "Chat", lambda tokenizer: None)
    stripes = []

    def play(engine, chat, items, on_end, name):
        stripes.append([item.key for item in items])
        for key in stripes[-1]:
            on_end(dict(zip(evaluate.KEY, key, strict=True)))

    monkeypatch.setattr(evaluate, "evaluate", play)
    written = []
    for rank in range(4):  # a folder each: here they come one after the other, and would see what is done
        monkeypatch.setenv("RANK", str(rank))
        parts = tmp_path / f"parts-{rank}"
        evaluate.evaluate_model(tmp_path, problems, "m", tmp_path, parts, None)
        made = tmp_path / "dialogues-m.jsonl" if rank == 0 else parts / f"rank-{rank}.jsonl"
        written.append([evaluate.key_of(r) for r in evaluate.read_records(made)])
    assert stripes[0] == stripes[1] == written[0]
    assert stripes[2] == stripes[3] == written[2]
    assert written[1] == written[3] == []
    assert sorted(stripes[0] + stripes[2]) == sorted(item.key for item in evaluate.plan(problems))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match=r"TENSOR_PARALLEL=2: 3 ranks \(torchrun\) are no multiple of it"):
        evaluate.check_constants()


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


def evaluation_command(tiny: Path, out: Path, *arguments: str, ranks: int = 0) -> tuple[list[str], dict]:
    """The command and how to run it; of an argument that is given twice, the last one counts."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launch, "evaluate.py", f"MODEL={tiny}/one,{tiny}/two/policy", f"OUT={out}"]
    command += [
        f"BENCHMARKS={tiny}/mixed.jsonl",
        "MAX_ATTEMPTS=2",
        "RESAMPLES=3",
        "CONTEXT=512",
        "MAX_ATTEMPT_TOKENS=8",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return [*command, *arguments], {"cwd": ROOT, "env": environment}


def evaluation(tiny: Path, out: Path, *arguments: str, ranks: int = 0) -> subprocess.CompletedProcess:
    command, how = evaluation_command(tiny, out, *arguments, ranks=ranks)
    return subprocess.run(command, capture_output=True, text=True, check=False, **how)


@pytest.fixture(scope="module")
def evaluated(tiny):
    done = evaluation(tiny, tiny / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_evaluation_end_to_end(tiny, evaluated):
    results = json.loads((tiny / "out" / "results.json").read_text())
    assert list(results["models"]) == ["one", "two"]
    models = {name: records_of(tiny / "out" / f"dialogues-{name}.jsonl") for name in ("one", "two")}
    assert {k: results[k] for k in ("models", "comparisons")} == evaluate.summarise(models)  # all follows from these
    for records in models.values():
        assert len(records) == 8 * (2 + 3)
        assert {r["benchmark"] for r in records} == {"mixed"}
        assert [len(r["attempts"]) for r in records if r["id"] == "real/2"] == [0] * 5
        granted = [len(r["attempts"]) == r["K"] for r in records if r["id"] != "real/2"]
        assert all(granted)  # a random model is never right
        assert all(0 < a["tokens"] <= 8 for r in records for a in r["attempts"])
    assert results["models"]["one"]["mixed"]["n"] == 8
    assert results["models"]["one"]["mixed"]["metrics"]["out_of_context"]["value"] == [1 / 8, 1 / 8]
    assert "CONTEXT=512 ended 12.5% of the dialogues of 2 attempts early" in evaluated.stdout
    made = {"accuracy.png", "accuracy.svg", "results.json", "results.csv", "report.html"}
    made |= {f"dialogues-{name}.jsonl" for name in models}
    assert {p.name for p in (tiny / "out").iterdir()} == made  # nothing half-done is left


def test_two_ranks_give_the_same(tiny, evaluated):
    done = evaluation(tiny, tiny / "ranks", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("dialogues-one.jsonl", "dialogues-two.jsonl", "results.json", "results.csv", "report.html"):
        assert (tiny / "ranks" / name).read_bytes() == (tiny / "out" / name).read_bytes()


def test_second_call_plays_nothing_and_other_settings_stop(tiny, evaluated):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tiny / "out").iterdir()}
    again = evaluation(tiny, tiny / "out", "GATHER_HOURS=1")
    assert again.returncode == 0
    assert again.stdout == evaluated.stdout
    for path, (content, time_ns) in before.items():
        assert path.read_bytes() == content
        assert path.stat().st_mtime_ns == time_ns or not path.name.startswith("dialogues")
    other = evaluation(tiny, tiny / "out", "MAX_ATTEMPTS=3", "PROMPT=single_turn")
    assert other.returncode == 1
    assert "MAX_ATTEMPTS: 2 there, 3 now" in other.stderr
    assert "PROMPT: multi_attempt there, single_turn now" in other.stderr
    assert "Traceback" not in other.stderr


def test_killed_evaluation_goes_on_where_it_stopped(tiny):
    """Killed in the middle and started again: what had ended, on any rank, is not played again."""
    out = tiny / "killed"
    arguments = ["RESAMPLES=24", "MAX_ATTEMPT_TOKENS=32", f"MODEL={tiny}/one"]
    command, how = evaluation_command(tiny, out, *arguments)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    while process.poll() is None and not any(p.read_bytes().count(b"\n") > 10 for p in out.glob(".one.*/*.jsonl")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
    process.kill()
    process.wait()
    (part,) = out.glob(".one.*/*.jsonl")
    assert part.name == "rank-0.jsonl"
    played = records_of(part)
    assert 10 <= len(played) < 8 * (2 + 24)  # it was killed before its end
    played[3]["attempts"][0]["text"] = "as it was written"
    part.unlink()
    with part.with_name("rank-5.jsonl").open("w", encoding="utf-8") as file:  # and a line that the kill cut in two
        file.write("".join(map(evaluate.to_line, played)) + evaluate.to_line(played[0])[:30])
    again = evaluation(tiny, out, *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    records = records_of(out / "dialogues-one.jsonl")
    runs = [(False, K, 0) for K in (1, 2)] + [(True, 1, i) for i in range(24)]
    assert sorted((r["id"], r["control"], r["K"], r["sample"]) for r in records) == sorted(
        (name, *run) for name in {r["id"] for r in records} for run in runs
    )
    assert len(records) == 8 * len(runs)
    by_key = {evaluate.key_of(r): r for r in records}
    assert all(by_key[evaluate.key_of(r)] == r for r in played)
    assert not part.parent.exists()


@pytest.mark.parametrize("feedback", ["verified", "intrinsic"])
def test_any_part_of_the_plan_gives_the_same_dialogues(toy, engine, monkeypatch, feedback):
    """What a dialogue becomes does not depend on what else is played: sampled ones, the prefix protocol, controls."""
    monkeypatch.setattr(rollout, "FEEDBACK", feedback)
    monkeypatch.setattr(evaluate, "PROTOCOL", "prefix")
    monkeypatch.setattr(evaluate, "SAMPLES", 2)
    monkeypatch.setattr(evaluate, "RESAMPLES", 3)
    monkeypatch.setattr(rollout, "MAX_ATTEMPTS", 3)
    problems = [p | {"benchmark": "test"} for p in rollout.load_problems(toy / "test.jsonl")[:12]]
    chat, items, ended = rollout.Chat(engine.tokenizer), evaluate.plan(problems), []
    assert [(i.K, i.control) for i in items] == [(3, False)] * 24 + [(1, True)] * 36
    whole = {evaluate.key_of(r): r for r in evaluate.evaluate(engine, chat, items, ended.append)}
    assert len(whole) == len(ended) == 60
    part = evaluate.evaluate(engine, chat, items[1::3])
    assert {evaluate.key_of(r) for r in part} == {item.key for item in items[1::3]}
    assert all(r == whole[evaluate.key_of(r)] for r in part)
    first, second = (
        {r["id"]: r["attempts"] for r in whole.values() if r["K"] == 3 and r["sample"] == i} for i in (0, 1)
    )
    assert first != second
    found = evaluate.measure(list(whole.values()))
    if feedback == "verified":
        assert found["accuracy"].value.tolist() == sorted(found["accuracy"].value)  # within more attempts, never fewer
        assert "i_to_c" not in found
    else:
        assert all(len(r["attempts"]) == r["K"] for r in whole.values())
        net = np.subtract(metric(found, "i_to_c"), metric(found, "c_to_i"))
        assert net.tolist() == pytest.approx(metric(found, "gain"), abs=1e-8)


def test_plan_of_each_protocol(monkeypatch):
    problems = [{"benchmark": "b", "id": name} for name in "xy"]
    monkeypatch.setattr(rollout, "MAX_ATTEMPTS", 3)
    monkeypatch.setattr(evaluate, "RESAMPLES", 0)
    assert [i.K for i in evaluate.plan(problems)] == [3, 3, 2, 2, 1, 1]  # the longest first
    assert len({i.key for i in evaluate.plan(problems)}) == 6
    monkeypatch.setattr(rollout, "FEEDBACK", "intrinsic")
    assert [i.K for i in evaluate.plan(problems)] == [3, 3]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("MODEL=no/such", "no/such: no model folder"),
        ("BENCHMARKS=no/such.jsonl", "no/such.jsonl: no such problem file"),
        ("MAX_ATTEMPT=3", "MAX_ATTEMPT: no such constant; the nearest is MAX_ATTEMPTS"),
        ("PROTOCOL=both", "PROTOCOL=both: must be one of paper, prefix"),
        ("TEMPERATURE=0", "TEMPERATURE=0.0: must be above 0 where SAMPLES or RESAMPLES are drawn"),
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
    report.draw({"toy": demo.panel(results)}, tmp_path)
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
folder.mkdir(parents=True)
if given["MODEL"] == "broken":
    sys.exit("this arm is broken")
if given["MODEL"] == "after":
    assert (folder.parent / "first" / "policy").is_dir()
row = {"step": 1, "generated_tokens": 120, "token_budget": 100, "reward": 0.5, "accuracy": 0.5}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
if given["MODEL"] == "slow":
    threading.Event().wait(600)
(folder / "config.json").write_text(pathlib.Path("config.json").read_text().replace("NAME", given["RUN"]))
(folder / "policy").mkdir()
"""


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """How to make demo.Trainings whose ppo.py is STUB; the model says what becomes of it."""
    monkeypatch.chdir(tmp_path)
    Path("ppo.py").write_text(STUB)
    Path("problems.jsonl").write_text("{}")
    config = demo.constants_of(["MODEL=fine", "RUN=NAME", "TOKEN_BUDGET=100", "TRAIN_DATA=problems.jsonl"])
    Path("config.json").write_text(json.dumps(ppo.config_of(config)))

    def make(name: str, model: str, after: str = "") -> demo.Training:
        before = Path("runs/demo", after) if after else None
        arguments = [f"MODEL={model}", "TOKEN_BUDGET=100", "TRAIN_DATA=problems.jsonl"]
        return demo.Training(name, Path("runs/demo", name), arguments, before)

    return make


def test_trainings_run_side_by_side_and_in_order(trainings, capsys):
    runs = [trainings("first", "fine"), trainings("last", "after", after="first"), trainings("second", "fine")]
    demo.train(runs)
    assert all((run.folder / "policy").is_dir() for run in runs)
    assert capsys.readouterr().err.count("100%") >= 3
    written = {run.log: run.log.stat().st_mtime_ns for run in runs}
    demo.train(runs[::2])  # finished with the constants that they would have: not started again
    assert all(log.stat().st_mtime_ns == written[log] for log in written)
    Path("problems.jsonl").write_text("{ }")
    with pytest.raises(SystemExit, match="first did not get to its end"):  # other constants: ppo.py has its say
        demo.train(runs[:1])


def test_a_training_that_fails_ends_the_others(trainings):
    start = time.monotonic()
    with pytest.raises(SystemExit, match=r"this arm is broken(.|\n)*second did not get to its end.*second\.log"):
        demo.train([trainings("first", "slow"), trainings("second", "broken"), trainings("third", "fine")])
    assert time.monotonic() - start < 60  # the other one was ended, not waited for
    assert not Path("runs/demo/first/policy").exists() and not Path("runs/demo/third").exists()


def test_random_model_is_what_the_tests_take_it_for(tiny):
    """The fixture's models differ, or the tests above would not see one model's results under the other's name."""
    one, two = (toy.AutoModelForCausalLM.from_pretrained(tiny / name) for name in ("one", "two/policy"))
    assert not torch.equal(one.model.embed_tokens.weight, two.model.embed_tokens.weight)
