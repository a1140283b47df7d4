"""Where every bit of a weight lies on the GPU, and how it gets there from the stored planes.

The matrix is cut into tiles of 16 rows x 256 columns, one tile after the other along a row of
tiles. A tile is `k` chunks of 512 bytes. One warp loads a chunk with one 128-bit load per lane, and
lane `4g + t` (g 0..7, t 0..3) receives eight 16-bit words

    word 0..3: row g,     columns i = 0..3        word 4..7: row g + 8, columns i = 0..3

in which bit fields of several columns lie (below). That is the left operand of the tensor-core
instruction m16n8k16, so the words are decoded where they arrive: no shared memory, no shuffle.

A k-bit code is cut into fields of width 8, 4, 2, 1 (`planes`), the widest field holding the *low*
bits (the high bits where codes are left-aligned in their slots): then part of the groups need no
shift. The narrowest field has width f, so a word of that plane holds 16/f codes: 16/f *outputs* j,
each a 16 x 16 operand. The tile is f sub-tiles of 256/f columns, and in a sub-tile output j of lane
t, word column i is the column

    span 2 (blocks of 32 and more):  32 * (j // 2) + 8 * t + 4 * (j % 2) + i
    span 1 (blocks of 16):           16 * j        + 4 * t               + i

so that the activations of two outputs are one 128-bit load. Within a word, codes lie in slots of
s = 2, 4 or 8 bits (the smallest that holds k), 16/s slots a word; output j is slot `j % (16/s)` of
group `j // (16/s)`. In the plane of width w a word has room for s/w groups, and every s/w groups
begin the next chunk. Two groups share the halves of a slot: where one has its widest field in the
lower half, the other has its narrower fields there, so that one merge of the narrower planes serves
both (`Scheme.fields`). The chunks of a sub-tile follow each other, widest plane first.

Codes of tables with up to 4 bits are looked up in twos. All of the above then holds for *units* of
2k bits in the 32-bit pair of words i and i + 1 (i even), with planes twice as wide and slots of 8
bits: a plane's field is that of column i's code, and above it that of column i + 1.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from kbit_kernels.packing import UNIT, plane_widths
from kbit_kernels.spec import QuantSpec

if TYPE_CHECKING:
    import torch

ROWS, COLUMNS = 16, 256  # of a tile
CHUNK_WORDS = 256  # 16-bit words of one chunk: 512 bytes
PAIRED_BITS = 4  # the widest codes of which a byte holds two
_CODES_AT_A_TIME = 1 << 24

Kind = Literal["int", "uint", "fp", "table"]


@dataclass(frozen=True)
class Field:
    """The field of one output in one plane: `(word[chunk] >> bit) & (2^width - 1)`, which are the
    bits `offset` and up of the code (or of the unit of two codes, of a pair of words)."""

    chunk: int
    bit: int
    width: int
    offset: int


@dataclass(frozen=True)
class Scheme:
    """How codes of one width are laid out and decoded.

    Attributes:
        bits: width k of a code.
        kind: `int` and `uint`: arithmetic on the code; `fp`: sign, exponent and mantissa moved
            into a half; `table`: a lookup.
        exponent: exponent bits, for `fp`.
        span: outputs whose columns interleave, 1 or 2.
    """

    bits: int
    kind: Kind
    exponent: int = 0
    span: int = 2

    @property
    def planes(self) -> tuple[int, ...]:
        """Field widths, widest first."""
        return plane_widths(self.bits)

    @property
    def subtiles(self) -> int:
        """Sub-tiles of a tile."""
        return self.planes[-1]

    @property
    def outputs(self) -> int:
        """16 x 16 operands of a sub-tile."""
        return 16 // self.subtiles

    @property
    def chunks(self) -> int:
        """Chunks of a sub-tile."""
        return self.bits // self.subtiles

    @property
    def paired(self) -> bool:
        """Whether two codes are looked up at once."""
        return self.kind == "table" and self.bits <= PAIRED_BITS

    @property
    def unit(self) -> int:
        """Codes that are decoded at once from one slot."""
        return 2 if self.paired else 1

    @property
    def slot(self) -> int:
        """Bits of a slot."""
        if self.kind == "table":
            return 8
        return 2 if self.bits == 2 else 4 if self.bits <= 4 else 8

    @property
    def slots(self) -> int:
        """Slots of a word, or of a pair of words: the outputs of a group."""
        return self.unit * 16 // self.slot

    @property
    def base(self) -> int:
        """Bit of its slot at which a merged unit begins: 0, or as far left as the slot has room."""
        left = self.kind in ("fp", "table")
        return self.slot - self.unit * self.bits if left else 0

    @cached_property
    def fields(self) -> tuple[tuple[Field, ...], ...]:
        """Per output, its field in each plane, widest plane first."""
        half = self.slot // 2
        result = []
        for output in range(self.outputs):
            group, slot = divmod(output, self.slots)
            row, first_chunk, low = [], 0, 0
            for plane, plane_width in enumerate(self.planes):
                width = self.unit * plane_width
                chunk, place = divmod(group, self.slot // width)
                unit, upper = divmod(place, 2)
                # the first group of two has its fields where a merged unit has them
                upper ^= (plane > 0) ^ (self.base > 0)
                bit = slot * self.slot + (unit * width + half * upper if width < self.slot else 0)
                offset = self.unit * self.bits - low - width if self.base else low
                row.append(Field(first_chunk + chunk, bit, width, offset))
                first_chunk += plane_width // self.subtiles
                low += width
            result.append(tuple(row))
        return tuple(result)


def kind_of(spec: QuantSpec) -> Kind:
    """How `spec`'s codes are decoded."""
    if spec.dtype == "int":
        return "int"
    if spec.dtype == "uint":
        return "uint"
    # two lookups at once cost less; above 4 exponent bits a half's exponent overflows
    if spec.dtype == "fp" and spec.bits > PAIRED_BITS and (spec.exponent or 0) <= 4:
        return "fp"
    return "table"


def zero_registers(columns: int, block: int) -> int:
    """Registers that hold the zero points of a row for a sub-tile of so many columns, four bytes
    each; block: weights that share one, 0 a row."""
    return -(-columns // block // 4) if 0 < block < columns else 1


@lru_cache(maxsize=256)
def scheme_of(spec: QuantSpec) -> Scheme:
    """The scheme of `spec`."""
    kind = kind_of(spec)
    exponent = (spec.exponent or 0) if kind == "fp" else 0
    return Scheme(spec.bits, kind, exponent, span=1 if spec.block == 16 else 2)


def device_codes(spec: QuantSpec) -> np.ndarray:
    """uint8 `[2^k]`: stored code -> code on the GPU. Sign and magnitude for `fp`, else the same."""
    codes = np.arange(1 << spec.bits, dtype=np.uint8)
    if kind_of(spec) != "fp":
        return codes
    half = 1 << (spec.bits - 1)
    # the codebook is [-largest .. -0, +0 .. +largest], so a magnitude's index is its bit pattern
    return np.where(codes < half, (half - 1 - codes) | half, codes - half).astype(np.uint8)


def padded(rows: int, columns: int) -> tuple[int, int]:
    """Rows of tiles, tiles in a row."""
    return -(-rows // ROWS), -(-columns // COLUMNS)


def unpack_planes(packed: "torch.Tensor", bits: int) -> "torch.Tensor":
    """`kbit_kernels.packing.unpack` on any device: uint8 `[N, U*4k]` -> uint8 `[N, U*32]`."""
    import torch

    rows = packed.shape[0]
    units = packed.shape[1] // (4 * bits)
    codes = torch.zeros((rows, units, UNIT), dtype=torch.uint8, device=packed.device)
    start, low = 0, bits
    for width in plane_widths(bits):
        low -= width
        stop = start + units * 4 * width
        plane = packed[:, start:stop].reshape(rows, units, 4 * width)
        for field in range(8 // width):
            part = (plane >> (width * field)) & ((1 << width) - 1)
            codes[:, :, field * 4 * width : (field + 1) * 4 * width] |= part << low
        start = stop
    return codes.reshape(rows, units * UNIT)


def tile_words(codes: "torch.Tensor", scheme: Scheme) -> "torch.Tensor":
    """GPU codes uint8 `[N, K]` (multiples of 16, 256) -> words int16 `[N/16, K/256, 256k]`."""
    import torch

    rows, columns = codes.shape
    bands, tiles = rows // ROWS, columns // COLUMNS
    span, outputs = scheme.span, scheme.outputs
    # band, r, g, tile, subtile, output // span, t, output % span, i
    shape = (bands, 2, 8, tiles, scheme.subtiles, outputs // span, 4, span, 4)
    order = (0, 3, 4, 5, 7, 2, 6, 1, 8)  # -> band, tile, subtile, output, (g, t, r, i)
    lanes = codes.reshape(shape).permute(order)
    lanes = lanes.reshape(bands, tiles, scheme.subtiles, outputs, CHUNK_WORDS).to(torch.int32)
    unit = scheme.unit
    words = torch.zeros(
        (bands, tiles, scheme.subtiles, scheme.chunks, CHUNK_WORDS // unit),
        dtype=torch.int32,
        device=codes.device,
    )
    for output, fields in enumerate(scheme.fields):
        each = lanes[:, :, :, output].unflatten(-1, (-1, unit))  # [..., words, codes of a unit]
        for field in fields:
            width = field.width // unit
            part = (each >> (field.offset // unit)) & ((1 << width) - 1)
            for code in range(unit):
                words[:, :, :, field.chunk] |= part[..., code] << (field.bit + code * width)
    if unit == 2:
        words = torch.stack([words, words >> 16], dim=-1)
    return words.to(torch.int16).reshape(bands, tiles, scheme.bits * CHUNK_WORDS)


def rearrange(
    packed: "torch.Tensor", shape: tuple[int, int], spec: QuantSpec, device: "torch.device | str"
) -> "torch.Tensor":
    """Stored planes uint8 `[N, U*4k]` -> words int16 `[ceil(N/16), ceil(K/256), 256k]` on `device`.

    Rows and columns beyond the matrix hold code 0; a few rows are worked on at a time.
    """
    import torch

    rows, columns = shape
    bands, tiles = padded(rows, columns)
    scheme = scheme_of(spec)
    remap = torch.from_numpy(device_codes(spec)).to(device)
    out = torch.empty((bands, tiles, spec.bits * CHUNK_WORDS), dtype=torch.int16, device=device)
    step = max(1, _CODES_AT_A_TIME // (tiles * COLUMNS * ROWS))
    for band in range(0, bands, step):
        stop = min(band + step, bands)
        part = packed[band * ROWS : stop * ROWS].to(device)
        codes = torch.zeros(
            ((stop - band) * ROWS, tiles * COLUMNS), dtype=torch.uint8, device=device
        )
        unpacked = unpack_planes(part, spec.bits)[:, :columns]
        if scheme.kind == "fp":
            unpacked = remap[unpacked.to(torch.int32)]
        codes[: part.shape[0], :columns] = unpacked
        out[band:stop] = tile_words(codes, scheme)
    return out


def tile_blocks(values: "torch.Tensor", shape: tuple[int, int], block: int) -> "torch.Tensor":
    """Per-block values `[N, G]` in the order of the tiles.

    For blocks up to 256: `[bands, tiles, 8 (g), 2 (r), 256 / block]`, so that a lane's values of a
    tile are contiguous; for larger ones the same with one value and a tile of `block` columns; for
    whole rows (block 0) one tile. What lies beyond the matrix is 0.
    """
    import torch

    rows, columns = shape
    bands, _ = padded(rows, columns)
    width = max(block, COLUMNS)
    tiles, each = (-(-columns // width), width // block) if block else (1, 1)
    out = torch.zeros((bands * ROWS, tiles * each), dtype=values.dtype, device=values.device)
    out[:rows, : values.shape[1]] = values
    return out.reshape(bands, 2, 8, tiles, each).permute(0, 3, 2, 1, 4).contiguous()
