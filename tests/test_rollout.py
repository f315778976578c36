"""rollout.py: a dialogue to the letter, the attempt loop on a scripted engine, rewards, metrics, offline attempts."""

import itertools
import math
import threading
from collections import Counter
from concurrent.futures import Future

import rollout
from experiments import median
from plumbing.chat import Chat
from plumbing.engine import Sample
from plumbing.files import append_jsonl
from rollout import Attempt, Dialogue

import pytest

PROBLEM = {"id": "p", "question": "What is 1 + 1?", "answer": "2"}
END = "<|im_end|>"
RIGHT, WRONG, SILENT, LONG = "\\boxed{2}" + END, "\\boxed{3}" + END, "no box" + END, "x" * 30


@pytest.fixture
def chat() -> Chat:
    return rollout.make_chat(median.make_tokenizer())


class Scripted:
    """An engine that says given texts or ids, for corners to which no model can be steered; last come, first served."""

    def __init__(self, chat: Chat, answers: list[list]):
        self.chat, self.answers, self.queue, self.asked = chat, answers, [], []

    def submit(self, key, ids, max_tokens, temperature, seed, stop_id):
        self.asked.append((key, list(ids), max_tokens, temperature, seed))
        self.queue.append((key, max_tokens, (stop_id, self.chat.tokenizer.pad_token_id)))

    @property
    def busy(self) -> bool:
        return bool(self.queue)

    def step(self) -> list[Sample]:
        key, max_tokens, ends = self.queue.pop()
        answer = self.answers[key].pop(0)
        ids = self.chat.encode(answer) if isinstance(answer, str) else answer
        length = next((number for number, token in enumerate(ids, 1) if token in ends), math.inf)
        ids = ids[: min(length, max_tokens, len(ids))]
        return [Sample(key, ids, [-0.5] * len(ids), length <= max_tokens)]


def play(chat: Chat, *answers, attempts: int, placed: str = "") -> Dialogue:
    """A dialogue in which the policy says these answers, perhaps after one that is not its own."""
    dialogue = rollout.new_dialogue(chat, PROBLEM, attempts)
    if placed:
        assert rollout.place_attempt(chat, dialogue, placed, "3", "wrong")
    rollout.play(Scripted(chat, [list(answers)]), chat, [dialogue], [0], 1.0)
    rollout.assign_rewards(dialogue)
    return dialogue


# What is said ---------------------------------------------------------------------------------------------------------
ASK = "Please reason step by step, and put your final answer within \\boxed{}."
MULTI = f"{ASK} You have 3 attempts to answer the questions, and you should provide the full reasoning steps in each"
MULTI += " attempt."
TWO_LEFT, ONE_LEFT = (f"Your answer is incorrect. You have {n} attempts left. Try an alternative." for n in (2, 1))
CHECK = (
    "There might be an error in the solution above because of lack of understanding of the question. Please correct "
    "the error, if any, and rewrite the solution. Only output the final solution! At the end of the Solution, put your "
    "final answer within \\boxed{}."
)


@pytest.mark.parametrize(
    ("constants", "answers", "role", "said"),
    [
        ({}, [WRONG, SILENT, RIGHT], "system", [MULTI, TWO_LEFT, ONE_LEFT]),
        ({}, [WRONG, RIGHT], "system", [MULTI, TWO_LEFT]),  # nothing follows a right answer
        ({"PROMPT": "single_turn"}, [WRONG] * 3, "system", [ASK, TWO_LEFT, ONE_LEFT]),
        ({"PROMPT": "single_turn", "FEEDBACK": "intrinsic"}, [RIGHT, WRONG, RIGHT], "user", [ASK, CHECK, CHECK]),
        ({"SYSTEM_TURNS": False}, [WRONG, RIGHT], "user", [MULTI, TWO_LEFT]),
    ],
)
def test_a_dialogue_to_the_letter(chat, change, constants, answers, role, said):
    """The mask marks what was sampled, end of turn included, and nothing else; log-probabilities stand with it."""
    change(rollout, **constants)
    chat = rollout.make_chat(chat.tokenizer)
    d = play(chat, *answers, attempts=3)
    text = f"<|im_start|>system\n{said[0]}{END}\n<|im_start|>user\nWhat is 1 + 1?{END}\n"
    if not rollout.SYSTEM_TURNS:
        text = f"<|im_start|>user\n{said[0]}\n\nWhat is 1 + 1?{END}\n"
    text += f"<|im_start|>assistant\n{answers[0]}"
    for feedback, answer in zip(said[1:], answers[1:], strict=True):
        text += f"\n<|im_start|>{role}\n{feedback}{END}\n<|im_start|>assistant\n{answer}"
    assert chat.decode(d.ids) == text
    assert [chat.decode(d.ids[a.start : a.end]) for a in d.attempts] == answers
    sampled = [any(a.start <= t < a.end for a in d.attempts) for t in range(len(d.ids))]
    assert d.mask == [int(s) for s in sampled] and d.logprobs == [-0.5 * s for s in sampled]
    assert [a.answer for a in d.attempts] == [{RIGHT: "2", WRONG: "3", SILENT: None}[answer] for answer in answers]


def test_sampled_ids_stay_as_they_are(chat):
    """Although the tokenizer makes others of their text: the policy has spelt out what is a token."""
    spelt = [*itertools.chain(*map(chat.encode, "It is \\boxed{2}")), chat.end_of_turn]
    assert len(chat.encode(chat.decode(spelt))) < len(spelt)
    d = play(chat, spelt, attempts=2)
    assert d.ids[d.attempts[0].start :] == spelt and d.attempts[0].answer == "2"


# The attempt loop -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answers", "room", "statuses", "endings"),
    [
        ([RIGHT], None, "c", ["stop"]),
        ([LONG, RIGHT], None, "nc", ["length", "stop"]),  # cut at MAX_ATTEMPT_TOKENS
        (["\\boxed{3}<|endoftext|>", RIGHT], None, "wc", ["stop", "stop"]),  # ended by another id than a turn's
        ([LONG], 5, "n", ["context"]),
        ([WRONG], 20, "w", ["stop"]),  # room for the attempt, but not for feedback and another one
        ([], 0, "", []),
    ],
)
def test_what_ends_an_attempt(chat, change, answers, room, statuses, endings):
    """Whatever it was, the next attempt sees a closed turn, whose end is an action only if it was sampled."""
    change(rollout, MAX_ATTEMPT_TOKENS=16)
    if room is not None:
        prompt = rollout.encode_prompt(chat, PROBLEM["question"], 3)
        change(rollout, CONTEXT=len(prompt) + room)
    d = play(chat, *answers, attempts=3)
    assert "".join(a.status[0] for a in d.attempts) == statuses and [a.ending for a in d.attempts] == endings
    assert all(a.end - a.start == (room or 16) for a in d.attempts if a.ending != "stop")
    assert len(d.ids) <= rollout.CONTEXT and d.out_of_context == (room is not None)
    for a, following in zip(d.attempts, d.attempts[1:], strict=False):
        assert d.ids[a.end - 1 : following.start].count(chat.end_of_turn) == 2  # the attempt's and the feedback's
        assert not any(d.mask[a.end : following.start])
    change(rollout, REWARD="score_stage1")
    rollout.assign_rewards(d)
    assert any(rollout.token_rewards(d)) == (room is None)  # that stage must not pay a first attempt


def test_the_loop_queues_retries_at_once(chat):
    """Those with most attempts first; a seed for each attempt; on_end once for each dialogue."""
    dialogues, ended = [rollout.new_dialogue(chat, PROBLEM, n) for n in (1, 2, 3)], []
    engine = Scripted(chat, [[RIGHT], [WRONG, RIGHT], [WRONG, WRONG, SILENT]])
    rollout.play(engine, chat, dialogues, [7, 8, 7], 0.5, on_end=ended.append)
    keys, ids, max_tokens, temperatures, seeds = zip(*engine.asked, strict=True)
    # 2, 1, 0 are queued; 0 is served first, then 1 and its retry, before 2 has had its first.
    assert keys == (2, 1, 0, 1, 2, 2) and ended == [0, 1, 2]
    starts = [dialogues[key].attempts[number].start for key, number in zip(keys, (0, 0, 0, 1, 1, 2), strict=True)]
    assert list(ids) == [dialogues[key].ids[:start] for key, start in zip(keys, starts, strict=True)]
    assert set(max_tokens) == {rollout.MAX_ATTEMPT_TOKENS} and set(temperatures) == {0.5}
    assert seeds[0] == seeds[2] and len(set(seeds)) == 5  # by a dialogue's seed and the attempt's number alone


def test_a_verdict_that_takes_long_holds_up_its_own_dialogue_alone(chat, change):
    """As that on a program will: it comes from elsewhere when the others have ended."""
    submit, slow, late, ended = rollout.grader.submit, "\\boxed{slow}" + END, Future(), []

    def end(index: int) -> None:
        ended.append(index)
        if len(ended) == 2:
            threading.Timer(0.05, late.set_result, [rollout.grader.Verdict("slow", False, "timeout")]).start()

    change(rollout.grader, submit=lambda said, *rest: late if "slow" in said else submit(said, *rest))
    dialogues = [rollout.new_dialogue(chat, PROBLEM, 2) for _ in range(3)]
    rollout.play(Scripted(chat, [[WRONG] * 2, [WRONG] * 2, [slow, WRONG]]), chat, dialogues, [0] * 3, 1.0, on_end=end)
    assert ended == [1, 0, 2]  # it was served first
    assert [a.status for a in dialogues[2].attempts] == ["timeout", "wrong"]


def test_a_dialogue_about_a_program(chat, change):
    """What is quoted of its error holds no token of the template's (the toy's tokenizer has spaces of its own)."""
    d = rollout.new_dialogue(chat, {"id": "p", "question": "Write f.", "tests": ["assert f(1) == 2"]}, 2)
    assert "put your final program in a Python code block" in chat.decode(d.ids)
    for characters, feedback, said in (
        (0, "verified", "attempts left. Try an alternative.<|im_end|>"),
        (20, "verified", "Try an alternative.\n<|im_end|> == 12\nAs<|im_end|>"),
        (20, "intrinsic", "rewrite the solution. Only output the final correct Python program!<|im_end|>"),
    ):
        change(rollout, TOLD_CHARACTERS=characters, FEEDBACK=feedback)
        ids = rollout.encode_feedback(chat, 1, True, "<|im_end|> == 12\nAssertionError")
        assert ids.count(chat.end_of_turn) == 1 and said.replace(" ", "") in chat.decode(ids).replace(" ", "")


# Rewards --------------------------------------------------------------------------------------------------------------
REWARDS = {  # outcome, per_attempt, score_stage1, score_stage2; values 1, -0.5, -1, discount 0.9, SCORE_ALPHA 2
    "": ([], [], [], []),
    "timeout": ([-0.5], [-0.5], [-0.5], [-0.5]),
    "correct wrong": ([0, 1], [1, -0.5], [0, -0.5], [1, -3.5]),
    "no_answer no_answer": ([0, -1], [-1, -1], [0, -1], [-1, -1]),
    "wrong no_answer": ([0, -0.5], [-0.5, -1], [0, -1], [-0.5, -2]),
    # The bonus compares each attempt with the one before it: 0.9 + 2 x 1.4 and 0.81 + 2 x (0.81 - 0.9).
    "wrong correct correct": ([0, 0, 0.9], [-0.5, 0.9, 0.81], [0, 0, 0.81], [-0.5, 3.7, 0.63]),
}


@pytest.mark.parametrize("statuses", REWARDS)
def test_rewards_by_hand(change, statuses):
    change(rollout, ATTEMPT_DISCOUNT=0.9, SCORE_ALPHA=2.0, FEEDBACK="intrinsic")
    d = Dialogue(PROBLEM, len(statuses.split()), ids=list(range(20)))
    d.attempts = [Attempt(5 * k + 1, 5 * k + 4, "", s, "stop") for k, s in enumerate(statuses.split())]
    for number, expected in enumerate(REWARDS[statuses]):
        change(rollout, REWARD=("outcome", "per_attempt", "score_stage1", "score_stage2")[number])
        rollout.assign_rewards(d)
        assert [a.reward for a in d.attempts] == pytest.approx(expected)
        at_last_actions = {5 * k + 3: reward for k, reward in enumerate(expected)}
        assert rollout.token_rewards(d) == pytest.approx([at_last_actions.get(t, 0.0) for t in range(20)])


def test_metrics_by_hand(chat, change):
    change(rollout, MAX_ATTEMPTS=2, MAX_ATTEMPT_TOKENS=16)
    dialogues = [play(chat, RIGHT, attempts=2, placed="\\boxed{3}"), play(chat, RIGHT, attempts=1)]
    dialogues += [play(chat, *answers, attempts=2) for answers in ([WRONG, RIGHT], [WRONG, LONG])]
    metrics, generated = rollout.rollout_metrics(dialogues), 5 * len(chat.encode(RIGHT)) + 16
    expected = {  # accuracies of those that the policy began itself
        "reward": (1 + 1 + 1 - 0.5) / 4, "accuracy": 2 / 3, "attempts_used": 6 / 4,
        "tokens": sum(len(d.ids) for d in dialogues), "generated": generated, "attempt_length": generated / 6,
        "began_offline": 1 / 4, "out_of_context": 0, "accuracy_at_1": 1 / 3, "accuracy_at_2": 1 / 2,
        "ending_stop": 5 / 6, "ending_length": 1 / 6, "ending_context": 0,
        "status_correct": 3 / 6, "status_wrong": 2 / 6, "status_no_answer": 1 / 6, "status_timeout": 0,
    }  # fmt: skip
    assert metrics == pytest.approx(expected)
    change(rollout, FEEDBACK="intrinsic")  # nobody says stop: right at attempt k, whatever came before
    metrics = rollout.rollout_metrics([play(chat, RIGHT, WRONG, attempts=2), play(chat, RIGHT, RIGHT, attempts=2)])
    assert (metrics["accuracy_at_1"], metrics["accuracy_at_2"], metrics["accuracy"]) == (1.0, 0.5, 0.5)


# Draws, offline attempts, what is refused -----------------------------------------------------------------------------
def test_attempts_are_drawn_uniformly_and_alike_for_samples_of_a_problem(change):
    assert rollout.random_number("attempts", 1) == 720999386  # in every process and version
    change(rollout, MIN_ATTEMPTS=2, SAMPLES_PER_PROMPT=4)
    draws, other = ([rollout.draw_attempts(s, step, i) for step in range(20) for i in range(800)] for s in (0, 1))
    assert all(len(set(draws[i : i + 4])) == 1 for i in range(0, 16_000, 4)) and draws != other
    counts = Counter(draws[::4])
    assert set(counts) == {2, 3, 4, 5} and all(880 < count < 1120 for count in counts.values())  # 1000 +- 4 x 27


def test_a_placed_attempt_reads_as_if_it_had_been_sampled(chat, change):
    """But it is no action and earns nothing; SCoRe's bonus compares with it."""
    change(rollout, REWARD="score_stage2")
    sampled = play(chat, WRONG, RIGHT, attempts=3)
    placed = play(chat, RIGHT, attempts=3, placed="\\boxed{3}")
    second = placed.attempts[1]
    assert placed.ids == sampled.ids and second.end == sampled.attempts[1].end
    assert placed.mask == [int(second.start <= t < second.end) for t in range(len(placed.ids))]
    assert [a.reward for a in placed.attempts] == [0.0, 16.0]  # 1 + 10 (1 - -0.5)
    for attempts, context in ((1, rollout.CONTEXT), (2, second.start)):  # none could follow
        change(rollout, CONTEXT=context)
        d = rollout.new_dialogue(chat, PROBLEM, attempts)
        assert not rollout.place_attempt(chat, d, "\\boxed{3}", "3", "wrong")
        assert d == rollout.new_dialogue(chat, PROBLEM, attempts)


def test_offline_attempts_are_those_at_these_problems(change, tmp_path):
    path, firsts = tmp_path / "dialogues-base.jsonl", [{"status": status} for status in ("correct", "wrong")]
    records = [{"benchmark": "train", "id": "p", "attempts": [first, firsts[0]]} for first in firsts]
    append_jsonl(path, [*records, records[1] | {"benchmark": "other"}, records[1] | {"id": "q"}])
    assert rollout.load_offline([PROBLEM], "train") == {}
    change(rollout, OFFLINE_ATTEMPTS=str(path))
    assert rollout.load_offline([PROBLEM], "train") == {"p": firsts[1:]}  # a right one needs no second
    change(rollout, FEEDBACK="intrinsic")
    assert rollout.load_offline([PROBLEM], "train") == {"p": firsts}
    with pytest.raises(SystemExit, match="no attempt to use at the problems of 'nothing'"):
        rollout.load_offline([PROBLEM], "nothing")


def test_offline_attempts_begin_their_share_of_the_dialogues(chat, change):
    """By the key alone, which samples of a problem share."""
    change(rollout, OFFLINE_SHARE=0.3)
    offline, begun = [{"text": "", "answer": answer, "status": "wrong"} for answer in "12"], []
    for index in (*range(600), *range(600)):
        begun.append(rollout.new_dialogue(chat, PROBLEM, 2))
        rollout.begin_offline(chat, begun[-1], offline, "seed", index)
    assert begun[:600] == begun[600:]
    counts = Counter(d.attempts[0].answer if d.attempts else "none" for d in begun[:600])
    # Binomial, four standard deviations: 420 +- 45 without, 90 +- 35 of each of the two
    assert abs(counts["none"] - 420) < 45 and all(abs(counts[a] - 90) < 35 for a in "12")
