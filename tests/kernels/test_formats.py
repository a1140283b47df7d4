"""The data types against the published tables (constants: see kbit_kernels/formats.py)."""

from statistics import NormalDist

import numpy as np
import pytest

from kbit_kernels import QuantSpec
from kbit_kernels.formats import codebook_of
from kbit_kernels.learned import lloyd_max, quantile_midpoints
from tests.kernels.strategies import ALL_TYPES


def book(text: str) -> np.ndarray:
    codebook = codebook_of(QuantSpec.parse(text))
    assert codebook is not None
    return codebook


def positives(text: str) -> np.ndarray:
    codebook = book(text)
    return codebook[codebook.size // 2 :]


@pytest.mark.parametrize(("dtype", "bits", "exponent"), ALL_TYPES)
def test_codebooks_ascend_and_have_zero(dtype: str, bits: int, exponent: int | None) -> None:
    codebook = codebook_of(QuantSpec(dtype, bits, 64, exponent))
    if codebook is None:
        pytest.skip("learned from the tensor; tested with quantize")
    assert codebook.shape == (1 << bits,)
    assert codebook.dtype == np.float32
    assert (np.diff(codebook) >= 0).all()
    assert (codebook == 0).sum() == (2 if dtype in ("fp", "fpb", "bnb") else 1)
    if dtype not in ("int", "uint"):
        assert codebook[-1] == 1


def test_normal_floats() -> None:
    nf3 = [-1, -0.535023, -0.246931, 0, 0.183337, 0.381994, 0.622986, 1]
    np.testing.assert_allclose(book("nf3"), nf3, atol=1e-6)
    np.testing.assert_allclose(book("nf2"), [-1, 0, 0.435818, 1], atol=1e-6)
    nf4 = [
        -1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1,
    ]  # fmt: skip
    np.testing.assert_allclose(book("nf4"), nf4, atol=1e-7)


def test_af4() -> None:
    af4 = [
        -1, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0,
        0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1,
    ]  # fmt: skip
    np.testing.assert_allclose(book("af4"), af4, atol=1e-7)


@pytest.mark.parametrize(
    ("text", "magnitudes"),
    [
        ("bnb4", [0, 0.0052083, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1]),
        ("fpb4e2", [0, 0.020833, 0.166667, 0.25, 0.333333, 0.5, 0.666667, 1]),
        ("fpb4e3", [0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
        ("fpb3e2", [0, 0.25, 0.5, 1]),
        ("fp4e2", np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6),  # OCP MX E2M1
    ],
)
def test_floats(text: str, magnitudes: list[float]) -> None:
    np.testing.assert_allclose(positives(text), magnitudes, atol=1e-6)
    np.testing.assert_array_equal(book(text), -book(text)[::-1])


def test_float_subnormals() -> None:
    np.testing.assert_allclose(positives("fpb5e3")[:3], [0, 0.001302, 0.010417], atol=1e-6)
    np.testing.assert_allclose(positives("fp5e3")[:3], [0, 0.005208, 0.010417], atol=1e-6)


@pytest.mark.parametrize(
    ("text", "largest", "count"),
    [("fp6e2", 7.5, 32), ("fp6e3", 28.0, 32)],  # OCP MX E2M3, E3M2: every code is a number
)
def test_ocp_six_bit_floats(text: str, largest: float, count: int) -> None:
    values = positives(text) * largest
    assert values.size == count
    # E2M3 steps by 1/8 below 2; E3M2 by 1/16 below 1/2
    step = {"fp6e2": 0.125, "fp6e3": 0.0625}[text]
    np.testing.assert_allclose(values[:5], np.arange(5) * step, rtol=1e-6)


def test_dynamic() -> None:
    three = [-0.775, -0.325, -0.055, 0, 0.055, 0.325, 0.775, 1]
    np.testing.assert_allclose(book("dynamic3"), three, atol=1e-6)
    four = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1]
    np.testing.assert_allclose(book("dynamic4")[8:], four, atol=1e-6)
    eight = book("dynamic8")
    assert np.unique(eight).size == 256
    np.testing.assert_allclose(eight[eight > 0].min(), 5.5e-7, rtol=1e-5)


def test_quantile_of_a_gaussian() -> None:
    inverse = np.vectorize(NormalDist().inv_cdf)
    expected = [-1, -0.60213, -0.28732, 0, 0, 0.28732, 0.60213, 1]
    np.testing.assert_allclose(quantile_midpoints(inverse, 3), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "levels", "mse"),
    [
        (2, [0.45278, 1.51042], 0.117482),
        (3, [0.24509, 0.75601, 1.34391, 2.15195], 0.034548),
        (4, [0.1284, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259], 0.009501),
    ],
)
def test_lloyd_max_of_a_gaussian(bits: int, levels: list[float], mse: float) -> None:
    points = np.linspace(-8, 8, 200_001)
    weights = np.exp(-(points**2) / 2)
    weights /= weights.sum()
    start = np.linspace(-2.5, 2.5, 1 << bits)
    found = lloyd_max(points, weights, start, iterations=5000)
    np.testing.assert_allclose(found[1 << (bits - 1) :], levels, atol=5e-4)
    error = np.square(points - found[np.abs(points[:, None] - found).argmin(1)]) @ weights
    np.testing.assert_allclose(error, mse, rtol=1e-3)
