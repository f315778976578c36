"""The networks that are trained: a policy and a critic that compute what they are asked for at the actions alone."""

from plumbing import packing, ranks
from plumbing.packing import MicroBatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Actor(nn.Module):
    """A causal language model: forward -> (logprobs, entropy) of the actions, (A,) float32 each.

    tokens: ids of the tokenizer; rows of a padded vocabulary beyond them are no tokens. learn_entropy: whether the
    entropy has a gradient, which costs as much as that of the log-probabilities.
    """

    def __init__(self, model: str, tokens: int, compute_dtype: str, learn_entropy: bool):
        super().__init__()
        self.lm = ranks.load_model(model, packing.attention_name(compute_dtype))
        self.tokens = tokens
        self.learn_entropy = learn_entropy

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        hidden = hidden_states(self.lm.model, micro)  # (A, H)
        rows, columns = micro.state
        targets = micro.ids[rows, columns + 1]  # (A,)
        head = self.lm.lm_head.weight  # (V, H), all of it: without its padding (Qwen2.5: 271 rows) it is slower
        is_padding = torch.arange(len(head), device=head.device) >= self.tokens  # (V,)
        bias = torch.where(is_padding, -1e9, 0.0).to(head.dtype)
        chunks = zip(hidden.split(packing.LOGITS_CHUNK), targets.split(packing.LOGITS_CHUNK), strict=True)
        # Each chunk's logits are computed again in the backward pass, so that they never exist for all actions; but the
        # last chunk's stay, because the backward pass begins with them.
        shared = head, bias, self.learn_entropy
        *others, last = chunks
        parts = [checkpoint(score_actions, h, t, *shared, use_reentrant=False) for h, t in others]
        parts.append(score_actions(*last, *shared))
        logprobs, entropy = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropy)


def score_actions(
    hidden: Tensor, targets: Tensor, head: Tensor, bias: Tensor, learn_entropy: bool
) -> tuple[Tensor, Tensor]:
    """(A, H), (A,), (V, H), (V,) -> log-probability of each target and entropy of its distribution, (A,) float32."""
    logits = F.linear(hidden, head, bias).float()  # (A, V)
    log_total = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_total
    with torch.set_grad_enabled(learn_entropy and torch.is_grad_enabled()):
        entropy = log_total - (logits.softmax(-1) * logits).sum(-1)
    return logprobs, entropy


class Critic(nn.Module):
    """The same model with one number in place of the vocabulary: forward -> value of each action's state, (A,) float32.
    Its head stays in float32: bfloat16 values near 1 are 0.004 apart."""

    def __init__(self, model: str, compute_dtype: str):
        super().__init__()
        self.body = ranks.load_model(model, packing.attention_name(compute_dtype)).model
        width = self.body.config.hidden_size
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=1 / (width + 1))

    def forward(self, micro: MicroBatch) -> Tensor:
        return self.head(hidden_states(self.body, micro)).sum(-1)  # (A, H) -> (A, 1) -> (A,)


def hidden_states(body: nn.Module, micro: MicroBatch) -> Tensor:
    """The states in which the actions were taken, (A, H)."""
    out = body(input_ids=micro.ids, position_ids=micro.positions, use_cache=False, **micro.attention)
    return out.last_hidden_state[micro.state]  # (R, L, H) -> (A, H)
