"""Does what was only read hold on one GPU? A Markdown table, whose rows say so.

    .venv-cuda/bin/python tests/smoke_gpu.py                             # after `make cuda`; random weights, no network
    python tests/smoke_gpu.py STAGE=engine MODEL=Qwen/Qwen2.5-Math-1.5B  # one stage, real weights
    python tests/smoke_gpu.py PRESET=cpu                                 # in small, where there is no GPU

Each stage is a process of its own, in which nothing is left of the one before; `gradient` needs no vLLM. Speed, MFU and
memory beside its plan: tests/bench_ppo.py. What one GPU cannot show: NCCL between ranks, HSDP.
"""

import gc
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo
import rollout
from experiments.median import make_problems
from plumbing import engine, ranks
from plumbing.chat import Chat, load_tokenizer
from plumbing.constants import set_constants
from plumbing.engine import Engine
from rollout import Dialogue
from tests import bench_ppo as bench
from tests.workload import keep_gradients

STAGE: Literal["", "gradient", "engine"] = ""  # "" = both, one after the other
MODEL: str = ""  # of the stage engine; "" = random weights in bench_ppo.py's shape, and a tokenizer of bytes
PRESET: str = "gpu" if torch.cuda.is_available() else "cpu"
QUESTIONS: int = 64  # that the engine plays at a time
ROUNDS: int = 3  # of playing, learning and transferring
MODULES = {"smoke": sys.modules[__name__], "bench": bench} | ppo.MODULES

PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {"DIALOGUES": 256, "MAX_ATTEMPT_TOKENS": 256, "MAX_ATTEMPTS": 3},
    "cpu": bench.PRESETS["cpu"] | {
        "QUESTIONS": 8, "MAX_ATTEMPT_TOKENS": 24, "MAX_ATTEMPTS": 2, "DIALOGUES": 8, "MINI_BATCH": 4, "LONGEST": 256,
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


# All of them ----------------------------------------------------------------------------------------------------------
STAGES: dict[str, Callable[[Path], None]] = {"gradient": try_gradient, "engine": try_engine}


def run_stage() -> None:
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
    changes = set_constants(arguments, MODULES, PRESETS)
    if STAGE:
        run_stage()
        return
    print(changes, flush=True)
    rows = [row for stage in STAGES for row in run_apart(stage)]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    command = " ".join(["tests/smoke_gpu.py", *arguments])
    print(f"\n{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}: `{command}`")
    print("\n| stage | what | measured | asked | passed |\n|---|---|---|---|---|", *rows, sep="\n")
    sys.exit(any(row.endswith("NO |") for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
