"""The two kernels, each for every width and data type: the matrix product and dequantization.

Names: a program owns WN x R bands of 16 rows and BM rows of x; of its W = WN * WK warps, WK share
the same rows and take every WK-th tile of 256 columns. Tensors carry the warp as a batch axis, so
that a warp multiplies on its own (`tl.dot` in 3 dimensions) and exchanges nothing before the end.

Axes of loaded tensors, slowest first, are chosen so that Triton's own layouts put every element
into the lane that needs it: what stays in registers (R, BM / 8), warps W, lanes (g 8, t 4), then
the contiguous words of a lane. The order of the 16 columns k of a product is free, so it is what
Triton expects lanes to hold: (hi, t, lo). With other layouts results are the same, only slower.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108 (the Triton language has no such forms)

import triton
import triton.language as tl

from kbit_kernels.triton.blocks import (
    LANES_FIRST,
    block_of,
    block_pointers,
    ends_block,
    per_row,
    pick,
    values_of_all,
    zero_words,
)
from kbit_kernels.triton.functions import (
    after_others,
    decode,
    dot,
    finish,
    halves,
    in_order,
    program,
    table,
    taken,
    tile_words,
)


# what varies between calls of one layer must not make variants that someone waits for
@triton.jit(do_not_specialize=["M", "tiles", "factor"])
def linear_kernel(
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
    EVEN_TILES: tl.constexpr,
    BM: tl.constexpr,
    R: tl.constexpr,
    WN: tl.constexpr,
    WK: tl.constexpr,
    SPLIT: tl.constexpr,
    PTX: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    FILL: tl.constexpr,
    FENCE: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAM: tl.constexpr,
    OVERLAPS: tl.constexpr,
    GATE: tl.constexpr,
):
    """out [M, N] = x [M, K] @ W.T * factor + extra [M, N] + bias [N], and what `finish` says; fp32
    accumulation. `tiles` = ceil(K / 256); SPLIT programs share an output."""
    DT: tl.constexpr = x_ptr.dtype.element_ty
    SCALE: tl.constexpr = scales_ptr.dtype.element_ty
    ZERO: tl.constexpr = zeros_ptr.dtype.element_ty
    W: tl.constexpr = WN * WK
    ROWS: tl.constexpr = R * 16
    MB: tl.constexpr = BM // 8
    OUTPUTS: tl.constexpr = len(FIELDS)
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_s = tl.program_id(2)
    registers = table(table_ptr, KIND, FILL)

    warp4 = tl.arange(0, W)[None, :, None, None]
    lane = tl.arange(0, 32)[None, None, :, None]
    two = tl.arange(0, 4)[None, None, None, :]
    first4 = pid_s * WK + warp4 % WK
    last_band = (N + 15) // 16 - 1  # bands beyond the matrix repeat the last one, unstored
    band = (pid_n * WN + warp4 // WK) * R
    band4 = tl.minimum(band + tl.arange(0, R)[:, None, None, None], last_band).to(tl.int64)
    w_ptrs = words_ptr.to(tl.pointer_type(tl.int32))
    w_ptrs += band4 * (tiles * (BITS * 128)) + (first4 * (BITS * 128) + lane * 4 + two)

    if LANES_FIRST:
        warp5 = tl.arange(0, W)[:, None, None, None, None]
        eight = tl.arange(0, MB)[None, :, None, None, None]
    else:
        warp5 = tl.arange(0, W)[None, :, None, None, None]
        eight = tl.arange(0, MB)[:, None, None, None, None]
    first5 = pid_s * WK + warp5 % WK
    g = tl.arange(0, 8)[None, None, :, None, None]
    t = tl.arange(0, 4)[None, None, None, :, None]
    i = tl.arange(0, 4 * SPAN)[None, None, None, None, :]
    row = pid_m * BM + eight * 8 + g
    row = tl.minimum(row, M - 1)  # rows beyond M repeat the last one and are not stored
    column = first5 * 256 + t * (4 * SPAN) + i
    x_ptrs = x_ptr + (row.to(tl.int64) * K + column)

    # Lanes before warps: triton 3.6 gives lanes to the axes with the longest runs first, and what
    # is said of any axis but the last serves for nothing else. It must stay below the last one's.
    w_ptrs = tl.max_contiguous(w_ptrs, [1, 1, 2, 4])
    x_ptrs = tl.max_contiguous(x_ptrs, [1, 1, SPAN, 2 * SPAN, 4 * SPAN])

    # AHEAD: a whole tile of weights is asked for at the end of the step before; as weights are
    # nobody's result, the first one before others are waited for. Else chunks as they are used.
    blocks_at = (
        block_pointers(scales_ptr, band, last_band, first4, tiles, R, BLOCK, BLOCK != 0),
        block_pointers(zeros_ptr, band, last_band, first4, tiles, R, BLOCK, KIND == "uint"),
        block_pointers(means_ptr, band, last_band, first4, tiles, R, BLOCK, HAS_MEANS),
    )
    valid4 = first4 < tiles
    if AHEAD:
        words = tile_words(w_ptrs, valid4, 0, SUBTILES * CHUNKS, EVEN_TILES)
        scales, zeros, means = values_of_all(
            blocks_at, 0, first4, valid4, SCALE, ZERO, BLOCK, EVEN_TILES
        )
    acc = tl.zeros([W, ROWS, BM], tl.float32)
    after_others(OVERLAPS)
    for step in range(0, tiles, WK * SPLIT):
        if not AHEAD:
            tile4 = step + first4
            valid4 = tile4 < tiles
            scales, zeros, means = values_of_all(
                blocks_at, step, tile4, valid4, SCALE, ZERO, BLOCK, EVEN_TILES
            )
        # else the compiler would ask for most of it late, to save registers
        in_order(FENCE, False)
        part = tl.zeros([W, ROWS, BM], tl.float32)
        x_sum = tl.zeros([W, ROWS, BM], tl.float32)
        for u in tl.static_range(SUBTILES):
            if AHEAD:
                chunks = taken(words, u * CHUNKS, CHUNKS)
            else:
                chunks = tile_words(w_ptrs, valid4, u * CHUNKS, CHUNKS, EVEN_TILES)
            operands = registers
            if KIND == "uint":
                operands = zero_words(zeros, ZERO.primitive_bitwidth, BLOCK, u, SUBTILES)
            values = decode(
                halves(chunks),
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
            for pair in tl.static_range(OUTPUTS // SPAN):
                if BM >= 32:
                    # else it would ask for all of x at once, until registers spill
                    in_order(FENCE, True)
                at = x_ptrs + (u * (256 // SUBTILES) + pair * (16 * SPAN))
                if EVEN_K and EVEN_TILES:
                    x = tl.load(at)
                else:
                    inside = step * 256 + column + (u * (256 // SUBTILES) + pair * (16 * SPAN)) < K
                    x = tl.load(at, mask=inside, other=0.0)
                # [mb, w, g, t, d, hi, lo] -> [w, k, m = (mb, g)] for each d
                if LANES_FIRST:
                    x = tl.permute(x, (1, 0, 2, 3, 4))
                x = x.reshape(MB, W, 8, 4, SPAN, 2, 2)
                x = tl.permute(x, (1, 5, 3, 6, 0, 2, 4))
                x = x.reshape(W, 16, BM, SPAN)
                if SPAN == 2:
                    x_even, x_odd = tl.split(x)
                else:
                    x_even = x.reshape(W, 16, BM)
                    x_odd = x_even
                for d in tl.static_range(SPAN):
                    if d == 0:
                        x_d = x_even
                    else:
                        x_d = x_odd
                    a = values[pair * SPAN + d]
                    # [R, w, g, t, r, hi, lo] -> [w, rows = (R, r, g), k]
                    a = a.reshape(R, W, 8, 4, 2, 2, 2)
                    a = tl.permute(a, (1, 0, 4, 2, 5, 3, 6))
                    a = a.reshape(W, ROWS, 16)
                    if BLOCK == 0:
                        acc = dot(a, x_d, acc)
                    else:
                        part = dot(a, x_d, part)
                        if HAS_MEANS:
                            x_sum = dot(tl.full([W, ROWS, 16], 1.0, tl.float32).to(DT), x_d, x_sum)
                        if ends_block(u, pair * SPAN + d, SUBTILES, BLOCK):
                            s = per_row(
                                pick(
                                    scales,
                                    SCALE,
                                    BLOCK,
                                    block_of(u, pair * SPAN + d, SUBTILES, BLOCK),
                                )
                            )
                            scaled = part.reshape(W, ROWS, MB, 4, 2) * s
                            if HAS_MEANS:
                                mean = per_row(
                                    pick(
                                        means,
                                        SCALE,
                                        BLOCK,
                                        block_of(u, pair * SPAN + d, SUBTILES, BLOCK),
                                    )
                                )
                                # the sum will be multiplied by the factor, which is no mean's
                                scaled += x_sum.reshape(W, ROWS, MB, 4, 2) * (mean / factor)
                                x_sum = tl.zeros([W, ROWS, BM], tl.float32)
                            acc += scaled.reshape(W, ROWS, BM)
                            part = tl.zeros([W, ROWS, BM], tl.float32)
        w_ptrs += WK * SPLIT * (BITS * 128)
        x_ptrs += WK * SPLIT * 256
        if AHEAD:
            later = step + WK * SPLIT
            tile4 = later + first4
            valid4 = tile4 < tiles
            words = tile_words(w_ptrs, valid4, 0, SUBTILES * CHUNKS, False)
            scales, zeros, means = values_of_all(
                blocks_at, later, tile4, valid4, SCALE, ZERO, BLOCK, False
            )

    y = tl.sum(acc.reshape(WN, WK, ROWS, BM), 1).reshape(WN * ROWS, BM)
    if len(PROGRAM) > 0:
        pid_n = program(PROGRAM[0])
        pid_m = program(PROGRAM[1])
        pid_s = program(PROGRAM[2])
    finish(
        y,
        pid_n,
        pid_m,
        pid_s,
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


@triton.jit(do_not_specialize=["tiles", "factor"])
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    means_ptr,
    table_ptr,
    out_ptr,
    factor,
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
    W: tl.constexpr,
    PTX: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    FILL: tl.constexpr,
):
    """out [N, K] = the weights in out's dtype; a program takes one band of 16 rows and W tiles."""
    DT: tl.constexpr = out_ptr.dtype.element_ty
    SCALE: tl.constexpr = scales_ptr.dtype.element_ty
    ZERO: tl.constexpr = zeros_ptr.dtype.element_ty
    OUTPUTS: tl.constexpr = len(FIELDS)
    registers = table(table_ptr, KIND, FILL)
    band = tl.program_id(0)
    warp4 = tl.arange(0, W)[None, :, None, None]
    lane = tl.arange(0, 32)[None, None, :, None]
    word = tl.arange(0, 8)[None, None, None, :]
    tile4 = tl.program_id(1) * W + warp4
    w_ptrs = words_ptr + (band.to(tl.int64) * tiles + tile4) * (BITS * 256) + (lane * 8 + word)

    band4 = band + tl.zeros([1, 1, 1, 1], tl.int32)
    valid4 = tile4 < tiles
    blocks_at = (
        block_pointers(scales_ptr, band4, band, tile4, tiles, 1, BLOCK, True),
        block_pointers(zeros_ptr, band4, band, tile4, tiles, 1, BLOCK, KIND == "uint"),
        block_pointers(means_ptr, band4, band, tile4, tiles, 1, BLOCK, HAS_MEANS),
    )
    scales, zeros, means = values_of_all(blocks_at, 0, tile4, valid4, SCALE, ZERO, BLOCK, False)

    # stored as [r, w, g, t * (columns of a lane)]
    rows = tl.arange(0, 2)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]
    rows = band * 16 + rows
    columns = tile4 * 256 + tl.arange(0, 16 * SPAN)[None, None, None, :]
    for u in tl.static_range(SUBTILES):
        words = ()
        for c in tl.static_range(CHUNKS):
            at = w_ptrs + (u * CHUNKS + c) * 256
            words = words + (
                tl.load(at, mask=tile4 < tiles, other=0, eviction_policy="evict_first"),
            )
        operands = registers
        if KIND == "uint":
            operands = zero_words(zeros, ZERO.primitive_bitwidth, BLOCK, u, SUBTILES)
        values = decode(
            words, operands, table_ptr, PTX, CONSTRAINTS, FIELDS, BITS, KIND, EXPONENT, BLOCK, DT
        )
        for pair in tl.static_range(OUTPUTS // SPAN):
            # the outputs of a pair lie in one block
            s = pick(scales, SCALE, BLOCK, block_of(u, pair * SPAN, SUBTILES, BLOCK))
            s = (s.to(tl.float32) * factor).reshape(1, W, 8, 4, 2, 1)
            a = values[pair * SPAN]
            if SPAN == 2:
                a = tl.join(a, values[pair * SPAN + 1])
            # [1, w, g, t, r, i, d] -> [1, w, g, t, r, (d, i)]
            a = tl.permute(a.reshape(1, W, 8, 4, 2, 4, SPAN), (0, 1, 2, 3, 4, 6, 5))
            a = a.reshape(1, W, 8, 4, 2, 4 * SPAN).to(tl.float32)
            a *= s
            if HAS_MEANS:
                mean = pick(means, SCALE, BLOCK, block_of(u, pair * SPAN, SUBTILES, BLOCK))
                a += mean.to(tl.float32).reshape(1, W, 8, 4, 2, 1)
            a = tl.permute(a, (0, 4, 1, 2, 3, 5)).reshape(2, W, 8, 16 * SPAN)
            k = columns + (u * (256 // SUBTILES) + pair * (16 * SPAN))
            tl.store(out_ptr + (rows.to(tl.int64) * K + k), a.to(DT), mask=(rows < N) & (k < K))
