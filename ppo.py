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

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import resource
import shutil
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import grader
import rollout
from evaluate import write_atomically
from rollout import Chat, Dialogue, Engine

# The values are the paper's. PRESETS below change them by the group, NAME=value on the command line one by one.
# What to train
PRESET: str = "toy"  # comma-separated groups of PRESETS
RUN: str = "run"  # the run's folder is runs/RUN; a run that exists is resumed
MODEL: str = "Qwen/Qwen2.5-Math-1.5B"  # folder or hub name: start of policy and critic, and the KL's reference
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
ROW_TOKENS: int = 4096  # tokens of a packed row; attention costs its square where the kernel has a dense mask (CPU)
# The method
GAMMA: float = 1.0  # discount per action
LAMBDA: float = 0.99  # GAE: 1 = whole return (no bias), 0 = one step (little variance)
CLIP: float = 0.2  # PPO: the ratio earns nothing outside 1 +- CLIP
VALUE_CLIP: float = 0.2  # values move at most this far from those of the rollout
KL_COEF: float = 0.01  # weight of the k3 estimate of KL(policy || start model); 0 = no reference model is loaded
ENTROPY_COEF: float = 0.0  # weight of an entropy bonus (paper: none)
WHITEN: bool = True  # advantages to mean 0 and standard deviation 1 over a rollout
# Optimisers
ACTOR_LR: float = 5e-7  # peak
CRITIC_LR: float = 1e-5  # peak
MIN_LR: float = 0.1  # the cosine's floor, as a share of the peak
WARMUP: float = 0.03  # share of the training with a rising learning rate
BETAS: tuple[float, float] = (0.9, 0.95)  # Adam's
WEIGHT_DECAY: float = 0.0
GRAD_CLIP: float = 1.0  # largest gradient norm
# Hardware
COMPUTE_DTYPE: str = "bfloat16"  # of forward and backward and of the engine; master weights and reductions are float32
GRADIENT_CHECKPOINTING: bool = True  # recompute activations in the backward pass: a third more time, far less memory
LOGITS_CHUNK: int = 2048  # actions whose (actions x vocabulary) float32 logits exist at one time
MAX_MISMATCH: float = 0.05  # nats; mean |sampler - trainer| log-probability above which the run stops as broken
# The run's folder
SAVE_EVERY: int = 8  # steps between checkpoints (paper 8)
KEEP_CHECKPOINTS: int = 2  # the newest so many stay
DIALOGUES_LOGGED: int = 2  # dialogues a step that dialogues.jsonl keeps as text

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"rollout.SEED_ATTEMPTS": False},
    "toy": {
        "MODEL": "data/toy/warm_start",
        "TRAIN_DATA": "data/toy/train.jsonl",
        "SEED": 0,
        "TOKEN_BUDGET": 380_000,
        "DIALOGUES": 128,
        "MINI_BATCH": 64,
        "EPOCHS": 2,
        "ROW_TOKENS": 128,
        # Exploration needs the entropy bonus. But behind the box anything may be said, and the bonus pays for that too;
        # a KL weight above it makes the first token of junk cost more than it earns.
        "KL_COEF": 0.04,
        "ENTROPY_COEF": 0.02,
        "ACTOR_LR": 1e-3,
        "CRITIC_LR": 2e-3,
        "MIN_LR": 0.0,
        "WARMUP": 0.0125,
        "COMPUTE_DTYPE": "float32",
        "GRADIENT_CHECKPOINTING": False,
        "SAVE_EVERY": 50,
        "rollout.MAX_ATTEMPT_TOKENS": 64,
        "rollout.LEAVE_OUT_LONG": True,
    },
    "single_turn": {"rollout.MAX_ATTEMPTS": 1},
}


# Advantages and losses ------------------------------------------------------------------------------------------------
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates over the actions alone (arXiv 1506.02438, eq. 16) -> advantages, returns.

    rewards, values, mask: (B, T) float32; mask 1 = action. values[b, t] is the value of the state in which action t is
    taken. Time passes only at actions: behind an action comes the next action, however many environment tokens lie
    between, and behind the last one comes the end with value 0. Nothing is read at environment tokens (NaN, say).
    Returned are (B, T) float32, 0 at environment tokens; returns = advantages + values.

    Two actions, a token of feedback between them, reward 1 at the end; gamma 1, lambda .5:
    advantage of the second = 1 - .4, of the first = (.4 - .2) + .5 * .6
    >>> rewards, values = torch.tensor([[0., 9., 1.]]), torch.tensor([[.2, 9., .4]])
    >>> gae(rewards, values, torch.tensor([[1., 0., 1.]]), gamma=1.0, lam=0.5)
    (tensor([[0.5000, 0.0000, 0.6000]]), tensor([[0.7000, 0.0000, 1.0000]]))
    """
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        action = mask[:, t] > 0
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        advantages[:, t] = torch.where(action, advantage, 0.0)
        returns[:, t] = torch.where(action, advantage + values[:, t], 0.0)
        next_advantage = torch.where(action, advantage, next_advantage)
        next_value = torch.where(action, values[:, t], next_value)
    return advantages, returns


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), summed over the actions -> loss, sums to log.

    All (B, T) or any one shape; mask 1 = action. The caller divides by the number of actions of the optimiser step, on
    all ranks together. The ratio 1.5 of a good action is clipped to 1.2 and passes no gradient:
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
    loss = -torch.where(action, torch.minimum(gain, clipped_gain), 0.0).sum()
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


# Packing --------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Batch:
    """The dialogues of one rank as tensors, (B, T) each, aligned with Dialogue.ids and 0 behind its end."""

    ids: Tensor  # int64
    mask: Tensor  # 1 = action
    rewards: Tensor
    sampler_logprobs: Tensor
    lengths: list[int]  # tokens of each dialogue
    old_logprobs: Tensor | None = None  # of the policy that sampled, by the trainer's own forward pass
    ref_logprobs: Tensor | None = None  # of the start model
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


def make_batch(dialogues: Sequence[Dialogue]) -> Batch:
    def pad(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device())

    return Batch(
        ids=pad([d.ids for d in dialogues], torch.int64),
        mask=pad([d.mask for d in dialogues]),
        rewards=pad([rollout.token_rewards(d) for d in dialogues]),
        sampler_logprobs=pad([d.logprobs for d in dialogues]),
        lengths=[len(d.ids) for d in dialogues],
    )


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
    state: tuple[Tensor, Tensor]  # (A,) row and column of the token behind which the action was sampled
    action: tuple[Tensor, Tensor]  # (A,) dialogue and time of the action in the Batch


def make_micro_batch(batch: Batch, rows: list[list[int]]) -> MicroBatch:
    width = max(sum(batch.lengths[i] for i in row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64, device=batch.ids.device)  # (R, L)
    positions = torch.zeros_like(ids)  # padding is many dialogues of one token: nobody sees them
    states, columns, dialogues, times = [], [], [], []
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            length = batch.lengths[i]
            ids[r, start : start + length] = batch.ids[i, :length]
            positions[r, start : start + length] = torch.arange(length, device=ids.device)
            time_of_action = batch.mask[i, :length].nonzero().flatten()
            states.append(torch.full_like(time_of_action, r))
            columns.append(start + time_of_action - 1)
            dialogues.append(torch.full_like(time_of_action, i))
            times.append(time_of_action)
            start += length
    return MicroBatch(ids, positions, (torch.cat(states), torch.cat(columns)), (torch.cat(dialogues), torch.cat(times)))


def micro_batches(batch: Batch, indices: Iterable[int]) -> Iterator[tuple[MicroBatch, bool, bool]]:
    """-> (micro-batch, counts?, last?) of the dialogues `indices`; equally many on every rank, since every forward and
    backward pass is a collective under FSDP. A rank with fewer repeats its last one, which then does not count."""
    indices = list(indices)
    packed = pack([batch.lengths[i] for i in indices], ROW_TOKENS, MAX_TOKENS_PER_MICRO_BATCH)
    most = torch.tensor(len(packed), device=device())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for k in range(int(most)):
        rows = packed[min(k, len(packed) - 1)]
        micro = make_micro_batch(batch, [[indices[i] for i in row] for row in rows])
        yield micro, k < len(packed), k == int(most) - 1


# Models ---------------------------------------------------------------------------------------------------------------
class Actor(nn.Module):
    """A causal language model asked for its actions alone: forward -> (logprobs, entropy), (A,) float32 each."""

    def __init__(self, model: str, tokens: int):
        super().__init__()
        self.lm = load_model(model)
        self.tokens = tokens  # ids of the tokenizer; rows of a padded vocabulary behind them are never sampled

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        hidden = self.lm.model(input_ids=micro.ids, position_ids=micro.positions, use_cache=False).last_hidden_state
        hidden = hidden[micro.state]  # (R, L, H) -> (A, H)
        rows, columns = micro.state
        targets = micro.ids[rows, columns + 1]  # (A,)
        head = self.lm.lm_head.weight[: self.tokens]  # (V, H)
        parts = [
            checkpoint(token_logprobs, h, t, head, use_reentrant=False)
            for h, t in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True)
        ]
        logprobs, entropy = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropy)


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
        hidden = self.body(input_ids=micro.ids, position_ids=micro.positions, use_cache=False).last_hidden_state
        return (hidden[micro.state] @ self.head.weight[0]).float()  # (R, L, H) -> (A, H) -> (A,)


def load_model(model: str) -> nn.Module:
    """Float32 master weights: bfloat16 ones would swallow updates of a learning rate of 5e-7."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").train()
    if GRADIENT_CHECKPOINTING:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
    """FSDP2 over all ranks: a unit a block; the rest, with the embedding that may be tied to the head, in the root."""
    compute = getattr(torch, COMPUTE_DTYPE)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    model.to(device())
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


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


def play_step(engine: Engine, chat: Chat, problems: list[dict[str, Any]], step: int) -> list[Dialogue]:
    """This rank's dialogues of a step: every WORLD-th, so that a mini-batch is the same set for any number of ranks.
    Ranks that share an engine play the dialogues of all of them together."""
    rank, shared = dist.get_rank(), rollout.TENSOR_PARALLEL
    played = range(rank // shared, DIALOGUES, dist.get_world_size() // shared)
    dialogues = []
    for i in played:
        visit = ((step - 1) * DIALOGUES + i) // rollout.SAMPLES_PER_PROMPT
        problem = problems[problem_index(visit, len(problems))]
        dialogues.append(rollout.new_dialogue(chat, problem, rollout.draw_attempts(SEED, step, i)))
    seeds = [rollout.random_number(SEED, step, i) for i in played]
    progress = f"rollout {step}" if rank == 0 else None
    rollout.play(engine, chat, dialogues, seeds, rollout.TEMPERATURE, progress)
    dialogues = dialogues[rank % shared :: shared]
    for dialogue in dialogues:
        rollout.assign_rewards(dialogue)
    return dialogues


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


def prepare(batch: Batch, actor: Actor, critic: Critic, reference: Actor | None) -> dict[str, float]:
    """Fill in what the update needs: log-probabilities, values, advantages and returns -> metrics."""
    batch.old_logprobs = over_actions(actor, batch)
    batch.ref_logprobs = over_actions(reference, batch) if reference else batch.old_logprobs
    batch.values = over_actions(critic, batch)
    batch.advantages, batch.returns = gae(batch.rewards, batch.values, batch.mask, GAMMA, LAMBDA)
    action = batch.mask > 0
    returns, error = batch.returns[action], (batch.returns - batch.values)[action]
    mismatch = (batch.old_logprobs - batch.sampler_logprobs)[action].abs()
    drift = (batch.old_logprobs - batch.ref_logprobs)[action]
    n, gap, total, squares, errors, errors2, k1, advantage = all_sum(
        len(returns), mismatch.sum(), returns.sum(), returns.square().sum(), error.sum(), error.square().sum(),
        drift.sum(), batch.advantages[action].sum(),
    ).tolist()  # fmt: skip
    variance, unexplained = squares / n - (total / n) ** 2, errors2 / n - (errors / n) ** 2
    if gap / n > MAX_MISMATCH:
        raise RuntimeError(
            f"sampler and trainer disagree by {gap / n:.3f} nats an action (MAX_MISMATCH={MAX_MISMATCH}): the engine "
            "does not hold the trainer's weights, or samples from another distribution (TEMPERATURE must be 1)"
        )
    if WHITEN:
        batch.advantages = whiten(batch.advantages, batch.mask)
    return {
        "sampler_mismatch": gap / n,
        "kl_k1": k1 / n,
        "advantage": advantage / n,
        "explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
    }


def update(
    batch: Batch,
    actor: Actor,
    critic: Critic,
    actor_optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer,
) -> dict[str, float]:
    """EPOCHS passes of PPO over the rollout, an optimiser step a mini-batch -> metrics (means over actions)."""
    sums: Counter[str] = Counter()
    norms: dict[str, list[float]] = defaultdict(list)
    per_rank = MINI_BATCH // dist.get_world_size()
    mini_batches = [range(s, s + per_rank) for s in range(0, len(batch.lengths), per_rank)]
    for dialogues in mini_batches * EPOCHS:
        (actions,) = all_sum(batch.mask[dialogues.start : dialogues.stop].sum()).tolist()
        scale = dist.get_world_size() / actions  # FSDP averages gradients over ranks; we want the mean over all actions
        for micro, counts, last in micro_batches(batch, dialogues):
            actor.set_requires_gradient_sync(last)
            critic.set_requires_gradient_sync(last)
            mask = torch.full_like(batch.mask[micro.action], float(counts))  # (A,)
            logprobs, entropy = actor(micro)
            loss, stats = policy_loss(
                logprobs, batch.old_logprobs[micro.action], batch.advantages[micro.action], mask, CLIP
            )
            kl = (mask * kl_k3(logprobs, batch.ref_logprobs[micro.action])).sum()
            entropy = (mask * entropy).sum()
            ((loss + KL_COEF * kl - ENTROPY_COEF * entropy) * scale).backward()
            values = critic(micro)
            critic_loss, value_stats = value_loss(
                values, batch.values[micro.action], batch.returns[micro.action], mask, VALUE_CLIP
            )
            (critic_loss * scale).backward()
            losses = {
                "policy_loss": loss,
                "value_loss": critic_loss,
                "kl_k3": kl,
                "entropy": entropy,
                "actions": mask.sum(),
            }
            sums.update({name: value.item() for name, value in (losses | stats | value_stats).items()})
        for name, model, optimizer in (("actor", actor, actor_optimizer), ("critic", critic, critic_optimizer)):
            norm = nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
            norms[f"{name}_grad_norm"].append(norm.full_tensor().item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    names = sorted(sums)
    totals = dict(zip(names, all_sum(*(sums[k] for k in names)).tolist(), strict=True))
    count = totals.pop("actions")
    return {k: v / count for k, v in totals.items()} | {k: sum(v) / len(v) for k, v in norms.items()}


def rollout_metrics(dialogues: Sequence[Dialogue]) -> dict[str, float]:
    """Means over dialogues (or attempts) of all ranks; accuracy_at_k: right within k attempts, if k were granted."""
    sums: Counter[str] = Counter()
    for d in dialogues:
        sums.update(
            dialogues=1,
            attempts=len(d.attempts),
            reward=sum(a.reward for a in d.attempts),
            solved=d.solved_at is not None,
            tokens=len(d.ids),
            generated=sum(d.mask),
        )
        sums.update(f"ending_{a.ending}" for a in d.attempts)
        sums.update(f"status_{a.status}" for a in d.attempts)
        for k in range(1, rollout.MAX_ATTEMPTS + 1):
            if d.max_attempts >= k:
                sums.update({f"had_{k}": 1, f"solved_by_{k}": int(d.solved_at is not None and d.solved_at <= k)})
    ks = range(1, rollout.MAX_ATTEMPTS + 1)
    endings, statuses = ("stop", "length", "context", "box"), ("correct", "wrong", "no_answer", "timeout")
    names = ["dialogues", "attempts", "reward", "solved", "tokens", "generated"]
    names += [f"ending_{e}" for e in endings] + [f"status_{s}" for s in statuses]
    names += [f"{which}_{k}" for k in ks for which in ("had", "solved_by")]
    s = dict(zip(names, all_sum(*(sums[n] for n in names)).tolist(), strict=True))
    return {
        "reward": s["reward"] / s["dialogues"],
        "accuracy": s["solved"] / s["dialogues"],
        "attempts_used": s["attempts"] / s["dialogues"],
        "tokens": s["tokens"],
        "generated": s["generated"],
        "attempt_length": s["generated"] / s["attempts"],
        **{f"ending_{e}": s[f"ending_{e}"] / s["attempts"] for e in endings},
        **{f"status_{x}": s[f"status_{x}"] / s["attempts"] for x in statuses},
        **{f"accuracy_at_{k}": s[f"solved_by_{k}"] / s[f"had_{k}"] for k in ks if s[f"had_{k}"]},
    }


# The run's folder -----------------------------------------------------------------------------------------------------
def open_run(folder: Path, constants: dict[str, Any]) -> None:
    """Create runs/RUN with its config.json, or make sure that the run there was made with the same constants."""
    config = folder / "config.json"
    constants = json.loads(json.dumps(constants))
    if config.is_file():
        there = json.loads(config.read_text(encoding="utf-8"))
        differ = [k for k in sorted(there.keys() | constants.keys()) if there.get(k) != constants.get(k)]
        if differ:
            lines = "\n".join(f"  {k}: {there.get(k)} there, {constants.get(k)} now" for k in differ)
            raise SystemExit(f"{folder} is a run with other constants; take another RUN or delete it:\n{lines}")
    elif dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config, json.dumps(constants, indent=1))


def save(folder: Path, step: int, generated: int, parts: dict[str, Any]) -> None:
    """checkpoints/step-000100: both models and optimisers, sharded, and the step. All ranks must call it."""
    name = folder / "checkpoints" / f"step-{step:06d}"
    partial = name.with_name(name.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
    dist.barrier()
    dcp.save({"parts": gather_state(parts), "step": step, "generated": generated}, checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(name)
        for old in sorted(folder.glob("checkpoints/step-??????"))[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, parts: dict[str, Any]) -> tuple[int, int]:
    """The newest checkpoint into the models and optimisers -> (step, generated tokens); (0, 0) where there is none."""
    found = sorted(folder.glob("checkpoints/step-??????"))
    if not found:
        return 0, 0
    state = {"parts": gather_state(parts), "step": 0, "generated": 0}
    dcp.load(state, checkpoint_id=found[-1])
    for name in ("actor", "critic"):
        model, optimizer = parts[name]
        weights, moments = state["parts"][name]["model"], state["parts"][name]["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state["step"], state["generated"]


def gather_state(parts: dict[str, Any]) -> dict[str, Any]:
    states = {name: get_state_dict(model, optimizer) for name, (model, optimizer) in parts.items()}
    return {name: {"model": weights, "optimizer": moments} for name, (weights, moments) in states.items()}


def export(folder: Path, actor: Actor, tokenizer: Any) -> None:
    """The policy as a Hugging Face folder, which transformers and vLLM open as it is. All ranks must call it."""
    weights = {name: tensor.cpu() for name, tensor in named_weights(actor)}
    if dist.get_rank() == 0:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        actor.lm.config.dtype = getattr(torch, COMPUTE_DTYPE)
        actor.lm.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a log that a killed run wrote behind its last checkpoint: those steps will be done again."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))


def as_text(dialogue: Dialogue, chat: Chat, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "id": dialogue.problem["id"],
        "gold": dialogue.problem["answer"],
        "max_attempts": dialogue.max_attempts,
        "text": chat.tokenizer.decode(dialogue.ids),
        "attempts": [dataclasses.asdict(a) for a in dialogue.attempts],
    }


# The run --------------------------------------------------------------------------------------------------------------
def check_constants() -> None:
    """Raises SystemExit where numbers do not fit each other, before anything costs time."""
    rollout.check_constants()
    world, shared = dist.get_world_size(), rollout.TENSOR_PARALLEL
    for name, number, unit in (
        ("DIALOGUES", DIALOGUES, MINI_BATCH),
        ("MINI_BATCH", MINI_BATCH, world),
        ("MINI_BATCH", MINI_BATCH, rollout.SAMPLES_PER_PROMPT),
        ("ranks", world, shared),
    ):
        if number % unit:
            raise SystemExit(
                f"{name}={number} is no multiple of {unit}: DIALOGUES must be one of MINI_BATCH={MINI_BATCH}, that one "
                f"of the {world} ranks and of SAMPLES_PER_PROMPT={rollout.SAMPLES_PER_PROMPT}, and the ranks one of "
                f"TENSOR_PARALLEL={shared}"
            )


def train(folder: Path) -> None:
    lead = dist.get_rank() == 0
    torch.manual_seed(SEED)
    chat = Chat(AutoTokenizer.from_pretrained(MODEL))
    problems = rollout.check_lengths(chat, rollout.load_problems(TRAIN_DATA), TRAIN_DATA)
    engine = Engine(MODEL, dtype=COMPUTE_DTYPE, seed=SEED)  # before the trainer: it wants to find the GPU's memory free
    tokens = len(chat.tokenizer)
    actor = Actor(MODEL, tokens)
    actor = shard(actor, actor.lm.model.layers)
    critic = Critic(MODEL)
    critic = shard(critic, critic.body.layers)
    reference = None
    if KL_COEF:
        reference = Actor(MODEL, tokens).requires_grad_(False)
        reference = shard(reference, reference.lm.model.layers)
    parts = {"actor": (actor, adam(actor, ACTOR_LR)), "critic": (critic, adam(critic, CRITIC_LR))}
    step, generated = load(folder, parts)
    if lead:
        for log in ("metrics.jsonl", "dialogues.jsonl"):
            keep_until(folder / log, step)
        print(
            f"{DIALOGUES} dialogues a rollout = {DIALOGUES // MINI_BATCH} mini-batches of {MINI_BATCH}; "
            f"{dist.get_world_size()} ranks; {len(problems)} problems; "
            + (f"{TOKEN_BUDGET:,} generated tokens" if TOKEN_BUDGET else f"{STEPS} steps")
            + (f"; goes on behind step {step}" if step else "")
        )

    def progress() -> float:
        return generated / TOKEN_BUDGET if TOKEN_BUDGET else step / STEPS

    engine.load_weights(named_weights(actor))
    total, unit = (TOKEN_BUDGET, " tokens") if TOKEN_BUDGET else (STEPS, " steps")
    bar = tqdm(total=total, unit=unit, unit_scale=bool(TOKEN_BUDGET), desc=RUN, disable=not lead, initial=0)
    bar.update(generated if TOKEN_BUDGET else step)
    while progress() < 1:
        step += 1
        clock = [time.perf_counter()]
        dialogues = play_step(engine, chat, problems, step)
        engine.sleep()
        clock.append(time.perf_counter())
        batch = make_batch(dialogues)
        metrics = rollout_metrics(dialogues) | prepare(batch, actor, critic, reference)
        clock.append(time.perf_counter())
        generated += int(metrics["generated"])
        factor = learning_rate(progress())
        for (_, optimizer), peak in zip(parts.values(), (ACTOR_LR, CRITIC_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        metrics |= update(batch, actor, critic, parts["actor"][1], parts["critic"][1])
        clock.append(time.perf_counter())
        engine.load_weights(named_weights(actor))
        clock.append(time.perf_counter())
        seconds = [after - before for before, after in itertools.pairwise(clock)]
        metrics = {
            "step": step,
            "generated_tokens": generated,
            "token_budget": TOKEN_BUDGET,
            "actor_lr": ACTOR_LR * factor,
            **metrics,
            **{f"seconds_{n}": s for n, s in zip(("rollout", "prepare", "update", "transfer"), seconds, strict=True)},
            "tokens_per_second": metrics["tokens"] / sum(seconds),
            "peak_memory_gib": peak_memory(),
        }
        if lead:
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(metrics) + "\n")
            with (folder / "dialogues.jsonl").open("a", encoding="utf-8") as log:
                log.writelines(json.dumps(as_text(d, chat, step)) + "\n" for d in dialogues[:DIALOGUES_LOGGED])
        shown = ("reward", "accuracy", "attempts_used", "entropy", "kl_k3")
        bar.set_postfix({k: f"{metrics[k]:.3f}" for k in shown}, refresh=False)
        bar.update(int(metrics["generated"]) if TOKEN_BUDGET else 1)
        if step % SAVE_EVERY == 0 or progress() >= 1:
            save(folder, step, generated, parts)
    bar.close()
    export(folder / "policy", actor, chat.tokenizer)
    engine.shutdown()


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
    open_run(folder, constants)
    if (folder / "policy").is_dir():
        print(f"{folder} is finished: its policy is in {folder / 'policy'}")
    else:
        train(folder)
    if dist.is_initialized():  # the engine's shutdown takes the group with it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
