"""kbit on one GPU, unattended, in less than 8 minutes: right first, then fast.

    python benchmarks/gpu.py [--quick] [--model MODEL] [--dry-run]

1. Correctness gate: every width and data type against the reference, both half precisions, every
   bucket of rows. What is wrong is listed in the result and not timed.
2. Copy bandwidth and cuBLAS fp16 of this card.
3. k = 2..8 x {int, uint, nf, fp} x M = 1..128 x five shapes: microseconds, x cuBLAS in the same
   rounds, percent of copy bandwidth.
4. Peers whose wheels are installed (bitsandbytes, gemlite, torch's tinygemm, humming), same rounds.
5. Decoding on Llama-3-8B shapes with random weights at every k, batch 1 and 8, as a CUDA graph,
   attention by kbit's kernel and by torch's; and with --model the tokens per second of
   `kbit.load(MODEL, device="cuda")`.
6. From how many rows of x on dequantizing and cuBLAS is faster.

Every section runs in a process of its own and every row is written to results/gpu-<class>.json as
it comes: neither a section that fails, nor a peer that hangs or corrupts the CUDA context, loses
what others measured. The sweep is then taken up again without peers. Two plots at the end. Kernels
are compiled by several processes before timing starts. `python benchmarks/readme.py` puts the
table into README.
--dry-run goes through all of it without a GPU, on tiny shapes under Triton's interpreter, and
writes to a temporary directory: it shows that the run will end, and no speed.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
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
GATE_S = 150.0  # bf16, which is not timed, is checked up to here
SILENCE_S = 120.0  # a section without a row for so long hangs
PEER_ROWS = (1, 16)  # theirs are compiled for every number of rows
# some peers tune themselves for longer than all of kbit's measurements take
PEER_LIMIT_S = 40.0
PEERS_LIMIT_S = 80.0  # all of them
SPAWN = multiprocessing.get_context("spawn")


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


def gate(specs: list[str], scale: Scale, until: float) -> dict[str, list[str]]:
    """Run in its own process: every spec against the reference; returns what is wrong.

    Compiling for the gate also fills Triton's cache for the timings.
    """
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    import torch

    wrong: dict[str, list[str]] = {}
    for dtype in (torch.float16, torch.bfloat16):
        for text in specs:
            if dtype == torch.bfloat16 and time.monotonic() > until:
                print(f"the gate has no time left for {text} in bf16", flush=True)
                continue
            try:
                problems = check(text, dtype, scale)
            except Exception as problem:  # does not compile, does not launch
                problems = [f"{text} {dtype}: {type(problem).__name__}: {problem}"[:500]]
            if problems:
                wrong.setdefault(text, []).extend(problems)
    return wrong


def check(text: str, dtype: Any, scale: Scale) -> list[str]:
    """What is wrong with one spec in one half precision."""
    import numpy as np
    import torch

    from kbit_kernels import QuantSpec, quantize, reference
    from kbit_kernels.triton import dequantize, fused_linear, prepare
    from kbit_kernels.triton.configs import SHIPPED_SHAPES, choose_for, gpu_class, heuristic

    gpu, sms = gpu_class(torch.device(scale.device))
    N, K = scale.gate_shape
    wrong = []
    rng = np.random.default_rng(0)
    spec = QuantSpec.parse(text)
    tensor = quantize(rng.standard_normal((N, K)).astype(np.float32) * 0.02, spec)
    weights = reference.dequantize(tensor)
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
    shapes = SHIPPED_SHAPES if scale.device == "cuda" else scale.shapes
    configs = set()
    for (n, k), m in itertools.product(shapes, scale.rows):
        chosen, _ = choose_for(spec, m, n, k, gpu, sms)
        configs |= {heuristic(m, n, k, gpu, sms), *([] if chosen is None else [chosen])}
    if dtype == torch.bfloat16:  # timed in fp16 only; one configuration a bucket is enough
        configs = set({c.rows_x: c for c in configs}.values())
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
    ).reshape(B, H, D)
    error = (found - expected).abs().max().item()
    return [] if error < 4e-3 else [f"attention is off by {error:.3g}"]


def run_gate(scale: Scale, until: float) -> dict[str, list[str]]:
    """The gate over several processes: what is wrong, by spec, "attention" or "process"."""
    specs = [f"{name}{k}-b64" for k in scale.widths for name in DTYPES]
    specs += ["int4-row", "int3-b32", "uint5-b128", "nf4-b256", "lloyd4-b64", "int4-b64-center"]
    for library in ("OMP", "OPENBLAS", "MKL"):  # a thread a process is enough for all cores
        os.environ[f"{library}_NUM_THREADS"] = "1"
    jobs = min(12, os.cpu_count() or 1)
    wrong: dict[str, list[str]] = {}
    with ProcessPoolExecutor(jobs, mp_context=SPAWN) as pool:
        attention = pool.submit(attention_gate, scale)
        parts = [pool.submit(gate, specs[i::jobs], scale, until) for i in range(jobs)]
        try:
            if problems := attention.result():
                wrong["attention"] = problems
        except Exception as problem:
            wrong["attention"] = [f"{type(problem).__name__}: {problem}"[:500]]
        for i, part in enumerate(parts):
            try:
                wrong |= part.result()
            except Exception as problem:  # it died, and whether its specs are right is not known
                for text in specs[i::jobs]:
                    wrong[text] = [f"not checked: {type(problem).__name__}: {problem}"[:500]]
    return wrong


def warm_peers(scale: Scale) -> list[Any]:
    """warm_peer for all of them, each in a process of its own, which may hang."""
    names = PEERS | WIDTH_PEERS if scale.device == "cuda" else ()
    processes = [SPAWN.Process(target=warm_peer, args=(n, scale), daemon=True) for n in names]
    for process in processes:
        process.start()
    return processes


def warm_peer(name: str, scale: Scale) -> None:
    """Let a peer compile and tune what it will be timed with; what fails here fails there too."""
    import torch

    n, k = scale.shapes[0]
    for m in PEER_ROWS if name in PEERS else PEER_ROWS[:1]:
        x = torch.randn((m, k), device=scale.device, dtype=torch.float16)
        (PEERS | WIDTH_PEERS)[name](n, k, x)[0]()
    torch.cuda.synchronize()


def _child(pipe: Any, work: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    try:
        for found in work(*arguments):
            pipe.send(("row", found))
        pipe.send(("end", None))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


def apart(
    work: Callable[..., Iterable[Any]],
    arguments: tuple[Any, ...],
    until: float,
    keep: Callable[[Any], None],
) -> str | None:
    """Run `work` in a process of its own and `keep` what it yields; what went wrong, or None."""
    pipe, far = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_child, args=(far, work, arguments), daemon=True)
    process.start()
    far.close()
    try:
        while True:
            left = min(SILENCE_S, until - time.monotonic())
            if not pipe.poll(max(0.0, left)):
                return "stopped: " + ("it hangs" if left == SILENCE_S else "no time left")
            try:
                kind, value = pipe.recv()
            except EOFError:
                process.join()
                return f"its process died, exit status {process.exitcode}"
            if kind == "row":
                keep(value)
            else:
                return value
    finally:
        process.join(5)
        process.kill()
        process.join()


def baseline(scale: Scale) -> Iterator[dict[str, Any]]:
    """Copy bandwidth; cuBLAS stands beside every row of the sweep."""
    import torch

    from kbit_kernels.triton.measure import copy_bandwidth_gb_s

    on_gpu = scale.device == "cuda"
    yield {
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


def cross_overs(scale: Scale) -> Iterator[dict[str, Any]]:
    """The most rows for which the fused kernel wins, at some widths."""
    from kbit_kernels import QuantSpec
    from kbit_kernels.triton.measure import cross_over_rows

    for bits in (4, 2, 8):
        if bits in scale.widths:
            spec = QuantSpec("int", bits)
            rows = cross_over_rows(spec, scale.shapes[0], scale.device, scale.rounds)
            yield {"spec": str(spec), "shape": list(scale.shapes[0]), "rows": rows}


def decode(
    scale: Scale, widths: tuple[int, ...], copy_gb_s: float, until: float
) -> Iterator[dict[str, Any]]:
    """See gpu_decode.decode_speed."""
    from gpu_decode import LLAMA_3_8B, TINY, decode_speed

    config = LLAMA_3_8B if scale.device == "cuda" else TINY
    yield from decode_speed(widths, copy_gb_s, until, config, scale.device)


def model(path: str, scale: Scale) -> Iterator[dict[str, Any]]:
    """See gpu_decode.model_speed."""
    from gpu_decode import model_speed

    yield model_speed(path, scale.device)


Key = tuple[str, tuple[int, int], int]  # data type, shape, rows of x


def sweep(
    scale: Scale,
    copy_gb_s: float,
    until: float,
    plan: list[tuple[tuple[int, int], str]],
    wrong: set[str],
    done: set[Key],
    with_peers: bool,
) -> Iterator[tuple[Key, list[dict[str, Any]]]]:
    """Shapes and data types of `plan`, all widths and rows; what tells most first, so that a
    deadline costs least. Leaves out what is `wrong` or `done`."""
    from functools import partial

    import torch

    from kbit_kernels import QuantSpec
    from kbit_kernels.triton import linear
    from kbit_kernels.triton.configs import choose_for, gpu_class
    from kbit_kernels.triton.measure import Timed, copies, medians_us, random_weight

    device = scale.device
    gpu, sms = gpu_class(torch.device(device))
    spent: dict[str, float] = {}
    for (n, k), name in plan:
        # every row count for int; for the others the ends of the scale
        counts = [m for m in scale.rows if name == "int" or m in (1, 16, 128)]
        counts = [m for m in counts if (name, (n, k), m) not in done]
        weights = {}
        for bits in scale.widths if counts else ():
            spec = QuantSpec(name, bits)
            if str(spec) in wrong:
                continue
            first = random_weight(spec, (n, k), device=device)
            count = copies(first.nbytes) if device == "cuda" else 1
            others = (random_weight(spec, (n, k), device=device) for _ in range(count - 1))
            weights[spec] = [first, *others]
        for m in counts:
            if time.monotonic() > until:
                return
            x = torch.randn((m, k), device=device, dtype=torch.float16)
            timed = {"cublas": Timed(dense_calls(n, k, x), device)}
            for spec, held in weights.items():
                timed[str(spec)] = Timed([partial(linear, x, w) for w in held], device)
            failed: dict[str, str] = {}
            peers: dict[str, Peer] = {}
            if name == "int" and with_peers and (n, k) == scale.shapes[0] and m in PEER_ROWS:
                peers = PEERS | (WIDTH_PEERS if m == 1 else {})
            for peer, make in peers.items():
                if spent.get(peer, 0.0) > PEER_LIMIT_S or sum(spent.values()) > PEERS_LIMIT_S:
                    failed[peer] = (
                        f"left out: setting it up took {spent.get(peer, 0.0):.0f} s already,"
                        f" all peers {sum(spent.values()):.0f} s"
                    )
                    continue
                started = time.monotonic()
                try:
                    timed[peer] = Timed(make(n, k, x), device)
                except Exception as problem:  # another library's, of any kind
                    failed[peer] = f"{type(problem).__name__}: {problem}"[:300]
                spent[peer] = spent.get(peer, 0.0) + time.monotonic() - started
            us = medians_us(timed, scale.rounds)
            rows = []
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
                row: dict[str, Any] = {"peer": peer, "shape": [n, k], "rows": m}
                if peer in failed:
                    row["failed"] = failed[peer]
                else:
                    row |= {"us": us[peer], "cublas_us": us["cublas"]}
                    row["x_cublas"] = us["cublas"] / us[peer]
                rows.append(row)
            del timed
            yield (name, (n, k), m), rows
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
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds, %(default)s")
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
    result: dict[str, Any] = {
        "command": f"python benchmarks/gpu.py{' --quick' if options.quick else ''}",
        "environment": environment(),
    }

    def save() -> None:
        aside = stem.with_suffix(".tmp")
        aside.write_text(json.dumps(result, indent=1) + "\n")
        aside.replace(stem.with_suffix(".json"))

    def section(
        name: str, until: float, work: Callable[..., Iterable[Any]], *arguments: Any
    ) -> list[Any]:
        """Keep what it yields, saved at once; say what went wrong."""
        at = time.monotonic()
        found: list[Any] = []

        def keep(value: Any) -> None:
            found.append(value)
            result[name] = found
            save()

        problem = apart(work, arguments, until, keep)
        if problem is not None:
            result[f"{name} failed"] = problem
            print(f"{name} failed: {problem}")
        print(f"{name}: {time.monotonic() - at:.0f} s", flush=True)
        save()
        return found

    peers = warm_peers(scale)  # theirs are compiled meanwhile, into their own caches
    wrong = run_gate(scale, started + min(GATE_S, options.limit / 3))
    end = started + options.limit
    for process in peers:
        process.join(max(0.0, started + options.limit / 4 - time.monotonic()))
        process.kill()
    colour = f"red: {', '.join(wrong)}" if wrong else "green"
    result["gate"] = f"{colour}, after {time.monotonic() - started:.0f} s"
    print(result["gate"], flush=True)
    if wrong:
        result["gate failed"] = wrong
        print("\n".join(line for lines in wrong.values() for line in lines), flush=True)
    save()
    base = section("baseline", end, baseline, scale)
    if not base:
        raise SystemExit("the card copies no memory; nothing else can be measured")
    result["baseline"] = base[0]
    copy_gb_s = base[0]["copy_gb_s"]

    # decoding first: it is short, and its numbers are the ones people ask for
    widths = tuple(
        bits for bits in ((4,) if options.quick else scale.widths) if f"int{bits}-b64" not in wrong
    )
    if "attention" in wrong or not widths:
        result["decode failed"] = "left out: the gate is red"
    else:
        until = time.monotonic() + 0.35 * (end - time.monotonic())
        section("decode", until + 20, decode, scale, widths, copy_gb_s, until)
    if options.model and section("model", time.monotonic() + 60, model, options.model, scale):
        result["model"] = result["model"][0]

    plan = [(shape, name) for name in DTYPES for shape in scale.shapes][
        : 1 if options.quick else None
    ]
    result["sweep"] = rows
    done: set[Key] = set()

    def keep_rows(found: tuple[Key, list[dict[str, Any]]]) -> None:
        done.add(found[0])
        rows.extend(found[1])
        save()

    at = time.monotonic()
    until = end - 40
    for with_peers in (True, False):
        arguments = (scale, copy_gb_s, until, plan, set(wrong), done, with_peers)
        problem = apart(sweep, arguments, until + 15, keep_rows)
        if problem is None:
            break
        key = "sweep failed" if with_peers else "sweep without peers failed"
        result[key] = problem
        print(f"{key}: {problem}", flush=True)
    print(f"sweep: {time.monotonic() - at:.0f} s", flush=True)
    print("\n".join(goals(rows)))
    section("cross-over", end - 5, cross_overs, scale)
    try:
        plots(rows, stem, scale.shapes[0])
    except Exception:
        result["plots failed"] = traceback.format_exc()
    result["wall_s"] = time.monotonic() - started
    save()
    print(f"{result['wall_s']:.0f} s, {stem.with_suffix('.json')}")
    failed = [name for name in result if name.endswith(" failed")]
    if failed:
        raise SystemExit(", ".join(failed))


if __name__ == "__main__":
    main()
