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
def test_what_needs_no_engine(ranks, change, tmp_path, capsys, stage):
    modules = {"smoke": smoke, "bench": bench} | smoke.ppo.MODULES
    for name, value in snapshot(modules).items():  # to be restored when the test ends
        module, _, constant = name.partition(".")
        change(modules[module], **{constant: value})
    change(varlen, varlen_attn=varlen_on_cpu)
    dtype = "bfloat16" if stage == "gradient" else "float32"
    arguments = ["PRESET=cpu", "LONGEST=128", f"COMPUTE_DTYPE={dtype}", f"STAGE={stage}"]
    set_constants(arguments, modules, smoke.PRESETS)
    smoke.STAGES[stage](tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {stage} |")]
    assert rows and all(row.endswith("yes |") for row in rows), rows
    if stage == "gradient":  # it is measured, not compared with itself
        assert all(float(row.split("|")[3]) > 0 for row in rows)


def test_engine_and_trainer_in_turn(toy):
    done = run_python(ROOT / "tests/smoke_gpu.py", "PRESET=cpu", "STAGE=engine", f"MODEL={toy / 'warm_start'}")
    rows = [line for line in done.stdout.splitlines() if line.startswith("| engine |")]
    assert len(rows) == 9 and all(row.endswith("yes |") for row in rows), rows


def test_a_check_that_fails_is_in_its_row(change, capsys):
    change(smoke, STAGE="update")
    smoke.check("speed", 0.94, low=0.95)
    smoke.check("gap", float("nan"), 0, 0.02)
    assert capsys.readouterr().out.splitlines() == [
        "| update | speed | 0.94 | >= 0.95 | NO |",
        "| update | gap | nan | >= 0 and <= 0.02 | NO |",
    ]
