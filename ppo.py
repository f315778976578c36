"""Train a language model on multi-attempt dialogues (arXiv 2503.04808) with PPO: GAE, clipped updates, FSDP2, vLLM.

1. The whole dialogue is one trajectory with one reward at its end; gamma is 1: a late success also pays early attempts.
2. Feedback is environment: it is in the context of everything that follows, in no loss, and GAE steps over it.
3. The critic is a second copy of the model; advantages are whitened over all actions of a rollout, on all ranks.
4. The KL to the start model (k3) stands in the loss, not in the reward.
5. Losses are means over all actions of an optimiser step: no micro-batch, packing or rank changes a gradient.

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

from plumbing import constants
from plumbing.presets import PRESETS

if __name__ == "__main__":  # a mistyped constant is refused at once; what follows takes seconds to import
    constants.check_early(sys.argv[1:], ("ppo", "rollout", "grader"), PRESETS)

import grader
import rollout
from data.problems import load_problems, problem_at, split_dev
from plumbing import checkpoints, logs, packing, ranks
from plumbing.chat import Chat, load_tokenizer
from plumbing.checkpoints import Part
from plumbing.constants import Count, Share, require
from plumbing.engine import Engine
from plumbing.models import Actor, Critic
from plumbing.packing import MicroBatch
from plumbing.ranks import all_sum, print_once
from rollout import Attempt, Dialogue

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The values are the paper's. A preset changes a group of them, NAME=value on the command line one; a start prints both.
# What to train
PRESET: str = ""  # names from plumbing/presets.py, comma between them; several apply in order
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
KL_COEF: tuple[float, ...] = (0.01,)  # weight of the KL to the start model, by attempt; the last for all others
KL_ESTIMATOR: Literal["k1", "k2", "k3"] = "k3"  # k1 stands in the reward, the others in the loss; see kl_estimate
LOSS_MEAN: Literal["actions", "dialogues", "attempts", "constant"] = "actions"  # what losses are a mean over
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

MODULES = {"ppo": sys.modules[__name__], "rollout": rollout, "grader": grader}  # where constants are looked for
MODULES |= {name: sys.modules[f"plumbing.{name}"] for name in constants.WHERE_AND_HOW_FAST}


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
    returns = torch.full((len(dialogues), rollout.MAX_ATTEMPTS), torch.nan, dtype=torch.float64)  # (D, K)
    for d, dialogue in enumerate(dialogues):
        to_come = 0.0
        for k, attempt in reversed(list(enumerate(dialogue.attempts))):
            to_come = attempt.reward + ATTEMPT_GAMMA * to_come
            if attempt.own:
                returns[d, k] = to_come
    size = len(dialogues) if ESTIMATOR == "reinforce" else rollout.SAMPLES_PER_PROMPT
    advantages = group_advantages(returns.unflatten(0, (-1, size)), ESTIMATOR).flatten(0, 1)  # (G, S, K) -> (D, K)
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

    All (B, T) or any one shape; mask 1 = action; weights multiply each action's term. The ratio 1.5 of a good action is
    clipped to 1.2 and passes no gradient:
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
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, weights: Tensor | float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the values, clipped like the policy, summed over the actions -> loss, sums to log.

    A value may move by `clip` from that of the rollout; of the errors of the moved and the clipped value the larger
    counts. All (B, T) or any one shape; mask 1 = action; weights multiply each action's term.
    >>> loss, _ = value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]), torch.ones(1), clip=0.2)
    >>> round(loss.item(), 6)  # 0.5 * max((1 - 2)^2, (0.2 - 2)^2)
    1.62
    """
    action = mask > 0
    values, old_values, returns = (torch.where(action, x, 0.0) for x in (values, old_values, returns))
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    error, clipped_error = (values - returns).square(), (clipped_values - returns).square()
    loss = 0.5 * torch.where(action, weights * torch.maximum(error, clipped_error), 0.0).sum()
    return loss, {"value_clipped": (action & (clipped_error > error)).sum().float()}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimates of KL(policy || reference) from actions of the policy, one for each action, in any one shape.

    With d = log(policy / reference): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, which is never negative and has the KL
    as its mean. What counts in a loss is the mean of the gradient: that of k2 is the gradient of KL(policy ||
    reference); that of k3 is the gradient of KL(reference || policy), which grows exponentially where the policy has
    left the reference; that of k1 is zero, so k1 stands in the reward instead, where it gives that of KL(policy ||
    reference). All of this holds for actions of the present policy; after the first mini-batch it is an approximation.
    >>> logprobs, ref_logprobs = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()  # d = log 2
    >>> [round(kl_estimate(logprobs, ref_logprobs, k).item(), 4) for k in ("k1", "k2", "k3")]
    [0.6931, 0.2402, 0.1931]
    """
    d = logprobs - ref_logprobs
    if estimator == "k3":
        return (-d).exp() - 1 + d
    return d.square() / 2 if estimator == "k2" else d


def loss_weights(mini_batch: Sequence[Dialogue]) -> list[list[float]]:
    """The weight of each action in the losses of an optimiser step, (T,) for each of its dialogues, by LOSS_MEAN:

    "actions": all alike (the paper; DAPO, arXiv 2503.14476, eq. 8). "dialogues": the mean over dialogues of the mean
    over a dialogue's actions (GRPO, arXiv 2402.03300, eq. 3), in which actions of short dialogues weigh more;
    "attempts": the same by attempts. "constant": the mean over dialogues of the sum over a dialogue's actions, divided
    by MAX_ATTEMPT_TOKENS, so that no length changes a weight (Dr. GRPO, arXiv 2503.20783, eq. 1; RLOO and SCoRe).
    """
    actions = sum(sum(dialogue.mask) for dialogue in mini_batch)
    attempts = sum(attempt.own for dialogue in mini_batch for attempt in dialogue.attempts)

    def weight(dialogue: Dialogue, attempt: Attempt) -> float:
        if LOSS_MEAN == "actions":
            return 1 / actions
        if LOSS_MEAN == "attempts":
            return 1 / attempts / (attempt.end - attempt.start)
        length = sum(dialogue.mask) if LOSS_MEAN == "dialogues" else rollout.MAX_ATTEMPT_TOKENS
        return 1 / len(mini_batch) / length

    return [spread(dialogue, [weight(dialogue, a) for a in dialogue.attempts]) for dialogue in mini_batch]


# The batch ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Batch:
    """The dialogues that this rank trains on as tensors, (B, T) each, aligned with Dialogue.ids, 0 after its end."""

    dialogues: Sequence[Dialogue]
    mini_batches: list[range]  # rows of each optimiser step
    ids: Tensor  # int64
    mask: Tensor  # 1 = action
    kl_coef: Tensor  # weight of the KL, by the attempt that an action belongs to
    loss_weights: Tensor  # of each action in the losses of its optimiser step
    rewards: Tensor
    sampler_logprobs: Tensor
    # what prepare() fills in
    old_logprobs: Tensor  # of the policy that sampled, by the trainer's own forward pass
    ref_logprobs: Tensor  # of the start model
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def micro_batches(self, rows: range) -> Iterator[MicroBatch]:
        lengths, kernel = [len(d.ids) for d in self.dialogues], packing.has_kernel(COMPUTE_DTYPE)
        return packing.iterate_micro_batches(self.ids, self.mask, lengths, rows, kernel)


def make_batch(dialogues: Sequence[Dialogue]) -> Batch:
    """This rank's share of each mini-batch of a step's dialogues. Who played a dialogue does not decide who trains on
    it: each rank gets about as many tokens."""
    mine: list[Dialogue] = []
    weights: list[list[float]] = []
    mini_batches: list[range] = []
    for start in range(0, len(dialogues), MINI_BATCH):
        mini_batch = dialogues[start : start + MINI_BATCH]
        share = packing.share_among_ranks([len(d.ids) for d in mini_batch], dist.get_world_size())[dist.get_rank()]
        mini_batches.append(range(len(mine), len(mine) + len(share)))
        mine += [mini_batch[i] for i in share]
        weights_of_all = loss_weights(mini_batch)
        weights += [weights_of_all[i] for i in share]
    mask = packing.pad([d.mask for d in mine])
    later = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")
    return Batch(
        dialogues=mine,
        mini_batches=mini_batches,
        ids=packing.pad([d.ids for d in mine], torch.int64),
        mask=mask,
        kl_coef=packing.pad([spread(d, itertools.chain(KL_COEF, itertools.repeat(KL_COEF[-1]))) for d in mine]),
        loss_weights=packing.pad(weights),
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


# What is trained ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Learner:
    """What is trained, with what; the critic is None where the advantages need none, the reference where no KL does."""

    actor: Actor
    critic: Critic | None
    reference: Actor | None
    parts: list[Part]  # actor and critic, each with its optimiser
    skipped: int = 0  # optimiser steps skipped in a row

    @classmethod
    def load(cls, tokens: int) -> "Learner":
        """All models from MODEL; tokens: size of the tokenizer. Optimisers come before any forward pass (FSDP2)."""
        learner = cls(
            ranks.shard(Actor(MODEL, tokens, COMPUTE_DTYPE, ENTROPY_COEF != 0), COMPUTE_DTYPE), None, None, []
        )
        if ESTIMATOR == "gae":
            learner.critic = ranks.shard(Critic(MODEL, COMPUTE_DTYPE), COMPUTE_DTYPE)
        if any(KL_COEF):
            reference = Actor(REFERENCE or MODEL, tokens, COMPUTE_DTYPE, False).requires_grad_(False)
            learner.reference = ranks.shard(reference, COMPUTE_DTYPE)
        for name, model in (("actor", learner.actor), ("critic", learner.critic)):
            if model:
                adam = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
                learner.parts.append(Part(name, model, adam))
        return learner

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Under their Hugging Face names. All ranks must take them all."""
        return ranks.whole_weights(self.actor.lm, COMPUTE_DTYPE)

    def export(self, folder: Path, tokenizer: Any) -> None:
        """The policy as a Hugging Face folder. All ranks must call it."""
        checkpoints.export(folder, self.actor.lm, self.policy_weights(), tokenizer)


def set_learning_rates(learner: Learner, progress: float) -> dict[str, float]:
    metrics = {}
    for part in learner.parts:
        peak = ACTOR_LR if part.name == "actor" else CRITIC_LR
        metrics[f"{part.name}_lr"] = part.optimizer.param_groups[0]["lr"] = peak * learning_rate(progress)
    return metrics


def learning_rate(progress: float) -> float:
    """Share of the peak at `progress` in [0, 1) of training: linear over WARMUP, then half a cosine to MIN_LR."""
    if progress < WARMUP:
        return progress / WARMUP
    decayed = (progress - WARMUP) / (1 - WARMUP)
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
    for rows in batch.mini_batches:
        for micro in batch.micro_batches(rows):
            out = model(micro)
            if micro.counts:
                result[micro.action] = out[0] if isinstance(out, tuple) else out
    ranks.drop_gathered(model)
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
        rewards = batch.rewards
        if KL_ESTIMATOR == "k1":
            rewards = rewards - batch.kl_coef * kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k1")
        batch.advantages, batch.returns = gae(rewards, batch.values, batch.mask, GAMMA, LAMBDA, ATTEMPT_GAMMA)
        return
    assign_group_advantages(dialogues)
    batch.advantages = packing.pad([spread(d, [a.advantage for a in d.attempts]) for d in batch.dialogues]) * batch.mask


def update(batch: Batch, learner: Learner, train_actor: bool) -> dict[str, float]:
    """EPOCHS passes of PPO over the rollout, an optimiser step for each mini-batch -> metrics: losses are means over
    steps, the others over actions. train_actor: whether the actor learns, too (not during CRITIC_WARMUP)."""
    sums: Counter[str] = Counter()
    norms: dict[str, list[float]] = defaultdict(list)
    trained = [part for part in learner.parts if train_actor or part.name == "critic"]
    for rows in batch.mini_batches * EPOCHS:
        for part in trained:  # one model after the other: until its last micro-batch a rank holds all of its gradient
            accumulate = accumulate_actor_gradient if part.name == "actor" else accumulate_critic_gradient
            for micro in batch.micro_batches(rows):
                ranks.hold_until_last(part.model, micro.is_last)
                sums.update(accumulate(batch, micro, part.model))
        for name, norm in step_optimizers(learner, trained).items():
            norms[name].append(norm)
    names = sorted(sums)  # the same order on all ranks
    actions, *totals = all_sum(batch.mask.sum(), *(sums[name] for name in names))
    steps = len(batch.mini_batches) * EPOCHS
    counts = {name: steps if name.endswith("loss") else actions * EPOCHS for name in names}
    metrics = {name: total / counts[name] for name, total in zip(names, totals, strict=True)}
    return metrics | {name: statistics.fmean(values) for name, values in norms.items()}


def accumulate_actor_gradient(batch: Batch, micro: MicroBatch, actor: nn.Module) -> dict[str, float]:
    """Add the gradient of policy loss, KL and entropy bonus over a micro-batch -> sums to log."""
    at = micro.action
    mask = torch.full_like(batch.mask[at], float(micro.counts))  # (A,)
    weights, ref_logprobs = mask * batch.loss_weights[at], batch.ref_logprobs[at]
    logprobs, entropy = actor(micro)
    trusted = weights
    if TRUNCATE_IS:
        trusted = weights * (batch.old_logprobs - batch.sampler_logprobs)[at].exp().clamp(max=TRUNCATE_IS)
    loss, stats = policy_loss(logprobs, batch.old_logprobs[at], batch.advantages[at], mask, CLIP, trusted)
    stats |= {"policy_loss": loss, "entropy": (mask * entropy).sum()}
    if any(KL_COEF):
        stats["kl_k3"] = (mask * kl_estimate(logprobs.detach(), ref_logprobs, "k3")).sum()
    if KL_ESTIMATOR != "k1":
        loss = loss + (weights * batch.kl_coef[at] * kl_estimate(logprobs, ref_logprobs, KL_ESTIMATOR)).sum()
    loss = loss - ENTROPY_COEF * (weights * entropy).sum()
    (loss * dist.get_world_size()).backward()  # FSDP averages gradients over ranks; what is wanted is their sum
    return {name: value.item() for name, value in stats.items()}


def accumulate_critic_gradient(batch: Batch, micro: MicroBatch, critic: nn.Module) -> dict[str, float]:
    """Add the gradient of the value loss over a micro-batch -> sums to log."""
    at = micro.action
    mask = torch.full_like(batch.mask[at], float(micro.counts))  # (A,)
    values, weights = critic(micro), batch.loss_weights[at]
    loss, stats = value_loss(values, batch.values[at], batch.returns[at], mask, VALUE_CLIP, weights)
    (loss * dist.get_world_size()).backward()
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
    if ESTIMATOR != "gae":
        needs_critic = KL_ESTIMATOR == "k1" or CRITIC_WARMUP > 0
        require(not needs_critic, "KL_ESTIMATOR=k1 and CRITIC_WARMUP need a critic: ESTIMATOR=gae")
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
    return min(1.0, max(step / STEPS if STEPS else 0.0, generated / TOKEN_BUDGET if TOKEN_BUDGET else 0.0))


def train(
    folder: Path, sampler: Engine, learner: Learner, chat: Chat,
    problems: list[dict[str, Any]], dev: list[dict[str, Any]], offline: dict[str, list[Any]],
) -> None:  # fmt: skip
    """The training loop, from the newest checkpoint to the end."""
    step, generated = checkpoints.load(folder, learner.parts)
    print_once(f"{folder} resumes after step {step}" if step else f"{folder} begins")
    log = logs.Log(folder, RUN, step, progress(step, generated)) if dist.get_rank() == 0 else None
    goal = f"dev_accuracy_at_{rollout.MAX_ATTEMPTS}"
    best, best_accuracy = checkpoints.best_so_far(folder, goal)
    signals: list[int] = []  # a preempted job gets SIGTERM: finish the step, save, end well
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    sampler.load_weights(learner.policy_weights())
    clock = logs.Clock()
    is_preempted = False
    if step > 0 and step == best:
        learner.export(folder / "best", chat.tokenizer)
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
        begin = progress(step - 1, generated)
        generated += int(metrics["generated"])
        # In the middle of the step's share, so that neither the first nor the last step has the learning rate 0.
        metrics |= set_learning_rates(learner, (begin + progress(step, generated)) / 2)
        metrics |= update(batch, learner, train_actor=step > CRITIC_WARMUP)
        clock.stop("update")
        sampler.load_weights(learner.policy_weights())
        clock.stop("transfer")
        is_due = step % SAVE_EVERY == 0 or progress(step, generated) >= 1
        if is_due and dev:
            metrics |= dev_accuracies(sampler, chat, dev)
            if metrics[goal] > best_accuracy:
                best, best_accuracy = step, metrics[goal]
            clock.stop("dev")
        if log:
            flops = logs.update_flops(learner.actor.lm, dialogues, ESTIMATOR == "gae", any(KL_COEF), EPOCHS)
            metrics |= logs.speed_metrics(clock.take(), metrics["tokens"], flops)
            row = {"step": step, "generated_tokens": generated, "token_budget": TOKEN_BUDGET} | metrics
            log.write(row, progress(step, generated))
            log.write_dialogues(batch, chat.tokenizer, step, with_tokens=is_due)
        is_preempted = any(all_sum(len(signals)))
        # First the row, then the checkpoint, then best/: a run that is killed in between repeats what it lacks.
        if is_due or is_preempted:
            checkpoints.save(folder, step, generated, learner.parts, best)
        if step == best:
            learner.export(folder / "best", chat.tokenizer)
        clock.stop("save")
    if progress(step, generated) >= 1:
        learner.export(folder / "policy", chat.tokenizer)
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
        constants.open_run(folder, constants.snapshot(MODULES), Path(TRAIN_DATA))
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
    print_once(logs.memory_plan(MODEL, COMPUTE_DTYPE, ESTIMATOR == "gae", any(KL_COEF)))
    if DRY_RUN:
        return
    sampler = Engine(MODEL, rollout.CONTEXT, COMPUTE_DTYPE, SEED, sleeps=True)  # first: it wants to find memory free
    sampler.sleep()
    train(folder, sampler, Learner.load(len(chat.tokenizer)), chat, problems, dev, offline)
    sampler.shutdown()


if __name__ == "__main__":
    main()
