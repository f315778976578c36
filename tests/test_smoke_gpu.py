"""tests/smoke_gpu.py where there is no GPU: every stage but the last runs, in small, and what a CPU can show holds.

(The last, a run that is killed and resumed, is held by test_runs.py.)
"""

from plumbing import engine
from plumbing.constants import set_constants, snapshot
from tests import bench_ppo as bench
from tests import smoke_gpu as smoke
from tests.conftest import ROOT, run_python
from tests.test_packing import varlen_on_cpu

import pytest
import torch
from torch.nn.attention import varlen


@pytest.fixture
def small(ranks, monkeypatch):
    """The constants of PRESET=cpu, until the test ends."""
    modules = {"smoke": smoke, "bench": bench} | smoke.ppo.MODULES
    for name, value in snapshot(modules).items():
        module, _, constant = name.partition(".")
        monkeypatch.setattr(modules[module], constant, value)
    set_constants(["PRESET=cpu"], modules, smoke.PRESETS)


@pytest.mark.parametrize("stage", ["head", "attention", "gradient", "update"])
def test_what_needs_no_engine(small, change, monkeypatch, tmp_path, stage):
    change(varlen, varlen_attn=varlen_on_cpu)
    change(smoke.ppo, COMPUTE_DTYPE="bfloat16" if stage == "gradient" else "float32")
    monkeypatch.setitem(bench.PRESETS["cpu"], "LONGEST", 128)
    checks = list(smoke.STAGES[stage](tmp_path))
    assert checks and all(check.passed() for check in checks), checks
    if stage == "gradient":  # it is measured, not compared with itself
        assert all(check.value > 0 for check in checks)


def test_engine_and_trainer_in_turn(toy):
    done = run_python(ROOT / "tests/smoke_gpu.py", "PRESET=cpu", "STAGE=engine", f"MODEL={toy / 'warm_start'}")
    rows = [line for line in done.stdout.splitlines() if line.startswith("| engine |")]
    assert len(rows) == 10 and all(row.endswith("yes |") for row in rows), rows


def test_a_check_that_fails_is_in_its_row(change):
    change(smoke, STAGE="head")
    assert smoke.Check("speed", 0.94, low=0.95).row() == "| head | speed | 0.94 | >= 0.95 | NO |"
    assert smoke.Check("gap", float("nan"), 0, 0.02).row() == "| head | gap | nan | >= 0 and <= 0.02 | NO |"
    assert smoke.on_gpu("speed", 0.94, low=0.95).passed() != torch.cuda.is_available()
    assert not engine.find_gpu()
