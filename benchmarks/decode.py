"""Whole models on the CPU: decoding, prompts, first token and memory, kbit beside its peers.

    python benchmarks/decode.py NAME MODEL [--gguf FILE ...] [--peers transformers-bf16 ...]

MODEL is an unquantized Hugging Face directory; kbit quantizes it at each of --bits with its
defaults. All candidates run in turn, each in a process of its own, --rounds times; a run beside
which others took more than --foreign of the processors is thrown away and repeated. Medians go to
results/decode-NAME.json.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import kbit
from kbit.engine.native_executor import default_threads
from kbit.errors import KbitError
from peers import run
from record import save

RETRIES = 5  # of a run beside foreign load, before the measurement is given up


def quiet_run(foreign: float, *arguments: Any) -> tuple[dict[str, float], int]:
    """A run without foreign load, and how many were thrown away before it."""
    shares = []
    for thrown in range(RETRIES + 1):
        result = run(*arguments)
        shares.append(result["foreign_share"])
        if shares[-1] <= foreign:
            return result, thrown
    raise KbitError(
        f"others took {min(shares):.0%} of the processors or more beside each of {len(shares)} "
        "runs; measure on a quiet machine"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3, 2])
    parser.add_argument("--arithmetic", nargs="+", default=["float", "int8"])
    parser.add_argument("--gguf", nargs="*", default=[])
    parser.add_argument("--peers", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--foreign", type=float, default=0.05)
    args = parser.parse_args()
    threads = default_threads()
    with tempfile.TemporaryDirectory() as scratch:
        candidates: list[dict[str, Any]] = []
        for bits in args.bits:
            made = kbit.quantize(args.model, Path(scratch) / str(bits), bits=bits)
            candidates += [
                {
                    "engine": f"kbit-{arithmetic}",
                    "type": made.spec,
                    "path": str(made.path),
                    "bits_per_param": made.bits_per_param,
                    "model_bytes": made.bytes,
                }
                for arithmetic in args.arithmetic
            ]
        for path in args.gguf:
            size = os.path.getsize(path)
            candidates.append(
                {
                    "engine": "llama.cpp",
                    "type": Path(path).stem.rsplit(".", 1)[-1],
                    "path": path,
                    "bits_per_param": 8 * size / made.parameters,
                    "model_bytes": size,
                }
            )
        candidates += [
            {"engine": peer, "type": peer.split("-")[-1], "path": args.model} for peer in args.peers
        ]
        runs: list[list[dict[str, float]]] = [[] for _ in candidates]
        thrown = 0
        for turn in range(args.rounds):
            for candidate, results in zip(candidates, runs, strict=True):
                result, wasted = quiet_run(
                    args.foreign,
                    candidate["engine"],
                    candidate["path"],
                    threads,
                    args.prompt,
                    args.tokens,
                )
                results.append(result)
                thrown += wasted
            print(f"round {turn + 1} of {args.rounds}", flush=True)
    rows = []
    for candidate, results in zip(candidates, runs, strict=True):
        medians = {key: statistics.median(r[key] for r in results) for key in results[0]}
        decode = [r["decode_tokens_per_second"] for r in results]
        row = {k: v for k, v in candidate.items() if k != "path"} | medians
        rows.append(row | {"decode_spread": [min(decode), max(decode)]})
        print(
            f"{row['engine']:18} {row['type']:10} {row['decode_tokens_per_second']:7.1f} tok/s  "
            f"prompt {row['prompt_tokens_per_second']:7.0f} tok/s  "
            f"peak {row['peak_bytes'] / 1e6:.0f} MB"
        )
    command = f"python benchmarks/decode.py {args.name} MODEL --rounds {args.rounds}"
    setting = {"threads": threads, "prompt": args.prompt, "tokens": args.tokens}
    limits = {"foreign_limit": args.foreign, "runs_thrown_away": thrown}
    save(f"decode-{args.name}", command, {"model": args.name, **setting, **limits, "rows": rows})


if __name__ == "__main__":
    main()
