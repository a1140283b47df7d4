"""The configurations that are shipped for a class of GPU, searched on a card.

    python benchmarks/gpu_tune.py [--rows 1 16 32 64 128] [--bits 8 4] [--types int uint nf]

Products of the shapes that gpu.py measures run as chains of calls in a CUDA graph, those of
Llama-3-8B with one row in the decode step itself, where their neighbours are others (of `int`).
Results go to the user's table (configs.tuned_path), whose class is then copied into configs.json,
and to results/gpu-tune-<class>.json, where a run replaces what it measures anew.
`python benchmarks/gpu.py` checks and measures what was chosen.
"""

import argparse
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from kbit_kernels.triton.tune import FEW_REGISTERS
from record import RESULTS, environment

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
ROWS = (1, 16, 32, 64, 128)
TYPES = ("int", "uint", "nf")
SHAPES = ((8192, 8192), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
# of Llama-3-8B: qkv, out, gate and up, down, head
LLAMA = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))
# bands, warps_n, warps_k, split
EIGHT, FOUR = (1, 1, 8, 1), (1, 1, 4, 1)
CUTS = (EIGHT, FOUR, (1, 1, 4, 2), (1, 2, 4, 1), (1, 1, 8, 2))
# warps beside each other read the same rows of x, which are many then
BESIDE = tuple((1, n, k, split) for n, k in ((2, 2), (4, 1), (4, 2), (8, 1)) for split in (1, 2, 4))
# for each of LLAMA: the cut, whether it overlaps with the kernel before, the limit of registers
STEPS = {
    "alone": ((FOUR, 0), (EIGHT, 0), (FOUR, 0), (EIGHT, 0), (FOUR, 0)),
    "alone, qkv by eight": ((EIGHT, 0), (EIGHT, 0), (FOUR, 0), (EIGHT, 0), (FOUR, 0)),
    "alone, all by eight": ((EIGHT, 0),) * 5,
    "overlap but down": ((EIGHT, 1), (EIGHT, 1), (FOUR, 1), (EIGHT, 0), (FOUR, 1)),
    "overlap": ((EIGHT, 1), (EIGHT, 1), (FOUR, 1), (EIGHT, 1), (FOUR, 1)),
    "overlap, all by eight": ((EIGHT, 1),) * 5,
    "overlap, all by eight, few registers": ((EIGHT, 1, FEW_REGISTERS),) * 5,
}


def candidates(spec: Any, rows: int, shape: tuple[int, int], few: bool) -> list[Any]:
    """What is timed: what is chosen now, and what may be better; with few registers or not."""
    from kbit_kernels.triton.configs import (
        LINEAR_ROWS,
        SHIPPED_CLASSES,
        Config,
        bucket,
        fits,
        fused_for,
    )
    from kbit_kernels.triton.tune import gemm_candidates

    sms = SHIPPED_CLASSES["sm_90"]
    found = [
        replace(config, overlap=overlap)
        for config in gemm_candidates(rows, *shape, sms)
        for overlap in (False, True)
    ]
    if spec.dtype != "int":  # compiling takes longest, so what was good for int
        found = [config for config in found if config.warps_n == 4 and config.split <= 2]
        cuts = CUTS[:3] if rows > 8 else CUTS[:2]
    else:
        cuts = CUTS if bucket(rows) == 8 else CUTS + BESIDE
    if rows <= LINEAR_ROWS:
        found += [Config(bucket(rows), *cut, bool(o)) for cut in cuts for o in (0, 1)]
        if few and bucket(rows) == 8:
            found += [Config(8, *EIGHT, bool(o), registers=FEW_REGISTERS) for o in (0, 1)]
    else:  # with so many rows only these were ever chosen
        found = [config for config in found if config.arranged and config.overlap]
    now, _ = fused_for(spec, rows, *shape, "sm_90", sms)
    return [config for config in dict.fromkeys([now, *found]) if fits(config, spec)]


def compile_all(spec: Any, part: int, rows_of_x: tuple[int, ...]) -> bool:
    """Run in its own process: fill Triton's cache with half of what one type is timed with.
    Whether few registers are enough, so that none spill."""
    import torch

    from kbit_kernels.triton.compiled import compile_linear
    from kbit_kernels.triton.configs import Config
    from kbit_kernels.triton.device import fused_linear
    from kbit_kernels.triton.measure import random_weight

    def half(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float16, device="cuda")

    rows = 256
    for k in sorted({k for _, k in SHAPES + LLAMA}):
        configs = {
            config
            for shape in SHAPES + LLAMA
            for m in rows_of_x
            for config in candidates(spec, m, shape, True)
            if shape[1] == k
        }
        weight = random_weight(spec, (rows, k))
        for config in sorted(configs, key=str)[part::2]:
            fused_linear(half(1, k), weight, config)
            if config.rows_x == 8 and spec.dtype == "int":
                fused_linear(half(1, k), weight, config, onto=half(1, rows))
                fused_linear(half(1, k), weight, config, gate="silu")
    few = Config(8, *EIGHT, registers=FEW_REGISTERS)
    return compile_linear(spec, "sm_90", few, ("fp16", "bf16")[part]).spill_bytes == 0


def decode_steps(spec: Any, few: bool) -> tuple[dict[str, float], dict[tuple[int, int], Any]]:
    """Microseconds of a decode step of Llama-3-8B's shapes by STEPS, and the best one's
    configurations by shape."""
    import torch

    import gpu_decode
    from kbit.engine.cuda_executor import CudaExecutor
    from kbit.models import describe
    from kbit_kernels.triton.configs import Config, trying
    from kbit_kernels.triton.measure import medians_us

    loader = type("Loader", (gpu_decode.RandomLoader,), {"spec": spec})
    kind = type("Executor", (CudaExecutor,), {"loader_class": loader})
    executor = kind({}, describe(gpu_decode.LLAMA_3_8B), "cuda", torch.float16, torch.float16)
    tables = {
        name: {
            shape: Config(8, *cut, bool(overlap), registers=sum(limit))
            for shape, (cut, overlap, *limit) in zip(LLAMA, step, strict=True)
        }
        for name, step in STEPS.items()
        if few or not name.endswith("few registers")
    }
    timed, caches = {}, []
    for name, table in tables.items():
        cache = executor.new_cache(1, gpu_decode.CONTEXT)
        caches.append(cache)
        replay = partial(cache.step, [1], [gpu_decode.CONTEXT - 1])
        with torch.inference_mode(), trying(table):
            replay()
        timed[name] = gpu_decode.Replay(cache.step, replay)
    us = medians_us(timed, 25)
    return us, tables[min(us, key=us.__getitem__)]


def products(
    spec: Any, shape: tuple[int, int], rows_of_x: tuple[int, ...], few: bool, skip: set[str]
) -> Iterator[dict[str, Any]]:
    """The best configuration for every number of rows, beside cuBLAS fp16."""
    import torch

    from gpu_sweep import dense_calls
    from kbit_kernels.triton.configs import Config, entry_keys
    from kbit_kernels.triton.device import fused_linear
    from kbit_kernels.triton.measure import Timed, copies, medians_us, random_weight

    n, k = shape
    first = random_weight(spec, shape)
    weights = [first, *(random_weight(spec, shape) for _ in range(copies(first.nbytes) - 1))]
    for rows in rows_of_x:
        if entry_keys(spec, rows, n, k)[0] in skip:
            continue
        x = torch.randn((rows, k), dtype=torch.float16, device="cuda")
        configs = {str(config): config for config in candidates(spec, rows, shape, few)}

        def timed(config: Config, x: torch.Tensor = x) -> Timed:
            return Timed([partial(fused_linear, x, weight, config) for weight in weights])

        # of two that differ in their overlap the second one only if the first is among the best
        cuts = {replace(config, overlap=False): i for i, config in configs.items()}
        us = medians_us({i: timed(configs[i]) for i in cuts.values()}, 3)
        good = {replace(configs[i], overlap=False) for i in sorted(us, key=us.__getitem__)[:3]}
        best = {i: timed(c) for i, c in configs.items() if replace(c, overlap=False) in good}
        us = medians_us({**best, "cublas": Timed(dense_calls(n, k, x))}, 9)
        cublas = us.pop("cublas")
        name = min(us, key=us.__getitem__)
        yield {
            "spec": str(spec),
            "shape": [n, k],
            "rows": rows,
            "us": us[name],
            "cublas_us": cublas,
            "nbytes": first.nbytes,
            "config": configs[name],
        }


def main() -> None:
    """Search, save after every type and width."""
    import torch

    from kbit_kernels import QuantSpec
    from kbit_kernels.triton.configs import as_entry, entry_keys, gpu_class, tuned_path, write
    from kbit_kernels.triton.measure import copy_bandwidth_gb_s

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of x, %(default)s")
    parser.add_argument("--bits", type=int, nargs="+", default=WIDTHS, help="widths, %(default)s")
    parser.add_argument("--no-steps", action="store_true", help="no decode steps")
    parser.add_argument("--types", nargs="+", default=TYPES, help="data types, %(default)s")
    options = parser.parse_args()
    rows_of_x, types = tuple(options.rows), options.types
    specs = [QuantSpec(name, bits) for name in types for bits in options.bits]
    started = time.monotonic()
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [(spec, part, rows_of_x) for spec in specs for part in (0, 1)]
        enough = list(pool.map(compile_all, *zip(*parts, strict=True)))
    print(f"compiled, {time.monotonic() - started:.0f} s", flush=True)
    gpu, _ = gpu_class(torch.device("cuda", torch.cuda.current_device()))
    path = RESULTS / f"gpu-tune-{gpu}.json"
    before = json.loads(path.read_text()) if path.exists() else {"steps": [], "products": []}

    def anew(row: dict[str, Any]) -> bool:
        return row.get("rows", 1) in rows_of_x and QuantSpec.parse(row["spec"]) in specs

    steps = 1 in rows_of_x and "int" in types and not options.no_steps
    result: dict[str, Any] = {
        "command": "python benchmarks/gpu_tune.py " + " ".join(sys.argv[1:]),
        "environment": environment(),
        "gpu": torch.cuda.get_device_name(),
        "copy_gb_s": copy_bandwidth_gb_s(),
        "steps": [row for row in before["steps"] if not (steps and anew(row))],
        "products": [row for row in before["products"] if not anew(row)],
    }
    for spec, *few in zip(specs, enough[::2], enough[1::2], strict=True):
        entries: dict[str, dict[str, Any]] = {}
        if steps and spec.dtype == "int":
            us, table = decode_steps(spec, all(few))
            gc.collect()
            torch.cuda.empty_cache()
            best = min(us.values())
            result["steps"].append({"spec": str(spec), "us": us, "tokens_per_s": 1e6 / best})
            for shape, config in table.items():
                source = f"decode step, {best:.0f} us"
                entries[entry_keys(spec, 1, *shape)[0]] = as_entry(config, source)
        in_a_step = set(entries)
        for shape in SHAPES:
            for row in products(spec, shape, rows_of_x, all(few), in_a_step):
                config = row.pop("config")
                key = entry_keys(spec, row["rows"], *shape)[0]
                entries[key] = as_entry(config, f"chain, {row['us']:.1f} us")
                result["products"].append({**row, "choice": str(config)})
            torch.cuda.empty_cache()
        write(tuned_path(), gpu, entries)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(result, indent=1) + "\n")
        aside.replace(path)
        print(f"{spec}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
