def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoints/step-??????"))


@contextlib.contextmanager
def writing(partial: Path) -> Iterator[None]:
    """Turns a disk that is full into a clear end, which leaves nothing half-written and all checkpoints whole."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        there = [path.name for path in checkpoints(partial.parent.parent) + checkpoints(partial.parent)]
        behind = f"from {there[-1]}" if there else "at its beginning"
        raise SystemExit(f"{partial} could not be written ({last_line(error)}); the run goes on {behind}") from error


def save(folder: Path, step: int, generated: int, learner: Learner) -> Future:
    """Write checkpoints/step-000100.partial: models and optimisers, sharded, and the step -> done when it is written,
    with ASYNC_SAVE while the run goes on. All ranks must call it, and publish() behind it."""
    partial = folder / "checkpoints" / f"step-{step:06d}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
    dist.barrier()
    state = {"parts": gather_state(learner), "step": step, "generated": generated}
    written: Future = Future()
    with writing(partial):
        if ASYNC_SAVE:
            return dcp.async_save(state, checkpoint_id=partial, process_group=saving_group())
        written.set_result(dcp.save(state, checkpoint_id=partial))
    return written


@functools.cache
def saving_group() -> dist.ProcessGroup:
    """Ranks that write behind a step talk among themselves: in the trainer's group they would cut into its talk."""
    return dist.new_group(backend="gloo")


def publish(folder: Path, step: int, written: Future, best: int) -> None:
    """Wait for a checkpoint and give it its name. The newest KEEP_CHECKPOINTS and that of step `best` stay. All ranks
    must call it. A failure leaves the checkpoints before it whole."""
    name = folder / "checkpoints" / f"step-{step:06d}"
    partial = name.with_name(name.name + ".partial")
    with writing(partial):
        written.result()
    dist.barrier()
    if dist.get_rank() == 0:
        partial.rename(name)
        for old in checkpoints(folder)[:-KEEP_CHECKPOINTS]:
            if old.name != f"step-{best:06d}":
                shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, learner: Learner) -> tuple[int, int]:
    """The newest checkpoint into models and optimisers -> (step, generated tokens); (0, 0) where there is none.

    Raises SystemExit, naming the checkpoint and the one before it, if it cannot be read.
    """
    *older, newest = [None, *checkpoints(folder)]
    if newest is None:
        return 0, 0
    state = {"parts": gather_state(learner), "step": 0, "generated": 0}
    try:
        dcp.load(state, checkpoint_id=newest)
    except (Exception, CheckpointException) as error:  # whatever a damaged or foreign file makes of its reader
        before = f"it resumes from {older[-1].name}" if older and older[-1] else "it starts anew"
        raise SystemExit(
            f"{newest} is damaged or of another model ({last_line(error)}): delete it and start again; {before}"
        ) from error
    for name, model, optimizer in learner.trained():
        weights, moments = state["parts"][name]["model"], state["parts"][name]["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state["step"], state["generated"]


def gather_state(learner: Learner) -> dict[str, Any]:
    """Models and optimisers as the checkpoint has them."""
    idle = [optimizer for _, _, optimizer in learner.trained() if not optimizer.state]
    states = {name: get_state_dict(model, optimizer) for name, model, optimizer in learner.trained()}
    for optimizer in idle:  # torch has made it one step of nothing, to have moments to speak of; that was none
        for moments in optimizer.state.values():
            moments["step"].zero_()
    return {name: {"model": weights, "optimizer": moments} for name, (weights, moments) in states.items()}


def last_line(error: BaseException) -> str:
    """The most telling line of an error that torch has wrapped in many."""
    lines = [line.strip() for line in str(error).splitlines() if "Error" in line or "error" in line]
    return (lines or [repr(error)])[-1][:200]


def export(folder: Path, actor: Actor, tokenizer: Any) -> None:
    """The policy as a Hugging Face folder, which transformers and vLLM open as it is. All ranks must call it."""
    weights = {name: tensor.cpu() for name, tensor in named_weights(actor)}
    if dist.get_rank() == 0:
        partial, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
        for left in (partial, old):  # by a run that was killed while it exported
            shutil.rmtree(left, ignore_errors=True)
        with writing(partial):
            actor.lm.save_pretrained(partial, state_dict=weights)
            actor.lm.config.dtype = getattr(torch, COMPUTE_DTYPE)  # save_pretrained has put down that of the shards
            actor.lm.config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if folder.is_dir():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def best_so_far(folder: Path, goal: str) -> tuple[int, float]:
    """(step, value) of the highest metric `goal` in the log, the first of equals, by rank 0's copy of it; (0, -1) where
    there is none."""
    rows = [row for row in read_records(folder / "metrics.jsonl") if goal in row]
    found = [max(((row[goal], -row["step"]) for row in rows), default=(-1.0, 0))]
    dist.broadcast_object_list(found, src=0)
    value, step = found[0]
    return -step, value
