"""Fixtures: a small toy world made once a session, and the real engine on it. Each test file runs alone, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings


def alone() -> dict[str, str]:
    """The environment without this process's own process group."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in group} | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """The toy world with a warm start of seconds: it answers in boxes, mostly wrong, so there is a lot to retry."""
    out = tmp_path_factory.mktemp("world") / "toy"
    small = ["WARM_STEPS=150", "TRAIN_PROBLEMS=300", "TEST_PROBLEMS=40"]
    subprocess.run([sys.executable, "-m", "data.toy", f"OUT={out}", *small], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="session")
def ranks():
    """A process group of one in this process, as `python ppo.py` has it."""
    import torch.distributed as dist

    import ppo

    ppo.start_ranks()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def engine(toy, ranks):
    from rollout import Engine

    engine = Engine(str(toy / "warm_start"))
    yield engine
    engine.shutdown()
