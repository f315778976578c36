"""What a run says of itself: metrics.jsonl, TensorBoard, a line on the terminal, the time of each phase, its plan."""

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from plumbing import engine, packing, ranks
from plumbing.checkpoints import clear_errors
from plumbing.files import append_jsonl, drop_rows_after

import torch
import torch.distributed as dist
from tqdm import tqdm

TRACK: Literal["", "tensorboard", "wandb"] = "tensorboard"  # where metrics go besides metrics.jsonl
PEAK_TFLOPS: float = 989.0  # of a GPU in its compute dtype, which MFU is a share of (H100, H200: 989; A100: 312)
DIALOGUES_LOGGED: int = 2  # dialogues of each step in dialogues.jsonl, and of each checkpoint in tokens.jsonl

SHOWN = {  # metric -> its name on the terminal
    "reward": "reward", "accuracy_at_1": "acc@1", "accuracy": "acc", "attempts_used": "attempts",
    "attempt_length": "length", "entropy": "entropy", "kl_k3": "kl", "clipped": "clipped",
    "explained_variance": "expl.var", "tokens_per_second": "tokens/s", "peak_memory_gib": "GiB",
}  # fmt: skip


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def stop(self, phase: str) -> None:
        """The time since the last stop belongs to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now

    def take(self) -> dict[str, float]:
        """The seconds so far; counting begins anew."""
        taken, self.seconds = self.seconds, defaultdict(float)
        return taken


class Log:
    """metrics.jsonl, TensorBoard, Weights & Biases (which copies TensorBoard's), and the terminal; rank 0's alone."""

    def __init__(self, folder: Path, name: str, step: int, progress: float):
        """step: the last one that is done; progress: the share of the training that is done."""
        self.folder = folder
        self.writer = None
        for file in ("metrics.jsonl", "dialogues.jsonl", "tokens.jsonl"):
            drop_rows_after(folder / file, step)
        if TRACK == "wandb":
            import wandb

            run = {"name": name, "id": name.replace("/", "-"), "resume": "allow"}
            wandb.init(project="multi-attempt", dir=folder, sync_tensorboard=True, **run)
        if TRACK:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        shown = "{desc}: {percentage:.1f}%|{bar}| {elapsed}, {remaining} left"
        self.bar = tqdm(total=1.0, initial=progress, desc=name, bar_format=shown)

    def write(self, metrics: dict[str, float], progress: float) -> None:
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.append("metrics.jsonl", [row])
        for name, value in row.items():
            if self.writer and value is not None and name != "step":
                self.writer.add_scalar(name, value, metrics["step"])
        if self.writer:
            self.writer.flush()  # the process may be killed at any time
        cells = [f"{label} {row[name]:.4g}" for name, label in SHOWN.items() if row.get(name) is not None]
        self.bar.write(f"step {metrics['step']} | " + " | ".join(cells))
        self.bar.update(progress - self.bar.n)

    def write_dialogues(self, batch: Any, tokenizer: Any, step: int, with_tokens: bool) -> None:
        """Some of the step's dialogues as text, and, with_tokens, as tokens with their advantages, for the report."""
        rows = range(min(DIALOGUES_LOGGED, len(batch.dialogues)))
        texts = [describe_dialogue(batch.dialogues[row], step) for row in rows]
        for row in rows:
            texts[row]["text"] = tokenizer.decode(batch.dialogues[row].ids)
        self.append("dialogues.jsonl", texts)
        if with_tokens:
            self.append("tokens.jsonl", [describe_tokens(batch, row, tokenizer, step) for row in rows])

    def append(self, file: str, rows: Iterable[dict[str, Any]]) -> None:
        with clear_errors(self.folder / file):
            append_jsonl(self.folder / file, rows)


def describe_dialogue(dialogue: Any, step: int) -> dict[str, Any]:
    """A dialogue (rollout.Dialogue) as a row of a log."""
    return {
        "step": step,
        "id": dialogue.problem["id"],
        "gold": dialogue.problem.get("answer", "its tests"),
        "max_attempts": dialogue.max_attempts,
        "attempts": [vars(attempt) for attempt in dialogue.attempts],
    }


def describe_tokens(batch: Any, row: int, tokenizer: Any, step: int) -> dict[str, Any]:
    """A dialogue of the batch (ppo.Batch), token by token: what PPO reinforces, and where."""
    dialogue = batch.dialogues[row]
    described = describe_dialogue(dialogue, step)
    described["tokens"] = [tokenizer.decode([token]) for token in dialogue.ids]
    described["mask"] = dialogue.mask
    for name in ("advantages", "values", "returns"):
        column = getattr(batch, name)[row, : len(dialogue.ids)].tolist()  # (T,)
        described[name] = [round(x, 4) if math.isfinite(x) else None for x in column]  # JSON has no NaN
    return described


# What a run costs -----------------------------------------------------------------------------------------------------
def update_flops(lm: Any, dialogues: Sequence[Any], critic: bool, reference: bool, epochs: int) -> float:
    """Floating-point operations that a step's update needs, on all ranks together: 2 for each weight and token of a
    forward pass, 4 of a backward pass, and attention by the pairs that it compares. What gradient checkpointing
    computes again is not counted. lm: the policy or its shape; dialogues: rollout.Dialogue."""
    config, lengths = lm.config, [len(dialogue.ids) for dialogue in dialogues]
    actions = sum(sum(dialogue.mask) for dialogue in dialogues)
    weights = sum(p.numel() for p in lm.model.layers.parameters())
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = sum(n * n for n in lengths) / 2
    attention = 4 * pairs * config.num_attention_heads * head_size * config.num_hidden_layers
    body = 2 * weights * sum(lengths) + attention
    head = 2 * actions * config.hidden_size * config.vocab_size
    forward_only = body * (1 + critic + reference) + head * (1 + reference)
    return forward_only + epochs * 3 * (body * (1 + critic) + head)


def speed_metrics(seconds: dict[str, float], tokens: float, flops: float) -> dict[str, float]:
    """seconds: of each phase since the metrics before; tokens: of the step's dialogues; flops: of its update."""
    metrics = {f"seconds_{phase}": value for phase, value in seconds.items()}
    metrics["tokens_per_second"] = tokens / sum(seconds.values())
    if torch.cuda.is_available():
        trained = seconds["prepare"] + seconds["update"]
        metrics["mfu"] = flops / trained / (PEAK_TFLOPS * 1e12 * dist.get_world_size())
    return metrics | {"peak_memory_gib": ranks.peak_memory()}


def memory_plan(model: str, compute_dtype: str, critic: bool, reference: bool) -> str:
    """An estimate of the memory of a rank, for the terminal. It reads the model's shape and no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    config, gib = lm.config, 2**30
    weights = sum(p.numel() for p in lm.parameters())
    world, owners = dist.get_world_size(), ranks.shard_size()
    # Bytes of each weight: itself and Adam's two moments, 4 each; during an update its gradient, too. The reference has
    # only itself. OFFLOAD has all of it in the CPU's memory.
    resident, gradients = weights * (12 * (1 + critic) + 4 * reference) / owners, weights * 4 * (1 + critic) / owners
    if ranks.OFFLOAD and torch.cuda.is_available():
        resident = gradients = 0.0
    item = getattr(torch, compute_dtype).itemsize
    whole = 0.0  # of one model at a time, see ranks.hold_until_last
    if owners > 1 or ranks.OFFLOAD:
        whole += weights * 4  # gradients that add up over micro-batches
    if owners == 1:
        whole += weights * item
    kept = 1 if ranks.GRADIENT_CHECKPOINTING else 34  # hidden states kept by a layer (arXiv 2205.05198, eq. 2)
    states = packing.MAX_TOKENS_PER_MICRO_BATCH * config.hidden_size * item * (config.num_hidden_layers * kept + 34)
    passes = states + 16 * packing.LOGITS_CHUNK * config.vocab_size + 2 * config.vocab_size * config.hidden_size * item
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(ranks.device()).total_memory / gib
        playing, asleep = engine.GPU_MEMORY * room, 3.0  # asleep: CUDA graphs, kernels, buffers
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gib / world
        playing = asleep = engine.CPU_CACHE_MIB / 1024 + 2 * weights * item / gib  # weights as they are, and packed
    most = max(resident / gib + playing, asleep + (resident + gradients + whole + passes) / gib)
    cure = "more ranks, a smaller MAX_TOKENS_PER_MICRO_BATCH or GPU_MEMORY, or OFFLOAD=1 would help"
    verdict = "fits" if most < 0.95 * room else f"does NOT fit; {cure}"
    return (
        f"memory of a rank, estimated: {resident / gib:.1f} GiB of weights and optimisers, at most {most:.1f} of "
        f"{room:.0f} GiB in all: {verdict}"
    )
