"""rollout.py: prompts to the letter, the attempt loop on a scripted and on the real engine, rewards, constants."""

import json
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import grader
import rollout
from rollout import Attempt, Chat, Dialogue
from tests.conftest import ROOT, alone

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

PROBLEM = {"id": "p", "question": "What is 1 + 1?", "answer": "2"}


@pytest.fixture(scope="session")
def chat(toy) -> Chat:
    return Chat(AutoTokenizer.from_pretrained(toy / "warm_start"))


class Scripted:
    """Answers with given texts, dialogue by dialogue, to reach corners that no model can be steered to."""

    def __init__(self, chat: Chat, answers: list[list[str]], logprob: float = -0.5):
        self.chat, self.answers, self.logprob, self.queue, self.seen = chat, answers, logprob, [], []

    def reseed(self, seed):
        pass

    def agree(self, verdicts):
        return verdicts

    def submit(self, key, ids, max_tokens, temperature, seed, stop):
        self.seen.append((key, list(ids), max_tokens, seed))
        self.queue.append((key, max_tokens, stop))

    @property
    def busy(self) -> bool:
        return bool(self.queue)

    def step(self):
        key, max_tokens, stop = self.queue.pop()  # last come, first served: the order must not matter
        ids = self.chat.tokenizer(self.answers[key].pop(0), add_special_tokens=False)["input_ids"]
        end = next((i + 1 for i, token in enumerate(ids) if token in stop | {self.chat.tokenizer.pad_token_id}), None)
        ids = ids[: min(end or len(ids), max_tokens)]
        return [(key, ids, [self.logprob] * len(ids), end is not None and len(ids) == end)]


def scripted_dialogue(chat: Chat, answers: list[str], attempts: int) -> Dialogue:
    dialogue = rollout.new_dialogue(chat, PROBLEM, attempts)
    rollout.play(Scripted(chat, [list(answers)]), chat, [dialogue], [0], temperature=1.0)
    rollout.assign_rewards(dialogue)
    return dialogue


END = "<|im_end|>"
SYSTEM = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}. You have 3 attempts "
    "to answer the questions, and you should provide the full reasoning steps in each attempt.<|im_end|>\n"
    "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
)
RETRY = (
    "\n<|im_start|>system\nYour answer is incorrect. You have {} attempts left. Try an alternative.<|im_end|>\n"
    "<|im_start|>assistant\n"
)


QWEN_MATH = (  # what Qwen2.5-Math's own template makes of turns of text: it adds a system turn where there is none
    "{% set default = 'Please reason step by step, and put your final answer within \\\\boxed{}.' %}"
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n' + default + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", ["", QWEN_MATH])
def test_dialogue_is_the_papers_to_the_letter(toy, template):
    tokenizer = AutoTokenizer.from_pretrained(toy / "warm_start")
    tokenizer.chat_template = template or tokenizer.chat_template
    chat = Chat(tokenizer)
    d = scripted_dialogue(chat, ["\\boxed{3}" + END, "\\boxed{4}" + END, "\\boxed{2}" + END], attempts=3)
    text = chat.tokenizer.decode(d.ids)
    assert text == (
        SYSTEM + "\\boxed{3}" + END + RETRY.format(2) + "\\boxed{4}" + END + RETRY.format(1) + "\\boxed{2}" + END
    )
    actions = [chat.tokenizer.decode(d.ids[a.start : a.end]) for a in d.attempts]
    assert actions == ["\\boxed{3}" + END, "\\boxed{4}" + END, "\\boxed{2}" + END]
    # The mask marks the attempts and nothing else; log-probabilities stand with the actions.
    marked = [0] * len(d.ids)
    for a in d.attempts:
        marked[a.start : a.end] = [1] * (a.end - a.start)
    assert d.mask == marked
    assert d.logprobs == [-0.5 * m for m in marked]
    assert [(a.answer, a.status, a.ending, a.reward) for a in d.attempts] == [
        ("3", "wrong", "stop", 0.0),
        ("4", "wrong", "stop", 0.0),
        ("2", "correct", "stop", 1.0),
    ]
    assert d.solved_at == 3


def test_single_turn_prompt_and_repeated_question(chat, monkeypatch):
    monkeypatch.setattr(rollout, "PROMPT", "single_turn")
    assert chat.tokenizer.decode(chat.prompt("Q", 3)) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    monkeypatch.setattr(rollout, "PROMPT", "multi_attempt")
    monkeypatch.setattr(rollout, "REPEAT_QUESTION", True)
    assert chat.tokenizer.decode(chat.prompt("Q", 3)) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}. "
        "You have 3 attempts to answer the question.<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.tokenizer.decode(chat.feedback("Q", 2)) == (
        "\n<|im_start|>system\nYour answer is incorrect. Try an alternative. "
        "You have 2 attempts to answer the question."
        "<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )


def test_progress_says_what_is_done(chat, monkeypatch):
    said = []

    class Bar(rollout.tqdm):
        def set_postfix_str(self, text, refresh=True):
            said.append(f"{self.n} of {self.total}: {text}")

    monkeypatch.setattr(rollout, "tqdm", Bar)
    dialogues = [rollout.new_dialogue(chat, PROBLEM, 2) for _ in range(3)]
    answers = [["\\boxed{2}" + END], ["\\boxed{3}" + END, "\\boxed{2}" + END], ["\\boxed{3}" + END] * 2]
    rollout.play(Scripted(chat, answers), chat, dialogues, [0, 1, 2], 1.0, "step 1")
    assert re.fullmatch(r"0 of 3: 0 attempts, [\d,]+ tokens/s, solved 0\.00", said[0])
    assert re.fullmatch(r"3 of 3: 5 attempts, [\d,]+ tokens/s, solved 0\.67", said[-1])


@pytest.mark.parametrize(
    ("answers", "attempts", "statuses", "endings", "reward"),
    [
        (["\\boxed{2}" + END], 3, ["correct"], ["stop"], 1.0),
        (["\\boxed{3}" + END], 1, ["wrong"], ["stop"], -0.5),
        (["no box" + END, "none" + END], 2, ["no_answer"] * 2, ["stop"] * 2, -1.0),
        (["\\boxed{3}" + END, "no box" + END], 2, ["wrong", "no_answer"], ["stop"] * 2, -0.5),  # -0.5 sticks
        (["x" * 30, "\\boxed{2}" + END], 2, ["no_answer", "correct"], ["length", "stop"], 1.0),
        (["\\boxed{3}<|endoftext|>", "\\boxed{2}" + END], 2, ["wrong", "correct"], ["stop", "stop"], 1.0),
    ],
)
def test_endings_and_rewards(chat, monkeypatch, answers, attempts, statuses, endings, reward):
    monkeypatch.setattr(rollout, "MAX_ATTEMPT_TOKENS", 16)
    d = scripted_dialogue(chat, answers, attempts)
    assert [a.status for a in d.attempts] == statuses
    assert [a.ending for a in d.attempts] == endings
    assert [a.reward for a in d.attempts] == [0.0] * (len(statuses) - 1) + [reward]
    rewards = rollout.token_rewards(d)
    assert rewards[d.attempts[-1].end - 1] == reward and sum(map(abs, rewards)) == abs(reward)
    # Whatever ended an attempt, the next sees a closed turn, and the closing id is an action only if it was sampled.
    text = chat.tokenizer.decode(d.ids)
    assert text.count("<|im_start|>assistant\n") == len(statuses)
    for a, following in zip(d.attempts, d.attempts[1:], strict=False):
        between = d.ids[a.end - 1 : following.start]
        assert between.count(chat.end_of_turn) == 2  # the attempt's and the feedback's
        assert not any(d.mask[a.end : following.start])


SPOILT = ["\\boxed{2}" + END, "\\boxed{3}" + END]  # right, then wrong
MENDED = SPOILT[::-1]
BOX_AT_LAST = ["none" + END, "\\boxed{3}" + END]
NO_BOX = ["none" + END, "x" * 30]  # the second is cut


@pytest.mark.parametrize("feedback", ["verified", "intrinsic"])
@pytest.mark.parametrize(
    ("answers", "statuses", "rewards"),
    [
        # by hand from the values 1, -0.5, -1, a discount of 0.9 and SCORE_ALPHA 2
        (SPOILT, "cw", {"outcome": [0, 1], "per_attempt": [1, -0.5], "stage1": [0, -0.5], "stage2": [1, -3.5]}),
        (MENDED, "wc", {"outcome": [0, 0.9], "per_attempt": [-0.5, 0.9], "stage1": [0, 0.9], "stage2": [-0.5, 3.7]}),
        (NO_BOX, "nn", {"outcome": [0, -1], "per_attempt": [-1, -1], "stage1": [0, -1], "stage2": [-1, -1]}),
        (
            BOX_AT_LAST,
            "nw",
            {"outcome": [0, -0.5], "per_attempt": [-1, -0.5], "stage1": [0, -0.5], "stage2": [-1, 0.5]},
        ),
    ],
)
def test_every_reward_under_both_feedbacks(chat, monkeypatch, feedback, answers, statuses, rewards):
    for name, value in {
        "FEEDBACK": feedback,
        "MAX_ATTEMPT_TOKENS": 16,
        "ATTEMPT_DISCOUNT": 0.9,
        "SCORE_ALPHA": 2.0,
    }.items():
        monkeypatch.setattr(rollout, name, value)
    played = 1 if feedback == "verified" and statuses[0] == "c" else 2
    for method, expected in rewards.items():
        monkeypatch.setattr(rollout, "REWARD", method.replace("stage", "score_stage"))
        d = scripted_dialogue(chat, answers, attempts=2)
        assert "".join(a.status[0] for a in d.attempts) == statuses[:played]
        if played == 1:
            expected = [1.0]  # the first attempt is the last one: every method pays it
        assert [a.reward for a in d.attempts] == pytest.approx(expected), method
        at = {a.end - 1: a.reward for a in d.attempts}  # on the last action of each attempt, which was sampled
        assert rollout.token_rewards(d) == [at.get(t, 0.0) for t in range(len(d.ids))]
        assert all(d.mask[t] for t in at)


@pytest.mark.parametrize("ending", rollout.ENDINGS)
@pytest.mark.parametrize("method", rollout.CHOICES["REWARD"])
@pytest.mark.parametrize("feedback", rollout.CHOICES["FEEDBACK"])
def test_every_ending_under_every_reward_and_feedback(chat, monkeypatch, feedback, method, ending):
    """A wrong attempt, then one with this ending that is right if it can be: cut before its box it cannot."""
    monkeypatch.setattr(rollout, "FEEDBACK", feedback)
    monkeypatch.setattr(rollout, "REWARD", method)
    first, second = "\\boxed{3}" + END, "\\boxed{2}" + ("" if ending in ("length", "context") else END)
    if ending == "box":
        monkeypatch.setattr(rollout, "STOP_AT", "first_box")
        second = "\\boxed{2}, not 4" + END
    elif ending == "length":
        monkeypatch.setattr(rollout, "MAX_ATTEMPT_TOKENS", 12)
        second = "as one can see it is \\boxed{2}"
    elif ending == "context":
        begun = scripted_dialogue(chat, [first, first], attempts=2)
        monkeypatch.setattr(rollout, "CONTEXT", begun.attempts[1].start + 6)
        second = "hm \\boxed{2}"
    d = scripted_dialogue(chat, [first, second], attempts=2)
    assert d.attempts[1].ending == ending and len(d.attempts) == 2
    solved = ending in ("stop", "box")
    assert [a.status for a in d.attempts] == ["wrong", "correct" if solved else "no_answer"]
    v = 1.0 if solved else -1.0
    expected = {  # by hand, from the values 1, -0.5, -1 and alpha 10
        "outcome": [0.0, 1.0 if solved else -0.5],
        "per_attempt": [-0.5, v],
        "score_stage1": [0.0, v],
        "score_stage2": [-0.5, 16.0 if solved else -6.0],
    }
    assert [a.reward for a in d.attempts] == expected[method]
    ends = {a.end - 1: a.reward for a in d.attempts}
    assert rollout.token_rewards(d) == [ends.get(t, 0.0) for t in range(len(d.ids))] and all(d.mask[t] for t in ends)


def test_intrinsic_dialogue_to_the_letter(chat, monkeypatch):
    monkeypatch.setattr(rollout, "FEEDBACK", "intrinsic")
    monkeypatch.setattr(rollout, "PROMPT", "single_turn")
    d = scripted_dialogue(chat, SPOILT, attempts=2)
    assert chat.tokenizer.decode(d.ids) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n\\boxed{2}<|im_end|>\n"
        "<|im_start|>user\nThere might be an error in the solution above because of lack of understanding of the "
        "question. Please correct the error, if any, and rewrite the solution. Only output the final solution! At the "
        "end of the Solution, put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
        "\\boxed{3}<|im_end|>"
    )


# Offline first attempts -----------------------------------------------------------------------------------------------
def test_a_placed_attempt_to_the_letter(chat, monkeypatch):
    """It reads as if it had been sampled, but is no action; SCoRe's bonus compares with it; it has no reward."""
    sampled = scripted_dialogue(chat, ["it is \\boxed{3}" + END, "\\boxed{2}" + END], attempts=3)
    placed = rollout.new_dialogue(chat, PROBLEM, 3)
    assert rollout.place_attempt(chat, placed, "it is \\boxed{3}", "3", "wrong")
    monkeypatch.setattr(rollout, "REWARD", "score_stage2")
    rollout.play(Scripted(chat, [["\\boxed{2}" + END]]), chat, [placed], [0], temperature=1.0)
    rollout.assign_rewards(placed)
    assert placed.ids == sampled.ids
    assert [(a.start, a.end, a.status) for a in placed.attempts] == [
        (a.start, a.end, a.status) for a in sampled.attempts
    ]
    second = placed.attempts[1]
    assert placed.mask == [int(second.start <= t < second.end) for t in range(len(placed.ids))]
    assert [a.reward for a in placed.attempts] == [0.0, 16.0]  # 1 + 10 (1 - -0.5)
    assert rollout.token_rewards(placed) == [16.0 * (t == second.end - 1) for t in range(len(placed.ids))]


def test_no_attempt_is_placed_where_none_can_follow(chat, monkeypatch):
    d = rollout.new_dialogue(chat, PROBLEM, 1)
    before = list(d.ids)
    assert not rollout.place_attempt(chat, d, "\\boxed{3}", "3", "wrong")
    d.max_attempts = 2
    monkeypatch.setattr(rollout, "CONTEXT", len(d.ids) + 20)
    assert not rollout.place_attempt(chat, d, "\\boxed{3}", "3", "wrong")
    assert d.ids == before and d.mask == [0] * len(before) and not d.attempts


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """A dialogues file of evaluate.py about PROBLEM, with three first attempts."""
    path = tmp_path / "dialogues-base.jsonl"
    said = [("\\boxed{2}", "2", "correct"), ("\\boxed{3}", "3", "wrong"), ("hm", None, "no_answer")]
    attempts = [dict(zip(("text", "answer", "status"), words, strict=True)) for words in said]
    records = [{"benchmark": "train", "id": "p", "attempts": [a, attempts[0]]} for a in attempts]
    records.append(records[1] | {"benchmark": "other"})  # another file's problem of the same id
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(rollout, "OFFLINE_ATTEMPTS", str(path))
    return path


def test_offline_attempts_begin_their_share_of_the_dialogues(chat, monkeypatch, offline):
    problems = [PROBLEM, PROBLEM | {"id": "unheard of"}]
    found = rollout.load_offline(problems, "train")
    assert [text for text, _, _ in found["p"]] == ["\\boxed{3}", "hm"]  # a right one needs no second
    monkeypatch.setattr(rollout, "FEEDBACK", "intrinsic")
    found = rollout.load_offline(problems, "train")
    assert len(found["p"]) == 3 and "unheard of" not in found
    monkeypatch.setattr(rollout, "OFFLINE_SHARE", 0.3)
    counts = Counter()
    for index in range(600):
        d = rollout.new_dialogue(chat, PROBLEM, 2)
        rollout.begin_offline(chat, d, found["p"], "seed", index)
        counts[d.attempts[0].answer if d.attempts else "none"] += 1
    # Binomial, four standard deviations: 420 +- 45 without, 60 +- 30 of each of the three
    assert abs(counts["none"] - 420) < 45 and all(abs(counts[a] - 60) < 30 for a in ("2", "3", None))
    d = rollout.new_dialogue(chat, problems[1], 2)
    rollout.begin_offline(chat, d, (), "seed", 0)
    assert not d.attempts
    monkeypatch.setattr(rollout, "OFFLINE_ATTEMPTS", "")
    assert rollout.load_offline(problems, "train") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "line 1: expected a record"),
        ('{"benchmark": "train", "id": "p"}', "KeyError: 'attempts'"),
        ('{"benchmark": "train", "id": "p", "attempts": [{"text": null, "answer": "1", "status": "wrong"}]}', "TypeE"),
        ('{"benchmark": "train", "id": "q", "attempts": []}', "no attempt to use"),
    ],
)
def test_bad_offline_files(offline, text, message):
    offline.write_text(text)
    with pytest.raises(SystemExit, match=message):
        rollout.load_offline([PROBLEM], "train")
    offline.unlink()
    with pytest.raises(SystemExit, match="no such file"):
        rollout.load_offline([PROBLEM], "train")


def test_stopping_at_the_first_box(chat, monkeypatch):
    monkeypatch.setattr(rollout, "STOP_AT", "first_box")
    d = scripted_dialogue(chat, ["so \\boxed{\\frac{1}{3}} or \\boxed{2}" + END, "2: \\boxed{2}"], attempts=3)
    assert [chat.tokenizer.decode(d.ids[a.start : a.end]) for a in d.attempts] == [
        "so \\boxed{\\frac{1}{3}}",
        "2: \\boxed{2}",  # nothing behind the box: the attempt ended as it would have
    ]
    assert [(a.answer, a.status, a.ending) for a in d.attempts] == [
        ("\\frac{1}{3}", "wrong", "box"),
        ("2", "correct", "length"),
    ]
    first, second = d.attempts
    assert d.ids[first.end] == chat.end_of_turn and d.mask[first.end] == 0  # the environment closes the turn
    assert (
        len(d.ids) == len(d.mask) == len(d.logprobs)
        and sum(d.mask) == second.end - second.start + first.end - first.start
    )


def test_context_full(chat, monkeypatch):
    room = len(chat.prompt(PROBLEM["question"], 3))
    monkeypatch.setattr(rollout, "CONTEXT", room + 5)
    d = scripted_dialogue(chat, ["x" * 30], attempts=3)
    assert [(a.ending, a.end - a.start, a.reward) for a in d.attempts] == [("context", 5, -1.0)]
    monkeypatch.setattr(rollout, "CONTEXT", room + 20)  # room for the attempt, none for feedback and another
    d = scripted_dialogue(chat, ["\\boxed{3}" + END], attempts=3)
    assert [a.ending for a in d.attempts] == ["stop"] and len(d.ids) <= rollout.CONTEXT
    assert d.out_of_context and not scripted_dialogue(chat, ["\\boxed{2}" + END], attempts=3).out_of_context
    monkeypatch.setattr(rollout, "CONTEXT", room)  # no room at all
    d = scripted_dialogue(chat, [], attempts=3)
    assert d.attempts == [] and rollout.token_rewards(d) == [0.0] * room


def test_hard_verdicts_do_not_hold_up_the_others(chat, monkeypatch):
    """A verdict that stays in the grader's pool costs its own dialogue's time; all others are through before."""
    import concurrent.futures

    class Slow(concurrent.futures.Future):
        def result(self, timeout=None):
            assert self.done(), "the loop waits for a hard verdict"
            return super().result(timeout)

    slow, order = Slow(), []
    right = grader.Verdict("2", True, "correct")

    def submit(response, gold, tolerance):
        if "slow" in response:
            return slow
        order.append("cheap")
        if len(order) == 3:
            slow.set_result(right)
        done = concurrent.futures.Future()
        done.set_result(right)
        return done

    monkeypatch.setattr(grader, "submit", submit)
    dialogues = [rollout.new_dialogue(chat, PROBLEM, 1) for _ in range(4)]
    answers = [["2" + END], ["2" + END], ["2" + END], ["slow" + END]]  # the scripted engine serves the last one first
    ended = []
    rollout.play(Scripted(chat, answers), chat, dialogues, [0] * 4, 1.0, on_end=ended.append)
    assert sorted(ended) == [0, 1, 2, 3] and all(d.solved_at == 1 for d in dialogues)


def test_stage_one_pays_no_first_attempt_that_the_context_made_the_last(chat, monkeypatch):
    for name, value in {"FEEDBACK": "intrinsic", "PROMPT": "single_turn", "REWARD": "score_stage1"}.items():
        monkeypatch.setattr(rollout, name, value)
    monkeypatch.setattr(rollout, "CONTEXT", len(chat.prompt(PROBLEM["question"], 2)) + 12)
    d = scripted_dialogue(chat, ["\\boxed{2}" + END], attempts=2)
    assert d.out_of_context and [a.reward for a in d.attempts] == [0.0]


def test_score_with_three_attempts(monkeypatch):
    """The bonus compares each attempt with the one before it."""
    for name, value in {"REWARD_WRONG": 0.0, "SCORE_ALPHA": 10.0}.items():
        monkeypatch.setattr(rollout, name, value)
    assert rollout.attempt_rewards(["wrong", "correct", "correct"], "score_stage2") == [0.0, 11.0, 1.0]
    assert rollout.attempt_rewards(["correct", "wrong", "wrong"], "score_stage2") == [1.0, -10.0, 0.0]
    assert rollout.attempt_rewards(["correct", "wrong", "correct"], "score_stage1") == [0.0, 0.0, 1.0]


def test_an_end_of_turn_that_no_file_of_the_model_names_ends_an_attempt(toy, chat):
    """As in base models: config and tokenizer end at <|endoftext|>, a turn at <|im_end|>."""
    tokenizer, given = AutoTokenizer.from_pretrained(toy / "warm_start"), []
    tokenizer.eos_token = "<|endoftext|>"
    assert Chat(tokenizer).end_of_turn == chat.end_of_turn
    engine = rollout.Engine.__new__(rollout.Engine)
    engine.stop_ids, engine.never = {tokenizer.eos_token_id}, {}
    engine.engine = types.SimpleNamespace(add_request=lambda key, prompt, params: given.append(params))
    engine.submit(0, [1, 2], 5, 1.0, 0, {chat.end_of_turn})
    assert set(given[0].stop_token_ids) == {tokenizer.eos_token_id, chat.end_of_turn}


def test_sums_of_bits_tell_tensors_apart_and_know_equal_ones():
    for dtype in (torch.float32, torch.bfloat16):
        for size in (1, 2, 3, 4, 8, 9):
            whole = torch.arange(1.0, size + 2).to(dtype)
            tensor = whole[1:]  # begins at no whole word
            assert rollout.bit_sum(tensor) == rollout.bit_sum(tensor.clone())
            assert rollout.bit_sum(tensor) != rollout.bit_sum(whole[:-1])


class FusedModel(torch.nn.Module):
    """An engine's model: two tensors fused into one parameter, half the columns of a third, a padded fourth in another
    precision, a transposed fifth; its loader is as vLLM's are."""

    def __init__(self, calls=None):
        super().__init__()
        shapes = {"fused": (5, 4), "columns": (3, 2), "padded": (8, 4), "turned": (3, 3)}
        for name, shape in shapes.items():
            dtype = torch.bfloat16 if name == "padded" else torch.float32
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.calls = [] if calls is None else calls

    def load_weights(self, weights):
        self.calls.append("load")
        for name, tensor in weights:
            if name == "columns":
                self.columns.data.copy_(tensor.narrow(1, 2, 2))
            elif name == "square":
                self.turned.data.copy_(tensor.t())
            elif name == "embedding":
                self.padded[:6].data.copy_(tensor)
                self.padded[6:].data.fill_(0)
            else:
                self.fused.data.narrow(0, *{"q": (0, 3), "k": (3, 2)}[name]).copy_(tensor)


def fused_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding": (6, 4), "q": (3, 4), "k": (2, 4), "columns": (3, 4), "square": (3, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_transfer_copies_to_where_the_loader_did():
    """Fused, cut, padded and cast: behind the second transfer all is as the loader alone would have made it."""
    copied, loaded = FusedModel(), FusedModel()
    columns_first = {name: w.t().contiguous().t() for name, w in fused_weights(1).items()}
    places, left = rollout.learn_places(copied, columns_first.items())
    assert copied.calls == ["load"] and not left
    assert [len(places[name]) for name in ("q", "k", "columns", "embedding", "square")] == [1] * 5
    for transfer in range(1, 10):
        weights = fused_weights(transfer + 1)
        # Of another layout in memory than those that were learnt from: a part of a larger tensor, or columns first.
        shifted = {n: torch.cat([torch.ones(7), w.flatten()])[7:].view(w.shape) for n, w in weights.items()}
        shifted["columns"] = weights["columns"].t().contiguous().t()
        assert rollout.copy_weights([copied], places, shifted.items(), transfer) == []
        loaded.load_weights(weights.items())
        for mine, theirs in zip(copied.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert copied.calls == ["load"]


def test_what_a_transfer_does_not_reach_is_named(monkeypatch):
    model, weights = FusedModel(), fused_weights(1)
    without = [{n: w for n, w in weights.items() if n != name}.items() for name in ("columns", "k", "embedding")]
    assert [rollout.learn_places(model, some)[1] for some in without] == [["columns"], ["fused"], ["padded"]]
    places, _ = rollout.learn_places(model, weights.items())
    assert rollout.copy_weights([model], places, without[2], 1) == ["embedding"]  # it did not come
    assert rollout.copy_weights([model], places, [("bias", torch.ones(3))], 1) == ["bias"]  # it has no place
    model.fused.data = model.fused.data.clone()  # the engine computes with other memory now
    assert rollout.copy_weights([model], places, weights.items(), 1) == ["k", "q"]

    def spoilt():
        yield from weights.items()
        model.columns += 1  # what was copied does not stay

    assert rollout.learn_places(model, spoilt())[1] == ["columns"]
    places, _ = rollout.learn_places(model, weights.items())
    assert [rollout.copy_weights([model], places, spoilt(), t) for t in range(16)].count(["columns"]) == 1  # of each 16
    load = model.load_weights
    monkeypatch.setattr(model, "load_weights", lambda named: load((n, w) for n, w in named if n != "q"))
    assert rollout.learn_places(model, weights.items())[1] == ["fused", "q"]  # the loader leaves it out
    monkeypatch.setattr(model, "load_weights", lambda named: [model.columns.copy_(2 * w[:, 2:]) for _, w in named])
    with pytest.raises(RuntimeError, match="makes something of the trainer's weights before it copies them to columns"):
        rollout.learn_places(model, [("columns", weights["columns"])])
    model.quant_method = types.SimpleNamespace()
    with pytest.raises(RuntimeError, match=r"something else of this model's weights \(SimpleNamespace\)"):
        rollout.learn_places(model, weights.items())


class FakeLLM:
    """Writes down what it is asked for: a GPU's engine sleeps, and no CPU's does."""

    def __init__(self, clean=True):
        self.calls, self.clean = [], clean

    def wake_up(self, tags):
        self.calls.append(("wake", *tags))

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def reset_prefix_cache(self):
        self.calls.append("forget")
        return self.clean


def test_the_order_of_a_transfer_on_a_gpu():
    engine = rollout.Engine.__new__(rollout.Engine)
    engine.cuda, engine.packed, engine.places, engine.transfers = True, [], {}, 0
    engine.llm = FakeLLM()
    engine.model = FusedModel(engine.llm.calls)
    engine.holders = [engine.model]
    engine.sleep(), engine.load_weights(fused_weights(1).items())
    wake, ready = ("wake", "weights"), ("wake", "kv_cache")
    assert engine.llm.calls == [("sleep", 2), wake, "load", "forget", ready]
    engine.sleep(), engine.load_weights(fused_weights(2).items())
    assert engine.llm.calls[5:] == [("sleep", 2), wake, "forget", ready]
    assert engine.transfers == 2  # so each compares other tensors' bits
    with pytest.raises(RuntimeError, match=r"does not hold.*\(q"):
        engine.load_weights({n: w for n, w in fused_weights(3).items() if n != "q"}.items())
    engine.llm.clean = False
    with pytest.raises(RuntimeError, match="kept its prefix cache"):
        engine.load_weights(fused_weights(2).items())
    assert engine.llm.calls[9:] == [wake, wake, "forget"]


def test_attempts_are_drawn_uniformly(monkeypatch):
    monkeypatch.setattr(rollout, "MIN_ATTEMPTS", 2)
    draws = [rollout.draw_attempts(0, step, i) for step in range(20) for i in range(200)]
    assert set(draws) == {2, 3, 4, 5}
    for n in (2, 3, 4, 5):  # 1000 expected, standard deviation 27
        assert 880 < draws.count(n) < 1120
    assert draws == [rollout.draw_attempts(0, step, i) for step in range(20) for i in range(200)]
    assert draws != [rollout.draw_attempts(1, step, i) for step in range(20) for i in range(200)]


def test_samples_of_a_problem_share_n(monkeypatch):
    monkeypatch.setattr(rollout, "SAMPLES_PER_PROMPT", 4)
    draws = [rollout.draw_attempts(0, 1, i) for i in range(400)]
    assert all(len(set(draws[i : i + 4])) == 1 for i in range(0, 400, 4)) and len(set(draws)) == 5


# Other models' templates ----------------------------------------------------------------------------------------------
LLAMA = (
    "<|begin|>{% for m in messages %}<|start|>{{ m['role'] }}<|mid|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|mid|>\n\n{% endif %}"
)
GEMMA = (  # no system turns; roles alternate
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
TO_THE_FRONT = (  # system turns are collected before the first question
    "{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}\n{% endfor %}"
    "{% for m in messages if m['role'] != 'system' %}<|start|>{{ m['content'] }}<|eot|>{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def merging_tokenizer(template: str):
    """A byte-level BPE that has learnt to merge line breaks with each other and with the words around them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|start|>", "<|mid|>", "<|eot|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["It is \\boxed{2}", *("\n" * n for n in range(2, 9))] * 50
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eot|>", pad_token="<|pad|>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize(("template", "system_turns"), [(LLAMA, True), (LLAMA, False), (GEMMA, False)])
def test_other_chat_templates(monkeypatch, template, system_turns):
    """What was shown is what the template renders for the whole dialogue, and no sampled id is changed, although the
    tokenizer merges an attempt's leading line breaks with the prompt's when it sees them together."""
    monkeypatch.setattr(rollout, "SYSTEM_TURNS", system_turns)
    tokenizer = merging_tokenizer(template)
    chat = Chat(tokenizer)
    answers = ["\n\nIt is \\boxed{3}<|eot|>", "\n\\boxed{2}<|eot|>"]
    sampled = [tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    d = scripted_dialogue(chat, answers, attempts=2)
    assert [d.ids[a.start : a.end] for a in d.attempts] == sampled
    text = tokenizer.decode(d.ids)
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert again != d.ids  # re-tokenising would have trained other ids than those sampled
    ask = rollout.SAY_MULTI.replace("{attempts}", "2")
    wrong = rollout.SAY_WRONG.replace("{attempts}", "1")
    if system_turns:
        turns = [("system", ask), ("user", PROBLEM["question"]), ("assistant", "{}"), ("system", wrong)]
    else:
        turns = [("user", f"{ask}\n\n{PROBLEM['question']}"), ("assistant", "{}"), ("user", wrong)]
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == whole.replace("{}<|eot|>", answers[0]) + answers[1]


def test_templates_that_cannot_say_it(monkeypatch):
    for template, message in (
        (PLAIN, "without a token of its own"),
        ("", "no chat template"),
    ):
        with pytest.raises(SystemExit, match=message):
            Chat(merging_tokenizer(template))
    with pytest.raises(SystemExit, match=r"System role not supported; SYSTEM_TURNS=0"):
        Chat(merging_tokenizer(GEMMA))
    with pytest.raises(SystemExit, match=r"drops what is said.*SYSTEM_TURNS=0"):
        Chat(merging_tokenizer(TO_THE_FRONT))
    monkeypatch.setattr(rollout, "MAX_ATTEMPTS", 1)  # nothing is ever said behind an answer
    Chat(merging_tokenizer(TO_THE_FRONT))
    monkeypatch.setattr(rollout, "MAX_ATTEMPTS", 2)
    monkeypatch.setattr(rollout, "SYSTEM_TURNS", False)
    assert rollout.SAY_WRONG[:20] in Chat(merging_tokenizer(TO_THE_FRONT)).tokenizer.decode(
        Chat(merging_tokenizer(TO_THE_FRONT)).feedback("q", 2)
    )


# The real engine ------------------------------------------------------------------------------------------------------
def test_real_engine_plays_what_the_model_says(toy, engine):
    """Every sampled id has the log-probability that transformers gives it in fp32; greedy is transformers' arg max; the
    dialogues do not depend on what else runs or in which order they were queued."""
    chat = Chat(engine.tokenizer)
    problems = rollout.load_problems(toy / "test.jsonl")[:24]
    model = AutoModelForCausalLM.from_pretrained(toy / "warm_start", dtype=torch.float32)

    def played(order, temperature):
        dialogues = {i: rollout.new_dialogue(chat, problems[i], 1 + i % 5) for i in order}
        rollout.play(engine, chat, list(dialogues.values()), list(dialogues), temperature)
        return [dialogues[i] for i in sorted(order)]

    sampled = played(range(24), 1.0)
    assert any(len(d.attempts) > 1 for d in sampled) and any(a.status == "wrong" for d in sampled for a in d.attempts)
    for d in sampled:
        assert chat.tokenizer.decode(d.ids[: d.attempts[0].start]).endswith("<|im_start|>assistant\n")
        with torch.no_grad():
            logprobs = model(torch.tensor([d.ids])).logits.log_softmax(-1)[0]  # (T, V)
        for t in range(1, len(d.ids)):
            if d.mask[t]:
                assert abs(logprobs[t - 1, d.ids[t]].item() - d.logprobs[t]) < 1e-4
    assert [d.ids for d in played(range(23, -1, -1), 1.0)] == [d.ids for d in sampled]
    assert [d.ids for d in played(range(5), 1.0)] == [d.ids for d in sampled[:5]]
    rollout.SEED_ATTEMPTS = False  # then a seed holds for the whole call, and the schedule matters
    try:
        assert [d.ids for d in played(range(24), 1.0)] == [d.ids for d in played(range(24), 1.0)]
        assert [d.ids for d in played(range(23, -1, -1), 1.0)] != [d.ids for d in played(range(24), 1.0)]
    finally:
        rollout.SEED_ATTEMPTS = True
    for d in played(range(6), 0.0):
        with torch.no_grad():
            best = model(torch.tensor([d.ids])).logits.argmax(-1)[0]
        assert all(best[t - 1] == d.ids[t] for t in range(1, len(d.ids)) if d.mask[t])


def test_dialogues_do_not_depend_on_the_size_of_the_engine(toy, engine, monkeypatch):
    """Three at a time are what 256 at a time are: a script in a process of its own says what it has played."""
    script = (
        "import sys, json, rollout; rollout.MAX_SEQUENCES = 3\n"
        "engine = rollout.Engine(sys.argv[1]); chat = rollout.Chat(engine.tokenizer)\n"
        "ps = rollout.load_problems(sys.argv[2])[:12]\n"
        "ds = [rollout.new_dialogue(chat, p, 3) for p in ps]\n"
        "print(json.dumps([d.ids for d in rollout.play(engine, chat, ds, list(range(12)), 1.0)]))\n"
    )
    command = [sys.executable, "-c", script, toy / "warm_start", toy / "test.jsonl"]
    printed = subprocess.run(command, cwd=ROOT, env=alone(), check=True, capture_output=True, text=True).stdout
    chat = Chat(engine.tokenizer)
    dialogues = [rollout.new_dialogue(chat, p, 3) for p in rollout.load_problems(toy / "test.jsonl")[:12]]
    rollout.play(engine, chat, dialogues, list(range(12)), 1.0)
    assert json.loads(printed.splitlines()[-1]) == [d.ids for d in dialogues]


def test_two_ranks_share_an_engine(toy, engine, tmp_path):
    """Half of the model on each of two ranks: both play what one engine plays, also after a transfer of weights."""
    (tmp_path / "share.py").write_text(
        "import sys, json, os, ppo, rollout\n"
        "from transformers import AutoModelForCausalLM\n"
        "rollout.TENSOR_PARALLEL, (model, problems, out) = 2, sys.argv[1:]\n"
        "ppo.start_ranks()\n"
        "engine = rollout.Engine(model); chat = rollout.Chat(engine.tokenizer)\n"
        "lm = AutoModelForCausalLM.from_pretrained(model)\n"
        "engine.load_weights((name, w + 0.1) for name, w in lm.named_parameters())\n"
        "engine.load_weights(lm.named_parameters())\n"
        "ds = [rollout.new_dialogue(chat, p, 3) for p in rollout.load_problems(problems)[:12]]\n"
        "rollout.play(engine, chat, ds, list(range(12)), 1.0)\n"
        "json.dump([d.ids for d in ds], open(f'{out}/{os.environ[\"RANK\"]}', 'w'))\n"
        "engine.shutdown()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, tmp_path / "share.py", toy / "warm_start", toy / "test.jsonl", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    chat = Chat(engine.tokenizer)
    dialogues = [rollout.new_dialogue(chat, p, 3) for p in rollout.load_problems(toy / "test.jsonl")[:12]]
    rollout.play(engine, chat, dialogues, list(range(12)), 1.0)
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == [d.ids for d in dialogues]


def test_a_stale_engine_is_found_out(toy, engine):
    """An engine that computes with other memory than a transfer fills is named before it samples anything."""
    weights = dict(AutoModelForCausalLM.from_pretrained(toy / "warm_start", dtype=torch.float32).named_parameters())
    engine.load_weights(weights.items())
    assert sum(part.numel() for parts in engine.places.values() for part, _ in parts) >= sum(
        w.numel() for w in weights.values()
    )
    down = engine.model.model.layers[1].mlp.down_proj.weight
    there, down.data = down.data, down.data.clone()
    with pytest.raises(RuntimeError, match=r"does not hold.*layers\.1\.mlp\.down_proj"):
        engine.load_weights(weights.items())
    down.data = there
    engine.load_weights(weights.items())


@pytest.mark.parametrize("tied", [True, False])
def test_large_matrices_are_packed_again_behind_each_transfer(toy, tmp_path, tied):
    """As if all were large: three models one after the other through one engine, each confirmed by transformers."""
    lm = AutoModelForCausalLM.from_pretrained(toy / "warm_start", dtype=torch.float32)
    if not tied:
        lm.config.tie_word_embeddings = False
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach() * 1.5)
    lm.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(toy / "warm_start").save_pretrained(tmp_path / "model")
    program = (
        "import sys, torch, rollout\n"
        "from transformers import AutoModelForCausalLM\n"
        "rollout.CPU_PACK_MIB, (model, problems) = 0, sys.argv[1:]\n"
        "engine = rollout.Engine(model)\n"
        "assert len(engine.packed) >= 2 * 4\n"  # four matrices in each of at least two layers
        "chat = rollout.Chat(engine.tokenizer)\n"
        "lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)\n"
        "for factor in (1.0, 0.9, 1.2):\n"
        "    for w in lm.parameters():\n"
        "        w *= factor\n"
        "    engine.load_weights(lm.named_parameters())\n"
        "    ds = [rollout.new_dialogue(chat, p, 2) for p in rollout.load_problems(problems)[:4]]\n"
        "    rollout.play(engine, chat, ds, list(range(4)), 1.0)\n"
        "    for d in ds:\n"
        "        lp = lm(torch.tensor([d.ids])).logits.log_softmax(-1)[0]\n"
        "        for t, m in enumerate(d.mask):\n"
        "            assert not m or abs(lp[t - 1, d.ids[t]].item() - d.logprobs[t]) < 1e-4\n"
        "engine.shutdown()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model"), str(toy / "test.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_model_that_is_nowhere(tmp_path):
    with pytest.raises(SystemExit, match=r"MODEL=.*absent/model: no folder with a model"):
        rollout.load_tokenizer(str(tmp_path / "absent/model"))


def test_more_prompts_than_one_forward_pass_takes(toy, engine):
    """Seeded sampling survives a queue whose prompts overflow the engine's token budget of a step."""
    chat = Chat(engine.tokenizer)
    problems = rollout.load_problems(toy / "train.jsonl") * 2
    dialogues = [rollout.new_dialogue(chat, p, 1) for p in problems]
    assert sum(len(d.ids) for d in dialogues) > 8192
    rollout.play(engine, chat, dialogues, list(range(len(dialogues))), 1.0)
    assert all(len(d.attempts) == 1 for d in dialogues)


def test_real_engine_goes_on_from_a_forced_attempt(toy, engine):
    """The probe of the demo: a failed attempt that the model did not say, as environment ids, and its next answer."""
    chat = Chat(engine.tokenizer)
    problem = rollout.load_problems(toy / "test.jsonl")[0]
    d = rollout.new_dialogue(chat, problem, 2)
    assert rollout.place_attempt(chat, d, "It is \\boxed{0}", "0", "wrong")
    before = list(d.ids)
    rollout.play(engine, chat, [d], [0], 0.0)
    assert d.ids[: len(before)] == before and len(d.attempts) == 2 and sum(d.mask) == len(d.ids) - len(before)


def test_sampling_is_what_the_program_says_not_what_the_models_files_say(toy, tmp_path):
    """Rows of a padded vocabulary that are likelier than any token, a generation_config that wants to be greedy, and an
    end id that only it knows."""
    folder = tmp_path / "padded"
    shutil.copytree(toy / "warm_start", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    lm.resize_token_embeddings(len(tokenizer) + 8, mean_resizing=False)
    problem = rollout.load_problems(toy / "test.jsonl")[0]
    prompt = torch.tensor([Chat(tokenizer).prompt(problem["question"], 2)])
    with torch.no_grad():
        state = lm.model(prompt).last_hidden_state[0, -1]
        lm.lm_head.weight[len(tokenizer) :] = 30 * state / state.norm() ** 2 * 2
        assert lm(prompt).logits[0, -1].argmax() >= len(tokenizer)
    lm.generation_config.update(eos_token_id=tokenizer.pad_token_id, temperature=0.01, top_k=1, do_sample=True)
    lm.save_pretrained(folder)
    program = (
        "import json, sys, rollout\n"
        "engine = rollout.Engine(sys.argv[1])\n"
        "chat = rollout.Chat(engine.tokenizer)\n"
        "problem = rollout.load_problems(sys.argv[2])[0]\n"
        "dialogues = [rollout.new_dialogue(chat, problem, 2) for _ in range(40)]\n"
        "rollout.play(engine, chat, dialogues, list(range(40)), 1.0)\n"
        "sampled = [(i, p) for d in dialogues for i, m, p in zip(d.ids, d.mask, d.logprobs) if m]\n"
        "print(json.dumps([sorted(engine.stop_ids), sampled]))\n"
        "engine.shutdown()\n"
    )
    command = [sys.executable, "-c", program, str(folder), str(toy / "test.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    stop_ids, sampled = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert stop_ids == sorted({tokenizer.pad_token_id, tokenizer.eos_token_id})
    assert max(token for token, _ in sampled) < len(tokenizer)
    assert sum(logprob for _, logprob in sampled) / len(sampled) < -0.05  # greedy ones would have probability 1


def test_the_command_line_plays_and_shows(toy, engine, monkeypatch, capsys):
    arguments = [f"MODEL={toy / 'warm_start'}", f"PROBLEMS={toy / 'test.jsonl'}", "DIALOGUES=3", "MAX_ATTEMPTS=2"]
    monkeypatch.setattr(sys, "argv", ["rollout.py", *arguments, "MIN_ATTEMPTS=2", "MAX_ATTEMPT_TOKENS=16"])
    for name in rollout.__annotations__:
        monkeypatch.setattr(rollout, name, getattr(rollout, name))  # put back what main() changes
    monkeypatch.setattr(rollout, "Engine", lambda *_, **__: engine)
    monkeypatch.setattr(engine, "shutdown", lambda: None, raising=False)
    rollout.main()
    said = capsys.readouterr().out
    for problem in rollout.load_problems(toy / "test.jsonl")[:3]:
        assert problem["question"] in said and f"gold {problem['answer']}, reward" in said
    assert said.count("[attempt 1: ") == 3 and "You have 2 attempts to answer" in said
    assert said.count("[attempt 2: ") == said.count("You have 1 attempts left")


# Constants and problems -----------------------------------------------------------------------------------------------
def stage(**constants):
    module = types.ModuleType("stage")
    module.__annotations__ = {name: type(value).__name__ for name, value in constants.items()}
    module.__dict__.update(constants)
    return module


def test_override_constants():
    ppo = stage(PRESET="", STEPS=3, BETAS=(0.9, 0.95), WHITEN=True)
    other = stage(STEPS=3, NAME="x")
    stages, presets = {"ppo": ppo, "rollout": other}, {"small": {"STEPS": 1, "rollout.NAME": "y"}}
    arguments = ["PRESET=small", "rollout.STEPS=9", "BETAS=0.5,0.6", "WHITEN=0"]
    values = rollout.override_constants(arguments, stages, presets)
    assert (ppo.STEPS, other.STEPS, other.NAME, ppo.BETAS, ppo.WHITEN) == (1, 9, "y", (0.5, 0.6), False)
    assert values["ppo.STEPS"] == 1 and values["rollout.STEPS"] == 9 and values["ppo.PRESET"] == "small"
    rollout.override_constants(["NAME=z"], stages, presets)  # the only stage that has it
    assert other.NAME == "z"
    ppo.KL_COEF, ppo.__annotations__["KL_COEF"] = (0.1,), tuple[float, ...]
    for given in ("0.5,0.25,0.125", "0.5"):  # as many as one likes, whatever is there
        rollout.override_constants([f"KL_COEF={given}"], stages, presets)
        assert ",".join(map(str, ppo.KL_COEF)) == given
    for bad, message in {
        "STEP=1": "nearest is STEPS",
        "STEPS=many": "expected a value like 1",
        "STEPS": "expected NAME=value",
        "PRESET=large": "no such preset; there are small",
        "WHITEN=maybe": "expected a value like",
        "BETAS=0.9": "expected a value like",
    }.items():
        with pytest.raises(SystemExit, match=message):
            rollout.override_constants([bad], stages, presets)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a", "question": "q", "answer": "1"}', "{broken"], "line 2: not JSON"),
        (['{"id": "a", "question": "q", "answer": null}'], 'line 1, id a: "answer" must be'),
        (['{"id": "a", "question": " ", "answer": "1"}'], 'line 1, id a: "question" must be'),
        (["[1]"], "line 1"),
        ([""], "no problem"),
    ],
)
def test_bad_problem_files(tmp_path, lines, message):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit, match=message):
        rollout.load_problems(path)
    with pytest.raises(SystemExit, match="no such problem file"):
        rollout.load_problems(tmp_path / "absent.jsonl")


def test_problem_text_survives(tmp_path):
    problem = {"id": "a", "question": "Ünï\\frac{1}{2}\u2028code\n<|im_end|>?", "answer": "½"}
    (tmp_path / "p.jsonl").write_text(json.dumps(problem, ensure_ascii=False) + "\n", encoding="utf-8")
    assert rollout.load_problems(tmp_path / "p.jsonl") == [problem]


def test_questions_longer_than_the_context(chat, monkeypatch, capsys, tmp_path):
    path, problems = tmp_path / "my.jsonl", [PROBLEM, PROBLEM | {"id": "long one", "question": "why? " * 5000}]
    path.write_text("\n\n".join(json.dumps(problem) for problem in problems))
    named = r"my.jsonl: 1 of 2 questions fill the context of 4096 tokens: line 3 \(long one\); shorten"
    with pytest.raises(SystemExit, match=named):
        rollout.check_lengths(chat, problems, path)
    monkeypatch.setattr(rollout, "LEAVE_OUT_LONG", True)
    assert rollout.check_lengths(chat, problems, path) == [PROBLEM]
    assert "line 3 (long one); left out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1 of 1 questions"):
        rollout.check_lengths(chat, problems[1:], path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MAX_ATTEMPTS", 0, "MIN_ATTEMPTS=1 <= MAX_ATTEMPTS=0"),
        ("MIN_ATTEMPTS", 0, "1 <= MIN_ATTEMPTS=0"),
        ("MAX_ATTEMPT_TOKENS", 0, "MAX_ATTEMPT_TOKENS=0: must be at least 1"),
        ("REWARD", "score", "REWARD=score: must be one of outcome, per_attempt, score_stage1, score_stage2"),
        ("FEEDBACK", "oracle", "FEEDBACK=oracle: must be one of verified, intrinsic"),
        ("OFFLINE_SHARE", 1.5, "OFFLINE_SHARE=1.5: must be a share"),
        ("GPU_MEMORY", 3.0, "GPU_MEMORY=3.0: must be a share"),
        ("DIALOGUES", -1, "DIALOGUES=-1: must be at least 1"),
        ("TEMPERATURE", -1.0, "TEMPERATURE=-1.0: must not be negative"),
        ("OFFLINE_ATTEMPTS", "x.jsonl", "OFFLINE_ATTEMPTS needs"),  # with the paper's one reward a dialogue
    ],
)
def test_constants_that_cannot_be(monkeypatch, name, value, message):
    rollout.check_constants()
    monkeypatch.setattr(rollout, name, value)
    with pytest.raises(SystemExit, match=message):
        rollout.check_constants()


def test_reward_of_a_dialogue_without_an_attempt():
    d = Dialogue(PROBLEM, 1, ids=[1, 2], mask=[1, 1], logprobs=[0.0, 0.0])
    rollout.assign_rewards(d)
    assert rollout.token_rewards(d) == [0.0, 0.0]
    d.attempts.append(Attempt(0, 2, "1", "timeout", "stop"))
    rollout.assign_rewards(d)
    assert rollout.token_rewards(d) == [0.0, -0.5]  # an answer that could not be graded in time is a wrong one
