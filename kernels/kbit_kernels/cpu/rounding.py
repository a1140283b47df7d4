"""Native round-to-nearest: the reference's codes and scales, at the speed of memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit_kernels import reference
from kbit_kernels.cpu import library
from kbit_kernels.errors import KbitError
from kbit_kernels.formats import DATA_TYPES, codebook_of
from kbit_kernels.packing import packed_bytes
from kbit_kernels.reference.quantize import (
    _double_quantize,
    affine_parameters,
    largest_deviation_columns,
    learn_codebook,
    round_scales,
)
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import QuantizedTensor, block_size, outlier_count


def quantize(
    w: NDArray[Any],
    spec: QuantSpec,
    *,
    search: bool = False,
    outlier_columns: NDArray[np.integer[Any]] | None = None,
    codebook: NDArray[np.float32] | None = None,
    isa: library.Isa | None = None,
    pool: library.Pool | None = None,
) -> QuantizedTensor:
    """Round `w [N, K]` to the nearest codes of `spec`, as `reference.quantize` does.

    The search for scales and centered blocks are the reference's own.

    Raises:
        KbitError: a weight is NaN or infinite, or a scale or outlier does not fit its dtype.
    """
    if search or spec.center:
        return reference.quantize(
            w, spec, search=search, outlier_columns=outlier_columns, codebook=codebook
        )
    w = np.ascontiguousarray(w)
    rows, columns = w.shape
    block = block_size(spec, columns)
    extra: dict[str, NDArray[Any]] = {}
    kept: NDArray[np.int32] | None = None
    if spec.outliers:
        if outlier_columns is None:
            count = outlier_count(spec, columns)
            outlier_columns = largest_deviation_columns(w.astype(np.float32), count)
        extra["outlier_columns"] = kept = np.sort(outlier_columns).astype(np.int32)
        with np.errstate(over="ignore"):
            extra["outliers"] = w[:, kept].astype(np.float16)
        if not np.isfinite(extra["outliers"]).all():
            raise KbitError("an outlier column has a weight beyond fp16; leave outliers out")
    table = codebook_of(spec)
    peak = 1.0
    if table is None:
        table = learn_codebook(w, spec, kept) if codebook is None else codebook
        extra["codebook"] = table
    else:
        peak = float(table[-1])
    encoder = library.Encoder(w, block, kept, isa, pool)
    finite, low, high = encoder.ranges()
    if not finite:
        what = "NaN" if np.isnan(w.astype(np.float32)).any() else "an infinite weight"
        raise KbitError(f"the tensor has {what}; it cannot be quantized")
    if DATA_TYPES[spec.dtype].zero_point:
        scales, extra["zeros"] = affine_parameters(low, high, spec)
    else:
        scales = round_scales(np.divide(np.maximum(high, -low), np.float32(peak)), spec)
    if spec.double_quant:
        scales, extra["scale_absmax"], extra["scale_offset"] = _double_quantize(
            scales.astype(np.float32)
        )
    codes = np.empty((rows, packed_bytes(columns, spec.bits)), dtype=np.uint8)
    tensor = QuantizedTensor(spec, (rows, columns), codes, scales, **extra)
    midpoints = ((table[1:].astype(np.float64) + table[:-1]) / 2).astype(np.float32)
    integers = spec.dtype in ("int", "uint")
    encoder.encode(
        tensor.scale_values(),
        codes,
        spec.bits,
        zeros=tensor.zeros,
        center=0.0 if spec.dtype == "uint" else float(-table[0]),
        midpoints=None if integers else midpoints,
    )
    return tensor
