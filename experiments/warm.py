"""What the toy worlds share: held-out questions, a tokenizer, a tiny Qwen2, its warm start, and the folder.

A world is a module (median.py, arrows.py, programs.py) with its own constants and with
    make_problems(count, seed, held_out)         see draw_problems
    make_tokenizer()
    draw_batch(seed, rng, step)                  what its authors write, for a step of the warm start
    measure(model, tokenizer, test problems)     what made.json says about the result

The folder OUT receives:
    train.jsonl  test.jsonl     {"id", "question", "answer", "source"}; no training ever sees a test question
    warm_start/                 a Hugging Face folder that transformers and vLLM open like any other model
    made.json                   the constants that made it, and what was measured
"""

import hashlib
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from plumbing.constants import set_constants, snapshot
from plumbing.files import to_line
from rollout import SAY_CHECK, SAY_MULTI, SAY_SINGLE, SAY_WRONG

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SEED: int = 0  # decides the questions, which of them are held out, and the initial weights
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
)

# The model
HIDDEN: int = 64  # width
LAYERS: int = 2
HEADS: int = 2  # heads of 32: the smallest size that vLLM's CPU attention takes
INTERMEDIATE: int = 192  # width of the MLP
CONTEXT: int = 4096  # tokens; enough for questions from any file

WARM_UP: int = 40  # steps of the warm start with rising learning rates; then a cosine falls to 5 % of the peak

Row = list[tuple[str, bool]]  # a dialogue of the warm start: its texts, and whether each is trained on


# Problems -------------------------------------------------------------------------------------------------------------
def is_held_out(question: str, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed} {question}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def draw_problems(
    source: str, draw: Callable[[random.Random], dict], count: int, seed: int, held_out: bool, repeats: bool = False
) -> list[dict]:
    """`count` problems, the questions of all of them held out from training or of none. draw(rng) -> what a problem
    asks. repeats: whether several may ask the same question."""
    part, asked, problems = "test" if held_out else "train", set[str](), list[dict]()
    rng = random.Random(f"{seed} {part}")
    while len(problems) < count:
        problem = draw(rng)
        question = problem["question"]
        if is_held_out(question, seed) == held_out and (repeats or question not in asked):
            asked.add(question)
            problems.append({"id": f"{source}-{seed}-{part}-{len(problems)}"} | problem | {"source": source})
    return problems


# Texts and tokens -----------------------------------------------------------------------------------------------------
def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Bytes (a BPE without merges), so that any text survives a round trip; Qwen's three special tokens; and the words,
    a token each, so that a dialogue has few. Of several that match the longest wins: " 12" is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins for the bytes
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
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


def prompt_text(question: str, attempts: int | None) -> str:
    """The start of a dialogue; attempts None: the single-turn prompt, which does not mention attempts."""
    system = SAY_SINGLE if attempts is None else SAY_MULTI.replace("{attempts}", str(attempts))
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def feedback_text(attempts_left: int | None) -> str:
    """What the environment says between two attempts; None: it asks to check the answer, without a verdict."""
    role, words = "system", SAY_WRONG.replace("{attempts}", str(attempts_left))
    if attempts_left is None:
        role, words = "user", SAY_CHECK
    return f"\n<|im_start|>{role}\n{words}<|im_end|>\n<|im_start|>assistant\n"


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


# The model ------------------------------------------------------------------------------------------------------------
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


def train_warm_start(world: ModuleType, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A new model, after supervised training on WARM_STEPS batches of the world's authors."""
    model = make_model(tokenizer, seed)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, weight_decay=0.01)
    adamw_matrices = torch.optim.AdamW(matrices, betas=(0.9, 0.98), weight_decay=0.01)
    adamw_others = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01)
    rng, steps = random.Random(f"{seed} warm"), world.WARM_STEPS
    for step in tqdm(range(steps), desc="warm start", unit="step"):
        ids, actions, labels = encode_batch(tokenizer, world.draw_batch(seed, rng, step))  # (B, T), (A,), (B, A)
        logits = model(ids, logits_to_keep=actions - 1).logits  # (B, A, V)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        of_matrices, peak = adamw_matrices, world.WARM_LR
        if step < world.MUON_UNTIL * steps:
            of_matrices, peak = muon, world.MATRIX_LR
        share = min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        of_matrices.param_groups[0]["lr"] = peak * share
        adamw_others.param_groups[0]["lr"] = world.EMBEDDING_LR * share
        of_matrices.step()
        adamw_others.step()
        model.zero_grad()
    return model.eval()


@torch.no_grad()
def share_said(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], responses: list[str]
) -> float:
    """Share of the prompts at which the greedy response is this one, token by token. All have the same lengths."""
    ids = torch.tensor(tokenizer(prompts, add_special_tokens=False)["input_ids"])  # (B, T)
    gold = torch.tensor(tokenizer(responses, add_special_tokens=False)["input_ids"])  # (B, R)
    # A greedy response is the gold one exactly if the model, given the gold tokens so far, prefers the next one.
    logits = model(torch.cat([ids, gold], 1), logits_to_keep=gold.shape[1] + 1).logits[:, :-1]  # (B, R, V)
    return (logits.argmax(-1) == gold).all(1).float().mean().item()


# The folder -----------------------------------------------------------------------------------------------------------
def make_world(world: ModuleType) -> None:
    """Make the folder OUT, whole or not at all: it is made elsewhere, and moved to its place at the end."""
    out = Path(world.OUT)
    settings = json.loads(json.dumps(snapshot({"world": world, "warm": sys.modules[__name__]})))  # as a file has them
    del settings["world.OUT"]
    if out.exists():
        made = json.loads((out / "made.json").read_text(encoding="utf-8"))["settings"]
        differ = [name.partition(".")[2] for name, value in settings.items() if made.get(name, value) != value]
        if differ:
            raise SystemExit(f"{out} was made with other {', '.join(differ)}: delete it or choose another OUT")
        print(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as beside:
        folder = Path(beside, out.name)
        tokenizer = world.make_tokenizer()
        tokenizer.save_pretrained(folder / "warm_start")
        train = world.make_problems(TRAIN_PROBLEMS, SEED, held_out=False)
        test = world.make_problems(TEST_PROBLEMS, SEED, held_out=True)
        for name, problems in ("train", train), ("test", test):
            (folder / f"{name}.jsonl").write_text("".join(map(to_line, problems)), encoding="utf-8")
        model = train_warm_start(world, tokenizer, SEED)
        model.save_pretrained(folder / "warm_start")
        measured = world.measure(model, tokenizer, test)
        (folder / "made.json").write_text(json.dumps({"settings": settings} | measured, indent=1) + "\n", "utf-8")
        folder.rename(out)
    print(f"{len(test)} held-out problems:", json.dumps(measured))


def main(world: ModuleType) -> None:
    if changed := set_constants(sys.argv[1:], {"world": world, "warm": sys.modules[__name__]}):
        print(changed)
    make_world(world)
