"""Files that are whole or not there, and JSON Lines that survive a writer that was killed."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either there in full or not at all: beside its place, to the disk, then renamed."""
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def to_json(value: Any) -> str:
    """Indented JSON with each list of numbers on one line.

    >>> print(to_json({"accuracy": [0.5, None]}))
    {
     "accuracy": [0.5, null]
    }
    """
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[\d\s.,eE+\-nul]*\]", lambda flat: "[" + " ".join(flat[0][1:-1].split()) + "]", text)


def to_line(row: Any) -> str:
    """A row of a JSON Lines file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file, none if it does not exist. A last line without its end is left out: its
    writer was killed, or is still writing."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # bytes: the cut may be inside a character
    return [json.loads(line) for line in lines]


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to the end of a log."""
    with path.open("a", encoding="utf-8") as log:
        log.writelines(map(to_line, rows))


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows that a killed run logged after its last checkpoint: those steps will be repeated."""
    if path.is_file():
        write_atomically(path, "".join(to_line(row) for row in read_jsonl(path) if row["step"] <= step))


def fingerprint(*files: Path) -> str:
    """Hash of what the files contain."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def name_paths(paths: str, taken: str) -> dict[str, Path]:
    """Comma-separated paths by short names: a problem file's without its ending, a run's for the folders that ppo.py
    writes into it. Raises SystemExit for a name that occurs twice, or that is `taken`.

    >>> list(name_paths("data/toy/warm_start,runs/first/policy,runs/first/best", "average"))
    ['warm_start', 'first', 'first-best']
    """
    names: dict[str, Path] = {}
    for path in map(Path, paths.split(",")):
        absolute = path.absolute()
        name = absolute.stem if absolute.suffix in (".jsonl", ".parquet", ".csv") else absolute.name
        run = absolute.parent.name
        name = {"policy": run, "best": f"{run}-best"}.get(name, name)
        if name in names or name == taken:
            other = names.get(name, "the program's own word")
            raise SystemExit(f"{other} and {path} would both be named {name}; rename a folder or a file")
        names[name] = path
    return names
