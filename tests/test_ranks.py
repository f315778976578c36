"""plumbing/ranks.py: how a GPU's ranks start, and what they gather."""

import os
import subprocess
import sys

from plumbing import engine, ranks
from tests.conftest import ROOT, alone

import pytest
import torch

GATHER = """
import sys
from plumbing import ranks
import torch
import torch.distributed as dist

ranks.start_ranks()
ranks.GRADIENT_CHECKPOINTING = False
lm = ranks.load_model(sys.argv[1], "sdpa")
whole = {name: parameter.detach().clone() for name, parameter in lm.named_parameters()}
sharded = ranks.shard(lm, "bfloat16")
received = dict(ranks.whole_weights(sharded, "bfloat16"))
assert received.keys() == whole.keys()
assert any(len(p.to_local()) < len(p) for p in sharded.parameters())
for name, tensor in received.items():
    assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, whole[name].bfloat16()), name
print("gathered")
dist.destroy_process_group()
"""


def test_weights_that_are_cast_before_they_are_gathered_have_the_same_bits(toy):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, sys.executable, "-c", GATHER, str(toy / "warm_start")]
    done = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, check=False)
    assert done.stdout.count("gathered") == 2, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("offload", "given", "threads"),
    [(True, None, 3), (True, "1", 3), (True, "5", None), (False, None, None), (False, "1", None)],
)
def test_optimisers_on_the_cpu_have_the_cores_of_their_rank(monkeypatch, offload, given, threads):
    """vLLM leaves a process one thread unless OMP_NUM_THREADS is set, and torchrun sets it to 1."""
    calls = {}
    monkeypatch.setattr(engine, "find_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.update(device=index))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: calls.update(threads=count))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, timeout: calls.update(backend=backend))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(13))
    monkeypatch.setattr(ranks, "OFFLOAD", offload)
    environment = {"RANK": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
    monkeypatch.setattr(os, "environ", environment | ({"OMP_NUM_THREADS": given} if given else {}))
    ranks.start_ranks()
    assert calls == {"device": 2, "backend": "cpu:gloo,cuda:nccl"} | ({"threads": threads} if threads else {})
    assert os.environ.get("OMP_NUM_THREADS") == (str(threads) if threads else given)
