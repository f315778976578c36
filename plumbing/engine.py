class Engine:
    """vLLM in this process. Under torchrun TENSOR_PARALLEL ranks share one; all ranks must make theirs together."""

    def __init__(self, model: str, dtype: str = "float32", seed: int = 0):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core in this process: no copies, no pickling
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        import vllm
        from vllm.model_executor.layers import utils

        self.cuda = torch.cuda.is_available()
        if not self.cuda:
            utils.dispatch_cpu_unquantized_gemm = pack_large_only(utils.dispatch_cpu_unquantized_gemm)
        where = {"gpu_memory_utilization": GPU_MEMORY} if self.cuda else {"kv_cache_memory_bytes": CPU_CACHE_MIB << 20}
        random_state = torch.get_rng_state()  # vLLM seeds the whole process; the trainer's stream is not its business
        self.llm = vllm.LLM(
            model=model,
            dtype=dtype,
            seed=seed,
            tensor_parallel_size=TENSOR_PARALLEL,
            max_model_len=CONTEXT,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=max(8192, CONTEXT),
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
            generation_config="vllm",  # a model's own sampling defaults must not leak into training
            enable_prefix_caching=True,  # a retry finds its whole history in the cache
            # Not on a CPU: its runner cannot rewind the generator of a request whose prompt a full step cuts in two.
            enable_chunked_prefill=self.cuda,
            enforce_eager=not self.cuda,
            enable_sleep_mode=self.cuda,
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **where,
        )
        torch.set_rng_state(random_state)
        self.engine = self.llm.llm_engine
        self.model = self.llm.apply_model(lambda model: model)[0]  # the engine is in this process, and so is its model
        self.holders = [module for module in self.model.modules() if module._parameters]
        plain = torch.nn.functional.linear
        self.packed = [m for m in self.model.modules() if getattr(m, "cpu_linear", plain) is not plain]
        self.places: dict[str, list[tuple]] = {}  # what a transfer copies where; see learn_places
        self.transfers = 0
        self.tokenizer = self.llm.get_tokenizer()
        config = self.engine.model_config
        ends = [config.hf_config.eos_token_id, self.tokenizer.eos_token_id]
        ends.append(config.try_get_generation_config().get("eos_token_id"))
        self.stop_ids = {i for e in ends if e is not None for i in (e if isinstance(e, list) else [e])}
        # Rows of a padded vocabulary are no tokens: never sample them (Qwen2.5: 151,936 rows, 151,665 tokens).
        self.never = dict.fromkeys(range(len(self.tokenizer), config.get_vocab_size()), -100.0)

    def submit(self, key: int, ids: list[int], max_tokens: int, temperature: float, seed: int, stop: set[int]) -> None:
        """Queue one attempt: continue `ids` until a stop id or max_tokens. Temperature 0 is greedy."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature,
            seed=seed if SEED_ATTEMPTS and temperature > 0 else None,
            max_tokens=max_tokens,
            stop_token_ids=sorted(stop | self.stop_ids),
            logit_bias=self.never or None,
            logprobs=0,  # the sampled token's log-probability, no alternatives
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        self.engine.add_request(str(key), {"prompt_token_ids": ids}, params)

    def step(self) -> list[tuple[int, list[int], list[float], bool]]:
        """One forward pass over what runs -> (key, sampled ids, their logprobs, stopped?) of each that ended."""
        ended = [(int(request.request_id), request.outputs[0]) for request in self.engine.step() if request.finished]
        return [(k, list(out.token_ids), out.logprobs.logprobs, out.finish_reason == "stop") for k, out in ended]

    def reseed(self, seed: int) -> None:
        """Start the stream from which attempts without a seed of their own are sampled."""
        import numpy
        import torch

        torch.manual_seed(seed)
        numpy.random.seed(seed)  # from which vLLM's newer runner for GPUs seeds them

    def agree(self, verdicts: dict[int, grader.Verdict]) -> dict[int, grader.Verdict]:
        """Ranks that share an engine must queue the same attempts in the same step: the first one's verdicts count."""
        if TENSOR_PARALLEL == 1:
            return verdicts
        from vllm.distributed import get_tp_group

        return get_tp_group().broadcast_object(verdicts, src=0)

    @property
    def busy(self) -> bool:
        return self.engine.has_unfinished_requests()

    def load_weights(self, named_tensors: Iterable[tuple[str, Any]]) -> None:
        """Replace the engine's weights by the trainer's, streamed one whole tensor at a time. The one place that knows
        the order: wake the weights, load them, forget what was cached under the old ones, wake the cache.

        Raises RuntimeError if the engine does not hold them afterwards.
        """
        import torch

        if self.cuda:
            self.llm.wake_up(tags=["weights"])
        with torch.no_grad():
            if self.transfers:
                stale = copy_weights(self.holders, self.places, named_tensors, self.transfers)
            else:
                self.places, stale = learn_places(self.model, named_tensors)
        for layer in self.packed:
            layer.quant_method.process_weights_after_loading(layer)
        if stale:
            named = ", ".join(stale[:3]) + " ..." * (len(stale) > 3)
            raise RuntimeError(
                f"the engine does not hold the trainer's weights behind a transfer ({named}): "
                "it would sample from another policy than the one that is trained"
            )
        self.transfers += 1
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "the engine kept its prefix cache: attempts were still running while weights were loaded"
            )
        if self.cuda:
            self.llm.wake_up(tags=["kv_cache"])

    def sleep(self) -> None:
        """Give the memory back to the trainer. The weights are dropped, not copied: load_weights must follow."""
        if self.cuda:
            self.llm.sleep(level=2)

    def shutdown(self) -> None:
        """End the engine (and, as vLLM does it, the process group) and give all its memory back."""
        import torch

        del self.model, self.holders, self.packed, self.places  # before vLLM gives their memory back
        self.engine.engine_core.shutdown()
        del self.llm, self.engine
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
