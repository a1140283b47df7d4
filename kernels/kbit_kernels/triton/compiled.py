"""Machine code without a GPU: compile a kernel for a chip, and read what is in the binary."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kbit_kernels.spec import QuantSpec
from kbit_kernels.triton import gemm, kernels
from kbit_kernels.triton.configs import Config
from kbit_kernels.triton.device import (
    DEQUANTIZE_WARPS,
    decoder_constants,
    launch_options,
    launch_warps,
    linear_constants,
    zeros_dtype,
)

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
OVERLAPPING = NVIDIA[3:]  # kernels can begin before the one before ends
AMD = ("gfx942",)
CHIPS = (*NVIDIA, *AMD)
_TENSOR_CORE = re.compile(r"(HMMA|HGMMA|UTCHMMA|QMMA|v_mfma)")
# one SASS line: address, predicate, opcode with its modifiers, operands
_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Binary:
    """What one compiled kernel holds.

    Attributes:
        registers: per lane.
        spill_bytes: stack and local memory per lane, and spilled registers.
        shared_bytes: shared memory per program that the binary itself asks for.
        launch_bytes: the same and what Triton asks for at the launch.
        wide_loads: 128-bit global loads of weights (on AMD: all of them), in the whole kernel.
        narrow_loads: narrower loads of weights.
        tensor_core: tensor-core instructions in the whole kernel.
        loop: opcode -> how often it stands in the main loop (the one with tensor-core products).
        loop_instructions: all of them, without padding.
        exchanges: shared-memory and shuffle instructions and barriers in the main loop.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    launch_bytes: int
    wide_loads: int
    narrow_loads: int
    tensor_core: int
    loop: dict[str, int]
    loop_instructions: int
    exchanges: int


def compile_linear(
    spec: QuantSpec,
    chip: str,
    config: Config,
    half: str = "fp16",
    columns: int = 8192,
    use_ptx: bool | None = None,
) -> Binary:
    """The kernel of `config` for `chip` ("sm_90", "gfx942"), K = `columns`; `use_ptx` overrides the
    choice of the decoder."""
    use_ptx = chip in NVIDIA if use_ptx is None else use_ptx
    constants = linear_constants(spec, half, use_ptx, config, columns, chip)
    constants |= {
        "HAS_EXTRA": False,
        "HAS_BIAS": False,
        "GATE": "",
        "OVERLAPS": chip in OVERLAPPING,
    }
    options = launch_options(config, chip in AMD)
    kernel = gemm.gemm_kernel if config.stages else kernels.linear_kernel
    return _compile(kernel, spec, chip, half, constants, options)


def compile_dequantize(spec: QuantSpec, chip: str, half: str = "fp16") -> Binary:
    """`kernels.dequantize_kernel` for `chip`."""
    constants = {**decoder_constants(spec, half, chip in NVIDIA), "W": DEQUANTIZE_WARPS}
    options = {"num_warps": launch_warps(DEQUANTIZE_WARPS, chip in AMD), "num_stages": 1}
    return _compile(kernels.dequantize_kernel, spec, chip, half, constants, options)


def _compile(
    function: "triton.JITFunction",
    spec: QuantSpec,
    chip: str,
    half: str,
    constants: dict[str, object],
    options: dict[str, int],
) -> Binary:
    types = {
        "words_ptr": "*i16",
        "scales_ptr": f"*{spec.scale_dtype}",
        "means_ptr": f"*{spec.scale_dtype}",
        "zeros_ptr": "*u8" if zeros_dtype(spec) is np.uint8 else "*i16",
        "table_ptr": "*i32" if constants["PTX"] else f"*{half}",
        "partial_ptr": "*fp32",
        "counter_ptr": "*i32",
        "factor": "fp32",
    }
    signature = {}
    for name in function.arg_names:
        default = f"*{half}" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
    # what a launch would find: pointers from the allocator, N and K multiples of 16
    aligned = [n for n in function.arg_names if n.endswith("_ptr") or n in ("N", "K")]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    target = GPUTarget("hip", chip, 64) if chip in AMD else GPUTarget("cuda", int(chip[3:]), 32)
    compiled = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=target,
        options=options,
    )
    if chip in AMD:
        return _read_amdgcn(compiled.asm["amdgcn"])
    return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _read_cubin(cubin: bytes, dynamic_bytes: int) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    lines = [(int(at, 16), op, rest) for at, op, rest in _SASS.findall(sass)]
    spilling = sum(op.split(".")[0] in ("LDL", "STL") for _, op, _ in lines)
    loop = _main_loop(lines)
    # only weights are loaded evict-first, or in 16 bytes past the first-level cache
    weights = [
        op for _, op, _ in lines if op.startswith("LDG") and (".EF" in op or ".BYPASS" in op)
    ]
    wide = sum(".128" in op for op in weights)
    return Binary(
        registers=int(found["REG"]),
        spill_bytes=int(found["STACK"]) + int(found["LOCAL"]) + spilling,
        shared_bytes=int(found["SHARED"]),
        launch_bytes=int(found["SHARED"]) + dynamic_bytes,
        wide_loads=wide,
        narrow_loads=len(weights) - wide,
        tensor_core=sum(bool(_TENSOR_CORE.match(op)) for _, op, _ in lines),
        loop=dict(loop.most_common()),
        loop_instructions=loop.total(),
        exchanges=sum(
            count
            for op, count in loop.items()
            if op in ("LDS", "LDSM", "STS", "STSM", "SHFL", "BAR", "WARPSYNC")
        ),
    )


def _main_loop(lines: list[tuple[int, str, str]]) -> Counter[str]:
    """Opcodes of the innermost loop with tensor-core products (all its blocks, taken or not)."""
    loops = []
    for at, op, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if op.startswith("BRA") and target and int(target[1], 16) < at:
            body = [o.split(".")[0] for a, o, _ in lines if int(target[1], 16) <= a <= at]
            if any(_TENSOR_CORE.match(o) for o in body):
                loops.append(Counter(o for o in body if o != "NOP"))
    return min(loops, key=Counter.total, default=Counter())


def _read_amdgcn(text: str) -> Binary:
    def number(key: str) -> int:
        match = re.search(rf"{key}:\s+(\d+)", text)
        assert match is not None, key
        return int(match[1])

    spilled = number(r"\.vgpr_spill_count") + number(r"\.sgpr_spill_count")
    shared = number(r"\.group_segment_fixed_size")
    return Binary(
        registers=number(r"\.vgpr_count"),
        spill_bytes=number(r"\.private_segment_fixed_size") + spilled,
        shared_bytes=shared,
        launch_bytes=shared,
        wide_loads=text.count("_load_dwordx4"),
        narrow_loads=0,
        tensor_core=text.count("v_mfma"),
        loop={},
        loop_instructions=0,
        exchanges=0,
    )


def instructions_per_weight(binary: Binary, config: Config) -> float:
    """Lane-instructions of the main loop per weight: a pass handles 128 weights a lane and band."""
    return binary.loop_instructions / (128 * config.bands)
