"""Fixtures: a small toy world that is made once, and the real engine on it. Each test file also runs alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings


def alone() -> dict[str, str]:
    """The environment without this process's own process group."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in group} | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """The toy world after a warm start of seconds: the model answers in boxes, mostly wrong, and so often retries."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "world" / "toy"  # one for all workers
    small = ["WARM_STEPS=150", "TRAIN_PROBLEMS=300", "TEST_PROBLEMS=40"]
    out.parent.mkdir(exist_ok=True)
    with FileLock(out.with_suffix(".lock")):
        command = [sys.executable, "-m", "experiments.median", f"OUT={out}", *small]
        subprocess.run(command, cwd=ROOT, env=alone(), check=True)
    return out


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
