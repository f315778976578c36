"""The world of programs: its problems, programs in the real sandbox, what authors and readers do, the table."""

import random
from collections import Counter
from itertools import product

import evaluate
import grader
import rollout
from experiments import programs, told, warm
from experiments.programs import list_fitting, list_functions, read_test, write_program
from tests.test_rollout import Scripted
from tests.test_sandbox import isolated

import pytest


def test_questions_are_held_out_and_leave_several_functions():
    train, test = (programs.make_problems(150, 7, held_out) for held_out in (False, True))
    assert not {p["question"] for p in train} & {p["question"] for p in test}
    assert all(p["question"].split("\n")[1:] == p["tests"][: programs.SHOWN] for p in test)
    possible = [len(list_fitting(map(read_test, p["tests"][: programs.SHOWN]))) for p in test]
    assert 6 < sum(possible) / len(possible) < 16


@isolated
def test_a_program_that_has_learned_the_public_tests_by_heart_is_wrong():
    """And it is not told what it failed, a private test."""
    (problem,) = programs.make_problems(1, 7, held_out=True)
    lines = "".join(f"    if x == {x}: return {y}\n" for x, y in map(read_test, problem["tests"][: programs.PUBLIC]))
    verdict = grader.grade(f"```python\ndef f(x):\n{lines}```", grader.read_gold(problem))
    assert (verdict.status, verdict.told) == ("wrong", "") and verdict.failed.startswith(
        problem["tests"][programs.PUBLIC]
    )


@isolated
def test_a_dialogue_is_played_and_recorded_as_the_authors_write_it(change):
    """The prompt, a wrong program, what the environment tells of its failing test, and a right one."""
    change(rollout, TOLD_CHARACTERS=100)
    change(programs, STAND_BY=0.0)
    chat, rng = rollout.make_chat(programs.make_tokenizer()), random.Random(5)
    rows = [row for _ in range(20) if (row := programs.draw_row(rng, 0, programs.SHOWN, 1, told=True))]
    prompt, wrong, feedback, right = (text for text, _ in rows[0])
    question = prompt.partition("user\n")[2].partition("<|im_end|>")[0]
    tests = [line for line in f"{question}\n{feedback}".split("\n") if line.startswith("assert")]
    assert len(tests) == programs.SHOWN + 1  # the last is that which was told
    problem = {"id": "p", "question": question, "tests": tests, "public": len(tests)}
    dialogue = rollout.new_dialogue(chat, problem, int(prompt.partition("You have ")[2][0]))
    rollout.play(Scripted(chat, [[wrong, right]]), chat, [dialogue], [0], 1.0)
    assert chat.decode(dialogue.ids) == prompt + wrong + feedback + right
    first, second = evaluate.make_record(chat, dialogue, evaluate.Item("test", "p", 2, False, 0))["attempts"]
    assert (first["status"], second["status"]) == ("wrong", "correct") and "failed" not in second
    assert first["failed"].startswith(f"{tests[-1]}\nAssertionError") and first["failed"] in feedback
    assert f"{first['answer']}<|im_end|>" == wrong


@pytest.mark.parametrize("is_told", [False, True])
def test_authors_do_what_the_constants_say_and_see_no_held_out_question(is_told):
    """The last program, which alone is trained on, passes all that was told, or repeats the one before it."""
    rng, repeats, texts = random.Random(0), [], {write_program(values): values for values in list_functions()}
    for row in (row for _ in range(1000) if (row := programs.draw_row(rng, 0, programs.SHOWN, 2, is_told))):
        question = row[0][0].partition("user\n")[2].partition("<|im_end|>")[0]
        assert not warm.is_held_out(question, 0) and [trained for _, trained in row] == [False] * 5 + [True]
        lines = "\n".join(text for text, _ in row).replace("<|im_end|>", "").split("\n")
        tests = [line for line in lines if line.startswith("assert f")]
        assert len(tests) == programs.SHOWN + (2 if is_told else 0)
        *failed, last = (texts[text.removesuffix("<|im_end|>")] for text, _ in row[1::2])
        shown = list_fitting(map(read_test, tests[: programs.SHOWN]))
        assert {*failed, last} <= shown
        repeats.append(last == failed[1])
        assert repeats[-1] or (last in list_fitting(map(read_test, tests)) and last not in failed)
    assert sum(repeats) / len(repeats) == pytest.approx(programs.STAND_BY, abs=0.06)  # four standard errors


def test_the_careful_reader_is_as_good_as_when_he_is_played():
    rng = random.Random(0)
    for problem in programs.make_problems(3, 3, True):
        cases, solved = list(map(read_test, problem["tests"])), Counter()
        for is_told, _ in product((False, True), range(3000)):
            possible = list_fitting(cases[: programs.SHOWN])
            for attempt in range(1, 5):
                values = rng.choice(sorted(possible))
                failing = programs.find_failing(values, cases)
                if not failing:
                    solved.update((is_told, k) for k in range(attempt, 5))
                    break
                is_public = failing in cases[: programs.PUBLIC]
                possible = possible & list_fitting([failing]) if is_told and is_public else possible - {values}
        for is_told in (False, True):
            played = [solved[is_told, k] / 3000 for k in range(1, 5)]
            assert programs.careful_accuracy(problem, 4, is_told) == pytest.approx(played, abs=0.04)


def test_the_table_says_the_numbers():
    curve = {"accuracy": [0.1, 0.5, 0.7, 0.8, 0.9], "low": [0.05] * 5, "high": [0.95] * 5}
    readers = dict.fromkeys(told.READERS, curve["accuracy"])
    table = told.make_table({"rows": dict.fromkeys(told.ROWS, curve), "difference": curve, "readers": readers})
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in table.split("\n")}
    assert rows["RL, told"] == ["10.0 ±85.0", "50.0 ±45.0", "70.0 ±65.0", "80.0 ±75.0", "90.0 ±85.0"]
    assert rows["told minus incorrect alone (RL)"][0] == "+10.0 ±85.0"
    assert rows["careful reader, told"] == ["10.0", "50.0", "70.0", "80.0", "90.0"]
