"""ppo.py: GAE, losses and a whole training step against formulas written out here; packing, ranks, resume, export."""

import contextlib
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppo
import rollout
from data import demo
from rollout import Attempt, Dialogue
from tests.conftest import ROOT, alone


# Advantages -----------------------------------------------------------------------------------------------------------
def advantages_by_the_sum(rewards, values, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_(t+l), on a list of actions: the definition, not the recursion."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


number = st.floats(-2, 2, width=32)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(number, number), min_size=1, max_size=12),
    st.lists(st.integers(0, 12), max_size=10),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gae_is_its_definition_wherever_the_environment_speaks(actions, gaps, gamma, lam):
    rewards, values = [r for r, _ in actions], [v for _, v in actions]
    expected = advantages_by_the_sum(rewards, values, gamma, lam)
    r, v, mask = list(rewards), list(values), [1.0] * len(actions)
    for gap in gaps:  # feedback anywhere, with anything in it
        at = gap % (len(mask) + 1)
        r.insert(at, 7.0), v.insert(at, math.nan), mask.insert(at, 0.0)
    a, returns = ppo.gae(torch.tensor([r]), torch.tensor([v]), torch.tensor([mask]), gamma, lam)
    action = torch.tensor(mask) > 0
    assert torch.allclose(a[0, action], torch.tensor(expected), atol=1e-4)
    assert torch.allclose(returns[0, action], torch.tensor(expected) + torch.tensor(values), atol=1e-4)
    assert not a[0, ~action].any() and not returns[0, ~action].any()


def test_gae_of_a_batch_with_lambda_one_is_return_minus_value():
    rewards, values = torch.rand(3, 9), torch.rand(3, 9)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 1], [1] * 9]).float()
    a, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1)
    assert torch.allclose(a, (to_come - values) * mask, atol=1e-6)
    assert torch.allclose(returns, to_come * mask, atol=1e-6)


# Losses ---------------------------------------------------------------------------------------------------------------
def test_policy_loss_and_its_gradient_by_cases():
    """d loss / d logprob is -ratio * advantage, but 0 where the ratio has left 1 +- clip on the side of the gain."""
    for ratio, advantage, value, gradient in [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0),  # worse than before: not clipped
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ]:
        logprobs = torch.tensor([math.log(ratio), 5.0], requires_grad=True)
        old, a = torch.zeros(2), torch.tensor([advantage, 9.0])
        loss, stats = ppo.policy_loss(logprobs, old, a, torch.tensor([1.0, 0.0]), clip=0.2)  # second: environment
        loss.backward()
        assert loss.item() == pytest.approx(value, abs=1e-5)
        assert logprobs.grad.tolist() == pytest.approx([gradient, 0.0], abs=1e-5)
        assert stats["clipped"].item() == (gradient == 0.0)


def test_value_loss_by_cases():
    for value, old, target, loss in [
        (0.5, 0.5, 1.0, 0.125),
        (0.9, 0.5, 1.0, 0.5 * 0.3**2),  # moved too far towards the return: the clipped error counts, no gradient
        (0.0, 0.5, 1.0, 0.5 * 1.0**2),  # moved away: its own error counts
    ]:
        v = torch.tensor([value, math.nan], requires_grad=True)
        got, _ = ppo.value_loss(v, torch.tensor([old, 0.0]), torch.tensor([target, 0.0]), torch.tensor([1.0, 0.0]), 0.2)
        assert got.item() == pytest.approx(loss, abs=1e-6)


def test_k3_is_an_unbiased_estimate_of_the_kl():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    assert (p * ppo.kl_k3(p.log(), q.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)


def test_nothing_behind_the_mask_reaches_the_values():
    values, nan = torch.tensor([0.0, math.nan], requires_grad=True), math.nan
    old, returns, mask = torch.tensor([0.0, nan]), torch.tensor([1.0, nan]), torch.tensor([1.0, 0.0])
    ppo.value_loss(values, old, returns, mask, clip=0.2)[0].backward()
    assert values.grad.tolist() == [-1.0, 0.0]


# Packing --------------------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 80), st.integers(1, 300))
def test_pack_takes_each_dialogue_once_and_keeps_the_budgets(lengths, row_tokens, batch_tokens):
    batches = ppo.pack(lengths, row_tokens, batch_tokens)
    assert sorted(i for rows in batches for row in rows for i in row) == list(range(len(lengths)))
    for rows in batches:
        sizes = [sum(lengths[i] for i in row) for row in rows]
        assert all(size <= row_tokens or len(row) == 1 for size, row in zip(sizes, rows, strict=True))
        assert max(sizes) * len(rows) <= batch_tokens or len(rows) == 1


def dialogue(parts: list[tuple[list[int], bool]], statuses: list[str]) -> Dialogue:
    """A dialogue by hand: (ids, sampled?) in order, the statuses of its attempts."""
    d = Dialogue({"id": "x", "question": "q", "answer": "1"}, len(statuses))
    for ids, sampled in parts:
        start = len(d.ids)
        d.extend(ids, [0.0] * len(ids) if sampled else None)
        if sampled:
            d.attempts.append(Attempt(start, len(d.ids), None, statuses[len(d.attempts)], "stop"))
    return d


def two_dialogues() -> list[Dialogue]:
    right_at_the_second = dialogue(
        [([5, 9, 7], False), ([11, 12], True), ([3, 4], False), ([13], True)], ["wrong", "correct"]
    )
    never = dialogue([([6, 8], False), ([20, 21, 22], True)], ["no_answer"])
    return [right_at_the_second, never]


@pytest.mark.parametrize(("row_tokens", "batch_tokens"), [(1, 1), (16, 16), (8, 64), (64, 64)])
def test_packed_rows_give_each_dialogue_what_it_has_alone(toy, ranks, monkeypatch, row_tokens, batch_tokens):
    monkeypatch.setattr(ppo, "ROW_TOKENS", row_tokens)
    monkeypatch.setattr(ppo, "MAX_TOKENS_PER_MICRO_BATCH", batch_tokens)
    monkeypatch.setattr(ppo, "COMPUTE_DTYPE", "float32")
    monkeypatch.setattr(ppo, "LOGITS_CHUNK", 3)
    folder = str(toy / "warm_start")
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    dialogues = [*two_dialogues(), *reversed(two_dialogues())]
    batch = ppo.make_batch([dialogues])
    actor = ppo.Actor(folder, lm.config.vocab_size)
    got = ppo.over_actions(ppo.shard(actor, actor.lm.model.layers), batch)  # (B, T)
    for d, row in zip(dialogues, got, strict=True):
        logprobs = lm(torch.tensor([d.ids])).logits.log_softmax(-1)[0]
        expected = [logprobs[t - 1, d.ids[t]].item() if m else 0.0 for t, m in enumerate(d.mask)]
        assert row[: len(d.ids)].tolist() == pytest.approx(expected, abs=1e-5)
        assert not row[len(d.ids) :].any()


def test_varlen_attention_keeps_dialogues_apart(toy, ranks, monkeypatch):
    """The path of GPUs with its kernel replaced by what the kernel promises: causal attention in each piece."""
    from torch.nn.attention import varlen

    def kernel(q, k, v, boundaries_q, boundaries_k, longest_q, longest_k, *, scale, window_size):
        assert torch.equal(boundaries_q, boundaries_k) and window_size == (-1, 0)
        assert boundaries_q.dtype == torch.int32 and boundaries_q[0] == 0 and boundaries_q[-1] == len(q)
        pieces = [(int(a), int(b)) for a, b in itertools.pairwise(boundaries_q)]
        assert max(b - a for a, b in pieces) == longest_q == longest_k
        attend = torch.nn.functional.scaled_dot_product_attention
        outs = [
            attend(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=scale)[0].transpose(0, 1)
            for a, b in pieces
        ]
        return torch.cat(outs)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    folder = str(toy / "warm_start")
    actor = ppo.Actor(folder, 280)
    batch = ppo.make_batch([[*two_dialogues(), *reversed(two_dialogues())]])
    micro = ppo.make_micro_batch(batch, [[0, 3], [1, 2]])
    expected, _ = actor(micro)
    actor.lm.set_attn_implementation("varlen")
    micro.attention |= ppo.boundaries(micro.positions)
    got, _ = actor(micro)
    assert torch.allclose(got, expected, atol=1e-5)


@given(st.lists(st.integers(1, 500), min_size=8, max_size=40), st.integers(1, 8))
def test_ranks_share_a_mini_batch_evenly(lengths, ranks):
    shares = ppo.share(lengths, ranks)
    assert sorted(i for rows in shares for i in rows) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in rows) for rows in shares]
    assert all(shares) and max(tokens) - min(tokens) <= max(lengths)


# One step by hand -----------------------------------------------------------------------------------------------------
def constants(monkeypatch, **changes):
    small = {
        "DIALOGUES": 2, "MINI_BATCH": 2, "EPOCHS": 1, "ROW_TOKENS": 16, "MAX_TOKENS_PER_MICRO_BATCH": 16, "GAMMA": 1.0,
        "LAMBDA": 0.9, "CLIP": 0.2, "VALUE_CLIP": 0.2, "KL_COEF": (0.05,), "ENTROPY_COEF": 0.02, "WHITEN": True,
        "BETAS": (0.9, 0.95), "WEIGHT_DECAY": 0.0, "GRAD_CLIP": 0.7, "COMPUTE_DTYPE": "float32",
        "GRADIENT_CHECKPOINTING": False, "LOGITS_CHUNK": 2, "MAX_MISMATCH": math.inf, "ATTEMPT_GAMMA": 1.0,
        "KL_IN_REWARD": 0.0, "TRUNCATE_IS": 0.0, "ESTIMATOR": "gae",
    }  # fmt: skip
    for name, value in (small | changes).items():
        monkeypatch.setattr(ppo, name, value)


def learner_of(actor, critic, reference=None, actor_lr: float = 0.0, critic_lr: float = 0.0) -> ppo.Learner:
    actor = ppo.shard(actor, actor.lm.model.layers)
    critic = ppo.shard(critic, critic.body.layers)
    reference = reference and ppo.shard(reference.requires_grad_(False), reference.lm.model.layers)
    optimizers = {"actor": ppo.adam(actor, actor_lr), "critic": ppo.adam(critic, critic_lr)}
    return ppo.Learner(actor, critic, reference, optimizers)


def one_step(folder: str, tokens: int, dialogues: list[Dialogue], actor_lr: float, critic_lr: float):
    """What ppo.train does with a rollout -> (weights of actor, of critic) before and after, metrics."""
    torch.manual_seed(0)
    actor = ppo.Actor(folder, tokens)
    critic = ppo.Critic(folder)
    with torch.no_grad():  # the policy has moved from the reference, and the critic says something
        for p in [*actor.parameters(), *critic.parameters()]:
            p += 0.05 * torch.randn_like(p)
    start = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in (actor, critic)]
    learner = learner_of(actor, critic, ppo.Actor(folder, tokens), actor_lr, critic_lr)
    for d in dialogues:
        rollout.assign_rewards(d)
    batch = ppo.my_batch(dialogues)
    metrics = ppo.prepare(batch, learner)
    metrics |= ppo.update(batch, learner, True, Path("."))
    end = [{n: p.full_tensor().detach() for n, p in m.named_parameters()} for m in (actor, critic)]
    return start, end, metrics


@pytest.mark.parametrize("options", [False, True])
def test_one_training_step_by_hand(toy, ranks, monkeypatch, options):
    """Two dialogues, six actions: rewards, advantages, losses, clipped gradients and Adam with nothing but torch.
    options: what the paper has off: KL by attempt and in the reward, a discount between attempts, importance weights.
    """
    constants(monkeypatch)
    kl_coefs, kl_in_reward, attempt_gamma = torch.full((6,), 0.05), 0.0, 1.0
    if options:
        constants(monkeypatch, KL_COEF=(0.05, 0.2), KL_IN_REWARD=0.3, ATTEMPT_GAMMA=0.5, TRUNCATE_IS=1e-3)
        kl_coefs, kl_in_reward, attempt_gamma = torch.tensor([0.05, 0.05, 0.2, 0.05, 0.05, 0.05]), 0.3, 0.5
    folder = str(toy / "warm_start")
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    (actor0, critic0), (actor1, critic1), metrics = one_step(folder, vocabulary, two_dialogues(), 1e-3, 2e-3)

    ids = [[5, 9, 7, 11, 12, 3, 4, 13], [6, 8, 20, 21, 22]]
    actions = [[3, 4, 7], [2, 3, 4]]  # positions of the sampled ids
    rewards = [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]  # right at the second attempt; never a box

    def model(weights, prefix):
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        lm.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n != "head.weight"}, strict=False)
        return lm

    def action_logits(lm):
        states = [lm(torch.tensor([row])).logits[0] for row in ids]
        return torch.cat([s[torch.tensor(a) - 1] for s, a in zip(states, actions, strict=True)])  # (6, V)

    policy, ref = model(actor0, "lm."), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    body, head = model({f"model.{n}": w for n, w in critic0.items()}, "model.body."), critic0["head.weight"].clone()
    body.load_state_dict(
        {f"model.{n.removeprefix('body.')}": w for n, w in critic0.items() if n != "head.weight"}, strict=False
    )
    head.requires_grad_(True)
    taken = torch.tensor([row[t] for row, a in zip(ids, actions, strict=True) for t in a])

    logits = action_logits(policy)[:, :vocabulary]
    log_all = logits.log_softmax(-1)
    logprobs = log_all[torch.arange(6), taken]
    with torch.no_grad():
        ref_logprobs = action_logits(ref)[:, :vocabulary].log_softmax(-1)[torch.arange(6), taken]
    hidden = torch.cat(
        [
            body.model(torch.tensor([row])).last_hidden_state[0, torch.tensor(a) - 1]
            for row, a in zip(ids, actions, strict=True)
        ]
    )
    values = hidden @ head[0]  # (6,)

    v, d = values.tolist(), (logprobs - ref_logprobs).tolist()
    r = [x - kl_in_reward * y for x, y in zip(rewards[0] + rewards[1], d, strict=True)]
    # The first dialogue's attempts: actions 0 and 1, and 2. The discount stands between them.
    third = r[2] - v[2]
    second_ = r[1] + attempt_gamma * v[2] - v[1] + 0.9 * attempt_gamma * third
    first = [r[0] + v[1] - v[0] + 0.9 * second_, second_, third]
    advantages = torch.tensor(first + advantages_by_the_sum(r[3:], v[3:], 1.0, 0.9))
    returns = advantages + values.detach()
    whitened = (advantages - advantages.mean()) / advantages.std(correction=0)

    ratio = (logprobs - logprobs.detach()).exp()
    d = ref_logprobs - logprobs
    k3 = d.exp() - 1 - d
    entropy = -(log_all.exp() * log_all).sum(-1)
    # The sampler claims probability 1 for each action: the weight is the trainer's probability, cut at TRUNCATE_IS.
    weights = logprobs.detach().exp().clamp(max=1e-3) if options else 1.0
    loss = (-weights * ratio * whitened + kl_coefs * k3 - 0.02 * entropy).mean()
    critic_loss = (0.5 * (values - returns) ** 2).mean()
    loss.backward()
    critic_loss.backward()

    def clipped_adam(weights, gradients, lr):
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        scale = min(1.0, 0.7 / (norm + 1e-6))
        new = {}
        for n, w in weights.items():
            g = gradients[n] * scale
            m, s = 0.1 * g / (1 - 0.9), 0.05 * g**2 / (1 - 0.95)  # first step: the bias corrections cancel the decays
            new[n] = w - lr * m / (s.sqrt() + 1e-8)
        return new, norm

    gradients = {f"lm.{n}": p.grad for n, p in policy.named_parameters()}
    expected, norm = clipped_adam(actor0, gradients, 1e-3)
    critic_gradients = {f"body.{n}": p.grad for n, p in body.model.named_parameters()} | {"head.weight": head.grad}
    critic_expected, critic_norm = clipped_adam(critic0, critic_gradients, 2e-3)

    assert metrics["actor_grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["critic_grad_norm"] == pytest.approx(critic_norm, rel=1e-4)
    assert norm > 0.7 or options  # the clipping of gradients is in the test
    assert metrics["policy_loss"] == pytest.approx((-weights * ratio * whitened).mean().item(), abs=1e-5)
    assert metrics["value_loss"] == pytest.approx(critic_loss.item(), rel=1e-4)
    assert metrics["kl_k3"] == pytest.approx(k3.mean().item(), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert metrics["kl_k1"] == pytest.approx((logprobs - ref_logprobs).mean().item(), rel=1e-4)
    for got, want, old, grads in (
        (actor1, expected, actor0, gradients),
        (critic1, critic_expected, critic0, critic_gradients),
    ):
        assert got.keys() == want.keys()
        for n, w in want.items():
            # Adam's first step is lr * sign(gradient): where a gradient is all rounding, its sign is, too.
            sure = grads[n].abs() > 1e-5
            assert torch.allclose(got[n][sure], w[sure], atol=2e-6), n
            assert (got[n] - old[n]).abs().max() <= 2.001e-3


def test_a_rank_with_fewer_micro_batches_adds_nothing(toy, ranks, monkeypatch):
    """Another rank has three more: this one repeats its last, which moves nothing and is counted nowhere."""
    constants(monkeypatch, MAX_TOKENS_PER_MICRO_BATCH=8, ROW_TOKENS=8)
    folder, reduce = str(toy / "warm_start"), torch.distributed.all_reduce
    _, by_itself, metrics = one_step(folder, 280, two_dialogues(), 1e-3, 2e-3)

    def beside_a_longer_rank(tensor, op=ppo.dist.ReduceOp.SUM, **options):
        tensor += 3 * (op == ppo.dist.ReduceOp.MAX)
        return reduce(tensor, op, **options)

    monkeypatch.setattr(ppo.dist, "all_reduce", beside_a_longer_rank)
    _, beside, found = one_step(folder, 280, two_dialogues(), 1e-3, 2e-3)
    assert found == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    for a, b in zip(by_itself, beside, strict=True):
        assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


def test_logits_exist_for_a_chunk_at_a_time(toy, ranks, monkeypatch):
    constants(monkeypatch, LOGITS_CHUNK=2)
    actor, inner, chunks, kept = ppo.Actor(str(toy / "warm_start"), 280), ppo.token_logprobs, [], []
    micro = ppo.make_micro_batch(ppo.make_batch([two_dialogues() * 2]), [[0, 1], [2, 3]])
    monkeypatch.setattr(ppo, "token_logprobs", lambda h, t, head: chunks.append(len(h)) or inner(h, t, head))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        actor(micro)
    width = actor.lm.lm_head.weight.shape[1]
    assert chunks == [2] * 6  # of twelve actions
    assert all(280 not in shape or shape[-1] == width for shape in kept)  # the head itself, no logits


@pytest.mark.parametrize(
    ("changes", "critic", "reference"),
    [
        ({}, True, True),
        ({"KL_COEF": (0.0, 0.0)}, True, False),
        ({"KL_COEF": (0.0,), "KL_IN_REWARD": 0.1}, True, True),
        ({"ESTIMATOR": "rloo"}, False, True),
    ],
)
def test_only_what_is_needed_is_built(toy, ranks, monkeypatch, changes, critic, reference):
    constants(monkeypatch, MODEL=str(toy / "warm_start"), REFERENCE="", **changes)
    learner = ppo.Learner.load(280)
    assert (learner.critic is not None, learner.reference is not None) == (critic, reference)
    assert learner.optimizers.keys() == ({"actor", "critic"} if critic else {"actor"})


def test_the_reference_is_the_one_named(toy, ranks, monkeypatch, tmp_path):
    moved = AutoModelForCausalLM.from_pretrained(toy / "warm_start")
    with torch.no_grad():
        moved.model.norm.weight += 1
    moved.save_pretrained(tmp_path / "moved")
    constants(monkeypatch, MODEL=str(tmp_path / "moved"), REFERENCE=str(toy / "warm_start"))
    learner = ppo.Learner.load(280)
    actor, reference = (part.lm.model.norm.weight.full_tensor() for part in (learner.actor, learner.reference))
    assert torch.allclose(actor, reference + 1)


@pytest.mark.parametrize("changes", [{"MAX_TOKENS_PER_MICRO_BATCH": 1}, {"ROW_TOKENS": 1}, {"LOGITS_CHUNK": 100}])
def test_gradients_do_not_depend_on_micro_batches(toy, ranks, monkeypatch, changes):
    dialogues = [*two_dialogues(), *two_dialogues()[::-1]]
    folder, moved = str(toy / "warm_start"), []
    for change in ({}, changes):
        constants(monkeypatch, **{"MINI_BATCH": 4, "GRAD_CLIP": 1e9, "MAX_TOKENS_PER_MICRO_BATCH": 64} | change)
        _, _, metrics = one_step(folder, 280, dialogues, 0.0, 0.0)
        moved.append(metrics)
    for name in moved[0]:
        assert moved[1][name] == pytest.approx(moved[0][name], rel=1e-4, abs=1e-6), name


def test_checkpointed_activations_change_nothing(toy, ranks, monkeypatch):
    results = []
    for recompute in (False, True):
        constants(monkeypatch, GRADIENT_CHECKPOINTING=recompute)
        results.append(one_step(str(toy / "warm_start"), 280, two_dialogues(), 1e-3, 1e-3)[1])
    for plain, recomputed in zip(*results, strict=True):
        assert all(torch.allclose(plain[n], recomputed[n], atol=1e-6) for n in plain)


def test_padded_vocabulary_has_no_probability(toy, ranks, monkeypatch):
    constants(monkeypatch)
    actor = ppo.Actor(str(toy / "warm_start"), tokens=30)  # ids from 30 on are no tokens
    logits = actor.lm(torch.tensor([two_dialogues()[1].ids])).logits[0]
    expected = logits[1, :30].log_softmax(-1)[20].item()
    actor = ppo.shard(actor, actor.lm.model.layers)
    got = ppo.over_actions(actor, ppo.make_batch([two_dialogues()]))
    assert got[1, 2].item() == pytest.approx(expected, abs=1e-5)


# Without a critic -----------------------------------------------------------------------------------------------------
def attempts_of(statuses: str, reward: str, attempt_gamma: float, monkeypatch) -> list[float]:
    monkeypatch.setattr(rollout, "REWARD", reward)
    for name, value in {"REWARD_WRONG": 0.0, "REWARD_NO_ANSWER": 0.0, "SCORE_ALPHA": 10.0}.items():
        monkeypatch.setattr(rollout, name, value)  # SCoRe's
    names = {"c": "correct", "w": "wrong"}
    return ppo.attempt_returns(rollout.attempt_rewards([names[s] for s in statuses], reward), attempt_gamma)


def test_score_pays_as_its_equations_say(monkeypatch):
    """With gamma 0 across attempts: stage I pays the second attempt alone, stage II the first its own correctness alone
    and the second r2 + 10 (r2 - r1), of which section 5.2 lists the four cases."""
    for statuses, second in {"cc": 1.0, "wc": 11.0, "cw": -10.0, "ww": 0.0}.items():
        r1, r2 = (float(s == "c") for s in statuses)
        assert attempts_of(statuses, "score_stage1", 0.0, monkeypatch) == [0.0, r2]
        assert attempts_of(statuses, "score_stage2", 0.0, monkeypatch) == [r1, second]
        assert attempts_of(statuses, "per_attempt", 0.0, monkeypatch) == [r1, r2]
        assert attempts_of(statuses, "per_attempt", 1.0, monkeypatch) == [r1 + r2, r2]


def test_group_advantages_by_hand():
    """Four samples of one problem, three of which took a second attempt, and one of another problem."""
    returns, groups = [[1.0], [0.0, 2.0], [0.0, 0.0], [3.0, 1.0], [5.0]], [0, 0, 0, 0, 1]
    # first attempts 1, 0, 0, 3: mean 1, variance (0 + 1 + 1 + 4) / 4 = 1.5; second ones 2, 0, 1: mean 1, variance 2 / 3
    rloo = [[1 - 3 / 3], [0 - 4 / 3, 2 - 1 / 2], [0 - 4 / 3, 0 - 3 / 2], [3 - 1 / 3, 1 - 2 / 2], [0.0]]
    plain = [[0.0], [-1.0, 1.0], [-1.0, -1.0], [2.0, 0.0], [0.0]]
    grpo = [[x / s for x, s in zip(row, (math.sqrt(1.5), math.sqrt(2 / 3)), strict=False)] for row in plain]
    # one batch: first attempts 1, 0, 0, 3, 5: mean 1.8
    batch = [[-0.8], [-1.8, 1.0], [-1.8, -1.0], [1.2, 0.0], [3.2]]
    for method, expected in {"rloo": rloo, "dr_grpo": plain, "grpo": grpo, "reinforce": batch}.items():
        got = ppo.group_advantages(returns, groups, method)
        assert [pytest.approx(row) for row in expected] == got, method


def test_attempts_that_are_not_the_policys_are_no_baseline():
    """The first attempts of two dialogues were put there: the second ones alone are compared, the first of the third
    with nothing (reinforce: with that of the fourth)."""
    returns, groups = [[None, 2.0], [None, 0.0], [1.0, 1.0], [4.0]], [0, 0, 0, 1]
    assert ppo.group_advantages(returns, groups, "dr_grpo") == [[0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [0.0]]
    assert ppo.group_advantages(returns, groups, "reinforce") == [[0.0, 1.0], [0.0, -1.0], [-1.5, 0.0], [1.5]]


def test_dialogues_that_begin_with_an_attempt_of_someone_else(toy, engine, monkeypatch):
    """Played by the real engine: the samples of a problem share it, no token of it is trained, nothing counts it."""
    constants(monkeypatch, DIALOGUES=8, MINI_BATCH=8, ESTIMATOR="rloo", ATTEMPT_GAMMA=0.0, WHITEN=False)
    for name, value in {"FEEDBACK": "intrinsic", "PROMPT": "single_turn", "REWARD": "score_stage2"}.items():
        monkeypatch.setattr(rollout, name, value)
    for name, value in {"MIN_ATTEMPTS": 2, "MAX_ATTEMPTS": 2, "SAMPLES_PER_PROMPT": 2, "OFFLINE_SHARE": 0.5}.items():
        monkeypatch.setattr(rollout, name, value)
    problems = rollout.load_problems(toy / "train.jsonl")
    right, wrong = ((lambda p: p["answer"], "correct"), (lambda p: "25", "wrong"))
    offline = {
        p["id"]: [(f"It is \\boxed{{ {say(p)}}}", say(p), status) for say, status in (right, wrong)] for p in problems
    }
    chat = rollout.Chat(engine.tokenizer)
    dialogues = ppo.play_step(engine, chat, problems, offline, 1)
    begun = [d.attempts[0].own for d in dialogues]
    assert 0 < sum(begun) < 8 and begun[0::2] == begun[1::2]  # the pairs are the samples of one problem
    placed = [d for d, own in zip(dialogues, begun, strict=True) if not own]
    assert all(
        a.ids[: a.attempts[0].end] == b.ids[: b.attempts[0].end] for a, b in zip(placed[::2], placed[1::2], strict=True)
    )
    for d in placed:
        first, second = d.attempts
        assert first.reward == 0.0 and second.own and not any(d.mask[: second.start])
        value = {"correct": 1.0, "wrong": -0.5, "no_answer": -1.0}
        assert second.reward == 11 * value[second.status] - 10 * value[first.status]
    metrics = ppo.rollout_metrics(dialogues)
    fresh = [d for d, own in zip(dialogues, begun, strict=True) if own]
    assert metrics["began_offline"] == len(placed) / 8
    assert metrics["accuracy_at_1"] == sum(d.attempts[0].status == "correct" for d in fresh) / len(fresh)
    ppo.compare(dialogues)
    batch = ppo.my_batch(dialogues)
    advantages = ppo.attempt_advantages(batch)
    for row, d in enumerate(dialogues):
        assert advantages[row].tolist()[: len(d.ids)] == [
            next((a.advantage for a in d.attempts if a.start <= t < a.end), 0.0) * m for t, m in enumerate(d.mask)
        ]


@pytest.mark.parametrize("method", ["rloo", "grpo", "dr_grpo", "reinforce"])
def test_a_shared_reward_teaches_nothing(method):
    """The same return for every sample says nothing about any of them."""
    assert ppo.group_advantages([[0.7, 0.1]] * 4, [0] * 4, method) == [[0.0, 0.0]] * 4


@pytest.mark.parametrize("size", [3, 6, 12])
def test_equal_returns_whose_mean_is_not_exact_teach_nothing(size):
    for method in ("rloo", "grpo", "dr_grpo", "reinforce"):
        assert ppo.group_advantages([[0.8, -0.4]] * size, [0] * size, method) == [[0.0, 0.0]] * size


def test_in_stage_one_the_first_attempt_feels_the_kl_alone(toy, ranks, monkeypatch):
    """The gradient of the actions of the first attempts is that of their KL, whatever the second ones earned."""
    constants(monkeypatch, ESTIMATOR="rloo", KL_COEF=(0.1, 0.0), ENTROPY_COEF=0.0, WHITEN=False, ATTEMPT_GAMMA=0.0)
    monkeypatch.setattr(rollout, "REWARD", "score_stage1")
    monkeypatch.setattr(rollout, "SAMPLES_PER_PROMPT", 2)
    folder = str(toy / "warm_start")

    def gradients(statuses: list[list[str]], kept: list[int]) -> torch.Tensor:
        """Of the loss over the actions of the attempts `kept`."""
        torch.manual_seed(0)
        actor = ppo.Actor(folder, 280)
        with torch.no_grad():
            for p in actor.parameters():
                p += 0.05 * torch.randn_like(p)
        learner = learner_of(actor, ppo.Critic(folder), ppo.Actor(folder, 280))
        learner.critic = None
        del learner.optimizers["critic"]
        said = ([11, 12], [13, 6]), ([14, 15], [16, 17])
        dialogues = [
            dialogue([([5, 9, 7], False), (first, True), ([3, 4], False), (second, True)], outcome)
            for (first, second), outcome in zip(said, statuses, strict=True)
        ]
        for d in dialogues:
            rollout.assign_rewards(d)
        ppo.compare(dialogues)
        batch = ppo.my_batch(dialogues)
        ppo.prepare(batch, learner)
        batch.mask *= torch.isin(batch.attempt, torch.tensor(kept)).float()
        found = []
        monkeypatch.setattr(learner.optimizers["actor"], "step", lambda: found.extend(
            p.grad.full_tensor().flatten().clone() for p in learner.actor.parameters()
        ))  # fmt: skip
        ppo.update(batch, learner, True, Path("."))
        return torch.cat(found)

    mixed, none = [["correct", "wrong"], ["wrong", "correct"]], [["wrong", "wrong"]] * 2
    assert torch.allclose(gradients(mixed, [0]), gradients(none, [0]), atol=1e-7)  # no reward reaches a first attempt
    assert gradients(none, [0]).abs().max() > 1e-3  # its KL does
    assert (
        not gradients(none, [1]).any() and gradients(mixed, [1]).abs().max() > 1e-3
    )  # second ones: the other way round


# Learning -------------------------------------------------------------------------------------------------------------
def test_ppo_solves_a_bandit(toy, ranks, monkeypatch):
    """Five answers of one token, one of which pays: the policy, asked for nothing else, comes to give it."""
    constants(monkeypatch, DIALOGUES=32, MINI_BATCH=32, EPOCHS=2, MAX_TOKENS_PER_MICRO_BATCH=512, GRAD_CLIP=1.0)
    constants(monkeypatch, MINI_BATCH=32, EPOCHS=2, MAX_TOKENS_PER_MICRO_BATCH=512, KL_COEF=(0.0,), ENTROPY_COEF=0.0)
    folder = str(toy / "warm_start")
    torch.manual_seed(0)
    learner = learner_of(ppo.Actor(folder, 5), ppo.Critic(folder), None, 3e-3, 3e-3)  # ids 0 to 4 are the vocabulary
    chances = []
    for _ in range(25):
        every = [dialogue([([7, 8], False), ([a], True)], ["wrong"]) for a in range(5)]
        p = ppo.over_actions(learner.actor, ppo.make_batch([every]))[:, 2].exp()
        chances.append(p[3].item())
        played = []
        for action in torch.multinomial(p, 32, replacement=True).tolist():
            played.append(dialogue([([7, 8], False), ([action], True)], ["correct" if action == 3 else "wrong"]))
            rollout.assign_rewards(played[-1])
        batch = ppo.my_batch(played)
        ppo.prepare(batch, learner)
        ppo.update(batch, learner, True, Path("."))
    assert chances[0] < 0.6 and chances[-1] > 0.95


def test_the_critic_warms_up_alone(toy, ranks, monkeypatch):
    constants(monkeypatch)
    folder = str(toy / "warm_start")
    learner = learner_of(ppo.Actor(folder, 280), ppo.Critic(folder), None, 1e-3, 1e-3)
    before = {name: p.full_tensor().clone() for name, p in learner.actor.named_parameters()}
    value_head = learner.critic.head.weight.full_tensor().clone()
    batch = ppo.my_batch(two_dialogues())
    ppo.prepare(batch, learner)
    metrics = ppo.update(batch, learner, False, Path("."))
    assert "value_loss" in metrics and "policy_loss" not in metrics
    assert all(torch.equal(p.full_tensor(), before[name]) for name, p in learner.actor.named_parameters())
    assert not torch.equal(learner.critic.head.weight.full_tensor(), value_head)


def test_a_checkpoint_before_the_first_step_changes_nothing(toy, ranks, monkeypatch):
    """During CRITIC_WARMUP the actor's optimiser has no moments yet; to save it must not count as a step of Adam's."""
    constants(monkeypatch)
    folder = str(toy / "warm_start")

    def weights(saved: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        learner = learner_of(ppo.Actor(folder, 280), ppo.Critic(folder), None, 1e-3, 1e-3)
        if saved:
            ppo.gather_state(learner)
        batch = ppo.my_batch(two_dialogues())
        ppo.prepare(batch, learner)
        ppo.update(batch, learner, True, Path("."))
        return [p.full_tensor().clone() for p in learner.actor.parameters()]

    assert all(map(torch.equal, weights(saved=False), weights(saved=True)))


def test_a_gradient_that_is_not_finite_is_skipped(toy, ranks, monkeypatch, tmp_path):
    constants(monkeypatch)
    folder = str(toy / "warm_start")
    learner = learner_of(ppo.Actor(folder, 280), ppo.Critic(folder), None, 1e-3, 1e-3)
    before = {name: p.full_tensor().clone() for name, p in learner.actor.named_parameters()}

    def step(spoilt: bool) -> dict[str, float]:
        batch = ppo.my_batch(two_dialogues())
        metrics = ppo.prepare(batch, learner)
        if spoilt:
            batch.advantages[0, 3] = math.nan
        return metrics | ppo.update(batch, learner, True, tmp_path / "not-finite-000007")

    step(spoilt=True)
    assert all(torch.equal(p.full_tensor(), before[name]) for name, p in learner.actor.named_parameters())
    dump = torch.load(tmp_path / "not-finite-000007-1-rank-0.pt", weights_only=False)
    assert dump["advantages"][0, 3].isnan() and dump["dialogues"][0].ids == two_dialogues()[0].ids
    metrics = step(spoilt=False)  # a good one in between: counted anew
    assert all(map(math.isfinite, metrics.values()))
    assert not metrics.keys() & {"kl_k1", "kl_k3"}  # there is no reference to measure it from
    assert any(not torch.equal(p.full_tensor(), before[name]) for name, p in learner.actor.named_parameters())
    step(spoilt=True), step(spoilt=True)
    with pytest.raises(RuntimeError, match="3 gradients in a row"):
        step(spoilt=True)


# What is played and counted -------------------------------------------------------------------------------------------
def test_metrics_of_a_rollout_by_hand(monkeypatch):
    monkeypatch.setattr(rollout, "MAX_ATTEMPTS", 3)
    a = dialogue([([1, 2], False), ([3], True), ([4], False), ([5, 6], True)], ["wrong", "correct"])
    b = dialogue([([1], False), ([3, 4], True), ([5], False), ([6], True)], ["no_answer", "wrong"])
    c = dialogue([([1], False), ([2], True)], ["timeout"])
    b.max_attempts, b.attempts[0].ending, b.attempts[1].ending, c.attempts[0].ending = 3, "length", "context", "box"
    for d in (a, b, c):
        rollout.assign_rewards(d)
    assert ppo.rollout_metrics([a, b, c]) == pytest.approx({
        "reward": 0.0, "accuracy": 1 / 3, "attempts_used": 5 / 3, "tokens": 13, "generated": 7, "attempt_length": 1.4,
        "began_offline": 0.0, "out_of_context": 1 / 3,
        "ending_stop": 0.4, "ending_length": 0.2, "ending_context": 0.2, "ending_box": 0.2,
        "status_correct": 0.2, "status_wrong": 0.4, "status_no_answer": 0.2, "status_timeout": 0.2,
        "accuracy_at_1": 0.0, "accuracy_at_2": 0.5, "accuracy_at_3": 0.0,
    })  # fmt: skip


@pytest.mark.parametrize(("feedback", "at_2"), [("verified", 1.0), ("intrinsic", 0.0)])
def test_a_spoilt_answer_is_no_success_where_nobody_says_stop(ranks, monkeypatch, feedback, at_2):
    monkeypatch.setattr(rollout, "FEEDBACK", feedback)
    monkeypatch.setattr(rollout, "MAX_ATTEMPTS", 2)
    spoilt = dialogue([([1], False), ([2], True), ([3], False), ([4], True)], ["correct", "wrong"])
    monkeypatch.setattr(rollout, "new_dialogue", lambda *_: spoilt)
    monkeypatch.setattr(rollout, "play", lambda *_, **__: None)
    assert ppo.dev_accuracies(None, None, [{}]) == {"dev_accuracy_at_1": 1.0, "dev_accuracy_at_2": at_2}
    found = ppo.rollout_metrics([spoilt])
    assert (found["accuracy_at_1"], found["accuracy_at_2"], found["accuracy"]) == (1.0, at_2, at_2)


def test_the_dev_split_asks_nothing_that_is_trained_on(monkeypatch):
    monkeypatch.setattr(ppo, "DEV_PROBLEMS", 6)
    problems = [{"id": str(i), "question": f"What is ${i % 20}+1$" + "?" * (i // 20), "answer": "1"} for i in range(40)]
    trained, dev = ppo.split_problems(problems)
    asked = {ppo.question_key(p["question"]) for p in dev}
    assert len(dev) == 6 and len(trained) == 40 - 2 * len(asked)
    assert not asked & {ppo.question_key(p["question"]) for p in trained}
    assert ppo.split_problems(problems) == (trained, dev)
    monkeypatch.setattr(ppo, "SEED", ppo.SEED + 1)
    assert ppo.split_problems(problems)[1] != dev


def test_ranks_that_share_an_engine_play_together_and_train_apart(toy, monkeypatch):
    chat = rollout.Chat(AutoTokenizer.from_pretrained(toy / "warm_start"))
    problems = rollout.load_problems(toy / "test.jsonl")
    constants(monkeypatch, DIALOGUES=16)

    def step(world: int, shared: int) -> list[list[int]]:
        played, kept = [], []
        monkeypatch.setattr(rollout, "TENSOR_PARALLEL", shared)
        monkeypatch.setattr(rollout, "play", lambda engine, chat, ds, seeds, *_: played.append(seeds))
        monkeypatch.setattr(ppo.dist, "get_world_size", lambda: world)
        for rank in range(world):
            monkeypatch.setattr(ppo.dist, "get_rank", lambda rank=rank: rank)
            kept.append(ppo.play_step(None, chat, problems, {}, 3))
        assert all(played[r] == played[r - r % shared] for r in range(world))
        return [d.ids for turn in zip(*kept, strict=True) for d in turn]

    assert step(2, 1) == step(2, 2) == step(4, 2) == step(1, 1)


def test_the_newest_checkpoints_and_the_best_stay(ranks, monkeypatch, tmp_path):
    monkeypatch.setattr(ppo, "KEEP_CHECKPOINTS", 2)
    for step in range(1, 6):
        (tmp_path / f"checkpoints/step-{step:06d}.partial").mkdir(parents=True)
        written = ppo.Future()
        written.set_result(None)
        ppo.publish(tmp_path, step, written, best=2)
    assert checkpoints_of(tmp_path) == ["step-000002", "step-000004", "step-000005"]


def test_paper_is_the_papers():
    told = {
        "MODEL": "Qwen/Qwen2.5-Math-1.5B", "SEED": 42, "STEPS": 1280, "DIALOGUES": 1024, "MINI_BATCH": 128, "EPOCHS": 1,
        "ACTOR_LR": 5e-7, "CRITIC_LR": 1e-5, "MIN_LR": 0.1, "WARMUP": 0.03, "BETAS": [0.9, 0.95], "WEIGHT_DECAY": 0.0,
        "GRAD_CLIP": 1.0, "GAMMA": 1.0, "LAMBDA": 0.99, "CLIP": 0.2, "VALUE_CLIP": 0.2, "KL_COEF": [0.01],
        "KL_IN_REWARD": 0.0, "WHITEN": True, "ESTIMATOR": "gae", "ATTEMPT_GAMMA": 1.0, "CRITIC_WARMUP": 0,
        "ENTROPY_COEF": 0.0, "TRUNCATE_IS": 0.0, "COMPUTE_DTYPE": "bfloat16",
    }  # fmt: skip
    paper = demo.constants_of(["PRESET=paper"])
    assert {name: paper[f"ppo.{name}"] for name in told} == told
    played = {
        "MIN_ATTEMPTS": 1, "MAX_ATTEMPTS": 5, "SAMPLES_PER_PROMPT": 1, "REWARD": "outcome", "REWARD_CORRECT": 1.0,
        "REWARD_WRONG": -0.5, "REWARD_NO_ANSWER": -1.0, "ATTEMPT_DISCOUNT": 1.0,
    }  # fmt: skip
    assert {name: paper[f"rollout.{name}"] for name in played} == played


# Schedule and data order ----------------------------------------------------------------------------------------------
def test_learning_rate(monkeypatch):
    monkeypatch.setattr(ppo, "WARMUP", 0.1)
    monkeypatch.setattr(ppo, "MIN_LR", 0.1)
    assert [round(ppo.learning_rate(p), 6) for p in (0.05, 0.1, 0.55, 1.0, 1.2)] == [0.5, 1.0, 0.55, 0.1, 0.1]


def test_every_problem_once_a_pass():
    visits = [ppo.problem_index(v, 7) for v in range(21)]
    assert all(sorted(visits[s : s + 7]) == list(range(7)) for s in (0, 7, 14))
    assert visits[:7] != visits[7:14]


# Whole runs -----------------------------------------------------------------------------------------------------------
SMALL = ["PRESET=toy", "TOKEN_BUDGET=0", "STEPS=4", "DIALOGUES=16", "MINI_BATCH=8", "SAVE_EVERY=2", "MAX_ATTEMPTS=3"]
SMALL += ["DEV_PROBLEMS=16", "TRACK=tensorboard"]


def command(run: str, toy: Path, *arguments: str, processes: int = 0) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    data = [f"RUN={run}", f"MODEL={toy / 'warm_start'}", f"TRAIN_DATA={toy / 'train.jsonl'}"]
    return [sys.executable, *launcher, str(ROOT / "ppo.py"), *SMALL, *data, *arguments]


def train(cwd: Path, run: str, toy: Path, *arguments: str, processes: int = 0) -> list[dict]:
    arguments = command(run, toy, *arguments, processes=processes)
    done = subprocess.run(arguments, cwd=cwd, env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return metrics_of(cwd, run)


def metrics_of(cwd: Path, run: str) -> list[dict]:
    lines = (cwd / "runs" / run / "metrics.jsonl").read_text().splitlines()
    clocks = ("seconds_", "tokens_per_second", "peak_memory", "mfu")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(clocks)} for line in lines]


def weights(cwd: Path, run: str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(cwd / "runs" / run / "policy").state_dict()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(runs, toy) -> list[dict]:
    """A run of four steps that nobody disturbed: what the others are compared with."""
    return train(runs, "straight", toy)


def test_a_killed_run_resumes_to_the_same_numbers(runs, toy, straight):
    """Killed at once, again and again: in the middle of a rollout, of an update behind the first checkpoint, of the
    second save, of an export. Each start goes on where there is something whole to go on from."""
    arguments = command("killed", toy)
    for phase, last in {"rollout.play": 2, "ppo.update": 3, "ppo.dcp.save": 1, "ppo.export": 1}.items():
        module, function = phase.rsplit(".", 1)
        # In a save the kill comes behind the writing of a file, of which nobody knows yet.
        trace = f"sys.settrace(lambda frame, *_: end() if len(calls) == {last + 30} else calls.append(1))"
        program = (
            "import sys, os, signal, ppo, rollout\n"
            f"inner, calls = {phase}, []\n"
            "def killed(*arguments, **options):\n"
            "    calls.append(1)\n"
            f"    if len(calls) < {last}: return inner(*arguments, **options)\n"
            "    end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"    {'os.fsync = end' if phase == 'ppo.dcp.save' else trace}\n"
            "    inner(*arguments, **options)\n"
            "    end()\n"
            f"{module}.{function} = killed\n"
            "ppo.main()\n"
        )
        done = subprocess.run([arguments[0], "-c", program, *arguments[2:]], cwd=runs, env=alone(), capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert not (runs / "runs/killed/policy").exists()
        assert checkpoints_of(runs / "runs/killed")[:1] == ([] if phase == "rollout.play" else ["step-000002"])
    assert train(runs, "killed", toy) == straight
    a, b = weights(runs, "straight"), weights(runs, "killed")
    assert all(torch.equal(a[n], b[n]) for n in a)


def checkpoints_of(run: Path) -> list[str]:
    return sorted(p.name for p in run.glob("checkpoints/step-??????"))


def test_checkpoints_written_behind_the_steps(runs, toy, straight):
    """The second step's is written while the third trains, and holds the second's weights: the run goes on from it to
    the same numbers."""
    assert train(runs, "behind", toy, "ASYNC_SAVE=1") == straight
    run = runs / "runs/behind"
    assert checkpoints_of(run) == ["step-000002", "step-000004"] and not list(run.glob("checkpoints/*.partial"))
    shutil.rmtree(run / "checkpoints/step-000004")
    shutil.rmtree(run / "policy")
    assert train(runs, "behind", toy, "ASYNC_SAVE=1") == straight
    a, b = weights(runs, "straight"), weights(runs, "behind")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_run_that_is_killed_while_it_writes_behind_a_step(runs, toy, straight):
    program = (
        "import os, signal, ppo\n"
        "inner = ppo.dcp.async_save\n"
        "def killed(*arguments, **options):\n"
        "    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"  # behind the writing of a file
        "    return inner(*arguments, **options)\n"
        "ppo.dcp.async_save = killed\n"
        "ppo.main()\n"
    )
    arguments = command("cut", toy, "ASYNC_SAVE=1")
    done = subprocess.run([arguments[0], "-c", program, *arguments[2:]], cwd=runs, env=alone(), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not checkpoints_of(runs / "runs/cut") and list((runs / "runs/cut/checkpoints").glob("*.partial"))
    assert train(runs, "cut", toy, "ASYNC_SAVE=1") == straight


def test_a_preempted_run_saves_and_goes_on(runs, toy, straight):
    """SIGTERM: the step is finished and saved, the exit is a good one, and the run goes on as if nothing had been."""
    process = subprocess.Popen(command("preempted", toy), cwd=runs, env=alone(), stdout=subprocess.PIPE, text=True)
    log = runs / "runs/preempted/metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text()):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 0 and "stopped by SIGTERM behind step" in said
    assert checkpoints_of(runs / "runs/preempted")[-1] in ("step-000001", "step-000002", "step-000003")
    assert train(runs, "preempted", toy) == straight  # the dev split too was asked when it was due, and no other time


def test_what_a_run_leaves(runs, toy, straight):
    """Dev accuracies at the checkpoints choose the best, which is exported and whose checkpoint stays; dialogues by
    token say what was reinforced; the start said what would happen."""
    run = runs / "runs/straight"
    at = {row["step"]: row["dev_accuracy_at_3"] for row in straight if "dev_accuracy_at_3" in row}
    assert list(at) == [2, 4] and all(row["step"] in at or "dev_accuracy_at_1" not in row for row in straight)
    assert (run / "best/config.json").is_file() and (run / "policy/config.json").is_file()
    best = AutoModelForCausalLM.from_pretrained(run / "best").state_dict()
    if at[4] <= at[2]:
        assert any(not torch.equal(best[n], w) for n, w in weights(runs, "straight").items())
    rows = [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {2, 4}
    for row in rows:
        assert len(row["tokens"]) == len(row["mask"]) == len(row["advantages"]) == len(row["values"])
        assert not any(a for a, m in zip(row["advantages"], row["mask"], strict=True) if not m)
        assert any(a for a, m in zip(row["advantages"], row["mask"], strict=True) if m)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("reward", "accuracy_at_2", "actor_lr"):
        assert [e.value for e in events.Scalars(name)] == pytest.approx([row[name] for row in straight])
    said = subprocess.run(command("dry", toy, "DRY_RUN=1"), cwd=runs, env=alone(), capture_output=True, text=True)
    assert said.returncode == 0 and "284 problems to train on, 16 to choose the checkpoint; 1 rank\n" in said.stdout
    assert "2 x 2 updates of 8 dialogues" in said.stdout and "fits" in said.stdout
    assert not (runs / "runs/dry").exists()


def test_bad_checkpoints_and_full_disks(runs, toy, straight, tmp_path):
    """A damaged checkpoint is named, and the one before it still works; a full disk (files that cannot grow stand for
    it) leaves it whole; and then another number of ranks goes on from it to the same numbers."""
    run = tmp_path / "runs/straight"
    shutil.copytree(runs / "runs/straight", run)
    shutil.rmtree(run / "policy")
    for shard_file in (run / "checkpoints/step-000004").glob("*.distcp"):
        shard_file.write_bytes(shard_file.read_bytes()[:1000])

    def fails(program: str = "import ppo; ppo.main()", *changes: str) -> str:
        arguments = command("straight", toy, *changes)
        done = subprocess.run(
            [arguments[0], "-c", program, *arguments[2:]], cwd=tmp_path, env=alone(), capture_output=True, text=True
        )
        assert done.returncode == 1
        return done.stderr

    said = fails()
    assert "step-000004 is damaged or of another model" in said and "resumes from step-000002" in said
    shutil.rmtree(run / "checkpoints/step-000004")
    ppo.dcp.save(
        {"weights": torch.ones(3)}, checkpoint_id=run / "checkpoints/step-000004", no_dist=True
    )  # a foreign one
    assert "step-000004 is damaged or of another model" in fails()
    shutil.rmtree(run / "checkpoints/step-000004")
    program = (
        "import resource, ppo\n"
        "save = ppo.dcp.save\n"
        "def full(*arguments, **options):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "    return save(*arguments, **options)\n"
        "ppo.dcp.save = full\n"
        "ppo.main()\n"
    )
    said = fails(program)
    assert "could not be written" in said and "goes on from step-000002" in said, said[-3000:]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    said = fails(program.replace("dcp.save", "dcp.async_save"), "ASYNC_SAVE=1")
    assert "could not be written" in said and "goes on from step-000002" in said, said[-3000:]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert_same_up_to_rounding(straight, train(tmp_path, "straight", toy, processes=2))


def assert_same_up_to_rounding(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            count = name in ("clipped", "value_clipped")  # an action at the clip's edge may fall on either side of it
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=0.02 if count else 1e-5), name


def test_two_ranks_learn_what_one_learns(runs, toy, straight):
    """In as many micro-batches as there are dialogues, of which one rank may have more than the other."""
    small = ["MAX_TOKENS_PER_MICRO_BATCH=1", "ROW_TOKENS=1"]
    assert_same_up_to_rounding(straight, train(runs, "two", toy, *small, processes=2))
    a, b = weights(runs, "straight"), weights(runs, "two")
    assert all(torch.allclose(a[n], b[n], atol=1e-4) for n in a)


def test_replicas_learn_what_shards_learn(runs, toy, straight):
    """Four ranks, two of which share the weights while the other two have a replica (HSDP); and all is offloaded."""
    assert_same_up_to_rounding(straight, train(runs, "replicas", toy, "SHARD_RANKS=2", "OFFLOAD=1", processes=4))


def test_the_papers_preset_in_small(runs, toy):
    """bfloat16 in engine and trainer, recomputed activations, saves behind the steps, no seeds for attempts."""
    steps = train(runs, "paper", toy, "PRESET=paper", "MAX_ATTEMPT_TOKENS=64", "ACTOR_LR=1e-3", "WARMUP=0")
    assert len(steps) == 4 and steps[-1]["kl_k3"] > 0
    assert all(0 < step["sampler_mismatch"] < ppo.MAX_MISMATCH for step in steps)
    assert AutoModelForCausalLM.from_pretrained(runs / "runs/paper/policy").dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_sampler_follows_the_trainer(runs, toy, tied, tmp_path):
    """After three updates at a large learning rate the engine still samples from the trainer's weights, and the
    exported folder opens in transformers and gives what the checkpointed policy gives."""
    folder = tmp_path / "model"
    shutil.copytree(toy / "warm_start", folder / "warm_start")
    if not tied:
        config = json.loads((folder / "warm_start/config.json").read_text()) | {"tie_word_embeddings": False}
        lm = AutoModelForCausalLM.from_pretrained(toy / "warm_start")
        (folder / "warm_start/config.json").write_text(json.dumps(config))
        lm.config.tie_word_embeddings = False
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone())
        lm.save_pretrained(folder / "warm_start")
    name = f"tied-{tied}"
    steps = train(runs, name, toy, f"MODEL={folder / 'warm_start'}", "ACTOR_LR=0.01", "WARMUP=0", "STEPS=3")
    assert all(s["sampler_mismatch"] < 1e-5 for s in steps) and steps[-1]["kl_k3"] > 1e-3
    exported = AutoModelForCausalLM.from_pretrained(runs / "runs" / name / "policy")
    assert exported.config.tie_word_embeddings is tied
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) is tied
    before = AutoModelForCausalLM.from_pretrained(folder / "warm_start").state_dict()
    assert any(not torch.equal(before[n], w) for n, w in exported.state_dict().items())


def test_export_gives_the_same_logprobs_in_vllm_and_transformers(runs, toy, straight):
    """In its own process: vLLM opens the exported folder, plays, and transformers confirms each log-probability."""
    program = (
        "import sys, torch, rollout\n"
        "from transformers import AutoModelForCausalLM\n"
        "policy, problems = sys.argv[1:]\n"
        "engine = rollout.Engine(policy)\n"
        "chat = rollout.Chat(engine.tokenizer)\n"
        "ds = [rollout.new_dialogue(chat, p, 2) for p in rollout.load_problems(problems)[:8]]\n"
        "rollout.play(engine, chat, ds, list(range(8)), 1.0)\n"
        "lm = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)\n"
        "for d in ds:\n"
        "    lp = lm(torch.tensor([d.ids])).logits.log_softmax(-1)[0]\n"
        "    for t, m in enumerate(d.mask):\n"
        "        assert not m or abs(lp[t - 1, d.ids[t]].item() - d.logprobs[t]) < 1e-4\n"
        "engine.shutdown()\n"
    )
    arguments = [sys.executable, "-c", program, str(runs / "runs/straight/policy"), str(toy / "test.jsonl")]
    done = subprocess.run(arguments, env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_stale_engine_stops_the_run(toy, ranks, monkeypatch):
    constants(monkeypatch, MAX_MISMATCH=0.05, KL_COEF=(0.0,))
    folder = str(toy / "warm_start")
    learner = learner_of(ppo.Actor(folder, 280), ppo.Critic(folder))
    with pytest.raises(RuntimeError, match="sampler and trainer disagree"):
        ppo.prepare(ppo.my_batch(two_dialogues()), learner)  # the sampler claims probability 1 for each action


def test_bad_runs_stop_before_work(runs, toy, straight):
    def says(*arguments: str) -> str:
        command_line = command("straight", toy, *arguments)
        done = subprocess.run(command_line, cwd=runs, env=alone(), capture_output=True, text=True)
        assert done.returncode != 0 or "is finished" in done.stdout
        return done.stdout + done.stderr

    assert "is finished" in says("MAX_TOKENS_PER_MICRO_BATCH=512", "TRACK=", "GPU_MEMORY=0.4")  # another machine
    assert metrics_of(runs, "straight") == straight
    assert "no such problem file" in says("RUN=new", "TRAIN_DATA=missing.jsonl")
    assert not (runs / "runs/new").exists()
    assert "no-model" in says("RUN=new", "MODEL=/no-model")
    assert "no-model" in says("RUN=new", "MODEL=/no-model", "LAMBDA=0.5")  # not "other constants": no step was made
    config = runs / "runs/renewed/config.json"  # a run with other problems
    shutil.copytree(runs / "runs/straight", config.parent, ignore=shutil.ignore_patterns("checkpoints", "policy"))
    config.write_text(config.read_text().replace('TRAIN_DATA": "', 'TRAIN_DATA": "0'))
    said = says("RUN=renewed", "LAMBDA=0.5")
    assert "SHA-256 of TRAIN_DATA: 0" in said and "ppo.LAMBDA: 0.99 there, 0.5 now" in said


def test_a_full_disk_under_a_log(tmp_path):
    """What a log has whole stays; half a row is dropped when the run goes on."""
    with pytest.raises(SystemExit, match=r"/dev/full could not be written .*the run goes on from its last checkpoint"):
        ppo.append(Path("/dev/full"), [{"step": 1}])
    ppo.append(tmp_path / "log", [{"step": 1}, {"step": 2}])
    with (tmp_path / "log").open("a") as log:
        log.write('{"step": 3, "rew')
    ppo.keep_until(tmp_path / "log", 3)
    assert (tmp_path / "log").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_plan_says_what_does_not_fit(toy, ranks, monkeypatch):
    monkeypatch.setattr(ppo, "MODEL", str(toy / "warm_start"))
    assert "fits" in ppo.plan(280, 100, 10)
    monkeypatch.setattr(ppo, "MAX_TOKENS_PER_MICRO_BATCH", 10**9)
    assert "will NOT fit; more ranks" in ppo.plan(280, 100, 10)


def test_models_whose_attention_is_another_are_refused(toy, ranks, tmp_path):
    shutil.copytree(toy / "warm_start", tmp_path / "windowed")
    config = json.loads((tmp_path / "windowed/config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    (tmp_path / "windowed/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="sliding_window is not computed here"):
        ppo.load_model(str(tmp_path / "windowed"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SAVE_EVERY", 0, "SAVE_EVERY=0: must be at least 1"),
        ("MINI_BATCH", 0, "MINI_BATCH=0: must be at least 1"),
        ("MINI_BATCH", 7, "DIALOGUES = 1024 must be a multiple of MINI_BATCH = 7"),
        ("KEEP_CHECKPOINTS", 0, "KEEP_CHECKPOINTS=0: must be at least 1"),
        ("WARMUP", 1.0, "WARMUP=1.0: must be a share"),
        ("ESTIMATOR", "vtrace", "ESTIMATOR=vtrace: must be"),
        ("ESTIMATOR", "rloo", "SAMPLES_PER_PROMPT must be 2 or more"),
        ("TRACK", "mlflow", "TRACK=mlflow: must be"),
    ],
)
def test_constants_that_cannot_be(ranks, monkeypatch, name, value, message):
    ppo.check_constants()
    monkeypatch.setattr(ppo, name, value)
    with pytest.raises(SystemExit, match=message):
        ppo.check_constants()
    monkeypatch.undo()
    monkeypatch.setattr(rollout, "TEMPERATURE", 0.7)
    with pytest.raises(SystemExit, match=r"TEMPERATURE=0\.7"):
        ppo.check_constants()


def test_the_first_of_equally_good_checkpoints_is_the_best(ranks, tmp_path):
    rows = [{"step": 8, "dev": 0.5}, {"step": 12}, {"step": 16, "dev": 0.5}, {"step": 24, "dev": 0.4}]
    ppo.append(tmp_path / "metrics.jsonl", rows)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 32, "dev": 0.9, "attempts": [{}')  # cut by a kill
    assert ppo.best_so_far(tmp_path, "dev") == (8, 0.5)
    ppo.keep_until(tmp_path / "metrics.jsonl", 12)
    assert ppo.best_so_far(tmp_path, "dev") == (8, 0.5) and len(ppo.read_records(tmp_path / "metrics.jsonl")) == 2
    assert ppo.best_so_far(tmp_path / "none", "dev") == (0, -1.0)


def test_an_export_replaces_what_killed_ones_have_left(toy, ranks, tmp_path):
    folder = str(toy / "warm_start")
    actor = ppo.Actor(folder, 280)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ppo.shard(actor, actor.lm.model.layers)
    for left in ("policy", "policy.old", "policy.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "old").touch()
    ppo.export(tmp_path / "policy", actor, tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"] and not (tmp_path / "policy/old").exists()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    assert all(torch.equal(exported[n], w) for n, w in ppo.named_weights(actor))


def test_real_text_runs(runs, toy, tmp_path):
    """Any problem file: bytes that the toy's vocabulary has no words for, one question that fills the context."""
    problems = [
        {"id": f"r{i}", "question": f"Fïnd $x$ with $x^2 = {i}$ \\[asy] draw((0,0)); [/asy]", "answer": "\\frac{1}{2}"}
        for i in range(20)
    ]
    problems.append({"id": "long", "question": "x" * 5000, "answer": "1"})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    steps = train(
        runs, "text", toy, f"TRAIN_DATA={tmp_path / 'p.jsonl'}", "STEPS=2", "MAX_ATTEMPT_TOKENS=12", "DEV_PROBLEMS=4"
    )
    assert len(steps) == 2 and all(math.isfinite(v) for s in steps for v in s.values())
