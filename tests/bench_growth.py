"""What a step of ppo.py costs for each dialogue as dialogues become many, by phase, on one rank and on two: a table.

    python tests/bench_growth.py                                    # a tiny random model; a quarter of an hour
    python tests/bench_growth.py SIZES=128,2048 RANKS=1

It runs ppo.train itself. Dialogues are alike in every size: two attempts of a random model, which is never right, at
questions whose lengths (SHORTEST to LONGEST tokens, log-uniform) have the same distribution in any 128 of them. Times
are those of the processor, user and system, of all threads and ranks, which a busy machine changes little; of a size's
steps the median counts. A transfer of weights costs the same whatever the step: it stands apart.
"""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo
import rollout
from plumbing import checkpoints, constants, engine, files, logs, packing, ranks
from tests.workload import save_random_model

SIZES: tuple[int, ...] = (128, 512, 2048, 8192)  # dialogues of a step
RANKS: tuple[int, ...] = (1, 2)  # processes
PLAYED: int = 1024  # dialogues of a size at the least, in steps of that size
SHORTEST: int = 16  # tokens of a question
LONGEST: int = 128
FOLDER: str = ""  # where the model and the problems are; for the processes that this one starts

CHANGES = {  # the run: one epoch in mini-batches of 128, learning rates that leave the model as it is
    ppo: {"MINI_BATCH": 128, "EPOCHS": 1, "ACTOR_LR": 1e-9, "CRITIC_LR": 1e-9, "COMPUTE_DTYPE": "float32",
          "SAVE_EVERY": 10**6, "DEV_PROBLEMS": 0},
    rollout: {"MIN_ATTEMPTS": 2, "MAX_ATTEMPTS": 2, "MAX_ATTEMPT_TOKENS": 12, "CONTEXT": 1024},
    packing: {"MAX_TOKENS_PER_MICRO_BATCH": 2048},
    ranks: {"GRADIENT_CHECKPOINTING": False},
    engine: {"MAX_SEQUENCES": 32},  # fewer than the dialogues of the smallest size, so that the queue is full in each
    logs: {"TRACK": ""},
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


def make_world(folder: Path) -> None:
    """A tiny random model, and problems."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    save_random_model(folder / "model", **shape, num_attention_heads=1, num_key_value_heads=1)
    problems = []
    for i in range(PLAYED + sum(max(size, PLAYED) for size in SIZES)):
        share = i * (math.sqrt(5) - 1) / 2 % 1  # evenly spread over [0, 1) in every part of the sequence
        length = round(SHORTEST * (LONGEST / SHORTEST) ** share)
        words = " ".join(str(rollout.random_number(i, k) % 9 + 1) for k in range(length))
        problems.append({"id": f"p{i}", "question": f"{i}: {words}", "answer": "1"})
    files.append_jsonl(folder / "problems.jsonl", problems)


def measure(folder: Path) -> None:
    """On this rank: a run for each size; rank 0 writes {size: {"seconds": {phase: ...}, "memory": GiB}}."""
    ranks.start_ranks()
    for module, changes in CHANGES.items():
        for name, value in changes.items():
            setattr(module, name, value)
    ppo.MODEL = str(folder / "model")
    fresh = itertools.count()
    ppo.problem_at = lambda problems, visit, seed: problems[next(fresh) % len(problems)]  # none twice on a rank
    logs.Clock = CpuClock
    stop_before(ranks, "gather_interleaved", "rollout", "exchange")
    stop_before(rollout, "rollout_metrics", "packing")
    checkpoints.save = checkpoints.export = lambda *_: None
    chat = rollout.make_chat(ppo.load_tokenizer(ppo.MODEL))
    problems = ppo.load_problems(folder / "problems.jsonl")
    sampler = ppo.Engine(ppo.MODEL, rollout.CONTEXT, ppo.COMPUTE_DTYPE, sleeps=True)
    learner = ppo.Learner.load(len(chat.tokenizer))
    found = {}
    for size in (min(SIZES), *SIZES):  # the first warms up what is compiled or cached
        ppo.DIALOGUES, ppo.STEPS = size, max(1, PLAYED // size)
        run = folder / f"run-{ranks.dist.get_world_size()}-{len(found)}-{size}"
        run.mkdir(exist_ok=True)
        ppo.train(run, sampler, learner, chat, problems, [], {})
        names = (*PHASES, "transfer")
        steps = [ranks.all_sum(*(step[name] for name in names)) for step in CpuClock.now.steps[: ppo.STEPS]]
        seconds = dict(zip(names, map(statistics.median, zip(*steps, strict=True)), strict=True))
        (memory,) = ranks.all_sum(ranks.peak_memory())
        found[size] = {"seconds": seconds, "memory": memory}
    if ranks.dist.get_rank() == 0:
        files.write_atomically(folder / "found.json", json.dumps(found))
    sampler.shutdown()


def print_table(number: int, found: dict[str, Any]) -> None:
    print(f"\n{number} rank(s): milliseconds of the processor for each dialogue, all ranks together")
    print(f"{'dialogues':>9} " + " ".join(f"{name:>9}" for name in (*PHASES, "all")) + "   of first | transfer  memory")
    first = 0.0
    for size, row in found.items():
        each = [1e3 * row["seconds"][name] / int(size) for name in PHASES]
        total = sum(each)
        first = first or total
        print(f"{int(size):9,} " + " ".join(f"{ms:9.3f}" for ms in (*each, total)) + f" {total / first:10.3f} | "
              f"{1e3 * row['seconds']['transfer']:5.0f} ms {row['memory']:5.2f} GiB", flush=True)  # fmt: skip


def main() -> None:
    constants.set_constants(sys.argv[1:], {"bench": sys.modules[__name__]})
    if FOLDER:
        measure(Path(FOLDER))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder))
        for number in RANKS:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
            command = [sys.executable, *launch, __file__, *sys.argv[1:], f"FOLDER={folder}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
            print_table(number, json.loads((Path(folder) / "found.json").read_text()))


if __name__ == "__main__":
    main()
