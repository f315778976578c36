"""The world of arrows: exact texts, right answers, and authors who do what its constants say."""

import random

from experiments import arrows, warm

import pytest


def test_tokens():
    tokenizer = arrows.make_tokenizer()
    texts = [tokenizer.decode([token]) for token in tokenizer.encode(arrows.response_text([3, 12]))]
    assert texts == [" 3→", " 12", " \\boxed{", " 12", "}", "<|im_end|>"]
    assert len(tokenizer.encode(warm.prompt_text("Where do the arrows from 3 end? 5→ 8 3→ 12", None))) < 20


def test_questions_and_answers():
    train, test = arrows.make_problems(400, 7, held_out=False), arrows.make_problems(200, 7, held_out=True)
    assert not {p["question"] for p in train} & {p["question"] for p in test}
    for problem in train:
        words = problem["question"].replace("?", "").split()  # "Where do the arrows from 3 end 5→ 8 ..."
        at, table = words[5], dict(zip(words[7::2], words[8::2], strict=True))
        assert len(table) == sum(arrows.CHAINS)
        while f"{at}→" in table:
            at = table[f"{at}→"]
        assert at == problem["answer"]
    assert arrows.ceilings(p["question"] for p in train) == [pytest.approx(0.5, abs=0.1), 1.0]  # four standard errors


@pytest.mark.parametrize("eager", [0.0, 0.4])
def test_authors_do_what_the_constants_say_and_see_no_held_out_question(monkeypatch, eager):
    monkeypatch.setattr(arrows, "EAGER", eager)
    monkeypatch.setattr(arrows, "ROWS", 1)  # first answers of a batch are alike
    rng, first_looks, looks = random.Random(0), [], []
    for (prompt, _), (first, _), _, (second, _) in (arrows.draw_dialogues(rng, 0, 0.6)[0] for _ in range(2500)):
        question = prompt.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        chain, one_arrow = arrows.read_question(question), first.count("→") == 1
        assert first.startswith(f" {chain[0]}→ {chain[1]}") and not warm.is_held_out(question, 0)
        first_looks.append((len(chain) > 2, not one_arrow))
        if one_arrow:
            looks.append((len(chain) > 2, second != first))
            assert len(chain) == 2 or second in (first, arrows.response_text(chain[1:]))
    for seen, share in ((first_looks, eager), (looks, 0.6)):
        for there, expected in ((True, share), (False, share * arrows.RASH)):
            looked = [look for is_there, look in seen if is_there == there]
            assert sum(looked) / len(looked) == pytest.approx(expected, abs=0.05)
