"""data/prepare.py: each source in the hub's own layout, gold answers, duplicates, failures; and problem files."""

import csv
import hashlib
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import grader
from data import prepare
from data.prepare import PROGRAMS, SOURCES, TRAINING, drop_duplicates, find_duplicates
from data.problems import load_problems, question_key
from plumbing import sandbox
from plumbing.files import to_line
from tests.test_sandbox import MISSING

import pyarrow
import pyarrow.parquet
import pytest


# A hub in a folder ----------------------------------------------------------------------------------------------------
def put(hub: Path, source: prepare.Source, rows: list[dict]) -> None:
    """A source's rows, which its files have in turn."""
    parts = list(itertools.product(source.configs, source.splits))
    put_parts(hub, source.name, {part: rows[number :: len(parts)] for number, part in enumerate(parts)})


def put_parts(hub: Path, name: str, parts: dict[tuple[str | None, str], list[dict]]) -> None:
    """A dataset as the hub stores it: a Parquet file for each (configuration, split), and a README that names them."""
    files: dict[str, str] = defaultdict(str)
    (hub / name).mkdir(parents=True, exist_ok=True)
    for (config, split), rows in parts.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), hub / name / f"{config}-{split}.parquet")
        files[config or "default"] += f"  - split: {split}\n    path: {config}-{split}.parquet\n"
    head = "".join(f"- config_name: {config}\n  data_files:\n{its}" for config, its in files.items())
    (hub / name / "README.md").write_text(f"---\nconfigs:\n{head}---\n# A copy\n")


def boxed(answer: str) -> str:
    return f"First $x = 1$.\nSo it is $\\boxed{{{answer}}}.$"


def math_row(q: str, a: str) -> dict:
    return {"problem": q, "solution": boxed(a), "answer": "?", "subject": "Algebra", "level": 3, "unique_id": "test/1"}


def train_row(q: str, a: str) -> dict:
    return {"problem": q, "level": "Level 3", "type": "Algebra", "solution": boxed(a)}


def olympiad_row(q: str, a: str) -> dict:
    row = {"id": 1606, "question": q, "solution": ["s"], "final_answer": [a], "unit": None, "error": None}
    return row | {"subfield": "Algebra", "subject": "Math"}


# The columns of each source, for a question and the answer as that source writes it.
LAYOUTS = {
    "HuggingFaceH4/aime_2024": lambda q, a: {"id": 60, "problem": q, "solution": "\\boxed{99}", "answer": a, "url": ""},
    "Maxwell-Jia/AIME_2024": lambda q, a: {"ID": "2024-I-1", "Problem": q, "Solution": "Long", "Answer": int(a)},
    "math-ai/aime24": lambda q, a: {"id": 60, "problem": q, "solution": f"\\boxed{{{a}}}", "url": ""},
    "math-ai/amc23": lambda q, a: {"id": 0, "question": q, "answer": a, "url": "x/2023_AMC_12A_Problems"},
    "zwhe99/amc23": lambda q, a: {"id": 0, "question": q, "answer": float(a)},
    "HuggingFaceH4/MATH-500": math_row,
    "math-ai/math500": lambda q, a: {"problem": q, "answer": a, "level": 3, "unique_id": "test/1.json"},
    "svc-huggingface/minerva-math": lambda q, a: {"problem": q, "solution": boxed(a), "type": "Physics", "idx": 0},
    "math-ai/minervamath": lambda q, a: {"question": q, "answer": a},
    "zwhe99/simplerl-OlympiadBench": olympiad_row,
    "Hothan/OlympiadBench": olympiad_row,
    "EleutherAI/hendrycks_math": train_row,
    "DigitalLearningGmbH/MATH-lighteval": train_row,
}


def make_rows(source: prepare.Source, pairs: Iterable[tuple[str, str]]) -> list[dict]:
    """From questions and answers; those that have an id have different ones."""
    rows = [LAYOUTS[source.name](question, answer) for question, answer in pairs]
    return [row | {key: f"{row[key]}{i}" for key in ("id", "unique_id") if key in row} for i, row in enumerate(rows)]


@pytest.fixture
def hub(tmp_path, restored_constants) -> Path:
    """An empty hub, and constants that say so."""
    prepare.HUB_MIRROR, prepare.OUT = str(tmp_path / "hub"), str(tmp_path / "out")
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def expect_rows(change, rows: int, training: int = 14) -> None:
    """In every source of a benchmark, and of the training set."""
    count = dict.fromkeys(SOURCES, rows) | {TRAINING: training}
    change(prepare, SOURCES={n: tuple(s._replace(rows=count[n]) for s in sources) for n, sources in SOURCES.items()})


@pytest.mark.parametrize(("name", "source"), [(n, s) for n, sources in SOURCES.items() for s in sources])
def test_each_source_in_its_own_layout(hub, change, name, source):
    count = len(source.configs) * len(source.splits)
    expect_rows(change, count, count)
    put(hub, source, make_rows(source, [("  What is $6 \\cdot 7$?\n", "042" if name == "aime24" else "42")] * count))
    problems = prepare.load_set(name)
    found = [(p["question"], p["answer"], p["source"]) for p in problems]
    assert found == [("What is $6 \\cdot 7$?", "42", source.name)] * count
    assert all(p["id"].startswith(f"{name}/") and p.get("level", 3) == 3 for p in problems)


# The whole ------------------------------------------------------------------------------------------------------------
GOLDS = {  # as the first source writes it -> the gold
    "aime24": {"025": "25", "204": "204"},
    "amc23": {"27.0": "27", "3159": "3159"},
    "math500": {r"\left( 3, \frac{\pi}{2} \right)": r"\left( 3, \frac{\pi}{2} \right)", "p - q": "p - q"},
    "minerva_math": {"4.5e33": "4.5e33", "I(0) e^{-t}\n": "I(0) e^{-t}"},
    "olympiadbench": {"$69$,$84$": "69,84", r"$(-\infty, 0) \cup\{1\}$.": r"(-\infty, 0) \cup\{1\}"},
}
NAMES = ("apples of Ada", "pears of Bo", "plums of Cy", "nuts of Di", "figs of Ed", "dates of Flo", "limes of Gus")


def question(number: int) -> str:
    """Questions that share no three words."""
    return f"{NAMES[number % 7]}: how do {number} go with {number * number + 1}?"


def fill(hub: Path) -> None:
    """Every set's first source, two rows each; the training source has seven configurations of two splits."""
    for position, (name, golds) in enumerate(GOLDS.items()):
        source = SOURCES[name][0]
        put(hub, source, make_rows(source, ((question(10 * position + i), gold) for i, gold in enumerate(golds))))
    rows = [train_row(question(100 + i), str(i)) for i in range(14)]
    math500 = question(20).upper().replace("HOW", "$\\textbf{how}$").replace(":", " , ")
    rows[1] |= {"problem": math500}  # its first, typed differently
    rows[2] |= {"problem": question(40) + " Explain."}  # nearly olympiadbench's first
    rows[3] |= {"problem": question(100).replace(" ", "  ")}  # the same as the first here
    rows[4] |= {"level": "Level 2"}
    rows[5] |= {"level": "Level ?"}
    rows[6] |= {"solution": "By symmetry it is 6."}
    put(hub, SOURCES[TRAINING][0], rows)


def test_all_sets_are_made_and_checked_when_they_are_there(hub, call, change, capsys):
    fill(hub)
    expect_rows(change, 2)
    call(prepare)
    said, out = capsys.readouterr().out, Path(prepare.OUT)
    for name, golds in GOLDS.items():
        problems = load_problems(out / f"{name}.jsonl")
        assert [(p["answer"], p["source"]) for p in problems] == [(g, SOURCES[name][0].name) for g in golds.values()]
        pairs = [[p["question"], p["answer"]] for p in problems]
        assert hashlib.sha256(json.dumps(pairs).encode()).hexdigest() in said
    kept = load_problems(out / f"{TRAINING}.jsonl")
    assert [p["answer"] for p in kept] == ["0", "7", "8", "9", "10", "11", "12", "13"]
    assert "math_train: 12 of levels 3 to 5, 11 of them with an answer" in said
    for reason in ("the same as in math500", "nearly as in olympiadbench", "the same as in math_train"):
        assert f"dropped 1, {reason}" in said

    call(prepare, f"HUB_MIRROR={hub / 'gone'}")  # needs no hub
    assert capsys.readouterr().out.count("is there already") == 6
    file, source = out / "amc23.jsonl", SOURCES["amc23"][0]
    file.write_text(file.read_text().replace('"27"', '"72"'))
    with pytest.raises(SystemExit, match=r"amc23.jsonl: not as it was made; FORCE=1"):
        call(prepare, "SETS=aime24,amc23")
    put(hub, source, make_rows(source, [(question(100), "27"), (question(107), "27")]))
    call(prepare, "SETS=amc23", "FORCE=1", f"HUB_MIRROR={hub}")
    with pytest.raises(SystemExit, match=r"math_train.jsonl: not as it was made"):  # it was cleaned of the old amc23
        call(prepare, f"SETS={TRAINING}", "FORCE=0")
    call(prepare, f"SETS={TRAINING}", "FORCE=1")
    assert "dropped 3, the same as in amc23" in capsys.readouterr().out


def test_sources_are_tried_in_order_and_what_works_is_kept(hub, call, change, capsys):
    fill(hub)
    expect_rows(change, 2)
    first, second, last = SOURCES["aime24"]
    put(hub, first, [{"id": 1, "text": "q", "answer": "1"}] * 2)
    put(hub, second, make_rows(second, [("q", "1")] * 3))
    amc, other = [make_rows(source, [("q", "1"), ("r", "2")]) for source in SOURCES["amc23"][:2]]
    put(hub, SOURCES["amc23"][0], [amc[0], amc[1] | {"answer": "1.5"}])
    put(hub, SOURCES["amc23"][1], [other[0], other[1] | {"question": " "}])
    with pytest.raises(SystemExit) as stop:
        call(prepare)
    for part in (
        "HuggingFaceH4/aime_2024: no column 'question'",
        "Maxwell-Jia/AIME_2024: 3 rows where 2 are expected",
        f"math-ai/aime24: no folder {hub / 'math-ai/aime24'}",
        "math-ai/amc23: the answer '1.5' is not an integer",
        "zwhe99/amc23: row 1 has an empty question or answer",
        "hf download HuggingFaceH4/aime_2024 --repo-type dataset --local-dir mirror/HuggingFaceH4/aime_2024",
        f"write {Path(prepare.OUT) / 'aime24.jsonl'} yourself",
        "math_train: make aime24, amc23 first",
    ):
        assert part in str(stop.value)
    made = {path.name for path in Path(prepare.OUT).iterdir()}
    assert made == {*(f"{n}.jsonl" for n in GOLDS if n not in ("aime24", "amc23")), "checksums.jsonl"}
    # Good ones turn up: the rest is made, and it is said why the others were not taken.
    put(hub, SOURCES["amc23"][0], amc)
    put(hub, last, make_rows(last, [(question(0), "25"), (question(1), "25")]))
    call(prepare)
    said = capsys.readouterr().out
    assert (
        "2 rows of math-ai/aime24, instead of\n    HuggingFaceH4/aime_2024: no column" in said and "8 problems" in said
    )
    with pytest.raises(SystemExit, match="no set gsm8k; there are aime24, amc23"):
        call(prepare, "SETS=gsm8k")


# Programs -------------------------------------------------------------------------------------------------------------
THEMES = ("volume of a cone", "largest prime below n", "words that rhyme", "sorted tuples", "vowels in a line")


def mbpp_row(number: int) -> dict:
    text = f"Write a function to find the {THEMES[number % 5]} number {number} times {number * number}."
    tests = [f"assert f{number}({x}) == {x + number}" for x in (1, 2, 3)]
    row = {"task_id": number, "text": text, "code": f"def f{number}(x): return x + {number}", "test_list": tests}
    return row | {"test_setup_code": "", "challenge_test_list": [f"assert f{number}(9) == {9 + number}"]}


HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": 'import math\n\n\ndef above(x: int) -> int:\n    """ Give the volume of a cone number 603 times 363609.\n'
    '    >>> above(2)\n    3\n    >>> above(-1)\n    0\n    """\n',
    "entry_point": "above",
    "canonical_solution": "    return math.floor(x) + 1\n",
    "test": "def check(candidate):\n    assert candidate(5) == 6\n",
}


def test_programs_with_their_published_split(hub, call, capsys):
    """What the others ask is dropped from training, and counted."""
    rows = [mbpp_row(number) for number in range(1, 975)]
    rows[602 - 1]["text"] = rows[20 - 1]["text"]  # of the test split
    rows[603 - 1]["text"] = "Write a function to give the volume of a cone number 603 times 363609."  # HumanEval's
    splits = {"prompt": rows[:10], "test": rows[10:510], "validation": rows[510:600], "train": rows[600:]}
    put_parts(hub, prepare.MBPP, {("full", split): part for split, part in splits.items()})
    put(hub, PROGRAMS["humaneval"][0], [HUMANEVAL | {"task_id": f"HumanEval/{number}"} for number in range(164)])
    call(prepare, f"SETS={','.join(PROGRAMS)}")
    said = capsys.readouterr().out
    sets = {name: load_problems(Path(prepare.OUT) / f"{name}.jsonl") for name in PROGRAMS}
    ids = {name: sorted(int(p["id"].partition("/")[2]) for p in problems) for name, problems in sets.items()}
    assert ids == {
        "humaneval": list(range(164)),
        "mbpp_prompts": list(range(1, 11)),
        "mbpp_test": list(range(11, 511)),
        "mbpp_dev": list(range(511, 601)),
        "mbpp_train": [601, *range(604, 975)],
    }
    assert "mbpp_train: dropped 1, the same as in mbpp_test" in said and "dropped 1, the same as in humaneval" in said
    problem = next(p for p in sets["mbpp_train"] if p["id"] == "mbpp_train/601")
    assert problem["question"] == f"{rows[600]['text']}{prepare.SHOWN}assert f601(1) == 602"
    assert problem["tests"] == [*rows[600]["test_list"], *rows[600]["challenge_test_list"]] and problem["public"] == 1


def test_programs_from_the_source_to_the_verdict(monkeypatch):
    """Each source's own solution is right; the examples in a docstring are public tests, check() is private."""
    mbpp_source = prepare.PROGRAMS["mbpp_test"][0]
    mbpp = prepare.to_program("mbpp_test", mbpp_source, 0, mbpp_row(11))
    humaneval = prepare.to_program("humaneval", prepare.PROGRAMS["humaneval"][0], 0, HUMANEVAL)
    assert humaneval["tests"] == ["assert above(2) == 3", "assert above(-1) == 0", "check(above)"]
    assert (humaneval["public"], humaneval["id"], humaneval["given"]) == (2, "humaneval/7", "import math\n\n\n")
    if MISSING:
        monkeypatch.setattr(sandbox, "ISOLATION", "rlimits")
    solution = HUMANEVAL["prompt"].removeprefix("import math") + HUMANEVAL["canonical_solution"]
    by_heart = "def above(x): return {2: 3, -1: 0}[x]"  # the public tests
    for problem, program, status in (
        (mbpp, mbpp_row(11)["code"], "correct"),
        (humaneval, solution, "correct"),
        (humaneval, by_heart, "wrong"),
    ):
        assert grader.grade(f"```python\n{program}\n```", grader.read_gold(problem)).status == status, program
    with pytest.raises(KeyError, match="test_list"):
        prepare.to_program("mbpp_dev", PROGRAMS["mbpp_dev"][0], 3, {"task_id": 1, "text": "?"})


# Gold answers and the grader ------------------------------------------------------------------------------------------
MINERVA, OLYMPIAD = SOURCES["minerva_math"][0], SOURCES["olympiadbench"][0]


@pytest.mark.parametrize(
    ("source", "given", "right", "wrong"),
    [
        (MINERVA, {}, (r"4.5 \times 10^{33}", "4.5e33", r"4.5e33 \text{ erg/s}"), ("4.5e32", "4.6e33")),
        (MINERVA, {"solution": boxed("np.arcsin(10/13)")}, (r"\arcsin\frac{10}{13}",), (r"\arcsin\frac{13}{10}",)),
        (OLYMPIAD, {"final_answer": ["$69$,$84$"]}, ("84, 69", r"69 \text{ and } 84"), ("69", "84", "69, 84, 1")),
        (OLYMPIAD, {"final_answer": ["$x=2$", "$x=-2$"]}, ("-2, 2", r"\pm 2"), ("2",)),
        (OLYMPIAD, {"final_answer": ["45"], "unit": "minute"}, ("45", r"45 \text{ minutes}"), ("54", "45 hours")),
        (OLYMPIAD, {"final_answer": ["$a=9$,$b=8$"], "unit": r"^{\circ}"}, (r"9^\circ, 8^\circ", "a=9, b=8"), ("9",)),
        (OLYMPIAD, {"final_answer": ["4.2"], "error": "1e-1", "unit": "%"}, ("4.27", r"4.15\%"), ("4.35", "0.042")),
        (OLYMPIAD, {"final_answer": ["4.2"]}, ("4.2",), ("4.27",)),
    ],
)
def test_oddities_from_the_source_to_the_verdict(source, given, right, wrong):
    """As an attempt is graded: the answer in a box, against the problem's line and the tolerance in it."""
    name = "minerva_math" if source is MINERVA else "olympiadbench"
    problem = prepare.to_problem(name, source, 0, LAYOUTS[source.name]("q?", "4.5e33") | given)
    for answer in (*right, *wrong):
        verdict = grader.grade(f"It is \\boxed{{{answer}}}.", problem["answer"], problem.get("tolerance"))
        assert verdict.correct == (answer in right), answer


# Duplicates -----------------------------------------------------------------------------------------------------------
def test_question_key_sees_no_dress():
    text = r"Find all odd $x$, $y$ with $\frac{1}{23}(x^2+y) = 1, 2, \ldots, 10.5$, in that order."
    typed = r"""find all \text{odd} \(x\),\, \(y\) with
        \[\dfrac 1{23}\left(x^{2} + y\right) = 1,2, \cdots, 10.5\] in that  order"""
    assert question_key(typed) == question_key(text)
    others = [("+", "-"), ("23", "32"), ("{1}{23}", "{12}{3}"), ("10.5", "105"), ("(x^2+y)", "x^2+y"), ("odd", "even")]
    assert len({question_key(text.replace(a, b)) for a, b in others} - {question_key(text)}) == len(others)


def test_near_duplicates_against_all_pairs(change):
    """The index finds what comparing every pair finds."""
    rng = random.Random(1)
    questions = [" ".join(rng.choices("abcde", k=rng.randint(0, 9))) for _ in range(150)]
    change(prepare, SHINGLE=2, NEAR=0.5)

    def pairs(text: str) -> set[str]:
        return {text[i : i + 3] for i in range(0, len(text) - 2, 2)}

    for mine, found in zip(questions, find_duplicates(questions, questions), strict=True):
        a, expected = pairs(mine), {}
        for position, theirs in enumerate(questions):
            b = pairs(theirs)
            if mine == theirs or (a & b and len(a & b) / len(a | b) >= 0.5):
                expected[position] = mine == theirs
        assert found == expected
    # Where hardly a shingle is shared, the key finds the same question.
    assert find_duplicates(["Roots of $jx=k y$?"], ["Roots of $j x = ky$?", "Roots of $x=y$?"]) == [{0: True}]


def test_a_pattern_with_other_numbers_is_another_problem_in_training_but_not_beside_a_benchmark():
    triangle = "In an isosceles right triangle, the altitude to the hypotenuse has length ${}$. What is the area of it?"

    def problem(name: str, number: int, answer: str) -> dict:
        return {"id": f"math_train/{name}", "question": triangle.format(number), "answer": answer}

    training = [problem("a", 4, "16"), problem("b", 6, "36"), problem("c", 4, "16.0"), problem("d", 5, r"\frac{72}{2}")]
    kept, dropped = drop_duplicates(training, [])
    assert [p["id"] for p in kept] == ["math_train/a", "math_train/b"]  # d only resembles b, but has its answer
    assert dropped == {"the same as in math_train": 1, "nearly as in math_train": 1}
    kept, dropped = drop_duplicates(training, [problem("1", 7, "49") | {"id": "math500/1"}])
    assert kept == [] and dropped == {"nearly as in math500": 4}


# Problem files --------------------------------------------------------------------------------------------------------
ROWS = [
    {"Problem": "What is $\\frac{1}{2}$\nof 66, \"exactly\"?", "Answer": "033", "level": "5"},
    {"Problem": "Ünï?", "Answer": "½", "level": "1"},
]  # fmt: skip


def test_the_same_problems_from_each_format(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    with (tmp_path / "p.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    ids = {"jsonl": ["p/1", "p/3"], "parquet": ["p/1", "p/2"], "csv": ["p/3", "p/4"]}
    for suffix, names in ids.items():
        assert load_problems(tmp_path / f"p.{suffix}") == [
            {"id": name, "question": row["Problem"], "answer": row["Answer"], "level": row["level"]}
            for name, row in zip(names, ROWS, strict=True)
        ]


def test_numbers_and_tolerances(tmp_path):
    rows = [{"id": 7, "prompt": "q", "gold": 27.0}, {"question": "q", "prompt": [1], "answer": 0.5, "tolerance": 1e-2}]
    (tmp_path / "p.jsonl").write_text("".join(map(to_line, rows)))
    assert load_problems(tmp_path / "p.jsonl") == [
        {"id": "7", "question": "q", "answer": "27"},
        {"id": "p/2", "question": "q", "answer": "0.5", "tolerance": 0.01, "prompt": [1]},
    ]
    (tmp_path / "p.csv").write_text("question,answer,tolerance\na,1,0.1\nb,2,\n")
    first, second = load_problems(tmp_path / "p.csv")
    assert first["tolerance"] == 0.1 and "tolerance" not in second
    assert grader.grade("\\boxed{1.05}", first["answer"], first["tolerance"]).correct


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"question": "q", "answer": "1"}\n{"question', "p.jsonl, line 2: not JSONL"),
        ("p.jsonl", '{"id": "a", "question": "", "answer": 1}', 'id a: "question" must be a non-empty string, not'),
        ("p.jsonl", '{"question": "q", "answer": NaN}', 'id p/1: "answer" must be .*mend or drop it'),
        ("p.jsonl", '{"question": "q", "solution": "1"}', 'id p/1: "answer" .* there are solution'),
        ("p.jsonl", '{"question": "q", "answer": "1", "tolerance": "x"}', '"tolerance" must be a number'),
        ("p.jsonl", '{"id": "a", "question": "q", "answer": 1}\n' * 2, "line 2: id 'a' is there already"),
        ("p.jsonl", '{"question": "q", "tests": ["f()"], "public": 2}', '"public" must say how many of the 1 tests'),
        ("p.csv", "question,answer\nq,1\nq,1,2\n", "p.csv, line 3: must be .* a row as long as the header"),
        ("p.csv", 'question,answer\nq,1\n"q,1\n', "p.csv, line 3: not CSV"),
        ("p.parquet", "not Parquet", "p.parquet: not PARQUET"),
        ("p.txt", "q", "p.txt: a problem file ends in .jsonl"),
    ],
)
def test_bad_files_name_the_place_and_the_cure(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        load_problems(tmp_path / name)
