"""The native library through ctypes: tensors as it sees them, matrices, a pool of threads."""

import ctypes
import os
import shutil
import threading
import weakref
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kbit_kernels.errors import KbitError
from kbit_kernels.tensor import SCALE_CODEBOOK, QuantizedTensor

LIBRARY = Path(__file__).with_name("_native.so")
ABI = 5  # kAbi of src/kbit.h
Isa = Literal["portable", "avx2", "avxvnni", "avx512", "amx", "neon"]
Arithmetic = Literal["float", "int8", "int16", "bf16"]
# in the order of the enums of src/kbit.h
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avxvnni", "avx512", "amx", "neon")
ARITHMETICS: tuple[Arithmetic, ...] = ("float", "int8", "int16", "bf16")
MOST_THREADS = 1024  # of a pool: a system that starts no more of them ends the process

_STORAGES = {"int": 0, "uint": 1}
_CODEBOOK = 2
_PLAIN: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 3,
    np.dtype(np.float16): 4,
    np.dtype(ml_dtypes.bfloat16): 5,
}
_SCALES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 0,
    np.dtype(np.float16): 1,
    np.dtype(ml_dtypes.bfloat16): 2,
    np.dtype(np.uint8): 3,
}


class Tensor(ctypes.Structure):
    """`kbit::Tensor` of src/kbit.h: pointers into a tensor's parts."""

    _fields_ = (
        ("rows", c_int64),
        ("cols", c_int64),
        ("storage", c_int32),
        ("bits", c_int32),
        ("block", c_int32),
        ("scale_type", c_int32),
        ("mean_type", c_int32),
        ("n_outliers", c_int32),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("means", c_void_p),
        ("codebook", c_void_p),
        ("scale_absmax", c_void_p),
        ("scale_offset", c_void_p),
        ("scale_codebook", c_void_p),
        ("outlier_columns", c_void_p),
        ("outliers", c_void_p),
    )


class _Error(ctypes.Structure):
    _fields_ = (("text", c_char * 256),)

    def raise_if(self, failed: bool) -> None:
        if failed:
            raise KbitError(self.text.decode() or "the native library failed")


def describe(tensor: QuantizedTensor | NDArray[Any]) -> tuple[Tensor, list[NDArray[Any]]]:
    """The native view of a tensor `[N, K]`, and the arrays that must outlive it.

    Raises:
        KbitError: a plain array that is no matrix of fp32, fp16 or bf16.
    """
    kept: list[NDArray[Any]] = []

    def pointer(array: NDArray[Any] | None) -> int | None:
        if array is None:
            return None
        array = np.ascontiguousarray(array)
        kept.append(array)
        return array.ctypes.data

    if isinstance(tensor, np.ndarray):
        if tensor.ndim != 2 or tensor.dtype not in _PLAIN:
            raise KbitError(
                f"a plain matrix is fp32, fp16 or bf16, not {tensor.dtype} {list(tensor.shape)}"
            )
        rows, cols = tensor.shape
        view = Tensor(rows=rows, cols=cols, storage=_PLAIN[tensor.dtype], codes=pointer(tensor))
        return view, kept
    spec = tensor.spec
    outlier_count = 0 if tensor.outlier_columns is None else tensor.outlier_columns.size
    storage = _STORAGES.get(spec.dtype, _CODEBOOK)
    view = Tensor(
        rows=tensor.shape[0],
        cols=tensor.shape[1],
        storage=storage,
        bits=spec.bits,
        block=spec.block,
        scale_type=_SCALES[tensor.scales.dtype],
        mean_type=0 if tensor.means is None else _SCALES[tensor.means.dtype],
        n_outliers=outlier_count,
        codes=pointer(tensor.codes),
        scales=pointer(tensor.scales),
        zeros=pointer(tensor.zeros),
        means=pointer(tensor.means),
        codebook=pointer(tensor.values()) if storage == _CODEBOOK else None,
        scale_absmax=pointer(tensor.scale_absmax),
        scale_offset=pointer(tensor.scale_offset),
        scale_codebook=pointer(SCALE_CODEBOOK) if spec.double_quant else None,
        outlier_columns=pointer(tensor.outlier_columns),
        outliers=pointer(tensor.outliers),
    )
    return view, kept


@cache
def load() -> ctypes.CDLL:
    """The library, its functions typed.

    Raises:
        KbitError: it was not built, was built from other sources, or does not load.
    """
    if not LIBRARY.exists():
        missing = "it was left out at install"
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            missing = "the install found no C++ compiler"
        raise KbitError(
            f"the native CPU library is not built: {missing}; without it kbit runs in numpy or"
            " torch, many times slower. Install g++ or clang and kbit again"
        )
    try:
        native = ctypes.CDLL(str(LIBRARY))
    except OSError as problem:
        raise KbitError(f"the native CPU library does not load: {problem}") from None
    if not hasattr(native, "kbit_abi") or native.kbit_abi() != ABI:
        raise KbitError(
            f"{LIBRARY} was built from other sources than this kbit; install kbit again"
        )
    error = POINTER(_Error)
    weights = [c_int32, c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_int64]
    signatures: dict[str, tuple[Any, Sequence[Any]]] = {
        "kbit_best_isa": (c_int32, []),
        "kbit_isa_available": (c_int32, [c_int32]),
        "kbit_multiply_sums": (c_int32, [c_int32]),
        "kbit_tensor_bytes": (c_int64, []),
        "kbit_pool_new": (c_void_p, [c_int32, error]),
        "kbit_pool_free": (None, [c_void_p]),
        "kbit_matrix_new": (c_void_p, [POINTER(Tensor), c_int32, error]),
        "kbit_matrix_free": (None, [c_void_p]),
        "kbit_linear": (
            c_int32,
            [c_void_p, c_void_p, c_int32, c_void_p, c_int64, c_void_p, c_void_p, error],
        ),
        "kbit_linear_each": (
            c_int32,
            [c_void_p, c_int64, c_void_p, c_int32, c_void_p, c_int64, c_void_p, error],
        ),
        "kbit_read": (c_uint64, [c_void_p, c_void_p, c_int64]),
        "kbit_dequantize": (None, [c_void_p, c_void_p, c_void_p]),
        "kbit_block_ranges": (
            c_int32,
            [c_void_p, *weights, c_void_p, c_void_p],
        ),
        "kbit_encode": (
            None,
            [c_void_p, *weights, c_int32, c_void_p, c_void_p, c_float, c_void_p, c_void_p],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    assert native.kbit_tensor_bytes() == ctypes.sizeof(Tensor), "kbit.h and library.py differ"
    return native


def best_isa() -> Isa:
    """The fastest instruction set of this machine that the library has."""
    return ISAS[load().kbit_best_isa()]


def isa_available(isa: Isa) -> bool:
    """Whether this machine can run `isa`."""
    return bool(load().kbit_isa_available(ISAS.index(isa)))


class Pool:
    """A fixed pool of `threads` threads, the caller among them; by default one a core.

    Raises:
        KbitError: the system does not start so many.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or len(os.sched_getaffinity(0))
        self._native = load()
        error = _Error()
        self.handle = self._native.kbit_pool_new(self.threads, byref(error))
        error.raise_if(not self.handle)
        freed = weakref.finalize(self, _free_pool, self._native, self.handle, os.getpid())
        freed.atexit = False  # the process ends its sleeping threads itself


def _free_pool(native: ctypes.CDLL, handle: int, process: int) -> None:
    # in a forked child the threads are gone, and freeing would wait for them for ever
    if process == os.getpid():
        native.kbit_pool_free(handle)


_pools: dict[int, Pool] = {}
_thread = threading.local()
# the threads of a pool do not live on in a forked child
os.register_at_fork(after_in_child=lambda: _pools.clear())


def default_pool() -> Pool:
    """The pool that products use unless they are given one."""
    alone: Pool | None = getattr(_thread, "pool", None)
    return alone or _pools.setdefault(0, _pools.get(0) or Pool())


def work_alone() -> None:
    """From now on the calling thread computes by itself, for callers that are many threads
    themselves: they would wait for each other at one pool."""
    _thread.pool = Pool(1)


class Matrix:
    """A tensor made ready to multiply: tables, and pointers to its parts, which it keeps alive.

    Args:
        tensor: quantized, or a plain matrix of fp32, fp16 or bf16, `[N, K]`.
        isa: an instruction set to use; by default the fastest one.

    Raises:
        KbitError: the tensor is malformed, or `isa` is not available here.
    """

    def __init__(self, tensor: QuantizedTensor | NDArray[Any], isa: Isa | None = None) -> None:
        self._native = load()
        self.handle: int | None = None
        view, self._kept = describe(tensor)
        self.shape = (int(view.rows), int(view.cols))
        error = _Error()
        index = ISAS.index(isa or best_isa())
        self.handle = self._native.kbit_matrix_new(byref(view), index, byref(error))
        error.raise_if(not self.handle)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._native.kbit_matrix_free(self.handle)

    def linear(
        self,
        x: NDArray[Any],
        bias: NDArray[Any] | None = None,
        *,
        arithmetic: Arithmetic = "float",
        pool: Pool | None = None,
    ) -> NDArray[np.float32]:
        """`x [M, K] @ weights.T (+ bias [N])` -> fp32 `[M, N]`."""
        x = np.ascontiguousarray(x, dtype=np.float32)
        assert x.shape[1] == self.shape[1], (x.shape, self.shape)
        out = np.empty((x.shape[0], self.shape[0]), dtype=np.float32)
        if bias is not None:
            bias = np.ascontiguousarray(bias, dtype=np.float32)
        error = _Error()
        done = self._native.kbit_linear(
            self.handle,
            (pool or default_pool()).handle,
            ARITHMETICS.index(arithmetic),
            x.ctypes.data,
            x.shape[0],
            None if bias is None else bias.ctypes.data,
            out.ctypes.data,
            byref(error),
        )
        error.raise_if(not done)
        return out

    def dequantize(self, pool: Pool | None = None) -> NDArray[np.float32]:
        """The weights, fp32 `[N, K]`, exactly as the reference computes them."""
        out = np.empty(self.shape, dtype=np.float32)
        self._native.kbit_dequantize(self.handle, (pool or default_pool()).handle, out.ctypes.data)
        return out


class Encoder:
    """Weights `w [N, K]` (fp32, fp16 or bf16) on their way to codes; outlier columns are zeros."""

    def __init__(
        self,
        w: NDArray[Any],
        block: int,
        outlier_columns: NDArray[np.int32] | None = None,
        isa: Isa | None = None,
        pool: Pool | None = None,
    ) -> None:
        assert w.flags.c_contiguous
        self._native, self._pool = load(), pool or default_pool()
        self._kept = (w, outlier_columns)
        rows, columns = w.shape
        self._groups = (rows, -(-columns // block))
        count = 0 if outlier_columns is None else outlier_columns.size
        at = None if outlier_columns is None else outlier_columns.ctypes.data
        index = ISAS.index(isa or best_isa())
        self._weights = (index, w.ctypes.data, _SCALES[w.dtype], rows, columns, block, at, count)

    def ranges(self) -> tuple[bool, NDArray[np.float32], NDArray[np.float32]]:
        """Whether all weights are finite; least and largest of each block `[N, G]`, 0 included."""
        low, high = (np.empty(self._groups, dtype=np.float32) for _ in range(2))
        finite = self._native.kbit_block_ranges(
            self._pool.handle, *self._weights, low.ctypes.data, high.ctypes.data
        )
        return bool(finite), low, high

    def encode(
        self,
        scales: NDArray[np.float32],
        codes: NDArray[np.uint8],
        bits: int,
        *,
        zeros: NDArray[np.uint8] | None,
        center: float,
        midpoints: NDArray[np.float32] | None,
    ) -> None:
        """Packs into `codes` the weights divided by `scales [N, G]`.

        They become the number of `midpoints [2^bits - 1]` below them, or without midpoints the
        nearest integer plus `zeros [N, G]`, or plus `center` without zeros, clipped.
        """
        assert scales.shape == self._groups
        assert codes.flags.c_contiguous
        scales = np.ascontiguousarray(scales, dtype=np.float32)
        self._native.kbit_encode(
            self._pool.handle,
            *self._weights,
            bits,
            scales.ctypes.data,
            None if zeros is None else zeros.ctypes.data,
            center,
            None if midpoints is None else midpoints.ctypes.data,
            codes.ctypes.data,
        )


_matrices: weakref.WeakKeyDictionary[QuantizedTensor, Matrix] = weakref.WeakKeyDictionary()


def matrix_of(tensor: QuantizedTensor) -> Matrix:
    """The matrix over `tensor`, made once."""
    found = _matrices.get(tensor)
    if found is None:
        found = _matrices[tensor] = Matrix(tensor)
    return found
