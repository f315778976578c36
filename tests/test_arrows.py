"""The world of arrows: exact texts, right answers, and authors who do what its constants say."""

import random

from experiments import arrows, warm

import pytest


def read_path(response: str) -> list[int]:
    """The numbers of a response, without the box."""
    return [int(number) for number in response.partition(" \\boxed")[0].replace("→", "").split()]


def test_tokens():
    tokenizer = arrows.make_tokenizer()
    for number in range(1, arrows.LARGEST + 1):
        assert [len(tokenizer.encode(f" {number}{after}")) for after in ("", "→")] == [1, 1]
    texts = [tokenizer.decode([token]) for token in tokenizer.encode(arrows.response_text([3, 12]))]
    assert texts == [" 3→", " 12", " \\boxed{", " 12", "}", "<|im_end|>"]
    assert len(tokenizer.encode(warm.prompt_text("Where do the arrows from 3 end? 5→ 8 3→ 12", None))) < 20


def test_questions_and_answers(monkeypatch):
    train, test = arrows.make_problems(400, 7, held_out=False), arrows.make_problems(200, 7, held_out=True)
    assert not {p["question"] for p in train} & {p["question"] for p in test}
    for problem in train:
        words = problem["question"].replace("?", "").split()
        at, table = words[5], dict(zip(words[7::2], words[8::2], strict=True))  # "Where do the arrows from 3 end"
        assert len(table) == sum(arrows.CHAINS)
        while f"{at}→" in table:
            at = table[f"{at}→"]
        assert at == problem["answer"] == str(arrows.read_question(problem["question"])[-1])
    lengths = [len(arrows.read_question(problem["question"])) - 1 for problem in train]
    assert set(lengths) == set(arrows.CHAINS) and sum(lengths) / 400 == pytest.approx(1.5, abs=0.1)  # 4 deviations
    questions = ["Where do the arrows from 3 end? 3→ 7 7→ 9", "Where do the arrows from 7 end? 3→ 7 7→ 9"]
    questions.append("Where do the arrows from 1 end? 3→ 4 2→ 3 1→ 2")
    assert arrows.ceilings(questions) == [1 / 3, 2 / 3]
    monkeypatch.setattr(arrows, "EAGER", 0.5)
    assert arrows.ceilings(questions) == [2 / 3, 1.0]


@pytest.mark.parametrize("eager", [0.0, 0.4])
def test_authors_do_what_the_constants_say_and_see_no_held_out_question(monkeypatch, eager):
    monkeypatch.setattr(arrows, "EAGER", eager)
    monkeypatch.setattr(arrows, "ROWS", 1)  # first answers of a batch are alike
    rng, first_looks, looks = random.Random(0), [], []
    for row in (row for _ in range(2500) for row in arrows.draw_dialogues(rng, 0, 0.6)):
        (prompt, _), (first, first_trained), (_, asked), (second, second_trained) = row
        question = prompt.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        assert first_trained and second_trained and not asked and not warm.is_held_out(question, 0)
        chain, path, last = arrows.read_question(question), read_path(first), read_path(second)
        assert path[:2] == chain[:2] and last[0] in path and first.startswith(f" {path[0]}→")
        first_looks.append((len(chain) > 2, len(path) > 2))
        if len(path) == 2:
            looks.append((len(chain) > 2, last[0] == path[1]))
            assert last in (path, chain[1:]) or len(chain) == 2
    for seen, share in ((first_looks, eager), (looks, 0.6)):
        where = {there: [looked for is_there, looked in seen if is_there == there] for there in (True, False)}
        assert sum(where[True]) / len(where[True]) == pytest.approx(share, abs=0.05)
        assert sum(where[False]) / len(where[False]) == pytest.approx(share * arrows.RASH, abs=0.05)
