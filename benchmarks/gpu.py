"""kbit on one GPU, unattended, in less than 8 minutes: right first, then fast.

    python benchmarks/gpu.py [--quick] [--model MODEL] [--dry-run]

1. Correctness gate: every width and data type against the reference, both half precisions, every
   bucket of rows. Nothing is timed if it fails.
2. Copy bandwidth and cuBLAS fp16 of this card.
3. k = 2..8 x {int, uint, nf, fp} x M = 1..128 x five shapes: microseconds, x cuBLAS in the same
   rounds, percent of copy bandwidth.
4. Peers whose wheels are installed (bitsandbytes, gemlite, torch's tinygemm, humming), same rounds.
5. Decoding on Llama-3-8B shapes with random weights at every k, batch 1 and 8, as a CUDA graph,
   attention by kbit's kernel and by torch's; and with --model the tokens per second of
   `kbit.load(MODEL, device="cuda")`.
6. From how many rows of x on dequantizing and cuBLAS is faster.

Every section is written to results/gpu-<class>.json as it ends, and the run goes on to the next one
if one fails; two plots at the end. Kernels are compiled by several processes before timing starts.
--dry-run goes through all of it without a GPU, on tiny shapes under Triton's interpreter, and
writes to a temporary directory: it shows that the run will end, and no speed.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_peers import PEERS, WIDTH_PEERS, Peer
from record import RESULTS, environment

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
DTYPES = ("int", "uint", "nf", "fp")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SHAPES = ((8192, 8192), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
# x cuBLAS at 8192 x 8192, M = 1, of the best published kernels (peers.md)
TO_BEAT = {8: 1.60, 7: 1.68, 6: 1.86, 5: 1.96, 4: 2.24, 3: 2.26, 2: 2.58}
LIMIT_S = 8 * 60.0
PEER_LIMIT_S = 40.0  # some tune themselves for longer than all of kbit's measurements take


@dataclass(frozen=True)
class Scale:
    """How large everything is: the real run, or a dry one on a CPU."""

    device: str = "cuda"
    shapes: tuple[tuple[int, int], ...] = SHAPES
    rows: tuple[int, ...] = ROWS
    widths: tuple[int, ...] = WIDTHS
    gate_shape: tuple[int, int] = (1040, 4096)
    copy_bytes: int = 1 << 30
    rounds: int = 9


DRY = Scale("cpu", ((48, 512),), (1, 16), (4,), (24, 512), 1 << 20, 1)


def gate(specs: list[str], scale: Scale) -> list[str]:
    """Run in its own process: every spec against the reference; returns what is wrong.

    Compiling for the gate also fills Triton's cache for the timings.
    """
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    import numpy as np
    import torch

    from kbit_kernels import QuantSpec, quantize, reference
    from kbit_kernels.triton import dequantize, fused_linear, prepare
    from kbit_kernels.triton.configs import SHIPPED_SHAPES, gpu_class, heuristic, most_rows

    gpu, sms = gpu_class(torch.device(scale.device))
    N, K = scale.gate_shape
    wrong = []
    rng = np.random.default_rng(0)
    for text in specs:
        spec = QuantSpec.parse(text)
        tensor = quantize(rng.standard_normal((N, K)).astype(np.float32) * 0.02, spec)
        weights = reference.dequantize(tensor)
        for dtype in (torch.float16, torch.bfloat16):
            weight = prepare(tensor, scale.device, dtype)
            # half a unit of the result, plus half a unit of each table entry and fp32 sums
            rounding = 2.0**-11 if dtype == torch.float16 else 2.0**-8
            if dtype == torch.bfloat16 and scale.device == "cpu":
                rounding = 2.0**-7  # the interpreter cuts off
            restored = dequantize(
                weight, torch.full(tensor.shape, float("nan"), device=scale.device, dtype=dtype)
            )
            error = np.abs(restored.float().cpu().numpy() - weights)
            if not (error <= 2.1 * rounding * np.abs(weights) + 2.0**-24).all():
                wrong.append(f"{text} {dtype} dequantize: {np.nanmax(error):.3g}")
            configs = {
                heuristic(m, n, k, gpu, sms, most_rows(spec))
                for n, k in (SHIPPED_SHAPES if scale.device == "cuda" else scale.shapes)
                for m in scale.rows
            }
            if dtype == torch.bfloat16:  # timed in fp16 only; one configuration a bucket is enough
                configs = {c.rows_x: c for c in configs}.values()
            for config in configs:
                m = config.rows_x - 3
                x = torch.randn((m, K), device=scale.device).to(dtype)
                out = torch.full((m, N), float("nan"), device=scale.device, dtype=dtype)
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


def attention_gate(scale: Scale) -> list[str]:
    """kbit's attention kernel against torch's own in fp32, on ragged lengths."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from gpu_decode import LLAMA_3_8B
    from kbit.engine.cuda_kernels import Attend
    from kbit.models import describe

    attention = describe(LLAMA_3_8B).layers[0].attention
    B, capacity = 5, 600
    H, G, D = attention.heads, attention.kv_heads, attention.head_dim
    q = torch.randn((B, H, D), device=scale.device, dtype=torch.float16)
    keys, values = torch.randn(
        (2, B, G, capacity, D), device=scale.device, dtype=torch.float16
    ).unbind()
    at = torch.tensor([0, 63, 64, 300, capacity - 1], device=scale.device)
    attend = Attend(attention, None)
    attend(q, keys, values, at)
    found = attend(q, keys, values, at).float()
    seen = torch.arange(capacity, device=scale.device) <= at[:, None]
    expected = scaled_dot_product_attention(
        q.float().view(B, G, H // G, D),
        keys.float(),
        values.float(),
        attn_mask=seen[:, None, None],
        scale=attention.scale,
    ).view(B, H, D)
    error = (found - expected).abs().max().item()
    return [] if error < 4e-3 else [f"attention is off by {error:.3g}"]


def run_gate(scale: Scale) -> None:
    """The gate over several processes; raises if anything is wrong."""
    specs = [f"{name}{k}-b64" for k in scale.widths for name in DTYPES]
    specs += ["int4-row", "int3-b32", "uint5-b128", "nf4-b256", "lloyd4-b64", "int4-b64-center"]
    jobs = min(12, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        parts = [pool.submit(gate, specs[i::jobs], scale) for i in range(jobs)]
        parts.append(pool.submit(attention_gate, scale))
        wrong = [w for part in parts for w in part.result()]
    if wrong:
        raise SystemExit("the gate is red, nothing is timed:\n" + "\n".join(wrong))


def baseline(scale: Scale) -> dict[str, Any]:
    """Copy bandwidth; cuBLAS stands beside every row of the sweep."""
    import torch

    from kbit_kernels.triton.measure import copy_bandwidth_gb_s

    on_gpu = scale.device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none: a dry run",
        "copy_gb_s": copy_bandwidth_gb_s(scale.copy_bytes, scale.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def dense_calls(n: int, k: int, x: Any) -> list[Callable[[], Any]]:
    """cuBLAS fp16 on rotating weights."""
    from functools import partial

    import torch

    from kbit_kernels.triton.measure import copies

    weights = [
        torch.randn((n, k), device=x.device, dtype=torch.float16) for _ in range(copies(2 * n * k))
    ]
    return [partial(torch.nn.functional.linear, x, w) for w in weights]


def cross_overs(scale: Scale) -> list[dict[str, Any]]:
    """The most rows for which the fused kernel wins, at some widths."""
    from kbit_kernels import QuantSpec
    from kbit_kernels.triton.measure import cross_over_rows

    return [
        {
            "spec": str(spec := QuantSpec("int", bits)),
            "shape": list(scale.shapes[0]),
            "rows": cross_over_rows(spec, scale.shapes[0], scale.device, scale.rounds),
        }
        for bits in scale.widths
        if bits in (2, 4, 8)
    ]


def sweep(
    scale: Scale, copy_gb_s: float, deadline: float, rows: list[dict[str, Any]], quick: bool
) -> Iterator[None]:
    """All widths, types, rows and shapes into `rows`; what tells most first, so that a deadline
    costs least. Pauses after every product that was timed, for saving."""
    from functools import partial

    import torch

    from kbit_kernels import QuantSpec
    from kbit_kernels.triton import linear
    from kbit_kernels.triton.configs import choose_for, gpu_class
    from kbit_kernels.triton.measure import Timed, copies, medians_us, random_weight

    device = scale.device
    gpu, sms = gpu_class(torch.device(device))
    spent: dict[str, float] = {}
    plan = [(shape, name) for name in DTYPES for shape in scale.shapes]
    for (n, k), name in plan[: 1 if quick else None]:
        weights = {}
        for bits in scale.widths:
            spec = QuantSpec(name, bits)
            first = random_weight(spec, (n, k), device=device)
            count = copies(first.nbytes) if device == "cuda" else 1
            others = (random_weight(spec, (n, k), device=device) for _ in range(count - 1))
            weights[spec] = [first, *others]
        # every row count for int; for the others the ends of the scale
        for m in scale.rows if name == "int" else [m for m in (1, 16, 128) if m in scale.rows]:
            if time.monotonic() > deadline:
                return
            x = torch.randn((m, k), device=device, dtype=torch.float16)
            timed = {"cublas": Timed(dense_calls(n, k, x), device)}
            for spec, held in weights.items():
                timed[str(spec)] = Timed([partial(linear, x, w) for w in held], device)
            failed: dict[str, str] = {}
            peers: dict[str, Peer] = {}
            if name == "int":
                peers = PEERS | (WIDTH_PEERS if (n, k) == scale.shapes[0] and m == 1 else {})
            for peer, make in peers.items():
                if spent.get(peer, 0.0) > PEER_LIMIT_S:
                    failed[peer] = f"left out: setting it up took {spent[peer]:.0f} s already"
                    continue
                started = time.monotonic()
                try:
                    timed[peer] = Timed(make(n, k, x), device)
                except Exception as problem:  # another library's, of any kind
                    failed[peer] = f"{type(problem).__name__}: {problem}"[:300]
                spent[peer] = spent.get(peer, 0.0) + time.monotonic() - started
            us = medians_us(timed, scale.rounds)
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
            for peer in peers:
                row = {"peer": peer, "shape": [n, k], "rows": m}
                if peer in failed:
                    row["failed"] = failed[peer]
                else:
                    row |= {"us": us[peer], "cublas_us": us["cublas"]}
                    row["x_cublas"] = us["cublas"] / us[peer]
                rows.append(row)
            del timed
            yield
        del weights
        if device == "cuda":
            torch.cuda.empty_cache()


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


def plots(rows: list[dict[str, Any]], stem: Path, shape: tuple[int, int]) -> None:
    """Percent of bandwidth over k; x cuBLAS over M with the peers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n, k = shape
    figure, axes = plt.subplots(figsize=(6, 4))
    for name in DTYPES:
        at = {
            int(r["spec"][len(name)]): r["percent_of_copy"]
            for r in rows
            if r.get("spec", "").startswith(f"{name}")
            and r["spec"][len(name)].isdigit()
            and r["shape"] == [n, k]
            and r["rows"] == 1
        }
        axes.plot(sorted(at), [at[bits] for bits in sorted(at)], marker="o", label=name)
    axes.axhline(75, color="grey", linestyle=":")
    axes.set(
        xlabel="bits", ylabel="percent of copy bandwidth", title=f"{n} x {k}, M = 1", ylim=(0, 105)
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
            if name in (r.get("spec"), r.get("peer")) and r["shape"] == [n, k] and "us" in r
        }
        if at:
            style = "-" if name.startswith("int") else "--"
            axes.plot(sorted(at), [at[m] for m in sorted(at)], style, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.axhline(1, color="grey", linestyle=":")
    axes.set(xlabel="rows of x", ylabel="x cuBLAS fp16", title=f"{n} x {k}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(f"{stem}-rows.png", dpi=150)


def main() -> None:
    """Run the sections, save after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, integers only")
    parser.add_argument("--model", help="a real model to generate with at the end")
    parser.add_argument("--dry-run", action="store_true", help="tiny, without a GPU; no speed")
    options = parser.parse_args()
    started = time.monotonic()
    scale, directory = Scale(), RESULTS
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # the gate's processes inherit it
        scale, directory = DRY, Path(tempfile.mkdtemp(prefix="kbit-dry-run-"))
    else:
        from kbit_kernels.triton import available

        usable, reason = available()
        if not usable:
            raise SystemExit(f"no GPU to measure: {reason}")
    import torch

    from kbit_kernels.triton.configs import gpu_class

    stem = directory / f"gpu-{gpu_class(torch.device(scale.device))[0]}"
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"environment": environment(), "sweep": rows}

    def save() -> None:
        aside = stem.with_suffix(".tmp")
        aside.write_text(json.dumps(result, indent=1) + "\n")
        aside.replace(stem.with_suffix(".json"))

    def section(name: str, work: Callable[[], Any]) -> None:
        at = time.monotonic()
        try:
            found = work()
            if found is not None:
                result[name] = found
        except Exception:
            result[f"{name} failed"] = traceback.format_exc()
            print(f"{name} failed:\n{traceback.format_exc()}")
        print(f"{name}: {time.monotonic() - at:.0f} s", flush=True)
        save()

    run_gate(scale)
    result["gate"] = f"green after {time.monotonic() - started:.0f} s"
    print(result["gate"], flush=True)
    result["baseline"] = baseline(scale)
    save()
    copy_gb_s = result["baseline"]["copy_gb_s"]
    from gpu_decode import LLAMA_3_8B, TINY, decode_speed, model_speed  # needs kernels: after it

    def measure_sweep() -> None:
        for _ in sweep(scale, copy_gb_s, started + LIMIT_S - 40, rows, options.quick):
            save()

    # decoding first: it is short, and its numbers are the ones people ask for
    widths = (4,) if options.quick else scale.widths
    config = TINY if options.dry_run else LLAMA_3_8B
    until = started + 0.55 * LIMIT_S
    section("decode", lambda: decode_speed(widths, copy_gb_s, until, config, scale.device))
    if options.model:
        section("model", lambda: model_speed(options.model, scale.device))
    section("sweep", measure_sweep)
    print("\n".join(goals(rows)))
    section("cross-over", lambda: cross_overs(scale))
    section("plots", lambda: plots(rows, stem, scale.shapes[0]))
    result["wall_s"] = time.monotonic() - started
    save()
    print(f"{result['wall_s']:.0f} s, {stem.with_suffix('.json')}")
    failed = [name for name in result if name.endswith(" failed")]
    if failed:
        raise SystemExit(", ".join(failed))


if __name__ == "__main__":
    main()
