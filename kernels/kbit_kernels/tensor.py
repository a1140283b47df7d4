"""QuantizedTensor: a weight matrix in k bits, as it lies in a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kbit_kernels.errors import KbitError
from kbit_kernels.formats import DATA_TYPES, codebook_of
from kbit_kernels.packing import packed_bytes
from kbit_kernels.spec import QuantSpec

SCALE_DTYPES: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
}
DOUBLE_QUANT_BLOCK = 256
SCALE_CODEBOOK = codebook_of(QuantSpec("dynamic", 8))


def block_size(spec: QuantSpec, columns: int) -> int:
    """Weights that share a scale in a row of `columns` (at least 1)."""
    return spec.block or max(columns, 1)


def outlier_count(spec: QuantSpec, columns: int) -> int:
    """Input columns that `spec` keeps at 16 bits in a row of `columns`."""
    return min(columns, max(1, round(spec.outliers * columns))) if spec.outliers else 0


def expected_parts(
    spec: QuantSpec, shape: tuple[int, int]
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of every array that stores a matrix `shape` under `spec`."""
    rows, columns = shape
    groups = -(-columns // block_size(spec, columns))
    scale_dtype = SCALE_DTYPES[spec.scale_dtype]
    u8, f32 = np.dtype(np.uint8), np.dtype(np.float32)
    parts: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "codes": (u8, (rows, packed_bytes(columns, spec.bits))),
        "scales": (u8 if spec.double_quant else scale_dtype, (rows, groups)),
    }
    if DATA_TYPES[spec.dtype].zero_point:
        parts["zeros"] = (u8, (rows, groups))
    if spec.center:
        parts["means"] = (scale_dtype, (rows, groups))
    if DATA_TYPES[spec.dtype].codebook is None:
        parts["codebook"] = (f32, (1 << spec.bits,))
    if spec.outliers:
        count = outlier_count(spec, columns)
        parts["outlier_columns"] = (np.dtype(np.int32), (count,))
        parts["outliers"] = (np.dtype(np.float16), (rows, count))
    if spec.double_quant:
        parts["scale_absmax"] = (f32, (-(-rows * groups // DOUBLE_QUANT_BLOCK),))
        parts["scale_offset"] = (f32, (1,))
    return parts


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix `[N, K]` (output rows, input columns); U = ceil(K/32), G = blocks a row.

    Attributes:
        spec, shape: what is stored.
        codes: uint8 `[N, U*4k]`, planar (see `packing`).
        scales: `[N, G]` in the spec's scale dtype; uint8 codes if double-quantized.
        zeros: uint8 `[N, G]`, for types with a zero point.
        means: `[N, G]` in the scale dtype, if centered.
        codebook: fp32 `[2^k]` ascending, for learned codebooks.
        outlier_columns: int32 `[J]` ascending; these columns' weights are `outliers`.
        outliers: fp16 `[N, J]`.
        scale_absmax: fp32 `[ceil(N*G/256)]`, if double-quantized: a scale is
            `dynamic8[scales.flat[i]] * scale_absmax[i // 256] + scale_offset`.
        scale_offset: fp32 `[1]`.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    zeros: NDArray[np.uint8] | None = None
    means: NDArray[Any] | None = None
    codebook: NDArray[np.float32] | None = None
    outlier_columns: NDArray[np.int32] | None = None
    outliers: NDArray[np.float16] | None = None
    scale_absmax: NDArray[np.float32] | None = None
    scale_offset: NDArray[np.float32] | None = None

    @classmethod
    def from_parts(
        cls, spec: QuantSpec, shape: tuple[int, int], parts: Mapping[str, NDArray[Any]]
    ) -> "QuantizedTensor":
        """The tensor over `parts` (suffix -> array), every one checked against the spec.

        Raises:
            KbitError: a part is missing, unknown, or of another dtype or shape than the spec says;
                or outlier columns that are out of range or not ascending.
        """
        expected = expected_parts(spec, shape)
        for suffix in expected.keys() - parts.keys():
            raise KbitError(f"part {suffix!r} of a {spec} tensor is missing")
        for suffix in parts.keys() - expected.keys():
            raise KbitError(f"part {suffix!r} does not belong to a {spec} tensor")
        for suffix, (dtype, part_shape) in expected.items():
            found = parts[suffix]
            if found.dtype != dtype or found.shape != part_shape:
                raise KbitError(
                    f"part {suffix!r} is {found.dtype} {list(found.shape)}, but a {spec} tensor of"
                    f" shape {list(shape)} needs {dtype} {list(part_shape)}"
                )
        if "outlier_columns" in parts:
            columns = parts["outlier_columns"]
            ascending = bool((np.diff(columns) > 0).all())
            if not ascending or columns[0] < 0 or columns[-1] >= shape[1]:
                raise KbitError(
                    f"part 'outlier_columns' must ascend within 0..{shape[1] - 1}, but does not"
                )
        return cls(spec, shape, **parts)

    def parts(self) -> dict[str, NDArray[Any]]:
        """Suffix -> array, as stored."""
        found = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return {suffix: array for suffix, array in found.items() if array is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored for this matrix."""
        return sum(array.nbytes for array in self.parts().values())

    @property
    def bits_per_param(self) -> float:
        """Measured size: all stored bytes times 8 over the number of weights."""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    def values(self) -> NDArray[np.float32]:
        """The ascending codebook, fp32 `[2^k]`; for `uint` before the zero point is subtracted."""
        fixed = codebook_of(self.spec)
        if fixed is not None:
            return fixed
        assert self.codebook is not None
        return self.codebook

    def scale_values(self) -> NDArray[np.float32]:
        """The scales, fp32 `[N, G]`, double quantization undone."""
        if not self.spec.double_quant:
            return self.scales.astype(np.float32)
        assert SCALE_CODEBOOK is not None
        assert self.scale_absmax is not None
        assert self.scale_offset is not None
        flat = SCALE_CODEBOOK[self.scales.reshape(-1)]
        absmax = np.repeat(self.scale_absmax, DOUBLE_QUANT_BLOCK)[: flat.size]
        return (flat * absmax + self.scale_offset).reshape(self.scales.shape)

    def rows(self, index: slice | NDArray[np.integer[Any]]) -> "QuantizedTensor":
        """The same matrix with only the rows `index` (a view for a slice)."""
        if self.spec.double_quant:  # a block of scales may straddle rows
            return self.with_plain_scales().rows(index)
        per_row = ("codes", "scales", "zeros", "means", "outliers")
        taken: dict[str, Any] = {
            name: array[index] for name, array in self.parts().items() if name in per_row
        }
        return replace(self, shape=(taken["codes"].shape[0], self.shape[1]), **taken)

    def with_plain_scales(self) -> "QuantizedTensor":
        """The same weights with fp32 scales instead of double-quantized ones."""
        if not self.spec.double_quant:
            return self
        means = None if self.means is None else self.means.astype(np.float32)
        return replace(
            self,
            spec=replace(self.spec, double_quant=False, scale_dtype="fp32"),
            scales=self.scale_values(),
            means=means,
            scale_absmax=None,
            scale_offset=None,
        )
