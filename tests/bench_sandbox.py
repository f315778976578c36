"""Verdicts a second on programs that are right, and what a verdict's time goes to.

python tests/bench_sandbox.py mbpp.jsonl WORKERS=2 [COUNT=200]    # MBPP's own file: task_id, code, test_list, ...
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent.parent))
from plumbing import sandbox
from plumbing.constants import Count, set_constants
from plumbing.sandbox import ProgramTests, run_tests

COUNT: Count = 200  # programs, from the first
REPEATS: Count = 50  # of each single cost


def milliseconds(command: list[str]) -> float:
    start = time.perf_counter()
    for _ in range(REPEATS):
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={}, cwd="/", check=False)
    return 1000 * (time.perf_counter() - start) / REPEATS


def main() -> None:
    path, *arguments = sys.argv[1:]
    modules: dict[str, ModuleType] = {"bench": sys.modules[__name__], "sandbox": sandbox}
    print(set_constants(arguments, modules))
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()][:COUNT]
    cases = [
        (row["code"], ProgramTests([*row["test_list"], *row["challenge_test_list"]], row["test_setup_code"]))
        for row in rows
    ]
    python, empty = [sandbox.PYTHON, "-s", "-S", "-P", "-c"], ProgramTests(["assert f() == 1"])
    ours = [*python, *sandbox.boot(), "program", "5", str(1 << 30), "0"]
    print(f"{'bwrap alone':30}{milliseconds([*sandbox.container(), '/bin/true']):6.1f} ms, twice a verdict")
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


if __name__ == "__main__":
    main()
