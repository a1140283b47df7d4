"""What the kernels share, on the device: decoding, tables, per-block values."""
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108, SIM300 (the Triton language has no such forms)

import triton
import triton.language as tl
from triton.language.extra import cuda

from kbit_kernels.triton import layout

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# among axes without runs Triton gives lanes to the last ones, before 3.7 to the first ones
LANES_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))
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

    SPLIT programs share an output: each writes its part to `partial`, the last to arrive (by
    `counter`, which it sets back to 0) adds them in the order of the splits, so that results do
    not depend on timing and nothing needs clearing between calls.
    """
    BN: tl.constexpr = y.shape[0]
    BM: tl.constexpr = y.shape[1]
    n = pid_n * BN + tl.arange(0, BN)[:, None]
    m = pid_m * BM + tl.arange(0, BM)[None, :]
    if SPLIT > 1:
        tile_id = pid_m * tl.num_programs(0) + pid_n
        size: tl.constexpr = BN * BM
        local = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        base = partial_ptr + tile_id.to(tl.int64) * (SPLIT * size) + local
        tl.store(base + pid_s * size, y, mask=m < M)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile_id, 1, sem="acq_rel")
        if arrived < SPLIT - 1:
            return
        tl.store(counter_ptr + tile_id, 0)
        y = tl.zeros([BN, BM], tl.float32)
        for s in range(SPLIT):
            y += tl.load(base + s * size, mask=m < M, other=0.0, cache_modifier=".cg")
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
    columns: tl.constexpr = 256 // SUBTILES
    count: tl.constexpr = (columns // BLOCK + 3) // 4 if BLOCK > 0 and BLOCK < columns else 1
    words = ()
    for i in tl.static_range(count):
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
