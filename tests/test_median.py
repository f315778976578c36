"""The toy world: exact texts, a tokenizer that loses nothing, right answers, an ideal that can be checked by hand."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it brings

from experiments import median, warm
from plumbing.files import read_jsonl
from rollout import SAY_MULTI, SAY_SINGLE, SAY_WRONG

import pytest
import torch
from hypothesis import given as given_any
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As the stages get it: saved and opened again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    median.make_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


# Tokenizer ------------------------------------------------------------------------------------------------------------
@given_any(text=st.text() | st.text(alphabet=" 0123456789\\n?_{}\\boxedIt<|im_end|>.\u00a0\u0120é𝔘"))
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokens(tokenizer):
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for number in range(1, median.LARGEST + 1):
        (token,) = encode(f" {number}")
        response = encode(median.response_text(number))
        assert response[1] == token and len(response) == 4  # the same id in a box as in a list
    assert len(encode(warm.prompt_text("What is the median of 12 4 _ 9 15 7 _ 11 6?", 5))) < 30
    assert len(encode(median.response_text(12) + warm.feedback_text(4))) < 16
    assert len(encode("½")) == len("½".encode()) and max(encode("½")) < 256  # what is unknown becomes bytes
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token_id) == ("<|im_end|>", "<|endoftext|>", None)
    assert len(encode("<|im_start|><|im_end|><|endoftext|>")) == 3
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>"), skip_special_tokens=True) == "a"


def test_texts_are_the_papers_and_the_chat_template_gives_them(tokenizer):
    dialogue = warm.prompt_text("Q?", 5) + median.response_text(12) + warm.feedback_text(4)
    assert dialogue == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}. You have 5 "
        "attempts to answer the questions, and you should provide the full reasoning steps in each attempt.<|im_end|>\n"
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\nIt is \\boxed{ 12}<|im_end|>\n"
        "<|im_start|>system\nYour answer is incorrect. You have 4 attempts left. Try an alternative.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    messages = [
        {"role": "system", "content": SAY_MULTI.replace("{attempts}", "5")},
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "It is \\boxed{ 12}"},
        {"role": "system", "content": SAY_WRONG.replace("{attempts}", "4")},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == dialogue
    single = [{"role": "system", "content": SAY_SINGLE}, {"role": "user", "content": "Q?"}]
    chat = tokenizer.apply_chat_template(single, tokenize=False, add_generation_prompt=True)
    assert chat == warm.prompt_text("Q?", None)


# Problems -------------------------------------------------------------------------------------------------------------
def test_questions_and_answers():
    train, test = median.make_problems(400, 7, held_out=False), median.make_problems(200, 7, held_out=True)
    for problem in train:
        readable, unreadable = median.read_question(problem["question"])
        assert (len(set(readable)), unreadable) == (median.LIST_LENGTH - median.UNREADABLE, median.UNREADABLE)
        assert max(readable) - min(readable) < median.WINDOW
        assert min(readable) >= 1 and max(readable) <= median.LARGEST
        assert int(problem["answer"]) in median.median_probabilities(readable, unreadable)
    shown, answer = median.draw_list(median.random.Random(0), length=5, unreadable=0)
    assert answer == sorted(shown)[2]
    # Disjoint, and decided by the seed.
    assert not {p["question"] for p in train} & {p["question"] for p in test}
    assert len({p["question"] for p in train}) == 400 and len({p["id"] for p in train + test}) == 600
    assert train == median.make_problems(400, 7, held_out=False)
    assert {p["question"] for p in test} != {p["question"] for p in median.make_problems(200, 8, held_out=True)}


def test_the_warm_start_trains_on_responses_and_never_on_a_held_out_question(tokenizer):
    rng = median.random.Random(0)
    for _ in range(20):
        rows = median.draw_dialogues(rng, seed=0, sharpness=1.0)
        ids, actions, labels = warm.encode_batch(tokenizer, rows)
        assert labels.shape == (len(rows), len(actions))
        for row, row_labels, parts in zip(ids, labels, rows, strict=True):
            question = parts[0][0].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            assert not warm.is_held_out(question, seed=0)
            assert tokenizer.decode(row) == "".join(text for text, _ in parts)
            assert tokenizer.decode(row[actions]) == "".join(text for text, _ in parts[1::2])
            assert tokenizer.decode(row_labels[row_labels >= 0]) == "".join(text for text, trained in parts if trained)


@pytest.mark.parametrize(
    ("readable", "expected"),
    [
        # Only the window 7..24. The third number is one of 8..23, all equally likely: it is the median.
        ([24, 7], dict.fromkeys(range(8, 24), 1 / 16)),
        # Windows 1..18 and 2..19, with 16 numbers left in each. The third number is 1 (in the first window; the median
        # is 2), or 3 (the median is 3), or larger than 4 (the median is 4: 14 and 15 numbers).
        ([2, 4], {2: 1 / 32, 3: 2 / 32, 4: 29 / 32}),
    ],
)
def test_probabilities_by_hand(readable, expected):
    assert median.median_probabilities(readable, 1) == pytest.approx(expected)


def test_probabilities_are_what_counting_gives():
    """Of all full lists that have the readable numbers in them, how many have each median."""
    for seed in range(20):
        shown, _ = median.draw_list(median.random.Random(seed), median.LIST_LENGTH, median.UNREADABLE)
        readable = [number for number in shown if number is not None]
        counts = {}
        for low in range(1, median.LARGEST - median.WINDOW + 2):
            window = set(range(low, low + median.WINDOW))
            if window.issuperset(readable):
                for pair in median.combinations(sorted(window.difference(readable)), median.UNREADABLE):
                    answer = sorted([*readable, *pair])[median.LIST_LENGTH // 2]
                    counts[answer] = counts.get(answer, 0) + 1
        expected = {answer: count / sum(counts.values()) for answer, count in counts.items()}
        assert median.median_probabilities(readable, median.UNREADABLE) == pytest.approx(expected)


def test_the_ideal_reader_is_as_often_right_as_computed():
    problems = median.make_problems(4000, 1, held_out=True)
    expected = median.ideal_accuracy((p["question"] for p in problems), 5)
    assert expected == pytest.approx([0.488, 0.727, 0.838, 0.909, 0.953], abs=0.01)
    for k in (1, 3, 5):
        right = 0
        for problem in problems:
            probabilities = median.median_probabilities(*median.read_question(problem["question"]))
            right += int(problem["answer"]) in sorted(probabilities, key=probabilities.get, reverse=True)[:k]
        assert right / len(problems) == pytest.approx(expected[k - 1], abs=0.03)  # about four standard errors
    assert median.ideal_accuracy(["What is the median of 2 _ 4?"], 4) == pytest.approx([29 / 32, 31 / 32, 1, 1])


# The folder -----------------------------------------------------------------------------------------------------------
def test_the_folder_opens_in_transformers(toy):
    tokenizer = AutoTokenizer.from_pretrained(toy / "warm_start")
    model = AutoModelForCausalLM.from_pretrained(toy / "warm_start")
    assert model.config.model_type == "qwen2" and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer) and model.config.max_position_embeddings == 4096
    test = read_jsonl(toy / "test.jsonl")
    assert len(read_jsonl(toy / "train.jsonl")) == 300 and len(test) == 40
    assert set(test[0]) == {"id", "question", "answer", "source"}
    # The accuracy that was written down is what greedy answers have.
    ids = tokenizer([warm.prompt_text(p["question"], 1) for p in test], return_tensors="pt")
    said = tokenizer.batch_decode(model.generate(**ids, max_new_tokens=4, do_sample=False)[:, -4:])
    right = sum(text == median.response_text(p["answer"]) for text, p in zip(said, test, strict=True))
    assert json.loads((toy / "made.json").read_text())["warm_start_accuracy"] == pytest.approx(right / 40)


def test_a_second_call_keeps_what_is_there_and_other_settings_stop(toy, monkeypatch, capsys):
    monkeypatch.setattr(median, "OUT", str(toy))
    monkeypatch.setattr(median, "WARM_STEPS", 150)
    for name, value in (("TRAIN_PROBLEMS", 300), ("TEST_PROBLEMS", 40)):
        monkeypatch.setattr(warm, name, value)
    before = (toy / "warm_start" / "model.safetensors").stat().st_mtime_ns
    warm.make_world(median)
    assert "already" in capsys.readouterr().out
    assert (toy / "warm_start" / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr(warm, "SEED", 1)
    with pytest.raises(SystemExit, match="made with other SEED"):
        warm.make_world(median)


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(median, "OUT", str(tmp_path / "toy"))
    for name in ("TRAIN_PROBLEMS", "TEST_PROBLEMS"):
        monkeypatch.setattr(warm, name, 10)
    monkeypatch.setattr(median, "train_warm_start", fail)
    with pytest.raises(KeyboardInterrupt):
        warm.make_world(median)
    assert list(tmp_path.iterdir()) == []
