"""rollout.py: prompts to the letter, the attempt loop on a scripted and on the real engine, rewards, constants."""

import json
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grader
import rollout
from rollout import Attempt, Chat, Dialogue

PROBLEM = {"id": "p", "question": "What is 1 + 1?", "answer": "2"}


@pytest.fixture(scope="session")
def chat(toy) -> Chat:
    return Chat(AutoTokenizer.from_pretrained(toy / "warm_start"))


class Scripted:
    """Answers with given texts, dialogue by dialogue, to reach corners that no model can be steered to."""

    def __init__(self, chat: Chat, answers: list[list[str]], logprob: float = -0.5):
        self.chat, self.answers, self.logprob, self.queue, self.seen = chat, answers, logprob, [], []

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


def test_dialogue_is_the_papers_to_the_letter(chat):
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
    assert "You have 3 attempts to answer the question.<|im_end|>" in chat.tokenizer.decode(chat.prompt("Q", 3))
    assert chat.tokenizer.decode(chat.feedback("Q", 2)) == (
        "\n<|im_start|>system\nYour answer is incorrect. Try an alternative. "
        "You have 2 attempts to answer the question."
        "<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )


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


def test_context_full(chat, monkeypatch):
    room = len(chat.prompt(PROBLEM["question"], 3))
    monkeypatch.setattr(rollout, "CONTEXT", room + 5)
    d = scripted_dialogue(chat, ["x" * 30], attempts=3)
    assert [(a.ending, a.end - a.start, a.reward) for a in d.attempts] == [("context", 5, -1.0)]
    monkeypatch.setattr(rollout, "CONTEXT", room + 20)  # room for the attempt, none for feedback and another
    d = scripted_dialogue(chat, ["\\boxed{3}" + END], attempts=3)
    assert [a.ending for a in d.attempts] == ["stop"] and len(d.ids) <= rollout.CONTEXT
    monkeypatch.setattr(rollout, "CONTEXT", room)  # no room at all
    d = scripted_dialogue(chat, [], attempts=3)
    assert d.attempts == [] and rollout.token_rewards(d) == [0.0] * room


def test_hard_verdicts_do_not_hold_up_the_others(chat, monkeypatch):
    """A verdict that stays in the grader's pool costs its own dialogue's time; all others are through before."""
    import concurrent.futures

    slow, order = concurrent.futures.Future(), []
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


def test_attempts_are_drawn_uniformly(monkeypatch):
    monkeypatch.setattr(rollout, "MIN_ATTEMPTS", 2)
    draws = [rollout.draw_attempts(0, step, i) for step in range(20) for i in range(200)]
    assert set(draws) == {2, 3, 4, 5}
    for n in (2, 3, 4, 5):  # 1000 expected, standard deviation 27
        assert 880 < draws.count(n) < 1120
    assert draws == [rollout.draw_attempts(0, step, i) for step in range(20) for i in range(200)]


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
    for d in played(range(6), 0.0):
        with torch.no_grad():
            best = model(torch.tensor([d.ids])).logits.argmax(-1)[0]
        assert all(best[t - 1] == d.ids[t] for t in range(1, len(d.ids)) if d.mask[t])


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
    d.extend(chat.tokenizer("It is \\boxed{0}<|im_end|>", add_special_tokens=False)["input_ids"])
    d.extend(chat.feedback(problem["question"], 1))
    d.max_attempts = 1
    before = list(d.ids)
    rollout.play(engine, chat, [d], [0], 0.0)
    assert d.ids[: len(before)] == before and len(d.attempts) == 1 and sum(d.mask) == len(d.ids) - len(before)


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


def test_reward_of_a_dialogue_without_an_attempt():
    d = Dialogue(PROBLEM, 1, ids=[1, 2], mask=[0, 0], logprobs=[0.0, 0.0])
    rollout.assign_rewards(d)
    assert rollout.token_rewards(d) == [0.0, 0.0]
    d.attempts.append(Attempt(0, 2, "1", "timeout", "stop"))
    rollout.assign_rewards(d)
    assert rollout.token_rewards(d) == [0.0, -0.5]  # an answer that could not be graded in time is a wrong one
