"""The processes that torchrun starts, and models spread over them by FSDP2. On a CPU they talk by gloo."""

import ctypes
import os
import resource
import signal
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from plumbing import engine

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

SHARD_RANKS: int = 0  # ranks that share one copy of the weights, others hold replicas (HSDP); 0 = those of a node
OFFLOAD: bool = False  # weights, gradients and Adam's moments stay in the CPU's memory: slower, for small GPUs
GRADIENT_CHECKPOINTING: bool = True  # recompute activations in the backward pass: a third more time, far less memory

PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent dies


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start_ranks() -> None:
    """Join torchrun's process group; without torchrun, be a group of one."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    else:  # should torchrun die, its ranks get SIGTERM, on which a training saves and ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    is_cuda = engine.find_gpu()
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if is_cuda and OFFLOAD and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's 1; vLLM makes none 1, too
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for optimisers on the CPU
        torch.set_num_threads(threads)
    # Ranks do not talk while attempts are generated; the long timeout is for the rank whose dialogues take longest. A
    # process that dies closes its connections, which ends the others at once; a machine without power does not.
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo", timeout=timedelta(hours=2))


def print_once(text: str) -> None:
    """Print, on rank 0 alone."""
    if dist.get_rank() == 0 and text:
        print(text, flush=True)


def all_sum(*values: Tensor | float) -> list[float]:
    """Each value added up over all ranks. All ranks must call it."""
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def moments(values: Tensor) -> tuple[float, float]:
    """Mean and variance of the values of all ranks. All ranks must call it."""
    count, total = all_sum(values.numel(), values.double().sum())
    (squares,) = all_sum((values.double() - total / count).square().sum())
    return total / count, squares / count


def gather_interleaved(mine: list[Any]) -> list[Any]:
    """The items of all ranks: the j-th of rank r becomes the (j * ranks + r)-th. All ranks must call it."""
    of_ranks: list[Any] = [mine]
    if dist.get_world_size() > 1:
        of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, mine)
    return [item for items in zip(*of_ranks, strict=True) for item in items]


def load_model(model: str, attention: str) -> nn.Module:
    """A causal language model with float32 master weights: bfloat16 ones would lose updates of a learning rate of
    5e-7. attention: the name under which transformers finds it. There is no dropout: an update has to start from the
    log-probabilities of the rollout. Raises SystemExit for models that are not computed here as they were trained."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    for name in config.to_dict():
        if name.endswith(("dropout", "pdrop")):
            setattr(config, name, 0.0)
    options = {"config": config, "dtype": torch.float32, "attn_implementation": attention}
    lm = AutoModelForCausalLM.from_pretrained(model, **options).train()
    for name in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(lm.config, name, None):
            raise SystemExit(f"{model}: its {name} is not computed here; take a model without (Qwen, Llama)")
    if GRADIENT_CHECKPOINTING:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def shard_size() -> int:
    """Ranks that share one copy of the weights."""
    return SHARD_RANKS or int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def shard(model: nn.Module, compute_dtype: str) -> Any:
    """FSDP2: a unit for each layer (the model's first ModuleList), and for a critic's head, which stays in float32; the
    rest, with the embedding that may be tied to the language model's head, in the root. Where more ranks exist than
    share a copy there are replicas, whose gradients are averaged (HSDP)."""
    world, together = dist.get_world_size(), shard_size()
    if world == together:
        mesh = init_device_mesh(device().type, (world,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device().type, (world // together, together), mesh_dim_names=("replica", "shard"))
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, compute_dtype), reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if OFFLOAD else OffloadPolicy(),
        "reshard_after_forward": False if together == 1 else None,  # None: for a layer's backward pass gather it again
    }
    if not OFFLOAD:
        model.to(device())
    for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        fully_shard(layer, **options)
    if hasattr(model, "head"):
        fully_shard(model.head, **options | {"mp_policy": MixedPrecisionPolicy(torch.float32, torch.float32)})
    return fully_shard(model, **options)


def hold_until_last(model: Any, is_last: bool) -> None:
    """Before a backward pass: gradients stay on this rank until the last micro-batch of an optimiser step. So do the
    gathered weights (in the compute dtype) of a rank that owns all: to gather them again would only copy them."""
    model.set_requires_gradient_sync(is_last)
    model.set_reshard_after_backward(is_last or shard_size() > 1)


def drop_gathered(model: nn.Module) -> None:
    """Free the gathered weights that a forward pass has left for a backward pass, when there is none."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_weights(model: nn.Module, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor in dtype), one by one. All ranks must take them all."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().to(getattr(torch, dtype)).full_tensor()  # cast first: half the traffic


def peak_memory() -> float:
    """GiB at the most so far: of the GPU, without the pool of an engine that sleeps meanwhile; or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30 - engine.pool_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
