"""plumbing/engine.py: what it says of a GPU before anything is loaded, and rows of a vocabulary that are no tokens.

What a real engine plays stands in test_rollout.py.
"""

import subprocess
import sys
from types import SimpleNamespace

from plumbing import engine
from tests.conftest import ROOT, alone

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PLAY_PADDED = """
import sys
import rollout, torch
from data.problems import load_problems
from plumbing.engine import Engine
from transformers import AutoModelForCausalLM

folder, problems = sys.argv[1:]
lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
sampler = Engine(folder, rollout.CONTEXT)
chat, tokens = rollout.make_chat(sampler.tokenizer), len(sampler.tokenizer)
for temperature in (0.0, 1.0):
    for loads in (False, True):
        if loads:
            sampler.load_weights(lm.named_parameters())
        dialogues = [rollout.new_dialogue(chat, problem, 3) for problem in load_problems(problems)[:8]]
        rollout.play(sampler, chat, dialogues, list(range(8)), temperature)
        for d in dialogues:
            with torch.no_grad():
                logits = lm(torch.tensor([d.ids])).logits[0]
            assert (logits.argmax(-1) >= tokens).any()  # a padded row would be sampled
            logprobs = logits[:, :tokens].log_softmax(-1)
            if temperature == 0:  # as vLLM has it: nothing but the best
                logprobs = torch.where(logprobs == logprobs.max(-1, keepdim=True).values, logprobs, -torch.inf)
            for t in (t for t, is_action in enumerate(d.mask) if is_action):
                assert abs(logprobs[t - 1, d.ids[t]] - d.logprobs[t]) < 1e-4, (temperature, loads)
sampler.shutdown()
print("played")
"""


def test_padded_rows_are_never_sampled(toy, tmp_path):
    """More of them than logit_bias takes on a GPU, and each likelier than the token that it resembles."""
    lm = AutoModelForCausalLM.from_pretrained(toy / "warm_start", dtype=torch.float32)
    tokens = len(AutoTokenizer.from_pretrained(toy / "warm_start"))
    lm.resize_token_embeddings(tokens + 2000, mean_resizing=False)
    with torch.no_grad():
        rows = lm.get_input_embeddings().weight
        rows[tokens:] = 3 * rows[torch.arange(2000) % tokens]
    lm.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(toy / "warm_start").save_pretrained(tmp_path)
    command = [sys.executable, "-c", PLAY_PADDED, str(tmp_path), str(toy / "test.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["played"], done.stderr[-3000:]


def test_models_whose_padding_cannot_be_cut_off_are_refused():
    with pytest.raises(SystemExit, match="Linear: its padded vocabulary cannot be cut off"):
        engine.drop_padding(torch.nn.Linear(2, 2), tokens=1)


@pytest.mark.parametrize(
    ("available", "rank", "capability", "dtype", "message"),
    [
        (False, 0, (9, 0), "", "an NVIDIA driver of 580 or newer"),
        (True, 1, (9, 0), "", "process 1 of this node has no GPU; 1 visible"),
        (True, 0, (7, 5), "bfloat16", "Tesla T4 is too old for bfloat16: Ampere or newer"),
        (True, 0, (7, 5), "float32", ""),
        (True, 0, (8, 0), "bfloat16", ""),
    ],
)
def test_a_gpu_that_cannot_be_used_is_said_in_one_line(monkeypatch, available, rank, capability, dtype, message):
    assert not engine.find_gpu()  # torch as it is here, built for CPUs: whatever the machine has
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    if not message:
        assert engine.find_gpu(dtype)
        return
    with pytest.raises(SystemExit, match=message):
        engine.find_gpu(dtype)


def test_the_peak_of_memory_is_without_a_sleeping_engine(monkeypatch):
    from plumbing import ranks

    assert engine.pool_memory() == 0
    allocator = SimpleNamespace(get_current_usage=lambda: 40 * 2**30)
    cumem = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=None))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", cumem)
    assert engine.pool_memory() == 0
    cumem.CuMemAllocator.instance = allocator
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 63 * 2**30)
    assert ranks.peak_memory() == 23
