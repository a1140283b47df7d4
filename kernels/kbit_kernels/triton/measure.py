"""Timing on a GPU: CUDA graphs over rotating weights, everything to compare interleaved."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy as np
import torch

from kbit_kernels.formats import codebook_of
from kbit_kernels.spec import QuantSpec
from kbit_kernels.triton.device import (
    DTYPE_NAMES,
    DeviceTensor,
    factor_of,
    kernel_spec,
    make_table,
)
from kbit_kernels.triton.layout import CHUNK_WORDS, COLUMNS, padded, scheme_of

COLD_BYTES = 256 << 20  # a round touches more than any second-level cache holds


def random_weight(
    spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype = torch.float16
) -> DeviceTensor:
    """A matrix of random codes on the GPU: for timing, and shaped like `prepare` makes them."""
    rows, columns = shape
    bands, tiles = padded(rows, columns)
    half, kernel = DTYPE_NAMES[dtype], kernel_spec(spec)
    scheme = scheme_of(kernel)
    width = max(kernel.block, COLUMNS)
    groups = (bands, -(-columns // width), 8, 2, width // kernel.block) if kernel.block else None

    def blocks(scale: float) -> torch.Tensor:
        shape = groups or (bands * 16,)
        return torch.rand(shape, device="cuda").mul_(scale).to(torch.float16)

    table = None
    if scheme.kind == "table":
        codebook = codebook_of(spec)
        if codebook is None:  # learned ones cost the same, whatever is in them
            codebook = np.linspace(-1, 1, 1 << spec.bits, dtype=np.float32)
        table = make_table(codebook, kernel, half, torch.version.hip is None, "cuda")
    words = torch.empty((bands, tiles, spec.bits * CHUNK_WORDS), dtype=torch.int16, device="cuda")
    zeros = None
    if scheme.kind == "uint":
        zeros = torch.zeros(groups or (bands * 16,), dtype=torch.int8, device="cuda")
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
        use_ptx=torch.version.hip is None,
    )


def copies(nbytes: int) -> int:
    """How many copies of `nbytes` make a round cold."""
    return min(64, max(2, -(-COLD_BYTES // nbytes)))


class Timed:
    """Calls captured into one CUDA graph, one after the other.

    Replaying leaves no launch overhead in the time; each call should use weights of its own.
    """

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls = len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and fills allocator and library caches
            calls[0]()
            calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept = [call() for call in calls]


def medians_us(timed: Mapping[str, Timed], rounds: int = 15) -> dict[str, float]:
    """Median microseconds per call of each, their rounds interleaved: a clock that drifts or a
    neighbour that wakes up then meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for entry in timed.values():
        entry.graph.replay()
    for _ in range(rounds):
        for name, entry in timed.items():
            start = torch.cuda.Event(enable_timing=True)
            stop = torch.cuda.Event(enable_timing=True)
            start.record()
            entry.graph.replay()
            stop.record()
            stop.synchronize()
            found[name].append(start.elapsed_time(stop) * 1e3 / entry.calls)
    return {name: median(values) for name, values in found.items()}


def copy_bandwidth_gb_s() -> float:
    """Bytes read plus written per second of a large device-to-device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    us = medians_us({"copy": Timed([lambda: target.copy_(source)])})["copy"]
    return 2 * source.nbytes / us / 1e3
