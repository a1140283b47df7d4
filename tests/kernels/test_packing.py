import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit_kernels.packing import pack, packed_bytes, plane_widths, unpack

sizes = st.integers(1, 5), st.integers(1, 200)


@given(st.integers(2, 8), *sizes, st.randoms(use_true_random=False))
def test_pack_and_unpack_are_inverse(bits: int, rows: int, columns: int, random) -> None:
    rng = np.random.default_rng(random.getrandbits(32))
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_bytes(columns, bits))
    np.testing.assert_array_equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_exactly_k_bits_in_documented_places(bits: int) -> None:
    """Every code's bits are found by the formula in the module's text, plane by plane."""
    columns, units = 96, 3
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, columns), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.nbytes * 8 == codes.size * bits
    for row in range(2):
        for column in range(columns):
            unit, c = divmod(column, 32)
            value, start = 0, 0
            for width in plane_widths(bits):
                byte = packed[row, start + unit * 4 * width + c % (4 * width)]
                field = (int(byte) >> (width * (c // (4 * width)))) & ((1 << width) - 1)
                value = value << width | field
                start += units * 4 * width
            assert value == codes[row, column]


@pytest.mark.parametrize(("bits", "coarser"), [(3, 2), (5, 4), (6, 4), (7, 4), (7, 6)])
def test_the_first_planes_are_a_coarser_code(bits: int, coarser: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 70), dtype=np.uint8)
    packed = pack(codes, bits)
    prefix = packed[:, : packed_bytes(70, coarser)]
    np.testing.assert_array_equal(unpack(prefix, coarser, 70), codes >> (bits - coarser))


def test_rows_are_independent() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (6, 50), dtype=np.uint8)
    np.testing.assert_array_equal(pack(codes, 3)[2:4], pack(codes[2:4], 3))
