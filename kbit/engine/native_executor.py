"""The native executor: every layer of a step in one call of the C++ library."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_int32, c_int64, c_void_p
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from kbit.engine.executor import Weights, check_cache_size
from kbit.engine.native_plan import CacheSpec, DecoderSpec, LayerSpec, Plan, plan_support, pointers
from kbit.engine.native_plan import rotaries as rotaries_of
from kbit.errors import KbitError
from kbit.models import Decoder, Rotary
from kbit_kernels.cpu import library
from kbit_kernels.tensor import QuantizedTensor

CACHE_TYPES: dict[str, np.dtype] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
KEY_BLOCK, KEY_CHUNK = 16, 64  # kKeyBlock and kKeyChunk of plan.h
# wider weights lose to rounded inputs more than 2 % of their own divergence
INT8_MOST_BITS, BF16_MOST_BITS = 4, 7
ALIGNMENT = 64  # of keys and values: vectors that straddle cache lines load at half the speed


class _Error(ctypes.Structure):
    _fields_ = (("text", c_char * 256),)


@cache
def _native() -> ctypes.CDLL:
    native = library.load()
    error = POINTER(_Error)
    native.kbit_decoder_sizes.restype = c_int64
    native.kbit_decoder_new.restype = c_void_p
    native.kbit_decoder_new.argtypes = [POINTER(DecoderSpec), error]
    native.kbit_decoder_free.restype = None
    native.kbit_decoder_free.argtypes = [c_void_p]
    native.kbit_decoder_bytes.restype = c_int64
    native.kbit_decoder_bytes.argtypes = [c_void_p]
    native.kbit_decoder_forward.restype = c_int32
    native.kbit_decoder_forward.argtypes = [
        c_void_p,
        POINTER(CacheSpec),
        c_void_p,
        c_void_p,
        c_void_p,
        c_int32,
        c_void_p,
        error,
    ]
    sizes = [ctypes.sizeof(spec) for spec in (DecoderSpec, LayerSpec, CacheSpec)]
    mine = sizes[0] << 32 | sizes[1] << 16 | sizes[2]
    assert native.kbit_decoder_sizes() == mine, "plan.h and native_plan.py differ"
    return native


def supports(decoder: Decoder, device: str) -> tuple[bool, str]:
    """Every decoder that the plan can express, on the CPU, where the library is built."""
    if device != "cpu":
        return False, f"it runs on the CPU, not on {device!r}"
    try:
        _native()
    except KbitError as error:
        return False, str(error)
    able, reason = plan_support(decoder)
    return able, f"{library.best_isa()}, {reason}" if able else reason


def load(
    checkpoint: Weights,
    decoder: Decoder,
    device: str = "cpu",
    *,
    dtype: str = "fp32",
    cache_dtype: str | None = None,
    threads: int | None = None,
    arithmetic: str = "float",
    isa: str | None = None,
) -> NativeExecutor:
    """An executor over the checkpoint's memory-mapped tensors.

    cache_dtype: of keys and values, "fp32" or "fp16"; where None, fp32 with "float" and else fp16,
    which rounds less than the inputs are rounded. threads: default_threads() where None.
    arithmetic: "float" (exact), "int8" or "int16" (inputs of quantized layers rounded to that many
    bits), "bf16" (int16, and bf16 for prompts where the processor has it), or "fast", the fastest
    of them that adds at most 2 % to the weights' own divergence. isa: an instruction set instead
    of the best. Raises KbitError for unknown options and tensors that don't fit.
    """
    assert device == "cpu"
    if dtype != "fp32":
        raise KbitError(
            f"dtype is {dtype!r}, but the native executor computes in fp32; leave it out, or ask "
            "for the backend torch"
        )
    _known("arithmetic", arithmetic, (*library.ARITHMETICS, "fast"))
    if arithmetic == "fast":
        arithmetic = fast_arithmetic(checkpoint, decoder)
    if cache_dtype is None:
        cache_dtype = "fp32" if arithmetic == "float" else "fp16"
    _known("cache_dtype", cache_dtype, CACHE_TYPES)
    if isa is not None:
        _known("isa", isa, library.ISAS)
    if threads is not None and not 1 <= threads <= library.MOST_THREADS:
        raise KbitError(f"threads is {threads}, but has to be from 1 to {library.MOST_THREADS}")
    return NativeExecutor(checkpoint, decoder, cache_dtype, threads, arithmetic, isa)


def _known(option: str, value: str, known: Sequence[str] | dict[str, np.dtype]) -> None:
    if value not in known:
        raise KbitError(f"{option} {value!r} is not known (known: {', '.join(known)})")


def fast_arithmetic(checkpoint: Weights, decoder: Decoder) -> str:
    """What benchmarks/results/arithmetic-*.json allow: int8 for models of up to 4 bits, bf16 for
    those of up to 7, int16 for others. The widest matrix decides; one that isn't quantized counts
    for nothing, its products are exact anyway."""
    tensors = (checkpoint.tensor(i.name) for i in decoder.tensors.values() if len(i.shape) == 2)
    widths = [t.spec.bits for t in tensors if isinstance(t, QuantizedTensor)]
    most = max(widths, default=0)
    return "int8" if most <= INT8_MOST_BITS else "bf16" if most <= BF16_MOST_BITS else "int16"


def default_threads() -> int:
    """The physical cores among those that this process may use: two threads on one core share its
    vector units and its bandwidth."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


class NativeCache:
    """Keys and values of a batch of sequences, preallocated and zeroed by the system on first use.

    Layouts: kKeyBlock in plan.h.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: int,
        capacity: int,
        dtype: np.dtype,
        tables: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> None:
        self.capacity = capacity
        self.lengths = [0] * batch
        room = -(-capacity // KEY_CHUNK) * KEY_CHUNK
        sizes = []
        for layer in decoder.layers:
            rows = batch * layer.attention.kv_heads * room
            padded = -(-layer.attention.head_dim // KEY_BLOCK) * KEY_BLOCK
            sizes += [rows * layer.attention.head_dim, rows * padded]
        starts = np.cumsum([0, *sizes]) * dtype.itemsize
        self._memory = np.zeros(int(starts[-1]) + ALIGNMENT, np.uint8)
        self._tables = tables
        base = -(-self._memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        layers = max(len(decoder.layers), 1)
        keys = (c_void_p * layers)(*(base + int(start) for start in starts[:-1:2]))
        values = (c_void_p * layers)(*(base + int(start) for start in starts[1::2]))
        self.spec = CacheSpec(
            batch,
            room,
            int(dtype == np.float16),
            keys,
            values,
            pointers(cos for cos, _ in tables),
            pointers(sin for _, sin in tables),
        )

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return len(self.lengths)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget a sequence's tokens from position `length` on."""
        if not 0 <= length <= self.lengths[sequence]:
            raise KbitError(
                f"a sequence of {self.lengths[sequence]} tokens can't be cut to {length}"
            )
        self.lengths[sequence] = length


class NativeExecutor:
    """See kbit.engine.executor.Executor and, for the computation, kbit.models.base.

    Not for several threads at once; its own threads sleep between calls.
    """

    name = "native"

    def __init__(
        self,
        checkpoint: Weights,
        decoder: Decoder,
        cache_dtype: str,
        threads: int | None,
        arithmetic: str,
        isa: str | None,
    ) -> None:
        self.decoder = decoder
        self.threads = threads or default_threads()
        self.arithmetic = arithmetic
        self.isa = isa or library.best_isa()
        self._cache_dtype = CACHE_TYPES[cache_dtype]
        self._rotaries = rotaries_of(decoder)
        self._library = _native()
        self._handle: int | None = None
        self._plan = Plan(
            checkpoint,
            decoder,
            self.threads,
            library.ARITHMETICS.index(arithmetic),
            library.ISAS.index(self.isa),
        )
        error = _Error()
        self._handle = self._library.kbit_decoder_new(byref(self._plan.spec), byref(error))
        if not self._handle:
            raise KbitError(f"the native executor refuses the model: {error.text.decode()}")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.kbit_decoder_free(self._handle)

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one decode step reads."""
        return self._library.kbit_decoder_bytes(self._handle)

    def new_cache(self, batch: int, capacity: int) -> NativeCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens each."""
        decoder = self.decoder
        check_cache_size(decoder, batch, capacity)
        tables = [_tables(rotary, capacity) for rotary in self._rotaries]
        return NativeCache(decoder, batch, capacity, self._cache_dtype, tables)

    def forward(
        self, tokens: Sequence[np.ndarray], cache: NativeCache, *, all_logits: bool = False
    ) -> list[np.ndarray]:
        """See Executor.forward."""
        # A step's weights push this out of the caches: every call that numpy is spared here counts.
        parts = [np.asarray(part).reshape(-1) for part in tokens]
        counts = [part.size for part in parts]
        self._check(parts, counts, cache)
        total = sum(counts)
        selected = total if all_logits else len(counts) - counts.count(0)
        logits = np.empty((selected, self.decoder.vocab_size), np.float32)
        if total:
            ids = np.concatenate(parts, dtype=np.int32, casting="unsafe")
            error = _Error()
            done = self._library.kbit_decoder_forward(
                self._handle,
                byref(cache.spec),
                ids.ctypes.data,
                (c_int32 * len(counts))(*counts),
                (c_int64 * len(counts))(*cache.lengths),
                all_logits,
                logits.ctypes.data,
                byref(error),
            )
            if not done:
                raise KbitError(f"the native executor failed: {error.text.decode()}")
            for row, count in enumerate(counts):
                cache.lengths[row] += count
        if all_logits:
            return np.split(logits, np.cumsum(counts)[:-1])
        found = iter(logits)
        return [next(found) if count else np.empty(0, np.float32) for count in counts]

    def _check(self, parts: list[np.ndarray], counts: list[int], cache: NativeCache) -> None:
        if len(parts) != cache.batch:
            raise KbitError(f"{len(parts)} sequences were given to a cache of {cache.batch}")
        known = self.decoder.vocab_size
        for row, (part, count, length) in enumerate(zip(parts, counts, cache.lengths, strict=True)):
            if length + count > cache.capacity:
                raise KbitError(
                    f"sequence {row} would grow to {length + count} tokens, "
                    f"the cache holds {cache.capacity}"
                )
            if count and not 0 <= part.min() <= part.max() < known:
                raise KbitError(f"sequence {row} has a token outside the vocabulary of {known}")


@lru_cache(maxsize=4)
def _tables(rotary: Rotary, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = rotary.tables(capacity)
    return np.ascontiguousarray(cos), np.ascontiguousarray(sin)
