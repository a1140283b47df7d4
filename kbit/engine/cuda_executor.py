"""The torch executor on a GPU: kernels for quantized layers, decode steps as CUDA graphs.

A step in which no sequence gets more than one token is captured once per arena, that is per power
of two of sequences, and replayed from then on. The captured code is the ordinary one; only the
`Step` is special: its positions are device tensors that are filled before each replay. Sequences
that get no token compute one all the same, at a place that nobody reads.

Where tokens are chosen on the device, the next step starts with them at once, while the host still
reads what they are: what it does between two steps, as long as a small model's whole step, costs
nothing then. If it goes on with other tokens, what was computed ahead is left, as unread as the
places above.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kbit.engine.cuda_layers import HALVES, CudaLoader, KernelLinear, has_kernels
from kbit.engine.cuda_sampler import choose
from kbit.engine.executor import Weights, check_cache_size
from kbit.engine.sampler import GREEDY, Draw
from kbit.engine.torch_attention import Step
from kbit.engine.torch_cache import TorchCache
from kbit.engine.torch_executor import TorchExecutor
from kbit.models import Decoder
from kbit_kernels.tensor import QuantizedTensor

SMALLEST_CAPACITY = 256
IDLE_ARENAS = 2


class DecodeStep:
    """One token for every sequence of an arena.

    `capture=False` computes without a graph (there is none without a GPU), the same way otherwise.
    """

    def __init__(self, executor: CudaExecutor, arena: TorchCache, *, capture: bool) -> None:
        device, batch = executor.device, arena.batch
        self._executor, self._arena = executor, arena
        self._inputs_3B = torch.zeros((3, batch), dtype=torch.int64, device=device)
        self._ids_B, self._positions_B, self._active_B = self._inputs_3B
        self._active: list[int] = []
        self._step = Step(
            rows=list(range(batch)),
            counts=[1, 1],  # with starts: the nearest and the farthest a sequence may stand
            starts=[0, arena.capacity - 1],
            sequences=torch.arange(batch, device=device),
            positions=self._positions_B,
            slots=None,
            padded_positions=self._positions_B.view(batch, 1),
            all_rows=True,
        )
        self._capture = capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self._logits_BV = self._greedy_B2 = torch.empty(0)
        self._chosen_B2 = torch.empty((batch, 2), dtype=torch.float64, pin_memory=capture)

    def __call__(
        self, tokens: Sequence[int], positions: Sequence[int], active: Sequence[int] | None = None
    ) -> Tensor:
        """Logits fp32 [B, V] after `tokens` at `positions`, on the device; the next call overwrites
        them. active: 1 for a sequence that `go_on` gives another token, 0 for one that waits."""
        self._active = [1] * len(tokens) if active is None else list(active)
        missing = [0] * (self._arena.batch - len(tokens))
        inputs = [[*row, *missing] for row in (tokens, positions, self._active)]
        self._inputs_3B.copy_(torch.tensor(inputs))
        self._run()
        return self._logits_BV[: len(tokens)]

    def _run(self) -> None:
        if not self._capture:
            self._compute()
        elif self.graph is None:
            # compiles kernels and fills allocators; writing the same keys again does no harm
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._compute()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._compute()
            graph.replay()
            self.graph = graph
        else:
            self.graph.replay()

    def choose(self, draws: Sequence[Draw], go_on: bool) -> list[tuple[int, float]]:
        """cuda_sampler.choose of the last step's logits; the step has the likeliest ready. With
        go_on the step after it starts too, from what was chosen, and is under way on return."""
        N = len(draws)
        if any(draw.temperature for draw in draws):
            chosen_N2 = choose(self._logits_BV[:N], draws)
        else:
            chosen_N2 = self._greedy_B2[:N]
        kept_N2 = self._chosen_B2[:N]
        kept_N2.copy_(chosen_N2, non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if self._capture else None
        if go_on:
            self._ids_B[:N] = chosen_N2[:, 0]
            self._positions_B += self._active_B
            self._run()
        if arrived is not None:
            arrived.synchronize()
        return [(int(token), largest) for token, largest in kept_N2.tolist()]

    def restrict(self, active: Sequence[int]) -> None:
        """From now on only `active` sequences get further tokens by `go_on`."""
        if list(active) != self._active:
            self._active = list(active)
            self._active_B[: len(active)] = torch.tensor(self._active)

    def _compute(self) -> None:
        h = self._executor._embed(self._ids_B, self._positions_B)
        for block in self._executor._blocks:
            h = block(h, self._arena, self._step)
        self._logits_BV = self._executor._logits(h)
        self._greedy_B2 = self._executor.likeliest(self._logits_BV)


class CudaCache(TorchCache):
    """The first rows and positions of an arena: keys and values that outlive the cache, because a
    captured step points to them."""

    def __init__(self, arena: TorchCache, step: DecodeStep, batch: int, capacity: int) -> None:
        self.capacity = capacity
        self.lengths = [0] * batch
        self.keys = [keys[:batch] for keys in arena.keys]
        self.values = [values[:batch] for values in arena.values]
        self.rotary = arena.rotary
        self.step = step
        # what the step that is under way was given: lengths, and each sequence's token if any
        self.ahead: tuple[list[int], list[int | None]] | None = None


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
        self.likeliest: Callable[[Tensor], Tensor] = partial(choose, draws=[GREEDY])
        if has_kernels(device):
            from kbit.engine.cuda_kernels import likeliest

            self.likeliest = likeliest
        self._idle: list[tuple[TorchCache, DecodeStep]] = []
        self._stretches = any(
            layer.attention.rotary is not None
            and layer.attention.rotary.scaling in ("dynamic", "longrope")
            for layer in decoder.layers
        )
        if decoder.tied and dtype in HALVES:
            loader = self.loader_class(checkpoint, decoder, dtype, device)
            embedding = loader.stored(decoder.embedding)
            if isinstance(embedding, QuantizedTensor):
                self._head = KernelLinear(embedding, None, loader)

    @torch.inference_mode()
    def new_cache(self, batch: int, capacity: int) -> CudaCache:
        """See Executor.new_cache; an arena that a cache left behind is used again."""
        check_cache_size(self.decoder, batch, capacity)
        arena, step = self._arena(batch, capacity)
        cache = CudaCache(arena, step, batch, capacity)
        weakref.finalize(cache, _leave, self._idle, arena, step).atexit = False
        return cache

    def _arena(self, batch: int, capacity: int) -> tuple[TorchCache, DecodeStep]:
        rows = 1 << (batch - 1).bit_length()
        roomy = max(SMALLEST_CAPACITY, 1 << (capacity - 1).bit_length())
        wanted = max(capacity, min(roomy, self.decoder.max_positions))
        if self._stretches:  # the rotary tables are those of the capacity
            wanted = capacity
        for i, (arena, _) in enumerate(self._idle):
            if arena.batch == rows and arena.capacity == wanted:
                for array in (*arena.keys, *arena.values):
                    array.zero_()
                return self._idle.pop(i)
        make = partial(TorchCache, self.decoder, rows, wanted, self._cache_dtype, self.device)
        try:
            arena = make()
        except torch.OutOfMemoryError:
            self._idle.clear()
            torch.cuda.empty_cache()
            arena = make()
        return arena, DecodeStep(self, arena, capture=self._capture)

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[np.ndarray], cache: TorchCache, *, all_logits: bool = False
    ) -> list[np.ndarray]:
        """See Executor.forward."""
        assert isinstance(cache, CudaCache)
        counts = self._check(tokens, cache)
        cache.ahead = None
        if max(counts) != 1:
            return super().forward(tokens, cache, all_logits=all_logits)
        logits = self._decode(tokens, counts, cache).cpu().numpy()
        V = self.decoder.vocab_size
        none = np.empty((0, V) if all_logits else 0, np.float32)
        rows = logits[:, None] if all_logits else logits
        return [row if count else none for row, count in zip(rows, counts, strict=True)]

    @torch.inference_mode()
    def sample(
        self, tokens: Sequence[np.ndarray], cache: TorchCache, draws: Sequence[Draw]
    ) -> list[tuple[int, float]]:
        """Like forward with at most one token a sequence, but every next token is chosen on the
        device as `draws` say; returns it and the largest logit per sequence."""
        assert isinstance(cache, CudaCache)
        counts = self._check(tokens, cache)
        assert max(counts) == 1
        if self._is_ahead(tokens, counts, cache):
            cache.step.restrict(counts)
            _grow(cache, counts)
        else:
            self._decode(tokens, counts, cache)
        lengths = [length for length, count in zip(cache.lengths, counts, strict=True) if count]
        go_on = max(lengths) < cache.capacity
        found = cache.step.choose(draws, go_on)
        if go_on:
            said = [token if n else None for (token, _), n in zip(found, counts, strict=True)]
            cache.ahead = (list(cache.lengths), said)
        return found

    def _is_ahead(
        self, tokens: Sequence[np.ndarray], counts: Sequence[int], cache: CudaCache
    ) -> bool:
        """Whether the step with `tokens` is under way already. It may hold more sequences."""
        ahead, cache.ahead = cache.ahead, None
        if ahead is None or ahead[0] != cache.lengths:
            return False
        given = zip(tokens, counts, ahead[1], strict=True)
        return all(not n or int(np.ravel(ids)[0]) == token for ids, n, token in given)

    def _decode(
        self, tokens: Sequence[np.ndarray], counts: Sequence[int], cache: CudaCache
    ) -> Tensor:
        ids = [int(np.ravel(t)[0]) if np.size(t) else 0 for t in tokens]
        # without a token: where the next one will be, or in a full row the last one, which only
        # a token that has no more room could read
        positions = [min(length, cache.capacity - 1) for length in cache.lengths]
        logits = cache.step(ids, positions, counts)
        _grow(cache, counts)
        return logits


def _grow(cache: TorchCache, counts: Sequence[int]) -> None:
    cache.lengths[:] = [n + count for n, count in zip(cache.lengths, counts, strict=True)]


def _leave(idle: list[tuple[TorchCache, DecodeStep]], arena: TorchCache, step: DecodeStep) -> None:
    idle.append((arena, step))
    del idle[:-IDLE_ARENAS]
