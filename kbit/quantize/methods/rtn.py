"""Round to nearest: each weight to the nearest code of its block, no calibration data."""

from __future__ import annotations

from typing import Any

import numpy as np

import kbit_kernels
from kbit_kernels.formats import DATA_TYPES
from kbit_kernels.reference.quantize import learn_codebook
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import QuantizedTensor, outlier_count

summary = "round to nearest, with an optional search for the best scale of each block"

_CHUNK_ELEMENTS = 1 << 20


def rows_apart(spec: QuantSpec) -> bool:
    """Double-quantized scales belong to the whole matrix."""
    return not spec.double_quant


def prepare(w: np.ndarray, spec: QuantSpec) -> dict[str, Any]:
    """The outlier columns, and the codebook of a learned data type."""
    prepared: dict[str, Any] = {}
    if spec.outliers:
        prepared["outlier_columns"] = outlier_columns(w, spec)
    if DATA_TYPES[spec.dtype].codebook is None:
        prepared["codebook"] = learn_codebook(w, spec, prepared.get("outlier_columns"))
    return prepared


def outlier_columns(w: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """The columns of largest standard deviation (arXiv 2212.09720, section 3), in pieces."""
    rows, columns = w.shape
    total, squares = np.zeros(columns), np.zeros(columns)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = w[start : start + step].astype(np.float64)
        total += part.sum(axis=0)
        squares += np.square(part).sum(axis=0)
    variance = squares / rows - np.square(total / rows)
    count = outlier_count(spec, columns)
    largest = np.argsort(-variance, kind="stable")[:count]
    return np.sort(largest).astype(np.int32)


def quantize(
    w: np.ndarray, spec: QuantSpec, search: bool, prepared: dict[str, Any]
) -> QuantizedTensor:
    """Quantize a matrix, or some rows of one where `rows_apart`."""
    return kbit_kernels.quantize(w, spec, search=search, **prepared)
