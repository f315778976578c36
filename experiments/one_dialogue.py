"""One dialogue on its way through a step of PPO, number by number; docs/tutorial.md shows and explains what it prints.

    python -m experiments.one_dialogue                         # some seconds, no model
    python -m experiments.one_dialogue FIGURES=docs/figures    # draw the tutorial's figures as well

What the policy says, its log-probabilities and the critic's values are chosen by hand, so that they can be followed.
All else is computed by the functions of the stages: ids, mask, verdicts, rewards, advantages, weights and losses.
"""

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import ppo
import rollout
from experiments import median
from plumbing import ranks
from plumbing.chat import Chat
from plumbing.constants import set_constants
from rollout import Dialogue

import torch

FIGURES: str = ""  # folder for the two figures; "" = none

PROBLEM = {"id": "one", "question": "What is the median of 12 4 _ 9 15 7 _ 11 6?", "answer": "9"}
# An attempt has four actions: "It is \boxed{", the number, "}" and the end of the turn. For each attempt: the number,
# log-probabilities of its actions when they were sampled and after an update, and the critic's values before them.
FIRST = (11, (-0.01, -1.25, -0.02, -0.01), (-0.01, -1.15, -0.02, -0.01), (0.25, 0.25, 0.2, 0.2))
SECOND = (9, (-0.01, -0.9, -0.02, -0.01), (-0.01, -0.6, -0.02, -0.01), (0.4, 0.4, 0.42, 0.4))
OTHER = (12, (-0.01, -1.6, -0.02, -0.01), (-0.01, -1.9, -0.02, -0.01), (0.0, 0.0, -0.2, -0.2))


def play(chat: Chat, max_attempts: int, attempts: Sequence[tuple]) -> Dialogue:
    """rollout.play with attempts that are chosen instead of sampled."""
    dialogue = rollout.new_dialogue(chat, PROBLEM, max_attempts)
    for number, logprobs, _, _ in attempts:
        ids = [*chat.encode(f"It is \\boxed{{ {number}}}"), chat.end_of_turn]
        verdict = rollout.grade_attempt(chat, dialogue, ids, list(logprobs), stopped=True).result()
        rollout.give_feedback(chat, dialogue, verdict)
    rollout.assign_rewards(dialogue)
    return dialogue


def prepare(batch: ppo.Batch, attempts: Sequence[tuple]) -> tuple[torch.Tensor, torch.Tensor]:
    """ppo.prepare with chosen numbers -> log-probabilities after an update, and advantages before whitening; (B, T)."""
    action, new_logprobs = batch.mask > 0, torch.zeros_like(batch.mask)
    for part, column in ((1, batch.old_logprobs), (2, new_logprobs), (3, batch.values)):
        column[action] = torch.tensor([x for attempt in attempts for x in attempt[part]])
    raw, batch.returns = ppo.gae(batch.rewards, batch.values, batch.mask, ppo.GAMMA, ppo.LAMBDA)
    batch.advantages = ppo.whiten(raw, batch.mask)
    return new_logprobs, raw


# What is printed ------------------------------------------------------------------------------------------------------
def describe_ids(chat: Chat, dialogue: Dialogue) -> list[str]:
    """A line for each action; environment tokens that follow each other share one."""
    lines, mask = [], dialogue.mask
    starts = [t for t in range(len(mask)) if t == 0 or mask[t] or mask[t - 1]]
    for start, end in pairwise([*starts, len(mask)]):
        text = chat.decode(dialogue.ids[start:end]).replace("\n", "\\n")
        text = text if len(text) < 62 else f"{text[:26]} ... {text[-30:]}"
        place, ids, number = f"{start}..{end - 1}", f"{end - start} ids", ""
        if mask[start]:
            place, ids, number = f"{start}", f"{dialogue.ids[start]}", f"{dialogue.logprobs[start]:.2f}"
        lines.append(f"{place:>7} {ids:>7} {mask[start]} {number:>7}  {text}")
    return lines


def describe_actions(chat: Chat, batch: ppo.Batch, columns: dict[str, torch.Tensor]) -> list[str]:
    """The columns' numbers at the first dialogue's actions; a line says where feedback lies between them."""
    lines = ["position" + "".join(f"{name:>10}" for name in columns)]
    actions = batch.mask[0].nonzero().flatten().tolist()
    for before, t in zip([actions[0] - 1, *actions], actions, strict=False):
        if t > before + 1:
            lines.append(f"          ... {t - before - 1} tokens of feedback ...")
        numbers = "".join(f"{column[0, t].item():10.3f}" for column in columns.values())
        lines.append(f"{t:8}{numbers}  {chat.decode(batch.ids[0, t : t + 1].tolist())}")
    return lines


def make_sections() -> dict[str, list[str]]:
    """{title: lines} of what is printed; draws the figures, too, if FIGURES says where."""
    chat = rollout.make_chat(median.make_tokenizer())
    dialogues = [play(chat, 3, (FIRST, SECOND)), play(chat, 1, (OTHER,))]
    batch = ppo.make_batch(dialogues)
    new_logprobs, raw = prepare(batch, (FIRST, SECOND, OTHER))
    if FIGURES:
        draw_figures(chat, batch)
    columns = {"reward": batch.rewards, "value": batch.values, "advantage": raw, "return": batch.returns}
    columns |= {"whitened": batch.advantages, "ratio": (new_logprobs - batch.old_logprobs).exp()}
    action = batch.mask > 0
    mean, variance = ranks.moments(raw[action])
    old, new, values, weights = (
        x[action] for x in (batch.old_logprobs, new_logprobs, batch.values, batch.loss_weights)
    )
    mask = torch.ones_like(weights)
    policy, stats = ppo.policy_loss(new, old, batch.advantages[action], mask, ppo.CLIP, weights)
    value, _ = ppo.value_loss(values, values, batch.returns[action], mask, ppo.VALUE_CLIP, weights)
    return {
        "What was said": chat.decode(dialogues[0].ids).split("\n"),
        "Position, id, mask, log-probability, text": describe_ids(chat, dialogues[0]),
        "Verdicts and rewards": [
            f"dialogue {number} of up to {dialogue.max_attempts}: {a.answer} is {a.status}, reward {a.reward}"
            for number, dialogue in enumerate(dialogues, 1)
            for a in dialogue.attempts
        ],
        "Advantages": describe_actions(chat, batch, columns),
        "Losses": [
            f"advantages of all {len(mask)} actions: mean {mean:.3f}, standard deviation {variance**0.5:.3f}",
            f"weight of an action in the losses: {weights[0].item():.4f}",
            f"policy loss {policy.item():.4f}, {int(stats['clipped'])} ratios clipped; value loss {value.item():.4f}",
        ],
    }


# What is drawn --------------------------------------------------------------------------------------------------------
def draw_figures(chat: Chat, batch: ppo.Batch) -> None:
    """dialogue.svg: tokens of the first dialogue, actions shaded by their whitened advantage; clip.svg: PPO's gain."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "one", "font.size": 10})
    figure, axes = plt.subplots(figsize=(9, 2.4), layout="constrained")
    left, row, most = 0.0, 0, batch.advantages.abs().max().item()
    for token, is_action, advantage in zip(batch.ids[0].tolist(), batch.mask[0], batch.advantages[0], strict=True):
        text = chat.decode([token]).replace("\n", "⏎").replace("$", "\\$")
        if left + len(text) > 130:
            left, row = 0.0, row + 1
        color = "#0072B2" if advantage > 0 else "#D55E00"
        face = (color, 0.15 + 0.6 * abs(advantage.item()) / most) if is_action else "#eeeeee"
        box = {"facecolor": face, "edgecolor": "#999999", "pad": 3}
        axes.text(left, -row, text, fontsize=7, family="monospace", bbox=box)
        left += len(text) + 2
    axes.set(xlim=(0, 145), ylim=(-row - 0.3, 0.7))
    axes.axis("off")
    figure.savefig(Path(FIGURES, "dialogue.svg"), metadata={"Date": None})
    figure, pair = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    ratio = torch.linspace(0.5, 1.5, 201)
    for axes, good, title in (pair[0], 1, "a good action (A = 1)"), (pair[1], -1, "a bad action (A = -1)"):
        clipped = ratio.clamp(1 - ppo.CLIP, 1 + ppo.CLIP) * good
        axes.plot(ratio, ratio * good, ":", color="#555555", label="ratio x A")
        axes.plot(ratio, torch.minimum(ratio * good, clipped), color="#0072B2", label="what PPO maximises")
        axes.set(title=title, xlabel="ratio: probability now / when sampled")
        axes.spines[["top", "right"]].set_visible(False)
    pair[0].legend(frameon=False)
    figure.savefig(Path(FIGURES, "clip.svg"), metadata={"Date": None})


def main() -> None:
    set_constants(sys.argv[1:], {"one_dialogue": sys.modules[__name__]})
    ranks.start_ranks()
    for title, lines in make_sections().items():
        print(f"# {title}", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
