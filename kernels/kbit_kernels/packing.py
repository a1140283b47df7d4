"""Codes to planes and back: exactly k bits a code.

A row of K codes is padded with zeros to U = ceil(K / 32) units of 32 codes. The k bits of a code
are cut, most significant first, into planes of width 8, 4, 2, 1:

    k      2     3     4     5     6     7       8
    planes 2     2+1   4     4+1   4+2   4+2+1   8

In the plane of width w a unit takes 4w bytes. Code c (0..31) of the unit lies in byte `c % 4w`, at
bit `w * (c // 4w)`. One unit of the plane of width 4, byte by byte (low nibble, high nibble):

    byte   0        1        ...  15
    codes  0, 16    1, 17    ...  15, 31

and of width 2 (bits 0-1, 2-3, 4-5, 6-7):

    byte   0            1            ...  7
    codes  0,8,16,24    1,9,17,25    ...  7,15,23,31

So 32 codes in natural order are one broadcast of 4w bytes, one shift by a lane's multiple of w and
one mask, for every w, on AVX2, AVX-512 and in Triton. A row of the packed array is its planes one
after the other, widest first: `[plane w1: U*4*w1 bytes][plane w2: U*4*w2 bytes]...`. Rows are
independent, so that rows can be gathered and matrices stacked without unpacking; the first planes
alone are a coarser code of the same weight. Changing any of this changes `format_version`.
"""

import numpy as np
from numpy.typing import NDArray

UNIT = 32


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a k-bit code, widest (most significant bits) first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row of `columns` codes."""
    return -(-columns // UNIT) * 4 * bits


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes.

    Args:
        codes: uint8 `[N, K]`, each below 2^bits.
        bits: width k.

    Returns:
        uint8 `[N, ceil(K/32) * 4k]`.
    """
    rows, columns = codes.shape
    units = -(-columns // UNIT)
    if columns != units * UNIT:
        codes = np.pad(codes, ((0, 0), (0, units * UNIT - columns)))
    out = np.empty((rows, units * 4 * bits), dtype=np.uint8)
    start, low = 0, bits
    for width in plane_widths(bits):
        low -= width
        fields = 8 // width
        plane = (codes >> low) & ((1 << width) - 1)
        plane = plane.reshape(rows, units, fields, 4 * width)
        packed = plane[:, :, 0].copy()
        for field in range(1, fields):
            packed |= plane[:, :, field] << (width * field)
        stop = start + units * 4 * width
        out[:, start:stop] = packed.reshape(rows, -1)
        start = stop
    return out


def unpack(packed: NDArray[np.uint8], bits: int, columns: int) -> NDArray[np.uint8]:
    """The codes uint8 `[N, columns]` of `packed` uint8 `[N, ceil(columns/32) * 4k]`."""
    rows = packed.shape[0]
    units = -(-columns // UNIT)
    assert packed.shape[1] == units * 4 * bits, (packed.shape, bits, columns)
    codes = np.zeros((rows, units, UNIT), dtype=np.uint8)
    start, low = 0, bits
    for width in plane_widths(bits):
        low -= width
        stop = start + units * 4 * width
        plane = packed[:, start:stop].reshape(rows, units, 1, 4 * width)
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        fields = (plane >> shifts) & np.uint8((1 << width) - 1)
        codes |= fields.reshape(rows, units, UNIT) << low
        start = stop
    return codes.reshape(rows, units * UNIT)[:, :columns]
