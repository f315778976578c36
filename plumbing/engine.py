"""vLLM in the trainer's process: every call of it that the program makes. One engine for each rank.

A model that does not fit into one GPU needs tensor parallelism, which this file leaves out: serve it by a framework
that separates generation from training, such as OpenRLHF or verl.
"""

import gc
import os
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

from plumbing import FOR_CPU
from plumbing.constants import Count, Share

MAX_SEQUENCES: Count = 512  # sequences decoded at once; more is faster until the cache is full; CUDA graphs end at 512
GPU_MEMORY: Share = 0.5  # share of a GPU's memory that the engine may take; the trainer uses the rest (paper 0.5)
CPU_CACHE_MIB: Count = 512  # MiB of KV cache of an engine on a CPU


class Sample(NamedTuple):
    """An attempt that has ended."""

    key: int  # as given to submit()
    ids: list[int]  # the sampled token ids
    logprobs: list[float]  # of each of them, under the distribution that was sampled from
    stopped: bool  # whether the policy ended it (else a limit did)


def find_gpu(dtype: str = "") -> bool:
    """Whether this process has a GPU. Raises SystemExit if the packages are for one and cannot use it (in dtype)."""
    import torch

    if FOR_CPU or not torch.version.cuda:
        return False
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if not torch.cuda.is_available():
        raise SystemExit(f"no GPU: CUDA {torch.version.cuda} needs an NVIDIA driver of 580 or newer (nvidia-smi says)")
    if rank >= torch.cuda.device_count():
        raise SystemExit(f"process {rank} of this node has no GPU; {torch.cuda.device_count()} visible, one a process")
    if dtype == "bfloat16" and torch.cuda.get_device_capability(rank) < (8, 0):
        raise SystemExit(f"{torch.cuda.get_device_name(rank)} is too old for bfloat16: Ampere or newer is needed")
    return True


def pool_memory() -> float:
    """GiB that torch counts as allocated, because an engine that sleeps will want them again."""
    allocator = getattr(sys.modules.get("vllm.device_allocator.cumem"), "CuMemAllocator", None)
    return allocator.instance.get_current_usage() / 2**30 if allocator and allocator.instance else 0.0


class Engine:
    """A queue of attempts. All ranks make their engines together.

    model: folder or hub name. context: tokens that a sequence may have. sleeps: whether it will give its memory to a
    trainer between rollouts (GPUs only; one such engine for each process).
    """

    def __init__(self, model: str, context: int, dtype: str = "float32", seed: int = 0, sleeps: bool = False):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core in this process: no copies, no pickling
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        import vllm

        self.cuda = find_gpu(dtype)
        self.sleeps = sleeps and self.cuda
        where = {"gpu_memory_utilization": GPU_MEMORY} if self.cuda else {"kv_cache_memory_bytes": CPU_CACHE_MIB << 20}
        random_state = torch.get_rng_state()  # vLLM seeds the whole process; the trainer's stream must not change
        self.llm = vllm.LLM(
            model=model,
            dtype=dtype,
            seed=seed,
            max_model_len=context,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=max(8192, context),
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
            generation_config="vllm",  # a model's own sampling defaults must not enter training
            enable_prefix_caching=True,  # a retry finds its whole history in the cache
            # Not on a CPU: its runner cannot rewind the generator of a request whose prompt a full step cuts in two.
            enable_chunked_prefill=self.cuda,
            enforce_eager=not self.cuda,
            enable_sleep_mode=self.sleeps,
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **where,
        )
        torch.set_rng_state(random_state)
        self.engine = self.llm.llm_engine
        self.tokenizer = self.llm.get_tokenizer()
        config = self.engine.model_config
        ends = [config.hf_config.eos_token_id, self.tokenizer.eos_token_id]
        ends.append(config.try_get_generation_config().get("eos_token_id"))
        self.stop_ids = {i for e in ends if e is not None for i in (e if isinstance(e, list) else [e])}
        if len(self.tokenizer) < config.get_vocab_size():  # Qwen2.5: 151,665 tokens, 151,936 rows
            self.llm.apply_model(partial(drop_padding, tokens=len(self.tokenizer)))

    def submit(self, key: int, ids: list[int], max_tokens: int, temperature: float, seed: int, stop_id: int) -> None:
        """Queue one attempt: continue `ids` until a stop id or max_tokens. Temperature 0 is greedy. seed: of this
        attempt's own random stream, so that what is sampled does not depend on what else is in the queue."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature,
            seed=seed if temperature > 0 else None,
            max_tokens=max_tokens,
            stop_token_ids=sorted(self.stop_ids | {stop_id}),
            logprobs=0,  # the sampled token's log-probability, no alternatives
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        self.engine.add_request(str(key), {"prompt_token_ids": ids}, params)

    @property
    def busy(self) -> bool:
        return self.engine.has_unfinished_requests()

    def step(self) -> list[Sample]:
        """One forward pass over everything that runs -> the attempts that ended in it."""
        samples = []
        for request in self.engine.step():
            if request.finished:
                out = request.outputs[0]
                stopped = out.finish_reason == "stop"
                samples.append(Sample(int(request.request_id), list(out.token_ids), out.logprobs.logprobs, stopped))
        return samples

    def load_weights(self, named_tensors: Iterable[tuple[str, Any]]) -> None:
        """Replace the engine's weights by the trainer's, one whole tensor at a time, under their Hugging Face names.

        This is the one place that knows the order: wake the weights, load them, drop what was cached under the old
        ones, wake the cache. Raises RuntimeError, naming parameters that no tensor filled, if weights did not arrive.
        (On a CPU vLLM keeps matrices packed out of reach; there ppo.py's MAX_MISMATCH finds those that are stale.)
        """
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        self.llm.apply_model(fill_with_nan)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        self.llm.apply_model(repack_tied_head)
        if missing := self.llm.apply_model(find_nan)[0]:
            named = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
            raise RuntimeError(f"weights that did not reach the engine, or are not finite: {named}")
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the engine kept its prefix cache: attempts were running while weights were loaded")
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])

    def sleep(self) -> None:
        """Give the memory to the trainer. The weights are dropped, not copied: load_weights must follow."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def shutdown(self) -> None:
        """End the engine and free its memory. vLLM ends the process group of torch.distributed with it."""
        import torch

        self.engine.engine_core.shutdown()
        del self.llm, self.engine
        if self.cuda:
            torch._dynamo.reset()  # compiled code holds references to the engine (vLLM issue 21073)
        gc.collect()  # the engine, whose finaliser drops what holds the model
        gc.collect()  # the model
        if self.cuda:
            torch.cuda.empty_cache()


# Run by apply_model on the engine's own model -------------------------------------------------------------------------
def drop_padding(model: Any, tokens: int) -> None:
    """Rows of a padded vocabulary are no tokens, and never sampled: they are cut off with vLLM's own padding. (On a GPU
    logit_bias takes 1,024 of them at the most.)"""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    layers = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    if not layers:
        raise SystemExit(f"{type(model).__name__}: its padded vocabulary cannot be cut off; take another model")
    for layer in layers:
        layer.org_vocab_size = tokens


def fill_with_nan(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))


def find_nan(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.isnan().any()]


def repack_tied_head(model: Any) -> None:
    """On a CPU logits come from a packed copy of lm_head. Where lm_head is tied to the embedding, reload_weights leaves
    that copy as it was, and the engine would go on sampling with the old output layer."""
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight.device.type == "cpu" and model.config.tie_word_embeddings:
        head.quant_method.process_weights_after_loading(head)
