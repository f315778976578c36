"""experiments/score.py and ablations.py from end to end at a tiny size: what they show is what was played."""

import json
import subprocess
import sys
from pathlib import Path

import ppo
from experiments import ablations, arrows, score
from plumbing.constants import parse_changes, snapshot
from plumbing.files import read_jsonl
from tests.conftest import ROOT, alone

import pytest

TINY = "DIALOGUES=32 MINI_BATCH=16 EPOCHS=1 SAVE_EVERY=100"
PROGRAM = """
import sys
from pathlib import Path
from experiments import {module}, runs
world = Path(sys.argv.pop())
runs.make_world = lambda module, out, *arguments: world
{module}.main()
"""


def call(module: str, world: Path, *given: str) -> str:
    """What it prints, in a process of its own, in this world."""
    arguments = [*given, f"TRAINING={TINY}", "EVALUATION_RANKS=1", str(world)]
    command = [sys.executable, "-c", PROGRAM.format(module=module), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def list_files(folder: Path) -> dict[Path, tuple[int, int]]:
    """When each file of the trainings and of the dialogues was written, and how long it is."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.jsonl")]
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}


def read_table(markdown: str) -> dict[str, list[str]]:
    """First cell of each row of the first Markdown table -> the others."""
    first = markdown[markdown.index("| --- ") :].split("\n\n")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in first.splitlines()]
    return {row[0]: row[1:] for row in rows[1:]}


# SCoRe ----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Arrows, after a warm start of seconds: the model has learned how answers look."""
    out = tmp_path_factory.mktemp("world") / "arrows"
    small = ["WARM_STEPS=100", "TRAIN_PROBLEMS=300", "TEST_PROBLEMS=40"]
    command = [sys.executable, "-m", "experiments.arrows", f"OUT={out}", *small]
    subprocess.run(command, cwd=ROOT, env=alone(), check=True)
    return out


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory) -> tuple[Path, str]:
    """Folder of the results, and what was printed."""
    out = tmp_path_factory.mktemp("score")
    return out, call("score", world, f"OUT={out}", "TOKEN_BUDGET=1500")


def test_score_trains_what_the_paper_says_on_one_budget(scored, world):
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
    assert config["score_stage2"]["ppo.REFERENCE"] == str(world / "warm_start")
    spent = {}
    for run, c in config.items():
        assert (c["ppo.ESTIMATOR"], c["ppo.ATTEMPT_GAMMA"], c["rollout.PROMPT"]) == ("rloo", 0.0, "single_turn")
        rows = read_jsonl(seed / run / "metrics.jsonl")
        assert {row["attempts_used"] for row in rows} == {1.0 if run == "single_turn" else 2.0}
        spent[run] = rows[-1]["generated_tokens"]
    spent["SCoRe"] = spent.pop("score_stage1") + spent.pop("score_stage2")
    assert all(1500 <= tokens < 2500 for tokens in spent.values())  # whole rollouts


def test_score_says_what_was_played(scored, world):
    """Every number again, from the dialogues."""
    lengths = {p["id"]: len(arrows.read_question(p["question"])) - 1 for p in read_jsonl(world / "test.jsonl")}
    results = json.loads((scored[0] / "results.json").read_text())
    shown = read_table(scored[1])
    assert shown == read_table((scored[0] / "table.md").read_text()) and results["meaning"] in scored[1]
    for name, label in score.MODELS.items():
        records = read_jsonl(scored[0] / f"seed-0/evaluation/dialogues-{name}.jsonl")
        played = [r["attempts"] for r in records]
        two = [r["attempts"][1]["status"] == "correct" for r in records if lengths[r["id"]] == 2]
        assert results["by_arrows"][name]["2"]["Acc@t2"]["value"] == pytest.approx(sum(two) / len(two))
        assert len(played) == results["n"] == 40 and all(len(attempts) == 2 for attempts in played)
        assert any(
            f"{label}: {a['text']} [{a['status']}] then{b['text']} [{b['status']}]" in scored[1] for a, b in played
        )
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


def test_curves_are_what_was_trained(scored):
    out, curves = scored[0], json.loads((scored[0] / "results.json").read_text())["curves"]
    rows = [row for run in ("score_stage1", "score_stage2") for row in read_jsonl(out / f"seed-0/{run}/metrics.jsonl")]
    seconds = curves["score_stage2"]["accuracy_at_2"]
    assert seconds[0] == rows[0]["accuracy_at_2"] and {*seconds} <= {row["accuracy_at_2"] for row in rows}
    assert curves["single_turn"].keys() == {"accuracy_at_1"} and (out / "curves.svg").is_file()


def test_score_does_nothing_twice(scored, world):
    out, printed = scored
    before = list_files(out)
    assert call("score", world, f"OUT={out}", "TOKEN_BUDGET=1500").split("Made by")[0] == printed.split("Made by")[0]
    assert list_files(out) == before


def test_differences_are_the_first_minus_the_second():
    found = {"benchmark": "test", "models": ["x", "y"], "difference": [0.5, 0.25], "low": [0.25, 0], "high": [0.75, 1]}
    assert score.select_difference([found], "y", "x")["Acc@t1"] == {"value": 0.5, "low": 0.25, "high": 0.75}
    assert score.select_difference([found], "x", "y")["Acc@t2"] == {"value": -0.25, "low": -1, "high": 0}


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.01, 0.2, "is above plain"), (-0.2, -0.01, "is below plain"), (-0.1, 0.1, "is within noise of plain")],
)
def test_words_follow_the_intervals(low, high, words):
    about = {"value": (low + high) / 2, "low": low, "high": high}
    pairs = {f"{a} - {b}": {"Acc@t1": about, "Acc@t2": about} for a, b in score.PAIRS}
    assert f"SCoRe {words}" in score.describe_results({"differences": pairs, "ideal": [0.5, 1.0]})


def test_ablations_are_score_with_one_change(change):
    """Stage I and II spend SCoRe's budget together; each second stage begins from the policy of its first."""
    change(score, METHODS=tuple(score.NAMES))
    trainings = {t.folder.name: t for t in score.list_trainings(3, Path("world"), Path("runs/s"))}
    config = {
        run: {name: change.value for name, change in parse_changes(t.arguments, ppo.MODULES, ppo.PRESETS).items()}
        for run, t in trainings.items()
    }
    second = config["score_stage2"]
    differs = {
        run: {name: value for name, value in config[run].items() if value != second.get(name) and name != "ppo.RUN"}
        for run in score.ABLATIONS
    }
    assert differs["alpha_0"] == {"rollout.SCORE_ALPHA": 0.0} and differs["alpha_1"] == {"rollout.SCORE_ALPHA": 1.0}
    assert differs["loose_stage2"] == {"ppo.MODEL": "runs/s/loose_stage1/policy"}
    assert differs["stage2_alone"] == {"ppo.MODEL": "world/warm_start", "ppo.TOKEN_BUDGET": score.TOKEN_BUDGET}
    stage_1, loose = config["score_stage1"], config["loose_stage1"]
    assert {name for name in stage_1 if stage_1[name] != loose[name]} == {"ppo.KL_COEF", "ppo.RUN"}
    assert loose["ppo.KL_COEF"] == (score.BETA_1,)
    assert all(t.after == Path(f"runs/s/{score.AFTER[run]}") for run, t in trainings.items() if t.after)


# Ablations ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ablated(toy, tmp_path_factory) -> tuple[Path, str]:
    """Folder of the results, and what was printed."""
    out = tmp_path_factory.mktemp("ablations")
    return out, call("ablations", toy, f"OUT={out}", "TOKEN_BUDGET=700", "ONLY=rloo", "SEEDS=1,2")


def test_ablations_train_what_their_rows_say(ablated):
    for seed in (1, 2):
        folder = ablated[0] / f"seed-{seed}"
        base, rloo = (json.loads((folder / row / "config.json").read_text()) for row in ("base", "rloo"))
        different = {name for name in base if base[name] != rloo[name]}
        assert different == {"ppo.ESTIMATOR", "rollout.SAMPLES_PER_PROMPT", "ppo.RUN"}
        assert base["ppo.SEED"] == seed and base["ppo.TOKEN_BUDGET"] == 700


def test_ablations_show_what_was_measured(ablated):
    out, printed = ablated
    results = json.loads((out / "results.json").read_text())
    measured = [json.loads((out / f"seed-{seed}/evaluation/results.json").read_text())["models"] for seed in (1, 2)]
    shown = read_table(printed)["rloo"]
    for place, (column, (metric, k)) in enumerate(ablations.COLUMNS.items()):
        a, b = ([m[row]["test"]["metrics"][metric]["value"][k - 1] for m in measured] for row in ("rloo", "base"))
        first, second = (x - y for x, y in zip(a, b, strict=True))
        mean, half = (first + second) / 2, 12.706 * abs(first - second) / 2  # t(1) times s / sqrt(2), by hand
        x = results["differences"]["rloo"][column]
        assert [x["value"], x["low"], x["high"]] == pytest.approx([mean, mean - half, mean + half], abs=2e-6)
        assert results["values"]["rloo"][column] == pytest.approx(sum(a) / 2, abs=2e-6)
        assert float(shown[2 * place]) == pytest.approx(50 * sum(a), abs=0.051)
        numbers = [float(number) for number in shown[2 * place + 1].split(" ±")]
        assert numbers == pytest.approx([100 * mean, 100 * half], abs=0.051)
    assert read_table(printed) == read_table((out / "table.md").read_text())


def test_noise_is_called_noise():
    """An interval that contains zero or touches it is noise; one beyond it, on either side, is not."""
    bounds = {
        "base": (0.0, 0.0),
        "LAMBDA=1": (-0.2, -0.1),
        "rloo": (-0.3, 0.3),
        "grpo": (0.0, 0.1),
        "WHITEN=0": (0.1, 1),
    }
    differences = {
        row: {column: {"value": (low + high) / 2, "low": low, "high": high} for column in ablations.COLUMNS}
        for row, (low, high) in bounds.items()
    }
    values = {row: dict.fromkeys(ablations.COLUMNS, 0.5) for row in bounds}
    results = {"values": values, "differences": differences, "seeds": {"1": {}, "2": {}}}
    words = {row: cells[-1] for row, cells in read_table(ablations.make_table(results)).items()}
    every, noise = ", ".join(ablations.COLUMNS), "within noise"
    assert words == {"base": "", "LAMBDA=1": every, "rloo": noise, "grpo": noise, "WHITEN=0": every}
    for columns in differences.values():
        for x in columns.values():
            x |= {"low": None, "high": None}
    table = ablations.make_table(results | {"seeds": {"1": {}}})
    assert read_table(table)["rloo"][-1] == "one seed: unknown" and "±" not in table


def test_rows_are_known_and_so_are_their_arguments(monkeypatch):
    made = set()
    for arguments in ablations.ABLATIONS.values():
        changes = parse_changes(["PRESET=toy", *arguments], ppo.MODULES, ppo.PRESETS)
        made.add(json.dumps(snapshot(ppo.MODULES) | {name: change.value for name, change in changes.items()}))
    assert len(made) == len(ablations.ABLATIONS)  # each row is another experiment
    monkeypatch.setattr(ablations, "ONLY", "grpo,LAMBDA=1")
    assert ablations.choose_rows() == ["base", "LAMBDA=1", "grpo"]
    monkeypatch.setattr(ablations, "ONLY", "LAMBDA=7")
    with pytest.raises(SystemExit, match="no row LAMBDA=7; there are base, MAX_ATTEMPTS=1"):
        ablations.choose_rows()
