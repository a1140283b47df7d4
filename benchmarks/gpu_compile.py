"""Compile ahead, on any machine, what gpu.py and gpu_tune.py run on a card.

    TRITON_CACHE_DIR=DIR python benchmarks/gpu_compile.py [--chip sm_90] [--tune] [--processes N]

Compiling takes most of their time (some 1,000 kernels), and a card may be lent by the minute. The
same calls run here with tensors without data and a driver without a card, so Triton's cache in DIR
ends up with the entries that it looks for there: the card's machine needs the same Python, Triton
and source, and the cache at the same path. What was not compiled ahead is compiled there.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from gpu_gate import configs_of, gate_specs
from gpu_scale import DTYPES, WIDTHS, Scale

HALVES = ("float16", "bfloat16")
SCALE = Scale(device="meta")


class Absent:
    """Triton's driver for a chip that is not here."""

    def __init__(self, chip: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nobody launches anything on it."""
        return 0

    def get_current_target(self) -> Any:
        """What is compiled for."""
        return self._target


def pretend(chip: str) -> None:
    """From now on this process compiles every kernel that it is asked to launch, and launches none;
    tensors on the device "meta" are on a card of class `chip`."""
    from functools import partial
    from types import SimpleNamespace

    import torch
    import triton

    from kbit_kernels.triton.configs import SHIPPED_CLASSES

    triton.runtime.driver.set_active(Absent(chip))
    triton.JITFunction.__getitem__ = lambda kernel, grid: partial(
        kernel.run, grid=grid, warmup=True
    )
    major, minor = divmod(int(chip.removeprefix("sm_")), 10)
    card = SimpleNamespace(major=major, minor=minor, multi_processor_count=SHIPPED_CLASSES[chip])
    torch.cuda.get_device_properties = lambda device: card


def compile_gate(text: str, half: str) -> None:
    """What gpu_gate.check launches."""
    import numpy as np
    import torch

    from kbit_kernels import QuantSpec, quantize
    from kbit_kernels.triton import dequantize, fused_linear, prepare

    spec, dtype = QuantSpec.parse(text), getattr(torch, half)
    columns = SCALE.gate_shape[1]
    rows = np.random.default_rng(0).standard_normal((16, columns)).astype(np.float32)
    weight = prepare(quantize(rows, spec), SCALE.device, dtype, use_ptx=True)
    dequantize(weight)
    for config in configs_of(spec, dtype, SCALE):
        x = torch.empty((config.rows_x - 3, columns), dtype=dtype, device=SCALE.device)
        fused_linear(x, weight, config)


def compile_sweep(text: str, half: str) -> None:
    """What gpu_sweep.sweep launches."""
    import torch

    from kbit_kernels import QuantSpec
    from kbit_kernels.triton import linear
    from kbit_kernels.triton.measure import random_weight

    spec = QuantSpec.parse(text)
    for n, k in SCALE.shapes:
        weight = random_weight(spec, (n, k), device=SCALE.device)
        for rows in SCALE.rows:
            x = torch.empty((rows, k), dtype=torch.float16, device=SCALE.device)
            linear(x, weight)


def compile_decode(text: str, half: str) -> None:
    """What gpu_decode.decode_speed launches, but the choice of tokens."""
    from kbit.engine import cuda_executor, cuda_layers

    cuda_executor.has_kernels = cuda_layers.has_kernels = lambda device: True
    import torch

    from gpu_decode import CONTEXT, LLAMA_3_8B, RandomLoader
    from kbit.models import describe
    from kbit_kernels import QuantSpec

    decoder = describe(LLAMA_3_8B | {"num_hidden_layers": 1})
    loader = type("Loader", (RandomLoader,), {"spec": QuantSpec.parse(text)})
    kind = type("Executor", (cuda_executor.CudaExecutor,), {"loader_class": loader})
    executor = kind({}, decoder, SCALE.device, torch.float16, torch.float16)
    for batch in (1, 8):
        cache = executor.new_cache(batch, CONTEXT)
        with torch.inference_mode():
            cache.step([1] * batch, [CONTEXT - 1] * batch)


def compile_tune(text: str, half: str) -> None:
    """What gpu_tune.products launches."""
    import torch

    from gpu_tune import ROWS, SHAPES, candidates
    from kbit_kernels import QuantSpec
    from kbit_kernels.triton import fused_linear
    from kbit_kernels.triton.measure import random_weight

    spec = QuantSpec.parse(text)
    for n, k in SHAPES:
        weight = random_weight(spec, (n, k), device=SCALE.device)
        for rows in ROWS:
            x = torch.empty((rows, k), dtype=torch.float16, device=SCALE.device)
            for config in candidates(spec, rows, (n, k), True):
                fused_linear(x, weight, config)


def jobs(tune: bool) -> Iterator[tuple[Any, str, str]]:
    """(what to compile, spec, half precision); what is timed first."""
    for bits in WIDTHS:
        yield compile_decode, f"int{bits}-b64", "float16"
    for name in DTYPES:
        for bits in WIDTHS:
            yield compile_sweep, f"{name}{bits}-b64", "float16"
    for half in HALVES:
        for text in gate_specs(WIDTHS):
            yield compile_gate, text, half
    for bits in WIDTHS if tune else ():
        yield compile_tune, f"int{bits}-b64", "float16"


def main() -> None:
    """Compile everything; say what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="sm_90", help="class of the card, %(default)s")
    parser.add_argument("--tune", action="store_true", help="also what gpu_tune.py tries of int")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="%(default)s")
    options = parser.parse_args()
    started, failed = time.monotonic(), 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        options.processes, mp_context=spawn, initializer=pretend, initargs=(options.chip,)
    ) as pool:
        waiting = {
            pool.submit(work, text, half): f"{work.__name__} {text} {half}"
            for work, text, half in jobs(options.tune)
        }
        for future in as_completed(waiting):
            problem = future.exception()
            failed += problem is not None
            outcome = "" if problem is None else f": {type(problem).__name__}: {problem}"
            print(f"{time.monotonic() - started:.0f} s {waiting[future]}{outcome}", flush=True)
    if failed:
        raise SystemExit(f"{failed} failed")


if __name__ == "__main__":
    main()
