"""Whole runs of ppo.py: killed and resumed, on several ranks, on a full disk; what they leave and what they refuse."""

import contextlib
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ppo
from plumbing import checkpoints, logs
from plumbing.files import append_jsonl, drop_rows_after, read_jsonl
from tests.conftest import ROOT, alone
from tests.test_ppo import copy_weights, make_learner, train_on, two_dialogues

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

SMALL = ["PRESET=toy", "STEPS=4", "DIALOGUES=16", "MINI_BATCH=8", "SAVE_EVERY=2", "MAX_ATTEMPTS=3", "DEV_PROBLEMS=16"]


def command(run: str, toy: Path, *arguments: str, processes: int = 0, program: str = "") -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    script = ["-c", program] if program else [str(ROOT / "ppo.py")]
    data = [f"RUN={run}", f"MODEL={toy / 'warm_start'}", f"TRAIN_DATA={toy / 'train.jsonl'}", "TRACK=tensorboard"]
    return [sys.executable, *launcher, *script, *SMALL, *data, *arguments]


def start(cwd: Path, *arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments, **options), cwd=cwd, env=alone(), capture_output=True, text=True)


def train(cwd: Path, run: str, toy: Path, *arguments: str, processes: int = 0) -> list[dict]:
    done = start(cwd, run, toy, *arguments, processes=processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return metrics_of(cwd, run)


def metrics_of(cwd: Path, run: str) -> list[dict]:
    clocks = ("seconds_", "tokens_per_second", "peak_memory")
    rows = read_jsonl(cwd / "runs" / run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]


def weights(cwd: Path, run: str, name: str = "policy") -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(cwd / "runs" / run / name).state_dict()


def assert_same_up_to_rounding(one: list[dict], other: list[dict]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            is_count = name in ("clipped", "value_clipped")  # an action at the clip's edge may fall on either side
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=0.05 if is_count else 1e-5), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(runs, toy) -> list[dict]:
    """A run of four steps that nobody disturbed: what the others are compared with."""
    return train(runs, "straight", toy)


def test_a_run_that_is_stopped_and_killed_resumes_to_the_same_numbers(runs, toy, straight):
    """SIGTERM in the first step: it is finished and saved, the exit code is 0. Then SIGKILL, in an update after the
    first checkpoint, while the next one is written, and between that one and best/, which it is the best of. The last
    start ends with the numbers of the undisturbed run."""
    run = runs / "runs/killed"
    process = subprocess.Popen(command("killed", toy), cwd=runs, env=alone(), stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (run / "metrics.jsonl").is_file():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 0 and "stopped by SIGTERM after step" in said
    assert checkpoints.list_checkpoints(run) and not (run / "policy").exists()
    for phase, last in {"ppo.update": 2, "torch.distributed.checkpoint.save": 1, "ppo.checkpoints.export": 1}.items():
        module, function = phase.rsplit(".", 1)
        # In an update the kill comes after some calls; in a save, after the writing of a file that has no name yet.
        trace = "sys.settrace(lambda *_: end() if len(calls) > 30 else calls.append(1))"
        trigger = {"save": "os.fsync = end", "export": "end()"}.get(function, trace)
        program = (
            "import sys, os, signal, ppo, torch.distributed.checkpoint\n"
            f"inner, calls = {phase}, []\n"
            "def killed(*arguments, **options):\n"
            "    calls.append(1)\n"
            f"    if len(calls) < {last}: return inner(*arguments, **options)\n"
            "    end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"    {trigger}\n"
            "    inner(*arguments, **options)\n"
            "    end()\n"
            f"{module}.{function} = killed\n"
            "ppo.main()\n"
        )
        done = start(runs, "killed", toy, program=program)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert not (run / "policy").exists()
    assert train(runs, "killed", toy) == straight  # the dev split, too, was asked when it was due, and no other time
    for name in ("policy", "best"):
        a, b = weights(runs, "straight", name), weights(runs, "killed", name)
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_what_a_run_leaves(runs, toy, straight):
    """Dev accuracies at checkpoints choose the best; dialogues by token say what was reinforced; the engine sampled
    from the trainer's weights after each update."""
    run = runs / "runs/straight"
    dev = {row["step"]: row["dev_accuracy_at_3"] for row in straight if "dev_accuracy_at_3" in row}
    assert list(dev) == [2, 4] and all(row["step"] in dev or "dev_accuracy_at_1" not in row for row in straight)
    assert all(row["sampler_mismatch"] < 1e-5 for row in straight) and straight[-1]["kl_k3"] > 1e-3
    best, policy = (AutoModelForCausalLM.from_pretrained(run / name) for name in ("best", "policy"))
    assert policy.config.tie_word_embeddings and policy.lm_head.weight is policy.model.embed_tokens.weight
    if dev[4] <= dev[2]:
        assert any(not torch.equal(w, policy.state_dict()[n]) for n, w in best.state_dict().items())
    rows = read_jsonl(run / "tokens.jsonl")
    assert {row["step"] for row in rows} == {2, 4}
    for row in rows:
        assert len(row["tokens"]) == len(row["mask"]) == len(row["advantages"]) == len(row["values"])
        assert not any(a for a, m in zip(row["advantages"], row["mask"], strict=True) if not m)
        assert any(a for a, m in zip(row["advantages"], row["mask"], strict=True) if m)
    assert [row["step"] for row in read_jsonl(run / "dialogues.jsonl")] == [1, 1, 2, 2, 3, 3, 4, 4]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("reward", "accuracy_at_2", "actor_lr"):
        assert [e.value for e in events.Scalars(name)] == pytest.approx([row[name] for row in straight])
    assert [path.name for path in checkpoints.list_checkpoints(run)][-2:] == ["step-000002", "step-000004"]


def test_a_start_says_what_will_happen_and_refuses_what_cannot(runs, toy, straight, tmp_path):
    dry = start(runs, "dry", toy, "DRY_RUN=1")
    assert dry.returncode == 0 and "284 problems to train on, 16 to choose the best checkpoint" in dry.stdout
    assert "then 2 x 2 updates of 8 dialogues" in dry.stdout and "GiB in all: fits" in dry.stdout
    assert "ppo.STEPS = 4 (command line; the file says 1280)" in dry.stdout
    assert "ppo.EPOCHS = 2 (preset toy; the file says 1)" in dry.stdout
    assert not (runs / "runs/dry").exists()
    again = start(runs, "straight", toy, "MAX_TOKENS_PER_MICRO_BATCH=512", "TRACK=", "GPU_MEMORY=0.4")
    assert again.returncode == 0 and "is finished" in again.stdout  # another machine may resume it
    assert metrics_of(runs, "straight") == straight
    other = start(runs, "straight", toy, "LAMBDA=0.5")
    assert other.returncode == 1 and "ppo.LAMBDA: 0.99 there, 0.5 now" in other.stderr
    nowhere = start(runs, "new", toy, f"MODEL={tmp_path}/none")
    assert nowhere.returncode == 1 and "neither a folder with a model" in nowhere.stderr
    for done in (dry, again):
        assert "Warning" not in done.stderr and "Loading weights" not in done.stderr


def test_two_ranks_learn_what_one_learns(runs, toy, straight):
    """In as many micro-batches as there are dialogues, of which one rank may have more than the other."""
    assert_same_up_to_rounding(straight, train(runs, "two", toy, "MAX_TOKENS_PER_MICRO_BATCH=1", processes=2))
    a, b = weights(runs, "straight"), weights(runs, "two")
    assert all(torch.allclose(a[n], b[n], atol=1e-4) for n in a)


def test_replicas_learn_what_shards_learn(runs, toy, straight):
    """Four ranks, two of which share the weights while the other two have a replica (HSDP); and all is offloaded. They
    resume from the checkpoint that one process wrote."""
    run = runs / "runs/replicas"
    shutil.copytree(runs / "runs/straight", run, ignore=shutil.ignore_patterns("policy", "step-000004"))
    config = run / "config.json"
    config.write_text(config.read_text().replace('"straight"', '"replicas"'))
    assert_same_up_to_rounding(straight, train(runs, "replicas", toy, "SHARD_RANKS=2", "OFFLOAD=1", processes=4))


def test_the_papers_preset_in_small(runs, toy, tmp_path):
    """bfloat16 in engine and trainer and recomputed activations, on any text: bytes that the toy's vocabulary has no
    words for, and a question that fills the context, which is left out."""
    problems = [
        {"id": f"r{i}", "question": f"Fïnd $x$ with $x^2 = {i}$ \\[asy] draw((0,0)); [/asy]", "answer": "\\frac{1}{2}"}
        for i in range(20)
    ]
    problems.append({"id": "long", "question": "x" * 5000, "answer": "1"})
    append_jsonl(tmp_path / "p.jsonl", problems)
    changes = ["PRESET=paper", "MAX_ATTEMPT_TOKENS=12", "ACTOR_LR=1e-3", "WARMUP=0", "DEV_PROBLEMS=4"]
    steps = train(runs, "paper", toy, *changes, f"TRAIN_DATA={tmp_path / 'p.jsonl'}")
    assert len(steps) == 4 and all(math.isfinite(v) for s in steps for v in s.values())
    assert all(0 < step["sampler_mismatch"] < ppo.MAX_MISMATCH for step in steps)
    assert AutoModelForCausalLM.from_pretrained(runs / "runs/paper/policy").dtype == torch.bfloat16


# Checkpoints, in this process -----------------------------------------------------------------------------------------
def test_a_checkpoint_gives_back_models_and_optimisers(toy, ranks, monkeypatch, tmp_path):
    """Trained, saved and trained again is loaded and trained again; to save before the first step changes nothing."""
    learner = make_learner(toy, monkeypatch, lr=1e-3)
    checkpoints.save(tmp_path, 1, 10, learner.parts, best=0)
    train_on(two_dialogues(), learner)
    unsaved = make_learner(toy, monkeypatch, lr=1e-3)
    train_on(two_dialogues(), unsaved)
    assert all(torch.equal(w, copy_weights(unsaved.actor)[n]) for n, w in copy_weights(learner.actor).items())
    checkpoints.save(tmp_path, 2, 20, learner.parts, best=0)
    train_on(two_dialogues(), learner)
    resumed = make_learner(toy, monkeypatch, moved=0.1, lr=1e-3)
    assert checkpoints.load(tmp_path, resumed.parts) == (2, 20)
    train_on(two_dialogues(), resumed)
    for part, other in zip(learner.parts, resumed.parts, strict=True):
        expected = copy_weights(part.model)
        assert all(torch.equal(w, expected[n]) for n, w in copy_weights(other.model).items())


def test_the_newest_checkpoints_and_the_best_stay(toy, ranks, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "KEEP_CHECKPOINTS", 2)
    parts = make_learner(toy, monkeypatch).parts
    for step in range(1, 6):
        checkpoints.save(tmp_path, step, 0, parts, best=2)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-000005"]


def test_damaged_checkpoints_and_full_disks(toy, ranks, monkeypatch, tmp_path):
    """A damaged or foreign checkpoint is named, with what to do; a disk that fills up (here: files that cannot grow)
    ends in one line and leaves what is there whole."""
    parts = make_learner(toy, monkeypatch).parts
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
    message = r"step-000004 is damaged or of another model .*then resumes from step-000002"
    with pytest.raises(SystemExit, match=message):
        checkpoints.load(tmp_path, parts)
    shutil.rmtree(tmp_path / "checkpoints/step-000004")
    foreign = tmp_path / "checkpoints/step-000004"
    torch.distributed.checkpoint.save({"weights": torch.ones(3)}, checkpoint_id=foreign, no_dist=True)
    with pytest.raises(SystemExit, match=message):
        checkpoints.load(tmp_path, parts)
    log = logs.Log.__new__(logs.Log)
    log.folder = Path("/dev")
    with pytest.raises(SystemExit, match=r"/dev/full could not be written .*resumes from its last checkpoint"):
        log.append("full", [{"step": 1}])


def test_an_export_replaces_what_killed_ones_have_left(toy, ranks, monkeypatch, tmp_path):
    learner = make_learner(toy, monkeypatch, moved=0.1)
    for left in ("policy", "policy.old", "policy.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "old").touch()
    tokenizer = AutoTokenizer.from_pretrained(toy / "warm_start")
    checkpoints.export(tmp_path / "policy", learner.actor.lm, learner.policy_weights(), tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"] and not (tmp_path / "policy/old").exists()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    assert all(torch.equal(exported[n], w) for n, w in learner.policy_weights())


def test_logs_forget_what_was_not_saved(ranks, tmp_path):
    """Rows after the last checkpoint are dropped, and half a row of a killed writer; the first of equals is best."""
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": 8, "dev": 0.5}, {"step": 12}, {"step": 16, "dev": 0.5}, {"step": 24, "dev": 0.4}]
    append_jsonl(log, rows)
    with log.open("a") as file:
        file.write('{"step": 32, "dev": 0.9, "attempts": [{}')
    assert checkpoints.best_so_far(tmp_path, "dev") == (8, 0.5)
    drop_rows_after(log, 12)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [8, 12]
    assert checkpoints.best_so_far(tmp_path / "none", "dev") == (0, -1.0)


def test_the_plan_says_what_does_not_fit(toy, ranks, monkeypatch):
    assert "GiB in all: fits" in logs.memory_plan(str(toy / "warm_start"), "float32", critic=True, reference=True)
    monkeypatch.setattr(logs.packing, "MAX_TOKENS_PER_MICRO_BATCH", 10**9)
    plan = logs.memory_plan(str(toy / "warm_start"), "float32", critic=True, reference=True)
    assert "does NOT fit; more ranks" in plan
