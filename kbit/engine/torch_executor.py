"""The torch executor: the reference for every other one, and the way onto a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import kbit_kernels.triton
from kbit.engine.executor import Weights
from kbit.engine.torch_attention import Step, TorchAttention
from kbit.engine.torch_cache import TorchCache
from kbit.engine.torch_layers import Loader, identity, make_linear, make_norm
from kbit.errors import KbitError
from kbit.models import Decoder, Layer, Linear, Mlp
from kbit_kernels.activations import ACTIVATIONS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def supports(decoder: Decoder, device: str) -> tuple[bool, str]:
    """Every described decoder, on every device that this torch has."""
    return has_device(device)


def has_device(device: str) -> tuple[bool, str]:
    """Whether this torch has a device, such as "cpu" or "cuda:1", and kbit its kernels; and why."""
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return True, f"torch {torch.__version__}"
    if kind != "cuda" or (index and not index.isdigit()):
        return False, f"torch {torch.__version__} has no device {device!r}"
    if not torch.cuda.is_available():
        return False, f"torch {torch.__version__} finds no CUDA device; leave --device out"
    if int(index or 0) >= torch.cuda.device_count():
        return False, f"torch sees {torch.cuda.device_count()} CUDA device(s), counted from 0"
    able, reason = kbit_kernels.triton.available()
    return able, f"torch {torch.__version__}, {reason}" if able else reason


def load(
    checkpoint: Weights,
    decoder: Decoder,
    device: str = "cpu",
    *,
    dtype: str | None = None,
    cache_dtype: str | None = None,
    threads: int | None = None,
    arithmetic: str = "float",
) -> TorchExecutor:
    """An executor that computes in `dtype` (default: fp32; on a GPU fp16, fp32 there means dense
    weights) and keeps keys and values in `cache_dtype` (default: the same), with `threads` threads
    of the process (default: torch's own choice). arithmetic: "float", or "fast", which is the
    same here. Raises KbitError for unknown options and tensors that don't fit."""
    if arithmetic not in ("float", "fast"):
        raise KbitError(
            f"arithmetic {arithmetic!r} is the native executor's; the torch executor has float"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    on_gpu = device.startswith("cuda")
    dtype = dtype or ("fp16" if on_gpu else "fp32")
    for given in (dtype, cache_dtype or dtype):
        if given not in DTYPES:
            raise KbitError(f"dtype {given!r} is not known (known: {', '.join(DTYPES)})")
    kind = TorchExecutor
    if on_gpu:
        from kbit.engine.cuda_executor import CudaExecutor

        # kernels are launched, and graphs captured, on the current device
        torch.cuda.set_device(int(device.partition(":")[2] or 0))
        kind = CudaExecutor
    return kind(checkpoint, decoder, device, DTYPES[dtype], DTYPES[cache_dtype or dtype])


class TorchExecutor:
    """See kbit.engine.executor.Executor and, for the computation, kbit.models.base."""

    name = "torch"
    loader_class = Loader

    def __init__(
        self,
        checkpoint: Weights,
        decoder: Decoder,
        device: str,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> None:
        self.decoder = decoder
        self.device = device
        self._cache_dtype = cache_dtype
        loader = self.loader_class(checkpoint, decoder, dtype, device)
        self._embedding = loader.matrix(decoder.embedding)
        self._embedding_projection = _optional(loader, decoder.embedding_projection)
        self._positions: Tensor | None = None
        if decoder.positions is not None:
            self._positions = loader.matrix(decoder.positions.weight)
        self._embedding_norm = make_norm(loader, decoder.embedding_norm)
        self._blocks = [_Block(loader, layer, i) for i, layer in enumerate(decoder.layers)]
        self._final_norm = make_norm(loader, decoder.final_norm)
        self._output_projection = _optional(loader, decoder.output_projection)
        if decoder.tied:
            self._head = lambda x: functional.linear(x, self._embedding)
        else:
            self._head = make_linear(loader, (decoder.head,))

    def new_cache(self, batch: int, capacity: int) -> TorchCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens each."""
        return TorchCache(self.decoder, batch, capacity, self._cache_dtype, self.device)

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[np.ndarray], cache: TorchCache, *, all_logits: bool = False
    ) -> list[np.ndarray]:
        """See Executor.forward."""
        counts = self._check(tokens, cache)
        V = self.decoder.vocab_size
        if not any(counts):
            return [np.empty((0, V) if all_logits else 0, np.float32) for _ in tokens]
        step = Step.plan(counts, cache, self.device)
        flat = np.concatenate([np.asarray(t, dtype=np.int64).reshape(-1) for t in tokens])
        h = self._embed(torch.from_numpy(flat).to(self.device), step.positions)
        for block in self._blocks:
            h = block(h, cache, step)
        for row, count in enumerate(counts):
            cache.lengths[row] += count
        ends = np.cumsum(counts)
        if not all_logits:
            last = [int(end) - 1 for end, count in zip(ends, counts, strict=True) if count]
            h = h[last]
        logits = self._logits(h).cpu().numpy()
        if all_logits:
            return np.split(logits, ends[:-1])
        found = iter(logits)
        return [next(found) if count else np.empty(0, np.float32) for count in counts]

    def _embed(self, ids_N: Tensor, position_N: Tensor) -> Tensor:
        h = functional.embedding(ids_N, self._embedding)
        if self.decoder.embedding_scale != 1.0:
            h = h * self.decoder.embedding_scale
        if self._embedding_projection is not None:
            h = self._embedding_projection(h)
        if self._positions is not None:
            assert self.decoder.positions is not None
            h = h + self._positions[position_N + self.decoder.positions.offset]
        return self._embedding_norm(h)

    def _logits(self, h_ND: Tensor) -> Tensor:
        h = self._final_norm(h_ND)
        if self._output_projection is not None:
            h = self._output_projection(h)
        logits = self._head(h).float()
        cap = self.decoder.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _check(self, tokens: Sequence[np.ndarray], cache: TorchCache) -> list[int]:
        if len(tokens) != cache.batch:
            raise KbitError(f"{len(tokens)} sequences were given to a cache of {cache.batch}")
        counts = [int(np.size(t)) for t in tokens]
        for row, (count, length) in enumerate(zip(counts, cache.lengths, strict=True)):
            if length + count > cache.capacity:
                raise KbitError(
                    f"sequence {row} would grow to {length + count} tokens, "
                    f"the cache holds {cache.capacity}"
                )
            if (
                count
                and not 0 <= np.min(tokens[row]) <= np.max(tokens[row]) < self.decoder.vocab_size
            ):
                raise KbitError(
                    f"sequence {row} has a token outside the vocabulary of "
                    f"{self.decoder.vocab_size}"
                )
        return counts


class _Block:
    """One layer; the formula stands at the head of kbit.models.base."""

    def __init__(self, loader: Loader, layer: Layer, index: int) -> None:
        self._parallel = layer.parallel
        self._attention = TorchAttention(loader, layer.attention, index)
        self._mlp = _TorchMlp(loader, layer.mlp)
        self._attention_in = make_norm(loader, layer.attention_in)
        self._attention_out = make_norm(loader, layer.attention_out)
        self._attention_after = make_norm(loader, layer.attention_after)
        self._mlp_in = make_norm(loader, layer.mlp_in)
        self._mlp_out = make_norm(loader, layer.mlp_out)
        self._mlp_after = make_norm(loader, layer.mlp_after)

    def __call__(self, h: Tensor, cache: TorchCache, step: Step) -> Tensor:
        # a product that nothing follows adds its result to h itself
        onto = h if self._attention_out is identity else None
        a = self._attention(self._attention_in(h), cache, step, onto)
        after = a if onto is not None else h + self._attention_out(a)
        if not self._parallel:
            h = after = self._attention_after(after)
        onto = after if self._mlp_out is identity else None
        m = self._mlp(self._mlp_in(h), onto)
        return self._mlp_after(m if onto is not None else after + self._mlp_out(m))


class _TorchMlp:
    """down(activation(gate(x)) * up(x)), gate and up as one matrix; or without gate."""

    def __init__(self, loader: Loader, mlp: Mlp) -> None:
        self._gated = mlp.gate is not None
        self._activation = ACTIVATIONS[mlp.activation]
        self._down = make_linear(loader, (mlp.down,))
        self._whole: Callable[[Tensor], Tensor] | None = None  # all before down, as one kernel
        if mlp.gate is None:
            self._up = make_linear(loader, (mlp.up,))
            return
        self._whole = loader.fused_gated(mlp.gate, mlp.up, mlp.activation)
        if self._whole is None:
            self._up = make_linear(loader, (mlp.gate, mlp.up))
            self._gate = loader.fused_gate(mlp.activation)

    def __call__(self, x_ND: Tensor, onto: Tensor | None) -> Tensor:
        if self._whole is not None:
            return self._down(self._whole(x_ND), onto)
        if not self._gated:
            return self._down(self._activation(self._up(x_ND)), onto)
        if self._gate is not None:
            return self._down(self._gate(self._up(x_ND)), onto)
        gate, up = self._up(x_ND).chunk(2, dim=-1)
        return self._down(self._activation(gate) * up, onto)


def _optional(loader: Loader, linear: Linear | None) -> Callable[[Tensor], Tensor] | None:
    return None if linear is None else make_linear(loader, (linear,))
