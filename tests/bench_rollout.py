"""What the attempt loop costs and saves: a table of ratios, each within this one run, on one engine.

    python tests/bench_rollout.py                  # a random model of 4 M parameters, 512 dialogues; some minutes
    python tests/bench_rollout.py MODEL=folder DIALOGUES=2048 DTYPE=bfloat16

The workload: N drawn from 1..5, attempts of 16 to 512 tokens (log-uniform: a long tail), a quarter of them right.
Lengths and verdicts are drawn in advance, so that every scheme does the same work; what is said is random.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import grader
import rollout
from plumbing.chat import Chat
from plumbing.constants import set_constants
from rollout import Dialogue, random_number
from tests.workload import DrawnLengths, draw_length, save_random_model, seconds_of

MODEL: str = ""  # folder or hub name; "" = a random one
DTYPE: str = "float32"
DIALOGUES: int = 512
SHORTEST: int = 16  # tokens of an attempt
LONGEST: int = 512
RIGHT: float = 0.25  # share of right attempts
HIDDEN: int = 256  # width of the random model
LAYERS: int = 4  # its depth
CHUNK: int = 64  # tokens of one call of the reference's scheme
REFERENCE_BATCH: int = 256  # dialogues that the reference plays together
REPEATS: int = 2  # the best of so many counts


# The workload ---------------------------------------------------------------------------------------------------------
def length_of(dialogue: int, attempt: int) -> int:
    return draw_length(SHORTEST, LONGEST, dialogue, attempt)


def is_right(dialogue: int, attempt: int) -> bool:
    return random_number("right", dialogue, attempt) / 2**31 < RIGHT


def new_dialogues(chat: Chat) -> list[Dialogue]:
    """A problem's answer is its number here."""
    dialogues = []
    for i in range(DIALOGUES):
        shown = " ".join(str(random_number(i, j) % 20) for j in range(9))
        problem = {"id": str(i), "question": f"What is the median of {shown}?", "answer": str(i)}
        dialogues.append(rollout.new_dialogue(chat, problem, rollout.draw_attempts(0, 1, i)))
    return dialogues


# The schemes: -> seconds, generated tokens ----------------------------------------------------------------------------
def play_loop(engine: DrawnLengths, chat: Chat) -> tuple[float, int]:
    """rollout.play; grader.submit grades the text as ever, then gives the verdict that was drawn."""
    submit, dialogues, attempts, graded = grader.submit, new_dialogues(chat), Counter(), Counter()

    def next_length(key: int, ids: list[int]) -> int:
        attempts[key] += 1
        return length_of(key, attempts[key] - 1)

    def submit_drawn(response: str, gold: str, tolerance: float | None, question: str) -> Future:
        submit(response, gold, tolerance, question).result()
        graded[gold] += 1
        right = is_right(int(gold), graded[gold] - 1)
        return grader.finished(grader.Verdict(None, right, "correct" if right else "wrong"))

    engine.length_of, grader.submit = next_length, submit_drawn
    engine.asked.clear()
    engine.llm.reset_prefix_cache()
    seconds, _ = seconds_of(lambda: rollout.play(engine, chat, dialogues, list(range(DIALOGUES)), 1.0))
    grader.submit = submit
    return seconds, sum(sum(d.mask) for d in dialogues)


def play_reference(engine: DrawnLengths, chat: Chat) -> tuple[float, int]:
    """The scheme of the paper's code: lock-step calls of CHUNK tokens over all unfinished dialogues, text in and out,
    the whole attempt graded after every call. It is spared its waste: an attempt is as long as was drawn."""
    dialogues = new_dialogues(chat)
    engine.llm.reset_prefix_cache()
    starts = range(0, DIALOGUES, REFERENCE_BATCH)
    tokens: list[int] = []

    def play() -> None:
        for first in starts:
            batch = range(first, min(first + REFERENCE_BATCH, DIALOGUES))
            tokens.append(play_batch(engine, chat, {i: dialogues[i] for i in batch}))

    return seconds_of(play)[0], sum(tokens)


def play_batch(engine: DrawnLengths, chat: Chat, dialogues: dict[int, Dialogue]) -> int:
    from vllm import SamplingParams

    text = {i: chat.tokenizer.decode(d.ids) for i, d in dialogues.items()}
    said, attempt = dict.fromkeys(text, ""), dict.fromkeys(text, 0)
    to_come = {i: length_of(i, 0) for i in text}
    left = {i: d.max_attempts for i, d in dialogues.items()}
    shared = {"temperature": 1.0, "logit_bias": engine.never, "ignore_eos": True, "skip_special_tokens": False}
    tokens = 0
    while text:
        going = list(text)
        params = [
            SamplingParams(seed=random_number(i, attempt[i], to_come[i]), max_tokens=min(CHUNK, to_come[i]), **shared)
            for i in going
        ]
        outputs = engine.llm.generate([text[i] for i in going], params, use_tqdm=False)
        for i, out in zip(going, outputs, strict=True):
            tokens += len(out.outputs[0].token_ids)
            to_come[i] -= len(out.outputs[0].token_ids)
            said[i] += out.outputs[0].text
            text[i] += out.outputs[0].text
            grader.grade(said[i], str(i))
            if to_come[i] > 0:
                continue
            left[i] -= 1
            if left[i] == 0 or is_right(i, attempt[i]):
                del text[i]
                continue
            attempt[i] += 1
            to_come[i], said[i] = length_of(i, attempt[i]), ""
            text[i] += "<|im_end|>" + chat.decode(rollout.encode_feedback(chat, left[i]))
    return tokens


def generate_all(engine: DrawnLengths, chat: Chat) -> tuple[float, int]:
    """llm.generate on the prompts, with their histories, and lengths of the loop that was played last."""
    tokens: list[int] = []
    seconds, _ = seconds_of(lambda: tokens.append(engine.generate(engine.asked, 1.0)))
    return seconds, tokens[0]


def compare_schemes(engine: DrawnLengths, chat: Chat) -> None:
    play_loop(engine, chat)  # the first call in a process is slower
    lengths = [length for _, length in engine.asked]
    print(f"{DIALOGUES} dialogues, {len(lengths)} attempts, {sum(lengths):,} tokens to generate")
    seconds: dict[str, float] = {}

    def measure(name: str, scheme: Callable[[DrawnLengths, Chat], tuple[float, int]]) -> None:
        took, tokens = zip(*(scheme(engine, chat) for _ in range(REPEATS)), strict=True)
        seconds[name] = min(took)
        rate = f"{DIALOGUES / min(took):7.1f} dialogues/s {tokens[0] / min(took):9,.0f} tokens/s"
        print(f"{name:43} {min(took):6.1f} s {rate}", flush=True)

    measure("reference's scheme", play_reference)
    measure("the loop", play_loop)
    measure("llm.generate, same prompts with histories", generate_all)
    for name, taken in seconds.items():
        print(f"the loop is {taken / seconds['the loop']:5.2f} x as fast as: {name}")


def main() -> None:
    print(set_constants(sys.argv[1:], {"bench": sys.modules[__name__], "rollout": rollout, "grader": grader}))
    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": LAYERS}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = MODEL or save_random_model(Path(folder), **shape, **heads)
        engine = DrawnLengths(model, DTYPE, length_of=lambda key, ids: LONGEST)
        compare_schemes(engine, rollout.make_chat(engine.tokenizer))
        engine.shutdown()


if __name__ == "__main__":
    main()
