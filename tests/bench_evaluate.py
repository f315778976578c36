"""How much time one queue for all K saves, how large the report is, and how fast its script builds and searches it.

    python tests/bench_evaluate.py                      # a random model of 1 M parameters; minutes on two cores
    python tests/bench_evaluate.py PROBLEMS=30,40,500,272,675 MAX_SEQUENCES=256 MODEL=folder DTYPE=bfloat16
    python tests/bench_evaluate.py PROBLEMS= TEXTS=file.jsonl    # the report alone, with texts from a file's questions

Attempts have 16 to LONGEST tokens (log-uniform: a long tail), and a quarter of them are right. Lengths and verdicts
depend on what the model was shown, so that every scheme plays the same dialogues, greedily. On a machine that others
use at the same time, the CPU seconds of this process are the steadier measure (of an engine on the CPU).
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
import grader
import plumbing.engine
import rollout
from data.problems import load_problems
from evaluate import Item, Problems
from experiments import median, warm
from plumbing import report
from plumbing.constants import set_constants
from plumbing.engine import Engine
from rollout import random_number
from tests.browser import Page

PROBLEMS: str = "3,4,50,27,68"  # sizes of the benchmarks: the paper's five by ten; so are the engine's 256 sequences
MODEL: str = ""  # folder or hub name; "" = a random one
DTYPE: str = "float32"
HIDDEN: int = 128  # width of the random model
LAYERS: int = 4  # its depth
SHORTEST: int = 16  # tokens of an attempt
LONGEST: int = 128
RIGHT: float = 0.25  # share of right attempts
REPORT_PROBLEMS: int = 1517  # of the report; the paper's five benchmarks have as many
REPORT_ATTEMPTS: int = 2500  # characters of an attempt in the report
TEXTS: str = ""  # problem files whose questions make the report's texts; "" = made-up words

Play = tuple[float, float, int]  # seconds, CPU seconds of this process, generated tokens


class DrawnLengths(Engine):
    """The engine, but how long an attempt is follows from its prompt, and nothing else ends it."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.never = dict.fromkeys(self.stop_ids, -100.0)
        add_request = self.engine.add_request

        def add_endless_request(key: str, prompt: Any, params: Any, **options: Any) -> Any:
            params.logit_bias = self.never
            return add_request(key, prompt, params, **options)

        self.engine.add_request = add_endless_request
        self.asked: list[tuple[list[int], int]] = []  # prompt, tokens of every attempt

    def submit(self, key: int, ids: list[int], max_tokens: int, *sampling: Any) -> None:
        share = random_number("length", *ids) / 2**31
        length = min(max_tokens, round(SHORTEST * (LONGEST / SHORTEST) ** share))
        self.asked.append((list(ids), length))
        super().submit(key, ids, length, *sampling)


def drawn_verdict(response: str, gold: str, *_: Any) -> Future:
    right = random_number("right", response, gold) / 2**31 < RIGHT
    return grader.finished(grader.Verdict(None, right, "correct" if right else "wrong"))


def play(engine: DrawnLengths, problems: Problems, runs: Iterable[list[Item]]) -> Play:
    """One run after the other, each with an empty prefix cache."""
    records: list[dict[str, Any]] = []
    clocks = time.perf_counter(), time.process_time()
    for items in runs:
        engine.llm.reset_prefix_cache()
        evaluate.play_items(engine, items, problems, records.append, "")
    tokens = sum(a["tokens"] for r in records for a in r["attempts"])
    return time.perf_counter() - clocks[0], time.process_time() - clocks[1], tokens


def bare_engine(engine: DrawnLengths, asked: list[tuple[list[int], int]]) -> Play:
    """llm.generate on the same prompts and lengths, all of them known from the start; no dialogues, no grading."""
    from vllm import SamplingParams

    engine.llm.reset_prefix_cache()
    prompts = [{"prompt_token_ids": ids} for ids, _ in asked]
    shared = {"temperature": 0.0, "logprobs": 0, "logit_bias": engine.never, "ignore_eos": True, "detokenize": False}
    clocks = time.perf_counter(), time.process_time()
    outputs = engine.llm.generate(prompts, [SamplingParams(max_tokens=n, **shared) for _, n in asked], use_tqdm=False)
    tokens = sum(len(out.outputs[0].token_ids) for out in outputs)
    return time.perf_counter() - clocks[0], time.process_time() - clocks[1], tokens


def bench_queue(folder: Path) -> None:
    tokenizer = median.make_tokenizer()
    warm.HIDDEN, warm.LAYERS, warm.HEADS, warm.INTERMEDIATE = HIDDEN, LAYERS, 4, 4 * HIDDEN
    if not MODEL:
        warm.make_model(tokenizer, 0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    engine = DrawnLengths(MODEL or str(folder), rollout.CONTEXT, DTYPE)
    sizes = [int(size) for size in PROBLEMS.split(",")]
    questions = median.make_problems(sum(sizes), 0, held_out=True)
    names = [f"benchmark {i}" for i, size in enumerate(sizes) for _ in range(size)]
    problems = {(name, p["id"]): p for p, name in zip(questions, names, strict=True)}
    items = evaluate.list_items(problems)
    seven = [[i for i in items if k == i.K] for k in range(1, rollout.MAX_ATTEMPTS + 1)]
    single = [[i for i in run if i.benchmark == name] for run in seven for name in dict.fromkeys(names)]
    play(engine, problems, [seven[0][:64]])  # the first call in a process is slower
    engine.asked.clear()
    queue = play(engine, problems, [items])
    asked = list(engine.asked)
    print(f"{len(items)} dialogues, {len(asked)} attempts of {SHORTEST} to {LONGEST} tokens, K = 1..{len(seven)}")

    def show(name: str, result: Play) -> None:
        (seconds, cpu, tokens), per_token = result, [clock / result[2] * queue[2] for clock in result[:2]]
        rate = f"{seconds:7.1f} s {cpu:7.1f} CPU s {tokens:9,} tokens {tokens / seconds:8,.0f} tokens/s"
        ratios = f"{per_token[0] / queue[0]:.2f} times as fast, in CPU seconds {per_token[1] / queue[1]:.2f} times"
        print(f"{name:40} {rate}   one queue is {ratios}", flush=True)

    show("one queue (evaluate.py)", queue)
    show("llm.generate, same prompts and tokens", bare_engine(engine, asked))
    show(f"{len(seven)} runs, one after the other", play(engine, problems, seven))
    show(f"{len(single)} runs, each benchmark alone", play(engine, problems, single))
    engine.shutdown()


def bench_report(folder: Path) -> None:
    rng = random.Random(0)
    texts = [p["question"] for path in filter(None, TEXTS.split(",")) for p in load_problems(path)]
    if not texts:
        words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(3000)]
        words += [f"${rng.choice('xyzabn')}^{rng.randint(2, 9)} + {rng.randint(1, 99)}$" for _ in range(1000)]
        words = [
            w for rank, w in enumerate(rng.sample(words, len(words)), 1) for _ in range(4000 // rank)
        ]  # Zipf's law
        texts = [" ".join(rng.choices(words, k=40)) for _ in range(9000)]

    def attempt(gold: str) -> dict[str, Any]:
        text = ""
        while len(text) < REPORT_ATTEMPTS - 40:
            text += rng.choice(texts)[: REPORT_ATTEMPTS - 40 - len(text)] + "\n"
        answer = gold if rng.random() < RIGHT else str(rng.randint(100, 140))
        status = "correct" if answer == gold else "wrong"
        text += f"The answer is \\boxed{{{answer}}}."
        return {"text": text, "answer": answer, "status": status, "ending": "stop", "tokens": len(text) // 3}

    problems = {
        ("five", f"five/{i}"): {"question": rng.choice(texts), "answer": str(i % 50)} for i in range(REPORT_PROBLEMS)
    }
    records = []
    for key, problem in problems.items():
        for k in range(1, rollout.MAX_ATTEMPTS + 1):
            attempts = [attempt(problem["answer"])]
            while len(attempts) < k and attempts[-1]["status"] != "correct":
                attempts.append(attempt(problem["answer"]))
            records.append(Item(*key, k, False, 0)._asdict() | {"attempts": attempts})
    start = time.perf_counter()
    results = {"settings": evaluate.list_settings({}), "versions": report.list_versions()}
    results |= evaluate.summarise({"m": records})
    measured = time.perf_counter() - start
    start = time.perf_counter()
    report.write_files(folder, results, problems, {"m": records}, {}, evaluate.find_repeats)
    written = time.perf_counter() - start
    start = time.perf_counter()
    page = Page(folder / "report.html")
    built = time.perf_counter() - start
    attempts = page.run("DATA.problems.flatMap(p => p[4]).flatMap(d => d[1]).map(a => a[0].length)")
    print(
        f"\n{page.run('DATA.problems.length')} problems at K = {rollout.MAX_ATTEMPTS}: {len(attempts)} attempts of "
        f"{statistics.fmean(attempts):.0f} characters\nsize {(folder / 'report.html').stat().st_size / 1e6:.1f} MB; "
        f"metrics of all K {measured:.1f} s, files {written:.1f} s; in V8, without layout: built in {built:.1f} s"
    )
    searched = []
    for query in ("five/77", "boxed{7}", "e", "no such words", texts[5][5:25].lower(), "x^2"):
        start = time.perf_counter()
        page.run(f"($('search').value = {json.dumps(query)}, $('search').oninput())")
        searched.append(1000 * (time.perf_counter() - start))
    print("a search takes " + ", ".join(f"{ms:.0f}" for ms in searched) + " ms (six words)")


def main() -> None:
    rollout.MAX_ATTEMPTS, plumbing.engine.MAX_SEQUENCES, evaluate.RESAMPLES = 7, 26, 0
    modules = {"bench": sys.modules[__name__], "rollout": rollout, "engine": plumbing.engine}
    print(set_constants(sys.argv[1:], modules))
    grader.submit = drawn_verdict
    with tempfile.TemporaryDirectory() as folder:
        if PROBLEMS:
            bench_queue(Path(folder))
        bench_report(Path(folder))


if __name__ == "__main__":
    main()
