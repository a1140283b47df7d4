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
table into README. gpu_compile.py can compile on another machine before.
--dry-run goes through all of it without a GPU, on tiny shapes under Triton's interpreter, and
writes to a temporary directory: it shows that the run will end, and no speed.
"""

import argparse
import json
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gpu_gate import run_gate
from gpu_peers import warm_peers
from gpu_scale import DRY, DTYPES, SPAWN, Scale
from gpu_sweep import Key, cross_overs, goals, plots, sweep
from record import RESULTS, environment

LIMIT_S = 8 * 60.0
GATE_S = 200.0  # bf16, which is not timed, is checked up to here
SILENCE_S = 120.0  # a section without a row for so long hangs


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
    wrong = run_gate(scale, started + min(GATE_S, options.limit * 0.4))
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
    if {"attention", "steps ahead"} & wrong.keys() or not widths:
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
