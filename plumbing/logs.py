def model_flops(lm: nn.Module, tokens: int, lengths: Iterable[int], actions: int) -> float:
    """Floating-point operations that a whole update needs, on all ranks together: 2 a weight and token for a forward
    pass, 4 for a backward pass, attention likewise by the pairs that it looks at. What checkpointing computes again is
    not counted. lm: the policy, or its shape; tokens: of the tokenizer."""
    lengths, config = list(lengths), lm.config
    weights = sum(p.numel() for p in lm.model.layers.parameters())
    pairs = sum(n * n for n in lengths) / 2
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    body = 2 * weights * sum(lengths) + 4 * pairs * width * config.num_hidden_layers
    head = 2 * actions * config.hidden_size * tokens
    reference, critic = has_reference(), ESTIMATOR == "gae"
    once = body * (1 + reference + critic) + head * (1 + reference)  # prepare(): no gradients
    return once + EPOCHS * 3 * (body * (1 + critic) + head)


def plan(tokens: int, problems: int, dev: int) -> str:
    """What will happen, for the terminal: batches, memory and the least time that the hardware allows."""
    world, gib = dist.get_world_size(), 2**30
    with torch.device("meta"):  # the shape, no weights
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL))
    config, critic = lm.config, ESTIMATOR == "gae"
    weights = sum(p.numel() for p in lm.parameters())
    owners = SHARD_RANKS or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    # Bytes a weight: itself, its gradient and Adam's two moments, 4 each; the reference has no more than itself. Whole
    # on every rank are the gradients that add up over micro-batches.
    sharded = weights * (16 * (1 + critic) + 4 * has_reference()) / owners
    whole = weights * 4 * (1 + critic) * (owners > 1)
    item = getattr(torch, COMPUTE_DTYPE).itemsize
    kept = 1 if GRADIENT_CHECKPOINTING else 34  # activations of a layer, in hidden states (34: arXiv 2205.05198, eq. 2)
    passes = MAX_TOKENS_PER_MICRO_BATCH * config.hidden_size * item * (config.num_hidden_layers * kept + 34)
    passes += 4 * LOGITS_CHUNK * tokens * 4 + 2 * config.vocab_size * config.hidden_size * item
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(device()).total_memory / gib
        engine = rollout.GPU_MEMORY * room
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gib / world
        engine = rollout.CPU_CACHE_MIB / 1024 + 2 * weights * item / gib  # as they are, and packed
    trainer = sharded * (not OFFLOAD) / gib
    asleep = torch.cuda.is_available()  # the engine, while the trainer works; on a CPU it keeps its memory
    updating, playing = trainer + engine * (not asleep) + (whole + passes) / gib, trainer + engine
    cure = "; more ranks, a smaller micro-batch, OFFLOAD=1 or a smaller GPU_MEMORY would"
    lines = [
        f"{problems:,} problems to train on, {dev} to choose the checkpoint; {world} rank{'s' * (world > 1)}",
        f"a rollout: {DIALOGUES // rollout.SAMPLES_PER_PROMPT} problems x {rollout.SAMPLES_PER_PROMPT} = {DIALOGUES} "
        f"dialogues of up to {rollout.MAX_ATTEMPTS} attempts",
        f"a step: {EPOCHS} x {DIALOGUES // MINI_BATCH} updates of {MINI_BATCH} dialogues, in micro-batches of at most "
        f"{MAX_TOKENS_PER_MICRO_BATCH:,} tokens",
        f"memory of a rank, estimated: {updating:.1f} GiB to train, {playing:.1f} to play, {trainer:.1f} of it weights "
        f"and optimisers, of {room:.0f}: "
        + ("fits" if max(updating, playing) < 0.95 * room else f"will NOT fit{cure}"),
    ]
    if torch.cuda.is_available():
        longest = rollout.CONTEXT // 2  # a guess: half of the context
        flops = model_flops(lm, tokens, [longest] * DIALOGUES, longest * DIALOGUES)
        hours = STEPS * flops / (0.4 * PEAK_TFLOPS * 1e12 * world) / 3600
        lines.append(
            f"updates, projected at 40 % of {PEAK_TFLOPS:.0f} TFLOPS and {longest} tokens a dialogue: {hours:.1f} h"
        )
    return "\n".join(lines)


class Tracker:
    """metrics.jsonl, TensorBoard or Weights & Biases, and a line on the terminal; rank 0's alone."""

    def __init__(self, folder: Path, step: int, constants: dict[str, Any]):
        self.path = folder / "metrics.jsonl"
        self.writer = None
        if TRACK == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        elif TRACK == "wandb":
            import wandb

            name = {"name": RUN, "id": RUN.replace("/", "-"), "resume": "allow"}
            wandb.init(project="multi-attempt", dir=folder, config=constants, **name)

    def log(self, metrics: dict[str, float], bar: tqdm) -> None:
        append(self.path, [metrics])
        numbers = {name: value for name, value in metrics.items() if name != "step" and value is not None}
        if TRACK == "tensorboard":
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, metrics["step"])
        elif TRACK == "wandb":
            import wandb

            wandb.log(numbers, step=metrics["step"])
        cells = [f"{label} {numbers[name]:.4g}" for name, label in SHOWN.items() if name in numbers]
        bar.write(f"step {metrics['step']} | " + " | ".join(cells))


class Clock:
    """Seconds by phase since it was made."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.last = time.perf_counter()

    def stop(self, phase: str) -> float:
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now
        return self.seconds[phase]
