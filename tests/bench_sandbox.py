"""Verdicts a second on programs that are right, and what a verdict's time goes to; or a rollout in which some hang.

python tests/bench_sandbox.py mbpp.jsonl WORKERS=2 [COUNT=200]    # MBPP's own file: task_id, code, test_list, ...
python tests/bench_sandbox.py PART=rollout WORKERS=2              # rollout.play with a random model; needs no file
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))
import grader
import rollout
from plumbing import sandbox
from plumbing.constants import Count, Share, set_constants
from plumbing.sandbox import ProgramTests, run_tests
from rollout import random_number

PART: Literal["verdicts", "rollout"] = "verdicts"
COUNT: Count = 200  # programs, from the first
REPEATS: Count = 50  # of each single cost
DIALOGUES: Count = 128  # of the rollout
RIGHT: Share = 0.25  # share of its programs that are right
HANGING: Share = 0.01  # share of those that run into their limit
LONGEST: Count = 512  # tokens of an attempt, of 16 and more


def milliseconds(command: list[str]) -> float:
    start = time.perf_counter()
    for _ in range(REPEATS):
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={}, cwd="/", check=True)
    return 1000 * (time.perf_counter() - start) / REPEATS


def time_verdicts(path: str) -> None:
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()][:COUNT]
    cases = [
        (row["code"], ProgramTests([*row["test_list"], *row["challenge_test_list"]], row["test_setup_code"]))
        for row in rows
    ]
    python, empty = [sandbox.PYTHON, "-s", "-S", "-P", "-c"], ProgramTests(["assert f() == 1"])
    ours = [*python, *sandbox.boot(), "program", "5", str(1 << 30), "0"]
    bwrap, *options = sandbox.container()
    alone = [bwrap, "--ro-bind", "/bin/true", "/bin/true", *options, "/bin/true"]
    print(f"{'bwrap alone':30}{milliseconds(alone):6.1f} ms, twice a verdict")
    print(f"{'Python alone':30}{milliseconds([*python, '']):6.1f} ms, twice")
    print(f"{'Python with inside.py':30}{milliseconds(ours):6.1f} ms, twice")
    print(f"{'both':30}{milliseconds([*sandbox.container(), *ours]):6.1f} ms, twice")
    start = time.perf_counter()
    for _ in range(REPEATS):
        run_tests("def f(): return 1", empty)
    print(f"{'a verdict on an empty program':30}{1000 * (time.perf_counter() - start) / REPEATS:6.1f} ms")
    start = time.perf_counter()
    outcomes = list(sandbox.workers().map(lambda case: run_tests(*case), cases))
    seconds = time.perf_counter() - start
    for row, outcome in zip(rows, outcomes, strict=True):
        if outcome.status != "correct":
            print(f"  {row['task_id']}: {outcome}")
    print(f"{len(cases)} programs, {sandbox.WORKERS} at a time: {len(cases) / seconds:.1f} verdicts a second")


def time_rollout() -> None:
    """rollout.play with programs that were drawn in place of what the random model says: the same in each row, but for
    those that hang."""
    from tests.workload import DrawnLengths, draw_length, save_random_model

    submit, graded = grader.submit, Counter[str]()

    def play(share: float, hangs: str) -> float:
        def submit_drawn(response: str, gold: ProgramTests, tolerance: None, question: str) -> Future:
            graded[question] += 1
            drawn = random_number(question, graded[question]) / 2**31
            return submit(hangs if drawn > 1 - share else f"def f(x): return {int(drawn < RIGHT)}", gold)

        graded.clear()
        grader.submit = submit_drawn
        problems = [{"id": str(i), "question": f"f, {i}", "tests": ["assert f(1) == 1"]} for i in range(DIALOGUES)]
        dialogues = [rollout.new_dialogue(chat, p, rollout.draw_attempts(0, 1, i)) for i, p in enumerate(problems)]
        start = time.perf_counter()
        rollout.play(engine, chat, dialogues, list(range(DIALOGUES)), 1.0)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
        model = save_random_model(Path(folder), **shape, num_attention_heads=4, num_key_value_heads=2)
        engine = DrawnLengths(model, "float32", lambda key, ids: draw_length(16, LONGEST, key, len(ids)))
        chat = rollout.make_chat(engine.tokenizer)
        play(0.0, "")  # the first call in a process is slower
        without = play(0.0, "")
        print(f"no program hangs: {without:.1f} s, {graded.total()} verdicts, {graded.total() / without:.1f} a second")
        for hangs in ("import time; time.sleep(99)", "while True: pass"):
            seconds = play(HANGING, hangs)
            ratio = without / seconds
            print(f"{HANGING:.0%} are {hangs!r} for {grader.RUN_SECONDS} s: {seconds:.1f} s, {ratio:.2f} of the speed")
        engine.shutdown()


def main() -> None:
    paths, arguments = ([a for a in sys.argv[1:] if ("=" in a) == is_set] for is_set in (False, True))
    modules: dict[str, ModuleType] = {"bench": sys.modules[__name__], "sandbox": sandbox, "grader": grader}
    print(set_constants(arguments, modules))
    if PART == "rollout":
        time_rollout()
    else:
        time_verdicts(*paths)


if __name__ == "__main__":
    main()
