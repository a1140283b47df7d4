"""The torch executor on a GPU: kernels for quantized layers, decode steps as CUDA graphs.

A step in which every sequence gets one token is captured once per batch and power of two of cache
positions that it reads, and replayed from then on. The captured code is the ordinary one; only the
`Step` is special: its positions are device tensors that are filled before each replay, and it
claims to reach over the whole span, so that what is not yet written is masked, not cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch

from kbit.engine.cuda_layers import HALVES, CudaLoader, KernelLinear
from kbit.engine.executor import Weights
from kbit.engine.torch_attention import Step
from kbit.engine.torch_cache import TorchCache
from kbit.engine.torch_executor import TorchExecutor
from kbit.models import Decoder
from kbit_kernels.tensor import QuantizedTensor

SMALLEST_SPAN = 256


class DecodeStep:
    """One token for every sequence of one cache, reading `span` positions.

    `capture=False` computes without a graph (there is none without a GPU), the same way otherwise.
    """

    def __init__(
        self, executor: CudaExecutor, cache: TorchCache, span: int, *, capture: bool
    ) -> None:
        device, batch = executor.device, cache.batch
        self._executor, self._cache = executor, cache
        self._ids_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._positions_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._step = Step(
            rows=list(range(batch)),
            counts=[1, 1],  # with starts: the nearest and the farthest a sequence may stand
            starts=[0, span - 1],
            sequences=torch.arange(batch, device=device),
            positions=self._positions_B,
            slots=None,
            padded_positions=self._positions_B.view(batch, 1),
            all_rows=True,
        )
        self._capture = capture
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_BV = torch.empty(0)

    def __call__(self, tokens: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """Logits fp32 [B, V] after `tokens`, which go to the positions `lengths`."""
        self._ids_B.copy_(torch.tensor(tokens))
        self._positions_B.copy_(torch.tensor(lengths))
        if not self._capture:
            self._compute()
        elif self._graph is None:
            # compiles kernels and fills allocators; writing the same keys again does no harm
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._compute()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._compute()
            self._graph.replay()
        else:
            self._graph.replay()
        return self._logits_BV.cpu().numpy()

    def _compute(self) -> None:
        h = self._executor._embed(self._ids_B, self._positions_B)
        for block in self._executor._blocks:
            h = block(h, self._cache, self._step)
        self._logits_BV = self._executor._logits(h)


class CudaExecutor(TorchExecutor):
    """See TorchExecutor; quantized layers stay quantized."""

    loader_class = CudaLoader

    def __init__(
        self,
        checkpoint: Weights,
        decoder: Decoder,
        device: str,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> None:
        super().__init__(checkpoint, decoder, device, dtype, cache_dtype)
        self._capture = device.startswith("cuda")
        self._steps: WeakKeyDictionary[TorchCache, dict[int, DecodeStep]] = WeakKeyDictionary()
        if decoder.tied and dtype in HALVES:
            loader = self.loader_class(checkpoint, decoder, dtype, device)
            embedding = loader.stored(decoder.embedding)
            if isinstance(embedding, QuantizedTensor):
                self._head = KernelLinear(embedding, None, loader)

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[np.ndarray], cache: TorchCache, *, all_logits: bool = False
    ) -> list[np.ndarray]:
        """See Executor.forward."""
        if cache.capacity < 2 or not all(np.size(t) == 1 for t in tokens):
            return super().forward(tokens, cache, all_logits=all_logits)
        self._check(tokens, cache)
        steps = self._steps.setdefault(cache, {})
        span = min(cache.capacity, max(SMALLEST_SPAN, 1 << max(cache.lengths).bit_length()))
        if span not in steps:
            steps[span] = DecodeStep(self, cache, span, capture=self._capture)
        logits = steps[span]([int(np.ravel(t)[0]) for t in tokens], cache.lengths)
        cache.lengths[:] = [length + 1 for length in cache.lengths]
        return [row[None] if all_logits else row for row in logits]
