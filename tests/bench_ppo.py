"""What a step of ppo.py costs beside the bare models and beside TRL: tables, each ratio within this one run.

    python tests/bench_ppo.py                            # a random model of 4 M parameters; some minutes on two cores
    python tests/bench_ppo.py TRL_PYTHON=python of a venv that has trl
    python tests/bench_ppo.py PART=update MAX_TOKENS_PER_MICRO_BATCH=2048
    python tests/bench_ppo.py                            # with a GPU: the shape of Qwen2.5-Math-1.5B, bfloat16

The workload: dialogues of log-uniform length (a long tail), half of their tokens actions, in 1 to 5 attempts.
Each part runs in a process of its own, so that peaks of memory are its own.
"""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo
import rollout
from plumbing import logs, models, packing, ranks
from plumbing.constants import set_constants
from rollout import Attempt, Dialogue
from tests.workload import save_random_model, seconds_of

PART: str = ""  # "update" (and beside TRL where TRL_PYTHON is given) or "head"; "" = both
PRESET: str = "gpu" if torch.cuda.is_available() else "cpu"
TRL_PYTHON: str = ""  # the python that TRL's trainer runs with
SHORTEST: int = 64  # tokens of a dialogue
LONGEST: int = 2048
HIDDEN: int = 1536  # the random model; these are Qwen2.5-Math-1.5B's
LAYERS: int = 28
HEADS: int = 12
KV_HEADS: int = 2
INTERMEDIATE: int = 8960
VOCABULARY: int = 151_936  # rows of the head
TOKENS: int = 151_665  # of the tokenizer: the rows that can be sampled
HEAD_WIDTH: int = 1536  # of the log-probability part, measured alone, with HEAD_VOCABULARY and HEAD_TOKENS
HEAD_VOCABULARY: int = 151_936
HEAD_TOKENS: int = 151_665
BARE_TOKENS: int = 8192  # tokens of a dense batch of the bare model at the most
REPEATS: int = 3  # the median of so many counts
GOAL: float = 0.9 if torch.cuda.is_available() else 0.88  # of the bare models' tokens/s

PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {"DIALOGUES": 256},
    "cpu": {  # the head holds about as large a part of the weights as in the 1.5 B model
        "HIDDEN": 256, "LAYERS": 4, "HEADS": 4, "KV_HEADS": 2, "INTERMEDIATE": 1024, "VOCABULARY": 2048,
        "TOKENS": 2041, "SHORTEST": 32, "LONGEST": 1024, "DIALOGUES": 32, "MINI_BATCH": 16, "COMPUTE_DTYPE": "float32",
        "GRADIENT_CHECKPOINTING": False, "MAX_TOKENS_PER_MICRO_BATCH": 512, "BARE_TOKENS": 2048,
    },
}  # fmt: skip

# TRL's PPOTrainer on the same dialogues: generate() gives them back, and its time does not count. It hands on the
# logits, too, from which TRL has the old log-probabilities, so there TRL is spared a pass. The reward model is tiny.
TRL_PROGRAM = """
import json, resource, sys, time
import torch, trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
given = json.load(open(sys.argv[1]))
torch.set_num_threads(given["threads"])
tokenizer = AutoTokenizer.from_pretrained(given["model"])
tokenizer.pad_token_id = 0
load = dict(dtype=torch.float32)
actor, reference = (AutoModelForCausalLM.from_pretrained(given["model"], **load) for _ in range(2))
critic = AutoModelForSequenceClassification.from_pretrained(given["model"], num_labels=1, **load)
tiny = Qwen2Config(vocab_size=actor.config.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                   num_attention_heads=1, num_key_value_heads=1, num_labels=1)
judge = AutoModelForSequenceClassification.from_config(tiny)
for model in (critic, judge):
    model.config.pad_token_id = 0
rows = [torch.tensor(ids) for ids in given["dialogues"]]
full = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T); a query is the first two tokens: no padding
start = []
def generate(model, queries, *_):
    logits = torch.zeros(*full[:, 2:].shape, model.config.vocab_size)  # (B, T - 2, V), as TRL keeps them
    start.append((time.perf_counter(), time.process_time()))
    return full, logits
ppo_trainer.batch_generation = generate
config = PPOConfig(
    total_episodes=2 * len(rows), response_length=full.shape[1] - 2, num_sample_generations=0, learning_rate=5e-7,
    use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
    logging_strategy="no", disable_tqdm=True, **given["config"],
)
trainer = PPOTrainer(
    args=config, processing_class=tokenizer, model=actor, ref_model=reference, reward_model=judge, value_model=critic,
    train_dataset=Dataset.from_dict({"input_ids": [ids[:2] for ids in given["dialogues"]]}),
)
trainer.train()
took, worked = time.perf_counter() - start[-1][0], time.process_time() - start[-1][1]
print(json.dumps({"seconds": took, "worked": worked, "version": trl.__version__, "width": full.shape[1],
                  "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


# The workload ---------------------------------------------------------------------------------------------------------
def draw_dialogues() -> list[Dialogue]:
    rng = random.Random(0)
    return [draw_dialogue(rng) for _ in range(ppo.DIALOGUES)]


def draw_dialogue(rng: random.Random) -> Dialogue:
    """Environment and attempts in turn, equally long; what division leaves over belongs to the prompt."""
    length = round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
    attempts = rng.randint(1, 5)
    part = length // (2 * attempts)
    dialogue = Dialogue({"id": "x", "question": "q", "answer": "1"}, attempts)

    def ids(count: int) -> list[int]:
        return [rng.randrange(1, TOKENS) for _ in range(count)]

    for k in range(attempts):
        dialogue.append(ids(part if k else length - (2 * attempts - 1) * part))
        start = len(dialogue.ids)
        dialogue.append(ids(part), [0.0] * part)
        status = "correct" if k == attempts - 1 and rng.random() < 0.5 else "wrong"
        dialogue.attempts.append(Attempt(start, len(dialogue.ids), None, status, "stop"))
    rollout.assign_rewards(dialogue)
    return dialogue


def random_model(folder: Path) -> str:
    shape = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return save_random_model(folder, VOCABULARY, **shape, **heads)


# The update: ours, the bare models, TRL -------------------------------------------------------------------------------
def rate_line(tokens: int, took: float, worked: float) -> str:
    return f"{took:6.1f} s {tokens / took:9,.0f} tokens/s ({tokens / worked:,.0f} a second of the CPU)"


def our_update(learner: ppo.Learner, dialogues: list[Dialogue]) -> None:
    batch = ppo.make_batch(dialogues)
    ppo.prepare(batch, dialogues, learner)
    ppo.update(batch, learner, train_actor=True)


def bare_passes(lm: nn.Module, rows: torch.Tensor, batch: int) -> None:
    """As many passes of the bare model: old and reference log-probabilities and values without gradients, then actor
    and critic with; an actor has its usual loss, a critic no head. rows (R, L): no padding, no packing, no mask."""
    for ids in rows.split(batch):
        with torch.no_grad():
            for _ in range(2):
                lm(input_ids=ids, labels=ids, use_cache=False)
            lm.model(input_ids=ids, use_cache=False)
        for _ in range(ppo.EPOCHS):
            lm(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            lm.model(input_ids=ids, use_cache=False).last_hidden_state.mean().backward()
    lm.zero_grad()


def bench_update() -> None:
    dialogues = draw_dialogues()
    lengths = [len(d.ids) for d in dialogues]
    tokens, actions = sum(lengths), sum(sum(d.mask) for d in dialogues)
    with tempfile.TemporaryDirectory() as folder:
        ppo.MODEL = random_model(Path(folder) / "model")
        ppo.MAX_MISMATCH = math.inf  # nobody sampled these dialogues
        learner = ppo.Learner.load(TOKENS)
        parameters = sum(p.numel() for p in learner.actor.parameters())
        print(f"model of {parameters:,} parameters, {ppo.COMPUTE_DTYPE}, {torch.get_num_threads()} threads")
        print(f"{len(lengths)} dialogues of {min(lengths)} to {max(lengths)} tokens, {tokens:,} in all, {actions:,} of "
              f"them actions; mini-batches of {ppo.MINI_BATCH}, {ppo.EPOCHS} epoch(s)")  # fmt: skip
        print(logs.memory_plan(ppo.MODEL, ppo.COMPUTE_DTYPE, critic=True, reference=True), flush=True)
        our_update(learner, dialogues)  # the first is slower
        peak = ranks.peak_memory()
        bare = AutoModelForCausalLM.from_pretrained(ppo.MODEL, dtype=getattr(torch, ppo.COMPUTE_DTYPE)).train()
        bare.to(ranks.device())
        if ranks.GRADIENT_CHECKPOINTING:
            bare.gradient_checkpointing_enable({"use_reentrant": False})
        # Rows of this length attend to as many pairs of tokens as the dialogues do.
        length = round(sum(n * n for n in lengths) / tokens)
        rows = torch.randint(1, VOCABULARY, (round(tokens / length), length), device=ranks.device())
        batch = max(1, min(packing.MAX_TOKENS_PER_MICRO_BATCH, BARE_TOKENS) // length)
        bare_passes(bare, rows[:batch], batch)
        ours, theirs = [], []
        for _ in range(REPEATS):  # in turn: whatever slows the machine down slows both
            ours.append(seconds_of(lambda: our_update(learner, dialogues)))
            theirs.append(seconds_of(lambda: bare_passes(bare, rows, batch)))
        took, worked = map(statistics.median, zip(*ours, strict=True))
        bare_took, bare_worked = (x * tokens / rows.numel() for x in map(statistics.median, zip(*theirs, strict=True)))
        print(f"ours: a whole update             {rate_line(tokens, took, worked)}, peak {peak:.2f} GiB")
        print(f"bare models, {batch} x {length} dense     {rate_line(tokens, bare_took, bare_worked)}")
        print(f"ours / bare: {bare_took / took:.2f}, by CPU time {bare_worked / worked:.2f} (goal {GOAL})", flush=True)
        if torch.cuda.is_available():
            flops = logs.update_flops(learner.actor.lm, dialogues, True, True, ppo.EPOCHS)
            print(f"MFU {flops / took / (logs.PEAK_TFLOPS * 1e12):.1%} of {logs.PEAK_TFLOPS} TFLOPS")
        if TRL_PYTHON:
            bench_trl(dialogues, folder, took, worked, peak)


def bench_trl(dialogues: list[Dialogue], folder: str, took: float, worked: float, peak: float) -> None:
    tokens, longest = sum(len(d.ids) for d in dialogues), max(len(d.ids) for d in dialogues)
    micro = 2 ** int(math.log2(max(1, BARE_TOKENS // longest)))
    config = {
        "output_dir": folder, "num_mini_batches": ppo.DIALOGUES // ppo.MINI_BATCH, "num_ppo_epochs": ppo.EPOCHS,
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": len(dialogues) // micro,
        "local_rollout_forward_batch_size": micro,
    }  # fmt: skip
    given = {"model": ppo.MODEL, "dialogues": [d.ids for d in dialogues], "threads": torch.get_num_threads()}
    arguments = Path(folder) / "trl.json"
    arguments.write_text(json.dumps(given | {"config": config}), encoding="utf-8")
    command = [TRL_PYTHON, "-c", TRL_PROGRAM, str(arguments)]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}  # not of our group
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=alone, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    trl_took, trl_worked = found["seconds"], found["worked"]
    print(f"TRL {found['version']}, {micro} x {found['width']} padded    "
          f"{rate_line(tokens, trl_took, trl_worked)}, peak {found['gib']:.2f} GiB; generation is not counted, "
          "and a pass for old log-probabilities not needed")  # fmt: skip
    print(f"ours / TRL: {trl_took / took:.1f}, by CPU time {trl_worked / worked:.1f} (goal 3); "
          f"memory {peak / found['gib']:.2f}", flush=True)  # fmt: skip


# The log-probabilities alone ------------------------------------------------------------------------------------------
def bench_head() -> None:
    """Actor.forward on a thin layer: its time is the head's, of which all rows are tokens or some are padding."""
    shape = {"hidden_size": HEAD_WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 12}
    config = Qwen2Config(HEAD_VOCABULARY, **shape, num_key_value_heads=2, tie_word_embeddings=True)
    lm = Qwen2ForCausalLM(config).to(ranks.device(), getattr(torch, ppo.COMPUTE_DTYPE))
    actions = packing.LOGITS_CHUNK
    ids = torch.randint(HEAD_TOKENS, (1, actions + 1), device=ranks.device())
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    micro = packing.make_micro_batch(ids, mask, [actions + 1], [[0]], kernel=False)

    def work(tokens: int) -> None:
        actor = SimpleNamespace(lm=lm, tokens=tokens, learn_entropy=True)
        logprobs, entropy = models.Actor.forward(actor, micro)
        (logprobs.sum() - 0.01 * entropy.sum()).backward()

    work(HEAD_TOKENS)  # the first is slower
    took: dict[int, list[float]] = {HEAD_VOCABULARY: [], HEAD_TOKENS: []}
    for _ in range(REPEATS):  # in turn: whatever slows the machine down slows both
        for tokens, seconds in took.items():
            wall, worked = seconds_of(lambda tokens=tokens: work(tokens))
            seconds.append(wall if torch.cuda.is_available() else worked)
    whole, cut = map(statistics.median, took.values())
    print(f"{actions} actions, a head of {HEAD_VOCABULARY:,} x {HEAD_WIDTH}, {ppo.COMPUTE_DTYPE}: {whole:.4f} s for as "
          f"many tokens, {cut:.4f} s for {HEAD_TOKENS:,}: {whole / cut:.3f} times as fast (goal .95)")  # fmt: skip


def main() -> None:
    print(set_constants(sys.argv[1:], {"bench": sys.modules[__name__]} | ppo.MODULES, PRESETS))
    if not PART:
        for part in ("update", "head"):
            print(f"\n{part}", flush=True)
            subprocess.run([sys.executable, __file__, *sys.argv[1:], f"PART={part}"], check=True)
    elif PART == "head":
        bench_head()
    else:
        ranks.start_ranks()
        bench_update()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
