"""The toy worlds, median.py and arrows.py: a tokenizer that loses nothing, right answers, an ideal that counting gives,
authors who do what the constants say, and a folder that is whole or not there."""

import random
from collections import Counter
from itertools import accumulate, combinations

from experiments import arrows, median, programs, warm

import pytest
from hypothesis import given
from hypothesis import strategies as st

TOKENIZERS = {world: world.make_tokenizer() for world in (median, arrows, programs)}


# Tokenizers -----------------------------------------------------------------------------------------------------------
@given(st.text() | st.text(alphabet=" 0123456789\\n?_{}\\boxedIt<|im_end|>.\u00a0\u0120é𝔘"))
def test_any_text_survives_a_round_trip(text):
    tokenizer = TOKENIZERS[median]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    ("world", "text", "tokens"),
    [
        (median, median.response_text(12), ["It is \\boxed{", " 12", "}", "<|im_end|>"]),
        (arrows, arrows.response_text([3, 12]), [" 3→", " 12", " \\boxed{", " 12", "}", "<|im_end|>"]),
        (
            programs,
            programs.response_text(tuple(3 * x % 5 for x in range(10))),
            ["```python\ndef f(x, m=", "5", "): return ", "(x * 3)", " % m\n```", "<|im_end|>"],
        ),
        (
            programs,
            programs.told_text((7, 1), 4),
            ["\nassert f(7) == 1", "\n", "AssertionError: the last call returned 4"],
        ),
    ],
)
def test_what_models_say_and_are_told_has_few_tokens(world, text, tokens):
    tokenizer = TOKENIZERS[world]
    assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == tokens
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token_id) == ("<|im_end|>", "<|endoftext|>", None)


# Problems -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [median, arrows])
def test_questions_are_the_seeds_and_those_of_the_test_are_held_out(world):
    train, test = world.make_problems(400, 7, held_out=False), world.make_problems(200, 7, held_out=True)
    assert [warm.is_held_out(p["question"], 7) for p in train + test] == [False] * 400 + [True] * 200
    assert len({p["question"] for p in train}) == 400 and len({p["id"] for p in train + test}) == 600
    assert train == world.make_problems(400, 7, held_out=False) != world.make_problems(400, 8, held_out=False)


def test_answers_at_the_ends_of_arrows():
    train = arrows.make_problems(400, 7, held_out=False)
    for problem in train:
        words = problem["question"].replace("?", "").split()  # "Where do the arrows from 3 end 5→ 8 ..."
        at, table = words[5], dict(zip(words[7::2], words[8::2], strict=True))
        assert len(table) == sum(arrows.CHAINS)
        while f"{at}→" in table:
            at = table[f"{at}→"]
        assert at == problem["answer"]
    assert arrows.ceilings(p["question"] for p in train) == [pytest.approx(0.5, abs=0.1), 1.0]  # four standard errors


def test_probabilities_of_medians_are_what_counting_gives():
    """Of all full lists that have the readable numbers in them, how many have each median. The ideal reader names the
    likeliest first."""
    for seed in range(20):
        shown, _ = median.draw_list(random.Random(seed), median.LIST_LENGTH, median.UNREADABLE)
        readable = [number for number in shown if number is not None]
        counts: Counter[int] = Counter()
        for low in range(1, median.LARGEST - median.WINDOW + 2):
            window = set(range(low, low + median.WINDOW))
            if window.issuperset(readable):
                for pair in combinations(window.difference(readable), median.UNREADABLE):
                    counts[sorted([*readable, *pair])[median.LIST_LENGTH // 2]] += 1
        expected = {answer: count / counts.total() for answer, count in counts.items()}
        assert median.median_probabilities(readable, median.UNREADABLE) == pytest.approx(expected)
        solved = list(accumulate(sorted(expected.values(), reverse=True)))[:5]
        assert median.ideal_accuracy([median.write_question(shown)], 5)[: len(solved)] == pytest.approx(solved)


# The warm start -------------------------------------------------------------------------------------------------------
def test_the_warm_start_trains_on_responses_and_never_on_a_held_out_question():
    tokenizer, rng = TOKENIZERS[median], random.Random(0)
    for _ in range(20):
        rows = median.draw_batch(0, rng, median.WARM_STEPS)
        ids, actions, labels = warm.encode_batch(tokenizer, rows)
        for row, row_labels, parts in zip(ids, labels, rows, strict=True):
            question = parts[0][0].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            assert not warm.is_held_out(question, seed=0)
            assert tokenizer.decode(row) == "".join(text for text, _ in parts)
            assert tokenizer.decode(row[actions]) == "".join(text for text, _ in parts[1::2])
            assert tokenizer.decode(row_labels[row_labels >= 0]) == "".join(text for text, trained in parts if trained)


@pytest.mark.parametrize("eager", [0.0, 0.4])
def test_authors_of_arrows_do_what_the_constants_say(change, eager):
    change(arrows, EAGER=eager, ROWS=1)  # first answers of a batch are alike
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


# The folder -----------------------------------------------------------------------------------------------------------
def test_a_folder_is_made_once_or_not_at_all(tmp_path, change, capsys):
    def stop(*_) -> None:
        raise KeyboardInterrupt

    train = warm.train_warm_start
    change(warm, TRAIN_PROBLEMS=10, TEST_PROBLEMS=10, train_warm_start=stop)
    change(programs, OUT=str(tmp_path / "toy"), WARM_STEPS=1)
    with pytest.raises(KeyboardInterrupt):
        warm.make_world(programs)
    assert list(tmp_path.iterdir()) == []
    change(warm, train_warm_start=train)
    warm.make_world(programs)
    change(warm, train_warm_start=stop)
    warm.make_world(programs)
    assert "is there already" in capsys.readouterr().out
    change(warm, SEED=1)
    with pytest.raises(SystemExit, match="made with other SEED"):
        warm.make_world(programs)
