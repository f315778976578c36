def pack(lengths: Sequence[int], row_tokens: int, batch_tokens: int) -> list[list[list[int]]]:
    """Dialogues -> micro-batches of rows of dialogues, longest first, so that little is padded and nothing is cut.

    A row holds at most row_tokens tokens (or one longer dialogue), a micro-batch rows of about batch_tokens in all.
    >>> pack([3, 9, 4, 5, 1], row_tokens=8, batch_tokens=16)
    [[[1]], [[3, 0], [2, 4]]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = (r for r in range(len(rows)) if room[r] >= lengths[index])
        if (row := next(fitting, None)) is None:
            row = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[row].append(index)
        room[row] -= lengths[index]
    batches: list[list[list[int]]] = []
    width = 0  # tokens of the widest row of the open micro-batch; its rows are padded to that
    for row in rows:
        length = sum(lengths[i] for i in row)
        if not batches or max(width, length) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            width = 0
        batches[-1].append(row)
        width = max(width, length)
    return batches


@dataclasses.dataclass
class MicroBatch:
    """Rows of packed dialogues, and where their A actions are: in the rows, and in the Batch."""

    ids: Tensor  # (R, L) int64
    positions: Tensor  # (R, L) int64; starts at 0 for each dialogue, which keeps attention inside it
    attention: dict[str, Any]  # boundaries() for the kernel on a GPU; else empty, and attention goes by the positions
    state: tuple[Tensor, Tensor]  # (A,) row and column of the token behind which the action was sampled
    action: tuple[Tensor, Tensor]  # (A,) dialogue and time of the action in the Batch


def make_micro_batch(batch: Batch, rows: list[list[int]]) -> MicroBatch:
    times = batch.ids.shape[1]  # T
    # Where in the batch, laid end to end, each token of the rows is. Padding is the first token of the first dialogue:
    # many dialogues of one token, which no action sees.
    tokens = [torch.cat([torch.arange(i * times, i * times + batch.lengths[i]) for i in row]) for row in rows]
    at = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(batch.ids.device)  # (R, L)
    ids, positions = batch.ids.flatten()[at], at % times
    row, column = batch.mask.flatten()[at].nonzero(as_tuple=True)  # (A,)
    action = at[row, column]
    attention = boundaries(positions) if by_kernel() else {}
    return MicroBatch(ids, positions, attention, (row, column - 1), (action // times, action % times))


def by_kernel() -> bool:
    """Whether attention is the varlen kernel's: on a GPU, in a dtype that it takes."""
    return torch.cuda.is_available() and COMPUTE_DTYPE != "float32"


def boundaries(positions: Tensor) -> dict[str, Any]:
    """What varlen_attention has to know: where dialogues start in the rows laid end to end; the longest one's length.

    >>> boundaries(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]))
    {'boundaries': tensor([ 0,  3,  5,  7,  8,  9, 10], dtype=torch.int32), 'longest': 3}
    """
    starts = (positions.flatten() == 0).nonzero().flatten()
    found = F.pad(starts, (0, 1), value=positions.numel()).to(torch.int32)
    return {"boundaries": found, "longest": int(found.diff().max())}


def micro_batches(batch: Batch, indices: Iterable[int]) -> Iterator[tuple[MicroBatch, bool, bool]]:
    """-> (micro-batch, counts?, last?) of the dialogues `indices`; equally many on every rank, since every forward and
    backward pass is a collective under FSDP. A rank with fewer repeats its last one, which then does not count."""
    indices = list(indices)
    # The kernel takes one long row; a dense mask costs the square of the row.
    row_tokens = MAX_TOKENS_PER_MICRO_BATCH if by_kernel() else ROW_TOKENS
    packed = pack([batch.lengths[i] for i in indices], row_tokens, MAX_TOKENS_PER_MICRO_BATCH)
    most = torch.tensor(len(packed), device=device())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for k in range(int(most)):
        rows = packed[min(k, len(packed) - 1)]
        micro = make_micro_batch(batch, [[indices[i] for i in row] for row in rows])
        yield micro, k < len(packed), k == int(most) - 1


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
    boundaries: Tensor, longest: int, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention inside each dialogue of rows laid end to end, without a mask (CUDA); (R, heads, L, D) each.
    transformers calls it under the name "varlen" and hands on the last two arguments from the model's forward."""
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, width, depth = query.shape
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    flat = [x.transpose(1, 2).reshape(rows * width, heads, depth) for x in (query, key, value)]
    causal = {"window_size": (-1, 0), "scale": scaling}
    out = varlen_attn(*flat, boundaries, boundaries, longest, longest, **causal)  # (R * L, heads, D)
    return out.view(rows, width, heads, depth), None
