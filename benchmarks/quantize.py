"""`kbit quantize` on whole models, from process to files: MB of input a second, peak memory.

    python benchmarks/quantize.py [--rounds 7] [--models llama-1b ...]

Codes of one tensor are held to the reference. Beside it llama.cpp's quantizer on the same weights
(in F16) and bitsandbytes' NF4 of the largest tensor. Section "quantize" of the machine's results.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kbit.checkpoint.reader import open_checkpoint
from kbit_kernels import QuantizedTensor, QuantSpec, reference
from models import NAMES, ROOT, Model, llama_quantize
from record import save_section

KBIT = Path(sys.executable).with_name("kbit")
SPECS = ("int4-b64", "nf4-b64", "int8-b64", "nf3-b64", "lloyd2-b64")
LLAMA_TYPES = ("Q4_0", "Q4_K_M")
MEMORY_BYTES = 500e6  # beside three times the largest tensor


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def quantized(source: Path, spec: str, out: Path) -> dict[str, Any]:
    command = [KBIT, "quantize", source, "--spec", spec, "-o", out, "--force", "--json"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def same_codes(source: Path, out: Path, spec: str) -> bool:
    """Whether a layer's codes are those that the reference computes."""
    name = "model.layers.1.mlp.down_proj.weight"
    weights = np.asarray(open_checkpoint(source).tensor(name))
    found = open_checkpoint(out).tensor(name)
    assert isinstance(found, QuantizedTensor)
    codebook = found.codebook
    expected = reference.quantize(weights, QuantSpec.parse(spec), codebook=codebook)
    return bool(np.array_equal(found.codes, expected.codes))


def with_kbit(model: Model, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    checkpoint = open_checkpoint(model.source)
    largest = max(map(checkpoint.nbytes, checkpoint.names()))
    source_bytes = sum(map(checkpoint.nbytes, checkpoint.names()))
    rows = []
    for spec in SPECS:
        runs = [timed(lambda s=spec: quantized(model.source, s, scratch)) for _ in range(rounds)]  # type: ignore[misc]
        assert same_codes(model.source, scratch, spec), f"{spec}: the codes are not the reference's"
        peak = max(told["peak_memory_bytes"] for _, told in runs)
        rows.append(
            {
                "model": model.name,
                "spec": spec,
                "seconds": median(s for s, _ in runs),
                "input_mb_per_s": source_bytes / median(s for s, _ in runs) / 1e6,
                "peak_bytes": peak,
                "peak_limit_bytes": MEMORY_BYTES + 3 * largest,
            }
        )
        print(rows[-1], flush=True)
    return rows


def with_llama_cpp(model: Model, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    source = model.gguf("F16")
    rows = []
    for kind in LLAMA_TYPES:
        runs = [timed(lambda k=kind: llama_quantize(source, k, scratch))[0] for _ in range(rounds)]  # type: ignore[misc]
        rate = source.stat().st_size / median(runs) / 1e6
        rows.append({"model": model.name, "engine": "llama.cpp", "type": kind,
                     "seconds": median(runs), "input_mb_per_s": rate})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def with_bitsandbytes(model: Model, rounds: int) -> list[dict[str, Any]]:
    import torch
    from bitsandbytes.functional import quantize_4bit

    checkpoint = open_checkpoint(model.source)
    name = max(checkpoint.names(), key=checkpoint.nbytes)
    weights = torch.from_numpy(np.asarray(checkpoint.tensor(name)).astype(np.float32))
    weights = weights.to(torch.bfloat16)
    runs = [timed(lambda: quantize_4bit(weights, blocksize=64, quant_type="nf4"))[0]
            for _ in range(rounds)]  # fmt: skip
    rate = weights.nbytes / median(runs) / 1e6
    print(name, rate)
    return [{"model": model.name, "engine": "bitsandbytes", "type": "nf4", "tensor": name,
             "seconds": median(runs), "input_mb_per_s": rate}]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=NAMES)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    ROOT.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        model, scratch = Model(name), ROOT / "quantized"
        rows += with_kbit(model, args.rounds, scratch)
        shutil.rmtree(scratch)
        peers += with_llama_cpp(model, min(args.rounds, 3), scratch)
        scratch.unlink()
        peers += with_bitsandbytes(model, min(args.rounds, 3))
    command = f"python benchmarks/quantize.py --rounds {args.rounds}"
    if list(args.models) == list(NAMES):
        save_section("quantize", command, {"rows": rows, "peers": peers})


if __name__ == "__main__":
    main()
