"""Train a language model on multi-attempt dialogues (arXiv 2503.04808) with PPO: GAE, clipped updates, FSDP2, vLLM.

1. The whole dialogue is one trajectory with one reward at its end; gamma is 1: a late success also pays early attempts.
2. Feedback is environment: it is in the context of everything that follows, in no loss, and GAE steps over it.
3. The critic is a second copy of the model; advantages are whitened over all actions of a rollout, on all ranks.
4. The KL to the start model (k3) stands in the loss, not in the reward.
5. Losses are sums over actions divided by their global number: no micro-batch, packing or rank changes a gradient.

    python ppo.py PRESET=toy RUN=first                                           # the toy world, one process, on a CPU
    torchrun --nproc-per-node 2 ppo.py PRESET=toy RUN=second STEPS=20            # two processes
    torchrun --nproc-per-node 8 ppo.py PRESET=paper RUN=paper TRAIN_DATA=data/math_train.jsonl
"""

import dataclasses
import itertools
import math
import signal
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import grader
import rollout
from data.problems import load_problems, problem_at, split_dev
from plumbing import checkpoints, constants, engine, logs, packing, ranks
from plumbing.chat import Chat, load_tokenizer
from plumbing.checkpoints import Part
from plumbing.constants import Count, Share, require
from plumbing.engine import Engine
from plumbing.packing import MicroBatch
from plumbing.ranks import all_sum, print_once
from presets import PRESETS
from rollout import Dialogue

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# The values are the paper's. A preset changes a group of them, NAME=value on the command line one; a start prints both.
# What to train
PRESET: str = ""  # names from presets.py, comma between them; several apply in order
RUN: str = "run"  # the run's folder is runs/RUN; a run that exists is resumed
MODEL: str = "Qwen/Qwen2.5-Math-1.5B"  # folder or hub name: start of policy and critic
REFERENCE: str = ""  # what the KL is measured from; "" = MODEL (SCoRe's second stage: what the first started from)
TRAIN_DATA: str = "data/math_train.jsonl"  # problems, one {"id", "question", "answer"} a line
SEED: int = 42  # of the order of problems, N, sampling and the value head
# How long: until the first of the two that is not 0. Learning rates follow the share of it that is done.
STEPS: int = 1280  # rollouts; paper 160 passes over 8,523 problems = 1,280
TOKEN_BUDGET: int = 0  # generated tokens
# Batches
DIALOGUES: Count = 1024  # dialogues of a rollout, over all ranks
MINI_BATCH: Count = 128  # dialogues of an optimiser step, over all ranks; DIALOGUES / MINI_BATCH steps a rollout
EPOCHS: Count = 1  # passes over a rollout
# The method
ESTIMATOR: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce"] = "gae"  # the paper's has a critic, the others none
GAMMA: float = 1.0  # discount per action
LAMBDA: float = 0.99  # GAE: 1 = whole return (no bias), 0 = one step (little variance)
CLIP: float = 0.2  # PPO: the ratio earns nothing outside 1 +- CLIP
VALUE_CLIP: float = 0.2  # values move at most this far from those of the rollout
ATTEMPT_GAMMA: float = 1.0  # further discount from one attempt to the next (paper 1; SCoRe 0: each on its own)
KL_COEF: tuple[float, ...] = (0.01,)  # weight of KL (k3) to the start model, by attempt; the last for all others
KL_IN_REWARD: float = 0.0  # weight of k1 in each action's reward (paper 0); no KL at all: no reference is loaded
ENTROPY_COEF: float = 0.0  # weight of an entropy bonus (paper: none)
TRUNCATE_IS: float = 0.0  # weigh actions by min(trainer's / sampler's probability, this); 0 = do not
CRITIC_WARMUP: int = 0  # first steps in which only the critic learns (paper 0)
WHITEN: bool = True  # advantages to mean 0 and standard deviation 1 over a rollout
# Optimisers
ACTOR_LR: float = 5e-7  # peak
CRITIC_LR: float = 1e-5  # peak
MIN_LR: Share = 0.1  # the cosine's floor, as a share of the peak
WARMUP: Share = 0.03  # share of the training with a rising learning rate
BETAS: tuple[float, float] = (0.9, 0.95)  # Adam's
WEIGHT_DECAY: float = 0.0
GRAD_CLIP: float = 1.0  # largest gradient norm
COMPUTE_DTYPE: Literal["bfloat16", "float32"] = "bfloat16"  # of trainer and engine; master weights are float32
# Safety
MAX_MISMATCH: float = 0.05  # nats; mean |sampler - trainer| log-probability above which the run stops as broken
MAX_SKIPPED: Count = 3  # optimiser steps skipped in a row, their gradients not being finite, after which the run stops
SAVE_EVERY: Count = 8  # steps between checkpoints, each with a test on the dev split (paper 8)
DEV_PROBLEMS: int = 256  # of TRAIN_DATA, drawn by SEED, that choose the best checkpoint (paper: the tests do); 0 = none
DRY_RUN: bool = False  # 1: say what would happen, and stop

# Where constants are looked for. Those of plumbing only say where and how fast: a run may be resumed with others.
PLUMBING = {"engine": engine, "packing": packing, "ranks": ranks, "checkpoints": checkpoints, "logs": logs}
MODULES = {"ppo": sys.modules[__name__], "rollout": rollout, "grader": grader} | PLUMBING


# Advantages -----------------------------------------------------------------------------------------------------------
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, attempt_gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates over the actions alone (arXiv 1506.02438, eq. 16) -> advantages, returns.

    rewards, values, mask: (B, T) float32; mask 1 = action. values[b, t] is the value of the state in which action t is
    taken. Time passes only at actions: after an action comes the next action, however many environment tokens lie
    between them, and after the last one comes the end with value 0. Environment tokens are not read (they may be NaN).
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
    next_is_action = torch.zeros_like(next_value, dtype=torch.bool)  # (B,) whether token t + 1 is an action
    for t in reversed(range(values.shape[1])):
        is_action = mask[:, t] > 0
        discount = torch.where(next_is_action, gamma, gamma * attempt_gamma)
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * lam * next_advantage
        advantages[:, t] = torch.where(is_action, advantage, 0.0)
        returns[:, t] = torch.where(is_action, advantage + values[:, t], 0.0)
        next_advantage = torch.where(is_action, advantage, next_advantage)
        next_value = torch.where(is_action, values[:, t], next_value)
        next_is_action = is_action
    return advantages, returns


def group_advantages(returns: Tensor, method: str) -> Tensor:
    """Advantages without a critic: the return of a dialogue's k-th attempt against the k-th attempts of its group.

    returns[g, s, k] is that of attempt k of sample s of group g, nan if the policy has not made it; (G, S, K) float64,
    as are the advantages, which are 0 there. With R a return, mean and standard deviation over the group's n attempts:
    "rloo" (arXiv 2402.14740): R - mean of the others; "grpo" (arXiv 2402.03300): (R - mean) / deviation;
    "dr_grpo" (arXiv 2503.20783) and "reinforce" (where all dialogues of the rollout are one group): R - mean.
    An attempt that has no other to be compared with, or only equal ones, has the advantage 0.
    >>> returns = torch.tensor([[[1.0, 3.0], [0.0, 1.0], [0.5, torch.nan]]])
    >>> group_advantages(returns, "rloo").tolist()  # 1 - (0 + .5) / 2 and 3 - 1; 0 - (1 + .5) / 2 and 1 - 3; ...
    [[[0.75, 2.0], [-0.75, -2.0], [0.0, 0.0]]]
    >>> group_advantages(returns[:, :2], "grpo").tolist(), group_advantages(returns, "dr_grpo").tolist()
    ([[[1.0, 1.0], [-1.0, -1.0]]], [[[0.5, 1.0], [-0.5, -1.0], [0.0, 0.0]]])
    """
    count = returns.isfinite().sum(1, keepdim=True)  # (G, 1, K)
    above_mean = returns - returns.nanmean(1, keepdim=True)
    deviation = above_mean.square().nanmean(1, keepdim=True).sqrt()
    if method == "rloo":  # R - mean of the n - 1 others = (R - mean of all) * n / (n - 1)
        above_mean = above_mean * count / (count - 1)
    elif method == "grpo":
        above_mean = above_mean / deviation
    # Returns that are equal may differ from their mean by a rounding, which must not be scaled up.
    return torch.where(deviation > 1e-9, above_mean, 0.0).nan_to_num(0.0)


def assign_group_advantages(dialogues: Sequence[Dialogue]) -> None:
    """Give each attempt of a step's dialogues its advantage over the others. It earns its own reward and, discounted by
    ATTEMPT_GAMMA, those of the attempts after it. The SAMPLES_PER_PROMPT dialogues of a problem follow each other."""
    returns = torch.zeros(len(dialogues), rollout.MAX_ATTEMPTS, dtype=torch.float64)  # (D, K)
    made = torch.zeros_like(returns, dtype=torch.bool)
    for d, dialogue in enumerate(dialogues):
        for k, attempt in enumerate(dialogue.attempts):
            returns[d, k], made[d, k] = attempt.reward, attempt.own
    for k in reversed(range(rollout.MAX_ATTEMPTS - 1)):
        returns[:, k] += ATTEMPT_GAMMA * returns[:, k + 1]
    size = len(dialogues) if ESTIMATOR == "reinforce" else rollout.SAMPLES_PER_PROMPT
    grouped = torch.where(made, returns, torch.nan).unflatten(0, (-1, size))  # (G, S, K)
    advantages = group_advantages(grouped, ESTIMATOR).flatten(0, 1)  # (D, K)
    for dialogue, row in zip(dialogues, advantages.tolist(), strict=True):
        for attempt, advantage in zip(dialogue.attempts, row, strict=False):
            attempt.advantage = advantage


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages with mean 0 and variance 1 over the actions of all ranks; 0 stays at environment tokens. (B, T)."""
    action = mask > 0
    mean, variance = ranks.moments(advantages[action])
    return torch.where(action, (advantages - mean) / math.sqrt(max(variance, 1e-8)), 0.0)


# Losses ---------------------------------------------------------------------------------------------------------------
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
            "policy_kl": (ratio - 1 - log_ratio).sum(),  # k3 to the policy that sampled
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


# The batch ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Batch:
    """The dialogues that this rank trains on as tensors, (B, T) each, aligned with Dialogue.ids, 0 after its end."""

    dialogues: Sequence[Dialogue]
    mini_batches: list[range]  # rows of each optimiser step
    lengths: list[int]  # tokens of each dialogue
    ids: Tensor  # int64
    mask: Tensor  # 1 = action
    attempt: Tensor  # int64; number of the attempt that an action belongs to, from 0
    rewards: Tensor
    sampler_logprobs: Tensor
    # what prepare() fills in
    old_logprobs: Tensor  # of the policy that sampled, by the trainer's own forward pass
    ref_logprobs: Tensor  # of the start model
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def micro_batches(self, rows: range) -> Iterator[MicroBatch]:
        kernel = packing.has_kernel(COMPUTE_DTYPE)
        return packing.iterate_micro_batches(self.ids, self.mask, self.lengths, rows, kernel)


def make_batch(dialogues: Sequence[Dialogue]) -> Batch:
    """This rank's share of each mini-batch of a step's dialogues. Who played a dialogue does not decide who trains on
    it: each rank gets about as many tokens."""
    mine: list[Dialogue] = []
    mini_batches = []
    for share in packing.share_mini_batches([len(d.ids) for d in dialogues], MINI_BATCH):
        mini_batches.append(range(len(mine), len(mine) + len(share)))
        mine += [dialogues[i] for i in share]
    mask = packing.pad([d.mask for d in mine])
    later = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")
    return Batch(
        dialogues=mine,
        mini_batches=mini_batches,
        lengths=[len(d.ids) for d in mine],
        ids=packing.pad([d.ids for d in mine], torch.int64),
        mask=mask,
        attempt=packing.pad([spread(d, itertools.count()) for d in mine], torch.int64),
        rewards=packing.pad([rollout.token_rewards(d) for d in mine]),
        sampler_logprobs=packing.pad([d.logprobs for d in mine]),
        **{name: torch.zeros_like(mask) for name in later},
    )


def spread(dialogue: Dialogue, values: Iterable[float]) -> list[float]:
    """(T,) each attempt's value at all tokens of the attempt; 0 elsewhere."""
    spread_out = [0.0] * len(dialogue.ids)
    for attempt, value in zip(dialogue.attempts, values, strict=False):
        spread_out[attempt.start : attempt.end] = [value] * (attempt.end - attempt.start)
    return spread_out


# The models -----------------------------------------------------------------------------------------------------------
class Actor(nn.Module):
    """A causal language model asked for its actions alone: forward -> (logprobs, entropy), (A,) float32 each."""

    def __init__(self, model: str, tokens: int):
        super().__init__()
        self.lm = ranks.load_model(model, packing.attention_name(COMPUTE_DTYPE))
        self.tokens = tokens  # ids of the tokenizer; rows of a padded vocabulary beyond them are never sampled

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        hidden = hidden_states(self.lm.model, micro)  # (A, H)
        targets = micro.ids[micro.state[0], micro.state[1] + 1]  # (A,)
        head = self.lm.lm_head.weight  # (V, H), all of it: 151,665 rows would not be aligned, and their product slower
        padding = -1e9 * (torch.arange(len(head), device=head.device) >= self.tokens).to(head.dtype)  # (V,)
        chunks = zip(hidden.split(packing.LOGITS_CHUNK), targets.split(packing.LOGITS_CHUNK), strict=True)
        parts = [checkpoint(score_actions, h, t, head, padding, use_reentrant=False) for h, t in chunks]
        logprobs, entropy = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropy)


def hidden_states(body: nn.Module, micro: MicroBatch) -> Tensor:
    """The states in which the actions were taken, (A, H)."""
    out = body(input_ids=micro.ids, position_ids=micro.positions, use_cache=False, **micro.attention)
    return out.last_hidden_state[micro.state]  # (R, L, H) -> (A, H)


def score_actions(hidden: Tensor, targets: Tensor, head: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """(A, H), (A,), (V, H), (V,) -> log-probability of each target and entropy of its distribution, (A,) float32."""
    logits = F.linear(hidden, head, padding).float()  # (A, V)
    log_total = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_total
    entropy = log_total - (logits.softmax(-1) * logits).sum(-1)
    return logprobs, entropy


class Critic(nn.Module):
    """The same model with one number in place of the vocabulary: -> value of each action's state, (A,)."""

    def __init__(self, model: str):
        super().__init__()
        self.body = ranks.load_model(model, packing.attention_name(COMPUTE_DTYPE)).model
        width = self.body.config.hidden_size
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=1 / (width + 1))

    def forward(self, micro: MicroBatch) -> Tensor:
        return (hidden_states(self.body, micro) @ self.head.weight[0]).float()  # (A, H) -> (A,)


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
        learner = cls(ranks.shard(Actor(MODEL, tokens), COMPUTE_DTYPE), None, None, {})
        if ESTIMATOR == "gae":
            learner.critic = ranks.shard(Critic(MODEL), COMPUTE_DTYPE)
        if needs_reference():
            reference = Actor(REFERENCE or MODEL, tokens).requires_grad_(False)
            learner.reference = ranks.shard(reference, COMPUTE_DTYPE)
        for name, model in (("actor", learner.actor), ("critic", learner.critic)):
            if model:
                adam = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
                learner.optimizers[name] = adam
        return learner

    def parts(self) -> list[Part]:
        return [Part(name, getattr(self, name), optimizer) for name, optimizer in self.optimizers.items()]

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Under their Hugging Face names. All ranks must take them all."""
        return ranks.whole_weights(self.actor.lm, COMPUTE_DTYPE)


def needs_reference() -> bool:
    return any(KL_COEF) or KL_IN_REWARD > 0


def set_learning_rates(learner: Learner, progress: float) -> dict[str, float]:
    metrics = {}
    for part in learner.parts():
        peak = ACTOR_LR if part.name == "actor" else CRITIC_LR
        metrics[f"{part.name}_lr"] = part.optimizer.param_groups[0]["lr"] = peak * learning_rate(progress)
    return metrics


def learning_rate(progress: float) -> float:
    """Share of the peak at `progress` in [0, 1] of training: linear over WARMUP, then half a cosine to MIN_LR."""
    if progress < WARMUP:
        return progress / WARMUP
    decayed = min(1.0, (progress - WARMUP) / (1 - WARMUP))
    return MIN_LR + (1 - MIN_LR) * 0.5 * (1 + math.cos(math.pi * decayed))


# One step: play, prepare, update --------------------------------------------------------------------------------------
def play_step(
    sampler: Engine, chat: Chat, problems: list[dict[str, Any]], offline: dict[str, list[Any]], step: int
) -> list[Dialogue]:
    """A step's dialogues, of all ranks. Each rank plays every WORLD-th, so that a mini-batch is the same set of
    dialogues for any number of ranks."""
    mine = range(dist.get_rank(), DIALOGUES, dist.get_world_size())
    dialogues = []
    for i in mine:
        visit = ((step - 1) * DIALOGUES + i) // rollout.SAMPLES_PER_PROMPT
        problem = problem_at(problems, visit, SEED)
        dialogue = rollout.new_dialogue(chat, problem, rollout.draw_attempts(SEED, step, i))
        rollout.begin_offline(chat, dialogue, offline.get(problem["id"], ()), SEED, visit)
        dialogues.append(dialogue)
    seeds = [rollout.random_number(SEED, step, i) for i in mine]
    rollout.play(sampler, chat, dialogues, seeds, 1.0, f"rollout {step}" if dist.get_rank() == 0 else None)
    for dialogue in dialogues:
        rollout.assign_rewards(dialogue)
    return ranks.gather_interleaved(dialogues)


@torch.no_grad()
def evaluate_actions(model: nn.Module, batch: Batch) -> Tensor:
    """An actor's log-probability or a critic's value of each action, (B, T), 0 elsewhere."""
    result = torch.zeros_like(batch.rewards)
    for micro in batch.micro_batches(range(len(batch.lengths))):
        out = model(micro)
        if micro.counts:
            result[micro.action] = out[0] if isinstance(out, tuple) else out
    model.reshard()  # FSDP keeps the root's weights gathered for a backward pass; there is none
    return result


def prepare(batch: Batch, dialogues: Sequence[Dialogue], learner: Learner) -> dict[str, float]:
    """Fill in what the update needs: log-probabilities, values, advantages and returns -> metrics. dialogues: of all
    ranks. Raises RuntimeError if sampler and trainer disagree about the actions."""
    action = batch.mask > 0
    batch.old_logprobs = evaluate_actions(learner.actor, batch)
    gap, _ = ranks.moments((batch.old_logprobs - batch.sampler_logprobs)[action].abs())
    if not gap <= MAX_MISMATCH:
        raise RuntimeError(
            f"sampler and trainer disagree by {gap:.3f} nats an action (MAX_MISMATCH={MAX_MISMATCH}): the engine does "
            "not hold the trainer's weights, or samples from another distribution"
        )
    metrics = {"sampler_mismatch": gap}
    batch.ref_logprobs = evaluate_actions(learner.reference, batch) if learner.reference else batch.old_logprobs
    if learner.reference:
        metrics["kl_k1"], _ = ranks.moments((batch.old_logprobs - batch.ref_logprobs)[action])
    estimate_advantages(batch, dialogues, learner)
    metrics["advantage"], _ = ranks.moments(batch.advantages[action])
    if learner.critic:
        _, variance = ranks.moments(batch.returns[action])
        _, unexplained = ranks.moments((batch.returns - batch.values)[action])
        metrics["explained_variance"] = 1 - unexplained / variance if variance > 0 else 0.0
    if WHITEN:
        batch.advantages = whiten(batch.advantages, batch.mask)
    return metrics


def estimate_advantages(batch: Batch, dialogues: Sequence[Dialogue], learner: Learner) -> None:
    """Advantages and returns by ESTIMATOR: GAE with a critic, else each attempt against others of its group."""
    if learner.critic:
        batch.values = evaluate_actions(learner.critic, batch)
        rewards = batch.rewards - KL_IN_REWARD * (batch.old_logprobs - batch.ref_logprobs)
        batch.advantages, batch.returns = gae(rewards, batch.values, batch.mask, GAMMA, LAMBDA, ATTEMPT_GAMMA)
        return
    assign_group_advantages(dialogues)
    batch.advantages = packing.pad([spread(d, [a.advantage for a in d.attempts]) for d in batch.dialogues]) * batch.mask


def update(batch: Batch, learner: Learner, train_actor: bool) -> dict[str, float]:
    """EPOCHS passes of PPO over the rollout, an optimiser step for each mini-batch -> metrics, means over actions.
    train_actor: whether the actor learns, too (not during CRITIC_WARMUP)."""
    sums: Counter[str] = Counter()
    norms: dict[str, list[float]] = defaultdict(list)
    trained = [part for part in learner.parts() if train_actor or part.name == "critic"]
    for rows in batch.mini_batches * EPOCHS:
        (actions,) = all_sum(batch.mask[rows.start : rows.stop].sum())
        scale = dist.get_world_size() / actions  # FSDP averages over ranks; what is wanted is the mean over all actions
        for micro in batch.micro_batches(rows):
            if train_actor:
                sums.update(accumulate_actor_gradient(batch, micro, learner, scale))
            if learner.critic:
                sums.update(accumulate_critic_gradient(batch, micro, learner.critic, scale))
            sums["actions"] += len(micro.action[0]) if micro.counts else 0
        for name, norm in step_optimizers(learner, trained).items():
            norms[name].append(norm)
    names = sorted(sums)  # the same order on all ranks
    totals = dict(zip(names, all_sum(*(sums[name] for name in names)), strict=True))
    count = totals.pop("actions")
    metrics = {name: total / count for name, total in totals.items()}
    return metrics | {name: statistics.fmean(values) for name, values in norms.items()}


def accumulate_actor_gradient(batch: Batch, micro: MicroBatch, learner: Learner, scale: float) -> dict[str, float]:
    """Add the gradient of policy loss, KL and entropy bonus over a micro-batch -> sums to log."""
    learner.actor.set_requires_gradient_sync(micro.is_last)
    at = micro.action
    mask = torch.full_like(batch.mask[at], float(micro.counts))  # (A,)
    logprobs, entropy = learner.actor(micro)
    weights: Tensor | float = 1.0
    if TRUNCATE_IS:
        weights = (batch.old_logprobs - batch.sampler_logprobs)[at].exp().clamp(max=TRUNCATE_IS)
    loss, stats = policy_loss(logprobs, batch.old_logprobs[at], batch.advantages[at], mask, CLIP, weights)
    kl = mask * kl_k3(logprobs, batch.ref_logprobs[at])
    kl_coef = torch.tensor(KL_COEF, device=kl.device)[batch.attempt[at].clamp(max=len(KL_COEF) - 1)]  # (A,)
    entropy = (mask * entropy).sum()
    ((loss + (kl_coef * kl).sum() - ENTROPY_COEF * entropy) * scale).backward()
    stats |= {"policy_loss": loss, "entropy": entropy}
    if learner.reference:
        stats["kl_k3"] = kl.sum()
    return {name: value.item() for name, value in stats.items()}


def accumulate_critic_gradient(batch: Batch, micro: MicroBatch, critic: Critic, scale: float) -> dict[str, float]:
    """Add the gradient of the value loss over a micro-batch -> sums to log."""
    critic.set_requires_gradient_sync(micro.is_last)
    at = micro.action
    mask = torch.full_like(batch.mask[at], float(micro.counts))  # (A,)
    loss, stats = value_loss(critic(micro), batch.values[at], batch.returns[at], mask, VALUE_CLIP)
    (loss * scale).backward()
    return {"value_loss": loss.item()} | {name: value.item() for name, value in stats.items()}


def step_optimizers(learner: Learner, trained: Sequence[Part]) -> dict[str, float]:
    """Clip the gradients, step, and clear them -> gradient norms before clipping. If one is not finite the step is
    skipped; after MAX_SKIPPED in a row, RuntimeError."""
    norms = {}
    for part in trained:
        norm = nn.utils.clip_grad_norm_(part.model.parameters(), GRAD_CLIP)
        norms[f"{part.name}_grad_norm"] = norm.full_tensor().item()
    finite = all(map(math.isfinite, norms.values()))
    for part in trained:
        if finite:
            part.optimizer.step()
        part.optimizer.zero_grad(set_to_none=True)
    learner.skipped = 0 if finite else learner.skipped + 1
    if learner.skipped:
        print(f"optimiser step skipped: a gradient is not finite ({norms})")
    if learner.skipped >= MAX_SKIPPED:
        raise RuntimeError(f"{learner.skipped} gradients in a row were not finite: the training has diverged")
    return norms if finite else {}


# The run --------------------------------------------------------------------------------------------------------------
def check_constants() -> None:
    """Raises SystemExit where numbers do not fit each other, before anything costs time."""
    rollout.check_constants()
    world, samples = dist.get_world_size(), rollout.SAMPLES_PER_PROMPT
    require(STEPS or TOKEN_BUDGET, "STEPS=0 and TOKEN_BUDGET=0: the training would end without a step")
    require(DIALOGUES % MINI_BATCH == 0, f"DIALOGUES={DIALOGUES} must be a multiple of MINI_BATCH={MINI_BATCH}")
    require(MINI_BATCH % world == 0, f"MINI_BATCH={MINI_BATCH} must be a multiple of the {world} ranks")
    require(MINI_BATCH % samples == 0, f"MINI_BATCH={MINI_BATCH} must be a multiple of SAMPLES_PER_PROMPT={samples}")
    require(world % ranks.shard_size() == 0, f"{world} ranks must be a multiple of SHARD_RANKS={ranks.SHARD_RANKS}")
    require(0 <= WARMUP < 1, f"WARMUP={WARMUP}: must be a share of the training, at least 0 and less than 1")
    if ESTIMATOR != "gae":
        require(not KL_IN_REWARD and not CRITIC_WARMUP, "KL_IN_REWARD and CRITIC_WARMUP need a critic: ESTIMATOR=gae")
    if ESTIMATOR in ("rloo", "grpo", "dr_grpo"):
        require(samples > 1, f"ESTIMATOR={ESTIMATOR} compares dialogues of a problem: set SAMPLES_PER_PROMPT above 1")


def dev_accuracies(sampler: Engine, chat: Chat, dev: list[dict[str, Any]]) -> dict[str, float]:
    """Greedy accuracy (Dialogue.solved_within) at 1..MAX_ATTEMPTS attempts of dialogues that grant as many. All ranks
    must call it."""
    mine = dev[dist.get_rank() :: dist.get_world_size()]
    dialogues = [rollout.new_dialogue(chat, problem, rollout.MAX_ATTEMPTS) for problem in mine]
    rollout.play(sampler, chat, dialogues, [0] * len(dialogues), 0.0, "dev" if dist.get_rank() == 0 else None)
    ks = range(1, rollout.MAX_ATTEMPTS + 1)
    solved = all_sum(*(sum(d.solved_within(k) for d in dialogues) for k in ks))
    return {f"dev_accuracy_at_{k}": number / len(dev) for k, number in zip(ks, solved, strict=True)}


def progress(step: int, generated: int) -> float:
    """Share of the training that is done, by the one of STEPS and TOKEN_BUDGET that ends first."""
    return max(step / STEPS if STEPS else 0.0, generated / TOKEN_BUDGET if TOKEN_BUDGET else 0.0)


def train(
    folder: Path, sampler: Engine, learner: Learner, chat: Chat,
    problems: list[dict[str, Any]], dev: list[dict[str, Any]], offline: dict[str, list[Any]],
) -> None:  # fmt: skip
    """The training loop, from the newest checkpoint to the end."""
    step, generated = checkpoints.load(folder, learner.parts())
    print_once(f"{folder} resumes after step {step}" if step else f"{folder} begins")
    log = logs.Log(folder, RUN, step, progress(step, generated)) if dist.get_rank() == 0 else None
    goal = f"dev_accuracy_at_{rollout.MAX_ATTEMPTS}"
    best, best_accuracy = checkpoints.best_so_far(folder, goal)
    signals: list[int] = []  # a preempted job gets SIGTERM: finish the step, save, end well
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    sampler.load_weights(learner.policy_weights())
    clock = logs.Clock()
    is_preempted = False
    while progress(step, generated) < 1 and not is_preempted:
        step += 1
        dialogues = play_step(sampler, chat, problems, offline, step)
        sampler.sleep()
        clock.stop("rollout")
        batch = make_batch(dialogues)
        metrics = rollout.rollout_metrics(dialogues)
        clock.stop("pack")
        metrics |= prepare(batch, dialogues, learner)
        clock.stop("prepare")
        generated += int(metrics["generated"])
        metrics |= set_learning_rates(learner, progress(step, generated))
        metrics |= update(batch, learner, train_actor=step > CRITIC_WARMUP)
        clock.stop("update")
        sampler.load_weights(learner.policy_weights())
        clock.stop("transfer")
        is_due = step % SAVE_EVERY == 0 or progress(step, generated) >= 1
        if is_due and dev:
            metrics |= dev_accuracies(sampler, chat, dev)
            if metrics[goal] > best_accuracy:
                best, best_accuracy = step, metrics[goal]
                checkpoints.export(folder / "best", learner.actor.lm, learner.policy_weights(), chat.tokenizer)
            clock.stop("dev")
        if log:
            flops = logs.update_flops(learner.actor.lm, dialogues, ESTIMATOR == "gae", needs_reference(), EPOCHS)
            metrics |= logs.speed_metrics(clock.take(), metrics["tokens"], flops)
            row = {"step": step, "generated_tokens": generated, "token_budget": TOKEN_BUDGET} | metrics
            log.write(row, progress(step, generated))
            log.write_dialogues(batch, chat.tokenizer, step, with_tokens=is_due)
        is_preempted = any(all_sum(len(signals)))
        if is_due or is_preempted:  # after the logs: a run that is killed in between repeats the steps of the last rows
            checkpoints.save(folder, step, generated, learner.parts(), best)
        clock.stop("save")
    if progress(step, generated) >= 1:
        checkpoints.export(folder / "policy", learner.actor.lm, learner.policy_weights(), chat.tokenizer)
    else:
        print_once(f"{folder}: stopped by SIGTERM after step {step}, which is saved; the same command resumes it")


def main() -> None:
    changes = constants.set_constants(sys.argv[1:], MODULES, PRESETS)
    ranks.start_ranks()
    print_once(changes)
    check_constants()
    folder = Path("runs") / RUN
    problems = load_problems(TRAIN_DATA)
    if not DRY_RUN:
        constants.open_run(folder, constants.snapshot(MODULES), Path(TRAIN_DATA), PLUMBING)
    if (folder / "policy").is_dir():
        print_once(f"{folder} is finished: its policy is in {folder / 'policy'}")
        return
    torch.manual_seed(SEED)
    chat = rollout.make_chat(load_tokenizer(MODEL))
    problems, dev = split_dev(rollout.drop_long_problems(chat, problems), DEV_PROBLEMS, SEED)
    offline = rollout.load_offline(problems, Path(TRAIN_DATA).stem)
    updates = f"{EPOCHS} x {DIALOGUES // MINI_BATCH} updates of {MINI_BATCH} dialogues"
    print_once(f"{len(problems):,} problems to train on, {len(dev)} to choose the best checkpoint")
    print_once(f"a step: {DIALOGUES} dialogues of up to {rollout.MAX_ATTEMPTS} attempts, then {updates}")
    print_once(logs.memory_plan(MODEL, COMPUTE_DTYPE, ESTIMATOR == "gae", needs_reference()))
    if DRY_RUN:
        return
    sampler = Engine(MODEL, rollout.CONTEXT, COMPUTE_DTYPE, SEED, sleeps=True)  # first: it wants to find memory free
    sampler.sleep()
    train(folder, sampler, Learner.load(len(chat.tokenizer)), chat, problems, dev, offline)
    sampler.shutdown()


if __name__ == "__main__":
    main()
