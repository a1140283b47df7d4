"""Runs kernels under Triton's interpreter, in a process of its own: the interpreter is chosen when
triton is imported, and the compile tests of the same pytest process need the compiler.

Reads one JSON case a line, answers with one JSON line: largest errors, or a traceback.
"""

import ctypes
import json
import os
import sys
import traceback
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from kbit_kernels import QuantSpec, quantize, reference
from kbit_kernels.activations import ACTIVATIONS
from kbit_kernels.triton import decode, device
from kbit_kernels.triton.configs import Config
from kbit_kernels.triton.layout import kind_of
from tests.kernels.triton import ptx

_shared = np.zeros(8192, dtype=np.uint32)
_executed = 0  # PTX blocks, so that a test of the PTX path cannot pass without running any


@dataclass
class _Results:
    handles: list[Any]

    def get_result(self, index: int) -> Any:
        return self.handles[index]


def _inline_asm(
    builder: Any,
    text: str,
    constraints: str,
    handles: list[Any],
    types: list[Any],
    pure: bool,
    pack: int,
) -> _Results:
    """What `tl.inline_asm_elementwise` does, for 16- and 32-bit elements."""
    global _executed
    if text in decode.PROGRAM_PTX:
        return _Results([builder.create_get_program_id(decode.PROGRAM_PTX.index(text))])
    if not handles:  # a fence
        assert text == decode.FENCE_PTX
        return _Results([interpreter.TensorHandle(np.zeros(1, np.int32), types[0].scalar)])
    _executed += 1
    if "kbit_table" in text:  # fills the table; only the address is a result
        address = int(np.asarray(handles[0].data).reshape(-1)[0])
        entries = np.ctypeslib.as_array((ctypes.c_uint32 * 256).from_address(address))
        _shared[:] = entries.repeat(32)  # one for every lane
        return _Results(
            [interpreter.TensorHandle(np.zeros_like(handles[0].data, np.int32), types[0].scalar)]
        )
    shape = handles[0].data.shape
    inputs = []
    for handle in handles:
        flat = np.ascontiguousarray(np.broadcast_to(handle.data, shape)).reshape(-1)
        if flat.dtype.itemsize == 2:
            inputs.append(flat.view(np.uint32))
        else:
            inputs += [flat.view(np.uint32)[i::pack] for i in range(pack)]
    assert len(constraints.split(",")) == len(inputs) + len(types)
    results = ptx.run(text, inputs, len(types), _shared)
    out = []
    for result, kind in zip(results, types, strict=True):
        # the interpreter holds bf16 as bit patterns
        dtype = np.float16 if kind.scalar.name == "fp16" else np.uint16
        data = np.ascontiguousarray(result).view(dtype).reshape(shape)
        out.append(interpreter.TensorHandle(data, kind.scalar))
    return _Results(out)


def _tolerances(spec: QuantSpec, dtype: torch.dtype, config: Config) -> tuple[float, float, float]:
    """(relative rounding of a result, relative error of a decoded weight, of one in the product).

    A result is rounded once to fp16 (half a unit: 2^-11) or bf16 (the interpreter cuts off: 2^-7).
    Integers and k-bit floats are decoded exactly; entries of a table are rounded to half precision,
    and so are the few 16-bit columns' differences. gemm_kernel rounds weights once more, scaled.
    """
    fp16 = dtype == torch.float16
    rounding = 2.0**-11 if fp16 else 2.0**-7
    rounded = kind_of(spec) == "table" or spec.outliers > 0
    decoding = 2.0 ** (-11 if fp16 else -8) if rounded else 0.0
    scaled = config.stages > 0 and device.kernel_spec(spec).block > 0
    return rounding, decoding, decoding + (rounding if scaled else 0.0)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One matrix product and one dequantization against the reference; outputs start as NaN.

    Answers with the largest error over its bound, element by element.
    """
    global _executed
    _executed = 0
    rng = np.random.default_rng(case.get("seed", 0))
    n, k, m = case["n"], case["k"], case["m"]
    dtype = getattr(torch, case["dtype"])
    spec = QuantSpec.parse(case["spec"])
    w = (rng.standard_normal((n, k)) * 0.05 + 0.01).astype(np.float32)
    tensor = quantize(w, spec, backend="reference")
    x = torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32)).to(dtype)
    weight = device.prepare(tensor, "cpu", dtype, use_ptx=case["ptx"])

    bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32)).to(dtype)
    out = torch.empty((m, n), dtype=dtype)
    for _ in range(case.get("calls", 1)):  # a second call finds the counters that the first left
        out.fill_(float("nan"))
        device.fused_linear(x, weight, Config(*case["config"]), bias, out)
    x_f32, bias_f32 = x.float().numpy(), bias.float().numpy()
    expected = reference.linear(x_f32, tensor, bias_f32)
    restored = torch.full((n, k), float("nan"), dtype=dtype)
    device.dequantize(weight, restored)
    weights = reference.dequantize(tensor)

    rounding, decoding, multiplying = _tolerances(spec, dtype, Config(*case["config"]))
    terms = np.abs(x_f32) @ np.abs(weights).T
    if spec.outliers:  # the small product is rounded to half precision before it is added
        terms += np.abs(expected)
    # 2^-18: fp32 accumulation in another order; 2^-24: the smallest half
    bound = rounding * np.abs(expected) + (multiplying + 2.0**-18) * terms + 2.0**-24
    sizes = np.abs(weights)
    if tensor.means is not None:  # a mean may cancel most of what was decoded
        sizes = sizes + np.abs(tensor.means.astype(np.float32)).max()
    weights_bound = rounding * np.abs(weights) + (decoding + 2.0**-20) * sizes + 2.0**-24

    def worst(found: torch.Tensor, wanted: np.ndarray, allowed: np.ndarray) -> float:
        return float((np.abs(found.float().numpy() - wanted) / allowed).max())

    answer = {}
    if "gate" in case:
        halves = (expected.reshape(m, n // 16, 2, 8), bound.reshape(m, n // 16, 2, 8))
        (gate, through), (gate_bound, through_bound) = (np.moveaxis(a, 2, 0) for a in halves)
        opened = ACTIVATIONS[case["gate"]](torch.from_numpy(gate)).numpy()
        # no activation is steeper than 1.2
        allowed = 1.2 * gate_bound * (np.abs(through) + through_bound)
        allowed += np.abs(opened) * through_bound
        found = torch.full((m, n // 2), float("nan"), dtype=dtype)
        device.fused_linear(x, weight, Config(*case["config"]), bias, found, gate=case["gate"])
        wanted = (opened * through).reshape(m, n // 2)
        allowed = allowed.reshape(m, n // 2) + rounding * np.abs(wanted)
        answer["gate"] = worst(found, wanted, allowed)
        onto = torch.from_numpy(rng.standard_normal((m, n)).astype(np.float32)).to(dtype)
        found = device.fused_linear(x, weight, Config(*case["config"]), bias, onto=onto)
        wanted = expected + onto.float().numpy()
        answer["onto"] = worst(found, wanted, bound + rounding * np.abs(wanted))
    return answer | {
        "linear": worst(out, expected, bound),
        "dequantize": worst(restored, weights, weights_bound),
        "ptx_blocks": _executed,
    }


class _LastProgram:
    """Stands for a kernel, and runs only the last program of the grid."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        last = [size - 1 for size in grid]

        def program_id(builder: Any, axis: int) -> Any:
            return interpreter.TensorHandle(np.array([last[axis]], np.int32), tl.int32)

        def launch(*arguments: Any, **constants: Any) -> None:
            there = interpreter.InterpreterBuilder.create_get_program_id
            interpreter.InterpreterBuilder.create_get_program_id = program_id
            try:
                self.kernel[(1, 1, 1)](*arguments, **constants)
            finally:
                interpreter.InterpreterBuilder.create_get_program_id = there

        return launch


def run_far(case: dict[str, Any]) -> dict[str, Any]:
    """The last rows of a matrix `[n, 256]` whose arrays have more than 2^31 elements, of which
    only the end is ever touched, so that the system never finds memory for the rest."""
    rng = np.random.default_rng(0)
    spec = QuantSpec.parse(case["spec"])
    n, m, last = case["n"], case["m"], case["n"] % 16
    w = rng.standard_normal((last, 256)).astype(np.float32)
    tensor = quantize(w, spec, backend="reference")
    x = torch.from_numpy(rng.standard_normal((m, 256)).astype(np.float32)).half()
    small = device.prepare(tensor, "cpu", torch.float16, use_ptx=False)

    def far(array: torch.Tensor | None) -> torch.Tensor | None:
        if array is None:
            return None
        long = torch.empty((-(-n // 16) * array.shape[0], *array.shape[1:]), dtype=array.dtype)
        long[-array.shape[0] :] = array
        return long

    weight = replace(
        small,
        shape=(n, 256),
        words=far(small.words),
        scales=far(small.scales),
        zeros=far(small.zeros),
    )
    kernels = device.kernels
    device.kernels = SimpleNamespace(
        linear_kernel=_LastProgram(kernels.linear_kernel),
        dequantize_kernel=_LastProgram(kernels.dequantize_kernel),
    )
    try:
        out = torch.empty((m, n), dtype=torch.float16)
        out[-(m % 8) :, -last:] = torch.nan
        device.fused_linear(x, weight, Config(8, 1, 1, 1, 1), out=out)
        restored = torch.empty((n, 256), dtype=torch.float16)
        restored[-last:] = torch.nan
        device.dequantize(weight, restored)
    finally:
        device.kernels = kernels
    expected = reference.linear(x[-(m % 8) :].float().numpy(), tensor)
    found = out[-(m % 8) :, -last:].float().numpy()
    weights = reference.dequantize(tensor)
    return {
        "elements": [array.numel() for array in (weight.words, out, restored)],
        "linear": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "dequantize": float(np.abs(restored[-last:].float().numpy() - weights).max()),
    }


def main() -> None:
    """Serve cases until the input ends."""
    torch.set_num_threads(1)
    interpreter.InterpreterBuilder.create_inline_asm = _inline_asm
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            case = json.loads(line)
            answer = run_far(case) if case.pop("far", False) else run(case)
        except Exception:
            answer = {"traceback": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
