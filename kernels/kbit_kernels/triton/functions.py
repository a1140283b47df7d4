"""What the kernels share, on the device: decoding, tables, the sums' way out."""
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108, SIM300 (the Triton language has no such forms)

import triton
import triton.language as tl
from triton.language.extra import cuda

from kbit_kernels.triton import layout

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PAIRED_BITS = tl.constexpr(layout.PAIRED_BITS)


@triton.jit
def after_others(OVERLAPS: tl.constexpr):
    """Launched by `overlapping`: lets the next kernel start, and waits until those before are done.

    What they wrote, and what they may still read, must not be touched before."""
    if OVERLAPS:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def in_order(FENCE: tl.constexpr, BARRIER: tl.constexpr):
    """The compiler moves no load from before this to after it, or the other way round. Without
    PTX that takes a barrier of the whole program, if at all."""
    if FENCE == "":
        if BARRIER:
            tl.debug_barrier()
    else:
        tl.inline_asm_elementwise(FENCE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def program(PTX: tl.constexpr):
    """What the register that PTX reads says, read here and not before."""
    return tl.inline_asm_elementwise(PTX, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation NAME of x, fp32; see activations.ACTIVATIONS."""
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # 0.5 (1 + tanh y) = sigmoid(2 y)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def finish(
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
    BLOCK: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    GATE: tl.constexpr,
):
    """out [M, N] = y * factor (and scales of whole rows) + extra [M, N] + bias [N], of the outputs
    `y` fp32 [rows of weights, rows of x] that this program (pid_n, pid_m, pid_s) has summed. With
    GATE: out [M, N / 2] = GATE(of rows 0..7 of every 16) * rows 8..15.

    SPLIT programs, a power of two, share an output: each writes its part to `partial`, the last to
    arrive (by `counter`, which it sets back to 0) adds them in a fixed order, so that results do
    not depend on timing and nothing needs clearing between calls.
    """
    BN: tl.constexpr = y.shape[0]
    BM: tl.constexpr = y.shape[1]
    n = pid_n * BN + tl.arange(0, BN)[:, None]
    m = pid_m * BM + tl.arange(0, BM)[None, :]
    if SPLIT > 1:
        # in the order in which lanes hold sums, so that none is exchanged: (j, warp, g, t, r, lo)
        tile_id = pid_m * tl.num_programs(0) + pid_n
        size: tl.constexpr = BN * BM
        y = tl.permute(y.reshape(BN // 16, 2, 8, BM // 8, 4, 2), (3, 0, 2, 4, 1, 5))
        y = y.reshape(size // 128, 32, 4)
        at = tl.arange(0, size // 128)[:, None, None] * 128 + tl.arange(0, 32)[None, :, None] * 4
        base = partial_ptr + tile_id.to(tl.int64) * (SPLIT * size)
        base += at + tl.arange(0, 4)[None, None, :]
        base = tl.max_contiguous(base, [1, 2, 4])  # lanes before warps, see linear_kernel
        tl.store(base + pid_s * size, y)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile_id, 1, sem="acq_rel")
        if arrived < SPLIT - 1:
            return
        tl.store(counter_ptr + tile_id, 0)
        if SPLIT == 2:  # whoever adds, the sum of two is the same
            y += tl.load(base + (1 - pid_s) * size, cache_modifier=".cg")
        else:
            y = tl.zeros_like(y)
            for s in range(0, SPLIT, 2):  # no more at once: registers
                one = tl.load(base + s * size, cache_modifier=".cg")
                y += one + tl.load(base + (s + 1) * size, cache_modifier=".cg")
        y = tl.permute(y.reshape(BM // 8, BN // 16, 8, 4, 2, 2), (1, 4, 2, 0, 3, 5))
        y = y.reshape(BN, BM)
    inside = (n < N) & (m < M)
    at = m.to(tl.int64) * N + n
    if BLOCK == 0:
        # [band, g, r], see layout.tile_blocks
        place = n // 16 * 16 + n % 8 * 2 + n // 8 % 2
        y *= tl.load(scales_ptr + place, mask=n < N, other=0.0).to(tl.float32)
    y *= factor
    if HAS_EXTRA:
        y += tl.load(extra_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if GATE != "":
        # the upper eight rows of a band are gates, the lower eight what they let through
        y = tl.permute(y.reshape(BN // 16, 2, 8, BM), (0, 2, 3, 1))
        gate, through = tl.split(y.reshape(BN // 2, BM, 2))
        y = activate(gate, GATE) * through
        n = pid_n * (BN // 2) + tl.arange(0, BN // 2)[:, None]
        inside = (n < N // 2) & (m < M)
        at = m.to(tl.int64) * (N // 2) + n
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


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
    registers,
    table_ptr,
    OUTPUT: tl.constexpr,
    FIELDS: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
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
    elif KIND == "uint":
        index: tl.constexpr = OUTPUT * 16 // BLOCK if BLOCK > 0 else 0
        zero = (registers[index // 4] >> (8 * (index % 4))) & 0xFF
        value = (code - zero).to(tl.float32).to(DT)
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
    BLOCK: tl.constexpr,
    DT: tl.constexpr,
):
    """All outputs of a sub-tile, a tuple of tensors shaped like a chunk. `registers`: what `table`
    gives, or `zero_words`."""
    if PTX == "":
        values = ()
        for j in tl.static_range(len(FIELDS)):
            values = values + (
                _decode_plain(
                    words, registers, table_ptr, j, FIELDS, BITS, KIND, EXPONENT, BLOCK, DT
                ),
            )
    else:
        # said to be impure, else Triton looks through it at what was loaded, and orders the left
        # operand's columns by that
        values = tl.inline_asm_elementwise(
            PTX,
            CONSTRAINTS,
            words + registers,
            dtype=_repeat(DT, len(FIELDS)),
            is_pure=False,
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
def halves(chunks):
    """Chunks of int32 `[R, W, 32, 4]` as int16 words `[R, W, 32, 8]`. Loops carry 32 bits: 16-bit
    registers would be packed and unpacked in every step."""
    R: tl.constexpr = chunks[0].shape[0]
    W: tl.constexpr = chunks[0].shape[1]
    words = ()
    for c in tl.static_range(len(chunks)):
        both = tl.join(chunks[c].to(tl.int16), (chunks[c] >> 16).to(tl.int16))
        words = words + (both.reshape(R, W, 32, 8),)
    return words


@triton.jit
def taken(chunks, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the chunks, from FIRST on."""
    some = ()
    for c in tl.static_range(COUNT):
        some = some + (chunks[FIRST + c],)
    return some


@triton.jit
def tile_words(pointers, valid, FIRST: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """COUNT chunks of a tile, from FIRST on; undefined where not `valid`: whatever is decoded from
    them is finite, and meets zeros."""
    chunks = ()
    for c in tl.static_range(COUNT):
        at = pointers + (FIRST + c) * 128
        if EVEN:
            chunks = chunks + (tl.load(at, eviction_policy="evict_first"),)
        else:
            chunks = chunks + (tl.load(at, mask=valid, eviction_policy="evict_first"),)
    return chunks
