"""What a tile has once a block: scales, zero points and means, packed as a lane loads them."""
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108 (the Triton language has no such forms)

import triton
import triton.language as tl

from kbit_kernels.triton import layout

# among axes without runs Triton gives lanes to the last ones, before 3.7 to the first ones
LANES_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))

_zero_registers = triton.constexpr_function(layout.zero_registers)


@triton.constexpr_function
def block_of(subtile, output, subtiles, block):
    """Index within its tile of the block that an output's 16 columns belong to."""
    return (subtile * (256 // subtiles) + output * 16) // block if 0 < block <= 256 else 0


@triton.constexpr_function
def ends_block(subtile, output, subtiles, block):
    """Whether an output is the last one of its block in this tile."""
    end = subtile * (256 // subtiles) + (output + 1) * 16
    return end % min(block, 256) == 0


@triton.jit
def per_row(values):
    """`[R, W, g, t, r]` -> fp32 `[W, R*16 rows, 1, t, 1]`, the shape of accumulators."""
    R: tl.constexpr = values.shape[0]
    W: tl.constexpr = values.shape[1]
    return tl.permute(values, (1, 0, 4, 2, 3)).reshape(W, R * 16, 1, 4, 1).to(tl.float32)


@triton.constexpr_function
def _packed_bits(block, width):
    """Bits of one load of per-block values: a lane's are `2 * 256 / block` of `width` bits. Never
    all of them, else Triton would see that lanes read side by side, and number lanes by that."""
    return min(64, max(1, 256 // block if block > 0 else 1) * width)


@triton.constexpr_function
def loads(block, width):
    """Loads for a lane's per-block values of a tile."""
    return 2 * max(1, 256 // block if block > 0 else 1) * width // _packed_bits(block, width)


@triton.constexpr_function
def _integer(bits):
    return {64: tl.int64, 32: tl.int32, 16: tl.int16}[bits]


@triton.jit
def block_pointers(
    ptr,
    band,
    last_band,
    first,
    tiles,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    EXIST: tl.constexpr,
):
    """Where a lane's per-block values of the tiles `first [1, W, 1, 1]` begin, for R bands from
    `band [1, W, 1, 1]` on: a tuple of pointers to integers, one per band (none unless they EXIST);
    see block_values.

    Each has no more elements than lanes: Triton then loads them where they are wanted, and not
    with other lanes, from which they had to be sent through shared memory.
    """
    COUNT: tl.constexpr = loads(BLOCK, ptr.dtype.element_ty.primitive_bitwidth)
    PER: tl.constexpr = BLOCK // 256 if BLOCK > 256 else 1
    kind: tl.constexpr = _integer(_packed_bits(BLOCK, ptr.dtype.element_ty.primitive_bitwidth))
    if LANES_FIRST:
        g = tl.arange(0, 8)[None, :, None, None]
        t = tl.arange(0, 4)[:, None, None, None]
        band = tl.permute(band, (3, 2, 1, 0))
        first = tl.permute(first, (3, 2, 1, 0))
    else:
        g = tl.arange(0, 8)[None, None, :, None]
        t = tl.arange(0, 4)[None, None, None, :]
    pointers = ()
    for r in tl.static_range(R if EXIST else 0):
        place = tl.minimum(band + r, last_band).to(tl.int64)
        if BLOCK != 0:
            place *= (tiles + PER - 1) // PER
        if BLOCK != 0 and PER == 1:
            place += first
        # never a tensor of pointers to bytes: Triton orders the left operand's columns by them
        at = ptr.to(tl.pointer_type(kind)) + ((place * 8 + g) * COUNT + t * 0)
        pointers = pointers + (at,)
    return pointers


@triton.jit
def block_values(
    pointers, step, tile, valid, COUNT: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    """A lane's per-block values of the tiles `tile = step + first [1, W, 1, 1]`, packed: a tuple of
    COUNT integers `[R, W, g 8, t 4]` (the same for every t)."""
    PER: tl.constexpr = BLOCK // 256 if BLOCK > 256 else 1
    R: tl.constexpr = len(pointers)
    if LANES_FIRST:
        tile = tl.permute(tile, (3, 2, 1, 0))
        valid = tl.permute(valid, (3, 2, 1, 0))
    packed = ()
    for i in tl.static_range(COUNT):
        words = ()
        for r in tl.static_range(R):
            at = pointers[r] + i
            if PER > 1:
                at += tile // PER * (8 * COUNT)
            elif BLOCK != 0:
                at += step * (8 * COUNT)
            if EVEN:
                word = tl.load(at)
            else:
                word = tl.load(at, mask=valid, other=0)
            if LANES_FIRST:
                word = tl.permute(word, (3, 2, 1, 0))
            words = words + (word,)
        packed = packed + (_stacked(words),)
    return packed


@triton.jit
def values_of_all(
    pointers,
    step,
    tile,
    valid,
    SCALE: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """block_values of scales, zero points and means, as far as there are `pointers`; of the types
    SCALE, ZERO and SCALE."""
    SCALES: tl.constexpr = loads(BLOCK, SCALE.primitive_bitwidth)
    ZEROS: tl.constexpr = loads(BLOCK, ZERO.primitive_bitwidth)
    scales = ()
    zeros = ()
    means = ()
    if len(pointers[0]) > 0:
        scales = block_values(pointers[0], step, tile, valid, SCALES, BLOCK, EVEN)
    if len(pointers[1]) > 0:
        zeros = block_values(pointers[1], step, tile, valid, ZEROS, BLOCK, EVEN)
    if len(pointers[2]) > 0:
        means = block_values(pointers[2], step, tile, valid, SCALES, BLOCK, EVEN)
    return scales, zeros, means


@triton.jit
def _stacked(words):
    """R tensors `[1, W, 8, 4]` as `[R, W, 8, 4]`."""
    R: tl.constexpr = len(words)
    W: tl.constexpr = words[0].shape[1]
    if R == 1:
        stacked = words[0]
    elif R == 2:
        stacked = tl.permute(tl.join(words[0], words[1]), (4, 0, 1, 2, 3)).reshape(2, W, 8, 4)
    else:
        low = _stacked((words[0], words[1]))
        high = _stacked((words[2], words[3]))
        stacked = tl.permute(tl.join(low, high), (4, 0, 1, 2, 3)).reshape(4, W, 8, 4)
    return stacked


@triton.constexpr_function
def _zero_bit(subtile, subtiles, block, register):
    """Where, among a row's packed zero points, those of a sub-tile's register begin."""
    first = subtile * (256 // subtiles) // block if 0 < block < 256 else 0
    return (first + 4 * register) * 8


@triton.jit
def _word_at(packed, BITS: tl.constexpr, AT: tl.constexpr):
    """32 bits of a lane's packed values, in words of BITS, from bit AT on: `[R, W, 32, 1]`."""
    R: tl.constexpr = packed[0].shape[0]
    W: tl.constexpr = packed[0].shape[1]
    return (packed[AT // BITS] >> (AT % BITS)).to(tl.int32).reshape(R, W, 32, 1)


@triton.jit
def zero_words(
    packed, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SUBTILE: tl.constexpr, SUBTILES: tl.constexpr
):
    """The zero points of a sub-tile for the words of a chunk, one a byte: a tuple of int32
    `[R, W, 32, 8]`."""
    BITS: tl.constexpr = _packed_bits(BLOCK, WIDTH)
    ROW: tl.constexpr = max(1, 256 // BLOCK if BLOCK > 0 else 1) * WIDTH
    COUNT: tl.constexpr = _zero_registers(256 // SUBTILES, BLOCK)
    words = ()
    for i in tl.static_range(COUNT):
        low = _word_at(packed, BITS, _zero_bit(SUBTILE, SUBTILES, BLOCK, i))
        high = _word_at(packed, BITS, ROW + _zero_bit(SUBTILE, SUBTILES, BLOCK, i))
        words = words + (tl.where(tl.arange(0, 8)[None, None, None, :] < 4, low, high),)
    return words


@triton.jit
def _unpack(packed, DTYPE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    WIDTH: tl.constexpr = DTYPE.primitive_bitwidth
    BITS: tl.constexpr = _packed_bits(BLOCK, WIDTH)
    kind: tl.constexpr = tl.int32 if WIDTH == 32 else tl.int16
    word = packed[INDEX * WIDTH // BITS] >> (INDEX * WIDTH % BITS)
    return word.to(kind).to(DTYPE, bitcast=True)


@triton.jit
def pick(packed, DTYPE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """The values `[R, W, g, t, r]` of block INDEX of the tile."""
    N: tl.constexpr = 256 // BLOCK if BLOCK > 0 and BLOCK < 256 else 1
    low = _unpack(packed, DTYPE, BLOCK, INDEX)
    high = _unpack(packed, DTYPE, BLOCK, N + INDEX)
    return tl.join(low, high)


@triton.jit
def word_values(
    packed, DTYPE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, DT: tl.constexpr
):
    """The per-block values of the words of a chunk in DT, `[R, W, 32, 8]`."""
    R: tl.constexpr = packed[0].shape[0]
    W: tl.constexpr = packed[0].shape[1]
    N: tl.constexpr = 256 // BLOCK if BLOCK > 0 and BLOCK < 256 else 1
    low = _unpack(packed, DTYPE, BLOCK, INDEX).to(tl.float32).to(DT).reshape(R, W, 32, 1)
    high = _unpack(packed, DTYPE, BLOCK, N + INDEX).to(tl.float32).to(DT).reshape(R, W, 32, 1)
    return tl.where(tl.arange(0, 8)[None, None, None, :] < 4, low, high)
