"""What the attempt loop costs and saves: a table of ratios, each within this one run, on one engine.

    python tests/bench_rollout.py                  # a random model of 4 M parameters, 512 dialogues; some minutes
    python tests/bench_rollout.py MODEL=folder DIALOGUES=2048 DTYPE=bfloat16
    python tests/bench_rollout.py DIALOGUES=0 LAYERS=16          # the weight transfer alone

The workload: N drawn from 1..5, attempts of 16 to 512 tokens (log-uniform: a long tail), a quarter of them right.
Lengths and verdicts are drawn in advance, so that every scheme does the same work; what is said is random.
"""

import math
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import grader
import rollout
from experiments.median import make_tokenizer
from plumbing.chat import Chat
from plumbing.constants import set_constants
from plumbing.engine import Engine
from rollout import Dialogue, random_number

MODEL: str = ""  # folder or hub name; "" = a random one
DTYPE: str = "float32"
DIALOGUES: int = 512  # 0: the weight transfer alone
SHORTEST: int = 16  # tokens of an attempt
LONGEST: int = 512
RIGHT: float = 0.25  # share of right attempts
SLOW: float = 0.01  # share of verdicts that come late, as those on programs will
LATE: float = 0.3  # seconds, after which they come
HIDDEN: int = 256  # width of the random model
LAYERS: int = 4  # its depth
CHUNK: int = 64  # tokens of one call of the reference's scheme
REFERENCE_BATCH: int = 256  # dialogues that the reference plays together
REPEATS: int = 2  # the best of so many counts


def random_model(folder: str) -> str:
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=rollout.CONTEXT, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# The workload ---------------------------------------------------------------------------------------------------------
def attempt_length(dialogue: int, attempt: int) -> int:
    share = random_number("length", dialogue, attempt) / 2**31
    return round(SHORTEST * (LONGEST / SHORTEST) ** share)


def is_right(dialogue: int, attempt: int) -> bool:
    return random_number("right", dialogue, attempt) / 2**31 < RIGHT


def attempts_of(dialogue: int) -> int:
    """How many attempts the dialogue takes: up to the first right one, or all that it was granted."""
    granted = rollout.draw_attempts(0, 1, dialogue)
    return next((k + 1 for k in range(granted) if is_right(dialogue, k)), granted)


class DrawnLengths(Engine):
    """The engine, but an attempt is as long as was drawn for it, and ends by nothing else."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.never = dict.fromkeys(self.stop_ids, -100.0)
        add_request = self.engine.add_request

        def add_endless_request(key: str, prompt: Any, params: Any, **options: Any) -> Any:
            params.logit_bias = self.never
            return add_request(key, prompt, params, **options)

        self.engine.add_request = add_endless_request
        self.attempt: dict[int, int] = {}
        self.generated = 0  # tokens that were sampled, whatever became of them
        scheduler = self.engine.engine_core.engine_core.scheduler
        take = scheduler.update_from_output

        def count(scheduled: Any, output: Any) -> Any:
            self.generated += sum(map(len, output.sampled_token_ids))
            return take(scheduled, output)

        scheduler.update_from_output = count

    def submit(self, key: int, ids: list[int], max_tokens: int, *sampling: Any) -> None:
        attempt = self.attempt[key] = self.attempt.get(key, -1) + 1
        super().submit(key, ids, attempt_length(key, attempt), *sampling)


class DrawnVerdicts:
    """In place of grader.submit: grades the text as ever, then gives the verdict that was drawn, perhaps late."""

    def __init__(self, engine: DrawnLengths, slow: float):
        self.engine, self.slow, self.submit = engine, slow, grader.submit

    def __call__(self, response: str, gold: str, tolerance: float | None, question: str) -> Future:
        dialogue = int(gold)  # a problem's answer is its number here
        attempt = self.engine.attempt[dialogue]
        right = is_right(dialogue, attempt)
        self.submit(response, gold, tolerance, question).result()
        verdict = grader.Verdict(None, right, "correct" if right else "wrong")
        if random_number("slow", dialogue, attempt) / 2**31 >= self.slow:
            return grader.finished(verdict)
        late: Future = Future()
        threading.Timer(LATE, late.set_result, [verdict]).start()
        return late


# The schemes: -> seconds, generated tokens ----------------------------------------------------------------------------
def new_dialogues(chat: Chat) -> list[Dialogue]:
    dialogues = []
    for i in range(DIALOGUES):
        shown = " ".join(str(random_number(i, j) % 20) for j in range(9))
        problem = {"id": str(i), "question": f"What is the median of {shown}?", "answer": str(i)}
        dialogues.append(rollout.new_dialogue(chat, problem, rollout.draw_attempts(0, 1, i)))
    return dialogues


def ours(engine: DrawnLengths, chat: Chat, slow: float = 0.0) -> tuple[float, int]:
    engine.attempt.clear()
    engine.generated = 0
    submit, grader.submit = grader.submit, DrawnVerdicts(engine, slow)
    dialogues = new_dialogues(chat)
    start = time.perf_counter()
    rollout.play(engine, chat, dialogues, list(range(DIALOGUES)), 1.0)
    seconds, grader.submit = time.perf_counter() - start, submit
    actions = sum(sum(d.mask) for d in dialogues)
    print(f"{engine.generated - actions} tokens generated in vain")
    return seconds, actions


def reference(engine: DrawnLengths, chat: Chat) -> tuple[float, int]:
    """The scheme of the paper's code: lock-step calls of CHUNK tokens over all unfinished dialogues, text in and out,
    the whole attempt graded after every call. It is spared its waste: an attempt is as long as was drawn."""
    from vllm import SamplingParams

    dialogues = new_dialogues(chat)
    tokens = 0
    start = time.perf_counter()
    for first in range(0, DIALOGUES, REFERENCE_BATCH):
        batch = range(first, min(first + REFERENCE_BATCH, DIALOGUES))
        text = {i: chat.tokenizer.decode(dialogues[i].ids) for i in batch}
        said = dict.fromkeys(batch, "")
        attempt = dict.fromkeys(batch, 0)
        to_come = {i: attempt_length(i, 0) for i in batch}
        left = {i: dialogues[i].max_attempts for i in batch}
        while text:
            going = list(text)
            params = [
                SamplingParams(
                    temperature=1.0, seed=random_number(i, attempt[i], to_come[i]), max_tokens=min(CHUNK, to_come[i]),
                    logit_bias=engine.never, ignore_eos=True, skip_special_tokens=False,
                )
                for i in going
            ]  # fmt: skip
            for i, out in zip(
                going, engine.llm.generate([text[i] for i in going], params, use_tqdm=False), strict=True
            ):
                tokens += len(out.outputs[0].token_ids)
                to_come[i] -= len(out.outputs[0].token_ids)
                said[i] += out.outputs[0].text
                text[i] += out.outputs[0].text
            for i in going:
                grader.grade(said[i], str(i))
                if to_come[i] > 0:
                    continue
                left[i] -= 1
                if left[i] == 0 or is_right(i, attempt[i]):
                    del text[i]
                    continue
                attempt[i] += 1
                to_come[i], said[i] = attempt_length(i, attempt[i]), ""
                text[i] += "<|im_end|>" + chat.decode(rollout.encode_feedback(chat, left[i]))
    return time.perf_counter() - start, tokens


def bare_engine(engine: DrawnLengths, chat: Chat, histories: bool = False) -> tuple[float, int]:
    """llm.generate on as many prompts and tokens as the dialogues have attempts and actions; nothing else.
    histories: each attempt's prompt is as long as in its dialogue, not only as the dialogue's first one."""
    from vllm import SamplingParams

    prompts, params = [], []
    for i, dialogue in enumerate(new_dialogues(chat)):
        for k in range(attempts_of(i)):
            prompts.append({"prompt_token_ids": list(dialogue.ids)})
            if histories:
                said = [random_number(i, k, t) % 200 for t in range(attempt_length(i, k))]
                dialogue.append([*said, chat.end_of_turn, *rollout.encode_feedback(chat, 1)])
            params.append(
                SamplingParams(
                    temperature=1.0, seed=random_number(i, k), logprobs=0,
                    max_tokens=attempt_length(i, k), logit_bias=engine.never, ignore_eos=True, detokenize=False,
                )
            )  # fmt: skip
    start = time.perf_counter()
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start, sum(len(out.outputs[0].token_ids) for out in outputs)


def transfer(engine: DrawnLengths, model: str) -> tuple[float, float, float]:
    """-> seconds of a weight transfer, of copying the same bytes, and their size in MB; the best of twenty each."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, DTYPE)).to("cuda" if engine.cuda else "cpu")
    weights = {name: w.detach() for name, w in lm.named_parameters()}
    copies = {name: torch.empty_like(w) for name, w in weights.items()}
    best = [math.inf, math.inf]
    for _ in range(20):
        start = time.perf_counter()
        engine.load_weights(weights.items())
        best[0] = min(best[0], time.perf_counter() - start)
        start = time.perf_counter()
        for name, w in weights.items():
            copies[name].copy_(w)
        if engine.cuda:
            torch.cuda.synchronize()
        best[1] = min(best[1], time.perf_counter() - start)
    return *best, sum(w.nbytes for w in weights.values()) / 1e6


def compare_schemes(engine: DrawnLengths, chat: Chat) -> None:
    bare_engine(engine, chat)  # the first call in a process is slower
    lengths = [attempt_length(i, k) for i in range(DIALOGUES) for k in range(attempts_of(i))]
    print(f"{DIALOGUES} dialogues, {len(lengths)} attempts, {sum(lengths):,} tokens to generate")
    seconds: dict[str, float] = {}

    def measure(name: str, scheme, *arguments: Any) -> None:
        took, tokens = zip(*(scheme(engine, chat, *arguments) for _ in range(REPEATS)), strict=True)
        seconds[name] = min(took)
        rate = f"{DIALOGUES / min(took):7.1f} dialogues/s {tokens[0] / min(took):9,.0f} tokens/s"
        print(f"{name:34} {min(took):6.1f} s {rate}", flush=True)

    measure("reference's scheme", reference)
    measure("the loop", ours)
    measure("llm.generate, same tokens", bare_engine)
    measure("... and prompts with their history", bare_engine, True)
    measure(f"the loop, {SLOW:.0%} of verdicts late", ours, SLOW)
    loop = seconds["the loop"]
    for name, taken in seconds.items():
        print(f"the loop is {taken / loop:5.2f} x as fast as: {name}")


def main() -> None:
    print(set_constants(sys.argv[1:], {"bench": sys.modules[__name__], "rollout": rollout, "grader": grader}))
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL or random_model(folder)
        engine = DrawnLengths(model, rollout.CONTEXT, dtype=DTYPE)
        chat = rollout.make_chat(engine.tokenizer)
        if DIALOGUES:
            compare_schemes(engine, chat)
        took, copied, size = transfer(engine, model)
        times = f"{1e3 * took:.2f} ms for {size:.0f} MB, copying them {1e3 * copied:.2f} ms"
        print(f"weight transfer: {times}: {took / copied:.2f} x")
        engine.shutdown()


if __name__ == "__main__":
    main()
