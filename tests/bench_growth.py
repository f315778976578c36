"""What a step of ppo.py costs for each dialogue as dialogues become many, by phase: a table.

    python tests/bench_growth.py SIZES=128,2048                     # a tiny random model; some minutes
    torchrun --nproc-per-node 2 tests/bench_growth.py               # on two ranks; a quarter of an hour

It runs ppo.train itself. Dialogues are alike in every size: two attempts of a random model, which is never right, at
questions whose lengths (SHORTEST to LONGEST tokens, log-uniform) have the same distribution in any 128 of them. Times
are those of the processor, user and system, of all threads and ranks, which a busy machine changes little; of a size's
steps the median counts. A transfer of weights costs the same whatever the step: it stands apart.
"""

import itertools
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo
import rollout
from plumbing import checkpoints, logs, ranks
from plumbing.constants import set_constants
from tests.workload import save_random_model

SIZES: tuple[int, ...] = (128, 512, 2048, 8192)  # dialogues of a step
PLAYED: int = 1024  # dialogues of a size at the least, in steps of that size
SHORTEST: int = 16  # tokens of a question
LONGEST: int = 128

PRESET: str = "growth"
PRESETS: dict[str, dict[str, Any]] = {
    "growth": {  # one epoch in mini-batches of 128, learning rates that leave the model as it is
        "MINI_BATCH": 128, "EPOCHS": 1, "ACTOR_LR": 1e-9, "CRITIC_LR": 1e-9, "COMPUTE_DTYPE": "float32",
        "SAVE_EVERY": 10**6, "DEV_PROBLEMS": 0, "MIN_ATTEMPTS": 2, "MAX_ATTEMPTS": 2, "MAX_ATTEMPT_TOKENS": 12,
        "CONTEXT": 1024, "MAX_TOKENS_PER_MICRO_BATCH": 2048, "GRADIENT_CHECKPOINTING": False, "TRACK": "",
        "MAX_SEQUENCES": 32,  # fewer than the dialogues of the smallest size, so that the queue is full in each
    },
}  # fmt: skip
PHASES = ("rollout", "exchange", "packing", "metrics", "prepare", "update", "logs")


class CpuClock:
    """Stands in for logs.Clock: seconds of the processor by phase, for each step."""

    now: "CpuClock"  # the one that runs

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = [Counter()]
        self.last = time.process_time()
        CpuClock.now = self

    def stop(self, phase: str) -> None:
        now = time.process_time()
        self.steps[-1][{"pack": "metrics", "save": "logs"}.get(phase, phase)] += now - self.last
        self.last = now
        if phase == "save":  # the last of a step
            self.steps.append(Counter())

    def take(self) -> dict[str, float]:
        return self.steps[-1]


def stop_before(module: Any, name: str, phase: str, phase_of_it: str = "") -> None:
    """Let `phase` end where module.name is called, and, where it returns, its own phase if that has a name."""
    inner: Callable = getattr(module, name)

    def timed(*arguments: Any) -> Any:
        CpuClock.now.stop(phase)
        result = inner(*arguments)
        if phase_of_it:
            CpuClock.now.stop(phase_of_it)
        return result

    setattr(module, name, timed)


def make_problems() -> list[dict[str, Any]]:
    problems = []
    for i in range(PLAYED + sum(max(size, PLAYED) for size in SIZES)):
        share = i * (math.sqrt(5) - 1) / 2 % 1  # evenly spread over [0, 1) in every part of the sequence
        length = round(SHORTEST * (LONGEST / SHORTEST) ** share)
        words = " ".join(str(rollout.random_number(i, k) % 9 + 1) for k in range(length))
        problems.append({"id": f"p{i}", "question": f"{i}: {words}", "answer": "1"})
    return problems


def measure(folder: Path) -> None:
    """A run for each size, and a line of the table. folder: this rank's own."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ppo.MODEL = save_random_model(folder, **shape, num_attention_heads=1, num_key_value_heads=1)
    fresh = itertools.count()
    ppo.problem_at = lambda problems, visit, seed: problems[next(fresh) % len(problems)]  # none twice on a rank
    logs.Clock = CpuClock
    stop_before(ranks, "gather_interleaved", "rollout", "exchange")
    stop_before(rollout, "rollout_metrics", "packing")
    checkpoints.save = checkpoints.export = lambda *_: None
    chat, problems = rollout.make_chat(ppo.load_tokenizer(ppo.MODEL)), make_problems()
    sampler = ppo.Engine(ppo.MODEL, rollout.CONTEXT, ppo.COMPUTE_DTYPE, sleeps=True)
    learner, first, names = ppo.Learner.load(len(chat.tokenizer)), 0.0, (*PHASES, "transfer")
    lines = ["milliseconds of the processor for each dialogue, all ranks together; of a transfer, at all"]
    lines.append(f"{'dialogues':>9} " + " ".join(f"{name:>9}" for name in (*names, "all", "of first", "GiB")))
    for number, size in enumerate((min(SIZES), *SIZES)):  # the first warms up what is compiled or cached
        ppo.DIALOGUES, ppo.STEPS = size, max(1, PLAYED // size)
        run = folder / str(number)
        run.mkdir()
        ppo.train(run, sampler, learner, chat, problems, [], {})
        steps = [ranks.all_sum(*(step[name] for name in names)) for step in CpuClock.now.steps[: ppo.STEPS]]
        *each, transfer = (1e3 * statistics.median(column) for column in zip(*steps, strict=True))
        (memory,) = ranks.all_sum(ranks.peak_memory())
        each = [ms / size for ms in each]
        first = sum(each) if number < 2 else first
        if number > 0:
            row = (*each, transfer, sum(each), sum(each) / first, memory)
            lines.append(f"{size:9,} " + " ".join(f"{x:9.3f}" for x in row))
    ranks.print_once("\n".join(lines))  # after what the runs have said
    sampler.shutdown()


def main() -> None:
    set_constants(sys.argv[1:], {"bench": sys.modules[__name__]} | ppo.MODULES, PRESETS)
    torch.set_num_threads(1)
    ranks.start_ranks()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder))


if __name__ == "__main__":
    main()
