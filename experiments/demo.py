"""The paper's main figure in small (arXiv 2503.04808): multi-attempt against single-turn RL, in the toy world.

    python -m data.demo                                     # `make demo`: minutes on two cores
    python -m data.demo SEEDS=4,5,6 OUT=runs/reproduce      # `make reproduce`: also renews README.md's table and figure

For each seed: the toy world; PPO with several attempts and with one, side by side, on the same budget of generated
tokens; evaluation on held-out problems; and a probe of whether a retry reads what has failed. A second call goes on
where the first one was stopped.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import evaluate
import grader
import ppo
import rollout
from data import toy
from data.report import OKABE_ITO, Curve, draw
from evaluate import to_json, wilson, write_atomically

SEEDS: str = "0"  # comma-separated; each has its own questions, its own held-out ones, and its own training
OUT: str = "runs/demo"  # folder of the results
EVALUATION_RANKS: int = 2  # processes that share an evaluation
SIDE_BY_SIDE: int = 2  # trainings at a time, each on one thread
TRAINING: str = ""  # more arguments for ppo.py in both arms, spaces between, such as "TOKEN_BUDGET=20000 LAMBDA=1"
POLL_SECONDS: float = 1.0  # seconds between two looks at the runs' metrics

# Of child processes: one thread each, no chatter. As it is now, before an engine in this process adds to it.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
ARMS = {  # run -> its arguments for ppo.py
    "multi_attempt": ["PRESET=toy"],
    # A dialogue of one attempt has about half the tokens: twice as many make the same number of tokens per update, so
    # both arms make the same number of updates out of the same budget. Its only attempt need not vary for later ones.
    "single_turn": ["PRESET=toy,single_turn", "DIALOGUES=256", "MINI_BATCH=128", "KL_COEF=0.05"],
}
MODELS = {"multi_attempt": "multi-attempt RL", "single_turn": "single-turn RL", "warm_start": "warm start"}
RESAMPLED = ("single_turn", "warm_start")  # models whose resampling control is shown
# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
LEGEND = (
    "Percent of the held-out questions solved within so many attempts, greedy, each number its own run; resampled: "
    "pass@k of independent one-attempt samples. Own again: shown its usual second answer as failed, the model still "
    "says it; other again: so with another wrong number."
)


# Training: two child processes, watched through their metrics.jsonl --------------------------------------------------
def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole line of a JSONL file that is being written, if there is one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(lines[-1]) if lines else None


@dataclasses.dataclass
class Training:
    """A run of ppo.py."""

    label: str  # of its progress bar
    folder: Path  # of the run; its log lies beside it
    arguments: list[str]  # for ppo.py
    after: Path | None = None  # folder of the run that has to be finished before

    def __post_init__(self):
        self.arguments = [*self.arguments, f"RUN={os.path.relpath(self.folder, 'runs')}"]
        self.log = self.folder.with_name(f"{self.folder.name}.log")

    def start(self) -> subprocess.Popen:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            # A process group of its own: on Ctrl-C it is asked to save and end, not killed.
            command, options = [sys.executable, "ppo.py", *self.arguments], {"env": ENVIRONMENT, "process_group": 0}
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)

    def check_end(self, process: subprocess.Popen) -> None:
        if process.returncode or not (self.folder / "policy").is_dir():
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
            raise SystemExit("\n".join([*tail, f"{self.folder} did not get to its end; all of it is in {self.log}"]))


def constants_of(arguments: Sequence[str]) -> dict[str, Any]:
    """The constants that ppo.py would have. Raises SystemExit for arguments that it would not take."""
    stages = {"ppo": ppo, "rollout": rollout, "grader": grader}
    kept = [(stage, name, getattr(stage, name)) for stage in stages.values() for name in stage.__annotations__]
    try:
        return json.loads(json.dumps(rollout.override_constants(arguments, stages, ppo.PRESETS)))
    finally:
        for stage, name, value in kept:
            setattr(stage, name, value)


def train(runs: Sequence[Training], later: int = 0) -> None:
    """SIDE_BY_SIDE runs at a time, in this order, each on one thread. ppo.py resumes a run that was stopped; one that
    is finished, with the constants that it would have now, is not started.

    The time left that is shown counts `later` more tokens, of runs that follow behind this call.
    """
    waiting, tokens = [], 0
    for run in runs:  # what is wrong with any of them comes out before there is work done
        constants, config = constants_of(run.arguments), run.folder / "config.json"
        ended = (run.folder / "policy").is_dir()
        if not ended or json.loads(config.read_text(encoding="utf-8")) != ppo.config_of(constants):
            waiting.append(run)
            tokens += constants["ppo.TOKEN_BUDGET"]
    slots: dict[int, tuple[Training, subprocess.Popen, tqdm]] = {}
    several = len(waiting) > SIDE_BY_SIDE
    total = tqdm(desc="all trainings", total=tokens + later, unit=" tokens", unit_scale=True, disable=not several)
    seen: dict[Path, tuple[int, int]] = {}  # run -> its tokens now, and as this call found it
    try:
        while waiting or slots:
            unfinished = [run.folder for run in waiting] + [run.folder for run, _, _ in slots.values()]
            for slot in range(SIDE_BY_SIDE):
                ready = [run for run in waiting if run.after not in unfinished]
                if slot not in slots and ready:
                    bar = tqdm(desc=ready[0].label, unit=" tokens", unit_scale=True, position=slot + several)
                    slots[slot] = (ready[0], ready[0].start(), bar)
                    waiting.remove(ready[0])
            for slot, (run, process, bar) in list(slots.items()):
                ended = process.poll() is not None
                show(bar, last_row(run.folder / "metrics.jsonl"))
                seen[run.folder] = (bar.n, bar.initial)
                if ended:
                    run.check_end(process)
                    bar.close()
                    del slots[slot]
            total.n, total.initial = (sum(column) for column in zip(*seen.values(), strict=True))
            total.refresh()
            for _, process, _ in list(slots.values())[:1]:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=POLL_SECONDS)
    finally:
        for _, process, _ in slots.values():
            process.terminate()
        for _, process, _ in slots.values():
            process.wait()
        for bar in [*(bar for _, _, bar in slots.values()), total]:
            bar.close()


def show(bar: tqdm, row: dict[str, Any] | None) -> None:
    """Bring a bar to where its run is. The rate, and so the time left, is counted from the first row that was seen."""
    if row is None or (at := min(row["generated_tokens"], row["token_budget"])) == bar.n:
        return
    if bar.total is None:
        bar.reset(row["token_budget"])
        bar.initial = at
    bar.n, bar.initial = at, min(bar.initial, at)  # a resumed run starts again at its last checkpoint
    bar.set_postfix(reward=f"{row['reward']:.2f}", solved=f"{row['accuracy']:.2f}")


# The probe: does the second answer depend on what has just failed? ---------------------------------------------------
def forced(chat: rollout.Chat, problem: dict[str, Any], answer: str) -> rollout.Dialogue:
    """A dialogue of two attempts whose first one was put there, as environment, and was called wrong."""
    dialogue = rollout.new_dialogue(chat, problem, 2)
    text = toy.response_text(answer).removesuffix("<|im_end|>")
    rollout.place_attempt(chat, dialogue, text, answer, "wrong")
    return dialogue


def probe_cases(problems: Sequence[dict[str, Any]], played: Sequence[dict[str, Any]]) -> list[tuple[dict, str, str]]:
    """(problem, the model's usual second answer, another wrong shown number), of problems first answered wrongly.

    played: the records of evaluate.py. Usual is what it says at K = 2 after its own failure.
    """
    records = {r["id"]: r for r in played if r["K"] == 2}
    cases = []
    for problem in problems:
        answers = [attempt["answer"] for attempt in records[problem["id"]]["attempts"]]
        if len(answers) < 2 or answers[1] is None:
            continue
        shown, _ = toy.shown_numbers(problem["question"])
        others = [str(number) for number in shown if str(number) not in (problem["answer"], *answers)]
        cases.append((problem, answers[1], others[rollout.random_number("probe", problem["id"]) % len(others)]))
    return cases


def probe(
    name: str, model: Path, problems: Sequence[dict[str, Any]], played: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """How often the second answer is the very one that was forced into the first place: share, low, high."""
    cases = probe_cases(problems, played)
    engine = rollout.Engine(str(model))
    chat = rollout.Chat(engine.tokenizer)
    dialogues = [forced(chat, problem, answer) for problem, *answers in cases for answer in answers]
    rollout.play(engine, chat, dialogues, [0] * len(dialogues), 0.0, f"probe, {name}")
    engine.shutdown()
    repeats = [len(d.attempts) > 1 and d.attempts[1].answer == d.attempts[0].answer for d in dialogues]
    result: dict[str, Any] = {"n": len(cases)}
    for kind, said in ("own", repeats[0::2]), ("other", repeats[1::2]):
        low, high = wilson(sum(said), len(said)) if said else (0.0, 1.0)
        result[kind] = {"accuracy": [sum(said) / max(1, len(said))], "low": [low], "high": [high]}
    return result


# Shared with data.score and data.ablations ---------------------------------------------------------------------------
def make_world(seed: int, folder: Path) -> Path:
    """The toy world of a seed, in `folder` unless it is seed 0's, which is what the four stages take by default."""
    world = folder / "toy" if seed else Path("data/toy")
    world.parent.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "data.toy", f"SEED={seed}", f"OUT={world}"], OMP_NUM_THREADS=str(os.cpu_count()))
    return world


def evaluate_all(models: Iterable[Path], world: Path, out: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """evaluate.py on the held-out problems, by EVALUATION_RANKS processes -> its results.json."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(EVALUATION_RANKS), "evaluate.py"]
    command += [f"MODEL={','.join(map(str, models))}", f"BENCHMARKS={world}/test.jsonl", f"OUT={out}", *arguments]
    run(command, quiet=True)
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def parse_seeds(text: str) -> list[int]:
    """Raises SystemExit where they are not different numbers, few enough for T_95."""
    seeds = text.split(",")
    if not all(map(str.isdecimal, seeds)) or len(set(seeds)) < len(seeds) or len(seeds) > len(T_95) + 1:
        raise SystemExit(f"SEEDS={text}: expected up to {len(T_95) + 1} different numbers, such as 1,2,3")
    return [int(seed) for seed in seeds]


@contextlib.contextmanager
def stopwatch(out: Path, complete: bool) -> Iterator[None]:
    """Around the work whose results come to lie in `out`: out/seconds is what it took in all, interrupted calls
    included, but not those that found it complete. Ctrl-C and SIGTERM end the children first."""
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    clock = out / "seconds"
    start, before = time.monotonic(), float(clock.read_text()) if clock.is_file() else 0.0
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on from here") from None
    finally:
        if not complete:
            write_atomically(clock, str(before + time.monotonic() - start))


# One seed, and several -----------------------------------------------------------------------------------------------
def run_seed(seed: int) -> dict[str, Any]:
    """World, training, evaluation and probe of one seed; what is done already is not done again."""
    folder = Path(OUT) / f"seed-{seed}"
    world = make_world(seed, folder)
    source = [f"SEED={seed}", f"MODEL={world}/warm_start", f"TRAIN_DATA={world}/train.jsonl"]
    train(
        [
            Training(f"seed {seed}, {MODELS[arm]}", folder / arm, [*arguments, *source, *TRAINING.split()])
            for arm, arguments in ARMS.items()
        ]
    )
    models = {arm: folder / arm / "policy" for arm in ARMS} | {"warm_start": world / "warm_start"}
    config = json.loads((folder / "multi_attempt" / "config.json").read_text(encoding="utf-8"))
    limit = config["rollout.MAX_ATTEMPT_TOKENS"]  # the same in training and in evaluation
    out = folder / "evaluation"
    how = [f"MAX_ATTEMPTS={rollout.MAX_ATTEMPTS}", f"RESAMPLES={evaluate.RESAMPLES}", f"MAX_ATTEMPT_TOKENS={limit}"]
    results = evaluate_all(models.values(), world, out, [*how, f"SEED={seed}"])
    problems = rollout.load_problems(world / "test.jsonl")
    path = folder / "probe.json"
    probes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if probes.get("weights") != results["weights"]:
        rollout.MAX_ATTEMPT_TOKENS = limit
        probes = {"weights": results["weights"]}
        for name, model in models.items():
            with (out / f"dialogues-{name}.jsonl").open(encoding="utf-8") as lines:
                probes[name] = probe(name, model, problems, [json.loads(line) for line in lines])
        write_atomically(path, to_json(probes))
    return {
        "models": {name: {"test": results["models"][name]["test"]} for name in MODELS},
        "control": {name: control(results["models"][name]["test"]) for name in MODELS},
        "ideal": {"accuracy": toy.ideal_accuracy([p["question"] for p in problems], rollout.MAX_ATTEMPTS)},
        "probe": {name: probes[name] for name in MODELS},
    }


def control(result: dict[str, Any]) -> dict[str, Any]:
    """pass@k by k, where there are as many samples."""
    curve = result["metrics"]["pass"]
    known = [k for k, value in enumerate(curve["value"]) if value is not None]
    names = {"accuracy": "value", "low": "low", "high": "high"}
    return {name: [curve[column][k] for k in known] for name, column in names.items()}


def run(command: list[str], quiet: bool = False, **environment: str) -> None:
    """Run to the end. Its workers get no Ctrl-C of their own, so that the child is asked to end them, not killed.
    quiet: only its progress and its complaints are shown."""
    stdout = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(command, stdout=stdout, env=ENVIRONMENT | environment)
    try:
        if code := process.wait():
            raise SystemExit(f"{' '.join(command)} ended with {code}")
    finally:
        process.terminate()
        process.wait()


def over_seeds(results: Sequence[Any]) -> Any:
    """The per-seed results as one of the same form: curves are means with t-intervals over the seeds, counts are sums.

    >>> curve = lambda a: {"test": {"n": 10, "accuracy": [a], "low": [0.0], "high": [1.0]}}
    >>> over_seeds([curve(0.4), curve(0.5), curve(0.6)])
    {'test': {'n': 30, 'accuracy': [0.5], 'low': [0.252], 'high': [0.748]}}
    """
    first = results[0]
    if len(results) == 1:
        return first
    if "accuracy" not in first:
        return {
            key: sum(r[key] for r in results) if key == "n" else over_seeds([r[key] for r in results]) for key in first
        }
    merged: dict[str, Any] = {"n": sum(r["n"] for r in results)} if "n" in first else {}
    intervals = [t_interval(column) for column in zip(*(r["accuracy"] for r in results), strict=True)]
    merged["accuracy"] = [round(mean, 6) for mean, _, _ in intervals]
    merged["low"] = [round(max(0.0, low), 3) for _, low, _ in intervals]
    merged["high"] = [round(min(1.0, high), 3) for _, _, high in intervals]
    return merged


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and Student's 95 % interval around it, of two or more values.

    >>> [round(x, 4) for x in t_interval([0.4, 0.5, 0.6])]  # 0.5 -+ 4.303 * 0.1 / sqrt(3)
    [0.5, 0.2516, 0.7484]
    """
    mean, half = statistics.fmean(values), T_95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


# Report --------------------------------------------------------------------------------------------------------------
def panel(results: dict[str, Any]) -> list[Curve]:
    """All curves of the figure: the three models, the control in their colours, and the ceiling."""
    colors = dict(zip(MODELS, (OKABE_ITO[1], OKABE_ITO[0], OKABE_ITO[2]), strict=True))
    lines = [
        Curve(label, r["accuracy"], r["low"], r["high"], colors[name])
        for name, label in MODELS.items()
        for r in [results["models"][name]["test"]]
    ]
    for name in RESAMPLED:
        label = f"{MODELS[name]}, resampled"
        lines.append(Curve(label, results["control"][name]["accuracy"], color=colors[name], line=":"))
    return [*lines, Curve("ideal reader", results["ideal"]["accuracy"], color="#333333", line="--")]


def table(results: dict[str, Any]) -> str:
    """Markdown, for the terminal and for README.md: accuracy by allowed attempts, then the probe, all in percent."""

    def cells(curve: dict[str, Any]) -> list[str]:
        bounds = zip(curve["accuracy"], curve["low"], curve["high"], strict=True)
        return [f"{100 * a:.1f} ±{100 * max(high - a, a - low):.1f}" for a, low, high in bounds]

    rows = [["attempts", *map(str, range(1, rollout.MAX_ATTEMPTS + 1)), "own again", "other again"]]
    for name, label in MODELS.items():
        shares = results["probe"][name]
        rows.append([label, *cells(results["models"][name]["test"]), *cells(shares["own"]), *cells(shares["other"])])
        if name in RESAMPLED:
            rows.append(["... resampled", *cells(results["control"][name]), "", ""])
    rows.append(["ideal reader", *(f"{100 * a:.1f}" for a in results["ideal"]["accuracy"]), "", ""])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head.

    >>> print(markdown([["model", "accuracy"], ["warm start", "45.2"]]))
    | model      | accuracy |
    | ---        | ---      |
    | warm start | 45.2     |
    """
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def meaning(results: dict[str, Any]) -> str:
    """What the measured numbers say, and what they do not."""
    curve = {name: results["models"][name]["test"]["accuracy"] for name in MODELS}
    own = {name: results["probe"][name]["own"]["accuracy"][0] for name in MODELS}
    other = {name: results["probe"][name]["other"]["accuracy"][0] for name in MODELS}
    resampled = results["control"]["warm_start"]["accuracy"][-1]
    multi, single, warm = (curve[name] for name in MODELS)
    ideal, most = results["ideal"]["accuracy"], rollout.MAX_ATTEMPTS
    made = {arm: constants_of(arguments) for arm, arguments in ARMS.items()}
    settings = [
        f"{MODELS[arm]} has KL weights of {', '.join(map(str, c['ppo.KL_COEF']))} by attempt and "
        f"{c['ppo.DIALOGUES']} dialogues a step"
        for arm, c in made.items()
    ]

    def points(difference: float) -> str:
        return f"{100 * difference:+.1f} points"

    return (
        f"A second attempt is worth {points(multi[1] - multi[0])} after multi-attempt RL (to {multi[1]:.2f}, and "
        f"{multi[-1]:.2f} at {most} attempts), {points(single[1] - single[0])} after single-turn RL on the "
        f"same number of generated tokens, and {points(warm[1] - warm[0])} for the warm start that both began with. "
        "Shown its own usual second answer as already failed, the multi-attempt model says it again in "
        f"{own['multi_attempt']:.0%} of the cases (single-turn {own['single_turn']:.0%}, warm start "
        f"{own['warm_start']:.0%}; a fixed list of guesses would in 100%); another wrong number it repeats in "
        f"{other['multi_attempt']:.1%} (single-turn {other['single_turn']:.0%}, warm start "
        f"{other['warm_start']:.0%}).\n\n"
        f"What this does not show: {toy.STAND_BY_SHARE:.0%} of the authors whom the warm start imitates stand by an "
        "answer that was called incorrect, and no author learns from it. So flat curves are partly built in, and so is "
        "the skill of finding the answer that has failed; RL turns its use around, from repeating to avoiding. "
        f"The arms differ in more than N, so that neither pays for the other's settings: {'; '.join(settings)}. "
        f"At one attempt multi-attempt RL is {points(multi[0] - single[0])} from "
        f"single-turn RL and {points(multi[0] - warm[0])} from the warm start. {most} independent samples of "
        f"the warm start, without any feedback, reach {resampled:.2f}; multi-attempt RL is "
        f"{points(multi[-1] - resampled)} from there. The best possible reader is at {ideal[0]:.2f} with one attempt "
        f"and {ideal[-1]:.2f} with {most}. And this is one kind of question and a model of {toy.LAYERS} "
        "layers, with settings chosen on such questions: a demonstration of the mechanism, no evidence about "
        "language models on mathematics."
    )


def renew_readme(text: str, block: str) -> str:
    """README.md with `block` between its two markers; unchanged if it has none.

    >>> renew_readme("a <!-- reproduce:begin -->old<!-- reproduce:end --> z", "new").split()
    ['a', '<!--', 'reproduce:begin', '-->', 'new', '<!--', 'reproduce:end', '-->', 'z']
    """
    begin, end = "<!-- reproduce:begin -->", "<!-- reproduce:end -->"
    return re.sub(f"({begin}).*?({end})", lambda m: f"{m[1]}\n{block}\n{m[2]}", text, flags=re.DOTALL)


def main() -> None:
    stages = {"demo": sys.modules[__name__], "evaluate": evaluate, "rollout": rollout}
    rollout.override_constants(sys.argv[1:], stages)
    seeds, out = parse_seeds(SEEDS), Path(OUT)
    with stopwatch(out, complete=(out / "results.json").is_file()):
        per_seed = {str(seed): run_seed(seed) for seed in seeds}
    minutes = float((out / "seconds").read_text()) / 60
    results = over_seeds(list(per_seed.values())) | {"seeds": per_seed if len(seeds) > 1 else seeds}
    interval = f"t over {len(seeds)} seeds" if len(seeds) > 1 else "Wilson (resampled: bootstrap) over problems"
    results |= {"interval": f"95 %, {interval}", "minutes": round(minutes, 1), "cores": os.cpu_count()}
    results["meaning"] = meaning(results)
    n = results["models"]["warm_start"]["test"]["n"]
    title = f"Median of nine numbers, two unreadable (n = {n}" + (f", {len(seeds)} seeds)" if len(seeds) > 1 else ")")
    draw({title: panel(results)}, out)
    write_atomically(out / "results.json", to_json(results))
    print("\n" + table(results), f"\n{LEGEND}\nIntervals: {results['interval']}.\n", results["meaning"], sep="\n")
    print(f"\n{out}/accuracy.png  {out}/results.json  ({minutes:.1f} minutes on {os.cpu_count()} cores)")
    if len(seeds) > 1 and Path("README.md").is_file():
        today = datetime.datetime.now(tz=datetime.UTC).date()
        made = (
            f"`python -m data.demo SEEDS={SEEDS} OUT={OUT}`, {today}, {minutes:.0f} minutes on {os.cpu_count()} cores."
        )
        legend = f"{LEGEND} Intervals: {results['interval']}. Made by {made}"
        block = f"\n{table(results)}\n\n{legend}\n\n{results['meaning']}\n"
        write_atomically(Path("README.md"), renew_readme(Path("README.md").read_text(encoding="utf-8"), block))
        Path("figures").mkdir(exist_ok=True)
        for kind in ("png", "svg"):
            shutil.copy(out / f"accuracy.{kind}", f"figures/toy.{kind}")


if __name__ == "__main__":
    main()
