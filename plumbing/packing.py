"""Dialogues -> micro-batches of a forward pass, equally many on every rank; and attention over them.

On a GPU the dialogues of a micro-batch lie end to end in one row, and a kernel keeps attention inside each of them. On
a CPU, where there is no such kernel, they lie in several short rows: a mask keeps them apart there, and attention costs
the square of a row's width.
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
ROW_TOKENS: Count = 128  # tokens of a row on a CPU, where attention costs its square; a longer dialogue has its own
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


def pack(indices: Iterable[int], lengths: Sequence[int], max_tokens: int, row_tokens: int = 0) -> list[list[list[int]]]:
    """Dialogues -> micro-batches -> rows -> dialogues: the longest first, each into the first row where it fits.

    The rows of a micro-batch are as wide as its longest dialogue, or row_tokens if that is more; they have at most
    max_tokens together, or there is one.

    >>> pack(range(5), [3, 9, 4, 5, 1], max_tokens=10)
    [[[1]], [[3], [2, 4]], [[0]]]
    """
    micro_batches = []
    waiting = sorted(indices, key=lambda i: -lengths[i])
    while waiting:
        width = max(row_tokens, lengths[waiting[0]])
        free = [width] * max(1, max_tokens // width)  # tokens for which each row has room
        rows: list[list[int]] = [[] for _ in free]
        too_long = []
        for index in waiting:
            row = next((r for r, room in enumerate(free) if lengths[index] <= room), None)
            if row is None:
                too_long.append(index)
            else:
                rows[row].append(index)
                free[row] -= lengths[index]
        micro_batches.append([row for row in rows if row])
        waiting = too_long
    return micro_batches


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


def make_micro_batch(
    ids: Tensor, mask: Tensor, lengths: Sequence[int], rows: list[list[int]], kernel: bool
) -> MicroBatch:
    """Rows of dialogues of a batch, end to end. ids, mask: (B, T), padded at the end; lengths: tokens of each dialogue.
    What is left of a row repeats dialogue 0 at time 0: the first token of a prompt, which is never an action."""
    length = [torch.tensor([lengths[i] for i in row]) for row in rows]
    dialogues = [torch.tensor(row).repeat_interleave(n) for row, n in zip(rows, length, strict=True)]
    times = [torch.cat([torch.arange(lengths[i]) for i in row]) for row in rows]
    padded = (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (dialogues, times))
    dialogue, time = (x.to(ids.device) for x in padded)  # (R, L)
    row, column = mask[dialogue, time].nonzero(as_tuple=True)  # (A,)
    micro = MicroBatch(ids[dialogue, time], time, (row, column - 1), (dialogue[row, column], time[row, column]))
    if kernel:  # there is one row
        ends = F.pad(length[0].cumsum(0), (1, 0)).to(ids.device, torch.int32)
        micro.attention = {"boundaries": ends, "longest": int(length[0].max())}
    return micro


def iterate_micro_batches(
    ids: Tensor, mask: Tensor, lengths: Sequence[int], indices: Iterable[int], kernel: bool
) -> Iterator[MicroBatch]:
    """Micro-batches of the dialogues `indices`, equally many on every rank, because each forward and backward pass is a
    collective under FSDP. A rank with fewer repeats its last one, which then does not count."""
    packed = pack(indices, lengths, MAX_TOKENS_PER_MICRO_BATCH, MAX_TOKENS_PER_MICRO_BATCH if kernel else ROW_TOKENS)
    most = torch.tensor(len(packed), device=ids.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for k in range(int(most)):
        micro = make_micro_batch(ids, mask, lengths, packed[min(k, len(packed) - 1)], kernel)
        micro.counts, micro.is_last = k < len(packed), k == int(most) - 1
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
