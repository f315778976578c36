"""Dialogues -> micro-batches of a forward pass, equally many on every rank; and attention over them.

On a GPU the dialogues of a micro-batch lie end to end in one row, and a kernel keeps attention inside each of them. On
a CPU, where there is no such kernel, each has a row of its own; rows of about one length need little padding.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from plumbing import ranks
from plumbing.constants import Count

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

MAX_TOKENS_PER_MICRO_BATCH: Count = 16384  # tokens, with padding, in a forward and backward pass; memory for speed
LOGITS_CHUNK: Count = 384  # actions whose (actions x vocabulary) float32 logits exist at one time


def has_kernel(compute_dtype: str) -> bool:
    """Whether attention is the kernel's: on a GPU, in a dtype that it takes."""
    return torch.cuda.is_available() and compute_dtype != "float32"


def pad(rows: list[list[Any]], dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, T), 0 after a row's end, on this rank's device."""
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(ranks.device())


def share_among_ranks(lengths: Sequence[int], world: int) -> list[list[int]]:
    """Dialogues of a mini-batch -> the indices of those of each of `world` ranks, so that ranks have about equally many
    tokens: the longest first, each to the rank that has fewest so far. Rank 0 trains on 9 + 1 tokens here, rank 1 on
    5 + 4:

    >>> share_among_ranks([4, 9, 1, 5], world=2)
    [[1, 2], [3, 0]]
    """
    shares: list[list[int]] = [[] for _ in range(world)]
    tokens = [0] * world
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min(range(world), key=lambda r: (tokens[r], len(shares[r])))
        shares[rank].append(index)
        tokens[rank] += lengths[index]
    return shares


def group_by_length(indices: Iterable[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Dialogues, longest first, in groups whose padded size (longest x number) is at most max_tokens, or of one.

    >>> group_by_length(range(5), [3, 9, 4, 5, 1], max_tokens=10)
    [[1], [3, 2], [0, 4]]
    """
    groups: list[list[int]] = []
    for index in sorted(indices, key=lambda i: -lengths[i]):
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


@dataclasses.dataclass
class MicroBatch:
    """R rows of dialogues, and where their A actions are: in the rows, and in the batch that they come from."""

    ids: Tensor  # (R, L) int64
    positions: Tensor  # (R, L) int64, from 0 in each dialogue
    state: tuple[Tensor, Tensor]  # (A,) row and column of the token after which the action was sampled
    action: tuple[Tensor, Tensor]  # (A,) dialogue and time of the action in the batch
    counts: bool = True  # False: only keeps this rank in step with the others, and must change nothing
    is_last: bool = True  # of its optimiser step
    attention: dict[str, Any] = dataclasses.field(default_factory=dict)  # what varlen_attention has to know, on a GPU


def make_micro_batch(ids: Tensor, mask: Tensor, lengths: Sequence[int], indices: list[int], kernel: bool) -> MicroBatch:
    """The dialogues `indices` of a batch. ids, mask: (B, T), padded at the end; lengths: tokens of each dialogue."""
    longest = max(lengths[i] for i in indices)
    dialogue = torch.tensor(indices, device=ids.device)
    length = torch.tensor([lengths[i] for i in indices], device=ids.device)
    ids, mask = ids[dialogue, :longest], mask[dialogue, :longest]  # (R, L)
    positions = torch.arange(longest, device=ids.device).expand_as(ids)
    row, column = mask.nonzero(as_tuple=True)  # (A,)
    micro = MicroBatch(ids, positions, (row, column - 1), (dialogue[row], column))
    if kernel:  # (R, L) -> (1, sum of lengths)
        is_token = positions < length[:, None]
        micro.ids, micro.positions = ids[is_token][None], positions[is_token][None]
        ends = length.cumsum(0)
        micro.state = (torch.zeros_like(row), (ends - length)[row] + column - 1)
        micro.attention = {"boundaries": F.pad(ends, (1, 0)).to(torch.int32), "longest": longest}
    return micro


def iterate_micro_batches(
    ids: Tensor, mask: Tensor, lengths: Sequence[int], indices: Iterable[int], kernel: bool
) -> Iterator[MicroBatch]:
    """Micro-batches of the dialogues `indices`, equally many on every rank, because each forward and backward pass is a
    collective under FSDP. A rank with fewer repeats its last one, which then does not count."""
    groups = group_by_length(indices, lengths, MAX_TOKENS_PER_MICRO_BATCH)
    most = torch.tensor(len(groups), device=ids.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for k in range(int(most)):
        micro = make_micro_batch(ids, mask, lengths, groups[min(k, len(groups) - 1)], kernel)
        micro.counts, micro.is_last = k < len(groups), k == int(most) - 1
        yield micro


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
    boundaries: Tensor, longest: int, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention inside each dialogue of a row laid end to end, without a mask (CUDA); (1, heads, L, D) each.
    transformers calls it under the name "varlen", with MicroBatch.attention from the model's forward."""
    from torch.nn.attention.varlen import varlen_attn

    flat = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]  # (L, heads, D), of key and value fewer
    ends = boundaries, boundaries, longest, longest
    out = varlen_attn(*flat, *ends, window_size=(-1, 0), scale=scaling, enable_gqa=True)
    return out[None], None  # (1, L, heads, D)


def attention_name(compute_dtype: str) -> str:
    """What transformers shall call: "varlen" where there is the kernel, else "sdpa"."""
    if not has_kernel(compute_dtype):
        return "sdpa"
    from transformers import AttentionInterface

    AttentionInterface.register("varlen", varlen_attention)
    return "varlen"
