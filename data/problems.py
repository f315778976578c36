"""Problem sets: files of questions and answers -> {"id", "question", "answer", ...}, and which questions are the same.

JSONL, Parquet or CSV, under the usual names of the columns. A "tolerance" of a problem goes to the grader. A problem
that asks for a program has "tests" in place of "answer", a list of Python statements that raise where it is wrong, and
perhaps "setup", code that runs before them; "given", code that stands before the program; and "public", how many of
the tests, from the first, may be told (0 if it does not say).
"""

import csv
import functools
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plumbing.sandbox import read_tests

COLUMNS = {  # field of a problem -> what a file may call it, in upper or lower case; the first that is there counts
    "id": ("id", "unique_id"),
    "question": ("question", "problem", "prompt"),
    "answer": ("answer", "final_answer", "gold", "gold_answer", "ground_truth", "ground_truth_answer"),
}


def load_problems(path: str | Path) -> list[dict[str, Any]]:
    """Problems of a JSONL, Parquet or CSV file: a row has a question, an answer and what else is known.

    Returns dictionaries with "id", "question", "answer" (strings), perhaps "tolerance" (float), and the other columns
    as they are; with "tests" in place of "answer" where a program is asked for. Without an id a row gets
    "<file stem>/<line>". Raises SystemExit with file, line, id and cure.
    """
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"{path}: no such problem file (`make data` makes the toy's, `python -m data.prepare` others)")
    problems: dict[str, dict[str, Any]] = {}
    for where, number, row in read_rows(path):
        problem = to_problem(row, f"{path.stem}/{number}", f"{path}, {where} {number}")
        if problem["id"] in problems:
            raise SystemExit(f"{path}, {where} {number}: id {problem['id']!r} is there already; make ids different")
        problems[problem["id"]] = problem
    if not problems:
        raise SystemExit(f"{path}: no problem in it")
    return list(problems.values())


def read_rows(path: Path) -> Iterator[tuple[str, int, Any]]:
    """("line" or "row", its number from 1, its content), in order. The suffix says how to read the file."""
    at = ""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from (("row", n, row) for n, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
        elif path.suffix == ".csv":  # not by pyarrow, which would make the number 33 of the answer 033
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file, strict=True)
                for row in rows:
                    yield "line", rows.line_num, row  # of a row with line breaks: its last line
                    at = f", line {rows.line_num + 1}"
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
                at = f", line {number}"
                if line.strip():
                    yield "line", number, json.loads(line)
        else:
            raise SystemExit(f"{path}: a problem file ends in .jsonl (one JSON object a line), .parquet or .csv")
    except (csv.Error, ValueError) as error:  # what json, pyarrow and UTF-8 raise are ValueErrors
        raise SystemExit(f"{path}{at}: not {path.suffix[1:].upper()} ({error}); mend or drop it") from error


def to_problem(row: Any, name: str, where: str) -> dict[str, Any]:
    """A file's row as a problem, `name` its id if it has none. Raises SystemExit that begins with `where`.

    >>> to_problem({"Problem": "1+1?", "Answer": 2, "level": 1}, "sums/1", "sums.jsonl, line 1")
    {'id': 'sums/1', 'question': '1+1?', 'answer': '2', 'level': 1}
    """
    if not isinstance(row, dict) or None in row:  # None: where csv keeps cells that no column has a name for
        raise SystemExit(f"{where}: must be an object, or a row as long as the header, not {str(row)[:80]}")
    row, problem = dict(row), dict[str, Any]()
    for field, names in COLUMNS.items():
        if field == "answer" and row.get("tests") is not None:
            try:
                read_tests(row)
            except ValueError as error:
                raise SystemExit(f"{where}, id {problem['id']}: {error}; mend or drop it") from error
            continue
        column = next((c for name in names for c in row if c.lower() == name), None)
        value = row.pop(column, None)
        if field != "question" and type(value) in (int, float) and math.isfinite(value):
            value = repr(value).removesuffix(".0")
        if field == "id" and value in (None, ""):
            value = name
        if not isinstance(value, str) or not value.strip():
            wanted = "a non-empty string" if field == "question" else "a non-empty string or a number"
            there = f"not {str(value)[:40]!r}" if column else f"in a column of that name; there are {', '.join(row)}"
            raise SystemExit(f'{where}, id {problem.get("id")}: "{field}" must be {wanted}, {there}; mend or drop it')
        problem[field] = value
    tolerance = row.pop("tolerance", None)
    if tolerance not in (None, ""):
        try:
            problem["tolerance"] = float(tolerance)
        except (TypeError, ValueError) as error:
            raise SystemExit(f'{where}, id {problem["id"]}: "tolerance" must be a number; mend or drop it') from error
    return problem | row


SAME_COMMANDS = re.compile(r"\\[a-z]?(frac|dots)(?![a-z])")  # \dfrac is \frac, \ldots is \cdots
DRESS = re.compile(
    r"\\\\|\\[^a-z0-9%]"  # ends of lines and what is no word: \, \! \[ \{
    r"|\\(?:left|right|big[lr]?|displaystyle|limits|text|textbf|textit|textrm|mathrm|mathbf|q?quad)(?![a-z])"
)
WORD = re.compile(
    r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/^=<>|()\[\]!%]"
)  # numbers, words and commands, signs that mean something


def question_words(question: str) -> list[str]:
    """A question's words, numbers and signs, without its dress: case, spaces, punctuation, braces, $, LaTeX's fonts."""
    return WORD.findall(DRESS.sub(" ", SAME_COMMANDS.sub(r"\1 ", question.lower())))


def question_key(question: str) -> str:
    r"""The same for questions that differ in their dress alone; of spaces only those between two numbers are kept.

    >>> question_key(r"Compute $\dfrac{1}{23}x^{2}$.") == question_key(r"Compute \[\frac 1 {23} x^2.\]")
    True
    >>> question_key("Is $x + 1$ odd?") == question_key("Is $x - 1$ odd?")
    False
    """
    return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(question_words(question)))


def split_dev(
    problems: list[dict[str, Any]], count: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """-> (train, dev): `count` problems drawn by seed, and the others less what asks the same as one of those."""
    if len(problems) <= count:
        raise SystemExit(f"DEV_PROBLEMS={count} leaves none of the {len(problems)} problems to train on")
    dev = random.Random(f"dev-{seed}").sample(problems, count)
    asked = {question_key(p["question"]) for p in dev}
    return [p for p in problems if question_key(p["question"]) not in asked], dev


def random_number(*key: int | str) -> int:
    """31 random bits that depend on the key alone, not on the process, the order of calls or the number of ranks."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big") >> 1


def problem_at(problems: list[dict[str, Any]], visit: int, seed: int) -> dict[str, Any]:
    """The problem of a run's visit-th dialogue: pass after pass over all problems, each in an order of its own. It
    depends on seed and visit alone: to resume, the step is all that one has to know."""
    epoch, index = divmod(visit, len(problems))
    return problems[shuffle_indices(seed, epoch, len(problems))[index]]


@functools.lru_cache(maxsize=2)
def shuffle_indices(seed: int, epoch: int, count: int) -> list[int]:
    return random.Random(f"{seed}-{epoch}").sample(range(count), count)
