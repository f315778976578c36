"""Checkpoints of a run, from which it resumes to the same numbers, and the policy as a Hugging Face folder.

Nothing is half-written: each is written beside its place, then renamed. A full disk leaves what was there whole.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from plumbing.constants import Count
from plumbing.files import read_jsonl

import torch
import torch.distributed as dist
from torch import Tensor, nn

KEEP_CHECKPOINTS: Count = 2  # the newest so many stay, and the best on the dev split (paper 2)


class Part(NamedTuple):
    """A model that is trained, and its optimiser."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turns a write that fails (a full disk) into one line that says what to do."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        raise SystemExit(
            f"{path} could not be written ({last_line(error)}); the run resumes from its last checkpoint"
        ) from error


def last_line(error: BaseException) -> str:
    """torch wraps an error in many lines, of which the last names it."""
    return (str(error).strip().splitlines() or [repr(error)])[-1].strip()[:200]


def list_checkpoints(folder: Path) -> list[Path]:
    """Those of a run that are complete, oldest first."""
    return sorted(folder.glob("checkpoints/step-??????"))


def collect_state(parts: Iterable[Part]) -> dict[str, Any]:
    """Models and optimisers as a checkpoint has them."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    state = {}
    for name, model, optimizer in parts:
        is_new = not optimizer.state
        weights, moments = get_state_dict(model, optimizer)
        if is_new:  # get_state_dict has made an empty step, so that there are moments; it must not count as one
            for value in optimizer.state.values():
                value["step"].zero_()
        state[name] = {"model": weights, "optimizer": moments}
    return state


def save(folder: Path, step: int, generated: int, parts: Iterable[Part], best: int) -> None:
    """Write checkpoints/step-000100, sharded, with the step and the generated tokens so far. The newest
    KEEP_CHECKPOINTS and that of step `best` stay. All ranks must call it."""
    import torch.distributed.checkpoint as dcp

    name = folder / "checkpoints" / f"step-{step:06d}"
    partial = name.with_suffix(".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
    dist.barrier()
    with clear_errors(partial):
        dcp.save({"parts": collect_state(parts), "step": step, "generated": generated}, checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(name)
        for old in list_checkpoints(folder)[:-KEEP_CHECKPOINTS]:
            if old.name != f"step-{best:06d}":
                shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, parts: list[Part]) -> tuple[int, int]:
    """The newest checkpoint into models and optimisers -> (step, generated tokens); (0, 0) where there is none.

    Raises SystemExit, naming the checkpoint, if it cannot be read.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_state_dict

    there = list_checkpoints(folder)
    if not there:
        return 0, 0
    state: dict[str, Any] = {"parts": collect_state(parts), "step": 0, "generated": 0}
    try:
        dcp.load(state, checkpoint_id=there[-1])
    except (Exception, CheckpointException) as error:  # whatever a damaged or foreign file makes of its reader
        cure = f"delete it; the run then resumes from {there[-2].name}" if there[1:] else "delete the run"
        raise SystemExit(f"{there[-1]} is damaged or of another model ({last_line(error)}): {cure}") from error
    for name, model, optimizer in parts:
        weights, moments = state["parts"][name]["model"], state["parts"][name]["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state["step"], state["generated"]


def export(folder: Path, lm: nn.Module, weights: Iterable[tuple[str, Tensor]], tokenizer: Any) -> None:
    """The policy as a Hugging Face folder, which transformers and vLLM open as it is. weights: by name, in the dtype to
    store. All ranks must call it."""
    whole = {name: tensor.cpu() for name, tensor in weights}
    if dist.get_rank() == 0:
        partial, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
        for left in (partial, old):  # by a run that was killed while it exported
            shutil.rmtree(left, ignore_errors=True)
        with clear_errors(partial):
            lm.save_pretrained(partial, state_dict=whole)
            lm.config.dtype = next(iter(whole.values())).dtype  # save_pretrained has noted that of the shards
            lm.config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if folder.is_dir():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def best_so_far(folder: Path, metric: str) -> tuple[int, float]:
    """(step, value) of the highest metric in the log, the first of equals; (0, -1) where there is none. Rank 0's log
    decides for all ranks."""
    steps = [(row["step"], row[metric]) for row in read_jsonl(folder / "metrics.jsonl") if metric in row]
    found = [max(steps, key=lambda step: step[1], default=(0, -1.0))]  # max() takes the first of equals
    dist.broadcast_object_list(found, src=0)
    return found[0]
