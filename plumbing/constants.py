def override_constants(
    arguments: Sequence[str], stages: dict[str, ModuleType], presets: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Set constants from NAME=value arguments and return every constant of every stage as it now is, for config.json.

    stages: name -> module, the running script first. NAME is looked for in that order; "rollout.NAME" names the stage.
    PRESET=a,b applies the named groups of `presets` first, in order, then the arguments. A value has the type of the
    constant it replaces. Raises SystemExit, with the nearest name, for a name or a value that does not fit.
    """

    def set_constant(name: str, value: Any) -> None:
        stage, _, bare = name.rpartition(".")
        owners = [s for s in stages if stage in ("", s) and bare.isupper() and bare in stages[s].__annotations__]
        if not owners:
            known = [n for s in stages for c in stages[s].__annotations__ if c.isupper() for n in (c, f"{s}.{c}")]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise SystemExit(f"{name}: no such constant; the nearest is {near[0]}")
        owner = stages[owners[0]]
        any_length = ... in typing.get_args(owner.__annotations__[bare])  # tuple[float, ...]
        setattr(owner, bare, parse_value(name, value, getattr(owner, bare), any_length))

    pairs = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise SystemExit(f"{argument}: expected NAME=value")
        pairs[name] = value
    first = next(iter(stages.values()))
    for preset in filter(None, pairs.get("PRESET", getattr(first, "PRESET", "")).split(",")):
        if preset not in (presets or {}):
            raise SystemExit(f"PRESET={preset}: no such preset; there are {', '.join(presets or {})}")
        for name, value in presets[preset].items():
            set_constant(name, value)
    for name, value in pairs.items():
        set_constant(name, value)
    return {
        f"{stage}.{name}": getattr(module, name)
        for stage, module in stages.items()
        for name in module.__annotations__
        if name.isupper()
    }


def parse_value(name: str, value: Any, default: Any, any_length: bool = False) -> Any:
    """`value` (text from the command line, or a preset's value) as the type of `default`; a tuple is as long, too,
    unless any_length.

    >>> parse_value("SEED", "3", 0), parse_value("WHITEN", "0", True), parse_value("BETAS", "0.9,0.99", (0.9, 0.95))
    (3, False, (0.9, 0.99))
    """
    kind = type(default)
    try:
        if kind is bool:
            return {"0": False, "1": True, "false": False, "true": True}[str(value).lower()]
        if kind is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            defaults = default[:1] * len(parts) if any_length else default
            return tuple(parse_value(name, v, d) for v, d in zip(parts, defaults, strict=True))
        return kind(value)
    except (KeyError, ValueError) as error:
        raise SystemExit(f"{name}={value}: expected a value like {default!r} ({kind.__name__})") from error


def config_of(constants: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds: every constant of the stages that train, and which problems there were."""
    sha256 = hashlib.sha256(Path(constants["ppo.TRAIN_DATA"]).read_bytes()).hexdigest()
    return json.loads(json.dumps(constants | {"SHA-256 of TRAIN_DATA": sha256}))


def open_run(folder: Path, constants: dict[str, Any]) -> None:
    """Create runs/RUN with its config.json. Raises SystemExit if a run there has begun with other constants or other
    problems; constants that have to do with the hardware may differ."""
    config, constants = folder / "config.json", config_of(constants)
    if (folder / "metrics.jsonl").is_file():
        there = json.loads(config.read_text(encoding="utf-8"))
        names = sorted((there.keys() | constants.keys()) - HARDWARE)
        differ = [k for k in names if there.get(k) != constants.get(k)]
        if differ:
            lines = "\n".join(f"  {k}: {there.get(k)} there, {constants.get(k)} now" for k in differ)
            raise SystemExit(f"{folder} is a run with other constants; take another RUN or delete it:\n{lines}")
    elif dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config, json.dumps(constants, indent=1))
