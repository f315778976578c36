"""A toy world: questions that no reader can answer for certain, a tokenizer, and a tiny model to start from.

    python -m experiments.median SEED=0 OUT=data/toy      # a second call finds it there and returns at once

A question asks for the median of nine numbers, two of which cannot be read:

    What is the median of 12 4 _ 9 15 7 _ 11 6?     ->     It is \\boxed{ 9}

The nine are distinct and come from 18 consecutive numbers somewhere in 1..24. Even the best reader can only say how
likely each answer is, so a second attempt is worth something. Those probabilities can be computed, and with them the
best possible accuracy at every number of attempts (`ideal_accuracy`). The folder OUT receives:

    train.jsonl  test.jsonl     {"id", "question", "answer", "source"}; no training ever sees a test question
    warm_start/                 a Hugging Face folder that transformers and vLLM open like any other model
    made.json                   the constants that made it, the accuracy of the warm start and of the ideal reader
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

from plumbing.constants import set_constants
from plumbing.files import to_line
from rollout import SAY_CHECK, SAY_MULTI, SAY_SINGLE, SAY_WRONG

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SEED: int = 0  # decides the questions, which of them are held out, and the initial weights
OUT: str = "data/toy"  # the folder to make

# The problems
LARGEST: int = 24  # numbers are 1..LARGEST
WINDOW: int = 18  # a list comes from this many consecutive numbers: the readable ones hint at the others
LIST_LENGTH: int = 9  # numbers in a list, the unreadable ones among them; odd, so the median is one of them
UNREADABLE: int = 2  # numbers shown as BLANK
BLANK: str = "_"  # how an unreadable number looks
TRAIN_PROBLEMS: int = 20_000
TEST_PROBLEMS: int = 1_000  # standard error of an accuracy: about 1.5 points
HELD_OUT_ONE_IN: int = 5  # one question in so many (by hash) is for testing only

# The tokenizer
CHAT_TEMPLATE: str = (  # ChatML as in Qwen2.5, with system messages in any place
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PHRASES: tuple[str, ...] = (  # single tokens; any other text becomes a token a byte
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
CONTEXT: int = 4096  # tokens; enough for questions from any file

# The warm start
WARM_STEPS: int = 1000  # about a minute on two cores
MUON_UNTIL: float = 0.25  # share of the steps in which Muon, not AdamW, updates the layers' matrices
MATRIX_LR: float = 2e-2  # peak, of Muon; with AdamW from the start one seed in three stays on a plateau
WARM_LR: float = 4e-3  # peak, of AdamW, which updates everything else and, later, the matrices as well
WARM_UP: int = 40  # steps of rising learning rates; then a cosine falls to 5 % of the peak
SINGLE_ROWS: int = 128  # dialogues in a batch of single attempts
DIALOGUE_ROWS: int = 64  # dialogues in a batch of several attempts
DIALOGUE_SHARE: float = 0.6  # share of batches with several attempts
PLAIN_SHARE: float = 0.25  # share of batches that state no number of attempts and ask to check, without a verdict
MOST_FAILURES: int = 4  # failed attempts in a dialogue: 1..MOST_FAILURES
STAND_BY_SHARE: float = 0.5  # share of "incorrect" verdicts after which the author repeats his answer
BLIND_SHARE: float = 0.5  # share of the other failed answers that are any readable number (and not trained on)
SHARPNESS: tuple[float, float] = (2.0, 1.0)  # first, later: an expert answers x with P ~ P(x is the median)^sharpness
SHARP_UNTIL: float = 0.6  # share of the steps with the first sharpness: clearer labels are learned much faster
CURRICULUM: tuple[tuple[int, int], ...] = ((3, 0), (5, 0), (5, 1), (7, 1), (7, 2), (9, 2), (9, 2), (9, 2))
# (length, unreadable), drawn for each batch; without the short lists one seed in two stays on a plateau


# Problems -------------------------------------------------------------------------------------------------------------
def draw_list(rng: random.Random, length: int, unreadable: int) -> tuple[list[int | None], int]:
    """What is shown (None: unreadable) and the median of the true list."""
    low = rng.randint(1, LARGEST - WINDOW + 1)
    numbers = rng.sample(range(low, low + WINDOW), length)
    hidden = rng.sample(range(length), unreadable)
    return [None if i in hidden else number for i, number in enumerate(numbers)], sorted(numbers)[length // 2]


def write_question(shown: list[int | None]) -> str:
    return f"What is the median of {' '.join(BLANK if number is None else str(number) for number in shown)}?"


def read_question(question: str) -> tuple[list[int], int]:
    """The readable numbers of a question, and how many are unreadable."""
    words = question.removeprefix("What is the median of ").removesuffix("?").split()
    return [int(word) for word in words if word != BLANK], words.count(BLANK)


def is_held_out(question: str, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed} {question}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def make_problems(count: int, seed: int, held_out: bool) -> list[dict]:
    """`count` different problems, all of them held out from training or none."""
    part = "test" if held_out else "train"
    rng = random.Random(f"{seed} {part}")
    problems: dict[str, dict] = {}
    while len(problems) < count:
        shown, answer = draw_list(rng, LIST_LENGTH, UNREADABLE)
        question = write_question(shown)
        if is_held_out(question, seed) == held_out and question not in problems:
            name = f"toy-{seed}-{part}-{len(problems)}"
            problems[question] = {"id": name, "question": question, "answer": str(answer), "source": "toy"}
    return list(problems.values())


def median_probabilities(readable: list[int], unreadable: int) -> dict[int, float]:
    """P(median | the readable numbers): all windows that hold them are equally likely, and all ways to complete them.

    >>> median_probabilities([1, 2], 1)  # the third number is larger, whatever it is
    {2: 1.0}
    """
    readable = sorted(readable)
    # Only the middle readable numbers can be the median or next to it: the others drop out in pairs.
    middle = readable[(len(readable) - unreadable - 1) // 2 : (len(readable) + unreadable + 1) // 2]
    lows = range(max(1, readable[-1] - WINDOW + 1), min(readable[0], LARGEST - WINDOW + 1) + 1)
    probabilities: dict[int, float] = {}
    for low in lows:
        rest = [number for number in range(low, low + WINDOW) if number not in readable]
        share = 1 / (len(lows) * math.comb(len(rest), unreadable))
        for completion in combinations(rest, unreadable):
            median = sorted([*middle, *completion])[unreadable]
            probabilities[median] = probabilities.get(median, 0.0) + share
    return probabilities


def ideal_accuracy(questions: Iterable[str], k_max: int) -> list[float]:
    """Expected accuracy at 1..k_max attempts of a reader who names the likeliest answers first; none is better."""
    sets = [sorted(median_probabilities(*read_question(q)).values(), reverse=True) for q in questions]
    return [sum(sum(probabilities[:k]) for probabilities in sets) / len(sets) for k in range(1, k_max + 1)]


# Tokenizer ------------------------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes (a BPE without merges), so that any text survives a round trip; Qwen's three special tokens; the numbers
    and the phrases of the prompts, so that a dialogue has few tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins for the bytes
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    # A number and the space before it are one token, the same in a question and in a box. The longest match wins, so
    # that " 12" is one token.
    words = [f" {number}" for number in range(1, LARGEST + 1)] + list(PHRASES)
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,  # it would change the text
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


# Warm start -----------------------------------------------------------------------------------------------------------
Row = list[tuple[str, bool]]  # a dialogue of the warm start: its texts, and whether each is trained on


def prompt_text(question: str, attempts: int | None) -> str:
    """The start of a dialogue; attempts None: the single-turn prompt, which does not mention attempts."""
    system = SAY_SINGLE if attempts is None else SAY_MULTI.replace("{attempts}", str(attempts))
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def response_text(answer: int | str) -> str:
    return f"It is \\boxed{{ {answer}}}<|im_end|>"


def feedback_text(attempts_left: int | None) -> str:
    """What the environment says between two attempts; None: it asks to check the answer, without a verdict."""
    role, words = "system", SAY_WRONG.replace("{attempts}", str(attempts_left))
    if attempts_left is None:
        role, words = "user", SAY_CHECK
    return f"\n<|im_start|>{role}\n{words}<|im_end|>\n<|im_start|>assistant\n"


def draw_answers(
    rng: random.Random, readable: list[int], unreadable: int, count: int, sharpness: float
) -> list[tuple[int, bool]]:
    """The answers of `count` attempts, all but the last called incorrect, and for each whether it is trained on.

    They are called incorrect whether they are or not, so the history says nothing about the right answer: that failed
    answers should be avoided is left for PPO to find out. After half of the verdicts the author repeats his answer. In
    dialogues where nobody does, a model still repeats its greedy answers, but PPO then taught it a fixed order of
    answers instead of looking at which one failed. The blind answers make the histories differ.
    """
    probabilities = median_probabilities(readable, unreadable)
    answers: list[tuple[int, bool]] = []
    for left in reversed(range(count)):
        if answers and rng.random() < STAND_BY_SHARE:
            answers.append((answers[-1][0], True))
        elif left and (not answers or rng.random() < BLIND_SHARE):
            answers.append((rng.choice(readable), False))
        else:
            weights = [probability**sharpness for probability in probabilities.values()]
            answers.append((rng.choices(list(probabilities), weights)[0], True))
    return answers


def draw_batch(rng: random.Random, seed: int, sharpness: float) -> list[Row]:
    """Dialogues of one length."""
    length, unreadable = rng.choice(CURRICULUM)
    failures = rng.randint(1, MOST_FAILURES) if rng.random() < DIALOGUE_SHARE else 0
    plain = rng.random() < PLAIN_SHARE
    rows: list[Row] = []
    while len(rows) < (DIALOGUE_ROWS if failures else SINGLE_ROWS):
        shown, _ = draw_list(rng, length, unreadable)
        question = write_question(shown)
        if is_held_out(question, seed):
            continue
        left = rng.randint(failures + 1, MOST_FAILURES + 1)
        row = [(prompt_text(question, None if plain else left), False)]
        for answer, trained in draw_answers(rng, *read_question(question), failures + 1, sharpness):
            left -= 1
            row += [(response_text(answer), trained), (feedback_text(None if plain else left), False)]
        rows.append(row[:-1])  # the last attempt gets no feedback
    return rows


def encode_batch(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, T), positions of the responses (A,), their labels (B, A) with -100 where nothing is trained.

    The texts of all rows have the same lengths, one by one, so nothing is padded.
    """
    texts = ["".join(text for text, _ in row) for row in rows]
    ids = torch.tensor(tokenizer(texts, add_special_tokens=False).input_ids)
    lengths = [len(part) for part in tokenizer([text for text, _ in rows[0]], add_special_tokens=False).input_ids]
    part = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (T,) the text that a position is in
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


def train_warm_start(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """Supervised training on responses: the format, the skill as far as it can be had, and what dialogues look like."""
    model = make_model(tokenizer, seed)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    # Muon gets every seed off the plateau. But PPO often turned a model that Muon had trained to the end into a fixed
    # order of answers, which ignores what has failed; it never did so after AdamW had trained the model further.
    muon = torch.optim.Muon(matrices, weight_decay=0.01)
    adamw_matrices = torch.optim.AdamW(matrices, betas=(0.9, 0.98), weight_decay=0.01)
    adamw_others = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(f"{seed} warm")
    for step in tqdm(range(WARM_STEPS), desc="warm start", unit="step"):
        sharpness = SHARPNESS[0] if step < SHARP_UNTIL * WARM_STEPS else SHARPNESS[1]
        ids, actions, labels = encode_batch(tokenizer, draw_batch(rng, seed, sharpness))  # (B, T), (A,), (B, A)
        logits = model(ids, logits_to_keep=actions - 1).logits  # (B, A, V)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        of_matrices, peak = (muon, MATRIX_LR) if step < MUON_UNTIL * WARM_STEPS else (adamw_matrices, WARM_LR)
        of_matrices.param_groups[0]["lr"] = peak * learning_rate(step)
        adamw_others.param_groups[0]["lr"] = WARM_LR * learning_rate(step)
        of_matrices.step()
        adamw_others.step()
        model.zero_grad()
    return model.eval()


@torch.no_grad()
def measure_first_answers(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[dict]) -> float:
    """Share of problems whose greedy first response, with one attempt granted, is the right one, token by token."""
    prompts = tokenizer([prompt_text(p["question"], 1) for p in problems], add_special_tokens=False)["input_ids"]
    gold = tokenizer([response_text(p["answer"]) for p in problems], add_special_tokens=False)["input_ids"]
    ids, responses = torch.tensor(prompts), torch.tensor(gold)  # (B, T), (B, R): all questions have the same length
    # A greedy response is the gold one exactly if the model, given the gold tokens so far, prefers the next one.
    logits = model(torch.cat([ids, responses], 1), logits_to_keep=responses.shape[1] + 1).logits[:, :-1]  # (B, R, V)
    return (logits.argmax(-1) == responses).all(1).float().mean().item()


# The folder -----------------------------------------------------------------------------------------------------------
def make_world() -> None:
    """Make the folder OUT, whole or not at all: it is made under another name, which is changed at the end."""
    out = Path(OUT)
    settings = {name: json.loads(json.dumps(globals()[name])) for name in __annotations__ if name != "OUT"}
    if out.exists():
        made = json.loads((out / "made.json").read_text(encoding="utf-8"))["settings"]
        differ = [name for name, value in settings.items() if made.get(name) != value]
        if differ:
            raise SystemExit(f"{out} was made with other {', '.join(differ)}: delete it or choose another OUT")
        print(f"{out} is there already")
        return
    beside = out.with_name(f"{out.name}.making-{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        train = make_problems(TRAIN_PROBLEMS, SEED, held_out=False)
        test = make_problems(TEST_PROBLEMS, SEED, held_out=True)
        for name, problems in ("train", train), ("test", test):
            (beside / f"{name}.jsonl").write_text("".join(map(to_line, problems)), encoding="utf-8")
        make_tokenizer().save_pretrained(beside / "warm_start")
        tokenizer = AutoTokenizer.from_pretrained(beside / "warm_start")  # as the stages will open it
        model = train_warm_start(tokenizer, SEED)
        model.save_pretrained(beside / "warm_start")
        accuracy = measure_first_answers(model, tokenizer, test)
        ideal = ideal_accuracy([problem["question"] for problem in test], 5)
        made = {"settings": settings, "warm_start_accuracy": accuracy, "ideal_accuracy": ideal}
        (beside / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # what is left if something failed
    print(f"warm start: {accuracy:.3f} of {len(test)} held-out problems right at the first attempt")
    print("ideal reader with 1 to 5 attempts:", " ".join(f"{value:.3f}" for value in ideal))


if __name__ == "__main__":
    if changed := set_constants(sys.argv[1:], {"median": sys.modules[__name__]}):
        print(changed)
    make_world()
