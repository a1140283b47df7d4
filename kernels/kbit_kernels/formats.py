"""The table of data types: one row a type, any width 2 to 8.

A type is an ascending codebook of 2^k values; a weight is `codebook[code] * scale (+ mean)`, or
`(code - zero) * scale` for types with a zero point. Constants and test vectors: Dettmers &
Zettlemoyer 2212.09720 (float, dynamic, quantile), QLoRA 2305.14314 (NF4), Yoshida 2306.06965 (AF4),
bitsandbytes' `functional.py` (its variants of float and dynamic), Lloyd 1982 / Max 1960.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from kbit_kernels.learned import lloyd_codebook, quantile_codebook
from kbit_kernels.spec import QuantSpec

Codebook = NDArray[np.float32]
ALL_WIDTHS = tuple(range(2, 9))


@dataclass(frozen=True)
class DataType:
    """One row of the table.

    Attributes:
        name: as it stands in a spec's string.
        summary: one line for help texts.
        widths: the k for which the type is defined.
        codebook: spec -> ascending fp32 `[2^k]`; None where the codebook is learned.
        learn: `(normalized_weights, importance, bits) -> fp32 [2^k]`, for learned codebooks: the
            weights divided by their block's scale (flat fp32), and the squares of those scales.
        zero_point: weights are `(code - zero) * scale` with a zero a block.
        default_exponent: width -> exponent bits, for k-bit floats.
        blocks: the only block sizes the type is defined for; None: every one.
    """

    name: str
    summary: str
    widths: tuple[int, ...] = ALL_WIDTHS
    codebook: Callable[[QuantSpec], Codebook] | None = None
    learn: Callable[[NDArray[np.float32], NDArray[np.float32], int], Codebook] | None = None
    zero_point: bool = False
    default_exponent: Mapping[int, int] | None = None
    blocks: tuple[int, ...] | None = None


def _int(spec: QuantSpec) -> Codebook:
    half = 1 << (spec.bits - 1)
    return np.arange(-half, half, dtype=np.float32)


def _uint(spec: QuantSpec) -> Codebook:
    return np.arange(1 << spec.bits, dtype=np.float32)


def _signed(magnitudes: Sequence[float] | NDArray[np.float64]) -> Codebook:
    """Ascending sign-magnitude codebook over `[2^(k-1)]` magnitudes; zero stands in it twice."""
    positive = np.sort(np.asarray(magnitudes, dtype=np.float64))
    positive = positive / positive[-1]
    # 0.0 - x: the negative zero of sign-magnitude would print and compare oddly
    return np.concatenate([0.0 - positive[::-1], positive]).astype(np.float32)


def _fp(spec: QuantSpec) -> Codebook:
    assert spec.exponent is not None
    mantissas = np.arange(1 << (spec.bits - 1 - spec.exponent)) / (
        1 << (spec.bits - 1 - spec.exponent)
    )
    exponents = np.arange(1, 1 << spec.exponent)
    normal = (1.0 + mantissas) * np.exp2(exponents.astype(np.float64))[:, None]
    return _signed(np.concatenate([2.0 * mantissas, normal.ravel()]))


def _fpb(spec: QuantSpec) -> Codebook:
    # bitsandbytes' create_fp8_map: the subnormals stand a factor 2^(bias) off the normals, so
    # they do not join them; kept because published results use it
    assert spec.exponent is not None
    bias = 1 << (spec.exponent - 1)
    mantissas = np.arange(1 << (spec.bits - 1 - spec.exponent)) / (
        1 << (spec.bits - 1 - spec.exponent)
    )
    exponents = np.arange(1, 1 << spec.exponent)
    normal = (1.0 + mantissas) * np.exp2((bias + 1.0) - exponents)[:, None]
    return _signed(np.concatenate([mantissas * 2.0**-bias, normal.ravel()]))


def _bnb_fp4(spec: QuantSpec) -> Codebook:
    return _signed([0, 0.0625, 2, 3, 4, 6, 8, 12])


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

_AF4 = (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
)  # fmt: skip


def _nf(spec: QuantSpec) -> Codebook:
    if spec.bits == 4:  # the published table; the construction below is within 1e-6 of it
        return np.array(_NF4, dtype=np.float32)
    levels = 1 << spec.bits
    outermost = 1.0 - 0.5 * (1 / (2 * (levels - 1)) + 1 / (2 * levels))
    inverse = np.vectorize(NormalDist().inv_cdf)
    positive = inverse(np.linspace(outermost, 0.5, levels // 2 + 1)[:-1])
    negative = -inverse(np.linspace(outermost, 0.5, levels // 2)[:-1])
    values = np.sort(np.concatenate([negative, [0.0], positive]))
    return (values / values[-1]).astype(np.float32)


def _af4(spec: QuantSpec) -> Codebook:
    return np.array(_AF4, dtype=np.float32)


def _dynamic(spec: QuantSpec) -> Codebook:
    exponent_bits = spec.bits - 1
    values = [0.0, 1.0]
    for i in range(exponent_bits):
        edges = np.linspace(0.1, 1.0, (1 << i) + 1)
        decade = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i + 1 - exponent_bits)
        values += [*decade, *-decade]
    return np.sort(values).astype(np.float32)


_FLOAT_EXPONENTS = {2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}  # 2212.09720, appendix C.4

DATA_TYPES: dict[str, DataType] = {
    row.name: row
    for row in (
        DataType("int", "symmetric integers", codebook=_int),
        DataType("uint", "integers with a zero point", codebook=_uint, zero_point=True),
        DataType(
            "fp",
            "k-bit floats with IEEE-like subnormals (OCP MX at 4, 6, 8 bits)",
            codebook=_fp,
            default_exponent=_FLOAT_EXPONENTS,
        ),
        DataType(
            "fpb",
            "k-bit floats as bitsandbytes' float map builds them",
            codebook=_fpb,
            default_exponent=_FLOAT_EXPONENTS,
        ),
        DataType("bnb", "bitsandbytes' FP4 table", widths=(4,), codebook=_bnb_fp4),
        DataType("nf", "normal floats: quantiles of a Gaussian", codebook=_nf),
        DataType("af4", "abnormal floats for block 64", widths=(4,), codebook=_af4, blocks=(64,)),
        DataType("dynamic", "decimal exponent, linear mantissa", codebook=_dynamic),
        DataType("quantile", "quantiles of the tensor's own values", learn=quantile_codebook),
        DataType("lloyd", "the tensor's least-squares codebook (Lloyd-Max)", learn=lloyd_codebook),
    )
}


def codebook_of(spec: QuantSpec) -> Codebook | None:
    """The ascending fp32 codebook `[2^k]` of `spec`; None where each tensor learns its own."""
    row = DATA_TYPES[spec.dtype]
    return None if row.codebook is None else row.codebook(spec)
