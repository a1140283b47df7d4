"""Search of configurations on the card at hand; `kbit tune` calls it, nothing else does."""

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
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
    entry_keys,
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
    32: ((8, 3), (8, 4), (16, 3)),
    64: ((4, 2), (8, 3), (8, 4), (16, 3)),
    128: ((8, 2),),
}
# ... where the next tile of weights waits in registers
GEMMS_AHEAD = {
    16: ((4, 6), (8, 6), (16, 6)),
    32: ((8, 4), (16, 4)),
    64: ((4, 3), (8, 3)),
}
SPLITS = (1, 2, 4, 8)
FEW_REGISTERS = 64  # of a lane: four programs of eight warps fit a multiprocessor
COMPILERS = 8  # processes at most; each takes some 500 MB of the card
COMPILING = 0.8  # of the time of an entry, for the bar
Compile = Callable[[QuantSpec, int, Sequence[Config]], Iterator[int]]


@dataclass(frozen=True)
class Found:
    """The best configuration of one entry and what the rule's would have taken."""

    key: str
    config: Config
    us: float
    rule_us: float


def candidates(spec: QuantSpec, rows: int, n: int, k: int, gpu: str, sms: int) -> list[Config]:
    """What is worth measuring: the rule's choice first, then its neighbours without overlap."""
    rule = heuristic(spec, rows, n, k, gpu, sms)
    tiles = -(-k // COLUMNS)
    found = [rule]
    limits = (0, FEW_REGISTERS) if rule.rows_x == 8 else (0,)
    for warps_n in (1, 2) if rule.rows_x <= LINEAR_ROWS else ():
        for warps_k in (1, 2, 4, 8):
            for split in SPLITS:
                warps = -(-n // (16 * warps_n)) * split * warps_n * warps_k
                # fewer than 4 warps a multiprocessor can't load at full speed
                busy = 4 * sms <= warps <= 96 * sms
                if warps_n * warps_k <= MAX_WARPS and warps_k * split <= tiles and busy:
                    plain = Config(rule.rows_x, 1, warps_n, warps_k, split)
                    few = limits if warps_n * warps_k == MAX_WARPS else (0,)
                    found += [replace(plain, registers=limit) for limit in few]
    if gpu in GEMM_CLASSES:
        found += gemm_candidates(rows, n, k, sms)
    return list(dict.fromkeys(found))


def gemm_candidates(rows: int, n: int, k: int, sms: int) -> list[Config]:
    """Of gemm_kernel, without overlap."""
    found = []
    for rows_x in (64, 128) if bucket(rows) == 128 else (bucket(rows),):
        for ahead, gemms in ((False, GEMMS), (True, GEMMS_AHEAD)):
            for (warps, stages), split in itertools.product(gemms.get(rows_x, ()), SPLITS):
                programs = -(-n // (16 * warps)) * -(-rows // rows_x) * split
                if split <= -(-k // COLUMNS) and (split == 1 or programs <= 4 * sms):
                    plain = Config(rows_x, 1, warps, 1, split, stages=stages, ahead=ahead)
                    found.append(plain)
                    if rows > LINEAR_ROWS:
                        found.append(replace(plain, arranged=True))
    return found


def _compile(spec: QuantSpec, k: int, config: Config) -> None:
    """In a process of its own: leaves the kernel in Triton's cache. What can't be compiled says so
    where it is timed."""
    try:
        x = torch.zeros((1, k), dtype=torch.float16, device="cuda")
        fused_linear(x, random_weight(spec, (16, k)), config)
    except Exception:
        return


def _leave_interrupts() -> None:
    """To the process that waits for this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def compilers(device: str) -> Iterator[Compile]:
    """Something that compiles configurations of a spec for K columns side by side, and yields how
    many are done after each. Where kernels are interpreted there is nothing to compile."""
    if device == "cpu":
        yield lambda spec, k, configs: iter(())
        return
    workers = min(COMPILERS, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_leave_interrupts
    )

    def compile_all(spec: QuantSpec, k: int, configs: Sequence[Config]) -> Iterator[int]:
        waiting = [pool.submit(_compile, spec, k, config) for config in configs]
        for done, _ in enumerate(as_completed(waiting)):
            yield done + 1

    try:
        yield compile_all
    finally:
        pool.shutdown(cancel_futures=True)


def tune(
    specs: Sequence[QuantSpec],
    shapes: Sequence[Shape],
    rows: Iterable[int] = ROW_BUCKETS,
    progress: Progress = lambda done, total, text: None,
    device: str = "cuda",
) -> Iterator[Found]:
    """Measure every candidate for each spec, shape and bucket of rows; yield the best of each.

    Every result is saved to `configs.tuned_path()` before the next search starts, so that an
    interrupted run keeps what it found. Most of the time goes into compiling, which several
    processes do; `progress` is told of every candidate, as a fraction of its entry.
    """
    where = torch.device(device)
    gpu, sms = gpu_class(where)
    can_overlap = "launch_pdl" in overlapping(where, early=True)
    buckets = list(dict.fromkeys(map(bucket, rows)))
    jobs = [(spec, shape, m) for spec in specs for shape in shapes for m in buckets]
    with compilers(device) as compile_all:
        for done, (spec, (n, k), m) in enumerate(jobs):
            key = entry_keys(spec, m, n, k)[0]
            text = f"{spec} {n}x{k}, {m} rows"
            configs = [
                config for config in candidates(spec, m, n, k, gpu, sms) if fits(config, spec)
            ]
            rule = configs[0]
            progress(done, len(jobs), text)
            for compiled in compile_all(spec, k, configs):
                progress(done + COMPILING * compiled / len(configs), len(jobs), text)

            first = random_weight(spec, (n, k), device=device)
            count = copies(first.nbytes) if device != "cpu" else 1
            weights = [
                first,
                *(random_weight(spec, (n, k), device=device) for _ in range(count - 1)),
            ]
            x = torch.randn((m, k), dtype=torch.float16, device=device)

            def timed(
                config: Config, x: torch.Tensor = x, weights: list[DeviceTensor] = weights
            ) -> Timed:
                return Timed(
                    [partial(fused_linear, x, weight, config) for weight in weights], device
                )

            quick = {}
            for at, config in enumerate(configs):
                part = COMPILING + (1 - COMPILING) * at / len(configs)
                progress(done + part, len(jobs), text)
                quick[config] = medians_us({"": timed(config)}, rounds=3)[""]
            good = sorted(quick, key=quick.__getitem__)[:3]
            # the same machine code, launched earlier
            early = [replace(config, overlap=True) for config in good if can_overlap]
            for _ in compile_all(spec, k, early):
                pass
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
