"""plumbing/packing.py: rows hold what fits, ranks share evenly, and a dialogue sees nothing of its neighbours.
plumbing/ranks.py: what models are loaded, and how."""

import itertools

import ppo
from plumbing import packing
from plumbing.ranks import load_model
from tests.test_ppo import SMALL, TOKENS, two_dialogues

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 300), st.integers(0, 80))
def test_micro_batches_hold_each_dialogue_once_within_the_limit(lengths, max_tokens, row_tokens):
    packed = packing.pack(range(len(lengths)), lengths, max_tokens, row_tokens)
    assert sorted(i for rows in packed for row in rows for i in row) == list(range(len(lengths)))
    for rows in packed:
        width = max(row_tokens, *(lengths[i] for row in rows for i in row), 1)
        assert all(sum(lengths[i] for i in row) <= width for row in rows)
        assert width * len(rows) <= max_tokens or len(rows) == 1


@given(st.lists(st.integers(1, 500), min_size=8, max_size=40), st.integers(1, 8))
def test_ranks_share_a_mini_batch_evenly(lengths, world):
    shares = packing.share_among_ranks(lengths, world)
    assert sorted(i for rows in shares for i in rows) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in rows) for rows in shares]
    assert all(shares) and max(tokens) - min(tokens) <= max(lengths)


def varlen_on_cpu(q, k, v, boundaries_q, boundaries_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """What the kernel of GPUs promises: causal attention in each piece, with fewer heads of k and v than of q."""
    assert torch.equal(boundaries_q, boundaries_k) and window_size == (-1, 0)
    assert boundaries_q.dtype == torch.int32 and boundaries_q[0] == 0 and boundaries_q[-1] == len(q)
    assert k.shape[1] == q.shape[1] or enable_gqa
    pieces = [(int(a), int(b)) for a, b in itertools.pairwise(boundaries_q)]
    assert max(b - a for a, b in pieces) == longest_q == longest_k
    options = {"is_causal": True, "scale": scale, "enable_gqa": enable_gqa}
    attend = torch.nn.functional.scaled_dot_product_attention
    outs = [attend(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), **options)[0].transpose(0, 1) for a, b in pieces]
    return torch.cat(outs)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_path_of_gpus_keeps_dialogues_apart(toy, ranks, change, tmp_path, kv_heads):
    """Dialogues end to end, the kernel replaced by what it promises; kv_heads of the two heads of a query."""
    from torch.nn.attention import varlen

    change(ppo, **SMALL)
    change(varlen, varlen_attn=varlen_on_cpu)
    config = AutoConfig.from_pretrained(toy / "warm_start", num_key_value_heads=kv_heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    actor = ppo.Actor(str(tmp_path), TOKENS, "float32", False)
    batch = ppo.make_batch(two_dialogues())
    lengths = [len(d.ids) for d in batch.dialogues]
    expected, _ = actor(packing.make_micro_batch(batch.ids, batch.mask, lengths, [[0], [1]], kernel=False))
    one_row, _ = actor(packing.make_micro_batch(batch.ids, batch.mask, lengths, [[0, 1]], kernel=False))
    assert torch.allclose(one_row, expected, atol=1e-5)  # as it is on a CPU, by a mask
    change(packing, has_kernel=lambda dtype: True)
    actor.lm.set_attn_implementation(packing.attention_name("bfloat16"))
    micro = packing.make_micro_batch(batch.ids, batch.mask, lengths, [[0, 1]], kernel=True)
    got, _ = actor(micro)
    assert micro.positions[0].tolist() == [t for length in lengths for t in range(length)]  # from 0 in each
    assert micro.ids.shape == (1, sum(lengths)) and torch.allclose(got, expected, atol=1e-5)


def test_there_is_no_dropout_and_no_attention_that_is_not_computed_here(toy, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(toy / "warm_start", attention_dropout=0.5)
    lm.save_pretrained(tmp_path)
    loaded, ids = load_model(str(tmp_path), "sdpa"), torch.tensor([[5, 9, 7, 11]])
    assert loaded.training and torch.equal(loaded(ids).logits, loaded(ids).logits)
    lm.config.update({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0})
    lm.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="sliding_window is not computed here"):
        load_model(str(tmp_path), "sdpa")
