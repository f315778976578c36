def all_sum(*values: Tensor | float) -> Tensor:
    """The values added up over all ranks, (len(values),) float64. All ranks must call it; alone, it is the values."""
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def start_ranks() -> None:
    """Join torchrun's process group; without torchrun be a group of one."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Nobody talks while attempts are generated; the long timeout is for the rank whose dialogues take longest.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2))


def share(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Dialogues of a mini-batch -> those of each rank, so that ranks have about equally many tokens: the longest first,
    each to the rank that has fewest so far. Rank 0 trains on 9 + 1 tokens here, rank 1 on 5 + 4:
    >>> share([4, 9, 1, 5], ranks=2)
    [[1, 2], [3, 0]]
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min(range(ranks), key=lambda r: (tokens[r], len(shares[r])))
        shares[rank].append(index)
        tokens[rank] += lengths[index]
    return shares


def load_model(model: str) -> nn.Module:
    """Float32 master weights: bfloat16 ones would swallow updates of a learning rate of 5e-7."""
    attention = "varlen" if by_kernel() else "sdpa"
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention).train()
    for name in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(lm.config, name, None):
            raise SystemExit(f"{model}: its {name} is not computed here; take a model without (Qwen, Llama)")
    if GRADIENT_CHECKPOINTING:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
    """FSDP2: a unit a block; the rest, with the embedding that may be tied to the head, in the root. SHARD_RANKS ranks
    share one copy of the weights; with more ranks than that there are replicas, whose gradients are averaged (HSDP)."""
    world = dist.get_world_size()
    together = SHARD_RANKS or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    shape, names = (
        ((world,), ("shard",)) if together == world else ((world // together, together), ("replica", "shard"))
    )
    options = {
        "mesh": init_device_mesh(device().type, shape, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, COMPUTE_DTYPE), reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if OFFLOAD else OffloadPolicy(),
    }
    if not OFFLOAD:
        model.to(device())
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def peak_memory() -> float:
    """GiB at the most so far: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
