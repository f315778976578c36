"""plumbing/constants.py and files.py: what a command line may change, what a start prints, which runs may be resumed;
files that are whole or not there; and who may import whom."""

import ast
import json
from types import ModuleType

import ppo
from plumbing import constants
from plumbing.constants import check_early, code_version, open_run, set_constants, snapshot
from plumbing.files import append_jsonl, write_atomically
from plumbing.presets import PRESETS
from tests.conftest import ROOT, run_python

import pytest

TRAINER = """
from typing import Literal
from plumbing.constants import Count, Share
PRESET: str = ""
STEPS: int = 3
BETAS: tuple[float, float] = (0.9, 0.95)
KL_COEF: tuple[float, ...] = (0.1,)
WHITEN: bool = True
WARMUP: Share = 0.5
DIALOGUES: Count = 8
REWARD: Literal["outcome", "per_attempt"] = "outcome"
lower_case: int = 1
UNTYPED = 1
"""
SMALL = {"small": {"STEPS": 1, "rollout.NAME": "y"}, "slow": {"STEPS": 30, "BETAS": (0.5, 0.6)}, "old": {"STEP": 1}}


@pytest.fixture
def modules() -> dict[str, ModuleType]:
    made = {"ppo": ModuleType("ppo"), "rollout": ModuleType("rollout")}
    exec(TRAINER, vars(made["ppo"]))
    exec("STEPS: int = 5\nNAME: str = 'x'", vars(made["rollout"]))
    return made


# NAME=value -----------------------------------------------------------------------------------------------------------
REFUSED = [
    ("STEP=1", "STEP: no such constant; the nearest is STEPS"), ("STEPS", "STEPS: expected NAME=value"),
    ("rollout.STEP=1", "rollout.STEP: no such constant; the nearest is rollout.STEPS"),
    ("STEPS=1.5", "STEPS=1.5: expected int"), ("WHITEN=maybe", "WHITEN=maybe: expected bool"),
    ("BETAS=0.9", r"BETAS=0.9: expected tuple\[float, float\]"),
    ("WARMUP=1.5", "WARMUP=1.5: expected a number from 0 to 1"), ("WARMUP=nan", "WARMUP=nan: expected a number from"),
    ("DIALOGUES=0", "DIALOGUES=0: expected a number from 1 to inf"),
    ("REWARD=score", "REWARD=score: expected 'outcome' or 'per_attempt'"),
    ("PRESET=large", "PRESET=large: no such preset; there are small, slow, old"),
    ("PRESET=old", "STEP: no such constant; the nearest is STEPS"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "message"), REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(modules, argument, message):
    before = snapshot(modules)
    with pytest.raises(SystemExit, match=f"^{message}"):
        set_constants(["DIALOGUES=4", argument], modules, SMALL)
    assert snapshot(modules) == before


def test_a_file_whose_own_value_does_not_fit_is_refused(modules):
    right = dict(vars(modules["ppo"]))
    wrong = {"REWARD": "score", "WARMUP": 2.0, "STEPS": 2.5, "DIALOGUES": 2.5, "KL_COEF": 0.1, "BETAS": None}
    for name, value in wrong.items():
        vars(modules["ppo"]).update(right | {name: value})
        with pytest.raises(SystemExit, match=f"^ppo.{name}={value}: expected "):
            set_constants([], modules)


def test_presets_apply_in_order_and_a_start_says_who_changed_what(modules):
    assert set_constants([], modules, SMALL) == ""
    said = set_constants(["PRESET=small,slow", "BETAS=0.9,0.95", "WHITEN=0"], modules, SMALL)
    assert said.splitlines() == [  # the command line has the last word; BETAS is what the file says
        "ppo.STEPS = 30 (preset slow; the file says 3)",
        "rollout.NAME = 'y' (preset small; the file says 'x')",
        "ppo.PRESET = 'small,slow' (command line; the file says '')",
        "ppo.WHITEN = False (command line; the file says True)",
    ]
    now = snapshot(modules)  # a bare name is that of the first module which has it
    assert (now["ppo.STEPS"], now["rollout.STEPS"], now["ppo.BETAS"]) == (30, 5, (0.9, 0.95))
    assert len(now) == 10 and not {"ppo.lower_case", "ppo.UNTYPED"} & set(now)
    modules["ppo"].PRESET = "small"  # as if the file named it
    assert set_constants([], modules, SMALL) == "ppo.STEPS = 1 (preset small; the file says 30)"


def test_what_is_checked_before_torch_is_imported_is_what_is_changed_later():
    """Every constant of the trainer is known then, with its value, and so is every preset."""
    values = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in snapshot(ppo.MODULES).items()}
    for preset in PRESETS:
        arguments = [f"PRESET={preset}", *(f"{name}={value}" for name, value in values.items())]
        check_early(arguments, ("ppo", "rollout", "grader"), PRESETS)


# What a run keeps -----------------------------------------------------------------------------------------------------
def test_a_run_is_resumed_with_what_it_began_with(tmp_path, monkeypatch, change, capsys):
    folder, problems = tmp_path / "runs/one", tmp_path / "p.jsonl"
    values = {"ppo.STEPS": 3, "ppo.BETAS": (0.9, 0.95), "engine.GPU_MEMORY": 0.5}

    def start(changes: dict | None = None, text: str = "{}\n") -> dict:
        problems.write_text(text)
        open_run(folder, values | (changes or {}), problems)
        return json.loads((folder / "config.json").read_text())

    start({"ppo.STEPS": 4})
    config = start()  # no step was made: it begins anew
    assert (config["ppo.STEPS"], config["ppo.BETAS"], config["code"]) == (3, [0.9, 0.95], code_version())
    append_jsonl(folder / "metrics.jsonl", [{"step": 1}])
    assert start() == start({"engine.GPU_MEMORY": 0.4, "engine.NEW": 1}) == config  # what began is kept
    message = r"is a run with other constants.*\n  ppo.STEPS: 3 there, 4 now\n  ppo.NEW: None there, 1 now$"
    with pytest.raises(SystemExit, match=message):
        start({"ppo.STEPS": 4, "ppo.NEW": 1})
    with pytest.raises(SystemExit, match=r"\n  SHA-256 of the problems: \w{64} there, \w{64} now$"):
        start(text="{} \n")
    change(constants, code_version=lambda: "abc")
    for rank in ("1", "0"):  # the first rank speaks for all
        assert capsys.readouterr().out == ""
        monkeypatch.setenv("RANK", rank)
        start()
    assert f"began with code {config['code']}, this is abc: its numbers may differ" in capsys.readouterr().out


# Files ----------------------------------------------------------------------------------------------------------------
def test_a_file_is_there_in_full_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    write_atomically(path, "½")
    with monkeypatch.context() as patched, pytest.raises(TypeError):
        patched.setattr("os.fsync", None)  # a disk that fails
        write_atomically(path, "another")
    assert path.read_text(encoding="utf-8") == "½"
    write_atomically(path, "another")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("table.md", "another")]


# The house ------------------------------------------------------------------------------------------------------------
BELOW = ["grader", "rollout", "plumbing", "data.problems"]
MAY_IMPORT = {  # of our own modules
    "plumbing/*.py": ["plumbing", "data.problems"], "data/problems.py": ["plumbing"],
    "data/prepare.py": ["plumbing", "data.problems", "grader"], "grader.py": ["plumbing"],
    "rollout.py": ["grader", "plumbing", "data.problems"], "evaluate.py": BELOW, "ppo.py": BELOW,
    "experiments/*.py": [*BELOW, "ppo", "evaluate", "experiments"],
}  # fmt: skip


def test_imports_run_one_way():
    files = {path: allowed for pattern, allowed in MAY_IMPORT.items() for path in ROOT.glob(pattern)}
    assert set(files) == {path for pattern in ("*.py", "[pde]*/*.py") for path in ROOT.glob(pattern)}
    ours = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files} | {"tests"}
    for path, allowed in files.items():
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {f"{getattr(n, 'module', '')}.{alias.name}.".lstrip(".") for n in nodes for alias in n.names}
        foreign = {n for n in names if n.split(".")[0] in ours and not n.startswith(tuple(f"{a}." for a in allowed))}
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


@pytest.mark.parametrize("stage", ["rollout", "evaluate", "ppo"])
def test_a_mistyped_constant_stops_a_start_before_torch_is_imported(stage):
    program = f"import runpy; runpy.run_path('{stage}.py', run_name='__main__')"
    program = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {program}"
    done = run_python("-c", program, "MAX_ATTEMPT=3", code=1)
    assert done.stdout == "False\n"
    assert done.stderr == "MAX_ATTEMPT: no such constant; the nearest is MAX_ATTEMPTS\n"
