"""Native products and rounding: GB/s of weight bytes, and the share of the machine's bandwidth.

    pytest benchmarks/cpu_kernels.py [-k 'nf4 and int8'] [--rounds 7]

Cold: the matrices of a case are as many copies as twice the last-level cache holds, read in turn,
and the bandwidth beside it, measured before every round, is that of reading one buffer of that
size. A cache as large as a server's (480 MB) holds whole small models, which decode out of it; so
does no figure here. Medians of undisturbed rounds: one in which threads waited for a core that
others held is repeated. Every product is first held to numpy. A full run puts the section "kernels"
into the machine's results.
"""

import time
from collections.abc import Callable, Iterator
from ctypes import byref, c_void_p
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch

from kbit_kernels import QuantizedTensor, QuantSpec, expected_parts, reference
from kbit_kernels.cpu import library
from kbit_kernels.cpu.rounding import quantize
from record import last_level_cache_bytes, save_section

COLD_BYTES = max(256 << 20, 2 * last_level_cache_bytes())
# Of a round, all threads together. Alone 0.002, and 0.06 where the kernel's own threads are busy.
# Beside one spinning process 0.2 to 0.9, with rounds 1.5 to 4 times as long; beside one of nice 19
# 0.05 or 0.5, with rounds 1.04 or 1.8 times as long.
WAITED_SHARE = 0.1
PATIENCE_S = 60  # with the other load, in all rounds of a case
ROUNDS = 7
TOLERANCE = {"float": 1e-5, "int16": 3e-4, "int8": 2e-2}
ARITHMETICS = tuple(TOLERANCE)  # bf16 is int16 for one token, int8 for many
ISAS = [isa for isa in reversed(library.ISAS) if library.isa_available(isa)]
SQUARE = (4096, 4096)


@dataclass(frozen=True)
class Product:
    spec: QuantSpec
    shape: tuple[int, int]
    tokens: int
    arithmetic: library.Arithmetic
    isa: library.Isa

    def __str__(self) -> str:
        rows, columns = self.shape
        return f"{self.isa}-{self.arithmetic}-{self.spec}-{rows}x{columns}-{self.tokens}"


def products() -> Iterator[Product]:
    """Every width as integers and as a codebook; 4 bits on shapes of models and more tokens."""
    nf4 = QuantSpec("nf", 4, 64)
    for isa in ISAS:
        for arithmetic in ARITHMETICS:
            yield Product(nf4, SQUARE, 1, arithmetic, isa)
        if isa == "portable":
            continue
        for arithmetic in ARITHMETICS:
            for bits in range(2, 9):
                for dtype in ("int", "nf"):
                    if (dtype, bits) != ("nf", 4):
                        yield Product(QuantSpec(dtype, bits, 64), SQUARE, 1, arithmetic, isa)
            yield Product(nf4, SQUARE, 4, arithmetic, isa)
            yield Product(nf4, SQUARE, 512, arithmetic, isa)
            yield Product(nf4, (1536, 576), 1, arithmetic, isa)
            yield Product(nf4, (1536, 576), 512, arithmetic, isa)


def random_tensor(spec: QuantSpec, shape: tuple[int, int]) -> QuantizedTensor:
    """Random codes and scales; nothing is quantized, which would take minutes."""
    rng = np.random.default_rng(0)
    parts: dict[str, Any] = {}
    for suffix, (dtype, size) in expected_parts(spec, shape).items():
        if dtype == np.uint8:
            top = 256 if suffix == "codes" else 1 << spec.bits
            parts[suffix] = rng.integers(0, top, size, dtype=np.uint8)
        else:
            parts[suffix] = rng.uniform(0.01, 0.02, size).astype(dtype)
    return QuantizedTensor.from_parts(spec, shape, parts)


def copy_of(tensor: QuantizedTensor) -> QuantizedTensor:
    parts = {suffix: part.copy() for suffix, part in tensor.parts().items()}
    return QuantizedTensor.from_parts(tensor.spec, tensor.shape, parts)


def copies_for(weight_bytes: int, tokens: int) -> int:
    """Of few tokens more than the caches hold; of many some 10 ms: waking a thread is no load."""
    if tokens < 16:
        return max(1, COLD_BYTES // weight_bytes)
    return max(2, (8 << 20) // weight_bytes)


@pytest.fixture(scope="module")
def pool() -> library.Pool:
    return library.Pool()


class Bandwidth:
    """What all threads together read of a buffer too large for the caches, GB/s."""

    def __init__(self, pool: library.Pool) -> None:
        self._pool, self._data = pool, np.ones(COLD_BYTES // 8, dtype=np.uint64)
        self.readings: list[float] = []

    def read(self) -> float:
        start = time.perf_counter()
        library.load().kbit_read(self._pool.handle, self._data.ctypes.data, self._data.size)
        self.readings.append(self._data.nbytes / (time.perf_counter() - start) / 1e9)
        return self.readings[-1]


@pytest.fixture(scope="module")
def bandwidth(pool: library.Pool) -> Bandwidth:
    return Bandwidth(pool)


class Results:
    def __init__(self) -> None:
        self.sections: dict[str, list[dict[str, Any]]] = {}

    def add(self, section: str, benchmark: Any, **row: Any) -> None:
        benchmark.extra_info.update(row)
        self.sections.setdefault(section, []).append(row)


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, pool: library.Pool, bandwidth: Bandwidth
) -> Iterator[Results]:
    """Collects rows, and saves them after a full run without failures."""
    found = Results()
    yield found
    session = request.session
    if session.testsfailed or request.config.getoption("keyword"):
        return
    save_section(
        "kernels",
        "pytest benchmarks/cpu_kernels.py",
        {
            "threads": pool.threads,
            "last_level_cache_bytes": last_level_cache_bytes(),
            "working_set_bytes": COLD_BYTES,
            "read_gb_per_s": round(median(bandwidth.readings), 1),
            **found.sections,
        },
    )


def waited_seconds() -> float:
    """How long this process's threads were ready to run, but had no core."""
    tasks = Path("/proc/self/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[1]) for task in tasks) / 1e9


def undisturbed(
    benchmark: Any, timed: Callable[[], None], before: Callable[[], Any]
) -> list[tuple[float, Any]]:
    """ROUNDS rounds of `timed` that had the cores to themselves: seconds, and what `before` gave.

    pytest-benchmark's own statistics count the disturbed rounds too.
    """
    rounds: list[tuple[float, float, Any]] = []

    def one_round(given: Any) -> None:
        already, begin = waited_seconds(), time.perf_counter()
        timed()
        seconds = time.perf_counter() - begin
        rounds.append((seconds, (waited_seconds() - already) / seconds, given))

    timed()
    began = time.perf_counter()
    benchmark.pedantic(one_round, setup=lambda: ((before(),), {}), rounds=ROUNDS, iterations=1)
    while len(quiet := [(s, g) for s, w, g in rounds if w <= WAITED_SHARE]) < ROUNDS:
        if time.perf_counter() - began > PATIENCE_S:
            pytest.fail("other processes held the cores: measure on a quiet machine")
        one_round(before())  # without a pause, after which some systems pack threads on one core
    return quiet


def product_row(
    rounds: list[tuple[float, float]], count: int, weight_bytes: int, macs: int
) -> dict[str, float]:
    """Medians of rounds over `count` matrices, each beside a reading of the bandwidth."""
    seconds = median(s for s, _ in rounds) / count
    shares = [weight_bytes * count / s / 1e9 / limit for s, limit in rounds]
    return {
        "us": round(seconds * 1e6, 1),
        "weight_gb_per_s": round(weight_bytes / seconds / 1e9, 2),
        "bandwidth_share": round(median(shares), 3),
        "gmac_per_s": round(macs / seconds / 1e9, 1),
    }


@pytest.mark.parametrize("case", [*products()], ids=str)
def test_product(
    case: Product, benchmark: Any, pool: library.Pool, bandwidth: Bandwidth, results: Results
) -> None:
    tensor = random_tensor(case.spec, case.shape)
    count = copies_for(tensor.nbytes, case.tokens)
    tensors = [tensor, *(copy_of(tensor) for _ in range(1, count))]
    matrices = [library.Matrix(t, case.isa) for t in tensors]
    x = np.random.default_rng(1).standard_normal((case.tokens, case.shape[1]), dtype=np.float32)
    y = np.empty((case.tokens, case.shape[0]), dtype=np.float32)
    exact = x @ reference.dequantize(tensor.rows(slice(0, 64))).T
    found = matrices[0].linear(x, arithmetic=case.arithmetic, pool=pool)[:, :64]
    assert np.abs(found - exact).max() <= TOLERANCE[case.arithmetic] * np.abs(exact).max()
    handles = (c_void_p * count)(*(matrix.handle for matrix in matrices))
    index, error = library.ARITHMETICS.index(case.arithmetic), library._Error()

    def all_products() -> None:
        library.load().kbit_linear_each(
            handles, count, pool.handle, index, x.ctypes.data, case.tokens, y.ctypes.data,
            byref(error),
        )  # fmt: skip

    rounds = undisturbed(benchmark, all_products, bandwidth.read)
    macs = case.shape[0] * case.shape[1] * case.tokens
    results.add(
        "products",
        benchmark,
        spec=str(case.spec),
        shape=list(case.shape),
        tokens=case.tokens,
        arithmetic=case.arithmetic,
        isa=case.isa,
        **product_row(rounds, count, tensor.nbytes, macs),
    )


@pytest.mark.parametrize("tokens", [1, 4, 512])
def test_torch_int4_product(
    tokens: int, benchmark: Any, pool: library.Pool, bandwidth: Bandwidth, results: Results
) -> None:
    """torch's own: 4-bit codes with a bf16 scale and zero a group of 64, bf16 inputs."""
    rows, columns = SQUARE
    torch.set_num_threads(pool.threads)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, SQUARE, dtype=torch.int32, generator=generator)
    scales = torch.rand(columns // 64, rows, 2, generator=generator).to(torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    weight_bytes = packed.nbytes + scales.nbytes
    count = copies_for(weight_bytes, tokens)
    stored = [(packed.clone(), scales.clone()) for _ in range(count)]
    x = torch.randn(tokens, columns, generator=generator).to(torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    scale, zero = (part.float().T.repeat_interleave(64, 1) for part in scales.unbind(-1))
    exact = x.float() @ ((codes - 8) * scale + zero).T
    error = (product(x, packed, 64, scales).float() - exact).abs().max() / exact.abs().max()
    assert error < TOLERANCE["int8"]

    def all_products() -> None:
        for weights, values in stored:
            product(x, weights, 64, values)

    rounds = undisturbed(benchmark, all_products, bandwidth.read)
    results.add(
        "peers",
        benchmark,
        name=f"torch {torch.__version__} _weight_int4pack_mm_for_cpu, bf16, group 64",
        shape=list(SQUARE),
        tokens=tokens,
        **product_row(rounds, count, weight_bytes, rows * columns * tokens),
    )


@pytest.mark.parametrize("spec", ["int4-b64", "nf4-b64", "uint4-b64", "int8-b64", "nf8-b64"])
def test_rounding(spec: str, benchmark: Any, pool: library.Pool, results: Results) -> None:
    """Round-to-nearest of fp32 weights: MB/s of input."""
    w = np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32)
    parsed = QuantSpec.parse(spec)
    expected = reference.quantize(w[:64], parsed)
    assert np.array_equal(quantize(w[:64], parsed, pool=pool).codes, expected.codes)
    rounds = undisturbed(benchmark, lambda: quantize(w, parsed, pool=pool), lambda: None)
    seconds = median(s for s, _ in rounds)
    results.add("quantize", benchmark, spec=spec, input_mb_per_s=round(w.nbytes / seconds / 1e6))
