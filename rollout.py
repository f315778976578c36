"""Play multi-attempt dialogues (arXiv 2503.04808, section 2) with vLLM: prompts, the attempt loop, rewards.

1. A dialogue grants N ~ Uniform{MIN_ATTEMPTS..MAX_ATTEMPTS} attempts; the system prompt says how many.
2. After a wrong attempt the environment says so, and how many are left; a right one or the N-th ends the dialogue.
   SCoRe (arXiv 2409.12917) is a constant away: there nobody says whether an attempt was right.
3. An attempt is graded as soon as it ends, and its retry joins everyone else's attempts in the engine's queue.
4. Token ids go in and come out. Text is never tokenised twice, and the action mask is never searched for afterwards.

    python rollout.py                              # plays four dialogues with the toy model and prints them
    python rollout.py MODEL=folder PROBLEMS=my.jsonl MAX_ATTEMPTS=3
"""

import concurrent.futures
import dataclasses
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import grader
from data.problems import load_problems, random_number
from plumbing import engine as engine_module
from plumbing import sandbox
from plumbing.chat import Chat, load_tokenizer, show_dialogue
from plumbing.constants import Count, Share, require, set_constants
from plumbing.engine import Engine
from plumbing.files import read_jsonl

from tqdm import tqdm

# The task -------------------------------------------------------------------------------------------------------------
MIN_ATTEMPTS: Count = 1  # attempts; smallest N of a training dialogue (paper 1, SCoRe 2)
MAX_ATTEMPTS: Count = 5  # attempts; largest N of a training dialogue, K of an evaluation (paper 5, SCoRe 2)
PROMPT: Literal["multi_attempt", "single_turn"] = "multi_attempt"  # single_turn does not state N (the paper's baseline)
FEEDBACK: Literal["verified", "intrinsic"] = "verified"  # told when wrong, stop when right; or never told (SCoRe)
TOLD_CHARACTERS: int = 0  # of a program's failing public test and its error that "verified" quotes (not in the papers)
SYSTEM_TURNS: bool = True  # 0: instructions and verdicts are user turns, for chat templates without system turns
MAX_ATTEMPT_TOKENS: Count = 3000  # tokens; an attempt is cut there (paper: 3000 over all attempts together)
CONTEXT: Count = 4096  # tokens; prompt and all attempts of a dialogue together (paper 4024)

# Rewards: those of the paper's code; SCoRe pays 1, 0 and 0 ------------------------------------------------------------
REWARD: Literal["outcome", "per_attempt", "score_stage1", "score_stage2"] = "outcome"  # see attempt_rewards
REWARD_CORRECT: float = 1.0  # of a right answer
REWARD_WRONG: float = -0.5  # of a wrong answer in a complete box
REWARD_NO_ANSWER: float = -1.0  # without a complete box
ATTEMPT_DISCOUNT: float = 1.0  # success at attempt k earns REWARD_CORRECT * ATTEMPT_DISCOUNT^(k-1) (paper 1: explore)
SCORE_ALPHA: float = 10.0  # weight of the progress bonus of "score_stage2" (SCoRe 10)

# First attempts of another policy (SCoRe, section 5.3) ----------------------------------------------------------------
OFFLINE_ATTEMPTS: str = ""  # a dialogues-*.jsonl of evaluate.py whose first attempts begin some dialogues; "" = none
OFFLINE_SHARE: Share = 0.5  # share of the dialogues with N > 1 that begin so, where there is one (not in the papers)

# Sampling -------------------------------------------------------------------------------------------------------------
SAMPLES_PER_PROMPT: Count = 1  # dialogues of a problem in a rollout, which share N (paper 1; in groups 4 and more)

if __name__ == "__main__":  # constants of `python rollout.py` alone; the other stages have their own
    MODEL: str = "data/toy/warm_start"  # folder or hub name
    PROBLEMS: str = "data/toy/test.jsonl"  # problems to play
    DIALOGUES: Count = 4  # how many to play and print
    TEMPERATURE: float = 1.0  # of sampling; 0 is greedy
    SEED: int = 0  # of N and of sampling

# What is said, to the letter of the papers' code ----------------------------------------------------------------------
SAY_SINGLE = "Please reason step by step, and put your final answer within \\boxed{}."
SAY_MULTI = (
    SAY_SINGLE + " You have {attempts} attempts to answer the questions, and you should provide the full "
    "reasoning steps in each attempt."
)
SAY_PROGRAM = ("put your final answer within \\boxed{}", "put your final program in a Python code block")  # not theirs
SAY_WRONG = "Your answer is incorrect. You have {attempts} attempts left. Try an alternative."
SAY_CHECK = (  # SCoRe, appendix C, whose last sentence asks for "Final Answer: ..." where ours asks for a box
    "There might be an error in the solution above because of lack of understanding of the question. Please correct "
    "the error, if any, and rewrite the solution. Only output the final solution! At the end of the Solution, put your "
    "final answer within \\boxed{}."
)
SAY_CHECK_PROGRAM = (
    "# There might be an error in the code above because of lack of understanding of the question. Please correct the "
    "error, if any, and rewrite the solution. Only output the final correct Python program!"
)
STATUSES = ("correct", "wrong", "no_answer", "timeout")
ENDINGS = ("stop", "length", "context")


# The record of the program --------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Attempt:
    start: int  # position in Dialogue.ids of the attempt's first token
    end: int  # one past its last
    answer: str | None  # the content of the last complete box, or the program
    status: str  # the grader's, one of STATUSES
    ending: str  # what ended it: the policy ("stop"), MAX_ATTEMPT_TOKENS ("length") or a full CONTEXT ("context")
    reward: float = 0.0  # paid at the last action
    advantage: float = 0.0  # where the trainer has no critic
    failed: str = ""  # of a program: the test that it failed first, and the error
    own: bool = True  # False: made by another policy, and none of its tokens is an action (OFFLINE_ATTEMPTS)


@dataclasses.dataclass
class Dialogue:
    problem: dict[str, Any]  # {"id", "question", "answer", ...}; with "tests" in place of "answer" for a program
    max_attempts: int  # N
    ids: list[int] = dataclasses.field(default_factory=list)  # prompt, attempts and feedback as the model saw them
    mask: list[int] = dataclasses.field(default_factory=list)  # 1 = sampled by the policy (an action), 0 = environment
    logprobs: list[float] = dataclasses.field(default_factory=list)  # the sampler's, of each action; 0 elsewhere
    attempts: list[Attempt] = dataclasses.field(default_factory=list)

    def append(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Add environment ids or, with their log-probabilities, actions."""
        self.ids += ids
        self.mask += [0 if logprobs is None else 1] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs

    @property
    def attempts_left(self) -> int:
        return self.max_attempts - len(self.attempts)

    def solved_within(self, k: int) -> bool:
        """Right by attempt k; where nobody says stop, right at attempt k (SCoRe's Acc@t)."""
        counted = self.attempts[k - 1 : k] if FEEDBACK == "intrinsic" else self.attempts[:k]
        return any(attempt.status == "correct" for attempt in counted)

    @property
    def out_of_context(self) -> bool:
        """Whether a full CONTEXT ended it before its last attempt."""
        was_solved = FEEDBACK == "verified" and self.solved_within(self.max_attempts)
        return self.attempts_left > 0 and not was_solved


# A dialogue's beginning -----------------------------------------------------------------------------------------------
def draw_attempts(seed: int, step: int, index: int) -> int:
    """N of dialogue `index` in `step`: uniform over {MIN_ATTEMPTS..MAX_ATTEMPTS} (paper, section 2). The
    SAMPLES_PER_PROMPT dialogues of a problem, which follow each other, share it: only then are they a group."""
    draw = random_number("attempts", seed, step, index // SAMPLES_PER_PROMPT)
    return MIN_ATTEMPTS + draw % (MAX_ATTEMPTS - MIN_ATTEMPTS + 1)


def make_chat(tokenizer: Any) -> Chat:
    """Raises SystemExit if the tokenizer's chat template cannot say what a dialogue needs."""
    chat = Chat(tokenizer, SYSTEM_TURNS)
    encode_prompt(chat, "?", MAX_ATTEMPTS)
    if MAX_ATTEMPTS > 1:
        encode_feedback(chat, 1)
    return chat


def encode_prompt(chat: Chat, question: str, max_attempts: int, for_program: bool = False) -> list[int]:
    system = SAY_MULTI.replace("{attempts}", str(max_attempts)) if PROMPT == "multi_attempt" else SAY_SINGLE
    return chat.prompt(system.replace(*SAY_PROGRAM) if for_program else system, question)


def encode_feedback(chat: Chat, attempts_left: int, for_program: bool = False, told: str = "") -> list[int]:
    if FEEDBACK == "intrinsic":
        return chat.reply("user", SAY_CHECK_PROGRAM if for_program else SAY_CHECK)
    quoted = chat.quote(f"\n{told}", TOLD_CHARACTERS)
    return chat.reply("system", SAY_WRONG.replace("{attempts}", str(attempts_left)) + quoted)


def new_dialogue(chat: Chat, problem: dict[str, Any], max_attempts: int) -> Dialogue:
    dialogue = Dialogue(problem, max_attempts)
    dialogue.append(encode_prompt(chat, problem["question"], max_attempts, "tests" in problem))
    return dialogue


def drop_long_problems(chat: Chat, problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The problems whose prompt leaves room for an attempt in CONTEXT; it says which are left out. Raises SystemExit
    where one asks for a program and programs cannot be run here."""
    sandbox.check_problems(problems)
    fits = [len(new_dialogue(chat, problem, MAX_ATTEMPTS).ids) < CONTEXT for problem in problems]
    dropped = [problem["id"] for problem, fit in zip(problems, fits, strict=True) if not fit]
    if dropped and os.environ.get("RANK", "0") == "0":
        named = ", ".join(dropped[:5]) + (", ..." if len(dropped) > 5 else "")
        print(f"left out, because they fill the context of {CONTEXT} tokens: {len(dropped)} questions ({named})")
    require(any(fits), f"CONTEXT={CONTEXT}: no question leaves room for an answer")
    return [problem for problem, fit in zip(problems, fits, strict=True) if fit]


def place_attempt(chat: Chat, dialogue: Dialogue, text: str, answer: str | None, status: str) -> bool:
    """Append an attempt that the policy did not make, and the feedback to it, as environment. False, and nothing is
    changed, if CONTEXT has no room for it or N no attempt after it."""
    ids = [*chat.encode(text), chat.end_of_turn]
    feedback = encode_feedback(chat, dialogue.attempts_left - 1, "tests" in dialogue.problem)
    start = len(dialogue.ids)
    if dialogue.attempts_left < 2 or start + len(ids) + len(feedback) >= CONTEXT:
        return False
    dialogue.append(ids + feedback)
    dialogue.attempts.append(Attempt(start, start + len(ids), answer, status, "stop", own=False))
    return True


def load_offline(problems: list[dict[str, Any]], benchmark: str) -> dict[str, list[dict[str, Any]]]:
    """OFFLINE_ATTEMPTS' first attempts at these problems, id -> [{"text", "answer", "status"}, ...]; where verdicts are
    told, only wrong ones. benchmark: evaluate.py's name for the problems, which is their file's without its ending."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    known = {problem["id"] for problem in problems}
    for record in read_jsonl(Path(OFFLINE_ATTEMPTS)) if OFFLINE_ATTEMPTS else []:
        if record.get("benchmark") == benchmark and record.get("id") in known:
            first = record["attempts"][:1]
            found[record["id"]] += [a for a in first if FEEDBACK == "intrinsic" or a["status"] != "correct"]
    missing = f"OFFLINE_ATTEMPTS={OFFLINE_ATTEMPTS} has no attempt to use at the problems of {benchmark!r}"
    require(any(found.values()) or not OFFLINE_ATTEMPTS, f"{missing}; evaluate.py writes dialogues-<model>.jsonl")
    return found


def begin_offline(chat: Chat, dialogue: Dialogue, offline: Sequence[dict[str, Any]], *key: int | str) -> None:
    """Begin OFFLINE_SHARE of the dialogues, drawn by key, with one of their problem's offline attempts; the samples of
    a problem, which share the key, share the attempt."""
    if offline and random_number("offline", *key) < OFFLINE_SHARE * 2**31:
        attempt = offline[random_number("which", *key) % len(offline)]
        place_attempt(chat, dialogue, attempt["text"], attempt["answer"], attempt["status"])


# The attempt loop -----------------------------------------------------------------------------------------------------
def submit_attempt(engine: Engine, chat: Chat, index: int, dialogue: Dialogue, seed: int, temperature: float) -> bool:
    """Queue the dialogue's next attempt under the key `index`. False if CONTEXT has no room for one."""
    room = CONTEXT - len(dialogue.ids)
    if room < 1:
        return False
    attempt_seed = random_number(seed, len(dialogue.attempts))
    engine.submit(index, dialogue.ids, min(MAX_ATTEMPT_TOKENS, room), temperature, attempt_seed, chat.end_of_turn)
    return True


def grade_attempt(chat: Chat, dialogue: Dialogue, ids: list[int], logprobs: list[float], stopped: bool) -> Future:
    """Append a sampled attempt -> the verdict on it, which may take a moment."""
    start = len(dialogue.ids)
    dialogue.append(ids, logprobs)
    limit = "context" if len(dialogue.ids) >= CONTEXT else "length"
    dialogue.attempts.append(Attempt(start, len(dialogue.ids), None, "no_answer", "stop" if stopped else limit))
    response, problem = chat.decode(ids, skip_special_tokens=True), dialogue.problem
    return grader.submit(response, grader.read_gold(problem), problem.get("tolerance"), problem["question"])


def give_feedback(chat: Chat, dialogue: Dialogue, verdict: grader.Verdict) -> bool:
    """Write down the verdict; append feedback if another attempt may follow. False if the dialogue has ended."""
    attempt = dialogue.attempts[-1]
    attempt.answer, attempt.status, attempt.failed = verdict.answer, verdict.status, verdict.failed
    if dialogue.attempts_left < 1 or (verdict.correct and FEEDBACK == "verified"):
        return False
    feedback = encode_feedback(chat, dialogue.attempts_left, "tests" in dialogue.problem, verdict.told)
    if dialogue.ids[-1] != chat.end_of_turn:  # cut, or ended by another id: the environment closes the turn
        feedback = [chat.end_of_turn, *feedback]
    if len(dialogue.ids) + len(feedback) >= CONTEXT:
        return False
    dialogue.append(feedback)
    return True


def play(
    engine: Engine,
    chat: Chat,
    dialogues: list[Dialogue],
    seeds: list[int],
    temperature: float,
    progress: str | None = None,
    on_end: Callable[[int], None] = lambda index: None,
) -> list[Dialogue]:
    """Play dialogues to their end, in place.

    dialogues: a prompt each, perhaps with attempts in it already (play continues after the last one's feedback).
    seeds: one for each dialogue, which depends on it and on nothing else that is queued. temperature: 0 is greedy.
    progress: label of a progress bar, or None. on_end(index) is called when dialogue `index` has ended.
    A dialogue whose prompt fills the context ends without an attempt.
    """
    verdicts: dict[int, Future] = {}  # dialogue -> the verdict on its last attempt, while that is being graded
    bar = tqdm(total=len(dialogues), desc=progress, unit=" dialogues", disable=progress is None, leave=False, delay=2)

    def submit(index: int) -> bool:
        return submit_attempt(engine, chat, index, dialogues[index], seeds[index], temperature)

    # Those with most attempts before them first, so that the end of the queue, where the engine empties, is short.
    queue = sorted(range(len(dialogues)), key=lambda index: -dialogues[index].attempts_left)
    ended = [index for index in queue if not submit(index)]
    solved = attempts = tokens = 0
    start = time.perf_counter()
    while True:
        for index in ended:
            solved += dialogues[index].solved_within(dialogues[index].max_attempts)
            bar.update()
            on_end(index)
        speed = tokens / (time.perf_counter() - start)
        bar.set_postfix_str(f"{attempts} attempts, {speed:,.0f} tokens/s, solved {solved / max(1, bar.n):.2f}", False)
        if not engine.busy and not verdicts:
            break
        for sample in engine.step() if engine.busy else []:
            dialogue = dialogues[sample.key]
            verdicts[sample.key] = grade_attempt(chat, dialogue, sample.ids, sample.logprobs, sample.stopped)
            attempts, tokens = attempts + 1, tokens + len(sample.ids)
        if not engine.busy:  # nothing to generate until a verdict arrives
            concurrent.futures.wait(verdicts.values(), return_when=concurrent.futures.FIRST_COMPLETED)
        graded = [index for index, verdict in verdicts.items() if verdict.done()]
        ended = []
        for index in graded:
            continues = give_feedback(chat, dialogues[index], verdicts.pop(index).result())
            if not (continues and submit(index)):
                ended.append(index)
    bar.close()
    return dialogues


# Rewards --------------------------------------------------------------------------------------------------------------
def attempt_rewards(statuses: Sequence[str], method: str) -> list[float]:
    """The reward of each attempt of a dialogue from the grader's statuses; method: what REWARD may be.

    The value v_k of attempt k alone is REWARD_CORRECT * ATTEMPT_DISCOUNT^(k-1), REWARD_WRONG, or REWARD_NO_ANSWER
    without a complete box; here 1, -0.5 and -1.

    "outcome" (paper, section 2) is one number for the whole dialogue, on its last attempt: the value of the first right
    attempt; REWARD_WRONG if none was right but some had a box; else REWARD_NO_ANSWER.
    >>> attempt_rewards(["wrong", "correct"], "outcome"), attempt_rewards(["wrong", "no_answer"], "outcome")
    ([0.0, 1.0], [0.0, -0.5])

    "per_attempt" is r_k = v_k.
    >>> attempt_rewards(["no_answer", "wrong", "correct"], "per_attempt")
    [-1.0, -0.5, 1.0]

    "score_stage1" (SCoRe, eq. 3) pays the last attempt alone; those before it are held by their KL coefficient.
    >>> attempt_rewards(["correct", "wrong"], "score_stage1")
    [0.0, -0.5]

    "score_stage2" (SCoRe, eq. 4, section 5.2) is r_1 = v_1, r_k = v_k + SCORE_ALPHA (v_k - v_{k-1}). Progress is paid,
    and to spoil a right answer costs. With SCoRe's 1 and 0 the second attempt earns 1 (right, still right), 11
    (corrected), -10 (spoilt) or 0; with ours
    >>> [attempt_rewards(s, "score_stage2")[1] for s in (["correct"] * 2, ["wrong", "correct"], ["correct", "wrong"])]
    [1.0, 16.0, -15.5]
    """

    def value(number: int, status: str) -> float:
        if status == "correct":
            return REWARD_CORRECT * ATTEMPT_DISCOUNT ** (number - 1)
        return REWARD_NO_ANSWER if status == "no_answer" else REWARD_WRONG  # a timeout counts as wrong

    values = [value(number, status) for number, status in enumerate(statuses, 1)]
    if method == "per_attempt" or not values:
        return values
    if method == "score_stage2":
        return [v + SCORE_ALPHA * (v - before) for v, before in zip(values, [values[0], *values], strict=False)]
    if method == "score_stage1":
        last = values[-1]
    elif "correct" in statuses:
        last = values[statuses.index("correct")]
    else:
        last = REWARD_NO_ANSWER if set(statuses) == {"no_answer"} else REWARD_WRONG
    return [0.0] * (len(values) - 1) + [last]


def assign_rewards(dialogue: Dialogue) -> None:
    """Give each attempt its reward by REWARD. An attempt of another policy gets none. Nor does SCoRe's stage I pay for
    an attempt after which the context was full: it would pay a first attempt, which that stage must not."""
    rewards = attempt_rewards([attempt.status for attempt in dialogue.attempts], REWARD)
    cut_short = REWARD == "score_stage1" and dialogue.out_of_context
    for attempt, reward in zip(dialogue.attempts, rewards, strict=True):
        attempt.reward = reward if attempt.own and not cut_short else 0.0


def token_rewards(dialogue: Dialogue) -> list[float]:
    """(T,) the reward of each attempt at its last action, 0 elsewhere."""
    rewards = [0.0] * len(dialogue.ids)
    for attempt in dialogue.attempts:
        rewards[attempt.end - 1] += attempt.reward
    return rewards


# What a rollout is measured by ----------------------------------------------------------------------------------------
def rollout_metrics(dialogues: Sequence[Dialogue]) -> dict[str, float]:
    """Means over all dialogues of a step, or over the policy's own attempts. accuracy_at_k is solved_within(k) over
    dialogues that grant k attempts and that the policy began itself."""
    attempts = [a for d in dialogues for a in d.attempts if a.own]
    begun = [d for d in dialogues if all(a.own for a in d.attempts)]
    generated = sum(sum(d.mask) for d in dialogues)
    metrics = {
        "reward": sum(a.reward for a in attempts) / len(dialogues),
        "accuracy": sum(d.solved_within(d.max_attempts) for d in begun) / max(1, len(begun)),
        "attempts_used": len(attempts) / len(dialogues),
        "tokens": sum(len(d.ids) for d in dialogues),
        "generated": generated,
        "attempt_length": generated / len(attempts),
        "began_offline": 1 - len(begun) / len(dialogues),
        "out_of_context": statistics.fmean(d.out_of_context for d in dialogues),
    }
    for ending in ENDINGS:
        metrics[f"ending_{ending}"] = statistics.fmean(a.ending == ending for a in attempts)
    for status in STATUSES:
        metrics[f"status_{status}"] = statistics.fmean(a.status == status for a in attempts)
    for k in range(1, MAX_ATTEMPTS + 1):
        if granted := [d for d in begun if d.max_attempts >= k]:
            metrics[f"accuracy_at_{k}"] = statistics.fmean(d.solved_within(k) for d in granted)
    return metrics


# python rollout.py ----------------------------------------------------------------------------------------------------
def check_constants() -> None:
    """Raises SystemExit where constants do not fit each other."""
    require(MIN_ATTEMPTS <= MAX_ATTEMPTS, f"MIN_ATTEMPTS={MIN_ATTEMPTS} is more than MAX_ATTEMPTS={MAX_ATTEMPTS}")
    if OFFLINE_ATTEMPTS:
        require(MAX_ATTEMPTS > 1, "OFFLINE_ATTEMPTS needs MAX_ATTEMPTS of 2 or more")
        require(REWARD != "outcome", "OFFLINE_ATTEMPTS needs a REWARD that pays attempts one by one")


def main() -> None:
    modules = {"rollout": sys.modules[__name__], "grader": grader, "engine": engine_module, "sandbox": sandbox}
    print(set_constants(sys.argv[1:], modules))
    check_constants()
    chat = make_chat(load_tokenizer(MODEL))
    problems = drop_long_problems(chat, load_problems(PROBLEMS)[:DIALOGUES])
    engine = Engine(MODEL, CONTEXT, seed=SEED)
    dialogues = [new_dialogue(chat, p, draw_attempts(SEED, 0, i)) for i, p in enumerate(problems)]
    seeds = [random_number(SEED, index) for index in range(len(problems))]
    for dialogue in play(engine, chat, dialogues, seeds, TEMPERATURE):
        assign_rewards(dialogue)
        print("=" * 80, show_dialogue(chat, dialogue), sep="\n")
    engine.shutdown()


if __name__ == "__main__":
    main()
