"""Train a language model on multi-attempt dialogues (arXiv 2503.04808) with PPO: GAE, clipped updates, FSDP2, vLLM.

1. The whole dialogue is one trajectory with one terminal reward; gamma is 1: a late success also pays the early tries.
2. Feedback is environment: it is in the context of everything that follows and in no loss, and GAE steps over it.
3. The critic is a second copy of the model; advantages are whitened over all actions of a rollout, on all ranks.
4. The KL to the start model (k3) stands in the loss, not in the reward.
5. Losses are sums over actions divided by their global number: no micro-batch, packing or rank changes a gradient.

    python ppo.py RUN=first                                                # the toy world, one process, on a CPU
    torchrun --nproc-per-node 2 ppo.py RUN=second STEPS=20 TOKEN_BUDGET=0  # two processes
    torchrun --nproc-per-node 8 ppo.py PRESET=paper RUN=paper TRAIN_DATA=data/math_train.jsonl
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import grader
import rollout
from data.problems import load_problems, question_key
from evaluate import read_records, write_atomically
from rollout import Chat, Dialogue, Engine

# The values are the paper's. PRESETS below change them by the group, NAME=value on the command line one by one.
# What to train
PRESET: str = "toy"  # comma-separated groups of PRESETS
RUN: str = "run"  # the run's folder is runs/RUN; a run that exists is resumed
MODEL: str = "Qwen/Qwen2.5-Math-1.5B"  # folder or hub name: start of policy and critic
REFERENCE: str = ""  # what the KL is measured from; "" = MODEL (SCoRe's second stage: what the first started from)
TRAIN_DATA: str = "data/math_train.jsonl"  # problems, one {"id", "question", "answer"} a line
SEED: int = 42  # of the order of problems, N, sampling and the value head
# How long. Learning rates follow the share of the budget that is used.
STEPS: int = 1280  # rollouts; paper 160 passes over 8,523 problems = 1,280
TOKEN_BUDGET: int = 0  # generated tokens after which training ends instead of after STEPS; 0 = STEPS decide
# Batches
DIALOGUES: int = 1024  # dialogues of a rollout, over all ranks
MINI_BATCH: int = 128  # dialogues of an optimiser step, over all ranks; DIALOGUES / MINI_BATCH steps a rollout
EPOCHS: int = 1  # passes over a rollout
MAX_TOKENS_PER_MICRO_BATCH: int = 16384  # tokens in one forward and backward pass; memory for speed
ROW_TOKENS: int = 4096  # tokens of a packed row where attention has a dense mask and costs its square (CPU, float32)
# The method
ESTIMATOR: str = "gae"  # "gae" (paper, with a critic); without one "rloo", "grpo", "dr_grpo", "reinforce"
GAMMA: float = 1.0  # discount per action
LAMBDA: float = 0.99  # GAE: 1 = whole return (no bias), 0 = one step (little variance)
CLIP: float = 0.2  # PPO: the ratio earns nothing outside 1 +- CLIP
VALUE_CLIP: float = 0.2  # values move at most this far from those of the rollout
ATTEMPT_GAMMA: float = 1.0  # discount on top from one attempt to the next (paper 1; SCoRe 0: each on its own)
KL_COEF: tuple[float, ...] = (0.01,)  # weight of KL (k3) to the start model, by attempt; the last for all others
KL_IN_REWARD: float = 0.0  # weight of k1 in each action's reward (paper 0); no KL at all: no reference is loaded
ENTROPY_COEF: float = 0.0  # weight of an entropy bonus (paper: none)
TRUNCATE_IS: float = 0.0  # weigh actions by min(trainer's / sampler's probability, this); 0 = do not
CRITIC_WARMUP: int = 0  # first steps in which only the critic learns (paper 0)
WHITEN: bool = True  # advantages to mean 0 and standard deviation 1 over a rollout
# Optimisers
ACTOR_LR: float = 5e-7  # peak
CRITIC_LR: float = 1e-5  # peak
MIN_LR: float = 0.1  # the cosine's floor, as a share of the peak
WARMUP: float = 0.03  # share of the training with a rising learning rate
BETAS: tuple[float, float] = (0.9, 0.95)  # Adam's
WEIGHT_DECAY: float = 0.0
GRAD_CLIP: float = 1.0  # largest gradient norm
MAX_SKIPPED: int = 3  # optimiser steps skipped in a row, their gradients not being finite, after which the run stops
# Hardware
COMPUTE_DTYPE: str = "bfloat16"  # of forward and backward and of the engine; master weights and reductions are float32
GRADIENT_CHECKPOINTING: bool = True  # recompute activations in the backward pass: a third more time, far less memory
LOGITS_CHUNK: int = 384  # actions whose (actions x vocabulary) float32 logits exist at one time
SHARD_RANKS: int = 0  # ranks that share one copy of the weights (others hold replicas: HSDP); 0 = those of a node
OFFLOAD: bool = False  # weights, gradients and Adam's moments live in the CPU's memory: slower, for small GPUs
PEAK_TFLOPS: float = 989.0  # of a GPU in COMPUTE_DTYPE, which MFU is a share of (H100, H200: 989; A100: 312)
MAX_MISMATCH: float = 0.05  # nats; mean |sampler - trainer| log-probability above which the run stops as broken
# The run's folder
SAVE_EVERY: int = 8  # steps between checkpoints, each with a test on the dev split (paper 8)
ASYNC_SAVE: bool = True  # checkpoints are written behind the next steps, from a copy in the CPU's memory
KEEP_CHECKPOINTS: int = 2  # the newest so many stay, and the best by the dev split (paper 2)
DEV_PROBLEMS: int = 256  # of TRAIN_DATA, drawn by SEED, that choose the best checkpoint (paper: the tests do); 0 = none
DIALOGUES_LOGGED: int = 2  # dialogues a step in dialogues.jsonl; as many a checkpoint in tokens.jsonl
TRACK: str = "tensorboard"  # where metrics go besides metrics.jsonl: "tensorboard", "wandb" or ""
DRY_RUN: bool = False  # 1: say what would happen, and stop

HARDWARE = {  # a run may be resumed with others of these: they change where and how fast, and rounding, but no formula
    *("ppo." + name for name in ("MAX_TOKENS_PER_MICRO_BATCH", "ROW_TOKENS", "LOGITS_CHUNK", "GRADIENT_CHECKPOINTING")),
    *("ppo." + name for name in ("SHARD_RANKS", "OFFLOAD", "PEAK_TFLOPS", "ASYNC_SAVE", "KEEP_CHECKPOINTS", "TRACK")),
    *("rollout." + name for name in ("GPU_MEMORY", "CPU_CACHE_MIB", "CPU_PACK_MIB")),
    *("rollout." + name for name in ("MAX_SEQUENCES", "TENSOR_PARALLEL")),
}
SCORE = {  # SCoRe (arXiv 2409.12917): two attempts, no verdict between them, each paid for itself
    "rollout.MIN_ATTEMPTS": 2,
    "rollout.MAX_ATTEMPTS": 2,
    "rollout.PROMPT": "single_turn",
    "rollout.FEEDBACK": "intrinsic",
    "rollout.REWARD_WRONG": 0.0,
    "rollout.REWARD_NO_ANSWER": 0.0,
    "rollout.SAMPLES_PER_PROMPT": 4,
    "ESTIMATOR": "rloo",
    "ATTEMPT_GAMMA": 0.0,
    "WHITEN": False,
    "ENTROPY_COEF": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"rollout.SEED_ATTEMPTS": False},
    "toy": {
        "MODEL": "data/toy/warm_start",
        "TRAIN_DATA": "data/toy/train.jsonl",
        "SEED": 0,
        "TOKEN_BUDGET": 400_000,
        "DIALOGUES": 128,
        "MINI_BATCH": 64,
        "EPOCHS": 2,
        "ROW_TOKENS": 128,
        # First answers are held near the warm start's, as in SCoRe's stage I, so that the first attempt does not pay
        # for the others. The entropy bonus keeps answers varied, but it pays for junk around the box, too, where
        # anything may be said; the KL must cost more.
        "KL_COEF": (0.2, 0.02),
        "ENTROPY_COEF": 0.01,
        "ACTOR_LR": 1e-3,
        "CRITIC_LR": 2e-3,
        "MIN_LR": 0.0,
        "WARMUP": 0.0125,
        "COMPUTE_DTYPE": "float32",
        "GRADIENT_CHECKPOINTING": False,
        "SAVE_EVERY": 50,
        "ASYNC_SAVE": False,
        "TRACK": "",
        "rollout.MAX_ATTEMPT_TOKENS": 64,
        "rollout.LEAVE_OUT_LONG": True,
    },
    "single_turn": {"rollout.MAX_ATTEMPTS": 1},
    # the plain method that SCoRe improves on (eq. 1)
    "multi_turn": SCORE | {"rollout.REWARD": "per_attempt", "KL_COEF": (0.01,)},
    "score_stage1": SCORE | {"rollout.REWARD": "score_stage1", "KL_COEF": (0.1, 0.01)},  # beta2, beta1 of table 8
    # MODEL=<the first stage's policy> REFERENCE=<what the first stage started from>
    "score_stage2": SCORE | {"rollout.REWARD": "score_stage2", "KL_COEF": (0.01,)},
}


# Advantages and losses ------------------------------------------------------------------------------------------------
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, attempt_gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates over the actions alone (arXiv 1506.02438, eq. 16) -> advantages, returns.

    rewards, values, mask: (B, T) float32; mask 1 = action. values[b, t] is the value of the state in which action t is
    taken. Time passes only at actions: behind an action comes the next action, however many environment tokens lie
    between, and behind the last one comes the end with value 0. Nothing is read at environment tokens (NaN, say).
    attempt_gamma discounts once more where environment tokens follow an action, that is, from one attempt to the next.
    Returned are (B, T) float32, 0 at environment tokens; returns = advantages + values.

    Two actions, a token of feedback between them, reward 1 at the end; gamma 1, lambda .5:
    advantage of the second = 1 - .4, of the first = (.4 - .2) + .5 * .6
    >>> rewards, values = torch.tensor([[0., 9., 1.]]), torch.tensor([[.2, 9., .4]])
    >>> gae(rewards, values, torch.tensor([[1., 0., 1.]]), gamma=1.0, lam=0.5)
    (tensor([[0.5000, 0.0000, 0.6000]]), tensor([[0.7000, 0.0000, 1.0000]]))
    >>> gae(rewards, values, torch.tensor([[1., 0., 1.]]), gamma=1.0, lam=0.5, attempt_gamma=0.0)[0]  # each on its own
    tensor([[-0.2000,  0.0000,  0.6000]])
    """
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    following_action = next_value > 0  # (B,) whether the next token, of whatever kind, is an action
    for t in reversed(range(values.shape[1])):
        action = mask[:, t] > 0
        discount = torch.where(following_action, gamma, gamma * attempt_gamma)
        advantage = rewards[:, t] + discount * next_value - values[:, t] + discount * lam * next_advantage
        advantages[:, t] = torch.where(action, advantage, 0.0)
        returns[:, t] = torch.where(action, advantage + values[:, t], 0.0)
        next_advantage = torch.where(action, advantage, next_advantage)
        next_value = torch.where(action, values[:, t], next_value)
        following_action = action
    return advantages, returns


def attempt_returns(rewards: Sequence[float], attempt_gamma: float) -> list[float]:
    """What an attempt earns: its own reward and, discounted, those of the attempts behind it.

    >>> attempt_returns([0.0, 1.0, 4.0], attempt_gamma=0.5)
    [1.5, 3.0, 4.0]
    """
    returns = list(rewards)
    for k in reversed(range(len(returns) - 1)):
        returns[k] += attempt_gamma * returns[k + 1]
    return returns


def group_advantages(
    returns: Sequence[Sequence[float | None]], groups: Sequence[int], method: str
) -> list[list[float]]:
    """Advantages without a critic: the return of a dialogue's k-th attempt against the k-th attempts of its group.

    returns[d][k] is that of attempt k of dialogue d, None if the policy has not made it; groups[d] is the problem that
    d is about. With G a return, and mean and standard deviation over the n k-th attempts of the group:
    "rloo" (arXiv 2402.14740): G - mean of the others; "grpo" (arXiv 2402.03300): (G - mean) / deviation;
    "dr_grpo" (arXiv 2503.20783): G - mean; "reinforce": G - mean, with all dialogues of the rollout as one group.
    An attempt that has no other to be compared with has the advantage 0.
    >>> returns = [[1.0, 3.0], [0.0, 1.0], [0.5]]
    >>> group_advantages(returns, [0, 0, 0], "rloo"), group_advantages(returns, [0, 0, 0], "dr_grpo")
    ([[0.75, 2.0], [-0.75, -2.0], [0.0]], [[0.5, 1.0], [-0.5, -1.0], [0.0]])
    >>> group_advantages(returns, [0, 0, 1], "grpo"), group_advantages(returns, [0, 0, 1], "reinforce")
    ([[1.0, 1.0], [-1.0, -1.0], [0.0]], [[0.5, 1.0], [-0.5, -1.0], [0.0]])
    """
    peers: dict[tuple[int, int], list[float]] = defaultdict(list)  # (group, k) -> returns
    group_of = [0] * len(groups) if method == "reinforce" else groups
    for group, row in zip(group_of, returns, strict=True):
        for k, value in enumerate(row):
            peers[group, k] += [] if value is None else [value]

    def advantage(value: float | None, others: list[float]) -> float:
        if value is None or min(others) == max(others):  # not by the mean, which may be off by a rounding
            return 0.0
        n, ahead = len(others), value - statistics.fmean(others)
        return {"rloo": ahead * n / (n - 1), "grpo": ahead / statistics.pstdev(others)}.get(method, ahead)

    rows = zip(group_of, returns, strict=True)
    return [[advantage(value, peers[group, k]) for k, value in enumerate(row)] for group, row in rows]


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float, weights: Tensor | float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), summed over the actions -> loss, sums to log.

    All (B, T) or any one shape; mask 1 = action; weights multiply each action's term. The caller divides by the number
    of actions of the optimiser step, on all ranks together. The ratio 1.5 of a good action is clipped to 1.2 and passes
    no gradient:
    >>> logprobs = torch.tensor([1.5, 1.0]).log().requires_grad_()
    >>> loss, stats = policy_loss(logprobs, torch.zeros(2), torch.tensor([1.0, -2.0]), torch.ones(2), clip=0.2)
    >>> loss.backward()
    >>> round(loss.item(), 6), logprobs.grad.tolist(), stats["clipped"].item()
    (0.8, [0.0, 2.0], 1.0)
    """
    action = mask > 0
    log_ratio = torch.where(action, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    gain, clipped_gain = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -torch.where(action, weights * torch.minimum(gain, clipped_gain), 0.0).sum()
    with torch.no_grad():
        stats = {
            "clipped": (action & (clipped_gain < gain)).sum().float(),
            "policy_kl": (ratio - 1 - log_ratio).sum(),  # k3 against the policy that sampled
        }
    return loss, stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the values, clipped like the policy, summed over the actions -> loss, sums to log.

    A value may move by `clip` from that of the rollout; of the errors of the moved and the clipped value the larger
    counts. All (B, T) or any one shape; mask 1 = action.
    >>> loss, _ = value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]), torch.ones(1), clip=0.2)
    >>> round(loss.item(), 6)  # 0.5 * max((1 - 2)^2, (0.2 - 2)^2)
    1.62
    """
    action = mask > 0
    values, old_values, returns = (torch.where(action, x, 0.0) for x in (values, old_values, returns))
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    error, clipped_error = (values - returns).square(), (clipped_values - returns).square()
    loss = 0.5 * torch.where(action, torch.maximum(error, clipped_error), 0.0).sum()
    return loss, {"value_clipped": (action & (clipped_error > error)).sum().float()}


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-action estimate of KL(policy || reference) that is never negative: exp(d) - 1 - d, d = log(ref / policy)."""
    d = ref_logprobs - logprobs
    return d.exp() - 1 - d


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages with mean 0 and variance 1 over the actions of all ranks; 0 stays at environment tokens. (B, T)."""
    action = mask > 0
    count, total, squares = all_sum(action.sum(), advantages[action].sum(), advantages[action].square().sum())
    mean = total / count
    scale = (squares / count - mean**2).clamp(min=1e-8).rsqrt()
    return torch.where(action, (advantages - mean) * scale, 0.0)


# Ranks ----------------------------------------------------------------------------------------------------------------
def all_sum(*values: Tensor | float) -> Tensor:
    """The values added up over all ranks, (len(values),) float64. All ranks must call it; alone, it is the values."""
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start_ranks() -> None:
    """Join torchrun's process group; without torchrun be a group of one."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Nobody talks while attempts are generated; the long timeout is for the rank whose dialogues take longest.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2))


def share(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Dialogues of a mini-batch -> those of each rank, so that ranks have about equally many tokens: the longest first,
    each to the rank that has fewest so far. Rank 0 trains on 9 + 1 tokens here, rank 1 on 5 + 4:
    >>> share([4, 9, 1, 5], ranks=2)
    [[1, 2], [3, 0]]
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min(range(ranks), key=lambda r: (tokens[r], len(shares[r])))
        shares[rank].append(index)
        tokens[rank] += lengths[index]
    return shares


# Packing --------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Batch:
    """The dialogues that this rank trains on as tensors, (B, T) each, aligned with Dialogue.ids, 0 behind its end."""

    dialogues: Sequence[Dialogue]
    mini_batches: list[range]  # rows of each optimiser step
    ids: Tensor  # int64
    mask: Tensor  # 1 = action
    attempt: Tensor  # int64; number of the attempt that an action belongs to, from 0
    rewards: Tensor
    sampler_logprobs: Tensor
    lengths: list[int]  # tokens of each dialogue
    old_logprobs: Tensor | None = None  # of the policy that sampled, by the trainer's own forward pass
    ref_logprobs: Tensor | None = None  # of the start model
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


def make_batch(mini_batches: Sequence[Sequence[Dialogue]]) -> Batch:
    dialogues = list(itertools.chain(*mini_batches))
    ends = list(itertools.accumulate(map(len, mini_batches)))

    def pad(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device())

    return Batch(
        dialogues=dialogues,
        mini_batches=[range(end - len(rows), end) for end, rows in zip(ends, mini_batches, strict=True)],
        ids=pad([d.ids for d in dialogues], torch.int64),
        mask=pad([d.mask for d in dialogues]),
        attempt=pad([attempt_numbers(d) for d in dialogues], torch.int64),
        rewards=pad([rollout.token_rewards(d) for d in dialogues]),
        sampler_logprobs=pad([d.logprobs for d in dialogues]),
        lengths=[len(d.ids) for d in dialogues],
    )


def attempt_numbers(dialogue: Dialogue) -> list[int]:
    """(T,) the number, from 0, of the attempt that each action belongs to; 0 elsewhere."""
    numbers = [0] * len(dialogue.ids)
    for k, attempt in enumerate(dialogue.attempts):
        numbers[attempt.start : attempt.end] = [k] * (attempt.end - attempt.start)
    return numbers


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


# Models ---------------------------------------------------------------------------------------------------------------
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


AttentionInterface.register("varlen", varlen_attention)


class Actor(nn.Module):
    """A causal language model asked for its actions alone: forward -> (logprobs, entropy), (A,) float32 each."""

    def __init__(self, model: str, tokens: int):
        super().__init__()
        self.lm = load_model(model)
        self.tokens = tokens  # ids of the tokenizer; rows of a padded vocabulary behind them are never sampled

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        hidden = read(self.lm.model, micro)  # (A, H)
        rows, columns = micro.state
        targets = micro.ids[rows, columns + 1]  # (A,)
        head = self.lm.lm_head.weight[: self.tokens]  # (V, H)
        parts = [
            checkpoint(token_logprobs, h, t, head, use_reentrant=False)
            for h, t in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True)
        ]
        logprobs, entropy = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropy)


def read(body: nn.Module, micro: MicroBatch) -> Tensor:
    """Hidden states from which the actions are taken, (A, H)."""
    rows = body(input_ids=micro.ids, position_ids=micro.positions, use_cache=False, **micro.attention)
    return rows.last_hidden_state[micro.state]  # (R, L, H) -> (A, H)


def token_logprobs(hidden: Tensor, targets: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """(A, H), (A,), (V, H) -> log-probability of each target and entropy of its distribution, (A,) float32."""
    logits = F.linear(hidden, head).float()  # (A, V)
    log_total = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_total
    entropy = log_total - (logits.softmax(-1) * logits).sum(-1)
    return logprobs, entropy


class Critic(nn.Module):
    """The same model with one number in place of the vocabulary: -> value of each action's state, (A,)."""

    def __init__(self, model: str):
        super().__init__()
        self.body = load_model(model).model
        width = self.body.config.hidden_size
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=1 / (width + 1))

    def forward(self, micro: MicroBatch) -> Tensor:
        return (read(self.body, micro) @ self.head.weight[0]).float()  # (A, H) -> (A,)


def load_model(model: str) -> nn.Module:
    """Float32 master weights: bfloat16 ones would swallow updates of a learning rate of 5e-7."""
    attention = "varlen" if by_kernel() else "sdpa"
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention).train()
    for name in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(lm.config, name, None):
            raise SystemExit(f"{model}: its {name} is not computed here; take a model without (Qwen, Llama)")
    if GRADIENT_CHECKPOINTING:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
    """FSDP2: a unit a block; the rest, with the embedding that may be tied to the head, in the root. SHARD_RANKS ranks
    share one copy of the weights; with more ranks than that there are replicas, whose gradients are averaged (HSDP)."""
    world = dist.get_world_size()
    together = SHARD_RANKS or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    shape, names = (
        ((world,), ("shard",)) if together == world else ((world // together, together), ("replica", "shard"))
    )
    options = {
        "mesh": init_device_mesh(device().type, shape, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, COMPUTE_DTYPE), reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if OFFLOAD else OffloadPolicy(),
    }
    if not OFFLOAD:
        model.to(device())
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


@dataclasses.dataclass
class Learner:
    """What is trained, with what; the critic is None where the advantages need none, the reference where no KL does."""

    actor: Actor
    critic: Critic | None
    reference: Actor | None
    optimizers: dict[str, torch.optim.Optimizer]  # "actor", "critic"
    skipped: int = 0  # optimiser steps skipped in a row

    @classmethod
    def load(cls, tokens: int) -> "Learner":
        """All models from MODEL; tokens: size of the tokenizer. Optimisers come before any forward pass (FSDP2)."""
        actor = Actor(MODEL, tokens)
        learner = cls(shard(actor, actor.lm.model.layers), None, None, {"actor": adam(actor, ACTOR_LR)})
        if ESTIMATOR == "gae":
            critic = Critic(MODEL)
            learner.critic = shard(critic, critic.body.layers)
            learner.optimizers["critic"] = adam(critic, CRITIC_LR)
        if has_reference():
            reference = Actor(REFERENCE or MODEL, tokens).requires_grad_(False)
            learner.reference = shard(reference, reference.lm.model.layers)
        return learner

    def trained(self) -> Iterator[tuple[str, nn.Module, torch.optim.Optimizer]]:
        for name, optimizer in self.optimizers.items():
            yield name, getattr(self, name), optimizer


def has_reference() -> bool:
    return any(KL_COEF) or KL_IN_REWARD > 0


def named_weights(actor: Actor) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights under their Hugging Face names, whole, one by one; every rank must take them all."""
    for name, parameter in actor.named_parameters():
        yield name.removeprefix("lm."), parameter.detach().full_tensor().to(getattr(torch, COMPUTE_DTYPE))


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def learning_rate(progress: float) -> float:
    """Share of the peak at `progress` in [0, 1] of training: linear over WARMUP, then half a cosine to MIN_LR."""
    if progress < WARMUP:
        return progress / WARMUP
    decayed = min(1.0, (progress - WARMUP) / (1 - WARMUP))
    return MIN_LR + (1 - MIN_LR) * 0.5 * (1 + math.cos(math.pi * decayed))


# One step -------------------------------------------------------------------------------------------------------------
def problem_index(visit: int, count: int) -> int:
    """The problem of the run's visit-th dialogue: pass after pass over all problems, each in an order of its own.
    A pure function of SEED and visit: to resume, the step is all that one has to know."""
    return problem_order(SEED, visit // count, count)[visit % count]


@functools.lru_cache(maxsize=2)
def problem_order(seed: int, epoch: int, count: int) -> list[int]:
    return random.Random(f"{seed}-{epoch}").sample(range(count), count)


def play_step(
    engine: Engine, chat: Chat, problems: list[dict[str, Any]], offline: dict[str, list[tuple]], step: int
) -> list[Dialogue]:
    """This rank's dialogues of a step: every WORLD-th, so that a mini-batch is the same set for any number of ranks.
    Ranks that share an engine play the dialogues of all of them together."""
    rank, world, shared = dist.get_rank(), dist.get_world_size(), rollout.TENSOR_PARALLEL
    played = [i for i in range(DIALOGUES) if i % world // shared == rank // shared]
    dialogues = []
    for i in played:
        visit = ((step - 1) * DIALOGUES + i) // rollout.SAMPLES_PER_PROMPT
        problem = problems[problem_index(visit, len(problems))]
        dialogues.append(rollout.new_dialogue(chat, problem, rollout.draw_attempts(SEED, step, i)))
        rollout.begin_offline(chat, dialogues[-1], offline.get(problem["id"], ()), SEED, visit)
    seeds = [rollout.random_number(SEED, step, i) for i in played]
    progress = f"rollout {step}" if rank == 0 else None
    rollout.play(engine, chat, dialogues, seeds, rollout.TEMPERATURE, progress)
    dialogues = dialogues[rank % shared :: shared]
    for dialogue in dialogues:
        rollout.assign_rewards(dialogue)
    return dialogues


def attempt_advantages(batch: Batch) -> Tensor:
    """(B, T) the advantage of an attempt at each of its actions; 0 elsewhere."""
    advantages = torch.zeros_like(batch.mask)
    for row, dialogue in enumerate(batch.dialogues):
        for attempt in dialogue.attempts:
            advantages[row, attempt.start : attempt.end] = attempt.advantage
    return advantages * batch.mask


@torch.no_grad()
def over_actions(model: nn.Module, batch: Batch) -> Tensor:
    """What the model says of each action (an actor its log-probability, a critic its value) as (B, T), 0 elsewhere."""
    out = torch.zeros_like(batch.rewards)
    for micro, counts, _ in micro_batches(batch, range(len(batch.lengths))):
        said = model(micro)
        if counts:
            out[micro.action] = said[0] if isinstance(said, tuple) else said
    model.reshard()  # FSDP keeps the root's weights gathered for a backward pass; there is none
    return out


def exchange(dialogues: list[Dialogue]) -> list[Dialogue]:
    """The dialogues of all ranks, in the order of the step: what rank r played j-th is the (j * ranks + r)-th."""
    everyones: list[Any] = [dialogues]
    if dist.get_world_size() > 1:
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, dialogues)
    return [dialogue for of_one_turn in zip(*everyones, strict=True) for dialogue in of_one_turn]


def my_batch(dialogues: Sequence[Dialogue]) -> Batch:
    """This rank's share of each mini-batch. Who played a dialogue does not matter for who trains on it."""
    mini_batches = [dialogues[at : at + MINI_BATCH] for at in range(0, len(dialogues), MINI_BATCH)]
    shares = [share([len(d.ids) for d in rows], dist.get_world_size())[dist.get_rank()] for rows in mini_batches]
    return make_batch([[rows[i] for i in mine] for rows, mine in zip(mini_batches, shares, strict=True)])


def compare(dialogues: Sequence[Dialogue]) -> None:
    """Give each attempt of a step's dialogues its advantage over the others (group_advantages)."""
    returns = []
    for dialogue in dialogues:
        row = attempt_returns([a.reward for a in dialogue.attempts], ATTEMPT_GAMMA)
        returns.append([value if a.own else None for value, a in zip(row, dialogue.attempts, strict=True)])
    groups = [i // rollout.SAMPLES_PER_PROMPT for i in range(len(dialogues))]
    for dialogue, advantages in zip(dialogues, group_advantages(returns, groups, ESTIMATOR), strict=True):
        for attempt, advantage in zip(dialogue.attempts, advantages, strict=True):
            attempt.advantage = advantage


def prepare(batch: Batch, learner: Learner) -> dict[str, float]:
    """Fill in what the update needs: log-probabilities, values, advantages and returns -> metrics."""
    batch.old_logprobs = over_actions(learner.actor, batch)
    batch.ref_logprobs = over_actions(learner.reference, batch) if learner.reference else batch.old_logprobs
    drift = batch.old_logprobs - batch.ref_logprobs  # (B, T)
    if learner.critic:
        batch.values = over_actions(learner.critic, batch)
        rewards = batch.rewards - KL_IN_REWARD * drift
        batch.advantages, batch.returns = gae(rewards, batch.values, batch.mask, GAMMA, LAMBDA, ATTEMPT_GAMMA)
    else:
        batch.values = torch.zeros_like(drift)
        batch.advantages = batch.returns = attempt_advantages(batch)
    action = batch.mask > 0
    returns, error = batch.returns[action], (batch.returns - batch.values)[action]
    mismatch = (batch.old_logprobs - batch.sampler_logprobs)[action].abs()
    n, gap, total, squares, errors, errors2, k1, advantage = all_sum(
        len(returns), mismatch.sum(), returns.sum(), returns.square().sum(), error.sum(), error.square().sum(),
        drift[action].sum(), batch.advantages[action].sum(),
    ).tolist()  # fmt: skip
    variance, unexplained = squares / n - (total / n) ** 2, errors2 / n - (errors / n) ** 2
    if not gap / n <= MAX_MISMATCH:
        raise RuntimeError(
            f"sampler and trainer disagree by {gap / n:.3f} nats an action (MAX_MISMATCH={MAX_MISMATCH}): the engine "
            "does not hold the trainer's weights, or samples from another distribution (TEMPERATURE must be 1)"
        )
    if WHITEN:
        batch.advantages = whiten(batch.advantages, batch.mask)
    metrics = {"sampler_mismatch": gap / n, "advantage": advantage / n}
    if learner.reference:
        metrics["kl_k1"] = k1 / n
    if learner.critic:
        metrics["explained_variance"] = 1 - unexplained / variance if variance > 0 else 0.0
    return metrics


def update(batch: Batch, learner: Learner, train_actor: bool, dump: Path) -> dict[str, float]:
    """EPOCHS passes of PPO over the rollout, an optimiser step a mini-batch -> metrics (means over actions).

    train_actor: whether the actor learns, too (not during CRITIC_WARMUP). A step with a gradient that is not finite is
    skipped and its mini-batch written to a file whose name begins as `dump`; after MAX_SKIPPED in a row, RuntimeError.
    """
    sums: Counter[str] = Counter()
    norms: dict[str, list[float]] = defaultdict(list)
    kl_coef = torch.tensor(KL_COEF, device=device())[batch.attempt.clamp(max=len(KL_COEF) - 1)]  # (B, T)
    for rows in batch.mini_batches * EPOCHS:
        (actions,) = all_sum(batch.mask[rows.start : rows.stop].sum()).tolist()
        scale = dist.get_world_size() / actions  # FSDP averages gradients over ranks; we want the mean over all actions
        for micro, counts, last in micro_batches(batch, rows):
            at = micro.action
            mask = torch.full_like(batch.mask[at], float(counts))  # (A,)
            losses = {"actions": mask.sum()}
            if train_actor:
                learner.actor.set_requires_gradient_sync(last)
                logprobs, entropy = learner.actor(micro)
                weights = 1.0
                if TRUNCATE_IS:
                    weights = (batch.old_logprobs - batch.sampler_logprobs)[at].exp().clamp(max=TRUNCATE_IS)
                loss, stats = policy_loss(logprobs, batch.old_logprobs[at], batch.advantages[at], mask, CLIP, weights)
                kl, entropy = mask * kl_k3(logprobs, batch.ref_logprobs[at]), (mask * entropy).sum()
                ((loss + (kl_coef[at] * kl).sum() - ENTROPY_COEF * entropy) * scale).backward()
                losses |= {"policy_loss": loss, "entropy": entropy, **stats}
                losses |= {"kl_k3": kl.sum()} if learner.reference else {}
            if learner.critic:
                learner.critic.set_requires_gradient_sync(last)
                values = learner.critic(micro)
                loss, stats = value_loss(values, batch.values[at], batch.returns[at], mask, VALUE_CLIP)
                (loss * scale).backward()
                losses |= {"value_loss": loss, **stats}
            sums.update({name: value.item() for name, value in losses.items()})
        step = [part for part in learner.trained() if train_actor or part[0] == "critic"]
        found = {name: nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP) for name, model, _ in step}
        found = {f"{name}_grad_norm": norm.full_tensor().item() for name, norm in found.items()}
        if all(map(math.isfinite, found.values())):
            learner.skipped = 0
            for _, _, optimizer in step:
                optimizer.step()
            for name, norm in found.items():
                norms[name].append(norm)
        else:
            skip(batch, rows, learner, found, dump)
        for _, _, optimizer in step:
            optimizer.zero_grad(set_to_none=True)
    names = sorted(sums)
    totals = dict(zip(names, all_sum(*(sums[k] for k in names)).tolist(), strict=True))
    count = totals.pop("actions")
    return {k: v / count for k, v in totals.items()} | {k: sum(v) / len(v) for k, v in norms.items()}


def skip(batch: Batch, rows: range, learner: Learner, norms: dict[str, float], dump: Path) -> None:
    """Write down the mini-batch behind a gradient that is not finite; its optimiser step is not taken."""
    learner.skipped += 1
    number = 1 + sum(1 for _ in dump.parent.glob(f"{dump.name}-*-rank-{dist.get_rank()}.pt"))
    path = dump.with_name(f"{dump.name}-{number}-rank-{dist.get_rank()}.pt")
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name not in ("mini_batches",)}
    torch.save({name: value[rows.start : rows.stop] for name, value in tensors.items()}, path)
    print(f"gradient not finite ({norms}): step skipped, its mini-batch is in {path}")
    if learner.skipped >= MAX_SKIPPED:
        raise RuntimeError(
            f"{learner.skipped} gradients in a row were not finite; the mini-batches are in {dump.parent}"
        )


def rollout_metrics(dialogues: Sequence[Dialogue]) -> dict[str, float]:
    """Means over all dialogues of a step, or over the policy's attempts; accuracy_at_k: Dialogue.solved_within(k), if k
    were granted, in dialogues that the policy began."""
    attempts = [a for d in dialogues for a in d.attempts if a.own]
    begun = [d for d in dialogues if all(a.own for a in d.attempts)]
    generated = sum(sum(d.mask) for d in dialogues)

    def share_of(field: str, value: str) -> float:
        return sum(getattr(a, field) == value for a in attempts) / len(attempts)

    within = {}
    for k in range(1, rollout.MAX_ATTEMPTS + 1):
        if granted := [d for d in begun if d.max_attempts >= k]:
            within[f"accuracy_at_{k}"] = statistics.fmean(d.solved_within(k) for d in granted)
    return {
        "reward": sum(a.reward for a in attempts) / len(dialogues),
        "accuracy": sum(d.solved_within(d.max_attempts) for d in begun) / max(1, len(begun)),
        "attempts_used": len(attempts) / len(dialogues),
        "tokens": sum(len(d.ids) for d in dialogues),
        "generated": generated,
        "attempt_length": generated / len(attempts),
        "began_offline": 1 - len(begun) / len(dialogues),
        "out_of_context": statistics.fmean(d.out_of_context for d in dialogues),
        **{f"ending_{e}": share_of("ending", e) for e in rollout.ENDINGS},
        **{f"status_{x}": share_of("status", x) for x in rollout.STATUSES},
        **within,
    }


# The run's folder -----------------------------------------------------------------------------------------------------
def config_of(constants: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds: every constant of the stages that train, and which problems there were."""
    sha256 = hashlib.sha256(Path(constants["ppo.TRAIN_DATA"]).read_bytes()).hexdigest()
    return json.loads(json.dumps(constants | {"SHA-256 of TRAIN_DATA": sha256}))


def open_run(folder: Path, constants: dict[str, Any]) -> None:
    """Create runs/RUN with its config.json. Raises SystemExit if a run there has begun with other constants or other
    problems; constants that have to do with the hardware may differ."""
    config, constants = folder / "config.json", config_of(constants)
    if (folder / "metrics.jsonl").is_file():
        there = json.loads(config.read_text(encoding="utf-8"))
        names = sorted((there.keys() | constants.keys()) - HARDWARE)
        differ = [k for k in names if there.get(k) != constants.get(k)]
        if differ:
            lines = "\n".join(f"  {k}: {there.get(k)} there, {constants.get(k)} now" for k in differ)
            raise SystemExit(f"{folder} is a run with other constants; take another RUN or delete it:\n{lines}")
    elif dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config, json.dumps(constants, indent=1))


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoints/step-??????"))


@contextlib.contextmanager
def writing(partial: Path) -> Iterator[None]:
    """Turns a disk that is full into a clear end, which leaves nothing half-written and all checkpoints whole."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        there = [path.name for path in checkpoints(partial.parent.parent) + checkpoints(partial.parent)]
        behind = f"from {there[-1]}" if there else "at its beginning"
        raise SystemExit(f"{partial} could not be written ({last_line(error)}); the run goes on {behind}") from error


def save(folder: Path, step: int, generated: int, learner: Learner) -> Future:
    """Write checkpoints/step-000100.partial: models and optimisers, sharded, and the step -> done when it is written,
    with ASYNC_SAVE while the run goes on. All ranks must call it, and publish() behind it."""
    partial = folder / "checkpoints" / f"step-{step:06d}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
    dist.barrier()
    state = {"parts": gather_state(learner), "step": step, "generated": generated}
    written: Future = Future()
    with writing(partial):
        if ASYNC_SAVE:
            return dcp.async_save(state, checkpoint_id=partial, process_group=saving_group())
        written.set_result(dcp.save(state, checkpoint_id=partial))
    return written


@functools.cache
def saving_group() -> dist.ProcessGroup:
    """Ranks that write behind a step talk among themselves: in the trainer's group they would cut into its talk."""
    return dist.new_group(backend="gloo")


def publish(folder: Path, step: int, written: Future, best: int) -> None:
    """Wait for a checkpoint and give it its name. The newest KEEP_CHECKPOINTS and that of step `best` stay. All ranks
    must call it. A failure leaves the checkpoints before it whole."""
    name = folder / "checkpoints" / f"step-{step:06d}"
    partial = name.with_name(name.name + ".partial")
    with writing(partial):
        written.result()
    dist.barrier()
    if dist.get_rank() == 0:
        partial.rename(name)
        for old in checkpoints(folder)[:-KEEP_CHECKPOINTS]:
            if old.name != f"step-{best:06d}":
                shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, learner: Learner) -> tuple[int, int]:
    """The newest checkpoint into models and optimisers -> (step, generated tokens); (0, 0) where there is none.

    Raises SystemExit, naming the checkpoint and the one before it, if it cannot be read.
    """
    *older, newest = [None, *checkpoints(folder)]
    if newest is None:
        return 0, 0
    state = {"parts": gather_state(learner), "step": 0, "generated": 0}
    try:
        dcp.load(state, checkpoint_id=newest)
    except (Exception, CheckpointException) as error:  # whatever a damaged or foreign file makes of its reader
        before = f"it resumes from {older[-1].name}" if older and older[-1] else "it starts anew"
        raise SystemExit(
            f"{newest} is damaged or of another model ({last_line(error)}): delete it and start again; {before}"
        ) from error
    for name, model, optimizer in learner.trained():
        weights, moments = state["parts"][name]["model"], state["parts"][name]["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state["step"], state["generated"]


def gather_state(learner: Learner) -> dict[str, Any]:
    """Models and optimisers as the checkpoint has them."""
    idle = [optimizer for _, _, optimizer in learner.trained() if not optimizer.state]
    states = {name: get_state_dict(model, optimizer) for name, model, optimizer in learner.trained()}
    for optimizer in idle:  # torch has made it one step of nothing, to have moments to speak of; that was none
        for moments in optimizer.state.values():
            moments["step"].zero_()
    return {name: {"model": weights, "optimizer": moments} for name, (weights, moments) in states.items()}


def last_line(error: BaseException) -> str:
    """The most telling line of an error that torch has wrapped in many."""
    lines = [line.strip() for line in str(error).splitlines() if "Error" in line or "error" in line]
    return (lines or [repr(error)])[-1][:200]


def export(folder: Path, actor: Actor, tokenizer: Any) -> None:
    """The policy as a Hugging Face folder, which transformers and vLLM open as it is. All ranks must call it."""
    weights = {name: tensor.cpu() for name, tensor in named_weights(actor)}
    if dist.get_rank() == 0:
        partial, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
        for left in (partial, old):  # by a run that was killed while it exported
            shutil.rmtree(left, ignore_errors=True)
        with writing(partial):
            actor.lm.save_pretrained(partial, state_dict=weights)
            actor.lm.config.dtype = getattr(torch, COMPUTE_DTYPE)  # save_pretrained has put down that of the shards
            actor.lm.config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if folder.is_dir():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows behind those of a log. A full disk may leave half of one, which keep_until() drops."""
    try:
        with path.open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise SystemExit(f"{path} could not be written ({error}); the run goes on from its last checkpoint") from error


def best_so_far(folder: Path, goal: str) -> tuple[int, float]:
    """(step, value) of the highest metric `goal` in the log, the first of equals, by rank 0's copy of it; (0, -1) where
    there is none."""
    rows = [row for row in read_records(folder / "metrics.jsonl") if goal in row]
    found = [max(((row[goal], -row["step"]) for row in rows), default=(-1.0, 0))]
    dist.broadcast_object_list(found, src=0)
    value, step = found[0]
    return -step, value


def keep_until(path: Path, step: int) -> None:
    """Drop the rows of a log that a killed run wrote behind its last checkpoint: those steps will be done again."""
    if path.is_file():
        kept = [row for row in read_records(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def as_text(dialogue: Dialogue, chat: Chat, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "id": dialogue.problem["id"],
        "gold": dialogue.problem["answer"],
        "max_attempts": dialogue.max_attempts,
        "text": chat.tokenizer.decode(dialogue.ids),
        "attempts": [dataclasses.asdict(a) for a in dialogue.attempts],
    }


def by_token(batch: Batch, row: int, chat: Chat, step: int) -> dict[str, Any]:
    """One dialogue of the batch token by token, for evaluate.py's report: what PPO reinforces, and where."""
    dialogue = batch.dialogues[row]

    def numbers(tensor: Tensor) -> list[float]:
        return [round(x, 4) for x in tensor[row, : len(dialogue.ids)].tolist()]

    values = {name: numbers(getattr(batch, name)) for name in ("advantages", "values", "returns")}
    tokens = [chat.tokenizer.decode([token]) for token in dialogue.ids]
    text = {k: v for k, v in as_text(dialogue, chat, step).items() if k != "text"}
    return {**text, "tokens": tokens, "mask": dialogue.mask, **values}


# The run --------------------------------------------------------------------------------------------------------------
def check_constants() -> None:
    """Raises SystemExit where numbers do not fit each other, before anything costs time."""
    rollout.check_constants()
    for name in ("STEPS", "DIALOGUES", "MINI_BATCH", "EPOCHS", "LOGITS_CHUNK", "SAVE_EVERY", "KEEP_CHECKPOINTS"):
        if globals()[name] < 1:
            raise SystemExit(f"{name}={globals()[name]}: must be at least 1")
    world, shared = dist.get_world_size(), rollout.TENSOR_PARALLEL
    for name, number, of, unit in (
        ("DIALOGUES", DIALOGUES, "MINI_BATCH", MINI_BATCH),
        ("MINI_BATCH", MINI_BATCH, "the number of ranks", world),
        ("MINI_BATCH", MINI_BATCH, "rollout.SAMPLES_PER_PROMPT", rollout.SAMPLES_PER_PROMPT),
        ("the number of ranks", world, "rollout.TENSOR_PARALLEL", shared),
        ("the number of ranks", world, "SHARD_RANKS", SHARD_RANKS or 1),
    ):
        if number % unit:
            raise SystemExit(f"{name} = {number} must be a multiple of {of} = {unit}")
    if not 0 <= WARMUP < 1:
        raise SystemExit(f"WARMUP={WARMUP}: must be a share of the training, at least 0 and less than 1")
    if ESTIMATOR not in ("gae", "rloo", "grpo", "dr_grpo", "reinforce"):
        raise SystemExit(f"ESTIMATOR={ESTIMATOR}: must be gae, rloo, grpo, dr_grpo or reinforce")
    if ESTIMATOR != "gae" and (KL_IN_REWARD or CRITIC_WARMUP):
        raise SystemExit(f"KL_IN_REWARD and CRITIC_WARMUP belong to ESTIMATOR=gae, not to {ESTIMATOR}")
    if ESTIMATOR in ("rloo", "grpo", "dr_grpo") and rollout.SAMPLES_PER_PROMPT == 1:
        raise SystemExit(
            f"ESTIMATOR={ESTIMATOR} compares the dialogues of a problem: SAMPLES_PER_PROMPT must be 2 or more"
        )
    if rollout.TEMPERATURE != 1:
        raise SystemExit(
            f"TEMPERATURE={rollout.TEMPERATURE}: the trainer's log-probabilities are those at temperature 1"
        )
    if TRACK not in ("", "tensorboard", "wandb"):
        raise SystemExit(f"TRACK={TRACK}: must be tensorboard, wandb or empty")
    if TRACK == "wandb" and not importlib.util.find_spec("wandb"):
        raise SystemExit("TRACK=wandb: Weights & Biases is not installed (pip install wandb)")


def split_problems(problems: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """-> (train, dev): DEV_PROBLEMS of them drawn by SEED, and the others less what asks the same as one of those."""
    if len(problems) <= DEV_PROBLEMS:
        raise SystemExit(
            f"DEV_PROBLEMS={DEV_PROBLEMS} leaves none of {TRAIN_DATA}'s {len(problems)} problems to train on"
        )
    dev = random.Random(f"dev-{SEED}").sample(problems, DEV_PROBLEMS)
    asked = {question_key(p["question"]) for p in dev}
    return [p for p in problems if question_key(p["question"]) not in asked], dev


def dev_accuracies(engine: Engine, chat: Chat, dev: list[dict[str, Any]]) -> dict[str, float]:
    """Greedy accuracy (Dialogue.solved_within) at 1..MAX_ATTEMPTS attempts of dialogues that grant as many. All ranks
    must call it."""
    groups = dist.get_world_size() // rollout.TENSOR_PARALLEL
    mine = dev[dist.get_rank() // rollout.TENSOR_PARALLEL :: groups]
    dialogues = [rollout.new_dialogue(chat, p, rollout.MAX_ATTEMPTS) for p in mine]
    rollout.play(engine, chat, dialogues, [0] * len(dialogues), 0.0, "dev" if dist.get_rank() == 0 else None)
    ks = range(1, rollout.MAX_ATTEMPTS + 1)
    solved = all_sum(*(sum(d.solved_within(k) for d in dialogues) for k in ks))
    times = rollout.TENSOR_PARALLEL * len(dev)  # ranks that share an engine have all played the same
    return {f"dev_accuracy_at_{k}": n / times for k, n in zip(ks, solved.tolist(), strict=True)}


def model_flops(lm: nn.Module, tokens: int, lengths: Iterable[int], actions: int) -> float:
    """Floating-point operations that a whole update needs, on all ranks together: 2 a weight and token for a forward
    pass, 4 for a backward pass, attention likewise by the pairs that it looks at. What checkpointing computes again is
    not counted. lm: the policy, or its shape; tokens: of the tokenizer."""
    lengths, config = list(lengths), lm.config
    weights = sum(p.numel() for p in lm.model.layers.parameters())
    pairs = sum(n * n for n in lengths) / 2
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    body = 2 * weights * sum(lengths) + 4 * pairs * width * config.num_hidden_layers
    head = 2 * actions * config.hidden_size * tokens
    reference, critic = has_reference(), ESTIMATOR == "gae"
    once = body * (1 + reference + critic) + head * (1 + reference)  # prepare(): no gradients
    return once + EPOCHS * 3 * (body * (1 + critic) + head)


def plan(tokens: int, problems: int, dev: int) -> str:
    """What will happen, for the terminal: batches, memory and the least time that the hardware allows."""
    world, gib = dist.get_world_size(), 2**30
    with torch.device("meta"):  # the shape, no weights
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL))
    config, critic = lm.config, ESTIMATOR == "gae"
    weights = sum(p.numel() for p in lm.parameters())
    owners = SHARD_RANKS or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # Bytes a weight: itself, its gradient and Adam's two moments, 4 each; the reference has no more than itself. Whole
    # on every rank are the gradients that add up over micro-batches.
    sharded = weights * (16 * (1 + critic) + 4 * has_reference()) / owners
    whole = weights * 4 * (1 + critic) * (owners > 1)
    item = getattr(torch, COMPUTE_DTYPE).itemsize
    kept = 1 if GRADIENT_CHECKPOINTING else 34  # activations of a layer, in hidden states (34: arXiv 2205.05198, eq. 2)
    passes = MAX_TOKENS_PER_MICRO_BATCH * config.hidden_size * item * (config.num_hidden_layers * kept + 34)
    passes += 4 * LOGITS_CHUNK * tokens * 4 + 2 * config.vocab_size * config.hidden_size * item
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(device()).total_memory / gib
        engine = rollout.GPU_MEMORY * room
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gib / world
        engine = rollout.CPU_CACHE_MIB / 1024 + 2 * weights * item / gib  # as they are, and packed
    trainer = sharded * (not OFFLOAD) / gib
    asleep = torch.cuda.is_available()  # the engine, while the trainer works; on a CPU it keeps its memory
    updating, playing = trainer + engine * (not asleep) + (whole + passes) / gib, trainer + engine
    cure = "; more ranks, a smaller micro-batch, OFFLOAD=1 or a smaller GPU_MEMORY would"
    lines = [
        f"{problems:,} problems to train on, {dev} to choose the checkpoint; {world} rank{'s' * (world > 1)}",
        f"a rollout: {DIALOGUES // rollout.SAMPLES_PER_PROMPT} problems x {rollout.SAMPLES_PER_PROMPT} = {DIALOGUES} "
        f"dialogues of up to {rollout.MAX_ATTEMPTS} attempts",
        f"a step: {EPOCHS} x {DIALOGUES // MINI_BATCH} updates of {MINI_BATCH} dialogues, in micro-batches of at most "
        f"{MAX_TOKENS_PER_MICRO_BATCH:,} tokens",
        f"memory of a rank, estimated: {updating:.1f} GiB to train, {playing:.1f} to play, {trainer:.1f} of it weights "
        f"and optimisers, of {room:.0f}: "
        + ("fits" if max(updating, playing) < 0.95 * room else f"will NOT fit{cure}"),
    ]
    if torch.cuda.is_available():
        longest = rollout.CONTEXT // 2  # a guess: half of the context
        flops = model_flops(lm, tokens, [longest] * DIALOGUES, longest * DIALOGUES)
        hours = STEPS * flops / (0.4 * PEAK_TFLOPS * 1e12 * world) / 3600
        lines.append(
            f"updates, projected at 40 % of {PEAK_TFLOPS:.0f} TFLOPS and {longest} tokens a dialogue: {hours:.1f} h"
        )
    return "\n".join(lines)


SHOWN = {  # metric -> its name on the terminal
    "reward": "reward", "accuracy_at_1": "acc@1", "accuracy": "acc", "attempts_used": "attempts",
    "attempt_length": "length", "entropy": "entropy", "kl_k3": "kl", "clipped": "clipped",
    "explained_variance": "expl.var", "tokens_per_second": "tokens/s", "peak_memory_gib": "GiB",
}  # fmt: skip


class Tracker:
    """metrics.jsonl, TensorBoard or Weights & Biases, and a line on the terminal; rank 0's alone."""

    def __init__(self, folder: Path, step: int, constants: dict[str, Any]):
        self.path = folder / "metrics.jsonl"
        self.writer = None
        if TRACK == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        elif TRACK == "wandb":
            import wandb

            name = {"name": RUN, "id": RUN.replace("/", "-"), "resume": "allow"}
            wandb.init(project="multi-attempt", dir=folder, config=constants, **name)

    def log(self, metrics: dict[str, float], bar: tqdm) -> None:
        append(self.path, [metrics])
        numbers = {name: value for name, value in metrics.items() if name != "step" and value is not None}
        if TRACK == "tensorboard":
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, metrics["step"])
        elif TRACK == "wandb":
            import wandb

            wandb.log(numbers, step=metrics["step"])
        cells = [f"{label} {numbers[name]:.4g}" for name, label in SHOWN.items() if name in numbers]
        bar.write(f"step {metrics['step']} | " + " | ".join(cells))


def train(folder: Path, constants: dict[str, Any], problems: list[dict[str, Any]]) -> None:
    lead = dist.get_rank() == 0
    torch.manual_seed(SEED)
    chat = Chat(rollout.load_tokenizer(MODEL))
    problems, dev = split_problems(rollout.check_lengths(chat, problems, TRAIN_DATA))
    offline = rollout.load_offline(problems, Path(TRAIN_DATA).stem)
    if lead:
        print(plan(len(chat.tokenizer), len(problems), len(dev)), flush=True)
    if DRY_RUN:
        return
    engine = Engine(MODEL, dtype=COMPUTE_DTYPE, seed=SEED)  # before the trainer: it wants to find the GPU's memory free
    engine.sleep()
    learner = Learner.load(len(chat.tokenizer))
    step, generated = load(folder, learner)
    if lead:
        for log in ("metrics.jsonl", "dialogues.jsonl", "tokens.jsonl"):
            keep_until(folder / log, step)
        print(f"{folder} goes on behind step {step}" if step else f"{folder} begins")
    goal = f"dev_accuracy_at_{rollout.MAX_ATTEMPTS}"
    best, best_accuracy = best_so_far(folder, goal)
    tracker = Tracker(folder, step, constants) if lead else None
    save_seconds, stop = 0.0, []
    unpublished: tuple[int, Future] | None = None  # step of a checkpoint that is being written
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # a preempted job: finish the step, save, end well

    def progress() -> float:
        return generated / TOKEN_BUDGET if TOKEN_BUDGET else step / STEPS

    engine.load_weights(named_weights(learner.actor))
    total, unit = (TOKEN_BUDGET, " tokens") if TOKEN_BUDGET else (STEPS, " steps")
    bar = tqdm(total=total, unit=unit, unit_scale=bool(TOKEN_BUDGET), desc=RUN, disable=not lead)
    bar.update(generated if TOKEN_BUDGET else step)
    bar.unpause()
    while progress() < 1:
        step += 1
        clock = Clock()
        dialogues = play_step(engine, chat, problems, offline, step)
        engine.sleep()
        clock.stop("rollout")
        dialogues = exchange(dialogues)
        if ESTIMATOR != "gae":
            compare(dialogues)
        batch = my_batch(dialogues)
        metrics = rollout_metrics(dialogues)
        clock.stop("pack")
        metrics |= prepare(batch, learner)
        clock.stop("prepare")
        generated += metrics["generated"]
        factor = learning_rate(progress())
        for name, _, optimizer in learner.trained():
            metrics[f"{name}_lr"] = {"actor": ACTOR_LR, "critic": CRITIC_LR}[name] * factor
            for group in optimizer.param_groups:
                group["lr"] = metrics[f"{name}_lr"]
        metrics |= update(batch, learner, step > CRITIC_WARMUP, folder / f"not-finite-{step:06d}")
        clock.stop("update")
        engine.load_weights(named_weights(learner.actor))
        clock.stop("transfer")
        (preempted,) = all_sum(bool(stop))
        due = step % SAVE_EVERY == 0 or progress() >= 1
        if due and dev:
            metrics |= dev_accuracies(engine, chat, dev)
            if metrics[goal] > best_accuracy:
                best, best_accuracy = step, metrics[goal]
                export(folder / "best", learner.actor, chat.tokenizer)
            clock.stop("dev")
        shape, lengths = (learner.actor.lm, learner.actor.tokens), [len(d.ids) for d in dialogues]
        flops = model_flops(*shape, lengths, metrics["generated"])
        trained = clock.seconds["prepare"] + clock.seconds["update"]
        metrics = {
            "step": step,
            "generated_tokens": generated,
            "token_budget": TOKEN_BUDGET,
            **metrics,
            **{f"seconds_{name}": seconds for name, seconds in clock.seconds.items()},
            "seconds_save": save_seconds,  # of the step before: this one's logs come before its checkpoint
            "tokens_per_second": metrics["tokens"] / sum(clock.seconds.values()),
            "mfu": flops / trained / (PEAK_TFLOPS * 1e12 * dist.get_world_size()) if torch.cuda.is_available() else 0.0,
            "peak_memory_gib": peak_memory(),
        }
        metrics = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        if lead:
            tracker.log(metrics, bar)
            append(folder / "dialogues.jsonl", [as_text(d, chat, step) for d in dialogues[:DIALOGUES_LOGGED]])
            if due:
                rows = range(min(DIALOGUES_LOGGED, len(batch.dialogues)))
                append(folder / "tokens.jsonl", [by_token(batch, row, chat, step) for row in rows])
        # Behind the logs: a run that is killed in between drops their last rows and does the step again.
        if due or preempted:
            if unpublished:  # the one before is still being written
                publish(folder, *unpublished, best)
            unpublished = (step, save(folder, step, generated, learner))
        if unpublished and (preempted or progress() >= 1 or not any(all_sum(not unpublished[1].done()))):
            publish(folder, *unpublished, best)
            unpublished = None
        save_seconds = clock.stop("save")
        bar.update(metrics["generated"] if TOKEN_BUDGET else 1)
        if preempted:
            break
    bar.close()
    if progress() >= 1:
        export(folder / "policy", learner.actor, chat.tokenizer)
    elif lead:
        print(f"stopped by SIGTERM behind step {step}, which is saved; the same command goes on")
    engine.shutdown()


class Clock:
    """Seconds by phase since it was made."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.last = time.perf_counter()

    def stop(self, phase: str) -> float:
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now
        return self.seconds[phase]


def peak_memory() -> float:
    """GiB at the most so far: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    stages = {"ppo": sys.modules[__name__], "rollout": rollout, "grader": grader}
    constants = rollout.override_constants(sys.argv[1:], stages, PRESETS)
    folder = Path("runs") / RUN
    start_ranks()
    check_constants()
    problems = load_problems(TRAIN_DATA)
    if not DRY_RUN:
        open_run(folder, constants)
    if (folder / "policy").is_dir():
        print(f"{folder} is finished: its policy is in {folder / 'policy'}")
    else:
        train(folder, constants, problems)
    if dist.is_initialized():  # the engine's shutdown takes the group with it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
