"""The first ten minutes on one GPU: does what was only read hold there? A Markdown table; exit code 1 if it does not.

    .venv-cuda/bin/python tests/smoke_gpu.py                             # after `make cuda`; random weights, no network
    python tests/smoke_gpu.py STAGE=engine MODEL=Qwen/Qwen2.5-Math-1.5B  # one stage, real weights
    python tests/smoke_gpu.py PRESET=cpu                                 # in small, where there is no GPU

Each stage is a process of its own, in which nothing is left of the one before; those before `engine` need no vLLM.
What one GPU cannot show: NCCL between ranks, HSDP.
"""

import contextlib
import gc
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo
import rollout
from experiments.median import make_problems
from plumbing import checkpoints, engine, logs, packing, ranks
from plumbing.chat import Chat, load_tokenizer
from plumbing.constants import set_constants
from plumbing.engine import Engine
from rollout import Dialogue
from tests import bench_ppo as bench

STAGE: Literal["", "head", "attention", "gradient", "update", "engine", "resume"] = ""  # "" = all, one after the other
MODEL: str = ""  # of engine and resume; "" = random weights in bench_ppo.py's shape, and a tokenizer of bytes
PRESET: str = "gpu" if torch.cuda.is_available() else "cpu"
HEAD_SIZE: int = 128  # of the attention that is measured alone, with bench_ppo.py's HEADS and KV_HEADS
QUESTIONS: int = 64  # that the engine plays at a time
ROUNDS: int = 3  # of playing, learning and transferring

PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {"DIALOGUES": 256, "MAX_ATTEMPT_TOKENS": 256, "MAX_ATTEMPTS": 3},
    "cpu": bench.PRESETS["cpu"] | {
        "HEAD_WIDTH": 64, "HEAD_VOCABULARY": 4096, "HEAD_TOKENS": 4001, "HEAD_SIZE": 32, "QUESTIONS": 8,
        "MAX_ATTEMPT_TOKENS": 24, "MAX_ATTEMPTS": 2, "DIALOGUES": 8, "MINI_BATCH": 4, "LONGEST": 256, "REPEATS": 1,
    },
}  # fmt: skip


class Check(NamedTuple):
    """What was measured, and the bounds that it must keep."""

    what: str
    value: float
    low: float = -math.inf
    high: float = math.inf
    judged: bool = True  # False: only told

    def passed(self) -> bool:
        return not self.judged or self.low <= self.value <= self.high

    def row(self) -> str:
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", self.low), ("<=", self.high)) if math.isfinite(bound)]
        bound = " and ".join(bounds) if self.judged else ""
        return f"| {STAGE} | {self.what} | {self.value:.4g} | {bound} | {'yes' if self.passed() else 'NO'} |"


Checks = Iterator[Check]


def on_gpu(what: str, value: float, low: float = -math.inf, high: float = math.inf) -> Check:
    """A check that a CPU cannot fail: its speed and its memory say nothing."""
    return Check(what, value, low, high, judged=torch.cuda.is_available())


# Stage A: the trainer alone -------------------------------------------------------------------------------------------
def check_head(folder: Path) -> Checks:
    """Log-probabilities where the tokenizer has fewer tokens than the head has rows."""
    whole, cut = bench.time_heads(packing.LOGITS_CHUNK, getattr(torch, ppo.COMPUTE_DTYPE))
    yield Check("ms of a chunk of log-probabilities and its gradients", 1000 * cut)
    yield on_gpu("speed with padded rows / without", whole / cut, low=0.95)


def check_attention(folder: Path) -> Checks:
    """packing.varlen_attention in bfloat16 against each dialogue alone in float32."""
    lengths, heads, fewer = [1, 77, 512, 3, 300], bench.HEADS, bench.KV_HEADS
    boundaries = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(ranks.device(), torch.int32)
    torch.manual_seed(0)
    shapes = [(1, n, sum(lengths), HEAD_SIZE) for n in (heads, fewer, fewer, heads)]
    *inputs, grad = (torch.randn(shape, device=ranks.device()).bfloat16() for shape in shapes)

    def alone(*inputs: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths, 2) for x in inputs), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True) for x in parts], 2)

    def kernel(query: Tensor, key: Tensor, value: Tensor, repeats: int = 1) -> Tensor:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        options = {"scaling": HEAD_SIZE**-0.5, "boundaries": boundaries, "longest": max(lengths)}
        return packing.varlen_attention(SimpleNamespace(), query, key, value, None, **options)[0].transpose(1, 2)

    def run(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = attention(*leaves)
        out.backward(grad.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    expected = run(alone, torch.float32)
    for way, repeats in (("fewer heads of keys and values", 1), ("repeated ones", heads // fewer)):
        work = lambda n=repeats: run(lambda *x: kernel(*x, repeats=n), torch.bfloat16)  # noqa: E731
        errors = [((got - right).norm() / right.norm()).item() for got, right in zip(work(), expected, strict=True)]
        yield Check(f"largest relative error, forward and gradients: {way}", max(errors), high=0.02)
        yield Check(f"ms: {way}", 1000 * statistics.median(bench.seconds_of(work)[0] for _ in range(5)))


def first_gradients(dtype: str, dialogues: list[Dialogue]) -> dict[str, Tensor]:
    """Those that the optimisers of actor and critic meet in the first step."""
    ppo.COMPUTE_DTYPE = dtype
    torch.manual_seed(0)
    learner = ppo.Learner.load(bench.TOKENS)
    found: dict[str, Tensor] = {}
    for part in learner.parts:

        def keep(optimizer: torch.optim.Optimizer, *_: Any, name: str = part.name) -> None:
            grads = (p.grad.full_tensor() for group in optimizer.param_groups for p in group["params"])
            found.setdefault(name, torch.cat([grad.flatten().cpu() for grad in grads]))

        part.optimizer.register_step_pre_hook(keep)
    bench.our_update(learner, dialogues)
    return found


def check_gradient(folder: Path) -> Checks:
    """A step of a small model as it is computed here, against the same in float32 and without the kernel."""
    for name, value in bench.PRESETS["cpu"].items():
        if name in bench.__annotations__:
            setattr(bench, name, value)
    ppo.MODEL, ppo.MAX_MISMATCH, ppo.GRAD_CLIP = bench.random_model(folder), math.inf, math.inf
    dialogues = bench.draw_dialogues()
    found, expected = (first_gradients(dtype, dialogues) for dtype in (ppo.COMPUTE_DTYPE, "float32"))
    for name, right in expected.items():
        error = (found[name] - right).norm() / right.norm()
        yield Check(f"relative error of the {name}'s first gradient", error.item(), high=0.1)


def check_update(folder: Path) -> Checks:
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
    yield Check("tokens/s", sum(len(d.ids) for d in dialogues) / cut)
    yield on_gpu(f"MFU, of {logs.PEAK_TFLOPS:g} TFLOPS", flops / cut / logs.PEAK_TFLOPS / 1e12, low=0.4)
    yield on_gpu("speed with padded rows / without", whole / cut, low=0.95)
    most = float(plan.partition("at most ")[2].split()[0])
    yield on_gpu("peak of memory / the plan's", ranks.peak_memory() / most, 0.5, 1.0)


# Stage B: with the engine ---------------------------------------------------------------------------------------------
def play(sampler: Engine, chat: Chat, temperature: float, attempts: int = 1) -> list[Dialogue]:
    dialogues = [rollout.new_dialogue(chat, p, attempts) for p in make_problems(QUESTIONS, 0, False)]
    return rollout.play(sampler, chat, dialogues, list(range(QUESTIONS)), temperature)


def share_in_common(some: list[Dialogue], others: list[Dialogue]) -> float:
    """Of the tokens of first and only attempts, those before the first that differs."""
    common = total = 0
    for one, other in zip(some, others, strict=True):
        same = [a == b for a, b in zip(one.ids, other.ids, strict=False)]
        common += (same.index(False) if False in same else len(same)) - one.attempts[0].start
        total += max(len(one.ids), len(other.ids)) - one.attempts[0].start
    return common / total


def free_share() -> float:
    """Of the GPU's memory."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 1)
    return free / total


def check_learning(folder: Path, chat: Chat) -> Generator[Check, None, list[Dialogue]]:
    """Play, sleep, learn and transfer in turn, as ppo.train does -> what the last policy says, greedily."""
    sampler = Engine(ppo.MODEL, rollout.CONTEXT, ppo.COMPUTE_DTYPE, ppo.SEED, sleeps=True)
    from_disk, awake = play(sampler, chat, 0.0), free_share()
    sampler.sleep()
    yield on_gpu("share of the GPU that sleep frees", free_share() - awake, low=engine.GPU_MEMORY - 0.05)
    learner = ppo.Learner.load(len(chat.tokenizer))

    def play_policy(temperature: float, attempts: int = 1) -> list[Dialogue]:
        sampler.load_weights(learner.policy_weights())
        dialogues = play(sampler, chat, temperature, attempts)
        sampler.sleep()
        return dialogues

    yield Check("greedy as from disk after a transfer", share_in_common(from_disk, play_policy(0.0)), low=0.95)
    yield Check("sampled again as before", share_in_common(play_policy(1.0), play_policy(1.0)), low=0.95)
    rounds, free = [], []
    for _ in range(ROUNDS):
        dialogues = play_policy(1.0, rollout.MAX_ATTEMPTS)
        for dialogue in dialogues:
            rollout.assign_rewards(dialogue)
        batch = ppo.make_batch(dialogues)
        rounds.append(ppo.prepare(batch, dialogues, learner) | ppo.update(batch, learner, train_actor=True))
        free.append(free_share())
    gaps = [metrics["sampler_mismatch"] for metrics in rounds]
    yield Check("largest sampler_mismatch, nats", max(gaps), 0, 0.02)
    yield Check("its growth over the rounds", gaps[-1] - gaps[0], high=0.005)
    norms = [metrics.get(f"{name}_grad_norm", math.nan) for metrics in rounds for name in ("actor", "critic")]
    yield Check("gradient norms that are finite", sum(map(math.isfinite, norms)), low=len(norms))
    yield on_gpu("share of the GPU lost from the first round to the last", free[0] - free[-1], high=0.005)
    last = play_policy(0.0)
    checkpoints.save(folder, 1, 0, learner.parts, 1)
    checkpoints.export(folder / "policy", learner.actor.lm, learner.policy_weights(), chat.tokenizer)
    yield Check("checkpoints written", len(checkpoints.list_checkpoints(folder)), low=1)
    sampler.shutdown()
    return last


def check_engine(folder: Path) -> Checks:
    """The engine beside the trainer, and after it a second one in the same process."""
    ppo.MODEL, free = MODEL or bench.random_model(folder), free_share()
    ppo.DIALOGUES, ppo.MINI_BATCH, ppo.MAX_MISMATCH = QUESTIONS, QUESTIONS // 2, math.inf
    chat = rollout.make_chat(load_tokenizer(ppo.MODEL))
    last = yield from check_learning(folder, chat)
    yield on_gpu("share of the GPU that is kept after the end of engine and trainer", free - free_share(), high=0.05)
    del os.environ["RANK"]  # vLLM has ended the group; an evaluation has none
    second = Engine(str(folder / "policy"), rollout.CONTEXT, ppo.COMPUTE_DTYPE, ppo.SEED)
    yield Check("greedy as before in a second engine", share_in_common(last, play(second, chat, 0.0)), low=0.95)
    second.shutdown()


def check_resume(folder: Path) -> Checks:
    """Two steps of ppo.py, killed after the first and started again."""
    problems, run = folder / "problems.jsonl", folder / "runs" / "smoke"
    problems.write_text("".join(json.dumps(p) + "\n" for p in make_problems(100, 0, False)), encoding="utf-8")
    command = [sys.executable, str(Path(ppo.__file__)), f"TRAIN_DATA={problems}"]
    command += [f"MODEL={MODEL or bench.random_model(folder)}"]
    command += ["RUN=smoke", "STEPS=2", "SAVE_EVERY=1", "DIALOGUES=16", "MINI_BATCH=8", "DEV_PROBLEMS=8", "TRACK="]
    command += [f"MAX_ATTEMPT_TOKENS={rollout.MAX_ATTEMPT_TOKENS}", f"COMPUTE_DTYPE={ppo.COMPUTE_DTYPE}"]
    first = subprocess.Popen(command, cwd=folder, stdout=sys.stderr, start_new_session=True)
    while first.poll() is None and not (run / "checkpoints" / "step-000001").is_dir():
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(timeout=0.05)
    os.killpg(first.pid, signal.SIGKILL)
    yield Check("exit code of the first, which is killed", first.wait(), -signal.SIGKILL, -signal.SIGKILL)
    second = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    yield Check("exit code of the second", second.returncode, 0, 0)
    steps = re.findall(r'^{"step": (\d+)', (run / "metrics.jsonl").read_text(encoding="utf-8"), re.MULTILINE)
    is_whole = "resumes after step 1" in second.stdout and steps == ["1", "2"] and (run / "policy").is_dir()
    yield Check("it resumes after the first step and leaves both rows and a policy", is_whole, low=1)


# All of them ----------------------------------------------------------------------------------------------------------
STAGES: dict[str, Callable[[Path], Checks]] = {
    "head": check_head, "attention": check_attention, "gradient": check_gradient, "update": check_update,
    "engine": check_engine, "resume": check_resume,
}  # fmt: skip


def run_stage() -> bool:
    """Print the rows of STAGE as they come -> whether all have passed."""
    passed = True
    if STAGE != "resume":
        ranks.start_ranks()
    with tempfile.TemporaryDirectory() as folder:
        for check in STAGES[STAGE](Path(folder)):
            print(check.row(), flush=True)
            passed &= check.passed()
    if dist.is_initialized():
        dist.destroy_process_group()
    return passed


def run_apart(stage: str) -> list[str]:
    """A stage in a process of its own, whose output is shown -> its rows."""
    start, rows = time.perf_counter(), []
    command = [sys.executable, __file__, *sys.argv[1:], f"STAGE={stage}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout or ():
        print(line, end="", flush=True)
        rows += [line.rstrip()] if line.startswith(f"| {stage} |") else []
    failed = process.wait() not in (0, 1 if any(row.endswith("NO |") for row in rows) else 0)
    rows.append(f"| {stage} | exit code | {process.returncode} | | {'NO' if failed else 'yes'} |")
    return [*rows, f"| {stage} | seconds in all | {time.perf_counter() - start:.0f} | | yes |"]


def main(arguments: Sequence[str]) -> None:
    changes = set_constants(arguments, {"smoke": sys.modules[__name__], "bench": bench} | ppo.MODULES, PRESETS)
    if STAGE:
        sys.exit(not run_stage())
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
