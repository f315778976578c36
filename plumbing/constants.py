"""The constants of the stages: what a command line and presets change, and what a run keeps of them.

A constant is an annotated UPPER_CASE name at the top of a module, such as `STEPS: int = 1280` or
`REWARD: Literal["outcome", "per_attempt"] = "outcome"`. The file's value runs unless a preset or NAME=value changes it.
`modules` is everywhere {name: module}, the running script first; "rollout.SEED" names a module's constant in full.
"""

import ast
import difflib
import hashlib
import json
import math
import os
import subprocess
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple

from plumbing.files import write_atomically

Count = Annotated[int, (1, math.inf)]  # annotations of constants may state their bounds
Share = Annotated[float, (0, 1)]
Modules = dict[str, ModuleType]
Presets = dict[str, dict[str, Any]]

# Files of plumbing whose constants only say where and how fast a run computes: it may be resumed with others.
WHERE_AND_HOW_FAST = ("engine", "packing", "ranks", "checkpoints", "logs", "sandbox")


class Change(NamedTuple):
    """What a constant becomes, and who says so: "preset toy" or "command line"."""

    value: Any
    by: str


def list_constants(modules: Modules) -> Iterator[tuple[str, str, Any]]:
    """(module's name, constant's name, annotation) of every constant."""
    for module_name, module in modules.items():
        for name, annotation in module.__annotations__.items():
            if name.isupper():
                yield module_name, name, annotation


def parse_changes(arguments: Sequence[str], modules: Modules, presets: Presets | None = None) -> dict[str, Change]:
    """NAME=value arguments, after the presets that PRESET names, as {"module.NAME": Change}. Nothing is changed yet.

    A bare NAME is the constant of the first module that has it. Presets apply in order, then the arguments. Raises
    SystemExit, with the nearest name, for a name that does not exist or a value that does not fit.
    """
    presets = presets or {}
    annotations = {f"{module}.{name}": annotation for module, name, annotation in list_constants(modules)}
    full_names = {name: name for name in annotations}
    for full_name in annotations:
        full_names.setdefault(full_name.rpartition(".")[2], full_name)
    changes: dict[str, Change] = {}

    def change(name: str, value: Any, by: str) -> None:
        if name not in full_names:
            nearest = difflib.get_close_matches(name, full_names, n=1, cutoff=0)[0]
            raise SystemExit(f"{name}: no such constant; the nearest is {nearest}")
        full_name = full_names[name]
        changes[full_name] = Change(parse_value(name, value, annotations[full_name]), by)

    pairs: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise SystemExit(f"{argument}: expected NAME=value")
        pairs[name] = value
    script = next(iter(modules.values()))
    for preset in filter(None, pairs.get("PRESET", getattr(script, "PRESET", "")).split(",")):
        if preset not in presets:
            raise SystemExit(f"PRESET={preset}: no such preset; there are {', '.join(presets)}")
        for name, value in presets[preset].items():
            change(name, value, f"preset {preset}")
    for name, text in pairs.items():
        change(name, text, "command line")
    return changes


def parse_value(name: str, value: Any, annotation: Any) -> Any:
    """`value`, the text of a command line or a preset's own value, as what the annotation asks for.

    >>> parse_value("SEED", "3", int), parse_value("WHITEN", "0", bool), parse_value("REWARD", "a", Literal["a", "b"])
    (3, False, 'a')
    >>> parse_value("BETAS", ".9,.99", tuple[float, float]), parse_value("KL_COEF", "0.1,0.01,0", tuple[float, ...])
    ((0.9, 0.99), (0.1, 0.01, 0.0))
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    expected = annotation.__name__ if isinstance(annotation, type) and not origin else str(annotation)
    try:
        if origin is Literal:
            expected = " or ".join(repr(choice) for choice in arguments)
            return {str(choice): choice for choice in arguments}[str(value)]
        if origin is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            kinds = [arguments[0]] * len(parts) if arguments[1:] == (...,) else arguments
            return tuple(parse_value(name, part, kind) for part, kind in zip(parts, kinds, strict=True))
        if origin is Annotated:
            number, (low, high) = parse_value(name, value, arguments[0]), arguments[1]
            expected = f"a number from {low} to {high}"
            if not low <= number <= high:
                raise ValueError(number)
            return number
        if annotation is bool:
            return {"0": False, "1": True, "false": False, "true": True}[str(value).lower()]
        return int(str(value)) if annotation is int else annotation(value)  # int() alone would make 2 of a file's 2.5
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{name}={value}: expected {expected}") from error


def check_early(arguments: Sequence[str], stages: Sequence[str], presets: Presets) -> None:
    """Refuse what parse_changes refuses, before torch is imported: of each file only the constants are run."""
    root, modules = Path(__file__).parent.parent, {}
    for name in (*stages, *(f"plumbing/{file}" for file in WHERE_AND_HOW_FAST)):
        tree = ast.parse((root / f"{name}.py").read_text(encoding="utf-8"))
        tree.body = [
            line for line in tree.body if isinstance(line, ast.AnnAssign) and ast.unparse(line.target).isupper()
        ]
        module = modules[name.removeprefix("plumbing/")] = ModuleType(name)
        module.__dict__.update(Count=Count, Share=Share, Literal=Literal)
        exec(compile(tree, name, "exec"), module.__dict__)
    parse_changes(arguments, modules, presets)


def snapshot(modules: Modules) -> dict[str, Any]:
    """{"module.NAME": value} of every constant as it is now."""
    return {f"{module}.{name}": getattr(modules[module], name) for module, name, _ in list_constants(modules)}


def set_constants(arguments: Sequence[str], modules: Modules, presets: Presets | None = None) -> str:
    """Apply parse_changes() -> lines that say which constants are not what their file says, and who changed them.

    Raises SystemExit as parse_changes does, and where a file itself has a value that its annotation does not allow.
    """
    for module, name, annotation in list_constants(modules):
        parse_value(f"{module}.{name}", getattr(modules[module], name), annotation)
    changes, in_files = parse_changes(arguments, modules, presets), snapshot(modules)
    for full_name, change in changes.items():
        module, _, name = full_name.partition(".")
        setattr(modules[module], name, change.value)
    lines = [
        f"{full_name} = {change.value!r} ({change.by}; the file says {in_files[full_name]!r})"
        for full_name, change in changes.items()
        if change.value != in_files[full_name]
    ]
    return "\n".join(lines)


# What a run keeps: config.json ----------------------------------------------------------------------------------------
def code_version() -> str:
    """The commit of the code that runs, "..., edited" if files differ from it; "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12"]
    command += ["--dirty=, edited", "--exclude=*"]  # no tag in place of the commit
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def open_run(folder: Path, values: dict[str, Any], problems: Path) -> None:
    """Begin a run: write its config.json, with all constants, the commit, and which file of problems they ran with. Or
    resume one: raises SystemExit, with the difference, if it began with constants or problems that decide on something
    else. Those of WHERE_AND_HOW_FAST may change; other code is only reported."""
    path, is_lead = folder / "config.json", os.environ.get("RANK", "0") == "0"
    sha256 = hashlib.sha256(problems.read_bytes()).hexdigest()
    now = json.loads(json.dumps({"code": code_version(), "SHA-256 of the problems": sha256} | values))
    if not (folder / "metrics.jsonl").is_file():  # no step has been made
        if is_lead:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(now, indent=1))
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    deciding = [n for n in then | now if n != "code" and n.partition(".")[0] not in WHERE_AND_HOW_FAST]
    lines = [f"  {n}: {then.get(n)} there, {now.get(n)} now" for n in deciding if then.get(n) != now.get(n)]
    if lines:
        raise SystemExit("\n".join([f"{folder} is a run with other constants; take another RUN or delete it:", *lines]))
    if is_lead and then["code"] != now["code"]:
        print(f"{folder} began with code {then['code']}, this is {now['code']}: its numbers may differ from here on")


def require(condition: Any, message: str) -> None:
    """Raises SystemExit with the message where constants do not fit each other."""
    if not condition:
        raise SystemExit(message)
