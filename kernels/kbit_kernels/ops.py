"""The contract: quantize, dequantize, linear; arguments are checked once, then a backend runs.

A backend is a module with `name`, `available() -> (bool, reason)`, `supports(tensor) -> (bool,
reason)`, and any of `quantize`, `dequantize`, `linear` with the signatures of `reference`.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kbit_kernels.errors import KbitError
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import SCALE_DTYPES, QuantizedTensor

# fastest first; the Triton backend takes torch tensors on a GPU and is called by the torch executor
_MODULES = {"cpu": "kbit_kernels.cpu", "reference": "kbit_kernels.reference"}
_WEIGHT_DTYPES = frozenset(SCALE_DTYPES.values())


def _module(name: str) -> ModuleType:
    if name not in _MODULES:
        raise KbitError(f"unknown backend {name!r}; known are auto, {', '.join(_MODULES)}")
    return import_module(_MODULES[name])


def backends() -> dict[str, tuple[bool, str]]:
    """Name -> (usable here, why or why not), fastest first."""
    return {name: _module(name).available() for name in _MODULES}


def _choose(backend: str, operation: str, tensor: QuantizedTensor | QuantSpec) -> ModuleType:
    """The backend to run `operation`; one asked for by name refuses loudly.

    Raises:
        KbitError: the backend is unknown, not available here, or declines the tensor.
    """
    declined = []
    for name in _MODULES if backend == "auto" else [backend]:
        module = _module(name)
        usable, reason = module.available()
        if usable and not hasattr(module, operation):
            usable, reason = False, f"it has no {operation}"
        if usable:
            usable, reason = module.supports(tensor)
        if usable:
            return module
        declined.append(f"{name}: {reason}")
    raise KbitError(f"no backend for {operation} ({'; '.join(declined)})")


def quantize(
    w: NDArray[Any],
    spec: QuantSpec,
    *,
    search: bool = False,
    outlier_columns: NDArray[np.integer[Any]] | None = None,
    codebook: NDArray[np.float32] | None = None,
    backend: str = "auto",
) -> QuantizedTensor:
    """Round a matrix to the nearest codes of `spec`; every backend gives the same codes.

    Args:
        w: `[N, K]`, fp32, fp16 or bf16 (ml_dtypes), finite.
        spec: how to store it.
        search: choose each block's scale for the least squared error instead of its largest weight.
        outlier_columns: ascending columns to keep at 16 bits, where the spec keeps any.
        codebook: of a learned data type, `[2^k]`; by default learned from `w`.
        backend: "auto", "cpu" or "reference".

    Raises:
        KbitError: a weight is NaN or infinite, or a scale does not fit its dtype.
    """
    if w.ndim != 2 or 0 in w.shape:
        raise KbitError(f"a matrix is quantized, not an array of shape {list(w.shape)}")
    if w.dtype not in _WEIGHT_DTYPES:
        raise KbitError(f"weights are {w.dtype}; quantize takes fp32, fp16 or bf16")
    module = _choose(backend, "quantize", spec)
    result: QuantizedTensor = module.quantize(
        w, spec, search=search, outlier_columns=outlier_columns, codebook=codebook
    )
    return result


def dequantize(
    tensor: QuantizedTensor, dtype: DTypeLike = np.float32, *, backend: str = "auto"
) -> NDArray[Any]:
    """The weights `[N, K]`: computed in fp32, cast to `dtype`."""
    result: NDArray[Any] = _choose(backend, "dequantize", tensor).dequantize(tensor, dtype)
    return result


def linear(
    x: NDArray[Any],
    tensor: QuantizedTensor,
    bias: NDArray[Any] | None = None,
    *,
    backend: str = "auto",
) -> NDArray[np.float32]:
    """`x [M, K] @ weights [N, K].T + bias [N]` -> fp32 `[M, N]`.

    Raises:
        KbitError: shapes do not fit, or the backend declines.
    """
    if x.ndim != 2 or x.shape[1] != tensor.shape[1]:
        raise KbitError(f"x {list(x.shape)} does not fit weights {list(tensor.shape)}")
    if bias is not None and bias.shape != (tensor.shape[0],):
        raise KbitError(f"bias {list(bias.shape)} does not fit weights {list(tensor.shape)}")
    result: NDArray[np.float32] = _choose(backend, "linear", tensor).linear(x, tensor, bias)
    return result
