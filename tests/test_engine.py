"""plumbing/engine.py on the real engine: it samples what transformers computes, before and after weights are replaced,
and nothing but the program decides how; rollout.py's command. plumbing/chat.py with other models' chat templates."""

import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import ANY, Mock, call

import rollout
from data.problems import load_problems
from experiments import median
from plumbing import engine as engine_module
from plumbing.chat import Chat
from plumbing.engine import Engine
from rollout import Dialogue
from tests.conftest import ROOT, run_python

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TOKENS = len(median.make_tokenizer())  # of all models here, one of which has more rows


def load_lm(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def play(engine: Engine, problems: list, attempts: int, seeds: Iterable[int], temperature: float = 1.0):
    """A dialogue for each problem, in this order."""
    chat = Chat(engine.tokenizer)
    dialogues = [rollout.new_dialogue(chat, problem, attempts) for problem in problems]
    return rollout.play(engine, chat, dialogues, list(seeds), temperature)


def change_weights(lm: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in lm.parameters():
        parameter *= 1 + 0.2 * torch.randn_like(parameter)


def compare_with(lm: nn.Module, dialogues: list[Dialogue]) -> tuple[float, bool]:
    """The largest difference between the sampler's log-probability of an action and that of transformers; and whether
    every action was the likeliest one."""
    gaps, greedy = [], True
    for d in dialogues:
        logprobs = lm(torch.tensor([d.ids])).logits[0, :, :TOKENS].log_softmax(-1)  # (T, V)
        for t in (t for t in range(len(d.ids)) if d.mask[t]):
            gaps.append(abs(logprobs[t - 1, d.ids[t]].item() - d.logprobs[t]))
            greedy &= logprobs[t - 1].argmax().item() == d.ids[t]
    return max(gaps), greedy


@pytest.fixture(scope="module")
def lm(toy) -> nn.Module:
    return load_lm(toy / "warm_start")


@pytest.fixture
def problems(toy) -> list[dict]:
    return load_problems(toy / "test.jsonl")[:12]


@pytest.fixture
def restored(engine, lm):
    """For tests that load other weights into the engine, or none."""
    yield
    engine.load_weights(lm.named_parameters())


# What is sampled ------------------------------------------------------------------------------------------------------
def test_actions_have_the_trainers_logprobs(engine, lm, problems):
    """Also those of retries, whose history comes from the engine's cache; greedy actions are the likeliest ones."""
    sampled, greedy = play(engine, problems, 4, range(12)), play(engine, problems, 2, range(12), temperature=0.0)
    assert sum(len(d.attempts) for d in sampled) > 12
    for dialogues, expected in ((sampled, False), (greedy, True)):
        gap, were_likeliest = compare_with(lm, dialogues)
        assert gap < 1e-4 and were_likeliest == expected


def test_an_attempt_ends_with_a_stop_id_or_a_limit(engine, problems):
    """Any id may be what ends a turn: base models have one that none of their files calls an end."""
    prompt = rollout.encode_prompt(Chat(engine.tokenizer), problems[0]["question"], 1)

    def sample(max_tokens: int, stop_id: int) -> tuple[list[int], bool]:
        engine.submit(7, prompt, max_tokens, 1.0, 3, stop_id)
        while not (samples := engine.step()):
            pass
        return samples[0].ids, samples[0].stopped

    ids, stopped = sample(50, engine.tokenizer.pad_token_id)
    assert stopped and ids[-1] == engine.tokenizer.eos_token_id and len(ids) > 2  # the model's own end
    assert sample(50, ids[1]) == (ids[: ids.index(ids[1]) + 1], True)
    assert sample(len(ids) - 1, ids[-1]) == (ids[:-1], False)


# Replacing the weights ------------------------------------------------------------------------------------------------
def test_new_weights_are_what_it_samples_from(engine, toy, problems, restored):
    """Tied embeddings. The prompts are long enough to be cached, and what was cached under old weights is not used."""
    long = [p | {"question": "1 2 3 " * 100 + p["question"]} for p in problems[:4]]
    changed = load_lm(toy / "warm_start")
    assert changed.lm_head.weight is changed.model.embed_tokens.weight
    play(engine, long, 1, range(4))
    for seed in range(2):
        change_weights(changed, seed)
        assert compare_with(changed, play(engine, long, 1, range(4)))[0] > 0.1
        engine.load_weights(changed.named_parameters())
        assert compare_with(changed, play(engine, long, 1, range(4)))[0] < 1e-4


def test_a_transfer_that_fails_says_why(engine, lm, problems, restored):
    weights, norm = dict(lm.named_parameters()), "model.norm.weight"
    for lost in (norm, "model.embed_tokens.weight"):
        with pytest.raises(RuntimeError, match=rf"did not reach the engine, or are not finite: .*{lost}"):
            engine.load_weights((name, w) for name, w in weights.items() if name != lost)
    with pytest.raises(RuntimeError, match=rf"are not finite: {norm}$"):
        engine.load_weights((weights | {norm: weights[norm] * float("nan")}).items())
    prompt = rollout.encode_prompt(Chat(engine.tokenizer), problems[0]["question"] * 20, 1)
    engine.submit(0, prompt, 50, 1.0, 0, engine.tokenizer.eos_token_id)
    engine.step()
    with pytest.raises(RuntimeError, match="kept its prefix cache: attempts were running"):
        engine.load_weights(weights.items())
    while engine.busy:
        engine.step()


def test_the_order_of_a_transfer_on_a_gpu():
    """What vLLM is asked for there, where engines sleep: its weights have to be awake to be filled, and what was cached
    under the old ones is dropped before the cache may be used."""
    engine, llm = Engine.__new__(Engine), Mock(**{"apply_model.return_value": [[]]})
    engine.cuda, engine.sleeps, engine.llm = True, True, llm
    engine.sleep()
    engine.load_weights([("w", 1)])
    fill, repack, find = (getattr(engine_module, n) for n in ("fill_with_nan", "repack_tied_head", "find_nan"))
    load = call.collective_rpc("reload_weights", kwargs={"weights_iterator": ANY})
    load = [call.apply_model(fill), load, call.apply_model(repack), call.apply_model(find), call.reset_prefix_cache()]
    asleep, awake = [call.sleep(level=2), call.wake_up(tags=["weights"])], [call.wake_up(tags=["kv_cache"])]
    assert llm.method_calls == [*asleep, *load, *awake]


def test_dialogues_depend_on_their_seeds_alone(engine, toy, problems):
    """Not on the order of the queue or what else is in it: here they are among more prompts than one forward pass
    takes, there alone and in reverse order."""
    others = load_problems(toy / "train.jsonl") * 2
    among = play(engine, [*others, *problems], 3, [*range(1000, 1000 + len(others)), *range(12)])
    assert sum(d.attempts[0].start for d in among) > 8192 and all(d.attempts for d in among)
    alone = play(engine, problems[::-1], 3, reversed(range(12)))
    assert [d.ids for d in among[-12:]] == [d.ids for d in alone[::-1]]
    assert [d.ids for d in among[-12:]] != [d.ids for d in play(engine, problems, 3, range(1, 13))]


def test_the_command_plays_and_shows(toy, engine, monkeypatch, capsys):
    """`python rollout.py`, on the engine that is there."""
    arguments = [f"MODEL={toy / 'warm_start'}", f"PROBLEMS={toy / 'test.jsonl'}", "DIALOGUES=3", "MAX_ATTEMPTS=2"]
    monkeypatch.setattr(sys, "argv", ["rollout.py", *arguments, "MIN_ATTEMPTS=2", "MAX_ATTEMPT_TOKENS=16"])
    monkeypatch.setattr("plumbing.engine.Engine", lambda *_, **options: engine)
    monkeypatch.setattr(engine, "shutdown", lambda: None)
    runpy.run_path(str(ROOT / "rollout.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "rollout.MAX_ATTEMPTS = 2 (command line; the file says 5)" in said
    for problem in load_problems(toy / "test.jsonl")[:3]:
        assert problem["question"] in said and f"gold {problem['answer']}, reward" in said
    assert said.count("[attempt 1: ") == 3 and 0 < said.count("[attempt 2: ") == said.count("1 attempts left")


# An unusual model, in a process of its own ----------------------------------------------------------------------------
def save_unusual_model(toy: Path, folder: Path) -> None:
    """It has a head of its own; rows of a padded vocabulary that are likelier than any token; and a generation_config
    that wants to be greedy and names another end id."""
    tokenizer, lm = median.make_tokenizer(), load_lm(toy / "warm_start")
    lm.resize_token_embeddings(TOKENS + 2000, mean_resizing=False)
    lm.config.tie_word_embeddings = False
    lm.lm_head.weight = nn.Parameter(lm.lm_head.weight * 1.5, requires_grad=False)
    prompt = rollout.encode_prompt(Chat(tokenizer), load_problems(toy / "test.jsonl")[0]["question"], 1)
    state = lm.model(torch.tensor([prompt])).last_hidden_state[0, -1]
    lm.lm_head.weight[TOKENS:] = 60 * state / state.norm() ** 2
    assert lm(torch.tensor([prompt])).logits[0, -1].argmax() >= TOKENS
    lm.generation_config.update(eos_token_id=tokenizer.pad_token_id, temperature=0.01, top_k=1, do_sample=True)
    for part in (lm, tokenizer):
        part.save_pretrained(folder)


def check_unusual_model(toy: Path, folder: Path) -> None:
    """No padded row is sampled, nothing is greedy, each end id that a file names ends an attempt, the head gets its new
    weights, too; and to start an engine leaves the trainer's random numbers alone."""
    problem, random_state = load_problems(toy / "test.jsonl")[0], torch.get_rng_state()
    engine, lm = Engine(str(folder), rollout.CONTEXT), load_lm(folder)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert engine.stop_ids == set(engine.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    for _ in range(2):
        dialogues = play(engine, [problem] * 40, 1, range(40))
        assert max(token for d in dialogues for token in d.ids) < TOKENS
        gap, were_likeliest = compare_with(lm, dialogues)
        assert gap < 1e-4 and not were_likeliest
        change_weights(lm, 0)
        engine.load_weights(lm.named_parameters())
    engine.shutdown()


def test_the_program_decides_how_to_sample_not_the_models_files(toy, tmp_path):
    save_unusual_model(toy, tmp_path)
    program = "import pathlib, sys, tests.test_engine as t; t.check_unusual_model(*map(pathlib.Path, sys.argv[1:]))"
    run_python("-c", program, toy, tmp_path)


# Chat templates of other models ---------------------------------------------------------------------------------------
LLAMA = (
    "<|endoftext|>{% for m in messages %}<|im_start|>{{ m.role }}:\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:\n\n{% endif %}"
)
GEMMA = (  # no system turns
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
TO_THE_FRONT = (  # system turns are collected before the first question
    "{% for m in messages if m.role == 'system' %}{{ m.content }}\n{% endfor %}"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
)


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """The toy's, whose end id is not the one with which a turn ends, as in base models."""
    tokenizer = median.make_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template, tokenizer.name_or_path = "<|endoftext|>", template, "this model"
    return tokenizer


@pytest.mark.parametrize(("template", "system_turns"), [(LLAMA, True), (LLAMA, False), (GEMMA, False)])
def test_turns_read_as_the_template_renders_the_whole(template, system_turns):
    tokenizer = make_tokenizer(template)
    chat = Chat(tokenizer, system_turns)
    assert chat.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id
    answer = [*chat.encode("It is \\boxed{3}"), chat.end_of_turn]
    ids = [*chat.prompt("Do it.", "1 + 1?"), *answer, *chat.reply("system", "Wrong.")]
    turns = [("system", "Do it."), ("user", "1 + 1?"), ("assistant", "It is \\boxed{3}"), ("system", "Wrong.")]
    if not system_turns:
        turns = [("user", "Do it.\n\n1 + 1?"), turns[2], ("user", "Wrong.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert chat.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "its tokenizer has no chat template; take a model that has one"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "its .* ends an answer without a token of its own"),
        (GEMMA, "its chat template refuses: System role not supported; SYSTEM_TURNS=0 does without system turns"),
        (TO_THE_FRONT, "its chat template drops what is said after an answer; SYSTEM_TURNS=0 says it in a user turn"),
    ],
)
def test_templates_that_cannot_say_it_are_refused_with_their_cure(change, template, message):
    with pytest.raises(SystemExit, match=f"^this model: {message}$"):
        rollout.make_chat(make_tokenizer(template))
    if "SYSTEM_TURNS=0" in message:
        change(rollout, SYSTEM_TURNS=False)
        chat = rollout.make_chat(make_tokenizer(template))
        assert rollout.SAY_WRONG[:20] in chat.decode(rollout.encode_feedback(chat, 2))


# What is said of a GPU ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("available", "rank", "capability", "message"),
    [
        (False, 0, (9, 0), "an NVIDIA driver of 580 or newer"),
        (True, 1, (9, 0), "process 1 of this node has no GPU; 1 visible"),
        (True, 0, (7, 5), "Tesla T4 is too old for bfloat16: Ampere or newer"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_said_in_one_line(change, monkeypatch, available, rank, capability, message):
    change(torch.version, cuda="13.0")
    assert not engine_module.find_gpu()  # the packages for CPUs, whatever torch and the machine can do
    change(engine_module, FOR_CPU=False)
    change(torch.cuda, is_available=lambda: available, device_count=lambda: 1)
    change(torch.cuda, get_device_capability=lambda _: capability, get_device_name=lambda _: "Tesla T4")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(SystemExit, match=message):
        engine_module.find_gpu("bfloat16")
