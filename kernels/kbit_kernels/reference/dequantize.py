"""Codes back to weights, and the product with them."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kbit_kernels.packing import unpack
from kbit_kernels.tensor import QuantizedTensor, block_size

_CHUNK = 1 << 22  # weights worked on at a time


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _dequantize_rows(tensor: QuantizedTensor) -> NDArray[np.float32]:
    columns = tensor.shape[1]
    block = block_size(tensor.spec, columns)

    def per_weight(per_block: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.repeat(per_block, block, axis=1)[:, :columns]

    weights = tensor.values()[unpack(tensor.codes, tensor.spec.bits, columns)]
    if tensor.zeros is not None:
        weights -= per_weight(tensor.zeros.astype(np.float32))
    weights *= per_weight(tensor.scale_values())
    if tensor.means is not None:
        weights += per_weight(tensor.means.astype(np.float32))
    if tensor.outliers is not None:
        weights[:, tensor.outlier_columns] = tensor.outliers
    return weights


def dequantize(tensor: QuantizedTensor, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """The weights `[N, K]`, computed in fp32 and cast to `dtype`."""
    tensor = tensor.with_plain_scales()
    out = np.empty(tensor.shape, dtype=dtype)
    for rows in _chunks(*tensor.shape):
        out[rows] = _dequantize_rows(tensor.rows(rows))
    return out


def linear(
    x: NDArray[Any], tensor: QuantizedTensor, bias: NDArray[Any] | None = None
) -> NDArray[np.float32]:
    """`x [M, K] @ weights.T (+ bias [N])` -> fp32 `[M, N]`, accumulated in fp64."""
    tensor = tensor.with_plain_scales()
    x64 = x.astype(np.float64)
    out = np.empty((x.shape[0], tensor.shape[0]), dtype=np.float64)
    for rows in _chunks(*tensor.shape):
        out[:, rows] = x64 @ _dequantize_rows(tensor.rows(rows)).astype(np.float64).T
    if bias is not None:
        out += bias.astype(np.float64)
    return out.astype(np.float32)
