"""Fixtures: a small toy world that is made once, and the real engine on it. Each test file also runs alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # vLLM compiles a count of ranks, for seconds, in each process


def alone() -> dict[str, str]:
    """The environment without this process's own process group."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in group} | {"PYTHONPATH": str(ROOT)}


def run_python(*arguments: object, cwd: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess:
    """A Python process with these arguments, to its end. It must end with this exit code."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=alone(), capture_output=True, text=True)
    assert done.returncode == code, f"ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


@pytest.fixture
def change(monkeypatch):
    """change(module, NAME=value, ...): constants or functions, until the test ends."""

    def change(module, **values) -> None:
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)

    return change


@pytest.fixture
def restored_constants(monkeypatch) -> None:
    """All constants of our modules are what they were when the test ends."""
    ours = ("ppo", "rollout", "evaluate", "grader", "plumbing", "data", "tests")
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] in ours]:
        for name in filter(str.isupper, module.__annotations__):
            monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture
def call(restored_constants, monkeypatch):
    """call(script, "NAME=value", ...): a script's main(), in this process."""

    def call(script, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
        script.main()

    return call


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder of all workers, for what is made once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def toy(shared) -> Path:
    """The toy world after a warm start of seconds: the model answers in boxes, mostly wrong, and so often retries."""
    out = shared / "toy"
    with FileLock(shared / "toy.lock"):
        if not out.is_dir():
            small = ["WARM_STEPS=150", "TRAIN_PROBLEMS=300", "TEST_PROBLEMS=40"]
            run_python("-m", "experiments.median", f"OUT={out}", *small)
    return out


def list_arguments(toy: Path, run: str) -> list[str]:
    """Those of a small run of ppo.py in the toy world."""
    small = ["PRESET=toy", "STEPS=6", "DIALOGUES=16", "MINI_BATCH=8", "SAVE_EVERY=2", "MAX_ATTEMPTS=3"]
    data = [f"MODEL={toy / 'warm_start'}", f"TRAIN_DATA={toy / 'train.jsonl'}", "DEV_PROBLEMS=16"]
    return [*small, *data, f"RUN={run}", "TRACK=tensorboard"]


@pytest.fixture(scope="session")
def straight(shared, toy) -> Path:
    """The folder of a run that nobody disturbed: what others are compared with."""
    with FileLock(shared / "runs.lock"):
        if not (shared / "runs").is_dir():
            run_python(ROOT / "ppo.py", *list_arguments(toy, "straight"), cwd=shared)
    return shared / "runs/straight"


@pytest.fixture(scope="session")
def ranks():
    """A process group of one in this process, as `python ppo.py` has it."""
    from plumbing.ranks import start_ranks

    import torch.distributed as dist

    start_ranks()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def engine(toy, ranks):
    import rollout
    from plumbing.engine import Engine

    engine = Engine(str(toy / "warm_start"), rollout.CONTEXT)
    yield engine
    engine.shutdown()
