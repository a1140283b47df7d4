"""Round to nearest: weights to codes, with an optional search for the best scale of each block."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit_kernels.errors import KbitError
from kbit_kernels.formats import DATA_TYPES, codebook_of
from kbit_kernels.learned import SAMPLE
from kbit_kernels.packing import pack, packed_bytes
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import (
    DOUBLE_QUANT_BLOCK,
    SCALE_CODEBOOK,
    SCALE_DTYPES,
    QuantizedTensor,
    block_size,
    outlier_count,
)

F32 = NDArray[np.float32]
_CHUNK = 1 << 21  # weights worked on at a time
# shrinking a scale trades the block's extremes for its many small weights; above 1 it helps only
# types whose outermost codes lie far apart
SEARCH_FACTORS = np.arange(0.60, 1.0501, 0.025).astype(np.float32)


def round_scales(exact: F32, spec: QuantSpec, *, up: bool = False) -> NDArray[Any]:
    """Exact fp32 scales in the spec's scale dtype, so that no block that has a weight gets scale 0.

    To nearest; subnormal results, which would clip the block's largest weight, upwards; with `up`,
    all of them upwards.

    Raises:
        KbitError: a scale beyond the range of the scale dtype.
    """
    dtype = SCALE_DTYPES[spec.scale_dtype]
    with np.errstate(over="ignore"):
        rounded = exact.astype(dtype)
    back = rounded.astype(np.float32)
    if not np.isfinite(back).all():
        raise KbitError(
            f"a block needs the scale {exact.max():.3g}, beyond {spec.scale_dtype};"
            " choose scale dtype bf16 or fp32"
        )
    tiny = 2.0**-14 if spec.scale_dtype == "fp16" else 2.0**-126
    short = (back < exact) if up else (back < exact) & (back < tiny)
    # the patterns of non-negative floats ascend with their values
    bits: NDArray[Any] = rounded.view(np.uint32 if dtype.itemsize == 4 else np.uint16)
    bits += short.astype(bits.dtype)
    return rounded


def _blocks(w: F32, block: int) -> F32:
    """`[N, K]` -> `[N, G, block]`, the last block padded with zeros."""
    rows, columns = w.shape
    groups = -(-columns // block)
    if columns != groups * block:
        w = np.pad(w, ((0, 0), (0, groups * block - columns)))
    return w.reshape(rows, groups, block)


def nearest_code(normalized: F32, codebook: F32) -> NDArray[np.uint8]:
    """Index of the nearest codebook entry; a tie goes to the lower one, for integers to the even.

    `normalized` is fp32 of any shape: weights divided (fp32 division) by their block's scale.
    """
    if codebook.size > 2 and bool((np.diff(codebook) == 1).all()):
        codes = np.rint(normalized) - codebook[0]
        return np.clip(codes, 0, codebook.size - 1).astype(np.uint8)
    midpoints = ((codebook[1:].astype(np.float64) + codebook[:-1]) / 2).astype(np.float32)
    return np.searchsorted(midpoints, normalized).astype(np.uint8)


def _divide(w: F32, scales: F32) -> F32:
    """`w [N, G, B] / scales [N, G]`, 0 where the scale is 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        normalized = w / scales[:, :, None]
    if not scales.all():
        normalized[scales == 0] = 0.0
    return normalized


def _best_scales(w: F32, scales: F32, spec: QuantSpec, codebook: F32) -> F32:
    """Of SEARCH_FACTORS times `scales [N, G]`, the one of least squared error for each block."""
    best = scales.copy()
    least = np.full(scales.shape, np.inf)
    for factor in SEARCH_FACTORS:
        candidate = round_scales(scales * factor, spec).astype(np.float32)
        decoded = codebook[nearest_code(_divide(w, candidate), codebook)] * candidate[:, :, None]
        error = np.square(decoded - w, dtype=np.float64).sum(axis=2)
        better = error < least
        best[better] = candidate[better]
        least[better] = error[better]
    return best


def _double_quantize(scales: F32) -> tuple[NDArray[np.uint8], F32, F32]:
    """Scales `[N, G]` -> 8-bit codes, absmax a block of 256, offset (QLoRA: minus their mean)."""
    assert SCALE_CODEBOOK is not None
    offset = scales.mean(dtype=np.float64).astype(np.float32).reshape(1)
    flat = scales.reshape(-1) - offset
    blocks = _blocks(flat.reshape(1, -1), DOUBLE_QUANT_BLOCK)
    absmax = np.abs(blocks).max(axis=2)
    codes = nearest_code(_divide(blocks, absmax), SCALE_CODEBOOK)
    return codes.reshape(-1)[: flat.size].reshape(scales.shape), absmax.reshape(-1), offset


def affine_parameters(
    low: F32, high: F32, spec: QuantSpec
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Scales and zero points of blocks `[N, G]` from low <= 0 to high >= 0, so that 0 stays 0."""
    top = (1 << spec.bits) - 1
    # each end divided on its own: their difference may overflow
    step = np.float32(top)
    scales = round_scales(high / step - low / step, spec, up=True)
    wide = scales.astype(np.float32)
    zeros = np.rint(np.divide(-low, wide, out=np.zeros_like(low), where=wide > 0))
    return scales, np.clip(zeros, 0, top).astype(np.uint8)


def _affine_codes(w: F32, scales: F32, zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    codes = np.rint(_divide(w, scales)) + zeros[:, :, None].astype(np.float32)
    return np.clip(codes, 0, (1 << bits) - 1).astype(np.uint8)


def _best_affine(
    w: F32, spec: QuantSpec, scales: NDArray[Any], zeros: NDArray[np.uint8]
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    top = (1 << spec.bits) - 1
    low = np.minimum(w.min(axis=2), 0.0)
    best, best_zeros = scales.copy(), zeros.copy()
    least = np.full(zeros.shape, np.inf)
    wide = scales.astype(np.float32)
    for factor in SEARCH_FACTORS:
        candidate = round_scales(wide * factor, spec)
        scale = candidate.astype(np.float32)
        exact = np.divide(-low * factor, scale, out=np.zeros_like(low), where=scale > 0)
        zero = np.clip(np.rint(exact), 0, top).astype(np.uint8)
        codes = _affine_codes(w, scale, zero, spec.bits).astype(np.float32)
        decoded = (codes - zero[:, :, None].astype(np.float32)) * scale[:, :, None]
        error = np.square(decoded - w, dtype=np.float64).sum(axis=2)
        better = error < least
        best[better], best_zeros[better] = candidate[better], zero[better]
        least[better] = error[better]
    return best, best_zeros


def largest_deviation_columns(w: F32, count: int) -> NDArray[np.int32]:
    """The `count` input columns of `w [N, K]` whose weights have the largest standard deviation."""
    with np.errstate(invalid="ignore"):  # infinities are refused by name later
        deviation = w.std(axis=0, dtype=np.float64)
    return np.sort(np.argsort(-deviation, kind="stable")[:count]).astype(np.int32)


def _row_chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _prepared(
    w: NDArray[Any], spec: QuantSpec, kept: NDArray[np.int32] | None
) -> tuple[F32, NDArray[Any] | None]:
    """Blocks `[n, G, B]` of some rows: finite, outliers zeroed, centered; and the means."""
    columns = w.shape[1]
    block = block_size(spec, columns)
    weights = w.astype(np.float32)
    if not np.isfinite(weights).all():
        what = "NaN" if np.isnan(weights).any() else "an infinite weight"
        raise KbitError(f"the tensor has {what}; it cannot be quantized")
    if kept is not None:
        weights[:, kept] = 0.0
    blocks = _blocks(weights, block)
    if not spec.center:
        return blocks, None
    sizes = np.full(blocks.shape[1], block)
    sizes[-1] = columns - block * (blocks.shape[1] - 1)
    exact = blocks.sum(axis=2, dtype=np.float64) / sizes
    means = exact.astype(SCALE_DTYPES[spec.scale_dtype])
    blocks = blocks - means.astype(np.float32)[:, :, None]
    blocks[:, -1, sizes[-1] :] = 0.0
    return blocks, means


def _searched(blocks: F32, kept: NDArray[np.int32] | None) -> F32:
    """Blocks for the search: columns kept at 16 bits are 0 again, where centering moved them."""
    if kept is None:
        return blocks
    weights = blocks.reshape(blocks.shape[0], -1).copy()
    weights[:, kept] = 0.0
    return weights.reshape(blocks.shape)


def learn_codebook(
    w: NDArray[Any], spec: QuantSpec, outlier_columns: NDArray[np.integer[Any]] | None = None
) -> F32:
    """The codebook `[2^k]` that a learned data type takes for the whole matrix `w [N, K]`.

    Looks at no more than 8 million of the weights, evenly spaced, so that memory stays bounded.
    """
    data_type = DATA_TYPES[spec.dtype]
    assert data_type.learn is not None
    rows, columns = w.shape
    block = block_size(spec, columns)
    kept = None if outlier_columns is None else np.sort(outlier_columns).astype(np.int32)
    step = max(1, rows * columns // SAMPLE)
    points: list[F32] = []
    importance: list[F32] = []
    for part in _row_chunks(rows, columns):
        blocks, _ = _prepared(w[part], spec, kept)
        scales = round_scales(np.abs(blocks).max(axis=2), spec).astype(np.float32)
        flat = _divide(blocks, scales).reshape(blocks.shape[0], -1)[:, :columns].reshape(-1)
        weight = np.repeat(np.square(scales), block, axis=1)[:, :columns].reshape(-1)
        first = -part.start * columns % step
        points.append(flat[first::step].copy())
        importance.append(weight[first::step].copy())
    return data_type.learn(np.concatenate(points), np.concatenate(importance), spec.bits)


def quantize(
    w: NDArray[Any],
    spec: QuantSpec,
    *,
    search: bool = False,
    outlier_columns: NDArray[np.integer[Any]] | None = None,
    codebook: F32 | None = None,
) -> QuantizedTensor:
    """Round `w [N, K]` (fp32, fp16 or bf16) to the nearest codes of `spec`.

    Args:
        w: finite weights, output rows by input columns.
        spec: how to store them.
        search: choose each block's scale for the least squared error of its weights, instead of
            from its largest weight.
        outlier_columns: the columns to keep at 16 bits; by default, if the spec keeps any, those
            of the largest standard deviation.
        codebook: of a learned data type, `[2^k]`; by default learned from `w`.

    Raises:
        KbitError: a weight is NaN or infinite, or a scale or outlier does not fit its dtype.
    """
    rows, columns = w.shape
    chunks = _row_chunks(rows, columns)
    data_type = DATA_TYPES[spec.dtype]

    kept: NDArray[np.int32] | None = None
    outliers: NDArray[np.float16] | None = None
    if spec.outliers:
        count = outlier_count(spec, columns)
        if outlier_columns is None:
            kept = largest_deviation_columns(w.astype(np.float32), count)
        else:
            kept = np.sort(outlier_columns).astype(np.int32)
            assert kept.shape == (count,), (kept.shape, count)
        with np.errstate(over="ignore"):
            outliers = w[:, kept].astype(np.float16)
        if not np.isfinite(outliers).all():
            raise KbitError("an outlier column has a weight beyond fp16; leave outliers out")

    def prepared(part: slice) -> tuple[F32, NDArray[Any] | None]:
        return _prepared(w[part], spec, kept)

    found_scales: list[NDArray[Any]] = []
    found_means: list[NDArray[Any]] = []
    found_zeros: list[NDArray[np.uint8]] = []
    fixed = codebook_of(spec)
    peak = 1.0 if fixed is None else float(fixed[-1])
    for part in chunks:
        blocks, means = prepared(part)
        if means is not None:
            found_means.append(means)
        if data_type.zero_point:
            low = np.minimum(blocks.min(axis=2), 0.0)
            high = np.maximum(blocks.max(axis=2), 0.0)
            scales, zeros = affine_parameters(low, high, spec)
            if search:
                scales, zeros = _best_affine(_searched(blocks, kept), spec, scales, zeros)
            found_zeros.append(zeros)
        else:
            exact = np.abs(blocks).max(axis=2) / np.float32(peak)
            scales = round_scales(exact, spec)
            if search and fixed is not None:
                best = _best_scales(_searched(blocks, kept), exact, spec, fixed)
                scales = best.astype(SCALE_DTYPES[spec.scale_dtype])
        found_scales.append(scales)
    scales = np.concatenate(found_scales)

    if fixed is not None:
        codebook = fixed
    else:
        codebook = learn_codebook(w, spec, kept) if codebook is None else codebook
        if search:
            wide = scales.astype(np.float32)
            for part in chunks:
                best = _best_scales(_searched(prepared(part)[0], kept), wide[part], spec, codebook)
                scales[part] = best.astype(scales.dtype)

    stored = scales
    extra: dict[str, NDArray[Any]] = {}
    if spec.double_quant:
        stored, extra["scale_absmax"], extra["scale_offset"] = _double_quantize(
            scales.astype(np.float32)
        )
    tensor = QuantizedTensor(
        spec,
        (rows, columns),
        np.empty((rows, packed_bytes(columns, spec.bits)), dtype=np.uint8),
        stored,
        zeros=np.concatenate(found_zeros) if found_zeros else None,
        means=np.concatenate(found_means) if found_means else None,
        codebook=codebook if data_type.codebook is None else None,
        outlier_columns=kept,
        outliers=outliers,
        **extra,
    )
    # codes are chosen for the scales as they will be read back
    effective = tensor.scale_values()
    for part in chunks:
        blocks = prepared(part)[0]
        if tensor.zeros is not None:
            codes = _affine_codes(blocks, effective[part], tensor.zeros[part], spec.bits)
        else:
            codes = nearest_code(_divide(blocks, effective[part]), codebook)
        tensor.codes[part] = pack(codes.reshape(codes.shape[0], -1)[:, :columns], spec.bits)
    return tensor
