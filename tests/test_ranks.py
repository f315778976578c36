"""plumbing/ranks.py: how models are loaded."""

from plumbing import ranks

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
