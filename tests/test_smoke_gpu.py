"""tests/smoke_gpu.py where there is no GPU: both stages run, in small, and what a CPU can show holds."""

from plumbing.constants import set_constants
from tests import smoke_gpu as smoke
from tests.conftest import ROOT, run_python


def test_gradients(ranks, restored_constants, tmp_path, capsys):
    set_constants(
        ["PRESET=cpu", "LONGEST=128", "COMPUTE_DTYPE=bfloat16", "STAGE=gradient"], smoke.MODULES, smoke.PRESETS
    )
    smoke.try_gradient(tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| gradient |")]
    assert len(rows) == 2 and all(row.endswith("yes |") for row in rows), rows
    assert all(float(row.split("|")[3]) > 0 for row in rows)  # measured, not compared with itself


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
