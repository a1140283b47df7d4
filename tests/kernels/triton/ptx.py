"""Runs the PTX that kbit writes on numpy arrays: an arithmetic unit for a dozen instructions.

Registers are uint32 arrays, one element per thread. It knows exactly what `decode` emits and
refuses the rest, so that the text that ptxas gets is the text that is tested.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

U32 = np.ndarray


def _halves(value: U32, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(value).view(np.uint16).view(dtype)


def _lop3(a: U32, b: U32, c: U32, table: U32) -> U32:
    lut = int(np.unique(table).item())
    out = np.zeros_like(a)
    for row in range(8):
        if lut >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def _prmt(a: U32, b: U32, selector: U32) -> U32:
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for byte in range(4):
        nibble = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        found = (source >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(
            np.uint32
        ) & np.uint32(0xFF)
        sign = np.where(found & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        out |= np.where(nibble & np.uint32(8), sign, found) << np.uint32(8 * byte)
    return out


def _bytes(a: U32, b: U32) -> U32:
    """The dot product of four unsigned bytes."""
    shifts = [np.uint32(8 * byte) for byte in range(4)]
    ones = np.uint32(0xFF)
    return sum(((a >> s & ones) * (b >> s & ones) for s in shifts), np.zeros_like(a))


def _arithmetic(operation: Callable[..., np.ndarray], dtype: Any) -> Callable[..., U32]:
    def run(*operands: U32) -> U32:
        values = [_halves(operand, dtype).astype(np.float64) for operand in operands]
        # two or three halves: the fp64 result is exact, so there is one rounding, as in hardware
        result = operation(*values).astype(dtype)
        return np.ascontiguousarray(result).view(np.uint16).view(np.uint32)

    return run


INSTRUCTIONS: dict[str, Callable[..., U32]] = {
    "mov.b32": lambda a: a.copy(),
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "dp4a.u32.u32": lambda a, b, c: c + _bytes(a, b),
    "sub.rn.f16x2": _arithmetic(lambda a, b: a - b, np.float16),
    "mul.rn.f16x2": _arithmetic(lambda a, b: a * b, np.float16),
    "fma.rn.bf16x2": _arithmetic(lambda a, b, c: a * b + c, ml_dtypes.bfloat16),
}


def run(text: str, inputs: Sequence[U32], outputs: int, shared: U32 | None = None) -> list[U32]:
    """Execute a block: operand `$outputs + i` is `inputs[i]`; returns `$0 .. $outputs - 1`.

    `shared` is shared memory from address 0 in 32-bit words.
    """
    registers: dict[str, U32] = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    shape = inputs[0].shape

    def read(operand: str) -> U32:
        if re.fullmatch(r"(0x[0-9a-f]+|\d+)", operand):
            return np.full(shape, int(operand, 0), dtype=np.uint32)
        return registers[operand]

    body = text.strip().removeprefix("{").removesuffix("}")
    for line in filter(None, (line.strip() for line in body.splitlines())):
        if line.startswith(".reg"):
            continue
        match = re.fullmatch(r"(\S+) ([$\w]+), (.*);", line)
        assert match is not None, line
        opcode, target, operands = match[1], match[2], match[3].split(", ")
        if opcode == "ld.shared.b32":
            assert shared is not None
            address = read(operands[0].strip("[]"))
            assert not (address % 4).any()
            registers[target] = shared[address // 4]
        else:
            registers[target] = INSTRUCTIONS[opcode](*map(read, operands))
    return [registers[f"${i}"] for i in range(outputs)]


def fill(text: str, threads: int, entries: U32) -> U32:
    """Shared memory after `threads` threads have run the block that fills it, one by one."""
    body = [line.strip() for line in text.strip("{}\n").splitlines()]
    shared = np.zeros(8192, dtype=np.uint32)
    for thread in range(threads):
        values = {"%tid.x": thread, "%ntid.x": threads, "kbit_table": 0, "$1": 0}
        values["%laneid"] = thread % 32

        def read(operand: str, values: dict[str, int] = values) -> int:
            return int(operand) if operand.isdigit() else values[operand.strip("[]")]

        at = 0
        while at < len(body):
            line = body[at]
            at += 1
            if line.startswith(".") or line.endswith(":") or line == "bar.sync 0;":
                continue
            if jump := re.fullmatch(r"(@p )?bra (\w+);", line):
                at = body.index(f"{jump[2]}:") if not jump[1] or values["p"] else at
                continue
            opcode, rest = line.rstrip(";").split(" ", 1)
            target, *operands = rest.split(", ")
            if opcode == "st.shared.v4.b32":
                address = read(target)
                assert address % 16 == 0
                names = [operand.strip("{}") for operand in operands]
                shared[address // 4 : address // 4 + 4] = [read(name) for name in names]
            elif opcode == "ld.global.nc.b32":
                values[target] = int(entries[read(operands[0]) // 4])
            else:
                values[target] = _SCALARS[opcode](*map(read, operands))
        assert values["$0"] == thread % 32 * 4
    return shared


_SCALARS: dict[str, Callable[..., int]] = {
    "mov.u32": lambda a: a,
    "mul.wide.u32": lambda a, b: a * b,
    "add.u64": lambda a, b: a + b,
    "add.u32": lambda a, b: a + b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "setp.ge.u32": lambda a, b: a >= b,
}
