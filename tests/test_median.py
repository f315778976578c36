"""The toy world: exact texts, a tokenizer that loses nothing, right answers, an ideal that can be checked by hand."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings

import pytest
import torch
from hypothesis import given as given_any
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import data.toy as toy
from rollout import SAY_MULTI, SAY_SINGLE, SAY_WRONG


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As everyone else gets it: saved and opened again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    toy.make_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "OUT", str(tmp_path_factory.mktemp("world") / "toy"))
        patch.setattr(toy, "WARM_STEPS", 5)
        patch.setattr(toy, "TRAIN_PROBLEMS", 300)
        patch.setattr(toy, "TEST_PROBLEMS", 60)
        toy.make_toy()
        yield toy.Path(toy.OUT)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Tokenizer ------------------------------------------------------------------------------------------------------------


@given_any(text=st.text() | st.text(alphabet=" 0123456789\\n?_{}\\boxedIt<|im_end|>.\u00a0\u0120é𝔘"))
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_unknown_text_falls_back_to_bytes(tokenizer):
    ids = tokenizer.encode("½", add_special_tokens=False)
    assert len(ids) == len("½".encode()) and max(ids) < 256
    assert tokenizer.unk_token_id is None


def test_numbers_and_phrases_are_single_tokens(tokenizer):
    for number in range(1, toy.LARGEST + 1):
        (token,) = tokenizer.encode(f" {number}", add_special_tokens=False)
        response = tokenizer.encode(toy.response_text(number), add_special_tokens=False)
        assert response[1] == token and len(response) == 4  # the same id in a box as in a list
    prompt = toy.prompt_text("What is the median of 12 4 _ 9 15 7 _ 11 6?", 5)
    assert len(tokenizer.encode(prompt, add_special_tokens=False)) < 30
    assert len(tokenizer.encode(toy.failure_text(12, 4), add_special_tokens=False)) < 16


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer.encode("<|im_start|><|im_end|><|endoftext|>", add_special_tokens=False)) == 3
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>"), skip_special_tokens=True) == "a"


def test_texts_are_the_papers_and_the_chat_template_gives_them(tokenizer):
    dialogue = toy.prompt_text("Q?", 5) + toy.failure_text(12, 4) + toy.response_text(9)
    assert dialogue == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}. You have 5 "
        "attempts to answer the questions, and you should provide the full reasoning steps in each attempt.<|im_end|>\n"
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\nIt is \\boxed{ 12}<|im_end|>\n"
        "<|im_start|>system\nYour answer is incorrect. You have 4 attempts left. Try an alternative.<|im_end|>\n"
        "<|im_start|>assistant\nIt is \\boxed{ 9}<|im_end|>"
    )
    messages = [
        {"role": "system", "content": SAY_MULTI.replace("{attempts}", "5")},
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "It is \\boxed{ 12}"},
        {"role": "system", "content": SAY_WRONG.replace("{attempts}", "4")},
    ]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat + toy.response_text(9) == dialogue
    single = [{"role": "system", "content": SAY_SINGLE}, {"role": "user", "content": "Q?"}]
    chat = tokenizer.apply_chat_template(single, tokenize=False, add_generation_prompt=True)
    assert chat == toy.prompt_text("Q?", None)


# Problems -------------------------------------------------------------------------------------------------------------


def test_answers_are_right():
    """Of 500 drawn lists: the readable numbers are distinct, fit one window, and the answer is a possible median."""
    for problem in toy.make_problems(500, 0, held_out=False):
        readable, unreadable = toy.shown_numbers(problem["question"])
        assert (len(set(readable)), unreadable) == (toy.LIST_LENGTH - toy.UNREADABLE, toy.UNREADABLE)
        assert max(readable) - min(readable) < toy.WINDOW and min(readable) >= 1 and max(readable) <= toy.LARGEST
        assert int(problem["answer"]) in toy.posterior(readable, unreadable)
    shown, answer = toy.draw_list(toy.random.Random(0), length=5, unreadable=0)
    assert answer == sorted(shown)[2]


def test_problem_sets_are_disjoint_and_decided_by_the_seed():
    train, test = toy.make_problems(400, 7, held_out=False), toy.make_problems(200, 7, held_out=True)
    assert not {p["question"] for p in train} & {p["question"] for p in test}
    assert len({p["question"] for p in train}) == 400 and len({p["id"] for p in train + test}) == 600
    assert train == toy.make_problems(400, 7, held_out=False)
    assert {p["question"] for p in test} != {p["question"] for p in toy.make_problems(200, 8, held_out=True)}


def test_the_warm_start_never_sees_a_held_out_question():
    rng = toy.random.Random(0)
    for _ in range(20):
        for row in toy.draw_batch(rng, seed=0, sharpness=1.0):
            question = row[0][0].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            assert not toy.is_held_out(question, seed=0)


def test_the_warm_start_trains_on_responses_that_are_worth_it(tokenizer):
    rng = toy.random.Random(0)
    for _ in range(20):
        rows = toy.draw_batch(rng, seed=0, sharpness=1.0)
        ids, actions, labels = toy.encode_batch(tokenizer, rows)
        assert labels.shape == (len(rows), len(actions))
        for row, row_labels, parts in zip(ids, labels, rows, strict=True):
            assert tokenizer.decode(row) == "".join(text for text, _ in parts)
            assert tokenizer.decode(row[actions]) == "".join(text for text, _ in parts[1::2])
            assert tokenizer.decode(row_labels[row_labels >= 0]) == "".join(text for text, trained in parts if trained)


def test_ideal_reader_by_hand():
    # Readable 7 and 24: only the window 7..24. The third number is one of 8..23, all equally likely: it is the median.
    assert toy.posterior([24, 7], 1) == pytest.approx(dict.fromkeys(range(8, 24), 1 / 16))
    # Readable 1 and 2: only the window 1..18, and the third number is above both.
    assert toy.posterior([1, 2], 1) == pytest.approx({2: 1.0})
    # Readable 2 and 4: windows 1..18 and 2..19, with 16 numbers left in each. The third number is 1 (in the first
    # window; the median is 2), or 3 (the median is 3), or larger than 4 (the median is 4: 14 and 15 numbers).
    assert toy.posterior([2, 4], 1) == pytest.approx({2: 1 / 32, 3: 2 / 32, 4: 29 / 32})
    assert toy.ideal_accuracy(["What is the median of 2 _ 4?"], 4) == pytest.approx([29 / 32, 31 / 32, 1, 1])
    assert toy.ideal_accuracy(["What is the median of 3 1 2?"], 2) == [1, 1]


def test_posterior_is_what_counting_gives():
    """Against full lists drawn at random: among those with the same readable numbers, how often each median occurs."""
    for seed in range(20):
        shown, _ = toy.draw_list(toy.random.Random(seed), toy.LIST_LENGTH, toy.UNREADABLE)
        readable = [number for number in shown if number is not None]
        counts, total = {}, 0
        for low in range(1, toy.LARGEST - toy.WINDOW + 2):
            window = set(range(low, low + toy.WINDOW))
            if window.issuperset(readable):
                for pair in toy.combinations(sorted(window.difference(readable)), toy.UNREADABLE):
                    median = sorted([*readable, *pair])[toy.LIST_LENGTH // 2]
                    counts[median] = counts.get(median, 0) + 1
                    total += 1
        expected = {median: count / total for median, count in counts.items()}
        assert toy.posterior(readable, toy.UNREADABLE) == pytest.approx(expected)


def test_ideal_reader_agrees_with_what_happens():
    """Naming the likeliest answers first on 4,000 problems is as often right as computed."""
    problems = toy.make_problems(4000, 1, held_out=True)
    expected = toy.ideal_accuracy((p["question"] for p in problems), 5)
    assert expected == pytest.approx([0.488, 0.727, 0.838, 0.909, 0.953], abs=0.01)
    for k in (1, 3, 5):
        right = 0
        for problem in problems:
            readable, unreadable = toy.shown_numbers(problem["question"])
            chances = toy.posterior(readable, unreadable)
            right += int(problem["answer"]) in sorted(chances, key=chances.get, reverse=True)[:k]
        assert right / len(problems) == pytest.approx(expected[k - 1], abs=0.03)  # about four standard errors


# What is made ---------------------------------------------------------------------------------------------------------


def test_the_folder_opens_in_transformers(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "warm_start")
    model = AutoModelForCausalLM.from_pretrained(world / "warm_start")
    assert model.config.model_type == "qwen2" and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer) and model.config.max_position_embeddings == 4096
    ids = tokenizer(toy.prompt_text("What is 1 + 1?", 2), return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 2
    assert len(read(world / "train.jsonl")) == 300 and len(read(world / "test.jsonl")) == 60
    assert set(read(world / "test.jsonl")[0]) == {"id", "question", "answer", "source"}


def test_a_second_call_keeps_what_is_there_and_other_settings_stop(world, monkeypatch, capsys):
    monkeypatch.setattr(toy, "OUT", str(world))
    for name, value in json.loads((world / "made.json").read_text())["settings"].items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            monkeypatch.setattr(toy, name, value)
    before = (world / "warm_start" / "model.safetensors").stat().st_mtime_ns
    toy.make_toy()
    assert "already" in capsys.readouterr().out
    assert (world / "warm_start" / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr(toy, "SEED", 1)
    with pytest.raises(SystemExit, match="SEED"):
        toy.make_toy()


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "OUT", str(tmp_path / "toy"))
    monkeypatch.setattr(toy, "TRAIN_PROBLEMS", 10)
    monkeypatch.setattr(toy, "TEST_PROBLEMS", 10)
    monkeypatch.setattr(toy, "warm_start", fail)
    with pytest.raises(KeyboardInterrupt):
        toy.make_toy()
    assert list(tmp_path.iterdir()) == []
