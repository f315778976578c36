"""Files that are whole or not there, and JSON Lines that survive a writer that was killed."""

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
