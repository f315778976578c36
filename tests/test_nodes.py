"""Two torchrun agents on this machine, which are two nodes to the program: a run over them that loses one of them."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from plumbing import checkpoints
from plumbing.files import read_jsonl
from tests.conftest import ROOT, alone, list_arguments, run_python
from tests.test_runs import assert_same_up_to_rounding

import psutil

BOUND = 120  # seconds in which all must have ended, on a machine that is busy with other things


@contextlib.contextmanager
def start_nodes(cwd: Path, script: str, *arguments: str) -> Iterator[list[psutil.Popen]]:
    """Two agents, each of which starts a rank of a script. What node 0 says is in cwd/node-0.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    agents: list[psutil.Popen] = []
    try:
        for node in range(2):
            command = [*launch, "--node-rank", str(node), str(ROOT / script), *arguments]
            with (cwd / f"node-{node}.log").open("w") as log:
                agents.append(psutil.Popen(command, cwd=cwd, env=alone(), stdout=log, stderr=subprocess.STDOUT))
        yield agents
    finally:
        for process in [process for agent in agents for process in list_processes(agent)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def list_processes(agent: psutil.Popen) -> list[psutil.Process]:
    """What an agent has started, and itself; none if it has ended."""
    return [*agent.children(recursive=True), agent] if agent.is_running() else []


def wait_until(agent: psutil.Popen, happened: Callable[[], bool]) -> None:
    while not happened():
        with contextlib.suppress(psutil.TimeoutExpired):
            raise AssertionError(f"ended with {agent.wait(timeout=0.05)}")


def test_a_run_over_two_nodes_that_loses_one_resumes_to_the_numbers_of_one_process(toy, straight, tmp_path):
    """A replica on each node. The torchrun of the second one dies: both nodes save and end well. Resumed, all processes
    of that node die: the rank of the other one fails and says why. One process that resumes what they have left comes
    to the numbers of an undisturbed run of its own."""
    run, arguments = tmp_path / "runs/nodes", list_arguments(toy, "nodes")

    def count_steps() -> int:
        return len(read_jsonl(run / "metrics.jsonl"))

    with start_nodes(tmp_path, "ppo.py", *arguments) as (first, second):
        wait_until(first, lambda: count_steps() >= 1)
        ranks = [*first.children(recursive=True), *second.children(recursive=True)]
        second.kill()  # the first one waits for it for five minutes after its rank has ended
        assert not psutil.wait_procs([*ranks, second], timeout=BOUND)[1]  # those that still run
    assert "stopped by SIGTERM after step" in (tmp_path / "node-0.log").read_text()
    saved = count_steps()
    assert checkpoints.list_checkpoints(run)[-1].name == f"step-{saved:06d}" and not (run / "policy").exists()
    with start_nodes(tmp_path, "ppo.py", *arguments) as (first, second):
        wait_until(first, lambda: count_steps() > saved)
        running = [*list_processes(first), *list_processes(second)]
        for process in list_processes(second):
            process.kill()
        assert not psutil.wait_procs(running, timeout=BOUND)[1]
    said = (tmp_path / "node-0.log").read_text()
    assert "resumes after step" in said and ("losed by peer" in said or "reset by peer" in said)
    assert "resumes after step" not in (tmp_path / "node-1.log").read_text()
    assert not (run / "policy").exists()
    run_python(ROOT / "ppo.py", *arguments, cwd=tmp_path)
    assert_same_up_to_rounding(straight, run)
