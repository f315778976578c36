"""data/score.py and data/ablations.py from end to end at a tiny size: what they show is what was played."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data import ablations, demo, score
from tests.conftest import ROOT, alone
from tests.test_report import lines_of

TINY = "DIALOGUES=32 MINI_BATCH=16 EPOCHS=1 SAVE_EVERY=100"
PROGRAM = """
import sys
from pathlib import Path
from data import demo, {module}
world = Path(sys.argv.pop())
demo.make_world = lambda seed, folder: world
{module}.main()
"""


def call(module: str, toy: Path, *given: str) -> str:
    """What it prints, in a process of its own, in the tests' toy world."""
    arguments = [*given, f"TRAINING={TINY}", "EVALUATION_RANKS=1", str(toy)]
    command = [sys.executable, "-c", PROGRAM.format(module=module), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def trained(folder: Path) -> dict[Path, tuple[int, int]]:
    """When each file of the trainings and of the dialogues was written, and how long it is."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.log"), *folder.rglob("*.jsonl")]
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cells(markdown: str) -> dict[str, list[str]]:
    """First cell of each row of the last Markdown table -> the others."""
    last = markdown[markdown.rindex("| --- ") :]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in last.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[1:]}


# SCoRe ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def scored(toy, tmp_path_factory) -> tuple[Path, str]:
    """Folder of the results, and what was printed."""
    out = tmp_path_factory.mktemp("score")
    return out, call("score", toy, f"OUT={out}", "TOKEN_BUDGET=1500")


def test_score_trains_what_the_paper_says_on_one_budget(scored, toy):
    seed = scored[0] / "seed-0"
    config = {run: json.loads((seed / run / "config.json").read_text()) for run in score.MODELS if run != "warm_start"}
    assert {run: c["rollout.REWARD"] for run, c in config.items()} == {
        "score_stage1": "score_stage1",
        "score_stage2": "score_stage2",
        "multi_turn": "per_attempt",
        "single_turn": "per_attempt",
    }
    assert config["score_stage1"]["ppo.KL_COEF"] == [score.BETA_2, score.BETA_1]
    assert all(c["ppo.KL_COEF"] == [score.BETA_1] for run, c in config.items() if run != "score_stage1")
    assert config["score_stage2"]["ppo.MODEL"] == str(seed / "score_stage1/policy")
    assert config["score_stage2"]["ppo.REFERENCE"] == str(toy / "warm_start")
    for run, c in config.items():
        assert (c["ppo.ESTIMATOR"], c["ppo.ATTEMPT_GAMMA"], c["rollout.PROMPT"]) == ("rloo", 0.0, "single_turn")
        attempts = [row["attempts_used"] for row in lines(seed / run / "metrics.jsonl")]
        assert set(attempts) == {1.0 if run == "single_turn" else 2.0}
    last = {run: lines(seed / run / "metrics.jsonl")[-1] for run in config}
    spent = {run: row["generated_tokens"] for run, row in last.items()}
    spent["SCoRe"] = spent.pop("score_stage1") + spent.pop("score_stage2")
    largest = max(row["generated"] for run in config for row in lines(seed / run / "metrics.jsonl"))
    assert all(1500 <= tokens < 1500 + 2 * largest for tokens in spent.values())  # whole rollouts


def test_score_says_what_was_played(scored):
    """Every number again, from the dialogues."""
    results = json.loads((scored[0] / "results.json").read_text())
    shown = cells(scored[1])
    assert shown == cells((scored[0] / "table.md").read_text())
    for name, label in score.MODELS.items():
        played = [r["attempts"] for r in lines(scored[0] / f"seed-0/evaluation/dialogues-{name}.jsonl")]
        assert len(played) == results["n"] == 40 and all(len(attempts) == 2 for attempts in played)
        right = [[a["status"] == "correct" for a in attempts] for attempts in played]
        counts = [
            sum(first for first, _ in right),
            sum(second for _, second in right),
            sum(second - first for first, second in right),
            sum(second and not first for first, second in right),
            sum(first and not second for first, second in right),
            sum(first["answer"] != second["answer"] for first, second in played),  # whole numbers: equal as text
        ]
        measured = results["models"][name]
        assert [x["value"] for x in measured.values()] == pytest.approx([count / 40 for count in counts])
        assert all(x["low"] - 1e-12 <= x["value"] <= x["high"] + 1e-12 for x in measured.values())  # 0 of 40: rounding
        numbers = [[float(x) for x in cell.split(" ±")] for cell in shown[label]]
        assert [value for value, _ in numbers] == pytest.approx([2.5 * count for count in counts], abs=0.051)
        for (_, half), x in zip(numbers, measured.values(), strict=True):
            assert half == pytest.approx(100 * max(x["high"] - x["value"], x["value"] - x["low"]), abs=0.051)
    for pair, by_attempt in results["differences"].items():
        a, b = (results["models"][name] for name in pair.split(" - "))
        for column, x in by_attempt.items():
            assert x["value"] == pytest.approx(a[column]["value"] - b[column]["value"])
            assert x["low"] <= x["value"] <= x["high"]
    drawn = lines_of(scored[0] / "accuracy.svg")
    for place, name in enumerate(score.MODELS):
        values = [results["models"][name][column]["value"] for column in ("Acc@t1", "Acc@t2")]
        assert [y for _, y in drawn[f"curve-0-{place}"]] == pytest.approx(values, abs=2e-3)
    assert results["meaning"] in scored[1]


def test_score_does_nothing_twice(scored, toy):
    out, printed = scored
    before = trained(out)
    assert call("score", toy, f"OUT={out}", "TOKEN_BUDGET=1500").split("minutes")[0] == printed.split("minutes")[0]
    assert trained(out) == before


def test_difference_is_the_first_less_the_second():
    found = {"benchmark": "test", "models": ["x", "y"], "difference": [0.5, 0.25], "low": [0.25, 0], "high": [0.75, 1]}
    assert score.difference([found], "y", "x")["Acc@t1"] == {"value": 0.5, "low": 0.25, "high": 0.75}
    assert score.difference([found], "x", "y")["Acc@t2"] == {"value": -0.25, "low": -1, "high": 0}


@pytest.mark.parametrize(("low", "high", "said"), [(0.01, 0.2, "above"), (-0.2, -0.01, "below"), (-0.1, 0.1, "noise")])
def test_meaning_follows_the_intervals(low, high, said):
    about = {"value": (low + high) / 2, "low": low, "high": high}
    models = {name: dict.fromkeys(score.COLUMNS, about) for name in score.MODELS}
    pairs = {f"{a} - {b}": {"Acc@t1": about, "Acc@t2": about} for a, b in score.PAIRS}
    text = score.meaning({"models": models, "differences": pairs, "ideal": 0.5})
    words = {
        "above": "SCoRe is above plain",
        "below": "SCoRe is below plain",
        "noise": "SCoRe is within noise of plain",
    }
    better = {"above": "better than", "below": "worse than", "noise": "not to be told apart from"}
    assert words[said] in text and text.count(better[said]) == 2
    assert not any(word in text for other, word in words.items() if other != said)


# Ablations -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ablated(toy, tmp_path_factory) -> tuple[Path, str, str]:
    """Folder of the results, and what was printed with one seed, then with another one added."""
    out = tmp_path_factory.mktemp("ablations")
    shared = (f"OUT={out}", "TOKEN_BUDGET=700", "ONLY=rloo")
    one = call("ablations", toy, *shared, "SEEDS=1")
    before = trained(out)
    two = call("ablations", toy, *shared, "SEEDS=1,2")
    after = trained(out)
    assert before.items() <= after.items() and len(after) == 2 * len(before)  # nothing of seed 1 was done again
    return out, one, two


def test_ablations_train_what_their_rows_say(ablated):
    for seed in (1, 2):
        config = {
            row: json.loads((ablated[0] / f"seed-{seed}/{row}/config.json").read_text()) for row in ("base", "rloo")
        }
        different = {name for name in config["base"] if config["base"][name] != config["rloo"][name]}
        assert different == {"ppo.ESTIMATOR", "rollout.SAMPLES_PER_PROMPT", "ppo.RUN"}
        assert config["base"]["ppo.SEED"] == seed and config["base"]["ppo.TOKEN_BUDGET"] == 700


def test_ablations_show_what_was_measured(ablated, tmp_path, monkeypatch):
    out, one, two = ablated
    results = json.loads((out / "results.json").read_text())
    measured = [json.loads((out / f"seed-{seed}/evaluation/results.json").read_text())["models"] for seed in (1, 2)]

    def values(row: str, column: str) -> list[float]:
        metric, k = ablations.COLUMNS[column]
        tests = [models[row]["test"] for models in measured]
        return [t["accuracy"][k - 1] if metric == "accuracy" else t["metrics"][metric]["value"][k - 1] for t in tests]

    for column in ablations.COLUMNS:
        a, b = values("rloo", column), values("base", column)
        ahead = [x - y for x, y in zip(a, b, strict=True)]
        x = results["rows"]["rloo"][column]
        half = 12.706 * abs(ahead[0] - ahead[1]) / 2  # t with one degree of freedom times s / sqrt(2), by hand
        expected = [sum(a) / 2, sum(ahead) / 2, sum(ahead) / 2 - half, sum(ahead) / 2 + half]
        assert list(x.values()) == pytest.approx(expected, abs=2e-6)
        number = 2 * list(ablations.COLUMNS).index(column)
        assert float(cells(two)["rloo"][number]) == pytest.approx(100 * expected[0], abs=0.051)
        shown = [float(n) for n in cells(two)["rloo"][number + 1].split(" ±")]
        assert shown == pytest.approx([100 * expected[1], 100 * half], abs=0.051)
    assert cells(two) == cells((out / "table.md").read_text())
    assert cells(one)["rloo"][-1] == "one seed: unknown" and "±" not in one.split("\n\n")[0]

    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    ablations.draw(results, tmp_path)
    for axes, column in zip(drawn[0].axes, ablations.COLUMNS, strict=True):
        x = results["rows"]["rloo"][column]
        points = [100 * x[name] for name in ("low", "difference", "high")]
        assert list(axes.lines[0].get_xdata()) == pytest.approx(points)
    assert all(">rloo<" in (folder / "ablations.svg").read_text() for folder in (tmp_path, out))


def test_noise_is_called_noise():
    """A row that is behind by about as much for each seed, one that is ahead once, behind once, one that is equal."""
    draw = random.Random(0)
    seeds = {}
    for seed, (steady, shaky) in zip("123", [(0.10, 0.3), (0.11, -0.3), (0.12, 0.01)], strict=True):
        base = draw.random()
        ahead = {"base": 0.0, "LAMBDA=1": -steady, "rloo": shaky, "grpo": 0.0}
        seeds[seed] = {row: dict.fromkeys(ablations.COLUMNS, base + more) for row, more in ahead.items()}
    results = {"rows": ablations.summarise(seeds), "seeds": seeds}
    said = {row: shown[-1] for row, shown in cells(ablations.table(results)).items()}
    every = ", ".join(ablations.COLUMNS)
    assert said == {"base": "", "LAMBDA=1": every, "rloo": "within noise", "grpo": "within noise"}
    half = 4.303 * 0.01 / 3**0.5  # the deviation of .10, .11, .12 is .01
    assert results["rows"]["LAMBDA=1"]["at 1"]["low"] == pytest.approx(-0.11 - half, abs=1e-6)


def test_rows_are_known_and_their_arguments_too(monkeypatch):
    for arguments in ablations.ABLATIONS.values():
        constants = demo.constants_of(["PRESET=toy", *arguments])
        assert constants["ppo.PRESET"].startswith("toy")
    assert len({json.dumps(demo.constants_of(["PRESET=toy", *a])) for a in ablations.ABLATIONS.values()}) == len(
        ablations.ABLATIONS
    )
    monkeypatch.setattr(ablations, "ONLY", "grpo,LAMBDA=1")
    assert ablations.chosen() == ["base", "LAMBDA=1", "grpo"]
    monkeypatch.setattr(ablations, "ONLY", "LAMBDA=7")
    with pytest.raises(SystemExit, match="no row LAMBDA=7; there are base, MAX_ATTEMPTS=1"):
        ablations.chosen()


# data/demo.py: what both are made of ----------------------------------------------------------------------------------
def test_constants_are_read_without_being_changed():
    import ppo
    import rollout

    before = [(m, name, getattr(m, name)) for m in (ppo, rollout) for name in m.__annotations__]
    constants = demo.constants_of(["PRESET=toy,score_stage1", "LAMBDA=0.5", "RUN=x"])
    assert (constants["ppo.LAMBDA"], constants["rollout.REWARD"]) == (0.5, "score_stage1")
    with pytest.raises(SystemExit, match="nearest is LAMBDA"):
        demo.constants_of(["LAMBDA=0.5", "LAMDA=1"])
    assert all(getattr(m, name) is value for m, name, value in before)


def test_a_wrong_training_stops_before_any_starts(tmp_path):
    good, bad = (demo.Training(name, tmp_path / name, argument) for name, argument in (("a", []), ("b", ["STEPS=x"])))
    with pytest.raises(SystemExit, match="STEPS=x"):
        demo.train([good, bad])
    assert not list(tmp_path.iterdir())


def test_a_training_without_a_policy_is_a_failure(tmp_path):
    run = demo.Training("a", tmp_path / "a", [])
    run.log.write_text("step 3\nstopped by SIGTERM behind step 3\n")
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(SystemExit, match=re.escape("stopped by SIGTERM behind step 3")):
        run.check_end(ended)
    (run.folder / "policy").mkdir(parents=True)
    run.check_end(ended)


@pytest.mark.parametrize("text", ["", "1,1", "a", "1,", ",".join(map(str, range(11)))])
def test_seeds_are_different_numbers(text):
    with pytest.raises(SystemExit, match="expected up to 10 different numbers"):
        demo.parse_seeds(text)
