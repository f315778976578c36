"""tests/smoke_gpu.py where there is no GPU: every stage but the last runs, in small, and what a CPU can show holds.

(The last, a run that is killed and resumed, is held by test_runs.py.)
"""

from plumbing.constants import set_constants, snapshot
from tests import bench_ppo as bench
from tests import smoke_gpu as smoke
from tests.conftest import ROOT, run_python
from tests.test_packing import varlen_on_cpu

import pytest
from torch.nn.attention import varlen


@pytest.mark.parametrize("stage", ["attention", "gradient", "update"])
def test_what_needs_no_engine(ranks, change, tmp_path, stage):
    modules = {"smoke": smoke, "bench": bench} | smoke.ppo.MODULES
    for name, value in snapshot(modules).items():  # to be restored when the test ends
        module, _, constant = name.partition(".")
        change(modules[module], **{constant: value})
    change(varlen, varlen_attn=varlen_on_cpu)
    dtype = "bfloat16" if stage == "gradient" else "float32"
    set_constants(["PRESET=cpu", "LONGEST=128", f"COMPUTE_DTYPE={dtype}"], modules, smoke.PRESETS)
    checks = list(smoke.STAGES[stage](tmp_path))
    assert checks and all(check.passed() for check in checks), checks
    if stage == "gradient":  # it is measured, not compared with itself
        assert all(check.value > 0 for check in checks)


def test_engine_and_trainer_in_turn(toy):
    done = run_python(ROOT / "tests/smoke_gpu.py", "PRESET=cpu", "STAGE=engine", f"MODEL={toy / 'warm_start'}")
    rows = [line for line in done.stdout.splitlines() if line.startswith("| engine |")]
    assert len(rows) == 9 and all(row.endswith("yes |") for row in rows), rows


def test_a_check_that_fails_is_in_its_row(change):
    change(smoke, STAGE="update")
    assert smoke.Check("speed", 0.94, low=0.95).row() == "| update | speed | 0.94 | >= 0.95 | NO |"
    assert smoke.Check("gap", float("nan"), 0, 0.02).row() == "| update | gap | nan | >= 0 and <= 0.02 | NO |"
