"""Play multi-attempt dialogues (arXiv 2503.04808, section 2) with vLLM: prompts, the attempt loop, reward assignment.

1. A dialogue grants N ~ Uniform{MIN_ATTEMPTS..MAX_ATTEMPTS} attempts; the system prompt says how many.
2. After a wrong attempt the environment says so and how many are left; a right one or the N-th ends the dialogue.
   SCoRe (arXiv 2409.12917) is a constant away: there nobody says whether an attempt was right.
3. The loop is continuous: the moment an attempt ends it is graded, and its retry joins everyone else's attempts in the
   engine's queue. Nobody waits for the slowest dialogue of a batch.
4. Token ids go in, token ids come out. Text is never tokenised twice; the action mask is carried, never searched for.

    python rollout.py                              # plays four dialogues with the toy model and prints them
    python rollout.py MODEL=folder PROBLEMS=my.jsonl MAX_ATTEMPTS=3
"""

import bisect
import concurrent.futures
import dataclasses
import difflib
import gc
import hashlib
import json
import os
import sys
import time
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
from tqdm import tqdm
from transformers import AutoTokenizer

import grader
from data.problems import find_rows, load_problems

# The task -------------------------------------------------------------------------------------------------------------
MIN_ATTEMPTS: int = 1  # attempts; smallest N of a training dialogue (paper 1, SCoRe 2)
MAX_ATTEMPTS: int = 5  # attempts; largest N of a training dialogue, K of an evaluation (paper 5, SCoRe 2)
PROMPT: str = "multi_attempt"  # "multi_attempt": the prompt states N; "single_turn": it does not (the paper's baseline)
FEEDBACK: str = "verified"  # "verified": told when wrong, stop when right; "intrinsic": N attempts, never told (SCoRe)
REPEAT_QUESTION: bool = False  # 1: feedback repeats the question in a user turn (the reference's option; paper 0)
SYSTEM_TURNS: bool = True  # 0: instructions and verdicts are user turns, for chat templates without system turns
MAX_ATTEMPT_TOKENS: int = 3000  # tokens; an attempt is cut there (paper: 3000 over all attempts together)
CONTEXT: int = 4096  # tokens; prompt and all attempts of a dialogue together (paper 4024)
LEAVE_OUT_LONG: bool = False  # 1: training leaves out, and names, questions that fill the context; 0: it does not start
STOP_AT: str = "end_of_turn"  # or "first_box": what was sampled behind it is thrown away (nearly the reference's rule)
# Rewards; the values are those of the paper's code, SCoRe's are 1, 0 and 0 --------------------------------------------
REWARD: str = "outcome"  # "outcome" (paper), "per_attempt", "score_stage1" or "score_stage2": see assign_rewards
REWARD_CORRECT: float = 1.0  # of a right answer
REWARD_WRONG: float = -0.5  # of a wrong answer in a complete box
REWARD_NO_ANSWER: float = -1.0  # of no complete box
ATTEMPT_DISCOUNT: float = 1.0  # success at attempt k earns REWARD_CORRECT * ATTEMPT_DISCOUNT^(k-1) (paper 1: explore)
SCORE_ALPHA: float = 10.0  # weight of the progress bonus of "score_stage2" (SCoRe 10)
# First attempts of someone else (SCoRe, section 5.3) ------------------------------------------------------------------
OFFLINE_ATTEMPTS: str = ""  # a dialogues-*.jsonl of evaluate.py: first attempts to put before the policy's; "" = none
OFFLINE_SHARE: float = 0.5  # share of the dialogues with N > 1 that begin so, where there is one (not in the papers)
# Sampling -------------------------------------------------------------------------------------------------------------
SAMPLES_PER_PROMPT: int = 1  # dialogues of a problem in a rollout, which share N (paper 1; group baselines 4 and more)
TEMPERATURE: float = 1.0  # of the dialogues that this file plays; training insists on 1 (as the paper)
SEED_ATTEMPTS: bool = True  # a seed for each attempt: no sample depends on scheduling; slower, off in preset "paper"
MAX_SEQUENCES: int = 256  # sequences decoded at once by one engine; more is faster until the KV cache is full
TENSOR_PARALLEL: int = 1  # ranks that share one engine; 1 is fastest for models that fit into one GPU
GPU_MEMORY: float = 0.5  # share of a GPU's memory that the engine may take; the trainer lives in the rest (paper 0.5)
CPU_CACHE_MIB: int = 512  # MiB of KV cache of the CPU engine
CPU_PACK_MIB: int = 2  # MiB; larger matrices are packed for the CPU engine: faster products, slower weight transfers
# The command line of this file ----------------------------------------------------------------------------------------
MODEL: str = "data/toy/warm_start"  # folder or hub name
PROBLEMS: str = "data/toy/test.jsonl"  # problems to play
DIALOGUES: int = 4  # how many to play and print
SEED: int = 0

CHOICES = {  # constant -> what it may be
    "PROMPT": ("multi_attempt", "single_turn"),
    "FEEDBACK": ("verified", "intrinsic"),
    "STOP_AT": ("end_of_turn", "first_box"),
    "REWARD": ("outcome", "per_attempt", "score_stage1", "score_stage2"),
}

# What is said, to the letter of the papers' code ----------------------------------------------------------------------
SAY_SINGLE = "Please reason step by step, and put your final answer within \\boxed{}."
SAY_MULTI = (
    SAY_SINGLE + " You have {attempts} attempts to answer the questions, and you should provide the full "
    "reasoning steps in each attempt."
)
SAY_WRONG = "Your answer is incorrect. You have {attempts} attempts left. Try an alternative."
SAY_MULTI_REPEAT = SAY_SINGLE + " You have {attempts} attempts to answer the question."
SAY_WRONG_REPEAT = "Your answer is incorrect. Try an alternative. You have {attempts} attempts to answer the question."
SAY_CHECK = (  # SCoRe, appendix C, whose last sentence asks for "Final Answer: ..." where ours asks for a box
    "There might be an error in the solution above because of lack of understanding of the question. Please correct "
    "the error, if any, and rewrite the solution. Only output the final solution! At the end of the Solution, put your "
    "final answer within \\boxed{}."
)
STATUSES = ("correct", "wrong", "no_answer", "timeout")
ENDINGS = ("stop", "length", "context", "box")


# The record of the program --------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Attempt:
    start: int  # position in Dialogue.ids of the attempt's first token
    end: int  # one past its last
    answer: str | None  # what stood in the last complete box
    status: str  # the grader's, one of STATUSES
    ending: str  # one of ENDINGS: the policy's end of turn, MAX_ATTEMPT_TOKENS, a full CONTEXT, or STOP_AT="first_box"
    reward: float = 0.0  # placed on the last action
    advantage: float = 0.0  # over other attempts, where the trainer has no critic
    own: bool = True  # False: the policy has not made it, and none of its tokens is an action (OFFLINE_ATTEMPTS)


@dataclasses.dataclass
class Dialogue:
    problem: dict[str, Any]  # {"id", "question", "answer", ...}
    max_attempts: int  # N
    ids: list[int] = dataclasses.field(default_factory=list)  # prompt, attempts and feedback as the model saw them
    mask: list[int] = dataclasses.field(default_factory=list)  # 1 = sampled by the policy (an action), 0 = environment
    logprobs: list[float] = dataclasses.field(default_factory=list)  # the sampler's, of each action; 0 elsewhere
    attempts: list[Attempt] = dataclasses.field(default_factory=list)

    def extend(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Append environment ids, or actions when their log-probabilities are given."""
        self.ids += ids
        self.mask += [int(logprobs is not None)] * len(ids)
        self.logprobs += logprobs if logprobs is not None else [0.0] * len(ids)

    @property
    def solved_at(self) -> int | None:
        """Number (from 1) of the attempt that was right; None if none was."""
        return next((k for k, a in enumerate(self.attempts, 1) if a.status == "correct"), None)

    def solved_within(self, k: int) -> bool:
        """Right by attempt k; where nobody says stop, right at attempt k (SCoRe's Acc@t)."""
        right = [attempt.status == "correct" for attempt in self.attempts[:k]]
        return any(right[k - 1 :] if FEEDBACK == "intrinsic" else right)

    @property
    def out_of_context(self) -> bool:
        """Whether CONTEXT ended it before its last attempt."""
        return len(self.attempts) < self.max_attempts and (self.solved_at is None or FEEDBACK == "intrinsic")


# Constants from the command line --------------------------------------------------------------------------------------


def check_constants() -> None:
    """Raises SystemExit, naming the constant, where one of this file cannot be."""
    for name, allowed in CHOICES.items():
        if globals()[name] not in allowed:
            raise SystemExit(f"{name}={globals()[name]}: must be one of {', '.join(allowed)}")
    if not 1 <= MIN_ATTEMPTS <= MAX_ATTEMPTS:
        raise SystemExit(f"1 <= MIN_ATTEMPTS={MIN_ATTEMPTS} <= MAX_ATTEMPTS={MAX_ATTEMPTS} must hold")
    if not 0 <= OFFLINE_SHARE <= 1:
        raise SystemExit(f"OFFLINE_SHARE={OFFLINE_SHARE}: must be a share, from 0 to 1")
    if OFFLINE_ATTEMPTS and (REWARD == "outcome" or MAX_ATTEMPTS == 1):
        raise SystemExit("OFFLINE_ATTEMPTS needs MAX_ATTEMPTS of 2 or more, and a REWARD that pays attempts one by one")
    at_least_1 = ("MAX_ATTEMPT_TOKENS", "CONTEXT", "SAMPLES_PER_PROMPT", "MAX_SEQUENCES", "TENSOR_PARALLEL")
    for name in (*at_least_1, "CPU_CACHE_MIB", "DIALOGUES"):
        if globals()[name] < 1:
            raise SystemExit(f"{name}={globals()[name]}: must be at least 1")
    for name in ("TEMPERATURE", "CPU_PACK_MIB"):
        if globals()[name] < 0:
            raise SystemExit(f"{name}={globals()[name]}: must not be negative")
    if not 0 < GPU_MEMORY < 1:
        raise SystemExit(f"GPU_MEMORY={GPU_MEMORY}: must be a share between 0 and 1")


# Problems -------------------------------------------------------------------------------------------------------------
def check_lengths(chat: "Chat", problems: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """The problems whose prompt leaves room for an attempt in CONTEXT. Raises SystemExit, naming the others, if there
    are any and LEAVE_OUT_LONG does not say to go on without them, or if none is left."""
    fit = [p for p in problems if len(chat.prompt(p["question"], MAX_ATTEMPTS)) < CONTEXT]
    if len(fit) < len(problems):
        kept = {p["id"] for p in fit}
        long = [p["id"] for p in problems if p["id"] not in kept]
        named = ", ".join(find_rows(path, long[:5])) + (" ..." if len(long) > 5 else "")
        what = f"{path}: {len(long)} of {len(problems)} questions fill the context of {CONTEXT} tokens: {named}"
        if not LEAVE_OUT_LONG or not fit:
            raise SystemExit(f"{what}; shorten or remove them, raise CONTEXT, or train without them: LEAVE_OUT_LONG=1")
        if os.environ.get("RANK", "0") == "0":
            print(f"{what}; left out")
    return fit


# Prompts --------------------------------------------------------------------------------------------------------------


# The engine: every vLLM call of the program ---------------------------------------------------------------------------


def pack_large_only(pack: Callable[..., None]) -> Callable[..., None]:
    """vLLM's choice of a layer's product on a CPU, but for large matrices only, and without taking their weights away.
    With oneDNN's packed ones a model of 505 MB generated two to three times as fast as with plain ones, one of 16 MB no
    faster; to pack them, at each transfer, takes about five times as long as to copy them."""
    import torch
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    def choose(layer: Any, remove_weight: bool = False) -> None:
        if layer.weight.nbytes > CPU_PACK_MIB << 20 and type(layer) is not VocabParallelEmbedding:  # that is no product
            pack(layer, remove_weight=False)
        else:
            layer.cpu_linear = torch.nn.functional.linear

    return choose


def learn_places(model: Any, named_tensors: Iterable[tuple[str, Any]]) -> tuple[dict[str, list[tuple]], list[str]]:
    """Let vLLM's own loader fill the model, and learn from it what goes where. The loader takes some fifty microseconds
    of Python to find each tensor's place; who knows the places has only to copy.

    Returns name of a tensor -> the parts of the engine's memory that it fills, each with the cut of the tensor that
    goes there (None: all of it); and the names of tensors whose bits are not there afterwards, and of parameters that
    were not filled. Raises RuntimeError if the engine keeps weights in a form of its own.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    forms = {type(m.quant_method).__name__ for m in model.modules() if getattr(m, "quant_method", None) is not None}
    forms |= {type(m).__name__ for m in model.modules() if hasattr(m, "W_UV")}  # multi-head latent attention
    if forms := forms - {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}:
        raise RuntimeError(f"vLLM makes something else of this model's weights ({', '.join(forms)}): not transferable")
    parameters = {address(parameter): name for name, parameter in model.named_parameters()}
    loading: dict[int, tuple[str, Any]] = {}  # address -> name and tensor, of the one that is being loaded
    places: dict[str, list[tuple]] = {}
    sums = []  # (name of a tensor, part that was filled, sum of the bits that went there)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.aten.copy_.default and address(arguments[0]) in parameters:
                part, source = arguments[:2]
                if address(source) not in loading:
                    name = parameters[address(part)]
                    raise RuntimeError(f"vLLM makes something of the trainer's weights before it copies them to {name}")
                name, whole = loading[address(source)]
                places[name].append((part, same_cut(source, whole)))
                sums.append((name, part, bit_sum(source.to(part.dtype))))
            return function(*arguments, **(options or {}))

    def stream() -> Iterable[tuple[str, Any]]:
        for name, tensor in named_tensors:
            tensor = tensor.contiguous()
            loading.clear()
            loading[address(tensor)] = name, tensor
            places[name] = []
            yield name, tensor
        loading.clear()

    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    with Watch():
        model.load_weights(stream())
    left = {name for name, parts in places.items() if not parts}
    left |= {name for name, part, bits in sums if bit_sum(part) != bits}
    left |= {name for name, parameter in model.named_parameters() if parameter.isnan().any()}
    return places, sorted(left)


def same_cut(source: Any, whole: Any) -> Callable[[Any], Any] | None:
    """What cuts of another contiguous tensor the part that `source` is of `whole`; None if that is all of it."""
    size, stride, offset = source.size(), source.stride(), source.storage_offset() - whole.storage_offset()
    if (size, stride) == (whole.size(), whole.stride()):
        return None
    return lambda tensor: tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def copy_weights(
    holders: list[Any], places: dict[str, list[tuple]], named_tensors: Iterable[tuple[str, Any]], transfers: int
) -> list[str]:
    """Copy each tensor to its places. Returns the names of those that the engine does not hold afterwards: that did not
    come, have no place, whose place is not the model's memory any more, or, of every sixteenth (others at each
    transfer), whose bits are not there.

    holders: the modules of the engine's model that have parameters. transfers: how many there were before.
    """
    checked = set(list(places)[transfers % 16 :: 16])
    left, sums = set(places), []
    for name, tensor in named_tensors:
        if name not in places:
            return [name]
        tensor = tensor.contiguous()
        for part, cut in places[name]:
            source = cut(tensor) if cut else tensor
            part.copy_(source)
            if name in checked:
                sums.append((name, part, bit_sum(source.to(part.dtype))))
        left.discard(name)
    memory = {address(p) for module in holders for p in module._parameters.values() if p is not None}
    left |= {name for name, parts in places.items() for part, _ in parts if address(part) not in memory}
    left |= {name for name, part, bits in sums if bit_sum(part) != bits}
    return sorted(left)


def address(tensor: Any) -> int:
    """Where the memory begins of which a tensor is a part."""
    return tensor.untyped_storage().data_ptr()


def bit_sum(tensor: Any) -> Any:
    """The sum, modulo 2^64, of a tensor's bytes read eight by eight as whole numbers (two by two where that does not go
    up): equal tensors have equal sums, whatever their names. It is as fast as the memory."""
    import torch

    flat = tensor.contiguous().flatten()
    flat = flat.clone() if flat.data_ptr() % 8 else flat
    return flat.view(torch.int16 if flat.nbytes % 8 else torch.int64).sum()


# The attempt loop -----------------------------------------------------------------------------------------------------
def random_number(*key: int | str) -> int:
    """31 random bits that depend on the key alone, not on the process, the order of calls or the number of ranks."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


def draw_attempts(seed: int, step: int, index: int) -> int:
    """N of dialogue `index` in `step`: uniform over {MIN_ATTEMPTS..MAX_ATTEMPTS} (paper, section 2). The
    SAMPLES_PER_PROMPT dialogues of a problem, which follow each other, share it: only then are they a group."""
    draw = random_number("attempts", seed, step, index // SAMPLES_PER_PROMPT)
    return MIN_ATTEMPTS + draw % (MAX_ATTEMPTS - MIN_ATTEMPTS + 1)


def new_dialogue(chat: Chat, problem: dict[str, Any], max_attempts: int) -> Dialogue:
    dialogue = Dialogue(problem, max_attempts)
    dialogue.extend(chat.prompt(problem["question"], max_attempts))
    return dialogue


def place_attempt(chat: Chat, dialogue: Dialogue, text: str, answer: str | None, status: str) -> bool:
    """Put an attempt that the policy has not made, and what the environment says to it, behind a dialogue's ids. None
    of it is an action. False, and nothing is changed, if CONTEXT has no room for it or N no attempt behind it."""
    ids = [*chat.tokenizer(text, add_special_tokens=False)["input_ids"], chat.end_of_turn]
    start, left = len(dialogue.ids), dialogue.max_attempts - len(dialogue.attempts) - 1
    feedback = chat.feedback(dialogue.problem["question"], left)
    if left < 1 or start + len(ids) + len(feedback) >= CONTEXT:
        return False
    dialogue.extend(ids + feedback)
    dialogue.attempts.append(Attempt(start, start + len(ids), answer, status, "stop", own=False))
    return True


def load_offline(problems: list[dict[str, Any]], benchmark: str) -> dict[str, list[tuple]]:
    """OFFLINE_ATTEMPTS' first attempts, of whatever run and sample, at these problems: id -> (text, answer, status)s.

    benchmark: evaluate.py's name for the problems (their file's, without its ending). With a verdict between the
    attempts only those that were not right. Raises SystemExit for a file that is none of evaluate.py's, naming the
    line, or that has nothing on these problems.
    """
    if not OFFLINE_ATTEMPTS:
        return {}
    path, known, found = Path(OFFLINE_ATTEMPTS), {problem["id"] for problem in problems}, defaultdict(list)
    if not path.is_file():
        raise SystemExit(f"OFFLINE_ATTEMPTS={path}: no such file; evaluate.py writes them, dialogues-<model>.jsonl")
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            record = json.loads(line)
            ours = record["benchmark"] == benchmark and record["id"] in known
            firsts = [(a["text"] + "", a["answer"], a["status"]) for a in record["attempts"][:1]]
        except (ValueError, KeyError, TypeError) as error:
            what = f"expected a record of evaluate.py ({type(error).__name__}: {error})"
            raise SystemExit(f"OFFLINE_ATTEMPTS={path}, line {number}: {what}") from error
        found[record["id"]] += [
            first for first in firsts if ours and (FEEDBACK == "intrinsic" or first[2] != "correct")
        ]
    if not any(found.values()):
        raise SystemExit(f"OFFLINE_ATTEMPTS={path} has no attempt to use at the problems of {benchmark!r}")
    return found


def begin_offline(chat: Chat, dialogue: Dialogue, offline: Sequence[tuple], *key: int | str) -> None:
    """Put one of its problem's offline attempts, if there are any, before OFFLINE_SHARE of the dialogues, drawn by key;
    the samples of a problem, which share the key, share the attempt."""
    if offline and random_number("offline", *key) < OFFLINE_SHARE * 2**31:
        place_attempt(chat, dialogue, *offline[random_number("which", *key) % len(offline)])


def cut_behind_box(chat: Chat, ids: list[int]) -> list[int]:
    """An attempt up to the token that closes its first box: what sampling would have been, had it stopped there."""

    def has_box(length: int) -> bool:
        return grader.extract_answer(chat.tokenizer.decode(ids[:length], skip_special_tokens=True)) is not None

    return ids[: bisect.bisect_left(range(len(ids)), True, key=has_box)]


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

    dialogues: fresh (prompt only) or with attempts already in them (they go on behind the last one's feedback).
    seeds: one a dialogue. With SEED_ATTEMPTS, seed and number of the attempt seed that attempt's sampling, and what a
        dialogue becomes does not depend on what else is queued. Without, all of them together seed the call.
    temperature: 0 is greedy.
    progress: label of a progress bar, or None. on_end(index) is called when dialogue `index` has ended.
    A dialogue whose prompt fills the context ends without an attempt.
    """
    grading: dict[int, concurrent.futures.Future] = {}  # dialogue -> the verdict on its last attempt, to come
    bar = tqdm(total=len(dialogues), desc=progress, unit=" dialogues", disable=progress is None, leave=False, delay=2)
    engine.reseed(random_number(*seeds))

    def submit(index: int) -> bool:
        dialogue = dialogues[index]
        room = CONTEXT - len(dialogue.ids)
        if room < 1:
            return False
        seed = random_number(seeds[index], len(dialogue.attempts))
        engine.submit(index, dialogue.ids, min(MAX_ATTEMPT_TOKENS, room), temperature, seed, {chat.end_of_turn})
        return True

    def attempt_ended(index: int, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        dialogue = dialogues[index]
        start = len(dialogue.ids)
        ending = "stop" if stopped else "context" if start + len(ids) >= CONTEXT else "length"
        if STOP_AT == "first_box" and len(kept := cut_behind_box(chat, ids)) < len(ids):
            ids, logprobs, ending = kept, logprobs[: len(kept)], "box"
        dialogue.extend(ids, logprobs)
        dialogue.attempts.append(Attempt(start, start + len(ids), None, "no_answer", ending))
        text = chat.tokenizer.decode(ids, skip_special_tokens=True)
        gold, tolerance = dialogue.problem["answer"], dialogue.problem.get("tolerance")
        grading[index] = grader.submit(text, gold, tolerance)

    def go_on(index: int, verdict: grader.Verdict) -> bool:
        """Take the verdict; True if the dialogue has another attempt in the queue."""
        dialogue = dialogues[index]
        dialogue.attempts[-1].answer, dialogue.attempts[-1].status = verdict.answer, verdict.status
        left = dialogue.max_attempts - len(dialogue.attempts)
        if left < 1 or (verdict.correct and FEEDBACK == "verified"):
            return False
        feedback = chat.feedback(dialogue.problem["question"], left)
        if dialogue.ids[-1] != chat.end_of_turn:  # cut, or ended by another id: the environment closes the turn
            feedback = [chat.end_of_turn, *feedback]
        if len(dialogue.ids) + len(feedback) >= CONTEXT:
            return False
        dialogue.extend(feedback)
        return submit(index)

    # Those with most attempts before them first: the queue's end, where the engine runs empty, is made of short ones.
    queue = sorted(range(len(dialogues)), key=lambda i: len(dialogues[i].attempts) - dialogues[i].max_attempts)
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
        if not engine.busy and not grading:
            break
        for index, ids, logprobs, stopped in engine.step() if engine.busy else []:
            attempt_ended(index, ids, logprobs, stopped)
            attempts, tokens = attempts + 1, tokens + len(ids)
        if not engine.busy:  # nothing to compute until a verdict is in
            concurrent.futures.wait(grading.values(), return_when=concurrent.futures.FIRST_COMPLETED)
        verdicts = engine.agree({index: future.result() for index, future in grading.items() if future.done()})
        for index in verdicts:
            del grading[index]
        ended = [index for index, verdict in verdicts.items() if not go_on(index, verdict)]
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

    "score_stage1" (SCoRe, eq. 3): the last attempt alone is paid; those before it are held by their KL coefficient.
    >>> attempt_rewards(["correct", "wrong"], "score_stage1")
    [0.0, -0.5]

    "score_stage2" (SCoRe, eq. 4, section 5.2): r_1 = v_1, r_k = v_k + SCORE_ALPHA (v_k - v_{k-1}). Progress is paid,
    and to spoil a right answer costs. With SCoRe's 1 and 0 the second attempt earns 1 (right, still right), 11
    (mended), -10 (spoilt) or 0; with ours
    >>> [attempt_rewards(s, "score_stage2")[1] for s in (["correct"] * 2, ["wrong", "correct"], ["correct", "wrong"])]
    [1.0, 16.0, -15.5]
    """

    def value(number: int, status: str) -> float:
        if status == "correct":
            return REWARD_CORRECT * ATTEMPT_DISCOUNT ** (number - 1)
        return REWARD_NO_ANSWER if status == "no_answer" else REWARD_WRONG  # no verdict in time is no right answer

    values = [value(number, status) for number, status in enumerate(statuses, 1)]
    if method == "per_attempt" or not values:
        return values
    if method == "score_stage2":
        return [v + SCORE_ALPHA * (v - before) for v, before in zip(values, [values[0], *values], strict=False)]
    last = values[-1]
    if method == "outcome":
        failed = REWARD_NO_ANSWER if set(statuses) == {"no_answer"} else REWARD_WRONG
        last = values[statuses.index("correct")] if "correct" in statuses else failed
    return [0.0] * (len(values) - 1) + [last]


def assign_rewards(dialogue: Dialogue) -> None:
    """Give each attempt its reward by REWARD; one that is not the policy's own goes without, and in SCoRe's stage I one
    behind which the context was full: it would be paid for being the last, and that attempt must not be the first."""
    rewards = attempt_rewards([attempt.status for attempt in dialogue.attempts], REWARD)
    pays = REWARD != "score_stage1" or not dialogue.out_of_context
    for attempt, reward in zip(dialogue.attempts, rewards, strict=True):
        attempt.reward = reward * attempt.own * pays


def token_rewards(dialogue: Dialogue) -> list[float]:
    """(T,) the reward of each attempt on its last action, 0 elsewhere."""
    rewards = [0.0] * len(dialogue.ids)
    for attempt in dialogue.attempts:
        rewards[attempt.end - 1] += attempt.reward
    return rewards


# python rollout.py ----------------------------------------------------------------------------------------------------
def show(chat: Chat, dialogue: Dialogue) -> str:
    """The dialogue for a terminal: environment dim, actions bright, a verdict behind each attempt."""
    dim, bright, green, red, plain = "\033[2m", "\033[1m", "\033[32m", "\033[31m", "\033[0m"
    out, at = "", 0
    for number, attempt in enumerate(dialogue.attempts, 1):
        out += f"{dim}{chat.tokenizer.decode(dialogue.ids[at : attempt.start])}{plain}"
        out += f"{bright}{chat.tokenizer.decode(dialogue.ids[attempt.start : attempt.end])}{plain}"
        out += f" {green if attempt.status == 'correct' else red}[attempt {number}: {attempt.status}"
        out += f", answer {attempt.answer}, gold {dialogue.problem['answer']}, reward {attempt.reward}]{plain}"
        at = attempt.end
    return out


def main() -> None:
    override_constants(sys.argv[1:], {"rollout": sys.modules[__name__], "grader": grader})
    check_constants()
    chat = Chat(load_tokenizer(MODEL))
    problems = check_lengths(chat, load_problems(PROBLEMS)[:DIALOGUES], PROBLEMS)
    engine = Engine(MODEL, seed=SEED)
    dialogues = [new_dialogue(chat, p, draw_attempts(SEED, 0, i)) for i, p in enumerate(problems)]
    for dialogue in play(engine, chat, dialogues, [random_number(SEED, i) for i in range(len(problems))], TEMPERATURE):
        assign_rewards(dialogue)
        print("=" * 80, show(chat, dialogue), sep="\n")
    engine.shutdown()


if __name__ == "__main__":
    main()
