"""plumbing/ranks.py: how a GPU's ranks start, what their memory is, and how models are loaded."""

import os
import sys
from types import SimpleNamespace

from plumbing import engine, ranks

import pytest
import torch
from transformers import AutoModelForCausalLM


def test_there_is_no_dropout_and_no_attention_that_is_not_computed_here(toy, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(toy / "warm_start", attention_dropout=0.5)
    lm.save_pretrained(tmp_path)
    loaded, ids = ranks.load_model(str(tmp_path), "sdpa"), torch.tensor([[5, 9, 7, 11]])
    assert loaded.training and torch.equal(loaded(ids).logits, loaded(ids).logits)
    lm.config.update({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0})
    lm.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="sliding_window is not computed here"):
        ranks.load_model(str(tmp_path), "sdpa")


@pytest.mark.parametrize(("offload", "given", "threads"), [(True, "1", "3"), (True, "5", "5"), (False, "1", "1")])
def test_optimisers_on_the_cpu_have_the_cores_of_their_rank(change, offload, given, threads):
    """vLLM leaves a process one thread unless OMP_NUM_THREADS is set, and torchrun sets it to 1."""
    calls = []
    change(engine, find_gpu=lambda: True)
    change(torch.cuda, set_device=calls.append)
    change(torch, set_num_threads=calls.append)
    change(ranks.dist, init_process_group=lambda backend, timeout: calls.append(backend))
    environment = {"RANK": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": given}
    change(os, sched_getaffinity=lambda _: range(13), environ=environment)
    change(ranks, OFFLOAD=offload)
    ranks.start_ranks()
    assert calls == [2, *([3] if threads == "3" else []), "cpu:gloo,cuda:nccl"]
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_the_peak_of_memory_is_without_a_sleeping_engine(change, monkeypatch):
    assert engine.pool_memory() == 0
    pool = SimpleNamespace(instance=SimpleNamespace(get_current_usage=lambda: 40 * 2**30))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", SimpleNamespace(CuMemAllocator=pool))
    change(torch.cuda, is_available=lambda: True, max_memory_allocated=lambda: 63 * 2**30)
    assert ranks.peak_memory() == 23
