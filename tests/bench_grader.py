"""The grader beside Math-Verify: labelled cases, copied questions, golds, hostile rows, speed.

    python tests/bench_grader.py cases.jsonl ... problems.jsonl ... [MATH_VERIFY_PYTHON=python that has math-verify]

A file of cases has lines {"pred" or "response", "gold", "expected"} and perhaps "question", "set" and "policy" ("quirk"
rows do not count). A file of problems has lines {"question", "answer"}: each formula of a question is put in a box; it
is counted how many problems pay one that is not their gold answer itself; then each gold answer is graded against its
own question. Both graders answer the same rows, one at a time, in one process each, over a pipe; the processor time of
a row is taken inside that process. Math-Verify gets what its README asks for: gold and prediction as LaTeX in dollars,
its own parse() and verify() with their default timeouts.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_PROBLEMS: int = 1500  # of a file: the first ones
SHOWN: int = 20  # wrong rows of ours that are printed
FORMULA = re.compile(r"(?<!\\)\$\$?(.+?)(?<!\\)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
OURS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import grader
def answer(case):
    response = case.get("response", "\\\\boxed{{" + case.get("pred", "") + "}}")
    return grader.grade(response, case["gold"], case.get("tolerance"), case.get("question", "")).correct
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
    case, start = json.loads(line), time.process_time()
    try:
        verdict = answer(case)
    except Exception:
        verdict = None
    print(json.dumps([verdict, time.process_time() - start]), file=out, flush=True)
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
            results.append((None, 1.0))
    return results


def measure_cases(rows: list[dict], results: list[tuple[bool | None, float]], folder: str) -> dict[str, str]:
    """The figures of one grader on one file of labelled cases."""
    strict = [(row, bool(got)) for row, (got, _) in zip(rows, results, strict=True) if row.get("policy") != "quirk"]
    figures = {}
    for name in sorted({row.get("set", "") for row, _ in strict}):
        part = [(row, got) for row, got in strict if row.get("set", "") == name]
        right = sum(row["expected"] == got for row, got in part)
        paid = sum(got and not row["expected"] for row, got in part)
        figures[f"{name} right, of {len(part)}"] = f"{100 * right / len(part):.2f} % ({paid} paid wrongly)"
    times = sorted(seconds for _, seconds in results)
    figures["verdicts/s"] = f"{len(times) / sum(times):.0f}"
    figures["p50, p99, max in ms"] = ", ".join(f"{1e3 * times[int(q * (len(times) - 1))]:.2f}" for q in (0.5, 0.99, 1))
    figures["files made by injected commands"] = f"{len(list(pathlib.Path(folder).iterdir()))}"
    return figures


def list_copied_formulas(problems: list[dict]) -> list[dict]:
    """Each formula of each question as an answer, but for plain numbers, letters, and the gold answer itself."""
    rows = []
    for at, problem in enumerate(problems):
        question = re.sub(r"\[asy\].*?\[/asy\]", "", problem["question"], flags=re.S)
        for match in FORMULA.finditer(question):
            formula = next(part for part in match.groups() if part is not None).strip(" .,")
            value = formula.rpartition("=")[2]
            golds = {re.sub(r"[\s.{}]|\\text", "", text) for text in (problem["answer"], problem["answer"].strip("()"))}
            is_gold = {re.sub(r"[\s.{}]", "", text) for text in (formula, value)} & golds
            if not is_gold and not re.fullmatch(r"[-+]?[\d.,]+|[A-Za-z]", formula):
                case = {"pred": formula, "gold": problem["answer"], "question": problem["question"]}
                rows.append(case | {"at": at})
    return rows


def measure_problems(problems: list[dict], python: str, program: str, folder: str) -> dict[str, str]:
    """How many problems pay a copied formula, and how many refuse their own gold answer."""
    copied = list_copied_formulas(problems)
    paid = [row for row, (got, _) in zip(copied, run(python, program, copied, folder), strict=True) if got]
    golds = [{"pred": p["answer"], "gold": p["answer"], "question": p["question"]} for p in problems]
    refused = sum(not got for got, _ in run(python, program, golds, folder))
    for row in paid if program == OURS else []:
        print(f"pays {row['pred'][:80]!r} for {row['gold'][:60]!r}")
    count = len({row["at"] for row in paid})
    share = f"{count} of {len(problems)} ({100 * count / len(problems):.2f} %)"
    return {"problems that pay a formula of their question": share, "golds refused": str(refused)}


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    graders = {"here": (sys.executable, OURS)}
    if python := options.get("MATH_VERIFY_PYTHON"):
        graders["Math-Verify"] = (python, MATH_VERIFY)
    print(f"| | {' | '.join(graders)} |\n|---|{'---|' * len(graders)}")
    for path in (pathlib.Path(argument) for argument in sys.argv[1:] if "=" not in argument):
        rows, columns, wrong = [json.loads(line) for line in path.read_text().splitlines()], [], []
        for name, (python, program) in graders.items():
            with tempfile.TemporaryDirectory() as folder:
                if "expected" not in rows[0]:
                    columns.append(measure_problems(rows[:MAX_PROBLEMS], python, program, folder))
                    continue
                results = run(python, program, rows, folder)
                columns.append(measure_cases(rows, results, folder))
                if name == "here":
                    pairs = zip(rows, results, strict=True)
                    wrong = [(row, got) for row, (got, _) in pairs if bool(got) != row["expected"]]
        for figure in columns[0]:
            print(f"| {path.stem}: {figure} | {' | '.join(column[figure] for column in columns)} |", flush=True)
        for row, got in [pair for pair in wrong if pair[0].get("policy") != "quirk"][:SHOWN]:
            given = row.get("pred", row.get("response"))
            print(f"said {got}: {row['gold'][:80]!r} against {given[:80]!r} ({row.get('note', '')})")


if __name__ == "__main__":
    main()
