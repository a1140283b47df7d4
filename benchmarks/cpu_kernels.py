"""Native products and rounding: GB/s of weight bytes, and the share of the machine's bandwidth.

`python benchmarks/cpu_kernels.py [--quick]` writes results/cpu-kernels.json. Matrices are rotated
past the last-level cache, each figure is the median over rounds, bandwidth is measured again in
every round, and no figure is taken of a product that is not first held to numpy. A round in which
other processes took a core is thrown away and repeated.
"""

import argparse
import sys
import time
from ctypes import byref, c_void_p
from statistics import median
from typing import Any

import numpy as np

from kbit_kernels import QuantizedTensor, QuantSpec, expected_parts, reference
from kbit_kernels.cpu import library
from kbit_kernels.cpu.rounding import quantize
from record import save

Cases = dict[str, tuple[QuantSpec, tuple[int, int], int, library.Arithmetic, library.Isa]]

COLD_BYTES = 100 << 20  # three times a last-level cache of 32 MB
FREE_CORES = 0.93  # threads wait by spinning, so that undisturbed ones use whole cores
ATTEMPTS = 10
TOLERANCE = {"float": 1e-5, "int16": 3e-4, "int8": 2e-2}


def random_tensor(spec: QuantSpec, shape: tuple[int, int], seed: int) -> QuantizedTensor:
    """Random codes and scales; nothing is quantized, which would take minutes."""
    rng = np.random.default_rng(seed)
    parts: dict[str, Any] = {}
    for suffix, (dtype, size) in expected_parts(spec, shape).items():
        if dtype == np.uint8:
            top = 256 if suffix == "codes" else 1 << spec.bits
            parts[suffix] = rng.integers(0, top, size, dtype=np.uint8)
        else:
            parts[suffix] = rng.uniform(0.01, 0.02, size).astype(dtype)
    return QuantizedTensor.from_parts(spec, shape, parts)


class Case:
    """Products of one input with enough copies of a matrix that none stays in a cache."""

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        tokens: int,
        arithmetic: library.Arithmetic,
        isa: library.Isa,
        pool: library.Pool,
    ) -> None:
        self.shape, self.tokens, self.pool = shape, tokens, pool
        self.index = library.ARITHMETICS.index(arithmetic)
        tensor = random_tensor(spec, shape, 0)
        self.weight_bytes = tensor.nbytes
        count = max(1, COLD_BYTES // tensor.nbytes) if tokens < 16 else 2
        tensors = [tensor, *(random_tensor(spec, shape, i) for i in range(1, count))]
        self.matrices = [library.Matrix(t, isa) for t in tensors]
        self.x = np.random.default_rng(1).standard_normal((tokens, shape[1])).astype(np.float32)
        self.y = np.empty((tokens, shape[0]), dtype=np.float32)
        weights = reference.dequantize(tensor.rows(slice(0, 64)))
        exact = self.x @ weights.T
        found = self.matrices[0].linear(self.x, arithmetic=arithmetic, pool=pool)[:, :64]
        error = np.abs(found - exact).max() / np.abs(exact).max()
        assert error < TOLERANCE[arithmetic], f"{spec} {isa} {arithmetic} is wrong by {error}"
        self.handles = (c_void_p * count)(*(matrix.handle for matrix in self.matrices))

    def seconds(self) -> float:
        """Time of one product, the mean over all matrices."""
        error = library._Error()
        start = time.perf_counter()
        library.load().kbit_linear_each(
            self.handles, len(self.matrices), self.pool.handle, self.index,
            self.x.ctypes.data, self.tokens, self.y.ctypes.data, byref(error),
        )  # fmt: skip
        return (time.perf_counter() - start) / len(self.matrices)


class Bandwidth:
    """What all threads together read from memory, GB/s."""

    def __init__(self, pool: library.Pool) -> None:
        self.pool, self.data = pool, np.ones(COLD_BYTES // 8, dtype=np.uint64)

    def gb_per_s(self) -> float:
        """One reading."""
        start = time.perf_counter()
        library.load().kbit_read(self.pool.handle, self.data.ctypes.data, self.data.size)
        return self.data.nbytes / (time.perf_counter() - start) / 1e9


def measure_products(
    cases: Cases,
    rounds: int,
    pool: library.Pool,
) -> list[dict[str, Any]]:
    """A row a case: medians, each round beside a reading of the bandwidth."""
    bandwidth = Bandwidth(pool)
    rows: list[dict[str, Any]] = []
    for name, (spec, shape, tokens, arithmetic, isa) in cases.items():
        case = Case(spec, shape, tokens, arithmetic, isa, pool)
        case.seconds()
        taken: list[float] = []
        shares: list[float] = []
        undisturbed = 0
        for _ in range(ATTEMPTS * rounds):
            wall, used = time.perf_counter(), time.process_time()
            limit = bandwidth.gb_per_s()
            seconds = case.seconds()
            share = (time.process_time() - used) / (time.perf_counter() - wall) / pool.threads
            if share < FREE_CORES:
                continue
            undisturbed += 1
            taken.append(seconds)
            shares.append(case.weight_bytes / seconds / 1e9 / limit)
            if undisturbed == rounds:
                break
        if undisturbed < rounds:
            print(f"{name:34} left out: other processes held the cores", flush=True)
            continue
        seconds = median(taken)
        row: dict[str, Any] = {
            "name": name,
            "spec": str(spec),
            "shape": list(shape),
            "tokens": tokens,
            "arithmetic": arithmetic,
            "isa": isa,
            "us": round(seconds * 1e6, 1),
            "weight_gb_per_s": round(case.weight_bytes / seconds / 1e9, 2),
            "bandwidth_share": round(median(shares), 3),
            "gmac_per_s": round(shape[0] * shape[1] * tokens / seconds / 1e9, 1),
        }
        rows.append(row)
        print(
            f"{name:34} {row['us']:10.1f} us {row['weight_gb_per_s']:7.2f} GB/s "
            f"{100 * row['bandwidth_share']:5.0f}% {row['gmac_per_s']:7.1f} GMAC/s",
            flush=True,
        )
    return rows


def measure_rounding(rounds: int, pool: library.Pool) -> list[dict[str, Any]]:
    """Round-to-nearest of fp32 weights: MB/s of input."""
    w = np.random.default_rng(0).standard_normal((2048, 4096)).astype(np.float32)
    rows = []
    for text in ("int4-b64", "nf4-b64", "uint4-b64", "int8-b64", "nf8-b64"):
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            quantize(w, QuantSpec.parse(text), pool=pool)
            taken.append(time.perf_counter() - start)
        rows.append({"spec": text, "input_mb_per_s": round(w.nbytes / median(taken) / 1e6)})
        print(f"quantize {text:25} {rows[-1]['input_mb_per_s']:10} MB/s", flush=True)
    return rows


def main() -> None:
    """Measures and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 bits only, 3 rounds, not saved")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    pool = library.Pool()
    isas: list[library.Isa] = [
        isa for isa in reversed(library.ISAS[1:]) if library.isa_available(isa)
    ] or ["portable"]
    cases: Cases = {}
    for isa in isas:
        for bits in (4,) if options.quick else range(2, 9):
            for dtype in ("int", "nf"):
                spec = QuantSpec(dtype, bits, 64)
                for arithmetic in library.ARITHMETICS:
                    name = f"{isa} {arithmetic} {spec}"
                    cases[f"{name} decode"] = (spec, (4096, 4096), 1, arithmetic, isa)
        for arithmetic in library.ARITHMETICS:
            spec = QuantSpec("nf", 4, 64)
            cases[f"{isa} {arithmetic} {spec} prompt"] = (spec, (1536, 576), 512, arithmetic, isa)
            cases[f"{isa} {arithmetic} {spec} batch 4"] = (spec, (4096, 4096), 4, arithmetic, isa)
    products = measure_products(cases, rounds, pool)
    rounding = measure_rounding(rounds, pool)
    reading = Bandwidth(pool)
    read_gb_per_s = round(median(reading.gb_per_s() for _ in range(rounds)), 1)
    print(f"read bandwidth {read_gb_per_s} GB/s on {pool.threads} threads")
    if not options.quick:
        result = {
            "threads": pool.threads,
            "read_gb_per_s": read_gb_per_s,
            "products": products,
            "quantize": rounding,
        }
        command = "python benchmarks/" + " ".join(sys.argv).split("/")[-1]
        print(save("cpu-kernels", command, result))


if __name__ == "__main__":
    main()
