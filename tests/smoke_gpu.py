"""The first ten minutes on one GPU: does what was only read hold there? A Markdown table, whose rows say so.

    .venv-cuda/bin/python tests/smoke_gpu.py                             # after `make cuda`; random weights, no network
    python tests/smoke_gpu.py STAGE=engine MODEL=Qwen/Qwen2.5-Math-1.5B  # one stage, real weights
    python tests/smoke_gpu.py PRESET=cpu                                 # in small, where there is no GPU

Each stage is a process of its own, in which nothing is left of the one before; those before `engine` need no vLLM.
What one GPU cannot show: NCCL between ranks, HSDP.
"""

import contextlib
import gc
import itertools
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo
import rollout
from experiments.median import make_problems
from plumbing import engine, logs, packing, ranks
from plumbing.chat import Chat, load_tokenizer
from plumbing.constants import set_constants
from plumbing.engine import Engine
from plumbing.files import append_jsonl, read_jsonl
from rollout import Dialogue
from tests import bench_ppo as bench
from tests.workload import keep_gradients

STAGE: Literal["", "attention", "gradient", "update", "engine", "resume"] = ""  # "" = all, one after the other
MODEL: str = ""  # of engine and resume; "" = random weights in bench_ppo.py's shape, and a tokenizer of bytes
PRESET: str = "gpu" if torch.cuda.is_available() else "cpu"
HEAD_SIZE: int = 128  # of the attention that is measured alone, with bench_ppo.py's HEADS and KV_HEADS
QUESTIONS: int = 64  # that the engine plays at a time
ROUNDS: int = 3  # of playing, learning and transferring

PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {"DIALOGUES": 256, "MAX_ATTEMPT_TOKENS": 256, "MAX_ATTEMPTS": 3},
    "cpu": bench.PRESETS["cpu"] | {
        "HEAD_SIZE": 32, "QUESTIONS": 8, "MAX_ATTEMPT_TOKENS": 24, "MAX_ATTEMPTS": 2, "DIALOGUES": 8, "MINI_BATCH": 4,
        "LONGEST": 256, "REPEATS": 1,
    },
}  # fmt: skip


def check(what: str, value: float, low: float = -math.inf, high: float = math.inf, on_gpu: bool = False) -> None:
    """Print a row of the table: what was measured, the bounds that it must keep, whether it does. on_gpu: a speed or a
    memory, of which a CPU says nothing."""
    bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", low), ("<=", high)) if math.isfinite(bound)]
    passed = low <= value <= high or (on_gpu and not torch.cuda.is_available())
    verdict = "yes" if passed else "NO"
    print(f"| {STAGE} | {what} | {value:.4g} | {' and '.join(bounds)} | {verdict} |", flush=True)


# Stage A: the trainer alone -------------------------------------------------------------------------------------------
def try_attention(folder: Path) -> None:
    """packing.varlen_attention in bfloat16 against each dialogue alone in float32, forward and gradients."""
    lengths, heads, fewer = [1, 77, 512, 3, 300], bench.HEADS, bench.KV_HEADS
    boundaries = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(ranks.device(), torch.int32)
    torch.manual_seed(0)
    shapes = [(1, n, sum(lengths), HEAD_SIZE) for n in (heads, fewer, fewer, heads)]
    *inputs, grad = (torch.randn(shape, device=ranks.device()).bfloat16() for shape in shapes)

    def alone(*inputs: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths, 2) for x in inputs), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True) for x in parts], 2)

    def kernel(*inputs: Tensor) -> Tensor:
        options = {"scaling": HEAD_SIZE**-0.5, "boundaries": boundaries, "longest": max(lengths)}
        return packing.varlen_attention(SimpleNamespace(), *inputs, None, **options)[0].transpose(1, 2)

    def run(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = attention(*leaves)
        out.backward(grad.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    pairs = zip(run(kernel, torch.bfloat16), run(alone, torch.float32), strict=True)
    check("largest relative error", max(relative_error(*pair) for pair in pairs), high=0.02)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def first_gradients(dtype: str, dialogues: list[Dialogue]) -> dict[str, Tensor]:
    """Those that the optimisers of actor and critic meet in the first step."""
    ppo.COMPUTE_DTYPE = dtype
    torch.manual_seed(0)
    learner = ppo.Learner.load(bench.TOKENS)
    found = keep_gradients(learner)
    bench.our_update(learner, dialogues)
    return {
        part: torch.cat([g.flatten() for name, g in found.items() if name.startswith(part)])
        for part in ("actor", "critic")
    }


def try_gradient(folder: Path) -> None:
    """A step of a small model as it is computed here, against the same in float32 and without the kernel."""
    for name, value in (bench.PRESETS["cpu"] | {"LONGEST": 256}).items():
        if name in bench.__annotations__:
            setattr(bench, name, value)
    ppo.MODEL, ppo.MAX_MISMATCH, ppo.GRAD_CLIP = bench.random_model(folder), math.inf, math.inf
    dialogues = bench.draw_dialogues()
    found, expected = (first_gradients(dtype, dialogues) for dtype in (ppo.COMPUTE_DTYPE, "float32"))
    for name, right in expected.items():
        check(f"relative error of the {name}'s first gradient", relative_error(found[name], right), high=0.1)


def try_update(folder: Path) -> None:
    """The whole update of a rollout: its speed, with padded rows and without, and its memory against the plan."""
    engine.GPU_MEMORY, ppo.MAX_MISMATCH = 0.0, math.inf  # no engine here; nobody sampled the dialogues
    ppo.MODEL = bench.random_model(folder)
    plan = logs.memory_plan(ppo.MODEL, ppo.COMPUTE_DTYPE, critic=True, reference=True)
    print(plan, flush=True)  # where it does not fit: LAYERS=14
    learner, dialogues = ppo.Learner.load(bench.TOKENS), bench.draw_dialogues()
    bench.our_update(learner, dialogues)  # the first is slower
    took: dict[int, list[float]] = {bench.VOCABULARY: [], bench.TOKENS: []}
    for _ in range(bench.REPEATS):
        for tokens, seconds in took.items():
            learner.actor.tokens = learner.reference.tokens = tokens
            seconds.append(bench.seconds_of(lambda: bench.our_update(learner, dialogues))[0])
    whole, cut = map(statistics.median, took.values())
    flops = logs.update_flops(learner.actor.lm, dialogues, critic=True, reference=True, epochs=ppo.EPOCHS)
    most = float(plan.partition("at most ")[2].split()[0])
    check("tokens/s", sum(len(d.ids) for d in dialogues) / cut)
    check(f"MFU, of {logs.PEAK_TFLOPS:g} TFLOPS", flops / cut / logs.PEAK_TFLOPS / 1e12, low=0.4, on_gpu=True)
    check("speed with padded rows / without", whole / cut, low=0.95, on_gpu=True)
    check("peak of memory / the plan's", ranks.peak_memory() / most, 0.5, 1.0, on_gpu=True)


# Stage B: with the engine ---------------------------------------------------------------------------------------------
def play(sampler: Engine, chat: Chat, temperature: float, attempts: int = 1) -> list[Dialogue]:
    dialogues = [rollout.new_dialogue(chat, p, attempts) for p in make_problems(QUESTIONS, 0, False)]
    return rollout.play(sampler, chat, dialogues, list(range(QUESTIONS)), temperature)


def share_in_common(some: list[Dialogue], others: list[Dialogue]) -> float:
    """Of the tokens of first and only attempts, those before the first that differs."""
    common = total = 0
    for one, other in zip(some, others, strict=True):
        start = one.attempts[0].start
        same = (a == b for a, b in zip(one.ids[start:], other.ids[start:], strict=False))
        common += sum(1 for _ in itertools.takewhile(bool, same))
        total += max(len(one.ids), len(other.ids)) - start
    return common / total


def free_share() -> float:
    """Of the GPU's memory."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 1)
    return free / total


def try_learning(folder: Path, chat: Chat) -> list[Dialogue]:
    """Play, sleep, learn and transfer in turn, as ppo.train does; export -> what the policy says last, greedily."""
    sampler = Engine(ppo.MODEL, rollout.CONTEXT, ppo.COMPUTE_DTYPE, ppo.SEED, sleeps=True)
    from_disk, awake = play(sampler, chat, 0.0), free_share()
    sampler.sleep()
    freed = free_share() - awake
    check("share of the GPU that sleep frees", freed, low=engine.GPU_MEMORY - 0.05, on_gpu=True)
    learner = ppo.Learner.load(len(chat.tokenizer))

    def play_policy(temperature: float, attempts: int = 1) -> list[Dialogue]:
        sampler.load_weights(learner.policy_weights())
        dialogues = play(sampler, chat, temperature, attempts)
        sampler.sleep()
        return dialogues

    check("greedy as from disk after a transfer", share_in_common(from_disk, play_policy(0.0)), low=0.95)
    check("sampled again as before", share_in_common(play_policy(1.0), play_policy(1.0)), low=0.95)
    rounds, free = [], []
    for _ in range(ROUNDS):
        dialogues = play_policy(1.0, rollout.MAX_ATTEMPTS)
        for dialogue in dialogues:
            rollout.assign_rewards(dialogue)
        batch = ppo.make_batch(dialogues)
        rounds.append(ppo.prepare(batch, dialogues, learner) | ppo.update(batch, learner, train_actor=True))
        free.append(free_share())
    gaps = [metrics["sampler_mismatch"] for metrics in rounds]
    norms = [metrics.get(f"{name}_grad_norm", math.nan) for metrics in rounds for name in ("actor", "critic")]
    check("largest sampler_mismatch, nats", max(gaps), 0, 0.02)
    check("its growth over the rounds", gaps[-1] - gaps[0], high=0.005)
    check("gradient norms that are finite", sum(map(math.isfinite, norms)), low=len(norms))
    check("share of the GPU lost over the rounds", free[0] - free[-1], high=0.005, on_gpu=True)
    last = play_policy(0.0)
    learner.export(folder / "policy", chat.tokenizer)
    sampler.shutdown()
    return last


def try_engine(folder: Path) -> None:
    """The engine beside the trainer, and after it a second one in the same process."""
    ppo.MODEL, free = MODEL or bench.random_model(folder), free_share()
    ppo.DIALOGUES, ppo.MINI_BATCH, ppo.MAX_MISMATCH = QUESTIONS, QUESTIONS // 2, math.inf
    chat = rollout.make_chat(load_tokenizer(ppo.MODEL))
    last = try_learning(folder, chat)
    check("share of the GPU kept after both have ended", free - free_share(), high=0.05, on_gpu=True)
    del os.environ["RANK"]  # vLLM has ended the group; an evaluation has none
    second = Engine(str(folder / "policy"), rollout.CONTEXT, ppo.COMPUTE_DTYPE, ppo.SEED)
    check("greedy as before in a second engine", share_in_common(last, play(second, chat, 0.0)), low=0.95)
    second.shutdown()


def try_resume(folder: Path) -> None:
    """Two steps of ppo.py, killed after the first and started again."""
    problems, run = folder / "problems.jsonl", folder / "runs" / "smoke"
    append_jsonl(problems, make_problems(100, 0, False))
    command = [sys.executable, ppo.__file__, f"TRAIN_DATA={problems}", f"MODEL={MODEL or bench.random_model(folder)}"]
    command += ["RUN=smoke", "STEPS=2", "SAVE_EVERY=1", "DIALOGUES=16", "MINI_BATCH=8", "DEV_PROBLEMS=8", "TRACK="]
    command += [f"MAX_ATTEMPT_TOKENS={rollout.MAX_ATTEMPT_TOKENS}", f"COMPUTE_DTYPE={ppo.COMPUTE_DTYPE}"]
    first = subprocess.Popen(command, cwd=folder, stdout=sys.stderr, start_new_session=True)
    while first.poll() is None and not (run / "checkpoints" / "step-000001").is_dir():
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(timeout=0.05)
    os.killpg(first.pid, signal.SIGKILL)
    check("exit code of the first, which is killed", first.wait(), -signal.SIGKILL, -signal.SIGKILL)
    second = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    check("exit code of the second", second.returncode, 0, 0)
    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl")]
    is_whole = "resumes after step 1" in second.stdout and steps == [1, 2] and (run / "policy").is_dir()
    check("it resumes after the first step and leaves both rows and a policy", is_whole, low=1)


# All of them ----------------------------------------------------------------------------------------------------------
STAGES: dict[str, Callable[[Path], None]] = {
    "attention": try_attention, "gradient": try_gradient, "update": try_update, "engine": try_engine,
    "resume": try_resume,
}  # fmt: skip


def run_stage() -> None:
    if STAGE != "resume":
        ranks.start_ranks()
    with tempfile.TemporaryDirectory() as folder:
        STAGES[STAGE](Path(folder))
    if dist.is_initialized():
        dist.destroy_process_group()


def run_apart(stage: str) -> list[str]:
    """A stage in a process of its own, whose output is shown -> its rows, and one for how it ended."""
    command = [sys.executable, __file__, *sys.argv[1:], f"STAGE={stage}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith(f"| {stage} |")]
    return [*rows, f"| {stage} | exit code | {done.returncode} | 0 | {'NO' if done.returncode else 'yes'} |"]


def main(arguments: Sequence[str]) -> None:
    changes = set_constants(arguments, {"smoke": sys.modules[__name__], "bench": bench} | ppo.MODULES, PRESETS)
    if STAGE:
        run_stage()
        return
    print(changes, flush=True)
    stages = [stage for stage in STAGES if stage != "attention" or packing.has_kernel("bfloat16")]
    rows = [row for stage in stages for row in run_apart(stage)]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    command = " ".join(["tests/smoke_gpu.py", *arguments])
    print(f"\n{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}: `{command}`")
    print("\n| stage | what | measured | asked | passed |\n|---|---|---|---|---|", *rows, sep="\n")
    sys.exit(any(row.endswith("NO |") for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
