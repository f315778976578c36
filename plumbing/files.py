def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either there in full or not at all."""
    beside = path.with_name(f".{path.name}.writing")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a last one without its end was cut off when its writer was killed."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # bytes: the cut may be inside a character
    return [json.loads(line) for line in lines]


def to_json(value: Any) -> str:
    """Indented JSON with each list of numbers on one line.

    >>> print(to_json({"accuracy": [0.5, None]}))
    {
     "accuracy": [0.5, null]
    }
    """
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[\d\s.,eE+\-nul]*\]", lambda flat: "[" + " ".join(flat[0][1:-1].split()) + "]", text)


def to_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows behind those of a log. A full disk may leave half of one, which keep_until() drops."""
    try:
        with path.open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise SystemExit(f"{path} could not be written ({error}); the run goes on from its last checkpoint") from error


def keep_until(path: Path, step: int) -> None:
    """Drop the rows of a log that a killed run wrote behind its last checkpoint: those steps will be done again."""
    if path.is_file():
        kept = [row for row in read_records(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
