"""kbit on one GPU, unattended, in less than 8 minutes: right first, then fast.

    python benchmarks/gpu.py [--quick] [--model MODEL]

1. Correctness gate: every width and data type against the reference, both half precisions, every
   bucket of rows. Nothing is timed if it fails.
2. Copy bandwidth and cuBLAS fp16 of this card.
3. k = 2..8 x {int, uint, nf, fp} x M = 1..128 x five shapes: microseconds, x cuBLAS in the same
   rounds, percent of copy bandwidth.
4. Peers whose wheels are installed (bitsandbytes, gemlite, torch's tinygemm, humming), same rounds.
5. Decoding on Llama-3-8B shapes with random weights at every k, batch 1 and 8, as a CUDA graph;
   and with --model the tokens per second of `kbit.load(MODEL, device="cuda")`.

Every section is written to results/gpu-<class>.json as it ends, and the run goes on to the next one
if one fails; two plots at the end. Kernels are compiled by several processes before timing starts.
"""

import argparse
import json
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from gpu_peers import PEERS
from record import RESULTS, environment

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
DTYPES = ("int", "uint", "nf", "fp")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SHAPES = ((8192, 8192), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
# x cuBLAS at 8192 x 8192, M = 1, of the best published kernels (peers.md)
TO_BEAT = {8: 1.60, 7: 1.68, 6: 1.86, 5: 1.96, 4: 2.24, 3: 2.26, 2: 2.58}
LIMIT_S = 8 * 60.0


def gate(specs: list[str]) -> list[str]:
    """Run in its own process: every spec against the reference; returns what is wrong.

    Compiling for the gate also fills Triton's cache for the timings.
    """
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    import numpy as np
    import torch

    from kbit_kernels import QuantSpec, quantize, reference
    from kbit_kernels.triton import dequantize, fused_linear, prepare
    from kbit_kernels.triton.configs import SHIPPED_SHAPES, gpu_class, heuristic, most_rows

    gpu, sms = gpu_class(torch.device("cuda", 0))
    wrong = []
    rng = np.random.default_rng(0)
    for text in specs:
        spec = QuantSpec.parse(text)
        tensor = quantize(rng.standard_normal((1040, 4096)).astype(np.float32) * 0.02, spec)
        weights = reference.dequantize(tensor)
        for dtype in (torch.float16, torch.bfloat16):
            weight = prepare(tensor, "cuda", dtype)
            # half a unit of the result, plus half a unit of each table entry and fp32 sums
            rounding = 2.0**-11 if dtype == torch.float16 else 2.0**-8
            restored = dequantize(
                weight, torch.full(tensor.shape, float("nan"), device="cuda", dtype=dtype)
            )
            error = np.abs(restored.float().cpu().numpy() - weights)
            if not (error <= 2.1 * rounding * np.abs(weights) + 2.0**-24).all():
                wrong.append(f"{text} {dtype} dequantize: {np.nanmax(error):.3g}")
            configs = {
                heuristic(m, n, k, gpu, sms, most_rows(spec))
                for n, k in SHIPPED_SHAPES
                for m in ROWS
            }
            if dtype == torch.bfloat16:  # timed in fp16 only; one configuration a bucket is enough
                configs = {c.rows_x: c for c in configs}.values()
            for config in configs:
                m = config.rows_x - 3
                x = torch.randn((m, 4096), device="cuda").to(dtype)
                out = torch.full((m, 1040), float("nan"), device="cuda", dtype=dtype)
                for _ in range(2):
                    first = out.clone()
                    fused_linear(x, weight, config, out=out)
                x_f32 = x.float().cpu().numpy()
                expected = reference.linear(x_f32, tensor)
                terms = np.abs(x_f32) @ np.abs(weights).T
                bound = 1.1 * rounding * np.abs(expected) + (rounding + 2.0**-18) * terms / 8
                bound += rounding * np.sqrt((x_f32**2) @ (weights**2).T) * 4 + 2.0**-24
                error = np.abs(out.float().cpu().numpy() - expected)
                if not (error <= bound).all():
                    wrong.append(f"{text} {dtype} {config}: {np.nanmax(error / bound):.3g} x bound")
                if not torch.equal(first, out):
                    wrong.append(f"{text} {dtype} {config}: two calls differ")
    return wrong


def run_gate() -> None:
    """The gate over several processes; raises if anything is wrong."""
    specs = [f"{name}{k}-b64" for k in WIDTHS for name in DTYPES]
    specs += ["int4-row", "int3-b32", "uint5-b128", "nf4-b256", "lloyd4-b64", "int4-b64-center"]
    jobs = min(12, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        wrong = [w for part in pool.map(gate, [specs[i::jobs] for i in range(jobs)]) for w in part]
    if wrong:
        raise SystemExit("the gate is red, nothing is timed:\n" + "\n".join(wrong))


def baseline() -> dict[str, Any]:
    """Copy bandwidth and cuBLAS."""
    import torch

    from kbit_kernels.triton.measure import copy_bandwidth_gb_s

    return {
        "gpu": torch.cuda.get_device_name(),
        "copy_gb_s": copy_bandwidth_gb_s(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def dense_calls(n: int, k: int, x: Any) -> list[Callable[[], Any]]:
    """cuBLAS fp16 on rotating weights."""
    from functools import partial

    import torch

    from kbit_kernels.triton.measure import copies

    weights = [
        torch.randn((n, k), device="cuda", dtype=torch.float16) for _ in range(copies(2 * n * k))
    ]
    return [partial(torch.nn.functional.linear, x, w) for w in weights]


def sweep(
    copy_gb_s: float, deadline: float, save: Callable[[list[Any]], None], quick: bool
) -> list[dict[str, Any]]:
    """All widths, types, rows and shapes; what tells most first, so that a deadline costs least."""
    from functools import partial

    import torch

    from kbit_kernels import QuantSpec
    from kbit_kernels.triton import linear
    from kbit_kernels.triton.configs import choose_for, gpu_class
    from kbit_kernels.triton.measure import Timed, copies, medians_us, random_weight

    gpu, sms = gpu_class(torch.device("cuda", 0))
    rows: list[dict[str, Any]] = []
    plan = [(shape, name) for name in DTYPES for shape in SHAPES]
    for (n, k), name in plan[: 1 if quick else None]:
        weights = {}
        for bits in WIDTHS:
            spec = QuantSpec(name, bits)
            first = random_weight(spec, (n, k))
            count = copies(first.nbytes)
            weights[spec] = [first, *(random_weight(spec, (n, k)) for _ in range(count - 1))]
        # every row count for int; for the others the ends of the scale
        for m in ROWS if name == "int" else (1, 16, 128):
            if time.monotonic() > deadline:
                return rows
            x = torch.randn((m, k), device="cuda", dtype=torch.float16)
            timed = {"cublas": Timed(dense_calls(n, k, x))}
            for spec, held in weights.items():
                timed[str(spec)] = Timed([partial(linear, x, w) for w in held])
            peers, kept = {}, []
            if name == "int":
                for peer, make in PEERS.items():
                    try:
                        calls = make(n, k, x)
                        timed[peer] = Timed(calls)
                        peers[peer] = True
                        kept.append(calls)
                    except Exception as problem:
                        peers[peer] = str(problem).splitlines()[:1]
            us = medians_us(timed, rounds=9)
            for spec, held in weights.items():
                nbytes = held[0].nbytes + 2 * m * (n + k)
                rows.append(
                    {
                        "spec": str(spec),
                        "shape": [n, k],
                        "rows": m,
                        "us": us[str(spec)],
                        "cublas_us": us["cublas"],
                        "x_cublas": us["cublas"] / us[str(spec)],
                        "percent_of_copy": 100 * nbytes / us[str(spec)] / 1e3 / copy_gb_s,
                        "choice": str(choose_for(spec, m, n, k, gpu, sms)),
                    }
                )
            rows += [
                {"peer": peer, "shape": [n, k], "rows": m}
                | (
                    {"us": us[peer], "cublas_us": us["cublas"], "x_cublas": us["cublas"] / us[peer]}
                    if worked is True
                    else {"failed": worked}
                )
                for peer, worked in peers.items()
            ]
            save(rows)
        del weights
        torch.cuda.empty_cache()
    return rows


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """The goals at 8192 x 8192 beside what was measured."""
    lines = []
    for row in rows:
        if (
            row.get("spec", "").startswith("int")
            and row["shape"] == [8192, 8192]
            and row["rows"] == 1
        ):
            bits = int(row["spec"][3])
            lines.append(
                f"k={bits}: {row['x_cublas']:.2f} x cuBLAS (to beat {TO_BEAT[bits]:.2f}), "
                f"{row['percent_of_copy']:.0f}% of copy bandwidth (goal 75)"
            )
    return lines


def plots(rows: list[dict[str, Any]], stem: Path) -> None:
    """Percent of bandwidth over k; x cuBLAS over M with the peers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in DTYPES:
        at = {
            int(r["spec"][len(name)]): r["percent_of_copy"]
            for r in rows
            if r.get("spec", "").startswith(f"{name}")
            and r["spec"][len(name)].isdigit()
            and r["shape"] == [8192, 8192]
            and r["rows"] == 1
        }
        axes.plot(sorted(at), [at[k] for k in sorted(at)], marker="o", label=name)
    axes.axhline(75, color="grey", linestyle=":")
    axes.set(
        xlabel="bits", ylabel="percent of copy bandwidth", title="8192 x 8192, M = 1", ylim=(0, 105)
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(f"{stem}-bandwidth.png", dpi=150)

    figure, axes = plt.subplots(figsize=(6, 4))
    lines = [*(f"int{k}-b64" for k in (2, 4, 8)), *PEERS]
    for name in lines:
        at = {
            r["rows"]: r["x_cublas"]
            for r in rows
            if name in (r.get("spec"), r.get("peer")) and r["shape"] == [8192, 8192] and "us" in r
        }
        if at:
            style = "-" if name.startswith("int") else "--"
            axes.plot(sorted(at), [at[m] for m in sorted(at)], style, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.axhline(1, color="grey", linestyle=":")
    axes.set(xlabel="rows of x", ylabel="x cuBLAS fp16", title="8192 x 8192")
    axes.legend()
    figure.tight_layout()
    figure.savefig(f"{stem}-rows.png", dpi=150)


def main() -> None:
    """Run the sections, save after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, integers only")
    parser.add_argument("--model", help="a real model to generate with at the end")
    options = parser.parse_args()
    started = time.monotonic()
    from kbit_kernels.triton import available

    usable, reason = available()
    if not usable:
        raise SystemExit(f"no GPU to measure: {reason}")
    import torch

    from kbit_kernels.triton.configs import gpu_class

    stem = RESULTS / f"gpu-{gpu_class(torch.device('cuda', 0))[0]}"
    result: dict[str, Any] = {"environment": environment()}

    def save() -> None:
        aside = stem.with_suffix(".tmp")
        aside.write_text(json.dumps(result, indent=1) + "\n")
        aside.replace(stem.with_suffix(".json"))

    def section(name: str, work: Callable[[], Any]) -> None:
        at = time.monotonic()
        try:
            result[name] = work()
        except Exception:
            result[name] = {"failed": traceback.format_exc()}
            print(f"{name} failed:\n{traceback.format_exc()}")
        print(f"{name}: {time.monotonic() - at:.0f} s")
        save()

    run_gate()
    result["gate"] = f"green after {time.monotonic() - started:.0f} s"
    print(result["gate"])
    section("baseline", baseline)

    def keep(rows: list[Any]) -> None:
        result["sweep"] = rows
        save()

    copy_gb_s = result["baseline"]["copy_gb_s"]
    from gpu_decode import decode_speed, model_speed  # after the check: it needs kernels

    # decoding first: it is short, and its numbers are the ones people ask for
    widths = (4,) if options.quick else WIDTHS
    section("decode", lambda: decode_speed(widths, copy_gb_s, started + 0.55 * LIMIT_S))
    if options.model:
        section("model", lambda: model_speed(options.model))
    section("sweep", lambda: sweep(copy_gb_s, started + LIMIT_S - 25, keep, options.quick))
    if isinstance(result["sweep"], list):
        print("\n".join(goals(result["sweep"])))
        section("plots", lambda: plots(result["sweep"], stem))
    result["wall_s"] = time.monotonic() - started
    save()
    print(f"{result['wall_s']:.0f} s, {stem.with_suffix('.json')}")


if __name__ == "__main__":
    main()
