"""Whole runs of ppo.py: killed and resumed, on a full disk; what they leave and what they refuse."""

import math
import resource
import signal
from pathlib import Path

import ppo
from plumbing import checkpoints, logs
from plumbing.files import append_jsonl, drop_rows_after, read_jsonl
from tests.conftest import ROOT, list_arguments, run_python
from tests.test_ppo import copy_weights, make_learner, train_on, two_dialogues

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

PPO = ROOT / "ppo.py"
KILLED = """
import os, signal, sys, ppo
inner, moment = ppo.checkpoints.save, sys.argv.pop()

def end(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def save(*arguments):
    if moment == "in a save":
        os.fsync = end  # called after the writing of a file that has no name yet
    inner(*arguments)
    end()

ppo.checkpoints.save = save
ppo.main()
"""


def read_metrics(run: Path) -> list[dict]:
    """Those of each step that do not tell the time."""
    clocks = ("seconds_", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in read_jsonl(run / "metrics.jsonl")]


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys() and all(torch.equal(w, others[n]) for n, w in weights.items())


def assert_same_up_to_rounding(run: Path, other: Path) -> None:
    """Metrics and policies."""
    for a, b in zip(read_metrics(run), read_metrics(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            is_count = name in ("clipped", "value_clipped")  # an action at the clip's edge may fall on either side
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=0.05 if is_count else 1e-5), name
    policy = load_weights(other / "policy")
    assert all(torch.allclose(w, policy[n], atol=1e-4) for n, w in load_weights(run / "policy").items())


def test_a_run_that_is_killed_resumes_to_the_same_numbers(toy, straight, tmp_path):
    """By SIGKILL, after the first checkpoint, before its policy is exported, and while the second one is written. The
    last start, as on another machine, ends with the numbers of the undisturbed run. (SIGTERM: test_nodes.py.)"""
    run, arguments = tmp_path / "runs/killed", list_arguments(toy, "killed")
    for moment in ("after a save", "in a save"):
        run_python("-c", KILLED, *arguments, moment, cwd=tmp_path, code=-signal.SIGKILL)
        assert [path.name for path in checkpoints.list_checkpoints(run)] == ["step-000002"]
        assert any(run.glob("checkpoints/*.partial")) == (run / "best").exists() == (moment == "in a save")
    elsewhere = ["MAX_TOKENS_PER_MICRO_BATCH=1024", "TRACK=", "GPU_MEMORY=0.4"]
    assert "resumes after step 2" in run_python(PPO, *arguments, *elsewhere, cwd=tmp_path).stdout
    assert read_metrics(run) == read_metrics(straight)  # the dev split, too, was asked when it was due and only then
    for name in ("policy", "best"):
        assert_equal(load_weights(straight / name), load_weights(run / name))


def test_what_a_run_leaves(straight):
    """Dev accuracies at checkpoints choose the best; dialogues by token say what was reinforced; the engine sampled
    from the trainer's weights after each update."""
    metrics = read_metrics(straight)
    dev = {row["step"]: row["dev_accuracy_at_3"] for row in metrics if "dev_accuracy_at_3" in row}
    assert list(dev) == [2, 4, 6] and all(row["critic_lr"] == 2 * row["actor_lr"] > 0 for row in metrics)
    assert all(row["sampler_mismatch"] < 1e-5 for row in metrics) and metrics[-1]["kl_k3"] > 1e-3
    best, policy = (load_weights(straight / name) for name in ("best", "policy"))
    is_last = max(dev, key=dev.get) == 6  # the first of equals
    assert all(torch.equal(w, policy[n]) for n, w in best.items()) == is_last
    rows = read_jsonl(straight / "tokens.jsonl")
    assert {row["step"] for row in rows} == {2, 4, 6}
    for row in rows:
        reinforced = {m for a, m in zip(row["advantages"], row["mask"], strict=True) if a}
        assert reinforced == {1} and len(row["tokens"]) == len(row["values"]) == len(row["mask"])
    dialogues = read_jsonl(straight / "dialogues.jsonl")
    assert [row["step"] for row in dialogues] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert len({row["id"] for row in dialogues}) == 12  # in one pass over the problems
    events = EventAccumulator(str(straight / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("reward")] == pytest.approx([row["reward"] for row in metrics])


def test_a_start_says_what_will_happen_and_refuses_what_cannot(toy, straight):
    shared, before = straight.parent.parent, read_metrics(straight)
    dry = run_python(PPO, *list_arguments(toy, "dry"), "DRY_RUN=1", cwd=shared)
    for said in (
        "284 problems to train on, 16 to choose the best checkpoint",
        "then 2 x 2 updates of 8 dialogues",
        "ppo.STEPS = 6 (command line; the file says 1280)",
        "ppo.EPOCHS = 2 (preset toy; the file says 1)",
    ):
        assert said in dry.stdout
    assert not (shared / "runs/dry").exists()
    again = run_python(PPO, *list_arguments(toy, "straight"), cwd=shared)
    assert "is finished" in again.stdout and read_metrics(straight) == before
    other = run_python(PPO, *list_arguments(toy, "straight"), "LAMBDA=0.5", cwd=shared, code=1)
    assert "ppo.LAMBDA: 0.99 there, 0.5 now" in other.stderr
    for done in (dry, again):
        assert "Warning" not in done.stderr and "Loading weights" not in done.stderr


def test_the_papers_preset_in_small(toy, tmp_path):
    """bfloat16 in engine and trainer and recomputed activations, on any text: bytes that the toy's vocabulary has no
    words for, and a question that fills the context, which is left out."""
    question = "Fïnd $x$ with $x^2 = {}$ \\[asy] draw((0,0)); [/asy]"
    problems = [{"id": f"r{i}", "question": question.format(i), "answer": "\\frac{1}{2}"} for i in range(20)]
    problems.append({"id": "long", "question": "x" * 5000, "answer": "1"})
    append_jsonl(tmp_path / "p.jsonl", problems)
    changes = ["PRESET=paper", "STEPS=3", "MAX_ATTEMPT_TOKENS=12", "ACTOR_LR=1e-3", "WARMUP=0", "DEV_PROBLEMS=4"]
    changes += [f"TRAIN_DATA={tmp_path / 'p.jsonl'}"]
    said = run_python(PPO, *list_arguments(toy, "paper"), *changes, cwd=tmp_path).stdout
    assert "left out, because they fill the context of 4096 tokens: 1 questions (long)" in said
    steps = read_metrics(tmp_path / "runs/paper")
    assert len(steps) == 3 and all(math.isfinite(v) for s in steps for v in s.values())
    assert all(0 < step["sampler_mismatch"] < ppo.MAX_MISMATCH for step in steps)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/paper/policy")
    assert lm.dtype == torch.bfloat16 and lm.lm_head.weight is lm.model.embed_tokens.weight


# Checkpoints, in this process -----------------------------------------------------------------------------------------
def test_a_checkpoint_gives_back_models_and_optimisers(toy, ranks, change, tmp_path):
    """Trained, saved and trained again is loaded and trained again; to save before the first step changes nothing. The
    newest checkpoints stay, and the best."""
    change(checkpoints, KEEP_CHECKPOINTS=2)
    learner, unsaved = (make_learner(toy, change, lr=1e-3) for _ in range(2))

    def train(learner: ppo.Learner) -> dict[str, torch.Tensor]:
        train_on(two_dialogues(), learner)
        return {f"{part.name}.{n}": w for part in learner.parts for n, w in copy_weights(part.model).items()}

    for step in range(1, 5):
        checkpoints.save(tmp_path, step, 10 * step, learner.parts, best=2)
    assert_equal(train(learner), train(unsaved))
    checkpoints.save(tmp_path, 5, 50, learner.parts, best=2)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-000005"]
    resumed = make_learner(toy, change, moved=0.1, lr=1e-3)
    assert checkpoints.load(tmp_path, resumed.parts) == (5, 50)
    assert_equal(train(learner), train(resumed))


def test_damaged_checkpoints_and_full_disks(toy, ranks, change, tmp_path):
    """A damaged checkpoint is named, with what to do; a disk that fills up (here: files that cannot grow)
    ends in one line and leaves what is there whole."""
    parts = make_learner(toy, change).parts
    for step in (2, 4):
        checkpoints.save(tmp_path, step, 0, parts, best=0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(SystemExit, match=r"step-000006.partial could not be written .*resumes from its last"):
            checkpoints.save(tmp_path, 6, 0, parts, best=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["step-000002", "step-000004"]
    for shard_file in (tmp_path / "checkpoints/step-000004").glob("*.distcp"):
        shard_file.write_bytes(shard_file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"step-000004 is damaged or of another .*then resumes from step-000002"):
        checkpoints.load(tmp_path, parts)
    log = logs.Log.__new__(logs.Log)
    log.folder = Path("/dev")
    with pytest.raises(SystemExit, match=r"/dev/full could not be written .*resumes from its last checkpoint"):
        log.append("full", [{"step": 1}])


def test_an_export_replaces_what_killed_ones_have_left(toy, ranks, change, tmp_path):
    learner = make_learner(toy, change, moved=0.1)
    for left in ("policy", "policy.old", "policy.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "old").touch()
    tokenizer = AutoTokenizer.from_pretrained(toy / "warm_start")
    checkpoints.export(tmp_path / "policy", learner.actor.lm, learner.policy_weights(), tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"] and not (tmp_path / "policy/old").exists()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    assert all(torch.equal(exported[n], w) for n, w in learner.policy_weights())


def test_logs_forget_what_was_not_saved(ranks, tmp_path):
    """Rows after the last checkpoint are dropped, and a row of a killed writer that was cut, here inside a character;
    the first of equals is best."""
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": 8, "dev": 0.5}, {"step": 12, "text": "½\u2028\n"}]
    rows += [{"step": 16, "dev": 0.5}, {"step": 24, "dev": 0.4}]
    append_jsonl(log, [*rows, {"step": 32, "dev": 0.9, "text": "½"}])
    log.write_bytes(log.read_bytes()[:-4])
    assert read_jsonl(log) == rows and checkpoints.best_so_far(tmp_path, "dev") == (8, 0.5)
    drop_rows_after(log, 12)
    assert read_jsonl(log) == rows[:2] and checkpoints.best_so_far(tmp_path / "none", "dev") == (0, -1.0)
