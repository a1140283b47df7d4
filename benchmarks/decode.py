"""Whole models on the CPU: decoding, prompts, loading, first token, memory; kbit beside its peers.

    python benchmarks/decode.py smollm2-135m-instruct | llama-1b [--rounds 7] [--quick]

Before anything is timed, kbit's arithmetics are held to the torch executor at every width. Then all
candidates run in turn, each in a process of its own, --rounds times; a run beside which others took
more than --foreign of the processors is thrown away and repeated. Medians go into the machine's
results, section "NAME". --quick: one round, few candidates, nothing saved.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.engine.native_executor import default_threads, fast_arithmetic
from kbit.errors import KbitError
from kbit.models import describe_checkpoint
from models import LLAMA_TYPES, NAMES, Model, gguf_tensor_bytes
from peers import read_gb_per_s, run
from record import last_level_cache_bytes, save_section

RETRIES = 5  # of a run beside foreign load, before the measurement is given up
PYTHON_PEERS = ("transformers-fp32", "transformers-bf16", "bitsandbytes-nf4", "torch-int4")
WHEEL_TYPES = ("Q8_0", "Q4_0")  # enough to say which build of llama.cpp is the faster
SETTINGS: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": {
        "bits": (8, 7, 6, 5, 4, 3, 2), "types": LLAMA_TYPES, "wheel": WHEEL_TYPES,
        "peers": PYTHON_PEERS, "prompt": 512, "tokens": 48, "greedy": 256,
    },
    "llama-1b": {
        "bits": (8, 6, 4, 3, 2), "types": [t for t in LLAMA_TYPES if t != "Q5_K_M"], "wheel": (),
        "peers": (), "prompt": 256, "tokens": 32, "greedy": 8,
    },
}  # fmt: skip


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


def stored(path: Path) -> tuple[dict[str, Any], str]:
    """What a checkpoint takes, and the arithmetic that `kbit generate` takes for it."""
    checkpoint = open_checkpoint(path)
    nbytes = sum(map(checkpoint.nbytes, checkpoint.names()))
    size = {"model_bytes": nbytes, "bits_per_param": 8 * nbytes / parameters_of(checkpoint)}
    return size, fast_arithmetic(checkpoint, describe_checkpoint(checkpoint))


def parameters_of(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())


def held(path: Path, threads: int, tokens: int, *isa: str) -> dict[str, Any]:
    """correct.py in a process of its own; KbitError with its sentence where it fails."""
    script = Path(__file__).with_name("correct.py")
    command = [sys.executable, str(script), str(path), str(threads), str(tokens), *isa]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KbitError(f"nothing was timed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def candidates(
    model: Model, parameters: int, setting: dict[str, Any], threads: int
) -> list[dict[str, Any]]:
    """Every engine and type, with the path it loads; kbit's are held to the torch executor."""
    rows: list[dict[str, Any]] = []
    for bits in setting["bits"]:
        path = model.kbit(bits)
        size, default = stored(path)
        correct = held(path, threads, setting["greedy"])
        spec = next(iter(_specs(path)))
        print(f"{spec} agrees with the torch executor: {correct['int8']}", flush=True)
        for arithmetic in dict.fromkeys((default, "int8")):
            row = {"engine": f"kbit-{arithmetic}", "type": spec, "path": str(path), "bits": bits}
            chosen = {"default": arithmetic == default, "correct": correct[arithmetic]}
            rows.append(row | size | chosen)
    for engine, kinds in (("llama.cpp", setting["types"]), ("xllamacpp", setting["wheel"])):
        for kind in kinds:
            path = model.gguf(kind)
            nbytes = gguf_tensor_bytes(path)
            size = {"model_bytes": nbytes, "bits_per_param": 8 * nbytes / parameters}
            rows.append({"engine": engine, "type": kind, "path": str(path), **size})
    for peer in setting["peers"]:
        kind = peer.rpartition("-")[2]
        rows.append({"engine": peer.removesuffix(f"-{kind}"), "type": kind, "run": peer,
                     "path": str(model.source)})  # fmt: skip
    return rows


def _specs(path: Path) -> dict[str, None]:
    checkpoint = open_checkpoint(path)
    tensors = (checkpoint.tensor(name) for name in checkpoint.names())
    return {str(t.spec): None for t in tensors if hasattr(t, "spec")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--foreign", type=float, default=0.05)
    parser.add_argument("--only", default="", help="engines that begin so")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    setting, model, threads = dict(SETTINGS[args.name]), Model(args.name), default_threads()
    if args.quick:
        args.rounds, args.foreign = 1, 1.0
        setting |= {"bits": (4,), "types": ("Q4_0",), "greedy": 8}
    parameters = parameters_of(open_checkpoint(model.source))
    found = candidates(model, parameters, setting, threads)
    found = [c for c in found if c["engine"].startswith(args.only)]
    runs: list[list[dict[str, float]]] = [[] for _ in found]
    cold: list[float] = []
    thrown = 0
    for turn in range(args.rounds):
        cold.append(read_gb_per_s(threads, 2 * last_level_cache_bytes()))
        for candidate, results in zip(found, runs, strict=True):
            engine = candidate.get("run", candidate["engine"])
            arguments = engine, candidate["path"], threads, setting["prompt"], setting["tokens"]
            result, wasted = quiet_run(args.foreign, *arguments)
            results.append(result)
            thrown += wasted
        print(f"round {turn + 1} of {args.rounds}", flush=True)
    rows = []
    for candidate, results in zip(found, runs, strict=True):
        medians = {key: statistics.median(r[key] for r in results) for key in results[0]}
        decode = [r["decode_tokens_per_second"] for r in results]
        row = {k: v for k, v in candidate.items() if k not in ("path", "run")} | medians
        row.setdefault("bits_per_param", 8 * row["model_bytes"] / parameters)
        rows.append(row | {"decode_spread": [min(decode), max(decode)]})
        print(
            f"{row['engine']:14} {row['type']:10} {row['decode_tokens_per_second']:7.1f} tok/s  "
            f"prompt {row['prompt_tokens_per_second']:7.0f} tok/s  "
            f"first {row['first_token_seconds']:5.2f} s  peak {row['peak_bytes'] / 1e6:5.0f} MB  "
            f"{100 * row.get('bandwidth_share', 0):3.0f} %"
        )
    if args.quick or args.only:
        return
    setting = {k: setting[k] for k in ("prompt", "tokens")} | {"threads": threads}
    limits = {"foreign_limit": args.foreign, "runs_thrown_away": thrown}
    memory = {
        "last_level_cache_bytes": last_level_cache_bytes(),
        "cold_read_gb_per_s": round(statistics.median(cold), 1),
    }
    command = f"python benchmarks/decode.py {args.name} --rounds {args.rounds}"
    save_section(args.name, command, {**setting, **limits, **memory, "rows": rows})


if __name__ == "__main__":
    main()
