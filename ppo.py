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


# Models ---------------------------------------------------------------------------------------------------------------


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


SHOWN = {  # metric -> its name on the terminal
    "reward": "reward", "accuracy_at_1": "acc@1", "accuracy": "acc", "attempts_used": "attempts",
    "attempt_length": "length", "entropy": "entropy", "kl_k3": "kl", "clipped": "clipped",
    "explained_variance": "expl.var", "tokens_per_second": "tokens/s", "peak_memory_gib": "GiB",
}  # fmt: skip


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
