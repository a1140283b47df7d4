"""Search of configurations on the card at hand; `kbit tune` calls it, nothing else does."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from kbit_kernels.triton.device import DeviceTensor, fused_linear, overlapping
from kbit_kernels.triton.measure import Timed, copies, cross_over_rows, medians_us, random_weight

Shape = tuple[int, int]
Progress = Callable[[float, int, str], None]  # done, of how many, and what now
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
    """What is worth measuring: the rule's choice first, then its neighbours without overlap."""
    rule = heuristic(rows, n, k, gpu, sms)
    tiles = -(-k // COLUMNS)
    found = [rule]
    for warps_n in (1, 2) if rule.rows_x <= LINEAR_ROWS else ():
        for warps_k in (1, 2, 4, 8):
            for split in SPLITS:
                warps = -(-n // (16 * warps_n)) * split * warps_n * warps_k
                # fewer than 4 warps a multiprocessor can't load at full speed
                busy = 4 * sms <= warps <= 96 * sms
                if warps_n * warps_k <= MAX_WARPS and warps_k * split <= tiles and busy:
                    found.append(Config(rule.rows_x, 1, warps_n, warps_k, split))
    if gpu in GEMM_CLASSES:
        found += gemm_candidates(rows, n, k, sms)
    return list(dict.fromkeys(found))


def gemm_candidates(rows: int, n: int, k: int, sms: int) -> list[Config]:
    """Of gemm_kernel, without overlap."""
    found = []
    for rows_x in (64, 128) if bucket(rows) == 128 else (bucket(rows),):
        for warps, stages in GEMMS.get(rows_x, ()):
            for split in SPLITS:
                programs = -(-n // (16 * warps)) * -(-rows // rows_x) * split
                if split <= -(-k // COLUMNS) and (split == 1 or programs <= 4 * sms):
                    plain = Config(rows_x, 1, warps, 1, split, stages=stages)
                    found.append(plain)
                    if rows > LINEAR_ROWS:
                        found.append(replace(plain, arranged=True))
    return found


def tune(
    specs: Sequence[QuantSpec],
    shapes: Sequence[Shape],
    rows: Iterable[int] = ROW_BUCKETS,
    progress: Progress = lambda done, total, text: None,
    device: str = "cuda",
) -> Iterator[Found]:
    """Measure every candidate for each spec, shape and bucket of rows; yield the best of each.

    Every result is saved to `configs.tuned_path()` before the next search starts, so that an
    interrupted run keeps what it found. Most of the time goes into compiling, so `progress` is told
    of every candidate, as a fraction of its entry.
    """
    where = torch.device(device)
    gpu, sms = gpu_class(where)
    can_overlap = "launch_pdl" in overlapping(where, early=True)
    buckets = list(dict.fromkeys(map(bucket, rows)))
    jobs = [(spec, shape, m) for spec in specs for shape in shapes for m in buckets]
    for done, (spec, (n, k), m) in enumerate(jobs):
        key = entry_key(spec, m, n, k)
        first = random_weight(spec, (n, k), device=device)
        count = copies(first.nbytes) if device != "cpu" else 1
        weights = [first, *(random_weight(spec, (n, k), device=device) for _ in range(count - 1))]
        x = torch.randn((m, k), dtype=torch.float16, device=device)

        def timed(
            config: Config, x: torch.Tensor = x, weights: list[DeviceTensor] = weights
        ) -> Timed:
            return Timed([partial(fused_linear, x, weight, config) for weight in weights], device)

        configs = [config for config in candidates(m, n, k, gpu, sms) if fits(config, spec)]
        rule = configs[0]
        quick = {}
        for at, config in enumerate(configs):
            progress(done + at / len(configs), len(jobs), f"{spec} {n}x{k}, {m} rows")
            quick[config] = medians_us({"": timed(config)}, rounds=3)[""]
        good = sorted(quick, key=quick.__getitem__)[:3]
        # the same machine code, launched earlier
        early = [replace(config, overlap=True) for config in good if can_overlap]
        finalists = {str(config): config for config in (rule, *good, *early)}
        times = medians_us({name: timed(config) for name, config in finalists.items()})
        name = min(times, key=times.__getitem__)
        found = Found(key, finalists[name], times[name], times[str(rule)])
        write(tuned_path(), gpu, {key: as_entry(found.config, f"tuned, {found.us:.1f} us")})
        yield found
    progress(len(jobs), len(jobs), "done")


def tune_cross_over(
    specs: Sequence[QuantSpec],
    shapes: Sequence[Shape],
    progress: Progress = lambda done, total, text: None,
    device: str = "cuda",
) -> int:
    """Measure from how many rows of x on dequantizing and cuBLAS is faster, save the median over
    specs and shapes, and return it."""
    gpu, _ = gpu_class(torch.device(device))
    jobs = [(spec, shape) for spec in specs for shape in shapes]
    found = []
    for done, (spec, shape) in enumerate(jobs):
        progress(done, len(jobs), f"{spec} {shape[0]}x{shape[1]} beside cuBLAS")
        found.append(cross_over_rows(spec, shape, device))
    rows = median_low(found)
    write(tuned_path(), gpu, {}, cross_over_rows=rows)
    progress(len(jobs), len(jobs), "done")
    return rows
