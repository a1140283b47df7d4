"""What the kernels share, on the device: decoding, tables, per-block values."""
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108, SIM300 (the Triton language has no such forms)

import triton
import triton.language as tl

from kbit_kernels.triton import layout

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PAIRED_BITS = tl.constexpr(layout.PAIRED_BITS)


@triton.jit
def dot(a, b, acc):
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bf16
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.constexpr_function
def _repeat(dtype, count):
    return (dtype,) * count


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
def _pairs(words):
    """The 32-bit pairs of a chunk's words."""
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    low, high = tl.split(words.to(tl.int32).reshape(R, W, 32, 4, 2))
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def _bits(word, WIDTH: tl.constexpr, OFFSET: tl.constexpr):
    """The lowest WIDTH bits, from bit OFFSET on."""
    return (word & ((1 << WIDTH) - 1)) << OFFSET


@triton.jit
def _decode_plain(
    words,
    table_ptr,
    OUTPUT: tl.constexpr,
    FIELDS: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    DT: tl.constexpr,
):
    """Output OUTPUT of a sub-tile: what `decode.decode_ptx` computes, in plain Triton."""
    # a field is (chunk, bit, width, offset)
    if KIND == "table" and BITS <= PAIRED_BITS:
        low = tl.zeros(_pairs(words[0]).shape, tl.int32)
        high = low
        for p in tl.static_range(len(FIELDS[OUTPUT])):
            pair = _pairs(words[FIELDS[OUTPUT][p][0]]) >> FIELDS[OUTPUT][p][1]
            low |= _bits(pair, FIELDS[OUTPUT][p][2] // 2, FIELDS[OUTPUT][p][3] // 2)
            pair = pair >> (FIELDS[OUTPUT][p][2] // 2)
            high |= _bits(pair, FIELDS[OUTPUT][p][2] // 2, FIELDS[OUTPUT][p][3] // 2)
        code = tl.join(low, high).reshape(words[0].shape)
    else:
        code = tl.zeros(words[0].shape, tl.int32)
        for p in tl.static_range(len(FIELDS[OUTPUT])):
            word = words[FIELDS[OUTPUT][p][0]].to(tl.int32) >> FIELDS[OUTPUT][p][1]
            code |= _bits(word, FIELDS[OUTPUT][p][2], FIELDS[OUTPUT][p][3])
    if KIND == "table":
        value = tl.load(table_ptr + code)
    elif KIND == "fp":
        gap: tl.constexpr = (5 if DT == tl.float16 else 8) - EXPONENT
        bias: tl.constexpr = 15 if DT == tl.float16 else 127
        sign = (code >> (BITS - 1)) << 15
        magnitude = (code & ((1 << (BITS - 1)) - 1)) << (16 - gap - BITS)
        if DT == tl.float16:
            value = (sign | magnitude).to(tl.int16).to(DT, bitcast=True).to(tl.float32)
        else:  # as the upper half of an fp32: the interpreter misreads bf16 below 2^-126
            value = ((sign | magnitude) << 16).to(tl.float32, bitcast=True)
        value = (value * (2.0 ** (bias - ((1 << EXPONENT) - 1)))).to(DT)
    else:
        value = (code - (1 << (BITS - 1))).to(tl.float32).to(DT)
    return value


@triton.jit
def decode(
    words,
    registers,
    table_ptr,
    PTX: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    FIELDS: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    DT: tl.constexpr,
):
    """All outputs of a sub-tile, a tuple of tensors shaped like a chunk."""
    if PTX == "":
        values = ()
        for j in tl.static_range(len(FIELDS)):
            values = values + (
                _decode_plain(words, table_ptr, j, FIELDS, BITS, KIND, EXPONENT, DT),
            )
    else:
        values = tl.inline_asm_elementwise(
            PTX,
            CONSTRAINTS,
            words + registers,
            dtype=_repeat(DT, len(FIELDS)),
            is_pure=True,
            pack=2,
        )
    return values


@triton.jit
def table(table_ptr, KIND: tl.constexpr, FILL: tl.constexpr):
    """What the PTX takes for its table: each lane's address of it in shared memory."""
    registers = ()
    if KIND == "table" and FILL != "":
        # for Triton one number, so that it never moves it between lanes; right with any lane's
        registers = (
            tl.inline_asm_elementwise(
                FILL, "=r,l", [table_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
            ),
        )
    return registers


@triton.jit
def pick(values, COUNT: tl.constexpr, INDEX: tl.constexpr):
    """`values[..., INDEX]` of `[A, B, C, D, E, COUNT]`; the last axis lies in registers."""
    a: tl.constexpr = values.shape[0]
    b: tl.constexpr = values.shape[1]
    c: tl.constexpr = values.shape[2]
    d: tl.constexpr = values.shape[3]
    e: tl.constexpr = values.shape[4]
    if COUNT == 1:
        picked = values.reshape(a, b, c, d, e)
    else:
        even, odd = tl.split(values.reshape(a, b, c, d, e, COUNT // 2, 2))
        if INDEX % 2 == 0:
            picked = pick(even, COUNT // 2, INDEX // 2)
        else:
            picked = pick(odd, COUNT // 2, INDEX // 2)
    return picked


@triton.jit
def per_row(values):
    """`[R, W, g, t, r]` -> fp32 `[W, R*16 rows, 1, t, 1]`, the shape of accumulators."""
    R: tl.constexpr = values.shape[0]
    W: tl.constexpr = values.shape[1]
    return tl.permute(values, (1, 0, 4, 2, 3)).reshape(W, R * 16, 1, 4, 1).to(tl.float32)


@triton.jit
def block_values(ptr, band, tile, tiles, valid, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Per-block values of a tile `[R, W, g 8, t 4, r 2, 256 / BLOCK]` (the same for every t)."""
    R: tl.constexpr = band.shape[1]
    W: tl.constexpr = tile.shape[2]
    N: tl.constexpr = 256 // BLOCK if BLOCK > 0 and BLOCK < 256 else 1
    per: tl.constexpr = BLOCK // 256 if BLOCK > 256 else 1
    # what one 128-bit load takes; the rest goes to the slowest axis, so that it stays in registers
    V: tl.constexpr = min(2 * N, 128 // ptr.dtype.element_ty.primitive_bitwidth)
    part = tl.arange(0, 2 * N // V)[:, None, None, None, None, None]
    g = tl.arange(0, 8)[None, None, None, :, None, None]
    t = tl.arange(0, 4)[None, None, None, None, :, None]
    e = tl.arange(0, V)[None, None, None, None, None, :]
    if BLOCK == 0:
        at = ptr + (band * 16 + g + e * 8 + t * 0 + tile * 0)
    else:
        block_tiles = (tiles + per - 1) // per
        at = ptr + (band * block_tiles + tile // per) * (16 * N) + (g * (2 * N) + part * V + e)
        at += t * 0
        if V >= 8:  # see linear_kernel
            at = tl.max_contiguous(at, [1, 1, 1, 2, 4, V])
    if EVEN or BLOCK == 0:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=valid, other=0)
    return tl.permute(values, (1, 2, 3, 4, 0, 5)).reshape(R, W, 8, 4, 2, N)
