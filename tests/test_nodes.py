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


class Nodes:
    """Two agents, each of which starts a rank of a script."""

    def __init__(self, cwd: Path, script: str, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        self.agents, self.logs = [], [cwd / f"node-{node}.log" for node in range(2)]
        for node, log in enumerate(self.logs):
            command = [*launch, "--node-rank", str(node), str(ROOT / script), *arguments]
            with log.open("w") as out:
                self.agents.append(psutil.Popen(command, cwd=cwd, env=alone(), stdout=out, stderr=subprocess.STDOUT))
        self.known: set[psutil.Process] = set(self.agents)

    def processes(self, node: int) -> list[psutil.Process]:
        """The agent of a node and what it has started."""
        return [self.agents[node], *self.agents[node].children(recursive=True)]

    def wait_until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            with contextlib.suppress(psutil.TimeoutExpired):
                code = self.agents[0].wait(timeout=0.05)
                raise AssertionError(f"ended with {code}: {self.said(0)[-3000:]}")
        self.known |= {process for node in range(2) for process in self.processes(node)}

    def said(self, node: int) -> str:
        return self.logs[node].read_text()

    def wait(self) -> None:
        """For a good end of both."""
        assert [agent.wait() for agent in self.agents] == [0, 0], self.said(0)[-3000:] + self.said(1)[-3000:]


@contextlib.contextmanager
def start_nodes(cwd: Path, script: str, *arguments: str) -> Iterator[Nodes]:
    nodes = Nodes(cwd, script, *arguments)
    try:
        yield nodes
    finally:
        for process in nodes.known | {p for n in range(2) if nodes.agents[n].is_running() for p in nodes.processes(n)}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_run_over_two_nodes_that_loses_one_resumes_to_the_numbers_of_one_process(toy, straight, tmp_path):
    """A replica on each node. The torchrun of the second one dies: both nodes save and end well. Resumed, all processes
    of that node die: the rank of the other one fails and says why. One process that resumes what they have left comes
    to the numbers of an undisturbed run of its own."""
    run, arguments = tmp_path / "runs/nodes", list_arguments(toy, "nodes")

    def steps() -> int:
        return len(read_jsonl(run / "metrics.jsonl"))

    with start_nodes(tmp_path, "ppo.py", *arguments) as nodes:
        nodes.wait_until(lambda: steps() >= 1)
        nodes.agents[1].kill()  # the other one waits for it for five minutes after its rank has ended
        assert not psutil.wait_procs(nodes.known - {nodes.agents[0]}, timeout=BOUND)[1]  # those that still run
        assert "stopped by SIGTERM after step" in nodes.said(0)
    saved = steps()
    assert checkpoints.list_checkpoints(run)[-1].name == f"step-{saved:06d}" and not (run / "policy").exists()
    with start_nodes(tmp_path, "ppo.py", *arguments) as nodes:
        nodes.wait_until(lambda: steps() > saved)
        for process in nodes.processes(1):
            process.kill()
        assert not psutil.wait_procs(nodes.known, timeout=BOUND)[1]
        assert "losed by peer" in nodes.said(0) or "reset by peer" in nodes.said(0)
        assert "resumes after step" in nodes.said(0) and "resumes after step" not in nodes.said(1)
    assert not (run / "policy").exists()
    run_python(ROOT / "ppo.py", *arguments, cwd=tmp_path)
    assert_same_up_to_rounding(straight, run)
