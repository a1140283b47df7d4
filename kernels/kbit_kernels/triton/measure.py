"""Timing on a GPU: CUDA graphs over rotating weights, everything to compare interleaved.

On "cpu", under Triton's interpreter, the same code runs uncaptured on the host's clock, so that
what measures can be tried where there is no GPU; such times mean nothing.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch

from kbit_kernels.formats import codebook_of
from kbit_kernels.spec import QuantSpec
from kbit_kernels.triton.configs import fused_for, gpu_class
from kbit_kernels.triton.device import (
    DTYPE_NAMES,
    DeviceTensor,
    dequantized_linear,
    factor_of,
    fused_linear,
    kernel_spec,
    make_table,
    zeros_dtype,
)
from kbit_kernels.triton.layout import CHUNK_WORDS, COLUMNS, padded, scheme_of

CROSS_OVERS = (8, 16, 32, 64, 128, 256, 384, 512, 768, 1024)  # rows of x, tried in this order
WARMING_COPIES = 1000  # of 1 GiB: about a second
CALLS = 24  # in one graph, at least
COLD_BYTES = 256 << 20  # a round touches more than any second-level cache holds


def random_weight(
    spec: QuantSpec,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float16,
    device: str = "cuda",
) -> DeviceTensor:
    """A matrix of random codes on the device: for timing, and shaped like `prepare` makes them."""
    use_ptx = device != "cpu" and torch.version.hip is None
    rows, columns = shape
    bands, tiles = padded(rows, columns)
    half, kernel = DTYPE_NAMES[dtype], kernel_spec(spec)
    scheme = scheme_of(kernel)
    width = max(kernel.block, COLUMNS)
    each = (-(-columns // width), width // kernel.block) if kernel.block else (1, 1)
    groups = (bands, each[0], 8, 2, each[1])

    def blocks(scale: float) -> torch.Tensor:
        return torch.rand(groups, device=device).mul_(scale).to(torch.float16)

    table = None
    if scheme.kind == "table":
        codebook = codebook_of(spec)
        if codebook is None:  # learned ones cost the same, whatever is in them
            codebook = np.linspace(-1, 1, 1 << spec.bits, dtype=np.float32)
        table = make_table(codebook, kernel, half, use_ptx, device)
    words = torch.empty((bands, tiles, spec.bits * CHUNK_WORDS), dtype=torch.int16, device=device)
    zeros = None
    if scheme.kind == "uint":
        kind = torch.uint8 if zeros_dtype(kernel) is np.uint8 else torch.int16
        zeros = torch.zeros(groups, dtype=kind, device=device)
    return DeviceTensor(
        spec=spec,
        shape=shape,
        dtype=dtype,
        words=words.random_(-(1 << 15), 1 << 15),
        scales=blocks(0.01),
        zeros=zeros,
        means=blocks(0.01) if kernel.center else None,
        table=table,
        factor=factor_of(kernel),
        outlier_columns=None,
        outliers=None,
        outlier_residual=None,
        use_ptx=use_ptx,
    )


def copies(nbytes: int) -> int:
    """How many copies of `nbytes` make a round cold."""
    return min(64, max(2, -(-COLD_BYTES // nbytes)))


class Timed:
    """Calls captured into one CUDA graph, one after the other, each often enough that starting the
    graph, some microseconds, does not count.

    Replaying leaves no launch overhead in the time; each call should use weights of its own.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], device: str = "cuda") -> None:
        if device == "cpu":
            self.calls = len(calls)
            self.replay: Callable[[], object] = lambda: [call() for call in calls]
            self._on_device = False
            return
        repeats = -(-CALLS // len(calls))
        self.calls = repeats * len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and fills allocator and library caches
            calls[0]()
            calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # a graph that is collected during the capture of another one spoils it
        gc.disable()
        try:
            with torch.cuda.graph(graph):
                self.kept = [call() for call in list(calls) * repeats]
        finally:
            gc.enable()
        self.replay = graph.replay
        self._calls = calls  # the graph points to what they hold
        self._on_device = True

    def us(self) -> float:
        """Microseconds per call of one replay."""
        if not self._on_device:
            started = time.perf_counter()
            self.replay()
            return (time.perf_counter() - started) * 1e6 / self.calls
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        start.record()
        self.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / self.calls


def medians_us(timed: Mapping[str, Timed], rounds: int = 15) -> dict[str, float]:
    """Median microseconds per call of each, their rounds interleaved: a clock that drifts or a
    neighbour that wakes up then meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for entry in timed.values():
        entry.replay()
    for _ in range(rounds):
        for name, entry in timed.items():
            found[name].append(entry.us())
    return {name: median(values) for name, values in found.items()}


def copy_bandwidth_gb_s(nbytes: int = 1 << 30, device: str = "cuda") -> float:
    """Bytes read plus written per second of a large copy on the device, by the copy engine's call
    or by a kernel, whichever is faster."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    if device != "cpu":  # an idle card's clock takes a moment to rise
        for _ in range(WARMING_COPIES):
            target.copy_(source)
    ways = {
        "call": Timed([lambda: target.copy_(source)], device),
        "kernel": Timed([lambda: torch.neg(source, out=target)], device),
    }
    return 2 * source.nbytes / min(medians_us(ways, 7).values()) / 1e3


def cross_over_rows(
    spec: QuantSpec, shape: tuple[int, int], device: str = "cuda", rounds: int = 7
) -> int:
    """The most rows of x up to which the fused kernel is no slower than dequantizing and cuBLAS,
    among CROSS_OVERS (0: never)."""
    n, k = shape
    where = torch.device(device)
    gpu, sms = gpu_class(where)
    first = random_weight(spec, shape, device=device)
    count = copies(first.nbytes) if device != "cpu" else 1
    weights = [first, *(random_weight(spec, shape, device=device) for _ in range(count - 1))]
    most = 0
    for rows in CROSS_OVERS:
        x = torch.randn((rows, k), dtype=torch.float16, device=device)
        config, _ = fused_for(spec, rows, n, k, gpu, sms)
        ways = {
            "fused": [partial(fused_linear, x, weight, config) for weight in weights],
            "dense": [partial(dequantized_linear, x, weight) for weight in weights],
        }
        us = medians_us({name: Timed(calls, device) for name, calls in ways.items()}, rounds)
        if us["fused"] > us["dense"]:
            break
        most = rows
    return most
