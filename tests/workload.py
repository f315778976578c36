"""What tests and benches share: a random model, gradients, an engine whose attempts have drawn lengths, clocks."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ppo
import rollout
from experiments.median import make_tokenizer
from plumbing.checkpoints import Part
from plumbing.engine import Engine

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def save_random_model(folder: Path, rows: int = 0, **shape: int) -> str:
    """A random model with tied embeddings, and the toy's tokenizer. rows: of its head; 0: as many as there are tokens.
    shape: hidden_size, num_hidden_layers, num_attention_heads, ..."""
    tokenizer = make_tokenizer()
    common = {"max_position_embeddings": 4096, "tie_word_embeddings": True, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=rows or len(tokenizer), **common, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def keep_gradients(learner: ppo.Learner) -> dict[str, torch.Tensor]:
    """What the optimisers will meet in their first step, by parameter ("actor.lm...."); empty until then."""
    found: dict[str, torch.Tensor] = {}
    for part in learner.parts:

        def keep(*_: Any, part: Part = part) -> None:
            for name, parameter in part.model.named_parameters():
                found.setdefault(f"{part.name}.{name}", parameter.grad.full_tensor().clone())

        part.optimizer.register_step_pre_hook(keep)
    return found


def draw_length(shortest: int, longest: int, *key: int | str) -> int:
    """Log-uniform, which is a long tail; it depends on the key alone."""
    return round(shortest * (longest / shortest) ** (rollout.random_number("length", *key) / 2**31))


def seconds_of(work: Callable[[], Any]) -> tuple[float, float]:
    """-> (seconds, seconds of the CPU in this process's threads: what a busy machine does not lengthen)."""
    start, worked = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - worked


class DrawnLengths(Engine):
    """The engine, but an attempt is as long as length_of(its key in the queue, its prompt) says, and nothing else ends
    it."""

    def __init__(self, model: str, dtype: str, length_of: Callable[[int, list[int]], int]):
        super().__init__(model, rollout.CONTEXT, dtype)
        self.length_of = length_of
        self.never = dict.fromkeys(self.stop_ids, -100.0)  # a logit_bias
        self.asked: list[tuple[list[int], int]] = []  # prompt, tokens of every attempt
        add_request = self.engine.add_request

        def add_endless_request(key: str, prompt: Any, params: Any, **options: Any) -> Any:
            params.logit_bias = self.never
            return add_request(key, prompt, params, **options)

        self.engine.add_request = add_endless_request

    def submit(self, key: int, ids: list[int], max_tokens: int, *sampling: Any) -> None:
        length = min(max_tokens, self.length_of(key, ids))
        self.asked.append((list(ids), length))
        super().submit(key, ids, length, *sampling)

    def generate(self, asked: list[tuple[list[int], int]], temperature: float) -> int:
        """llm.generate on these prompts and lengths, all of them known from the start; no dialogues, no grading ->
        generated tokens."""
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()
        shared = {"logprobs": 0, "logit_bias": self.never, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(temperature=temperature, seed=seed if temperature else None, max_tokens=length, **shared)
            for seed, (_, length) in enumerate(asked)
        ]
        prompts = [{"prompt_token_ids": ids} for ids, _ in asked]
        return sum(len(out.outputs[0].token_ids) for out in self.llm.generate(prompts, params, use_tqdm=False))
