"""How much time one queue for all K saves.

    python tests/bench_evaluate.py                      # a random model of 1 M parameters; minutes on two cores
    python tests/bench_evaluate.py PROBLEMS=30,40,500,272,675 MAX_SEQUENCES=256 MODEL=folder DTYPE=bfloat16

Attempts have 16 to LONGEST tokens (log-uniform: a long tail), and a quarter of them are right. Lengths and verdicts
depend on what the model was shown, so that every scheme plays the same dialogues, greedily. On a machine that others
use at the same time, the CPU seconds of this process are the steadier measure (of an engine on the CPU).
"""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
import grader
import plumbing.engine
import rollout
from evaluate import Item, Problems
from experiments import median
from plumbing.constants import set_constants
from rollout import random_number
from tests.workload import DrawnLengths, draw_length, finish, save_random_model, seconds_of

PROBLEMS: str = "3,4,50,27,68"  # sizes of the benchmarks: the paper's five by ten; so are the engine's 256 sequences
MODEL: str = ""  # folder or hub name; "" = a random one
DTYPE: str = "float32"
HIDDEN: int = 128  # width of the random model
LAYERS: int = 4  # its depth
SHORTEST: int = 16  # tokens of an attempt
LONGEST: int = 128
RIGHT: float = 0.25  # share of right attempts

Play = tuple[float, float, int]  # seconds, CPU seconds of this process, generated tokens


def play(engine: DrawnLengths, problems: Problems, runs: Iterable[list[Item]]) -> Play:
    """One run after the other, each with an empty prefix cache."""
    records: list[dict[str, Any]] = []

    def play_all() -> None:
        for items in runs:
            engine.llm.reset_prefix_cache()
            evaluate.play_items(engine, items, problems, records.append, "")

    clocks = seconds_of(play_all)
    return *clocks, sum(a["tokens"] for r in records for a in r["attempts"])


def bench_queue(folder: Path) -> None:
    shape = {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": LAYERS}
    model = MODEL or save_random_model(folder, **shape, num_attention_heads=4, num_key_value_heads=4)
    engine = DrawnLengths(model, DTYPE, lambda key, ids: draw_length(SHORTEST, LONGEST, *ids))
    sizes = [int(size) for size in PROBLEMS.split(",")]
    questions = median.make_problems(sum(sizes), 0, held_out=True)
    names = [f"benchmark {i}" for i, size in enumerate(sizes) for _ in range(size)]
    problems = {(name, p["id"]): p for p, name in zip(questions, names, strict=True)}
    items = evaluate.list_items(problems)
    seven = [[i for i in items if k == i.K] for k in range(1, rollout.MAX_ATTEMPTS + 1)]
    single = [[i for i in run if i.benchmark == name] for run in seven for name in dict.fromkeys(names)]
    play(engine, problems, [seven[0][:64]])  # the first call in a process is slower
    engine.asked.clear()
    queue = play(engine, problems, [items])
    asked = list(engine.asked)
    print(f"{len(items)} dialogues, {len(asked)} attempts of {SHORTEST} to {LONGEST} tokens, K = 1..{len(seven)}")

    def show(name: str, result: Play) -> None:
        (seconds, cpu, tokens), per_token = result, [clock / result[2] * queue[2] for clock in result[:2]]
        rate = f"{seconds:7.1f} s {cpu:7.1f} CPU s {tokens:9,} tokens {tokens / seconds:8,.0f} tokens/s"
        ratios = f"{per_token[0] / queue[0]:.2f} times as fast, in CPU seconds {per_token[1] / queue[1]:.2f} times"
        print(f"{name:40} {rate}   one queue is {ratios}", flush=True)

    show("one queue (evaluate.py)", queue)
    clocks = seconds_of(lambda: engine.generate(asked, 0.0))
    show("llm.generate, same prompts and tokens", (*clocks, sum(length for _, length in asked)))
    show(f"{len(seven)} runs, one after the other", play(engine, problems, seven))
    show(f"{len(single)} runs, each benchmark alone", play(engine, problems, single))
    engine.shutdown()


def main() -> None:
    rollout.MAX_ATTEMPTS, plumbing.engine.MAX_SEQUENCES, evaluate.RESAMPLES = 7, 26, 0
    modules = {"bench": sys.modules[__name__], "rollout": rollout, "engine": plumbing.engine}
    print(set_constants(sys.argv[1:], modules))
    grader.submit = lambda said, gold, *_: finish(random_number("right", said, gold) / 2**31 < RIGHT)
    with tempfile.TemporaryDirectory() as folder:
        bench_queue(Path(folder))


if __name__ == "__main__":
    main()
