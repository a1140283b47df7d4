"""Tokens per second on a GPU: Llama-3-8B's shapes with random weights, and a real model.

Both run kbit's own executor; only where the weights come from differs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kbit.engine.cuda_executor import CudaExecutor, DecodeStep
from kbit.engine.cuda_layers import CudaLoader
from kbit.engine.sampler import GREEDY
from kbit.models import Attention, Linear, describe
from kbit_kernels import QuantSpec
from kbit_kernels.triton import linear
from kbit_kernels.triton.measure import Timed, medians_us, random_weight

CONTEXT = 512  # positions of the cache; a step reads all of them
LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
TINY = LLAMA_3_8B | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


class RandomLoader(CudaLoader):
    """Weights of the right shapes, made on the device."""

    spec = QuantSpec("int", 4)

    def fused(self, parts: Sequence[Linear]) -> Any:
        """One random matrix for the parts."""
        shape = (sum(part.out_features for part in parts), parts[0].in_features)
        weight = random_weight(self.spec, shape, self.dtype, self.device)
        return partial(_apply, weight)

    def fused_gated(self, gate: Linear, up: Linear, activation: str) -> Any:
        """One random matrix for both, and the gate in its kernel."""
        shape = (gate.out_features + up.out_features, gate.in_features)
        weight = random_weight(self.spec, shape, self.dtype, self.device)
        return partial(_apply, weight, gate=activation)

    def matrix(self, name: str) -> torch.Tensor:
        """A random embedding."""
        shape = self._decoder.tensors[name].shape
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def vector(self, name: str) -> torch.Tensor:
        """A norm's weight."""
        return torch.ones(self._decoder.tensors[name].shape, device=self.device)


def _apply(
    weight: Any, x: torch.Tensor, onto: torch.Tensor | None = None, gate: str = ""
) -> torch.Tensor:
    return linear(x, weight, None, onto, gate)


def bytes_of_step(executor: CudaExecutor, cache: Any) -> int:
    """Bytes that a step reads: every quantized matrix, and the cache."""
    layers = [
        layer
        for block in executor._blocks
        for layer in (
            block._attention._qkv,
            block._attention._out,
            block._mlp._whole,
            block._mlp._down,
        )
    ]
    weights = sum(layer.args[0].nbytes for layer in [*layers, executor._head])
    return weights + sum(t.nbytes for t in (*cache.keys, *cache.values))


class TorchAttention(RandomLoader):
    """Attention by torch instead of kbit's kernel."""

    def fused_attend(self, attention: Attention, slopes: torch.Tensor | None) -> None:
        """None."""
        return None


def decode_speed(
    widths: tuple[int, ...],
    copy_gb_s: float,
    deadline: float,
    config: dict[str, Any] = LLAMA_3_8B,
    device: str = "cuda",
) -> Iterator[dict[str, Any]]:
    """Tokens per second at batch 1 and 8 for every width; percent of the byte roofline.

    `step_us` is the captured step alone; `tokens_per_s` is the executor called in a loop, tokens
    chosen on the device and brought to the host. At 4 bits also with torch's own attention.
    """
    decoder = describe(config)
    kinds = [(bits, RandomLoader) for bits in sorted(widths, key=lambda k: (k != 4, k))]
    kinds.insert(1, (4, TorchAttention))  # 4 bits is compared most
    on_gpu = device == "cuda"  # else a dry run
    count, rounds, batches = (80, 25, (1, 8)) if on_gpu else (1, 1, (1, 2))
    for bits, base in kinds:
        spec = QuantSpec("int", bits)
        loader = type("Loader", (base,), {"spec": spec})
        kind = type("Executor", (CudaExecutor,), {"loader_class": loader})
        executor = kind({}, decoder, device, torch.float16, torch.float16)
        for batch in batches:
            if time.monotonic() > deadline:
                return
            cache = executor.new_cache(batch, CONTEXT)
            with torch.inference_mode():
                # every call is a replay of the captured step
                replay = partial(cache.step, [1] * batch, [CONTEXT - 1] * batch)
                replay()
                us = medians_us({"step": Replay(cache.step, replay)}, rounds)["step"]
            cache.lengths[:] = [CONTEXT - 2 * count] * batch
            tokens = [np.array([1])] * batch
            for _ in range(2):  # the first warms up
                started = time.perf_counter()
                for _ in range(count):
                    chosen = executor.sample(tokens, cache, [GREEDY] * batch)
                    tokens = [np.array([token]) for token, _ in chosen]
                seconds = time.perf_counter() - started
            floor_us = bytes_of_step(executor, cache) / copy_gb_s / 1e3
            row = {
                "spec": str(spec),
                "batch": batch,
                "attention": "kbit" if base is RandomLoader else "torch",
                "step_us": us,
                "step_tokens_per_s": batch * 1e6 / us,
                "tokens_per_s": batch * count / seconds,
                "percent_of_byte_roofline": 100 * floor_us / us,
            }
            yield row
            print(
                f"{spec} batch {batch}, attention by {row['attention']}: "
                f"{batch * 1e6 / us:.0f} tok/s in the step, "
                f"{batch * count / seconds:.0f} in a loop, {100 * floor_us / us:.0f}% of bytes",
                flush=True,
            )
            del cache, replay
        del executor
        if on_gpu:
            torch.cuda.empty_cache()


class Replay(Timed):
    """A captured step, timed like everything else; where there is no graph, the step itself."""

    def __init__(self, step: DecodeStep, call: Callable[[], object]) -> None:
        self.calls = 1
        self.replay = call if step.graph is None else step.graph.replay
        self._on_device = step.graph is not None


def model_speed(path: str, device: str = "cuda", tokens: int = 200) -> dict[str, Any]:
    """`kbit.load(path, device=device)`: seconds to load, to the first token, tokens per second."""
    import kbit

    started = time.perf_counter()
    model = kbit.load(path, backend="torch", device=device)
    loaded = time.perf_counter()
    tokens = tokens if device == "cuda" else 4
    run = partial(model.generate, "The capital of France is", temperature=0.0)
    run(max_tokens=1)
    first = time.perf_counter()
    run(max_tokens=tokens)  # captures the graphs
    started_timing = time.perf_counter()
    done = run(max_tokens=tokens)
    seconds = time.perf_counter() - started_timing
    made = sum(len(completion.tokens) for completion in done)
    return {
        "model": Path(path).name,
        "load_s": loaded - started,
        "first_token_s": first - loaded,
        "tokens": made,
        "tokens_per_s": made / seconds,
    }
