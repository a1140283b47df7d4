"""bitsandbytes' own NF4, FP4 and 8-bit dynamic quantization, code by code and scale by scale."""

import numpy as np
import pytest

import kbit_kernels as kk
from kbit_kernels import QuantSpec
from kbit_kernels.packing import unpack

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")
SHAPE = (64, 1024)


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal(SHAPE) * rng.lognormal(size=(SHAPE[0], 1))).astype(np.float32)


@pytest.mark.parametrize(("quant_type", "text"), [("nf4", "nf4"), ("fp4", "bnb4")])
def test_four_bits(weights: np.ndarray, quant_type: str, text: str) -> None:
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(weights), blocksize=64, quant_type=quant_type
    )
    ours = kk.quantize(weights, QuantSpec.parse(f"{text}-b64-fp32"), backend="reference")
    np.testing.assert_array_equal(ours.scales, state.absmax.numpy().reshape(SHAPE[0], -1))
    pairs = packed.numpy().reshape(-1)
    their_codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(SHAPE)
    # theirs are in an order of their own: compared through the values they stand for
    np.testing.assert_array_equal(
        ours.values()[unpack(ours.codes, 4, SHAPE[1])], state.code.numpy()[their_codes]
    )
    np.testing.assert_array_equal(
        kk.dequantize(ours, backend="reference"), bnb.dequantize_4bit(packed, state).numpy()
    )


def test_eight_bit_dynamic(weights: np.ndarray) -> None:
    codes, state = bnb.quantize_blockwise(torch.from_numpy(weights), blocksize=256)
    ours = kk.quantize(weights, QuantSpec.parse("dynamic8-b256-fp32"), backend="reference")
    scales = state.absmax.numpy().reshape(SHAPE[0], -1)
    np.testing.assert_array_equal(ours.scales, scales)
    table = state.code.numpy().astype(np.float64)
    np.testing.assert_allclose(ours.values(), table, atol=6e-8)  # one ulp
    # their CPU kernel looks codes up in a table of 65,536 bins, so that within a bin of a midpoint
    # it does not always take the nearest code; everywhere else the codes are the same
    theirs, mine = codes.numpy(), unpack(ours.codes, 8, SHAPE[1])
    differ = theirs != mine
    normalized = (weights / np.repeat(scales, 256, axis=1))[differ].astype(np.float64)
    assert differ.mean() < 0.003
    assert (np.abs(theirs[differ].astype(int) - mine[differ]) == 1).all()
    midpoint = (table[theirs[differ]] + table[mine[differ]]) / 2
    assert np.abs(normalized - midpoint).max() < 2.0**-15
    off = np.abs(normalized - table[theirs[differ]]) - np.abs(normalized - table[mine[differ]])
    assert (off > -1e-7).all()


def test_the_float_map_with_its_inverted_exponent() -> None:
    for bits, exponent in [(3, 2), (4, 2), (4, 3), (5, 3), (6, 3), (7, 4), (8, 4), (8, 5)]:
        theirs = bnb.create_fp8_map(True, exponent, bits - 1 - exponent, bits).numpy()
        ours = kk.quantize(
            np.ones((1, 16), np.float32), QuantSpec("fpb", bits, 16, exponent)
        ).values()
        np.testing.assert_allclose(np.unique(ours), np.unique(theirs), rtol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_dynamic_map(bits: int) -> None:
    theirs = np.unique(bnb.create_dynamic_map(True, bits - 1, bits).numpy())
    ours = kk.quantize(np.ones((1, 16), np.float32), QuantSpec("dynamic", bits, 16)).values()
    np.testing.assert_allclose(ours, theirs, atol=6e-8)
