"""Search of configurations on the card at hand; `kbit tune` calls it, nothing else does."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median_low

import torch

from kbit_kernels.spec import QuantSpec
from kbit_kernels.triton.configs import (
    COLUMNS,
    GEMM_CLASSES,
    LINEAR_ROWS,
    MAX_WARPS,
    ROW_BUCKETS,
    Config,
    as_entry,
    bucket,
    entry_key,
    fits,
    gpu_class,
    heuristic,
    tuned_path,
    write,
)
from kbit_kernels.triton.device import DeviceTensor, fused_linear
from kbit_kernels.triton.measure import Timed, copies, cross_over_rows, medians_us, random_weight

Shape = tuple[int, int]
# (warps, stages) of gemm_kernel by the rows of x that a program holds
GEMMS = {
    16: ((4, 4), (8, 4)),
    32: ((4, 3), (8, 3), (8, 4), (16, 3)),
    64: ((4, 2), (8, 2), (8, 3), (8, 4), (16, 3)),
    128: ((4, 2), (8, 2)),
}
SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Found:
    """The best configuration of one entry and what the rule's would have taken."""

    key: str
    config: Config
    us: float
    rule_us: float


def candidates(rows: int, n: int, k: int, gpu: str, sms: int) -> list[Config]:
    """What is worth measuring: the rule's choice first, then its neighbours."""
    rule = heuristic(rows, n, k, gpu, sms)
    tiles = -(-k // COLUMNS)
    found = [rule]
    for bands in (1, 2) if rule.rows_x <= 16 else (1,) if rule.rows_x <= LINEAR_ROWS else ():
        for warps_n in (1, 2):
            for warps_k in (1, 2, 4, 8):
                if warps_n * warps_k > MAX_WARPS or warps_k > tiles:
                    continue
                for split in SPLITS:
                    programs = -(-n // (16 * bands * warps_n)) * split
                    warps = programs * warps_n * warps_k
                    # fewer than 4 warps a multiprocessor can't load at full speed
                    if warps_k * split <= tiles and 4 * sms <= warps <= 96 * sms:
                        plain = Config(rule.rows_x, bands, warps_n, warps_k, split)
                        found += [plain, replace(plain, overlap=True)]
    if gpu in GEMM_CLASSES:
        found += gemm_candidates(rows, n, k, sms)
    return list(dict.fromkeys(found))


def gemm_candidates(rows: int, n: int, k: int, sms: int) -> list[Config]:
    """Of gemm_kernel."""
    found = []
    for rows_x in (64, 128) if bucket(rows) == 128 else (bucket(rows),):
        for warps, stages in GEMMS.get(rows_x, ()):
            for split in SPLITS:
                programs = -(-n // (16 * warps)) * -(-rows // rows_x) * split
                if split <= -(-k // COLUMNS) and (split == 1 or programs <= 4 * sms):
                    plain = Config(rows_x, 1, warps, 1, split, stages=stages)
                    both = [plain, replace(plain, arranged=True)] if rows > LINEAR_ROWS else [plain]
                    found += [replace(config, overlap=o) for config in both for o in (False, True)]
    return found


def tune(
    specs: Iterable[QuantSpec],
    shapes: Iterable[Shape],
    rows: Iterable[int] = ROW_BUCKETS,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Iterator[Found]:
    """Measure every candidate for each spec, shape and bucket of rows; yield the best of each.

    Every result is saved to `configs.tuned_path()` before the next search starts, so that an
    interrupted run keeps what it found.
    """
    gpu, sms = gpu_class(torch.device("cuda", torch.cuda.current_device()))
    jobs = [(s, shape, bucket(m)) for s in specs for shape in shapes for m in rows]
    for done, (spec, (n, k), m) in enumerate(jobs):
        key = entry_key(spec, m, n, k)
        progress(done, len(jobs), f"{spec} {n}x{k}, {m} rows")
        first = random_weight(spec, (n, k))
        weights = [first]
        weights += [random_weight(spec, (n, k)) for _ in range(copies(first.nbytes) - 1)]
        x = torch.randn((m, k), dtype=torch.float16, device="cuda")
        configs = candidates(m, n, k, gpu, sms)
        configs = [config for config in configs if fits(config, spec)]

        def timed(
            config: Config, x: torch.Tensor = x, weights: list[DeviceTensor] = weights
        ) -> Timed:
            return Timed([partial(fused_linear, x, weight, config) for weight in weights])

        quick = {config: medians_us({"": timed(config)}, rounds=3)[""] for config in configs}
        finalists = {str(c): c for c in (configs[0], *sorted(quick, key=quick.__getitem__)[:3])}
        times = medians_us({name: timed(c) for name, c in finalists.items()})
        best = min(times, key=times.__getitem__)
        found = Found(key, finalists[best], times[best], times[str(configs[0])])
        write(tuned_path(), gpu, {key: as_entry(found.config, f"tuned, {found.us:.1f} us")})
        yield found
    progress(len(jobs), len(jobs), "done")


def tune_cross_over(specs: Iterable[QuantSpec], shapes: Iterable[Shape]) -> int:
    """Measure from how many rows of x on dequantizing and cuBLAS is faster, save the median over
    specs and shapes, and return it."""
    gpu, _ = gpu_class(torch.device("cuda", torch.cuda.current_device()))
    found = [cross_over_rows(spec, shape) for spec in specs for shape in shapes]
    rows = median_low(found)
    write(tuned_path(), gpu, {}, cross_over_rows=rows)
    return rows
