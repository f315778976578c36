"""What the experiments share: worlds, trainings side by side, evaluations, means over seeds, and what is written.

Everything that is done already is not done again, so an experiment that was stopped continues when it is called again.
An experiment is a module (demo.py, score.py, ...) with its own constants, SEEDS and OUT among them, and with
    LEGEND                      what the table shows
    run_seed(seed, folder)      -> the results of a seed
    make_table(results)         -> the table, in Markdown
"""

import contextlib
import datetime
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from plumbing.constants import set_constants
from plumbing.files import read_jsonl, to_json, write_atomically

from tqdm import tqdm

TRAINING: str = ""  # more arguments for ppo.py in all trainings, spaces between, such as "TOKEN_BUDGET=20000 LAMBDA=1"
SIDE_BY_SIDE: int = 2  # trainings at a time, each on one thread
EVALUATION_RANKS: int = 2  # processes that share an evaluation, each on one thread

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # of child processes; taken now, before vLLM adds to it
# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; from the tenth on the last, which is a little too large
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# Worlds, trainings, evaluations ---------------------------------------------------------------------------------------
def make_world(module: str, out: Path, *arguments: str) -> Path:
    """The folder of a world (median.py, arrows.py or programs.py)."""
    command = [sys.executable, "-m", f"experiments.{module}", f"OUT={out}", *arguments]
    run_command(command, OMP_NUM_THREADS=str(os.cpu_count()))
    return out


def read_json(path: Path) -> dict[str, Any]:
    """Such as a world's made.json, or a run's config.json: its constants by their full names ("ppo.SEED")."""
    return json.loads(path.read_text(encoding="utf-8"))


class Training:
    """A run of ppo.py as a child process, from a world's warm start unless the arguments name another model.

    folder: of the run; its log is written next to it. after: the folder of a run that has to be finished before this
    one starts.
    """

    def __init__(
        self, name: str, folder: Path, seed: int, world: Path, arguments: Sequence[str], after: Path | None = None
    ):
        self.label, self.folder, self.after = f"seed {seed}, {name}", folder, after
        self.arguments = [f"SEED={seed}", f"MODEL={world}/warm_start", f"TRAIN_DATA={world}/train.jsonl", *arguments]
        self.arguments += [*TRAINING.split(), f"RUN={os.path.relpath(folder, 'runs')}"]
        self.log = folder.with_name(f"{folder.name}.log")
        self.bar: tqdm | None = None

    def start(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "ppo.py", *self.arguments]
        with self.log.open("ab") as log:
            # In a process group of its own, which Ctrl-C does not reach: it is asked to save and end instead.
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, process_group=0)

    def show_progress(self) -> None:
        """Move the bar to the last step in metrics.jsonl. The time left is computed from the steps that were seen."""
        rows = read_jsonl(self.folder / "metrics.jsonl")
        if not rows:
            return
        budget = rows[-1]["token_budget"] or None
        tokens = min(rows[-1]["generated_tokens"], budget or math.inf)
        if self.bar is None:
            self.bar = tqdm(desc=self.label, initial=tokens, total=budget, unit=" tokens", unit_scale=True)
        if tokens != self.bar.n:
            self.bar.update(tokens - self.bar.n)
            self.bar.set_postfix(reward=f"{rows[-1]['reward']:.2f}", solved=f"{rows[-1]['accuracy']:.2f}")

    def check_end(self) -> None:
        """Raises SystemExit, with the end of the log, unless the run is finished."""
        if self.process.returncode or not (self.folder / "policy").is_dir():
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
            raise SystemExit("\n".join([*tail, f"{self.folder} was not finished; its whole log is {self.log}"]))


def run_trainings(trainings: Sequence[Training]) -> None:
    """Run SIDE_BY_SIDE trainings at a time, in this order.

    Each is started even if it is finished: ppo.py then ends at once, or says that its constants differ from those of
    the run. If one fails, the others are asked to save and end.
    """
    waiting, running = list(trainings), list[Training]()
    try:
        while waiting or running:
            while waiting and len(running) < SIDE_BY_SIDE:
                if waiting[0].after and not (waiting[0].after / "policy").is_dir():
                    break
                running.append(waiting.pop(0))
                running[-1].start()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[0].process.wait(timeout=0.5)
            for training in list(running):
                has_ended = training.process.poll() is not None  # asked first, so that the last step is shown, too
                training.show_progress()
                if has_ended:
                    training.check_end()
                    running.remove(training)
    finally:
        for training in running:
            training.process.terminate()
        for training in running:
            training.process.wait()


def evaluate_models(models: Sequence[Path], world: Path, out: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run evaluate.py on the world's test problems, with prompts and limits as in the first model's training -> its
    results.json."""
    config = read_json(models[0].parent / "config.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(EVALUATION_RANKS), "evaluate.py"]
    command += [f"{name}={config[f'rollout.{name}']}" for name in ("PROMPT", "FEEDBACK", "MAX_ATTEMPT_TOKENS")]
    command += [f"MODEL={','.join(map(str, models))}", f"BENCHMARKS={world}/test.jsonl", f"OUT={out}", *arguments]
    run_command(command, quiet=True)
    return read_json(out / "results.json")


def run_command(command: list[str], quiet: bool = False, **environment: str) -> None:
    """Run to the end; quiet: show only what it writes to stderr. If this process is stopped, it asks the child to end,
    and waits: a child that is killed leaves its own children running."""
    stdout = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(command, stdout=stdout, env=ENVIRONMENT | environment)
    try:
        if code := process.wait():
            raise SystemExit(f"{' '.join(command)} ended with {code}")
    finally:
        process.terminate()
        process.wait()


# Seeds ----------------------------------------------------------------------------------------------------------------
def run_seeds(experiment: ModuleType) -> dict[str, Any]:
    """Run each seed -> the mean results, with those of each seed under "seeds"."""
    folder = Path(experiment.OUT)
    per_seed = {str(seed): experiment.run_seed(seed, folder / f"seed-{seed}") for seed in experiment.SEEDS}
    over = f"t over {len(per_seed)} seeds" if len(per_seed) > 1 else "Wilson or bootstrap over problems"
    return average_seeds(list(per_seed.values())) | {"seeds": per_seed, "interval": f"95 %, {over}"}


def average_seeds(results: Sequence[Any], bound: int = 0) -> Any:
    """The results of several seeds as one of the same form: numbers become means (bound 0), or bounds of t_interval (1
    and 2) under "low" and "high"; counts (integers) become sums; text is the first seed's.

    >>> average_seeds([{"n": 10, "x": {"accuracy": [v], "low": [0.0], "high": [1.0]}} for v in (0.4, 0.5)])
    {'n': 20, 'x': {'accuracy': [0.45], 'low': [-0.1853], 'high': [1.0853]}}
    """
    first = results[0]
    if len(results) == 1 or isinstance(first, str):
        return first
    if None in results:  # what a seed does not define, such as the repeats of first attempts
        return None
    if isinstance(first, int):
        return sum(results)
    if isinstance(first, float):
        return t_interval(results)[bound]
    if isinstance(first, list):
        return [average_seeds(column, bound) for column in zip(*results, strict=True)]
    merged = {key: average_seeds([result[key] for result in results]) for key in first if key not in ("low", "high")}
    if "low" in first:
        values = [center(result) for result in results]
        merged |= {"low": average_seeds(values, 1), "high": average_seeds(values, 2)}
    return merged


def center(measured: dict[str, Any]) -> Any:
    """What "low" and "high" are the bounds of."""
    return measured["value"] if "value" in measured else measured["accuracy"]


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the bounds of Student's 95 % interval around it, of two or more values.

    >>> t_interval([0.4, 0.5, 0.6])  # 0.5 -+ 4.303 * 0.1 / sqrt(3)
    (0.5, 0.251566, 0.748434)
    """
    t = T_95[min(len(values) - 2, len(T_95) - 1)]
    mean, half = statistics.fmean(values), t * statistics.stdev(values) / len(values) ** 0.5
    return round(mean, 6), round(mean - half, 6), round(mean + half, 6)


# What is written ------------------------------------------------------------------------------------------------------
def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head.

    >>> print(format_table([["model", "accuracy"], ["warm start", "45.2"]]))
    | model      | accuracy |
    | ---        | ---      |
    | warm start | 45.2     |
    """
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def format_share(value: float | None, low: float | None = None, high: float | None = None, sign: str = "") -> str:
    """In percent, with the longer side of its interval, if there is one; "" if there is no value.

    >>> format_share(0.4, 0.37, 0.431), format_share(0.4, sign="+"), format_share(None)
    ('40.0 ±3.1', '+40.0', '')
    """
    if value is None:
        return ""
    text = f"{100 * value:{sign}.1f}"
    return text if low is None or high is None else f"{text} ±{100 * max(high - value, value - low):.1f}"


def format_curve(curve: dict[str, Any], sign: str = "") -> list[str]:
    """format_share of each number of attempts."""
    columns = zip(center(curve), curve["low"], curve["high"], strict=True)
    return [format_share(*bounds, sign=sign) for bounds in columns]


def main(experiment: ModuleType) -> dict[str, Any]:
    """Run an experiment, as the command line says; write OUT/results.json and OUT/table.md and print the latter -> the
    results. Ctrl-C and SIGTERM become SystemExit, so that child processes are ended first."""
    name, begin = Path(sys.argv[0]).stem, time.monotonic()
    if changed := set_constants(sys.argv[1:], {name: experiment, "runs": sys.modules[__name__]}):
        print(changed)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("\nstopped; the same command continues from here"))
    out, results = Path(experiment.OUT), run_seeds(experiment)
    results["minutes"] = round((time.monotonic() - begin) / 60, 1)
    command = " ".join([f"python -m experiments.{name}", *sys.argv[1:]])
    made = f"Made by `{command}`, {datetime.date.today()}; this call took {results['minutes']:.0f} minutes"
    words = f"{experiment.LEGEND} Intervals: {results['interval']}. {made} on {os.cpu_count()} cores."
    table = f"{experiment.make_table(results)}\n\n{words}\n"
    write_atomically(out / "results.json", to_json(results))
    write_atomically(out / "table.md", table)
    print(f"\n{table}\nAll of it is in {out}")
    return results
