"""The grader beside Math-Verify on a folder of cases: accuracy, false positives, speed, hostile rows, injection.

    python tests/bench_grader.py CASES=folder [MATH_VERIFY_PYTHON=python of a venv that has math-verify] [FILE=name]

A case is a JSON line {"gold", "pred" or "response", "expected"} and perhaps "source", "note", "policy" ("strict" rows
count, "quirk" rows are shown apart) and "limit_s" (hostile rows). Both graders answer the same rows, one at a time, in
one process each, over a pipe; the time of a row is taken inside that process. Math-Verify gets what its README asks
for: the gold and the prediction as LaTeX in dollars, its own parse() and verify() with their default timeouts.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SLOW_SECONDS: float = 1.0  # a hostile row above this counts as slow
SHOWN: int = 20  # wrong rows of ours that are printed
OURS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import grader
def answer(case):
    if "response" in case:
        return grader.grade(case["response"], case["gold"]).correct
    return grader.is_equivalent(case["pred"], case["gold"])
answer({{"pred": "|x|<1", "gold": "(-1,1)"}})  # the pool starts here
"""
MATH_VERIFY = """
import logging
from math_verify import parse, verify
logging.disable(logging.CRITICAL)
def answer(case):
    prediction = case["response"] if "response" in case else "$" + case["pred"] + "$"
    return bool(verify(parse("$" + case["gold"] + "$"), parse(prediction)))
answer({"pred": "1", "gold": "1"})
"""
LOOP = """
import json, os, sys, time
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a grader prints is not a result
for line in sys.stdin:
    case, start = json.loads(line), time.perf_counter()
    try:
        verdict = answer(case)
    except Exception:
        verdict = None
    print(json.dumps([verdict, time.perf_counter() - start]), file=out, flush=True)
"""


def run(python: str, program: str, rows: list[dict], folder: str) -> list[tuple[bool | None, float]]:
    """(verdict, seconds) for each row; a process that dies on a row is started again after it."""
    results: list[tuple[bool | None, float]] = []
    while len(results) < len(rows):
        with tempfile.TemporaryFile("w+") as stdin:
            stdin.writelines(json.dumps(row) + "\n" for row in rows[len(results) :])
            stdin.seek(0)
            command = [python, "-c", program + LOOP]
            done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, cwd=folder, check=False)
        answered = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
        if not answered and not results and "Error" in done.stderr:
            sys.exit(done.stderr)
        results += answered
        if len(results) < len(rows):
            results.append((None, SLOW_SECONDS))
    return results


def measures(rows: list[dict], results: list[tuple[bool | None, float]], folder: str) -> dict[str, str]:
    """The figures of one grader on one file."""
    graded = [
        (row, bool(verdict) == row["expected"], bool(verdict)) for row, (verdict, _) in zip(rows, results, strict=True)
    ]
    strict = [row for row in graded if row[0].get("policy", "strict") == "strict"]
    quirks = [row for row in graded if row[0].get("policy") == "quirk"]
    times = sorted(seconds for _, seconds in results)
    false_positives = sum(said and not right for _, right, said in strict)
    right = sum(right for _, right, _ in strict)
    figures = {
        f"right, of {len(strict)} strict": f"{100 * right / len(strict):.2f} % ({len(strict) - right} wrong)",
        "false positives": f"{100 * false_positives / len(strict):.3f} % ({false_positives})",
        f"as labelled, of {len(quirks)} debatable": f"{sum(right for _, right, _ in quirks)}",
        "verdicts/s": f"{len(times) / sum(times):.0f}",
        "p50, p99, max in ms": ", ".join(f"{1e3 * times[int(q * (len(times) - 1))]:.2f}" for q in (0.5, 0.99, 1)),
        f"over {SLOW_SECONDS:g} s": f"{sum(seconds > SLOW_SECONDS for seconds in times)}",
    }
    if injected := sum(row.get("source") == "adv_inject" for row in rows):
        figures[f"files made by {injected} injection payloads"] = f"{len(list(pathlib.Path(folder).iterdir()))}"
    return figures


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    graders = {"here": (sys.executable, OURS)}
    if python := options.get("MATH_VERIFY_PYTHON"):
        graders["Math-Verify"] = (python, MATH_VERIFY)
    wrong = []
    print(f"| | {' | '.join(graders)} |\n|---|{'---|' * len(graders)}")
    for path in sorted(pathlib.Path(options["CASES"]).glob(options.get("FILE", "*") + ".jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        columns = []
        for name, (python, program) in graders.items():
            with tempfile.TemporaryDirectory() as folder:
                results = run(python, program, rows, folder)
                columns.append(measures(rows, results, folder))
            if name == "here":
                wrong += [
                    (row, got) for row, (got, _) in zip(rows, results, strict=True) if bool(got) != row["expected"]
                ]
        for figure in columns[0]:
            cells = " | ".join(column[figure] for column in columns)
            print(f"| {path.stem}: {figure} | {cells} |", flush=True)
    for row, got in [pair for pair in wrong if pair[0].get("policy", "strict") == "strict"][:SHOWN]:
        given = row.get("pred", row.get("response"))
        print(f"said {got}: {row['gold'][:80]!r} against {given[:80]!r} ({row.get('note', '')})")


if __name__ == "__main__":
    main()
