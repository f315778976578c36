"""Get the benchmarks and the training set from the Hugging Face hub into data/*.jsonl, checked and cleaned.

1. A set has several sources, which are tried in order; each must have the number of rows that it is known for.
2. Each set has one rule for its gold answer: an integer (AIME, AMC), the solution's last box (MATH, Minerva), the list
   of all answers (OlympiadBench). A tolerance that a problem states is passed on to the grader.
3. Training questions that equal or resemble a question of a benchmark, or an earlier one of their own, are dropped.
4. Programs: MBPP with its published split, and HumanEval. Of their tests only those are public which the question says.

    python -m data.prepare                                     # all six; files that are there already are checked
    python -m data.prepare SETS=aime24,math500 FORCE=1         # make some of them again
    python -m data.prepare SETS=humaneval,mbpp_prompts,mbpp_dev,mbpp_test,mbpp_train    # programs
    python -m data.prepare HUB_MIRROR=folder                   # without network, from folder/<owner>/<name>
"""

import ast
import doctest
import hashlib
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grader
from data.problems import COLUMNS, load_problems, question_key, question_words
from plumbing.constants import Share, set_constants
from plumbing.files import read_jsonl, to_line, write_atomically
from plumbing.sandbox import ProgramTests

SETS: str = "aime24,amc23,math500,minerva_math,olympiadbench,math_train"  # the sets to get
OUT: str = "data"  # folder for the files
HUB_MIRROR: str = ""  # folder with <owner>/<name> folders as `hf download --local-dir` makes them; "" = the hub itself
FORCE: bool = False  # 1: make files again that are there already
LEVELS: tuple[int, int] = (3, 5)  # easiest and hardest of MATH's five levels to train on (paper 3 to 5)
SHINGLE: int = 3  # words in a row; questions are compared by their sets of such shingles
NEAR: Share = 0.7  # shared shingles over all of both questions, from which they count as duplicates; less drops more

TRAINING = "math_train"


class Source(NamedTuple):
    """A dataset on the hub. Its columns have names that data.problems.COLUMNS lists, except for the answer's."""

    name: str  # owner/name
    rows: int  # that all splits and configurations have together
    answer: str  # the column of the gold answer, or of the solution that contains it
    splits: tuple[str, ...] = ("test",)
    configs: tuple[str | None, ...] = (None,)


SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
SOURCES = {
    "aime24": (
        Source("HuggingFaceH4/aime_2024", 30, "answer", ("train",)),
        Source("Maxwell-Jia/AIME_2024", 30, "answer", ("train",)),
        Source("math-ai/aime24", 30, "solution"),
    ),
    "amc23": (
        Source("math-ai/amc23", 40, "answer"),
        Source("zwhe99/amc23", 40, "answer"),
    ),
    "math500": (
        Source("HuggingFaceH4/MATH-500", 500, "solution"),
        Source("math-ai/math500", 500, "answer"),
    ),
    "minerva_math": (
        Source("svc-huggingface/minerva-math", 272, "solution"),
        Source("math-ai/minervamath", 272, "answer"),
    ),
    "olympiadbench": (  # 675 rows in the papers' files, one less in the authors' own
        Source("zwhe99/simplerl-OlympiadBench", 675, "final_answer"),
        Source("Hothan/OlympiadBench", 674, "final_answer", ("train",), ("OE_TO_maths_en_COMP",)),
    ),
    TRAINING: (  # all of MATH; the questions of MATH-500 are dropped as duplicates
        Source("EleutherAI/hendrycks_math", 12_500, "solution", ("train", "test"), tuple(SUBJECTS.split())),
        Source("DigitalLearningGmbH/MATH-lighteval", 12_500, "solution", ("train", "test")),
    ),
}
MBPP = "google-research-datasets/mbpp"
PROGRAMS = {
    "humaneval": (Source("openai/openai_humaneval", 164, "test"),),
    "mbpp_prompts": (Source(MBPP, 10, "test_list", ("prompt",), ("full",)),),
    "mbpp_dev": (Source(MBPP, 90, "test_list", ("validation",), ("full",)),),
    "mbpp_test": (Source(MBPP, 500, "test_list", ("test",), ("full",)),),
    "mbpp_train": (Source(MBPP, 374, "test_list", ("train",), ("full",)),),
}
CLEANED_OF = {  # training set -> the sets whose questions must not be trained on
    TRAINING: [name for name in SOURCES if name != TRAINING],
    "mbpp_train": ["humaneval", "mbpp_test", "mbpp_dev"],
}
WRONG_EXAMPLES = ("median([-10, 4, 6, 1000, 10, 20])",)  # HumanEval/47 says that it is 15, and tests that it is 8
SHOWN = "\nYour program should pass this test:\n"


class Unavailable(Exception):
    """A set cannot be made; the message says what to do about it."""


# The gold answer: one rule a set --------------------------------------------------------------------------------------
def last_box(solution: str) -> str:
    r"""MATH, MATH-500, Minerva: the content of the solution's last box; "" if there is none.

    >>> last_box(r"Not $\boxed{3}$. So $x = \boxed{\frac{1}{2}}.$"), last_box(r"... which is $\boxed 5$.")
    ('\\frac{1}{2}', '5')
    """
    return grader.extract_answer(re.sub(r"\\boxed\s+([^{}$]+)\$", r"\\boxed{\1}$", solution)) or ""


def to_integer(answer: Any) -> str:
    """AIME writes 033, AMC 27.0.

    >>> to_integer("033"), to_integer(27.0)
    ('33', '27')
    """
    number = float(answer)
    if not number.is_integer():
        raise ValueError(f"the answer {answer!r} is not an integer")
    return str(int(number))


def join_answers(answer: str | Sequence[str]) -> str:
    """OlympiadBench: a list of answers, all of which are asked for; one of them may itself be several.

    >>> join_answers(["$69$,$84$"]), join_answers([r"$x=2$", r"$x=-2$."])
    ('69,84', 'x=2, x=-2')
    """
    answers = [answer] if isinstance(answer, str) else answer
    return ", ".join(re.sub(r"(?<!\\)\$", "", a).strip().rstrip(".") for a in answers)


GOLD: dict[str, Callable[[Any], str]] = {"aime24": to_integer, "amc23": to_integer, "olympiadbench": join_answers}


def to_problem(name: str, source: Source, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A source's row as a line of data/<name>.jsonl. Raises ValueError or KeyError if it is not as expected."""
    row = {column.lower(): value for column, value in row.items() if value is not None}
    question = next((c for c in COLUMNS["question"] if c in row), "question")
    given = last_box(row["solution"]) if source.answer == "solution" else row[source.answer]
    problem: dict[str, Any] = {"id": f"{name}/{row.get('id', row.get('unique_id', number))}"}
    problem |= {"question": str(row[question]).strip(), "answer": GOLD.get(name, str)(given).strip()}
    if not problem["question"] or (not problem["answer"] and name != TRAINING):
        raise ValueError(f"row {number} has an empty question or answer")
    if level := re.search(r"\d", str(row.get("level", ""))):
        problem["level"] = int(level[0])
    if subject := row.get("subfield") or row.get("type") or row.get("subject"):
        problem["subject"] = subject
    unit = str(row.get("unit") or "").strip("$")
    if unit[:1].isalpha():  # else 45 hours would pass for 45 minutes; with % or degrees 0.042 or radians would pass
        problem["answer"] += rf" \text{{ {unit}}}"
    if row.get("error"):
        problem["tolerance"] = float(row["error"])
    return problem | {"source": source.name}


def list_examples(prompt: str, entry: str) -> list[str]:
    r"""HumanEval: the examples in a function's docstring as tests, if they are written as doctests.

    >>> list_examples("def f(x):\n    'Double it.\n    >>> f(2)\n    4'".replace("'", "'" * 3), "f")
    ['assert f(2) == 4']
    """
    function = next(p for p in ast.parse(prompt).body if isinstance(p, ast.FunctionDef) and p.name == entry)
    tests = []
    try:
        for example in doctest.DocTestParser().get_examples(ast.get_docstring(function) or ""):
            source, value = ast.unparse(ast.parse(example.source.strip(), mode="eval")), example.want.strip()
            ast.literal_eval(value)
            if source not in WRONG_EXAMPLES:
                tests.append(f"assert {source} == {value}")
    except (ValueError, SyntaxError):  # no value, or a docstring that doctest cannot read
        return []
    return tests


def to_program(name: str, source: Source, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """to_problem() for programs. HumanEval's examples and MBPP's first test are public."""
    problem: dict[str, Any] = {"id": f"{name}/{str(row['task_id']).rpartition('/')[2]}"}
    if name == "humaneval":
        prompt, entry = row["prompt"], row["entry_point"]
        tests = list_examples(prompt, entry)
        problem |= {"question": f"Complete this function:\n\n```python\n{prompt.strip()}\n```"}
        problem |= {"tests": [*tests, f"check({entry})"], "setup": row["test"], "public": len(tests)}
        problem["given"] = prompt[: prompt.index(f"def {entry}")]
    else:
        tests = [*row["test_list"], *row.get("challenge_test_list", [])]
        problem |= {"question": f"{row['text'].strip()}{SHOWN}{tests[0]}", "tests": tests, "public": 1}
        problem["setup"] = row.get("test_setup_code", "")
    return problem | {"source": source.name}


# Download -------------------------------------------------------------------------------------------------------------
def fetch(source: Source) -> list[dict[str, Any]]:
    """All rows of a source. Raises ValueError for another number of rows, and what `datasets` raises."""
    from datasets import load_dataset

    path, rows = Path(HUB_MIRROR, source.name), []
    if HUB_MIRROR and not path.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    # The cache of `datasets` confuses folders of the same name: with a mirror it gets a new place for every call.
    with tempfile.TemporaryDirectory() as own:
        name, cache = (str(path), own) if HUB_MIRROR else (source.name, None)
        for config in source.configs:
            for split in source.splits:
                rows += load_dataset(name, config, split=split, cache_dir=cache)
    if len(rows) != source.rows:
        raise ValueError(f"{len(rows)} rows where {source.rows} are expected")
    return rows


def load_set(name: str) -> list[dict[str, Any]]:
    """A set's problems, from the first source that works. Raises Unavailable, or ConnectionError without network."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx  # the HTTP client of the hub's own code, httpx or httpx2

    reasons = ""
    make = to_program if name in PROGRAMS else to_problem
    for source in (SOURCES | PROGRAMS)[name]:
        try:
            problems = [make(name, source, number, row) for number, row in enumerate(fetch(source))]
            if len({problem["id"] for problem in problems}) < len(problems):
                raise ValueError("ids repeat")
            print(f"{name}: {len(problems)} rows of {source.name}{reasons and ', instead of'}{reasons}")
            return problems
        except (ConnectionError, httpx.TransportError) as error:  # a proxy that refuses, for one, `datasets` lets pass
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        except (DatasetsError, OSError, ValueError, RuntimeError, KeyError) as error:
            what = f"no column {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
            reasons += f"\n    {source.name}: {what}"
    raise Unavailable(f"no source worked{reasons}{describe_cure(name)}")


def describe_cure(name: str) -> str:
    """How to get a set by hand."""
    source = (SOURCES | PROGRAMS)[name][0]
    return f"""
  Either download it where there is a network:
    hf download {source.name} --repo-type dataset --local-dir mirror/{source.name}
  and say HUB_MIRROR=mirror here.
  Or write {Path(OUT, name)}.jsonl yourself, {source.rows} lines of {{"id", "question", "answer"}}."""


# Duplicates -----------------------------------------------------------------------------------------------------------
def find_duplicates(questions: Sequence[str], known: Sequence[str]) -> list[dict[int, bool]]:
    """For each question: the position in `known` of each duplicate -> True if they differ in nothing but typography.

    An index of shingles finds the candidates, so that only questions that share one are compared.

    >>> find_duplicates(["What is $2+2$?"], ["What is $2+3$?", r"What  is \\(2 + 2\\)?", "Name a prime."])
    [{1: True}]
    """

    def shingles(question: str) -> set[tuple[str, ...]]:
        words = question_words(question)
        return set(zip(*(words[i:] for i in range(SHINGLE)), strict=False))

    keys, sets = [question_key(question) for question in known], [shingles(question) for question in known]
    holders: dict[Any, list[int]] = defaultdict(list)  # key or shingle -> positions of the questions that have it
    for position, (key, theirs) in enumerate(zip(keys, sets, strict=True)):
        for part in (key, *theirs):
            holders[part].append(position)
    found = []
    for question in questions:
        key, mine = question_key(question), shingles(question)
        shared = Counter(position for part in (key, *mine) for position in holders.get(part, ()))
        near = [p for p, n in shared.items() if keys[p] == key or n >= NEAR * (len(mine) + len(sets[p]) - n)]
        found.append({position: keys[position] == key for position in near})
    return found


def prose(problem: dict[str, Any]) -> str:
    """What two problems are compared by: of those that ask for a program, what it shall do, without code."""
    question = problem["question"]
    if "tests" not in problem:
        return question
    docstrings = re.findall(r'''(?:"""|\'{3})(.*?)(?:>>>|"""|\'{3})''', question, re.S)
    text = docstrings[-1] if docstrings else question.partition(SHOWN)[0]
    return re.sub(r"^Write a (?:python )?function (?:to|that|which)?", "", text)


def drop_duplicates(training: Sequence[dict], benchmarks: Sequence[dict]) -> tuple[list[dict], Counter]:
    """The training problems that are no duplicates, and how many were dropped for which reason.

    A question that equals or resembles a benchmark's is dropped. One that only resembles an earlier training question
    is kept if its answer is another: "What is the smallest factor of 15?" and "... of 77?" are two problems.
    """
    questions = [prose(problem) for problem in training]
    of_benchmarks = find_duplicates(questions, [prose(problem) for problem in benchmarks])
    of_training = find_duplicates(questions, questions)
    kept: dict[int, dict] = {}
    dropped: Counter = Counter()
    for position, problem in enumerate(training):
        hits = [(same, benchmarks[p]["id"].split("/")[0]) for p, same in of_benchmarks[position].items()]
        for p, same in of_training[position].items():
            if p not in kept:
                continue
            mine, other = problem.get("answer"), kept[p].get("answer")  # None: with tests; each names its own function
            if same or (mine and other and grader.is_equivalent(mine, other)):
                hits.append((same, problem["id"].split("/")[0]))
        if hits:
            same, where = max(hits)
            dropped[f"{'the same' if same else 'nearly'} as in {where}"] += 1
        else:
            kept[position] = problem
    return list(kept.values()), dropped


# Main -----------------------------------------------------------------------------------------------------------------
def checksum(problems: Sequence[dict]) -> str:
    """SHA-256 of the questions and answers, or tests, in order."""
    golds = [p.get("answer") or [p.get(part) for part in ProgramTests._fields] for p in problems]
    rows = [[p["question"], gold] for p, gold in zip(problems, golds, strict=True)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def make_training_set(name: str, benchmarks: Sequence[dict]) -> list[dict]:
    """The problems of a training set that are no duplicates and, of TRAINING, have the right level and an answer."""
    problems = load_set(name)
    if name == TRAINING:
        levels = [p for p in problems if LEVELS[0] <= p.get("level", 0) <= LEVELS[1]]
        problems = [p for p in levels if p["answer"]]
        print(f"{name}: {len(levels)} of levels {LEVELS[0]} to {LEVELS[1]}, {len(problems)} of them with an answer")
    kept, dropped = drop_duplicates(problems, benchmarks)
    for reason, count in sorted(dropped.items()):
        print(f"{name}: dropped {count}, {reason}")
    return kept


def prepare(name: str) -> None:
    """Make OUT/<name>.jsonl, or check the one that is there. Raises SystemExit if that one has been changed, or if a
    training set was cleaned of other benchmarks than those that are there."""
    path, record = Path(OUT, f"{name}.jsonl"), Path(OUT, "checksums.jsonl")
    files = {other: Path(OUT, f"{other}.jsonl") for other in CLEANED_OF.get(name, [])}
    if missing := [other for other, file in files.items() if not file.is_file()]:
        raise Unavailable(f"make {', '.join(missing)} first: their questions must not be trained on")
    sets = {other: load_problems(file) for other, file in files.items()}
    is_there = path.is_file() and not FORCE
    if is_there:
        problems = load_problems(path)
    elif sets:
        problems = make_training_set(name, [problem for its in sets.values() for problem in its])
    else:
        problems = load_set(name)
    now: dict[str, Any] = {"set": name, "rows": len(problems), "sha256": checksum(problems)}
    if name == TRAINING:
        now["LEVELS"] = list(LEVELS)
    if sets:
        hashes = {other: checksum(its) for other, its in sets.items()}
        now |= {"SHINGLE": SHINGLE, "NEAR": NEAR, "cleaned of": hashes}
    made = {line["set"]: line for line in read_jsonl(record)}
    if not is_there:
        write_atomically(path, "".join(map(to_line, problems)))
        made[name] = now
        write_atomically(record, "".join(map(to_line, made.values())))
    elif made.get(name, now) != now:
        raise SystemExit(f"{path}: not as it was made; FORCE=1 makes it again\n  then {made[name]}\n  now  {now}")
    note = "is there already" if is_there else "made"
    print(f"{path}: {len(problems)} problems, sha256 of questions and answers {now['sha256']}, {note}", flush=True)


def main() -> None:
    if changed := set_constants(sys.argv[1:], {"prepare": sys.modules[__name__]}):
        print(changed)
    names = SETS.split(",")
    known = list(SOURCES | PROGRAMS)
    if unknown := set(names) - set(known):
        raise SystemExit(f"SETS: no set {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    Path(OUT).mkdir(parents=True, exist_ok=True)
    failures = []
    for name in sorted(names, key=known.index):  # training sets last
        try:
            prepare(name)
        except Unavailable as error:
            failures.append(f"{name}: {error}")
        except ConnectionError as error:
            failures.append(f"{name}: the hub cannot be reached ({error}){describe_cure(name)}")
            break  # the others would wait for it in vain as well
    if failures:
        raise SystemExit(
            "\n" + "\n".join(failures) + "\nWhat was made so far is kept; the same command continues from there."
        )


if __name__ == "__main__":
    main()
