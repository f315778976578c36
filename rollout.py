"""Play multi-attempt dialogues (arXiv 2503.04808, section 2) with vLLM: prompts, the attempt loop, reward assignment.

1. A dialogue grants N ~ Uniform{MIN_ATTEMPTS..MAX_ATTEMPTS} attempts; the system prompt says how many.
2. After a wrong attempt the environment says so and how many are left; a right one or the N-th ends the dialogue.
3. The loop is continuous: the moment an attempt ends it is graded, and its retry joins everyone else's attempts in the
   engine's queue. Nobody waits for the slowest dialogue of a batch.
4. Token ids go in, token ids come out. Text is never tokenised twice; the action mask is carried, never searched for.

    python rollout.py                              # plays four dialogues with the toy model and prints them
    python rollout.py MODEL=folder PROBLEMS=my.jsonl MAX_ATTEMPTS=3
"""

import concurrent.futures
import csv
import dataclasses
import difflib
import gc
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

import grader

# The task -------------------------------------------------------------------------------------------------------------
MIN_ATTEMPTS: int = 1  # attempts; smallest N of a training dialogue (paper 1)
MAX_ATTEMPTS: int = 5  # attempts; largest N of a training dialogue, K of an evaluation (paper 5); 1 = single-turn RL
PROMPT: str = "multi_attempt"  # "multi_attempt" (the prompt states N) or "single_turn" (the paper's baseline prompt)
REPEAT_QUESTION: bool = False  # 1: feedback repeats the question in a user turn (the reference's option; paper 0)
MAX_ATTEMPT_TOKENS: int = 3000  # tokens; an attempt is cut there (paper: 3000 over all attempts together)
CONTEXT: int = 4096  # tokens; prompt and all attempts of a dialogue together (paper 4024)
# Rewards of a dialogue, on its last action; the values are those of the paper's code ----------------------------------
REWARD_CORRECT: float = 1.0  # some attempt was right
REWARD_WRONG: float = -0.5  # never right, but some attempt had a complete box
REWARD_NO_ANSWER: float = -1.0  # no complete box in any attempt
# Sampling -------------------------------------------------------------------------------------------------------------
TEMPERATURE: float = 1.0  # of training rollouts (paper 1); anything but 1 makes sampler and trainer disagree
MAX_SEQUENCES: int = 256  # sequences decoded at once by one engine; more is faster until the KV cache is full
GPU_MEMORY: float = 0.5  # share of a GPU's memory that the engine may take; the trainer lives in the rest (paper 0.5)
CPU_CACHE_MIB: int = 512  # MiB of KV cache of the CPU engine
# The command line of this file ----------------------------------------------------------------------------------------
MODEL: str = "data/toy/warm_start"  # folder or hub name
PROBLEMS: str = "data/toy/test.jsonl"  # problems to play
DIALOGUES: int = 4  # how many to play and print
SEED: int = 0

SYSTEM_SINGLE = "Please reason step by step, and put your final answer within \\boxed{}."
SYSTEM_MULTI = (
    SYSTEM_SINGLE + " You have {attempts} attempts to answer the questions, and you should provide the full "
    "reasoning steps in each attempt."
)
FEEDBACK = "Your answer is incorrect. You have {attempts} attempts left. Try an alternative."
SYSTEM_REPEAT = SYSTEM_SINGLE + " You have {attempts} attempts to answer the question."
FEEDBACK_REPEAT = "Your answer is incorrect. Try an alternative. You have {attempts} attempts to answer the question."


# The record of the program --------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Attempt:
    start: int  # position in Dialogue.ids of the attempt's first action
    end: int  # one past its last action
    answer: str | None  # what stood in the last complete box
    status: str  # the grader's: "correct", "wrong", "no_answer", "timeout"
    ending: str  # "stop" (the policy ended its turn), "length" (MAX_ATTEMPT_TOKENS) or "context" (CONTEXT is full)
    reward: float = 0.0  # placed on the last action


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


# Constants from the command line --------------------------------------------------------------------------------------
def override_constants(
    arguments: Sequence[str], stages: dict[str, ModuleType], presets: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Set constants from NAME=value arguments and return every constant of every stage as it now is, for config.json.

    stages: name -> module, the running script first. NAME is looked for in that order; "rollout.NAME" names the stage.
    PRESET=a,b applies the named groups of `presets` first, in order, then the arguments. A value has the type of the
    constant it replaces. Raises SystemExit, with the nearest name, for a name or a value that does not fit.
    """

    def set_constant(name: str, value: Any) -> None:
        stage, _, bare = name.rpartition(".")
        owners = [s for s in stages if stage in ("", s) and bare.isupper() and bare in stages[s].__annotations__]
        if not owners:
            known = [n for s in stages for c in stages[s].__annotations__ if c.isupper() for n in (c, f"{s}.{c}")]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise SystemExit(f"{name}: no such constant; the nearest is {near[0]}")
        setattr(stages[owners[0]], bare, parse_value(name, value, getattr(stages[owners[0]], bare)))

    pairs = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise SystemExit(f"{argument}: expected NAME=value")
        pairs[name] = value
    first = next(iter(stages.values()))
    for preset in filter(None, pairs.get("PRESET", getattr(first, "PRESET", "")).split(",")):
        if preset not in (presets or {}):
            raise SystemExit(f"PRESET={preset}: no such preset; there are {', '.join(presets or {})}")
        for name, value in presets[preset].items():
            set_constant(name, value)
    for name, value in pairs.items():
        set_constant(name, value)
    return {
        f"{stage}.{name}": getattr(module, name)
        for stage, module in stages.items()
        for name in module.__annotations__
        if name.isupper()
    }


def parse_value(name: str, value: Any, default: Any) -> Any:
    """`value` (text from the command line, or a preset's value) as the type of `default`.

    >>> parse_value("SEED", "3", 0), parse_value("WHITEN", "0", True), parse_value("BETAS", "0.9,0.99", (0.9, 0.95))
    (3, False, (0.9, 0.99))
    """
    kind = type(default)
    try:
        if kind is bool:
            return {"0": False, "1": True, "false": False, "true": True}[str(value).lower()]
        if kind is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(parse_value(name, v, d) for v, d in zip(parts, default, strict=True))
        return kind(value)
    except (KeyError, ValueError) as error:
        raise SystemExit(f"{name}={value}: expected a value like {default!r} ({kind.__name__})") from error


# Problems -------------------------------------------------------------------------------------------------------------
COLUMNS = {  # field of a problem -> what a file may call it, in upper or lower case; the first that is there counts
    "id": ("id", "unique_id"),
    "question": ("question", "problem", "prompt"),
    "answer": ("answer", "final_answer", "gold", "gold_answer", "ground_truth", "ground_truth_answer"),
}


def load_problems(path: str | Path) -> list[dict[str, Any]]:
    """Problems of a JSONL, Parquet or CSV file: a row has a question, an answer and what else is known.

    Returns dictionaries with "id", "question", "answer" (strings), perhaps "tolerance" (float), and the other columns
    as they are. Without an id a row gets "<file stem>/<line>". Raises SystemExit with file, line, id and cure.
    """
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"{path}: no such problem file (`make data` makes the toy's, `python -m data.prepare` others)")
    problems: dict[str, dict[str, Any]] = {}
    for where, number, row in read_rows(path):
        problem = to_problem(row, f"{path.stem}/{number}", f"{path}, {where} {number}")
        if problem["id"] in problems:
            raise SystemExit(f"{path}, {where} {number}: id {problem['id']!r} is there already; make ids different")
        problems[problem["id"]] = problem
    if not problems:
        raise SystemExit(f"{path}: no problem in it")
    return list(problems.values())


def read_rows(path: Path) -> Iterator[tuple[str, int, Any]]:
    """("line" or "row", its number from 1, its content), in order. The suffix says how to read the file."""
    at = ""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from (("row", n, row) for n, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
        elif path.suffix == ".csv":  # not by pyarrow, which would make the number 33 of the answer 033
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file, strict=True)
                for row in rows:
                    yield "line", rows.line_num, row  # of a row with line breaks: its last line
                    at = f", line {rows.line_num + 1}"
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
                at = f", line {number}"
                if line.strip():
                    yield "line", number, json.loads(line)
        else:
            raise SystemExit(f"{path}: a problem file ends in .jsonl (one JSON object a line), .parquet or .csv")
    except (csv.Error, ValueError) as error:  # what json, pyarrow and UTF-8 raise are ValueErrors
        raise SystemExit(f"{path}{at}: not {path.suffix[1:].upper()} ({error}); mend or drop it") from error


def to_problem(row: Any, name: str, where: str) -> dict[str, Any]:
    """A file's row as a problem, `name` its id if it has none. Raises SystemExit that begins with `where`.

    >>> to_problem({"Problem": "1+1?", "Answer": 2, "level": 1}, "sums/1", "sums.jsonl, line 1")
    {'id': 'sums/1', 'question': '1+1?', 'answer': '2', 'level': 1}
    """
    if not isinstance(row, dict) or None in row:  # None: where csv keeps cells that no column has a name for
        raise SystemExit(f"{where}: must be an object, or a row as long as the header, not {str(row)[:80]}")
    row, problem = dict(row), {}
    for field, names in COLUMNS.items():
        column = next((c for name in names for c in row if c.lower() == name), None)
        value = row.pop(column, None)
        if field != "question" and type(value) in (int, float) and math.isfinite(value):
            value = repr(value).removesuffix(".0")
        if field == "id" and value in (None, ""):
            value = name
        if not isinstance(value, str) or not value.strip():
            wanted = "a non-empty string" if field == "question" else "a non-empty string or a number"
            there = f"not {str(value)[:40]!r}" if column else f"in a column of that name; there are {', '.join(row)}"
            raise SystemExit(f'{where}, id {problem.get("id")}: "{field}" must be {wanted}, {there}; mend or drop it')
        problem[field] = value
    tolerance = row.pop("tolerance", None)
    if tolerance not in (None, ""):
        try:
            problem["tolerance"] = float(tolerance)
        except (TypeError, ValueError) as error:
            raise SystemExit(f'{where}, id {problem["id"]}: "tolerance" must be a number; mend or drop it') from error
    return problem | row


SAME_COMMANDS = re.compile(r"\\[a-z]?(frac|dots)(?![a-z])")  # \dfrac is \frac, \ldots is \cdots
DRESS = re.compile(
    r"\\\\|\\[^a-z0-9%]"  # ends of lines and what is no word: \, \! \[ \{
    r"|\\(?:left|right|big[lr]?|displaystyle|limits|text|textbf|textit|textrm|mathrm|mathbf|q?quad)(?![a-z])"
)
WORD = re.compile(
    r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/^=<>|()\[\]!%]"
)  # numbers, words and commands, signs that mean something


def question_words(question: str) -> list[str]:
    """A question's words, numbers and signs, without its dress: case, spaces, punctuation, braces, $, LaTeX's fonts."""
    return WORD.findall(DRESS.sub(" ", SAME_COMMANDS.sub(r"\1 ", question.lower())))


def question_key(question: str) -> str:
    r"""The same for questions that differ in their dress alone; of spaces only those between two numbers are kept.

    >>> question_key(r"Compute $\dfrac{1}{23}x^{2}$.") == question_key(r"Compute \[\frac 1 {23} x^2.\]")
    True
    >>> question_key("Is $x + 1$ odd?") == question_key("Is $x - 1$ odd?")
    False
    """
    return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(question_words(question)))


# Prompts --------------------------------------------------------------------------------------------------------------
class Chat:
    """Turns of a dialogue as token ids, through the chat template of the model's own tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        mark = "\x00"  # stands for an assistant's answer: what follows it in the template ends a turn
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).split(mark)[1]
        # The id by which the policy says "my turn is over". A base model may know another end id as well (Qwen2.5-Math:
        # <|endoftext|>); sampling that one ends the attempt too, and the environment then closes the turn.
        self.end_of_turn: int = self._encode(after)[0]
        self.mark = mark

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, question: str, attempts: int) -> list[int]:
        """Ids of the system turn, the question and the opening of the first answer."""
        system = {"multi_attempt": SYSTEM_REPEAT if REPEAT_QUESTION else SYSTEM_MULTI, "single_turn": SYSTEM_SINGLE}
        turns = [
            {"role": "system", "content": system[PROMPT].replace("{attempts}", str(attempts))},
            {"role": "user", "content": question},
        ]
        return self._encode(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def feedback(self, question: str, attempts_left: int) -> list[int]:
        """Ids from right behind the end of a wrong answer's turn to the opening of the next answer.

        The template renders the whole exchange around a mark; what follows the mark, less the end of turn, is new.
        """
        words = FEEDBACK_REPEAT if REPEAT_QUESTION else FEEDBACK
        turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": self.mark},
            {"role": "system", "content": words.replace("{attempts}", str(attempts_left))},
        ]
        turns += [{"role": "user", "content": question}] if REPEAT_QUESTION else []
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self._encode(text.split(self.mark)[1])[1:]


# The engine: every vLLM call of the program ---------------------------------------------------------------------------
class Engine:
    """vLLM in this process. Under torchrun each rank has an engine of its own."""

    def __init__(self, model: str, dtype: str = "float32", seed: int = 0):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core in this process: no copies, no pickling
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        import vllm

        self.cuda = torch.cuda.is_available()
        where = {"gpu_memory_utilization": GPU_MEMORY} if self.cuda else {"kv_cache_memory_bytes": CPU_CACHE_MIB << 20}
        random_state = torch.get_rng_state()  # vLLM seeds the whole process; the trainer's stream is not its business
        self.llm = vllm.LLM(
            model=model,
            dtype=dtype,
            seed=seed,
            max_model_len=CONTEXT,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=max(8192, CONTEXT),
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
            generation_config="vllm",  # a model's own sampling defaults must not leak into training
            enable_prefix_caching=True,  # a retry finds its whole history in the cache
            # Not on a CPU: its runner cannot rewind the generator of a request whose prompt a full step cuts in two.
            enable_chunked_prefill=self.cuda,
            enforce_eager=not self.cuda,
            enable_sleep_mode=self.cuda,
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **where,
        )
        torch.set_rng_state(random_state)
        self.engine = self.llm.llm_engine
        self.tokenizer = self.llm.get_tokenizer()
        config = self.engine.model_config
        ends = [config.hf_config.eos_token_id, self.tokenizer.eos_token_id]
        ends.append(config.try_get_generation_config().get("eos_token_id"))
        self.stop_ids = {i for e in ends if e is not None for i in (e if isinstance(e, list) else [e])}
        # Rows of a padded vocabulary are no tokens: never sample them (Qwen2.5: 151,936 rows, 151,665 tokens).
        self.never = dict.fromkeys(range(len(self.tokenizer), config.get_vocab_size()), -100.0)

    def submit(self, key: int, ids: list[int], max_tokens: int, temperature: float, seed: int, stop: set[int]) -> None:
        """Queue one attempt: continue `ids` until a stop id or max_tokens. Temperature 0 is greedy."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=temperature,
            seed=seed if temperature > 0 else None,
            max_tokens=max_tokens,
            stop_token_ids=sorted(stop | self.stop_ids),
            logit_bias=self.never or None,
            logprobs=0,  # the sampled token's log-probability, no alternatives
            detokenize=False,
            skip_clone=True,
        )
        self.engine.add_request(str(key), {"prompt_token_ids": ids}, params)

    def step(self) -> list[tuple[int, list[int], list[float], bool]]:
        """One forward pass over what runs -> (key, sampled ids, their logprobs, stopped?) of each that ended."""
        ended = []
        for request in self.engine.step():
            if request.finished:
                out = request.outputs[0]
                logprobs = [step[i].logprob for i, step in zip(out.token_ids, out.logprobs, strict=True)]
                ended.append((int(request.request_id), list(out.token_ids), logprobs, out.finish_reason == "stop"))
        return ended

    @property
    def busy(self) -> bool:
        return self.engine.has_unfinished_requests()

    def load_weights(self, named_tensors: Iterable[tuple[str, Any]]) -> None:
        """Replace the engine's weights by the trainer's, streamed one whole tensor at a time. The one place that knows
        the order: wake the weights, load them, forget what was cached under the old ones, wake the cache."""
        if self.cuda:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        self.llm.apply_model(repack_tied_head)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "the engine kept its prefix cache: attempts were still running while weights were loaded"
            )
        if self.cuda:
            self.llm.wake_up(tags=["kv_cache"])

    def sleep(self) -> None:
        """Give the memory back to the trainer. The weights are dropped, not copied: load_weights must follow."""
        if self.cuda:
            self.llm.sleep(level=2)

    def shutdown(self) -> None:
        """End the engine (and, as vLLM does it, the process group) and give all its memory back."""
        import torch

        self.engine.engine_core.shutdown()
        del self.llm, self.engine
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def repack_tied_head(model: Any) -> None:
    """The CPU engine computes logits from a packed copy of lm_head, and reload_weights leaves the copy of a tied
    one as it was: without this the engine would go on sampling with the old output layer."""
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight.device.type == "cpu" and model.config.tie_word_embeddings:
        head.quant_method.process_weights_after_loading(head)


# The attempt loop -----------------------------------------------------------------------------------------------------
def random_number(*key: int | str) -> int:
    """31 random bits that depend on the key alone, not on the process, the order of calls or the number of ranks."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


def draw_attempts(seed: int, step: int, index: int) -> int:
    """N of dialogue `index` in `step`: uniform over {MIN_ATTEMPTS..MAX_ATTEMPTS} (paper, section 2)."""
    return MIN_ATTEMPTS + random_number("attempts", seed, step, index) % (MAX_ATTEMPTS - MIN_ATTEMPTS + 1)


def new_dialogue(chat: Chat, problem: dict[str, Any], max_attempts: int) -> Dialogue:
    dialogue = Dialogue(problem, max_attempts)
    dialogue.extend(chat.prompt(problem["question"], max_attempts))
    return dialogue


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
    seeds: one a dialogue; with the number of the attempt it seeds that attempt's sampling, so that what a dialogue
        becomes does not depend on what else is in the queue.
    temperature: 0 is greedy.
    progress: label of a progress bar, or None. on_end(index) is called when dialogue `index` has ended.
    A dialogue whose prompt fills the context ends without an attempt.
    """
    verdicts: dict[concurrent.futures.Future, int] = {}  # still being graded -> its dialogue
    bar = tqdm(total=len(dialogues), desc=progress, unit=" dialogues", disable=progress is None, leave=False, delay=2)

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
        dialogue.extend(ids, logprobs)
        ending = "stop" if stopped else "context" if len(dialogue.ids) >= CONTEXT else "length"
        dialogue.attempts.append(Attempt(start, start + len(ids), None, "no_answer", ending))
        text = chat.tokenizer.decode(ids, skip_special_tokens=True)
        gold, tolerance = dialogue.problem["answer"], dialogue.problem.get("tolerance")
        verdicts[grader.submit(text, gold, tolerance)] = index

    def go_on(index: int, verdict: grader.Verdict) -> bool:
        """Take the verdict; True if the dialogue has another attempt in the queue."""
        dialogue = dialogues[index]
        dialogue.attempts[-1].answer, dialogue.attempts[-1].status = verdict.answer, verdict.status
        left = dialogue.max_attempts - len(dialogue.attempts)
        if verdict.correct or left == 0:
            return False
        feedback = chat.feedback(dialogue.problem["question"], left)
        if (
            dialogue.ids[-1] != chat.end_of_turn
        ):  # cut by length, or ended by another id: the environment closes the turn
            feedback = [chat.end_of_turn, *feedback]
        if len(dialogue.ids) + len(feedback) >= CONTEXT:
            return False
        dialogue.extend(feedback)
        return submit(index)

    ended = [index for index in range(len(dialogues)) if not submit(index)]
    solved = tokens = 0
    while True:
        for index in ended:
            solved += dialogues[index].solved_at is not None
            bar.set_postfix(solved=f"{solved / (bar.n + 1):.2f}", tokens=tokens, refresh=False)
            bar.update()
            on_end(index)
        if not engine.busy and not verdicts:
            break
        for index, ids, logprobs, stopped in engine.step() if engine.busy else []:
            attempt_ended(index, ids, logprobs, stopped)
            tokens += len(ids)
        if not engine.busy:  # nothing to compute until a verdict is in
            concurrent.futures.wait(verdicts, return_when=concurrent.futures.FIRST_COMPLETED)
        ready = [future for future in verdicts if future.done()]
        ended = [index for future in ready if not go_on(index := verdicts.pop(future), future.result())]
    bar.close()
    return dialogues


# Rewards --------------------------------------------------------------------------------------------------------------
def assign_rewards(dialogue: Dialogue) -> None:
    """Outcome reward: one number for the whole dialogue, on the last attempt (paper, section 2; values of its code).

    Right at any attempt is worth REWARD_CORRECT however many it took; a wrong boxed answer seen in any attempt lifts a
    failure from REWARD_NO_ANSWER to REWARD_WRONG.

    >>> d = Dialogue({}, 3, attempts=[Attempt(0, 2, "7", "wrong", "stop"), Attempt(4, 6, None, "no_answer", "length")])
    >>> assign_rewards(d); [a.reward for a in d.attempts]
    [0.0, -0.5]
    """
    statuses = {attempt.status for attempt in dialogue.attempts}
    if not statuses:
        return
    reward = (
        REWARD_CORRECT if "correct" in statuses else REWARD_NO_ANSWER if statuses == {"no_answer"} else REWARD_WRONG
    )
    dialogue.attempts[-1].reward = reward


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
    problems = load_problems(PROBLEMS)[:DIALOGUES]
    engine = Engine(MODEL, seed=SEED)
    chat = Chat(engine.tokenizer)
    dialogues = [new_dialogue(chat, p, draw_attempts(SEED, 0, i)) for i, p in enumerate(problems)]
    for dialogue in play(engine, chat, dialogues, [random_number(SEED, i) for i in range(len(problems))], TEMPERATURE):
        assign_rewards(dialogue)
        print("=" * 80, show(chat, dialogue), sep="\n")
    engine.shutdown()


if __name__ == "__main__":
    main()
