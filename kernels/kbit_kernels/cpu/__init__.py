"""Native CPU kernels: products, dequantizing and rounding to nearest for every spec."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kbit_kernels.cpu import library
from kbit_kernels.cpu.rounding import quantize
from kbit_kernels.errors import KbitError
from kbit_kernels.tensor import QuantizedTensor

__all__ = ["available", "dequantize", "linear", "name", "quantize", "supports"]

name = "cpu"


def available() -> tuple[bool, str]:
    """Whether the native library is built and loads here, and why not."""
    try:
        return True, f"native, {library.best_isa()}"
    except KbitError as error:
        return False, str(error)


def supports(tensor: object) -> tuple[bool, str]:
    """Takes every tensor."""
    return True, "takes every spec"


def linear(
    x: NDArray[Any],
    tensor: QuantizedTensor,
    bias: NDArray[Any] | None = None,
    *,
    arithmetic: library.Arithmetic = "float",
) -> NDArray[np.float32]:
    """`x [M, K] @ weights.T (+ bias [N])` -> fp32 `[M, N]`; arithmetics: see `src/kbit.h`."""
    return library.matrix_of(tensor).linear(x, bias, arithmetic=arithmetic)


def dequantize(tensor: QuantizedTensor, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """The weights `[N, K]`, computed in fp32 and cast to `dtype`."""
    return library.matrix_of(tensor).dequantize().astype(dtype, copy=False)
