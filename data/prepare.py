r"""Bring the benchmarks and the training set from the Hugging Face hub into data/*.jsonl, checked and cleaned.

1. A set has several sources, tried in order; a source must have as many rows as it is known for.
2. One rule a set makes the gold answer: an integer (AIME, AMC), the solution's last box (MATH, Minerva), the list of
   all answers (OlympiadBench). A tolerance that a problem states goes with it to the grader.
3. Training questions are dropped, and counted, that are or nearly are a benchmark's, or one another's.

    python -m data.prepare                                     # all six; what is there already is checked and kept
    python -m data.prepare SETS=aime24,math500 FORCE=1         # some, anew
    python -m data.prepare HUB_MIRROR=folder                   # without network, from folder/<owner>/<name>
"""

import hashlib
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python data/prepare.py` works, too

import grader
from data.problems import COLUMNS, load_problems, question_key, question_words
from evaluate import write_atomically
from rollout import override_constants

SETS: str = "aime24,amc23,math500,minerva_math,olympiadbench,math_train"  # what to bring
OUT: str = "data"  # folder for the files
HUB_MIRROR: str = ""  # folder with <owner>/<name> folders as `hf download --local-dir` makes them; "" = the hub itself
FORCE: bool = False  # 1: make the files anew
LEVELS: tuple[int, int] = (3, 5)  # easiest and hardest of MATH's five levels to train on (paper 3 to 5)
SHINGLE: int = 3  # words in a row; two questions are compared by the sets of theirs
NEAR: float = 0.7  # shared over all shingles (Jaccard) from which on two questions are near-duplicates; less drops more

TRAINING = "math_train"
CHECKSUMS = "checksums.jsonl"


class Source(NamedTuple):
    """A dataset on the hub: columns as data.problems.COLUMNS names them, and the one that holds the answer."""

    name: str  # owner/name
    rows: int  # what all parts together must have
    answer: str  # the column that the gold comes from
    splits: tuple[str, ...] = ("test",)
    configs: tuple[str | None, ...] = (None,)
    url: str = ""  # only rows whose "url" holds this


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
        Source("AI-MO/aimo-validation-amc", 40, "answer", ("train",), url="2023_AMC"),  # it holds 2022, too
    ),
    "math500": (
        Source("HuggingFaceH4/MATH-500", 500, "solution"),
        Source("math-ai/math500", 500, "answer"),
        Source("nlile/hendrycks-MATH-benchmark", 500, "solution"),
    ),
    "minerva_math": (
        Source("svc-huggingface/minerva-math", 272, "solution"),
        Source("knoveleng/Minerva-Math", 272, "solution", ("train",)),
        Source("math-ai/minervamath", 272, "answer"),
        Source("zwhe99/simplerl-minerva-math", 272, "answer"),
    ),
    "olympiadbench": (  # the papers' files have 675 rows, the authors' own has one less
        Source("zwhe99/simplerl-OlympiadBench", 675, "final_answer"),
        Source("Hothan/OlympiadBench", 674, "final_answer", ("train",), ("OE_TO_maths_en_COMP",)),
        Source("math-ai/olympiadbench", 674, "final_answer"),
    ),
    TRAINING: (  # all of MATH; the questions of MATH-500 leave with the duplicates
        Source("EleutherAI/hendrycks_math", 12_500, "solution", ("train", "test"), tuple(SUBJECTS.split())),
        Source("DigitalLearningGmbH/MATH-lighteval", 12_500, "solution", ("train", "test")),
        Source("nlile/hendrycks-MATH-benchmark", 12_500, "solution", ("train", "test")),
    ),
}


class Unavailable(Exception):
    """A set that could not be made, and what to do about it."""


# The gold answer: one rule a set --------------------------------------------------------------------------------------
def last_box(solution: str) -> str:
    r"""MATH, MATH-500, Minerva: what stands in the solution's last box; "" if there is none.

    >>> last_box(r"Not $\boxed{3}$. So $x = \boxed{\frac{1}{2}}.$"), last_box(r"... which is $\boxed 5$.")
    ('\\frac{1}{2}', '5')
    """
    return grader.extract_answer(re.sub(r"\\boxed\s+([^{}$]+)\$", r"\\boxed{\1}$", solution)) or ""


def integer(answer: Any) -> str:
    """AIME writes 033, AMC 27.0.

    >>> integer("033"), integer(27.0)
    ('33', '27')
    """
    number = float(answer)
    if not number.is_integer():
        raise ValueError(f"the answer {answer!r} is not an integer")
    return str(int(number))


def all_answers(answer: str | Sequence[str]) -> str:
    """OlympiadBench: every answer of the list, each perhaps several itself; all are asked for.

    >>> all_answers(["$69$,$84$"]), all_answers([r"$x=2$", r"$x=-2$."])
    ('69,84', 'x=2, x=-2')
    """
    answers = [answer] if isinstance(answer, str) else answer
    return ", ".join(re.sub(r"(?<!\\)\$", "", a).strip().rstrip(".") for a in answers)


GOLD: dict[str, Callable[[Any], str]] = {"aime24": integer, "amc23": integer, "olympiadbench": all_answers}


def to_problem(name: str, source: Source, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A source's row as a line of data/<name>.jsonl. Raises ValueError where it is not as expected."""
    row = {column.lower(): value for column, value in row.items() if value is not None}
    question = next((c for c in COLUMNS["question"] if c in row), "question")
    missing = [column for column in (question, source.answer) if column not in row]
    if missing:
        raise ValueError(f"row {number} has no column {' and '.join(missing)}; it has {', '.join(row)}")
    given = last_box(row["solution"]) if source.answer == "solution" else row[source.answer]
    problem = {"id": f"{name}/{row.get('id', row.get('unique_id', number))}"}
    problem |= {"question": str(row[question]).strip(), "answer": GOLD.get(name, str)(given).strip()}
    if not problem["question"] or (not problem["answer"] and name != TRAINING):
        raise ValueError(f"row {number} has an empty question or answer")
    if level := re.search(r"\d", str(row.get("level", ""))):
        problem["level"] = int(level[0])
    if subject := row.get("subfield") or row.get("type") or row.get("subject"):
        problem["subject"] = subject
    unit = str(row.get("unit") or "").strip("$")
    if unit[:1].isalpha():  # so that 45 hours are not 45 minutes; % and degrees would let 0.042 and radians through
        problem["answer"] += rf" \text{{ {unit}}}"
    if row.get("error"):
        problem["tolerance"] = float(row["error"])
    return problem | {"source": source.name}


# Download -------------------------------------------------------------------------------------------------------------
def fetch(source: Source) -> list[dict[str, Any]]:
    """All rows of a source. Raises what `datasets` raises, and ValueError for another number of rows."""
    from datasets import load_dataset

    path = Path(HUB_MIRROR, source.name)
    if HUB_MIRROR and not path.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    # The cache of `datasets` takes two folders of one name for the same: a mirror's gets one that lives for this call.
    with tempfile.TemporaryDirectory() as own:
        name, cache = (str(path), own) if HUB_MIRROR else (source.name, None)
        parts = [
            load_dataset(name, config, split=split, cache_dir=cache)
            for config in source.configs
            for split in source.splits
        ]
        rows = [row for part in parts for row in part if source.url in str(row.get("url"))]
    if len(rows) != source.rows:
        raise ValueError(f"{len(rows)} rows where {source.rows} are expected")
    return rows


def bring(name: str) -> list[dict[str, Any]]:
    """Problems of a set from the first source that works. Raises Unavailable, or ConnectionError without network."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx  # the client that the hub's own code uses, httpx or httpx2

    reasons = ""
    for source in SOURCES[name]:
        try:
            problems = [to_problem(name, source, number, row) for number, row in enumerate(fetch(source))]
            if len({problem["id"] for problem in problems}) < len(problems):
                raise ValueError("ids repeat")
            print(f"{name}: {len(problems)} rows of {source.name}{reasons and ', instead of'}{reasons}")
            return problems
        except ConnectionError:
            raise
        except httpx.TransportError as error:  # what `datasets` lets through, such as a proxy that refuses
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        except (DatasetsError, OSError, ValueError, RuntimeError) as error:
            reasons += f"\n    {source.name}: {' '.join(str(error).split())[:300]}"
    raise Unavailable(f"no source worked{reasons}{cure(name)}")


def cure(name: str) -> str:
    """What to put where, by hand."""
    source, *others = SOURCES[name]
    parts = ", ".join(["split " + " and ".join(source.splits), *filter(None, source.configs)])
    return f"""
  Either, where there is a network (or another way; {parts}; columns {"/".join(COLUMNS["question"])}, {source.answer}),
    hf download {source.name} --repo-type dataset --local-dir mirror/{source.name}
  and HUB_MIRROR=mirror here. As good: {", ".join(other.name for other in others)}.
  Or write {Path(OUT, name)}.jsonl yourself, {source.rows} lines of {{"id", "question", "answer"}}."""


# Duplicates -----------------------------------------------------------------------------------------------------------
def near_duplicates(questions: Sequence[str], known: Sequence[str]) -> list[dict[int, bool]]:
    """For each question: position in `known` of each duplicate -> whether it is the same but for its dress.

    Candidates come from an inverted index, so that only pairs with a shingle in common are compared.

    >>> near_duplicates(["What is $2+2$?"], ["What is $2+3$?", r"What  is \\(2 + 2\\)?", "Name a prime."])
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


def clean(training: Sequence[dict], benchmarks: Sequence[dict]) -> tuple[list[dict], Counter]:
    """Training problems whose question is none of the benchmarks' nor of an earlier one -> them, and what was dropped.

    A question that only resembles an earlier training question is dropped if the answer is the same, too: "What is the
    smallest factor of 15?" and "... of 77?" are two problems. One that resembles a benchmark's is dropped in any case.
    """
    questions = [problem["question"] for problem in training]
    of_benchmarks = near_duplicates(questions, [problem["question"] for problem in benchmarks])
    of_training = near_duplicates(questions, questions)
    kept: dict[int, dict] = {}
    dropped: Counter = Counter()
    for position, problem in enumerate(training):
        hits = [(same, benchmarks[p]["id"].split("/")[0]) for p, same in of_benchmarks[position].items()]
        for p, same in of_training[position].items():
            if p in kept and (same or grader.is_equivalent(problem["answer"], kept[p]["answer"])):
                hits.append((same, TRAINING))
        if hits:
            same, where = max(hits)
            dropped[f"{'the same' if same else 'nearly'} as in {where}"] += 1
        else:
            kept[position] = problem
    return list(kept.values()), dropped


# Main -----------------------------------------------------------------------------------------------------------------
def checksum(problems: Sequence[dict]) -> str:
    """SHA-256 of the questions and answers, in order."""
    return hashlib.sha256(json.dumps([[p["question"], p["answer"]] for p in problems]).encode()).hexdigest()


def prepare(name: str) -> None:
    """Make OUT/<name>.jsonl, or check the one that is there. Raises SystemExit if that one is another."""
    path, record = Path(OUT, f"{name}.jsonl"), Path(OUT, CHECKSUMS)
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    made = {line["set"]: line for line in map(json.loads, lines)}
    there = path.is_file() and not FORCE
    if name == TRAINING:
        files = {other: Path(OUT, f"{other}.jsonl") for other in SOURCES if other != TRAINING}
        if missing := [other for other, file in files.items() if not file.is_file()]:
            raise Unavailable(f"needs {', '.join(missing)} first: their questions must not be trained on")
        benchmarks = {other: load_problems(file) for other, file in files.items()}
    if there:
        problems, rows = load_problems(path), {source.rows for source in SOURCES[name]}
        if name != TRAINING and len(problems) not in rows:
            raise SystemExit(f"{path}: {len(problems)} rows where {rows} are expected; complete it, or FORCE=1")
    elif name == TRAINING:
        levels = [p for p in bring(name) if LEVELS[0] <= p.get("level", 0) <= LEVELS[1]]
        problems = [p for p in levels if p["answer"]]
        print(f"{name}: {len(levels)} of levels {LEVELS[0]} to {LEVELS[1]}, {len(problems)} of them with an answer")
        problems, dropped = clean(problems, [p for each in benchmarks.values() for p in each])
        print("".join(f"{name}: dropped {count}, {why}\n" for why, count in sorted(dropped.items())), end="")
    else:
        problems = bring(name)
    sha256 = checksum(problems)
    now = {"set": name, "rows": len(problems), "sha256": sha256}
    if name == TRAINING:
        now |= {"LEVELS": list(LEVELS), "SHINGLE": SHINGLE, "NEAR": NEAR}
        now["cleaned of"] = {other: checksum(each) for other, each in benchmarks.items()}
    if there and name in made and now != made[name]:
        raise SystemExit(f"{path}: not as it was made; FORCE=1 makes it anew\n  then {made[name]}\n  now  {now}")
    if not there:
        write_atomically(path, "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in problems))
        made[name] = now
        write_atomically(record, "".join(json.dumps(line) + "\n" for line in made.values()))
    note = ("is there already" if name in made else "is there already, not made here") if there else "made"
    if made.get(TRAINING, {}).get("cleaned of", {}).get(name, sha256) != sha256:
        note += f"; {TRAINING} was cleaned of another {name}: SETS={TRAINING} FORCE=1"
    print(f"{path}: {len(problems)} problems, sha256 of questions and answers {sha256}, {note}", flush=True)


def main() -> None:
    override_constants(sys.argv[1:], {"prepare": sys.modules[__name__]})
    names = SETS.split(",")
    if unknown := set(names) - set(SOURCES):
        raise SystemExit(f"SETS: no set {', '.join(sorted(unknown))}; there are {', '.join(SOURCES)}")
    Path(OUT).mkdir(parents=True, exist_ok=True)
    failures = []
    for name in sorted(names, key=list(SOURCES).index):  # the training set last
        try:
            prepare(name)
        except Unavailable as error:
            failures.append(f"{name}: {error}")
        except ConnectionError as error:
            failures.append(f"{name}: the hub cannot be reached ({error}){cure(name)}")
            break  # the others would only wait for it as long
    if failures:
        raise SystemExit(
            "\n" + "\n".join(failures) + "\nWhat was made before is kept; a second call goes on from there."
        )


if __name__ == "__main__":
    main()
