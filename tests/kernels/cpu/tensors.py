"""Random tensors of every spec, made without a quantizer, so that every code occurs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit_kernels import QuantizedTensor, QuantSpec, expected_parts
from kbit_kernels.packing import pack


def random_tensor(
    spec: QuantSpec, shape: tuple[int, int], rng: np.random.Generator
) -> QuantizedTensor:
    """A valid tensor of random codes, scales, zeros, means, codebook and outliers."""
    columns = shape[1]
    top = 1 << spec.bits
    parts: dict[str, NDArray[Any]] = {}
    for suffix, (dtype, size) in expected_parts(spec, shape).items():
        if suffix == "codes":
            parts[suffix] = pack(rng.integers(0, top, shape, dtype=np.uint8), spec.bits)
        elif suffix == "zeros":
            parts[suffix] = rng.integers(0, top, size, dtype=np.uint8)
        elif suffix == "codebook":
            parts[suffix] = np.sort(rng.uniform(-1, 1, size)).astype(np.float32)
        elif suffix == "outlier_columns":
            chosen = rng.choice(columns, size[0], replace=False)
            parts[suffix] = np.sort(chosen).astype(np.int32)
        elif dtype == np.uint8:  # double-quantized scales
            parts[suffix] = rng.integers(0, 256, size, dtype=np.uint8)
        elif suffix in ("means", "outliers"):
            parts[suffix] = rng.standard_normal(size).astype(dtype)
        else:
            parts[suffix] = rng.uniform(0.01, 1, size).astype(dtype)
    return QuantizedTensor.from_parts(spec, shape, parts)
