"""From words to halves: the PTX of one decoding step, written out from a `Scheme`.

Every step takes the chunks of a sub-tile, two 16-bit words in a 32-bit register, and gives one
half2 per output: both halves are computed alike, so the step is elementwise on words (on pairs of
words where codes are looked up in twos). Integers are
decoded by the magic number: a code OR-ed into the mantissa of 2^m (m mantissa bits: 1024.0 in fp16,
128.0 in bf16) is 2^m + code; p bits higher up, into that of 2^(m-p), it is 2^(m-p) + code. One
subtraction, exact, gives the value: of 2^(m-p) and the middle of the codes, or of 2^(m-p) and the
zero point, which is made like a code. `functions._decode_plain` says the same in Triton, for the
interpreter and for chips that do not speak PTX.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from kbit_kernels.triton.layout import COLUMNS, Scheme, zero_registers

HALF_DTYPES: dict[str, Any] = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
MANTISSA_BITS = {"fp16": 10, "bf16": 7}
EXPONENT_BITS = {"fp16": 5, "bf16": 8}


def twice(value: int) -> str:
    """A 16-bit pattern in both halves of a register."""
    return f"0x{value * 0x10001:08x}"


def half_bits(value: float, dtype: str) -> int:
    """Bit pattern of `value`, which must be exact in `dtype`."""
    half = np.array(value).astype(HALF_DTYPES[dtype])
    assert float(half) == value, (value, dtype)
    return int(half.view(np.uint16))


def fp_multiplier(exponent: int, dtype: str) -> float:
    """What brings the bit pattern of an `fp` code, read as a half, to a largest value in [1, 2)."""
    bias = (1 << (EXPONENT_BITS[dtype] - 1)) - 1
    return 2.0 ** (bias - ((1 << exponent) - 1))


@dataclass
class _Writer:
    """Collects instructions; equal instructions give the same register."""

    lines: list[str] = field(default_factory=list)
    known: dict[tuple[str, ...], str] = field(default_factory=dict)

    def emit(self, opcode: str, *operands: str) -> str:
        key = (opcode, *operands)
        if key not in self.known:
            self.known[key] = register = f"r{len(self.known)}"
            self.lines.append(f"{opcode} {register}, {', '.join(operands)};")
        return self.known[key]

    def shift(self, word: str, right: int) -> str:
        if right == 0:
            return word
        return self.emit("shr.u32" if right > 0 else "shl.b32", word, str(abs(right)))

    def and_(self, a: str, mask: str) -> str:
        return self.emit("and.b32", a, mask)

    def and_or(self, a: str, mask: str, c: str) -> str:
        return self.emit("lop3.b32", a, mask, c, "0xea")

    def select(self, mask: str, ones: str, zeros: str) -> str:
        return self.emit("lop3.b32", mask, ones, zeros, "0xca")

    def constant(self, pattern: str) -> str:
        return self.emit("mov.b32", pattern)

    def text(self, results: list[str]) -> str:
        moves = [f"mov.b32 ${i}, {register};" for i, register in enumerate(results)]
        body = [f".reg .b32 r<{max(1, len(self.known))}>;", *self.lines, *moves]
        return "{\n" + "\n".join(body) + "\n}"


def _every(pattern: int, step: int) -> str:
    """A pattern of `step` bits, repeated over a register."""
    return twice(sum(pattern << bit for bit in range(0, 16, step)))


def _merge(writer: _Writer, scheme: Scheme, group: int, words: list[str]) -> str:
    """The units of a group, each at `scheme.base` of its slot; other bits of a slot are garbage.

    The narrower planes of two groups lie in the two halves of a slot: those of 4 + 2 + 1 bits are
    merged for both at once, in their halves.
    """
    wide, *narrow = scheme.fields[group * scheme.slots]  # of slot 0
    aligned = writer.shift(words[wide.chunk], wide.bit - wide.offset - scheme.base)
    if not narrow:
        return aligned
    half = scheme.slot // 2
    merged, taken, move = "", 0, 0
    for part in narrow:
        target = part.offset + scheme.base
        move = part.bit // half * half - target // half * half
        within = part.bit % half - target % half
        if len(narrow) == 1:
            within, move = within + move, 0
        word = writer.shift(words[part.chunk], within)
        merged = writer.select(_every(taken, half), merged, word) if taken else word
        taken |= ((1 << part.width) - 1) << target % half
    ones = ((1 << wide.width) - 1) << (wide.offset + scheme.base)
    return writer.select(_every(ones, scheme.slot), aligned, writer.shift(merged, move))


def _minus(writer: _Writer, value: str, other: str, dtype: str) -> str:
    if dtype == "fp16":
        return writer.emit("sub.rn.f16x2", value, other)
    minus_one = writer.constant(twice(half_bits(-1.0, dtype)))
    return writer.emit("fma.rn.bf16x2", other, minus_one, value)


def _minus_constant(writer: _Writer, value: str, constant: float, dtype: str) -> str:
    if dtype == "fp16":
        return _minus(writer, value, writer.constant(twice(half_bits(constant, dtype))), dtype)
    one = writer.constant(twice(half_bits(1.0, dtype)))
    minus = writer.constant(twice(half_bits(-constant, dtype)))
    return writer.emit("fma.rn.bf16x2", value, one, minus)


def _bytes_minus_128(writer: _Writer, word: str) -> str:
    """Bytes in the lower half of 16 bits, minus 128, in bf16, whose mantissa holds only seven bits:
    the low seven, minus 256 or, where the top is set, 128."""
    magic = twice(half_bits(128.0, "bf16"))
    low = writer.and_or(word, twice(0x7F), magic)
    high = writer.emit("lop3.b32", word, twice(0x80), magic, "0xae")  # (~a & b) | c
    return _minus(writer, low, high, "bf16")


def _zero(writer: _Writer, scheme: Scheme, place: tuple[str, int], power: float, dtype: str) -> str:
    """power + the zero point at a place (register, byte), which a byte permute puts into the
    mantissa of 1024.0 or 128.0; or where that has no room for it, the zero point - 128."""
    register, byte = place
    both = f"0x5{byte}5{byte}"  # the upper byte of what follows
    if scheme.bits > MANTISSA_BITS[dtype]:
        return _bytes_minus_128(writer, writer.emit("prmt.b32", register, "0", both))
    least = float(1 << MANTISSA_BITS[dtype])
    zero = writer.emit("prmt.b32", register, twice(half_bits(least, dtype)), both)
    return zero if power == least else _minus_constant(writer, zero, least - power, dtype)


def _integers(
    writer: _Writer, scheme: Scheme, merged: str, dtype: str, zeros: list[tuple[str, int]]
) -> list[str]:
    """Codes minus 2^(k-1) or, where there are `zeros` of the slots, minus those; exact."""
    bits, mantissa = scheme.bits, MANTISSA_BITS[dtype]
    middle = float(1 << (bits - 1))
    mask = (1 << bits) - 1
    shifts = [0]
    results: list[str] = []

    def subtract(value: str, power: float) -> None:
        if zeros:
            zero = _zero(writer, scheme, zeros[len(results)], power, dtype)
            results.append(_minus(writer, value, zero, dtype))
        else:
            results.append(_minus_constant(writer, value, power + middle, dtype))

    for position in range(0, 16, scheme.slot):
        if bits > mantissa:
            value = _bytes_minus_128(writer, writer.shift(merged, position))
            if zeros:
                subtract(value, 0.0)
            else:
                results.append(value)
            continue
        if bits == 8 and position == 8:  # a byte permute saves the shift
            subtract(writer.emit("prmt.b32", merged, "0x64646464", "0x4341"), 1024.0)
            continue
        fitting = [s for s in shifts if 0 <= position - s <= mantissa - bits]
        if not fitting:
            shifts.append(position)
            fitting = [position]
        place = position - fitting[0]
        power = float(1 << (mantissa - place))
        register = writer.and_or(
            writer.shift(merged, fitting[0]), twice(mask << place), twice(half_bits(power, dtype))
        )
        subtract(register, power)
    return results


def _floats(writer: _Writer, scheme: Scheme, merged: str, dtype: str) -> list[str]:
    """Sign to bit 15, exponent and mantissa below it, then one multiplication by a power of two."""
    gap = EXPONENT_BITS[dtype] - scheme.exponent
    magnitude = ((1 << (scheme.bits - 1)) - 1) << (16 - gap - scheme.bits)
    multiplier = fp_multiplier(scheme.exponent, dtype)
    results = []
    for position in range(0, 16, scheme.slot):
        top = position + scheme.slot - 1  # merged codes are left-aligned in their slots
        sign = writer.and_(writer.shift(merged, top - 15), twice(0x8000))
        value = writer.and_or(writer.shift(merged, top - 15 + gap), twice(magnitude), sign)
        if multiplier != 1.0:
            power = writer.constant(twice(half_bits(multiplier, dtype)))
            if dtype == "fp16":
                value = writer.emit("mul.rn.f16x2", value, power)
            else:
                value = writer.emit("fma.rn.bf16x2", value, power, writer.constant("0x80008000"))
        results.append(value)
    return results


def _lookups(writer: _Writer, scheme: Scheme, merged: str, address: str) -> list[str]:
    """The table's entries for the bytes of a register. A dot product of bytes takes one out,
    multiplies it by the 128 bytes of an entry and adds the lane's address: each lane reads its own
    bank. An entry is a half twice, of which one is taken, or the halves of two codes."""
    found = []
    for byte in range(4):
        select = writer.constant(f"0x{128 << 8 * byte:08x}")
        place = writer.emit("dp4a.u32.u32", merged, select, address)
        found.append(writer.emit("ld.shared.b32", f"[{place}]"))
    if scheme.paired:
        return found
    return [writer.emit("prmt.b32", found[slot], found[slot + 2], "0x5410") for slot in (0, 1)]


@lru_cache(maxsize=256)
def decode_ptx(scheme: Scheme, dtype: str, block: int = 64) -> tuple[str, str]:
    """The PTX of one step and its constraints.

    Operands: one result per output; one register of two words per chunk; then, for tables, the
    lane's address in shared memory, or for zero points, `zero_registers`: each twice (Triton
    passes 32-bit arguments once per word of the pair).

    Args:
        scheme: layout and kind.
        dtype: "fp16" or "bf16", of the values.
        block: weights that share a zero point; 0: a row.
    """
    writer = _Writer()
    words = [f"${scheme.outputs + chunk}" for chunk in range(scheme.chunks)]
    first = scheme.outputs + scheme.chunks
    results: list[str] = []
    for group in range(scheme.outputs // scheme.slots):
        merged = _merge(writer, scheme, group, words)
        if scheme.kind == "table":
            results += _lookups(writer, scheme, merged, f"${first}")
        elif scheme.kind == "fp":
            results += _floats(writer, scheme, merged, dtype)
        else:
            zeros = []
            for output in range(len(results), len(results) + scheme.slots):
                index = output * 16 // block if block else 0
                zeros.append((f"${first + 2 * (index // 4)}", index % 4))
            zeros = zeros if scheme.kind == "uint" else []
            results += _integers(writer, scheme, merged, dtype, zeros)
    zeros_of_row = zero_registers(COLUMNS // scheme.subtiles, block)
    twofold = {"table": 1, "uint": zeros_of_row}.get(scheme.kind, 0)
    constraints = ["=r"] * scheme.outputs + ["r"] * (scheme.chunks + 2 * twofold)
    return writer.text(results), ",".join(constraints)


# Copies a table into shared memory once per program and returns the lane's address of it. `$1`
# points to 256 4-byte entries, each of which is stored once for every lane, so that 32 lanes with
# different codes read 32 banks. A thread stores its entry in 8 pieces of 16 bytes, 8 neighbours
# each another piece. A .shared variable of an inline block lives as long as the kernel.
_PIECES = "".join(
    f"xor.b32 t, s, {16 * piece};\nst.shared.v4.b32 [t], {{v, v, v, v}};\n" for piece in range(8)
)
SHARED_TABLE_PTX = f"""{{
.shared .align 128 .b32 kbit_table[8192];
.reg .b32 i, n, v, s, t;
.reg .b64 a, o;
.reg .pred p;
mov.u32 i, %tid.x;
mov.u32 n, %ntid.x;
mov.u32 $0, kbit_table;
FILL:
setp.ge.u32 p, i, 256;
@p bra FILLED;
mul.wide.u32 o, i, 4;
add.u64 a, $1, o;
ld.global.nc.b32 v, [a];
mad.lo.u32 s, i, 128, $0;
and.b32 t, i, 7;
mad.lo.u32 s, t, 16, s;
{_PIECES}add.u32 i, i, n;
bra FILL;
FILLED:
bar.sync 0;
mov.u32 t, %laneid;
mad.lo.u32 $0, t, 4, $0;
}}"""

# nothing moves across it, and the warps of a program stay independent
FENCE_PTX = "bar.warp.sync 0xffffffff;\nmov.b32 $0, 0;"

# a program's indices
PROGRAM_PTX = tuple(f"mov.u32 $0, %ctaid.{axis};" for axis in "xyz")

# of halves; a product of fp16 is rounded once
SCALE_PTX = "mul.rn.f16x2 $0, $1, $2;"


def table_words(values: np.ndarray, scheme: Scheme, dtype: str) -> np.ndarray:
    """The codebook fp32 `[2^k]` as the int32 `[256]` that `decode_ptx` looks up: for every byte,
    whatever its garbage bits, the half of its code twice, or the halves of its two codes."""
    halves = values.astype(HALF_DTYPES[dtype]).view(np.uint16).astype(np.uint32)
    units = np.arange(256) >> scheme.base
    low, high = np.zeros_like(units), np.zeros_like(units)
    for part in scheme.fields[0]:
        width, offset = part.width // scheme.unit, part.offset // scheme.unit
        bits = (units >> part.offset) & ((1 << part.width) - 1)
        low |= (bits & ((1 << width) - 1)) << offset
        high |= bits >> (part.width - width) << offset
    words: np.ndarray = halves[low] | halves[high] << np.uint32(16)
    return words.view(np.int32)
