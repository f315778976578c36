"""The toy world: problems with lasting doubt, a tokenizer, and a tiny warm-started Qwen2, made once and cached.

    python -m data.toy SEED=0 OUT=data/toy          # from the repository's root; a second call returns at once

A problem is the median of nine numbers, two of which cannot be read:

    What is the median of 12 4 _ 9 15 7 _ 11 6?     ->     It is \\boxed{ 9}

The nine are distinct and come from a window of 18 consecutive numbers somewhere in 1..24. However skilled a reader is,
doubt remains, so a second attempt is worth something; and since the posterior can be enumerated, the best possible
accuracy at every number of attempts is known (`ideal_accuracy`). OUT receives:

    train.jsonl  test.jsonl     {"id", "question", "answer", "source"}; test questions are held out from all training
    warm_start/                 a Hugging Face folder that transformers and vLLM open like any other model
    made.json                   the constants that made it, the warm start's accuracy, the ideal reader's

The tokenizer knows every byte, so any text survives a round trip; the numbers and the phrases of the prompts are
single tokens, so a dialogue costs few of them.
"""

import hashlib
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rollout import SAY_CHECK, SAY_MULTI, SAY_SINGLE, SAY_WRONG, override_constants

SEED: int = 0  # decides the questions, which of them are held out, and the initial weights
OUT: str = "data/toy"  # folder to make

# The problems
LARGEST: int = 24  # numbers are 1..LARGEST
WINDOW: int = 18  # a list comes from this many consecutive numbers: what is readable hints at what is not
LIST_LENGTH: int = 9  # numbers in a list, the unreadable ones among them; odd, so that the median is one of them
UNREADABLE: int = 2  # numbers shown as BLANK
BLANK: str = "_"  # how an unreadable number looks
TRAIN_PROBLEMS: int = 20_000
TEST_PROBLEMS: int = 1_000  # standard error of an accuracy: about 1.5 points
HELD_OUT_ONE_IN: int = 5  # this share of all questions (by hash) is never trained on, neither here nor by PPO

# The tokenizer
CHAT_TEMPLATE: str = (  # ChatML as in Qwen2.5, without a default system message; system messages may come anywhere
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PHRASES: tuple[str, ...] = (  # single tokens; whatever is not listed here falls back to bytes
    *(role + "\n" for role in ("system", "user", "assistant")),
    SAY_SINGLE,
    *SAY_MULTI.removeprefix(SAY_SINGLE).split(" {attempts}"),
    *SAY_WRONG.split(" {attempts}"),
    SAY_CHECK,
    "What is the median of",
    "It is \\boxed{",
    f" {BLANK}",
)

# The model
HIDDEN: int = 64  # width
LAYERS: int = 2
HEADS: int = 2  # heads of 32: the smallest size that vLLM's CPU attention takes
INTERMEDIATE: int = 192  # width of the MLP
CONTEXT: int = 4096  # any problem file fits

# The warm start
WARM_STEPS: int = 1000  # about a minute on two cores
MUON_UNTIL: float = 0.25  # share of the steps in which Muon, not AdamW, moves the layers' matrices
MATRIX_LR: float = 2e-2  # peak, of Muon: with AdamW from the start, one seed in three stays on a plateau
WARM_LR: float = 4e-3  # peak, of AdamW: on all else, and later on the matrices, too
WARM_UP: int = 40  # steps in which learning rates go up; then they go down by a cosine to 5 % of the peak
SINGLE_ROWS: int = 128  # single turns in a batch
DIALOGUE_ROWS: int = 64  # dialogues in a batch
DIALOGUE_SHARE: float = 0.6  # share of batches that are dialogues
PLAIN_SHARE: float = (
    0.25  # share of batches that name no number of attempts; their dialogues ask to check, with no verdict
)
MOST_FAILURES: int = 4  # failed answers in a dialogue: 1..MOST_FAILURES
STAND_BY_SHARE: float = 0.5  # how often an author who is told "incorrect" stands by his answer
BLIND_SHARE: float = 0.5  # how often, otherwise, an answer is a readable number named blindly (and not learned from)
SHARPNESS: tuple[float, float] = (2.0, 1.0)  # at first, at last: experts answer x with P ~ posterior(x) ** sharpness
SHARP_UNTIL: float = 0.6  # share of the steps with the first sharpness: clearer labels are learned from much faster
CURRICULUM: tuple[tuple[int, int], ...] = ((3, 0), (5, 0), (5, 1), (7, 1), (7, 2), (9, 2), (9, 2), (9, 2))
# (length, unreadable): the short lists are stepping stones; without them one seed in two stays on a plateau


# Problems -------------------------------------------------------------------------------------------------------------


def draw_list(rng: random.Random, length: int, unreadable: int) -> tuple[list[int | None], int]:
    """What is shown (None: unreadable) and the median of the true list."""
    low = rng.randint(1, LARGEST - WINDOW + 1)
    numbers = rng.sample(range(low, low + WINDOW), length)
    hidden = rng.sample(range(length), unreadable)
    return [None if i in hidden else number for i, number in enumerate(numbers)], sorted(numbers)[length // 2]


def question_text(shown: list[int | None]) -> str:
    return f"What is the median of {' '.join(BLANK if number is None else str(number) for number in shown)}?"


def shown_numbers(question: str) -> tuple[list[int], int]:
    """The readable numbers of a question and how many are unreadable."""
    words = question.removeprefix("What is the median of ").removesuffix("?").split()
    return [int(word) for word in words if word != BLANK], words.count(BLANK)


def is_held_out(question: str, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed} {question}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def make_problems(count: int, seed: int, held_out: bool) -> list[dict]:
    """`count` different problems of one side of the split."""
    rng = random.Random(f"{seed} {'test' if held_out else 'train'}")
    problems: dict[str, dict] = {}
    while len(problems) < count:
        shown, answer = draw_list(rng, LIST_LENGTH, UNREADABLE)
        question = question_text(shown)
        if is_held_out(question, seed) == held_out and question not in problems:
            name = f"toy-{seed}-{'test' if held_out else 'train'}-{len(problems)}"
            problems[question] = {"id": name, "question": question, "answer": str(answer), "source": "toy"}
    return list(problems.values())


def posterior(readable: list[int], unreadable: int) -> dict[int, float]:
    """P(median | what is readable): every window that holds it is equally likely, then every completion."""
    readable = sorted(readable)
    # Only the middle readable numbers can be the median or be passed by it: the others drop out in pairs.
    middle = readable[(len(readable) - unreadable - 1) // 2 : (len(readable) + unreadable + 1) // 2]
    lows = range(max(1, readable[-1] - WINDOW + 1), min(readable[0], LARGEST - WINDOW + 1) + 1)
    chances: dict[int, float] = {}
    for low in lows:
        rest = [number for number in range(low, low + WINDOW) if number not in readable]
        share = 1 / (len(lows) * math.comb(len(rest), unreadable))
        for completion in combinations(rest, unreadable):
            median = sorted([*middle, *completion])[unreadable]
            chances[median] = chances.get(median, 0.0) + share
    return chances


def ideal_accuracy(questions: Iterable[str], k_max: int) -> list[float]:
    """Expected accuracy at 1..k_max attempts of who names the likeliest answers first; no reader does better."""
    chances = [sorted(posterior(*shown_numbers(question)).values(), reverse=True) for question in questions]
    return [sum(sum(best[:k]) for best in chances) / len(chances) for k in range(1, k_max + 1)]


# Tokenizer ------------------------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes (a BPE without merges), Qwen's three special tokens, the numbers, and the phrases of the prompts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins for the bytes
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    # A number is one token together with the space before it, in a question as in a box: half the ids, and
    # what is read is what is said. The longest match wins: " 12" is one token.
    words = [f" {number}" for number in range(1, LARGEST + 1)] + list(PHRASES)
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,  # a clean-up would change the text
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


# Warm start -----------------------------------------------------------------------------------------------------------


def prompt_text(question: str, attempts: int | None) -> str:
    """The start of a dialogue; attempts None is the single-turn prompt, without a word about attempts."""
    system = SAY_SINGLE if attempts is None else SAY_MULTI.replace("{attempts}", str(attempts))
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def response_text(answer: int) -> str:
    return f"It is \\boxed{{ {answer}}}<|im_end|>"


def feedback_text(attempts_left: int | None) -> str:
    """What the environment says between a response and the next attempt; None: it asks to check, without a verdict."""
    role, said = "system", SAY_WRONG.replace("{attempts}", str(attempts_left))
    if attempts_left is None:
        role, said = "user", SAY_CHECK
    return f"\n<|im_start|>{role}\n{said}<|im_end|>\n<|im_start|>assistant\n"


def failure_text(answer: int, attempts_left: int) -> str:
    return response_text(answer) + feedback_text(attempts_left)


def draw_answers(rng: random.Random, readable: list[int], unreadable: int, count: int, sharpness: float) -> list[tuple]:
    """The (answer, whether it is trained) of `count` attempts, all but the last called incorrect.

    They are called so whether they are or not: the history says nothing about the answer, and that what has failed
    should be avoided is for PPO to find out. Half of the authors stand by their answer. In a corpus where nobody does,
    greedy answers repeat just the same, but PPO then learnt a fixed order of answers instead of reading which failed
    (it is not enough that some do: see warm_start). The blind answers make the history vary.
    """
    chances = posterior(readable, unreadable)
    answers: list[tuple[int, bool]] = []
    for left in reversed(range(count)):
        if answers and rng.random() < STAND_BY_SHARE:
            answers.append((answers[-1][0], True))
        elif left and (not answers or rng.random() < BLIND_SHARE):
            answers.append((rng.choice(readable), False))
        else:
            expert = rng.choices(list(chances), [chance**sharpness for chance in chances.values()])[0]
            answers.append((expert, True))
    return answers


def draw_batch(rng: random.Random, seed: int, sharpness: float) -> list[list[tuple[str, bool]]]:
    """Dialogues, each a list of (text, whether it is trained)."""
    length, unreadable = rng.choice(CURRICULUM)
    failures = rng.randint(1, MOST_FAILURES) if rng.random() < DIALOGUE_SHARE else 0
    plain = rng.random() < PLAIN_SHARE
    rows: list[list[tuple[str, bool]]] = []
    while len(rows) < (DIALOGUE_ROWS if failures else SINGLE_ROWS):
        shown, _ = draw_list(rng, length, unreadable)
        question = question_text(shown)
        if is_held_out(question, seed):
            continue
        left = rng.randint(failures + 1, MOST_FAILURES + 1)
        row = [(prompt_text(question, None if plain else left), False)]
        for answer, trained in draw_answers(rng, *shown_numbers(question), failures + 1, sharpness):
            left -= 1
            row += [(response_text(answer), trained), (feedback_text(None if plain else left), False)]
        rows.append(row[:-1])  # no feedback to the last
    return rows


def encode_batch(tokenizer: PreTrainedTokenizerFast, rows: list[list[tuple[str, bool]]]) -> tuple[torch.Tensor, ...]:
    """Ids (B, T), positions of responses (A,), their labels (B, A), -100 where not trained.

    The texts of all rows are equally long, one by one, so nothing is padded or masked.
    """
    ids = torch.tensor(
        tokenizer(["".join(text for text, _ in row) for row in rows], add_special_tokens=False).input_ids
    )
    lengths = [len(part) for part in tokenizer([text for text, _ in rows[0]], add_special_tokens=False).input_ids]
    part = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (T,) which text a position is in
    actions = (part % 2 == 1).nonzero().squeeze(1)  # texts alternate: environment, response, environment, ...
    trained = torch.tensor([[trained for _, trained in row] for row in rows])[:, part[actions]]  # (B, A)
    return ids, actions, ids[:, actions].where(trained, torch.tensor(-100))


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    return Qwen2ForCausalLM(config)


def learning_rate(step: int) -> float:
    """As a share of the peak."""
    return min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / WARM_STEPS)))


def warm_start(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """Supervised training on responses: the format, the skill as far as it goes, and how dialogues look."""
    model = make_model(tokenizer, seed)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    # Muon gets every seed off the plateau. What PPO makes of a model that Muon has trained to its end is often a fixed
    # order of answers, which does not read what has failed; of one that AdamW has trained on it was not on any seed.
    muon = torch.optim.Muon(matrices, weight_decay=0.01)
    adamw = [torch.optim.AdamW(part, betas=(0.9, 0.98), weight_decay=0.01) for part in (matrices, others)]
    rng = random.Random(f"{seed} warm")
    for step in tqdm(range(WARM_STEPS), desc="warm start", unit="step"):
        sharpness = SHARPNESS[step >= SHARP_UNTIL * WARM_STEPS]
        ids, actions, labels = encode_batch(tokenizer, draw_batch(rng, seed, sharpness))  # (B, T), (A,), (B, A)
        logits = model(ids, logits_to_keep=actions - 1).logits  # (B, A, V)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        first = (muon, MATRIX_LR) if step < MUON_UNTIL * WARM_STEPS else (adamw[0], WARM_LR)
        for optimizer, peak in (first, (adamw[1], WARM_LR)):
            optimizer.param_groups[0]["lr"] = peak * learning_rate(step)
            optimizer.step()
        model.zero_grad()
    return model.eval()


@torch.no_grad()
def first_answer_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[dict]) -> float:
    """Share of problems whose greedy first response, at one attempt, is the right one word for word."""
    prompts = tokenizer([prompt_text(p["question"], 1) for p in problems], add_special_tokens=False)["input_ids"]
    gold = tokenizer([response_text(int(p["answer"])) for p in problems], add_special_tokens=False)["input_ids"]
    ids, responses = torch.tensor(prompts), torch.tensor(gold)  # (B, T), (B, R): all questions are equally long
    # A greedy response equals the gold one just when, fed the gold one, the model prefers each of its tokens in turn.
    logits = model(torch.cat([ids, responses], 1), logits_to_keep=responses.shape[1] + 1).logits[:, :-1]  # (B, R, V)
    return (logits.argmax(-1) == responses).all(1).float().mean().item()


# Main -----------------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def settings() -> dict:
    """The constants that decide what OUT holds."""
    return {name: json.loads(json.dumps(globals()[name])) for name in __annotations__ if name != "OUT"}


def make_toy() -> None:
    """Everything in OUT, or nothing: written beside, then renamed."""
    out = Path(OUT)
    if out.exists():
        made = json.loads((out / "made.json").read_text(encoding="utf-8"))["settings"]
        differ = [name for name, value in settings().items() if made.get(name) != value]
        if differ:
            sys.exit(f"{out} was made with other {', '.join(differ)}: delete it or choose another OUT")
        print(f"{out} is there already")
        return
    beside = out.with_name(f"{out.name}.making-{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        train = make_problems(TRAIN_PROBLEMS, SEED, held_out=False)
        test = make_problems(TEST_PROBLEMS, SEED, held_out=True)
        write_jsonl(beside / "train.jsonl", train)
        write_jsonl(beside / "test.jsonl", test)
        make_tokenizer().save_pretrained(beside / "warm_start")
        tokenizer = AutoTokenizer.from_pretrained(beside / "warm_start")  # what everyone else will see
        warm_start(tokenizer, SEED).save_pretrained(beside / "warm_start")
        model = AutoModelForCausalLM.from_pretrained(beside / "warm_start")
        accuracy = first_answer_accuracy(model, tokenizer, test)
        ideal = ideal_accuracy([problem["question"] for problem in test], 5)
        made = {"settings": settings(), "warm_start_accuracy": accuracy, "ideal_accuracy": ideal}
        (beside / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # gone already if all went well
    print(f"warm start: right at the first attempt {accuracy:.3f} of the time on {len(test)} held-out problems")
    print("ideal reader at 1..5 attempts:", " ".join(f"{value:.3f}" for value in ideal))


if __name__ == "__main__":
    override_constants(sys.argv[1:], {"toy": sys.modules[__name__]})
    make_toy()
