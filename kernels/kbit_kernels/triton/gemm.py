"""The matrix product for many rows of x: what is decoded stays in registers, x in shared memory.

A program owns W bands of 16 rows, one a warp, and BM rows of x. Tiles of 256 columns of both are on
their way through shared memory while the one before is worked on (Triton's `num_stages`), or those
of the weights in registers (`AHEAD`); the tensor cores of sm_90 take the decoded weights from
registers and x from shared memory, once for four warps (`wgmma`). Scales are multiplied into the
weights, as when they are dequantized: with so many rows of x that costs less than scaling the sums.

Lanes hold the columns of a product in an order of their own (`layout`), and x must lie in shared
memory in the same. It gets there in pieces of two columns or, where a kernel has arranged it
before (`ARRANGED`), of eight.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM300 (the Triton language has no such forms)

import triton
import triton.language as tl

from kbit_kernels.triton.blocks import (
    block_of,
    block_pointers,
    values_of_all,
    word_values,
    zero_words,
)
from kbit_kernels.triton.functions import (
    after_others,
    decode,
    dot,
    finish,
    halves,
    table,
    taken,
    tile_words,
)


@triton.jit
def _scaled(
    a,
    scales,
    means,
    factor,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    SCALING: tl.constexpr,
):
    """Decoded words `a [1, W, 32, 8]` times their block's scale, plus its mean / factor."""
    DT: tl.constexpr = a.dtype
    # only where products of halves are rounded once; scales of other types may not fit a half
    if SCALING != "" and DT == tl.float16 and SCALE == tl.float16 and not HAS_MEANS:
        s = word_values(scales, SCALE, BLOCK, INDEX, DT)
        a = tl.inline_asm_elementwise(
            SCALING, "=r,r,r", [a, s], dtype=a.dtype, is_pure=False, pack=2
        )
    else:
        wide = a.to(tl.float32) * word_values(scales, SCALE, BLOCK, INDEX, tl.float32)
        if HAS_MEANS:
            # the product will be multiplied by the factor, which is no mean's
            wide += word_values(means, SCALE, BLOCK, INDEX, tl.float32) / factor
        a = wide.to(DT)
    return a


@triton.jit
def _column(place, SPAN: tl.constexpr):
    """The column of x at a place of a product, whose order is that in which lanes hold weights: of
    64 places (output, hi, t, lo)."""
    if SPAN == 2:
        column = place // 32 * 32 + place // 2 % 4 * 8 + place // 16 % 2 * 4
    else:
        column = place // 16 * 16 + place // 2 % 4 * 4
    return column + place // 8 % 2 * 2 + place % 2


@triton.jit(do_not_specialize=["size"])
def arrange_kernel(
    x_ptr, out_ptr, size, SPAN: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    """out = x, `size` elements in rows of a multiple of 32, each row in the order of `_column`."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    after_others(OVERLAPS)
    x = tl.load(x_ptr + _column(place, SPAN), mask=place < size)
    tl.store(out_ptr + place, x, mask=place < size)


@triton.jit(do_not_specialize=["M", "tiles", "factor"])
def gemm_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    means_ptr,
    table_ptr,
    extra_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    factor,
    M,
    N,
    K,
    tiles,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    SPAN: tl.constexpr,
    FIELDS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ARRANGED: tl.constexpr,
    AHEAD: tl.constexpr,
    BM: tl.constexpr,
    W: tl.constexpr,
    SPLIT: tl.constexpr,
    PTX: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    SCALING: tl.constexpr,
    FILL: tl.constexpr,
    OVERLAPS: tl.constexpr,
    GATE: tl.constexpr,
):
    """out [M, N] = x [M, K] @ W.T * factor + extra [M, N] + bias [N], and what `finish` says; fp32
    accumulation. `tiles` = ceil(K / 256); SPLIT programs share an output. ARRANGED: x is what
    arrange_kernel makes of it. AHEAD: the next tile of weights is loaded into registers at the
    beginning of a step; what the loop carries goes past Triton's pipeline."""
    DT: tl.constexpr = x_ptr.dtype.element_ty
    SCALE: tl.constexpr = scales_ptr.dtype.element_ty
    ZERO: tl.constexpr = zeros_ptr.dtype.element_ty
    OUTPUTS: tl.constexpr = len(FIELDS)
    pid_n = tl.program_id(0)
    registers = table(table_ptr, KIND, FILL)

    last_band = (N + 15) // 16 - 1  # bands beyond the matrix repeat the last one, unstored
    band = pid_n * W + tl.arange(0, W)[None, :, None, None]
    word = tl.arange(0, 32)[None, None, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    w_ptrs = words_ptr.to(tl.pointer_type(tl.int32))
    w_ptrs += tl.minimum(band, last_band).to(tl.int64) * (tiles * (BITS * 128)) + word
    w_ptrs = tl.max_contiguous(w_ptrs, [1, 1, 2, 4])  # see linear_kernel
    none = tl.zeros([1, W, 1, 1], tl.int32)
    always = none == 0

    column = tl.arange(0, 64)
    if not ARRANGED:
        column = _column(column, SPAN)
    row = tl.minimum(tl.program_id(1) * BM + tl.arange(0, BM), M - 1)
    x_ptrs = x_ptr + (row[:, None].to(tl.int64) * K + column[None, :])
    if not ARRANGED:
        x_ptrs = tl.max_contiguous(x_ptrs, [1, 2])

    blocks_at = (
        block_pointers(scales_ptr, band, last_band, none, tiles, 1, BLOCK, BLOCK != 0),
        block_pointers(zeros_ptr, band, last_band, none, tiles, 1, BLOCK, KIND == "uint"),
        block_pointers(means_ptr, band, last_band, none, tiles, 1, BLOCK, HAS_MEANS),
    )
    # asked for a step ahead: what Triton brings through shared memory lies there as it was loaded,
    # and 32 lanes would read these few values from the same banks
    first = tl.program_id(2)
    scales, zeros, means = values_of_all(
        blocks_at, first, first + none, always, SCALE, ZERO, BLOCK, True
    )
    chunks = ()
    if AHEAD:
        chunks = tile_words(w_ptrs + first * (BITS * 128), always, 0, SUBTILES * CHUNKS, True)
    acc = tl.zeros([W * 16, BM], tl.float32)
    after_others(OVERLAPS)
    for step in range(first, tiles, SPLIT):
        tile4 = step + SPLIT + none
        here = w_ptrs + step * (BITS * 128)
        some = chunks
        if AHEAD:
            chunks = tile_words(
                here + SPLIT * (BITS * 128), tile4 < tiles, 0, SUBTILES * CHUNKS, False
            )
        values = ()
        for u in tl.static_range(SUBTILES):
            if AHEAD:
                words = taken(some, u * CHUNKS, CHUNKS)
            else:
                words = tile_words(here, always, u * CHUNKS, CHUNKS, True)
            operands = registers
            if KIND == "uint":
                operands = zero_words(zeros, ZERO.primitive_bitwidth, BLOCK, u, SUBTILES)
            outputs = decode(
                halves(words),
                operands,
                table_ptr,
                PTX,
                CONSTRAINTS,
                FIELDS,
                BITS,
                KIND,
                EXPONENT,
                BLOCK,
                DT,
            )
            values = values + taken(outputs, 0, OUTPUTS)
            # as soon as four outputs, 64 columns, are there
            for q in tl.static_range(u * OUTPUTS // 4, (u + 1) * OUTPUTS // 4):
                at = x_ptrs + (step * 256 + q * 64)
                if EVEN_K:
                    x = tl.load(at)
                else:
                    inside = step * 256 + q * 64 + column < K
                    x = tl.load(at, mask=inside[None, :], other=0.0)
                four = ()
                for i in tl.static_range(4):
                    a = values[q * 4 + i]
                    if BLOCK != 0:
                        a = _scaled(
                            a,
                            scales,
                            means,
                            factor,
                            SCALE,
                            BLOCK,
                            block_of(0, q * 4 + i, 1, BLOCK),
                            HAS_MEANS,
                            SCALING,
                        )
                    four = four + (a,)
                # [1, w, g, t, r, hi, lo, o low, o high] -> [rows = (w, r, g), (o, hi, t, lo)]
                a = tl.join(tl.join(four[0], four[1]), tl.join(four[2], four[3]))
                a = tl.permute(a.reshape(1, W, 8, 4, 2, 2, 2, 2, 2), (0, 1, 4, 2, 8, 7, 5, 3, 6))
                acc = dot(a.reshape(W * 16, 64), tl.trans(x), acc)
        # not earlier: in other registers they would be moved, and so waited for, within the step
        scales, zeros, means = values_of_all(
            blocks_at, step + SPLIT, tile4, tile4 < tiles, SCALE, ZERO, BLOCK, False
        )
    finish(
        acc,
        pid_n,
        tl.program_id(1),
        tl.program_id(2),
        scales_ptr,
        extra_ptr,
        bias_ptr,
        out_ptr,
        partial_ptr,
        counter_ptr,
        factor,
        M,
        N,
        BLOCK,
        HAS_EXTRA,
        HAS_BIAS,
        SPLIT,
        GATE,
    )
