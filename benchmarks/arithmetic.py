"""Which arithmetic generation may use: what rounding the inputs adds to what the bits cost.

    python benchmarks/arithmetic.py NAME MODEL TEXT [--windows 16] [--context 256] [--bits 8 .. 2]
        [--isa avx2]

Each width is `kbit quantize MODEL --bits k` with kbit's defaults. KL divergence of the native
executor to the unquantized model with each arithmetic on the same tokens,
apart for those read as a prompt and those decoded step by step, since the two take different
paths through the kernels. Writes results/arithmetic-NAME.json, or arithmetic-NAME-ISA.json for an
instruction set other than this machine's fastest.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import kbit
from kbit.checkpoint.reader import open_checkpoint
from kbit.engine.executor import Executor, load_executor
from kbit.engine.tokenizer import Tokenizer
from record import save

ARITHMETICS = ("float", "int8", "int16", "bf16")
DECODED = 32  # of a window's tokens, those that are computed one by one


def window_logits(executor: Executor, window: np.ndarray) -> np.ndarray:
    """float32 [T, V]: the first part as a prompt, the last tokens one by one, as one sequence by
    itself: several take other products."""
    cache = executor.new_cache(1, window.size)
    prompt = window.size - DECODED
    parts = executor.forward([window[:prompt]], cache, all_logits=True)
    for t in range(prompt, window.size):
        parts.append(executor.forward([window[t : t + 1]], cache)[0][None])
    return np.concatenate(parts)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergences(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(p || q) of each position in nats, [..., V] -> [...]."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(axis=-1, dtype=np.float64)


PARTS = {"prompt": slice(None, -DECODED), "decode": slice(-DECODED, None)}


def compare(kl: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean divergences, and what each arithmetic adds to `float`'s as a share of it, with the
    standard error of that over windows, the independent units of the paired difference."""
    exact = kl["float"]
    result = {"kl_float": float(exact.mean())}
    for name in ARITHMETICS[1:]:
        difference = (kl[name] - exact).mean(axis=1) / exact.mean()
        result[f"{name}_adds"] = float(difference.mean())
        result[f"{name}_adds_stderr"] = float(difference.std(ddof=1) / np.sqrt(len(difference)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 7, 6, 5, 4, 3, 2])
    parser.add_argument("--isa")
    args = parser.parse_args()
    base = open_checkpoint(args.model)
    ids = Tokenizer.load(base.path, base.config).encode(args.text.read_text(encoding="utf-8"))
    windows = ids[: args.windows * args.context].reshape(args.windows, args.context)
    reference = load_executor(base, "native")

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for bits in args.bits:
            written = kbit.quantize(args.model, Path(scratch) / str(bits), bits=bits)
            checkpoint = open_checkpoint(written.path)
            executors = [
                load_executor(checkpoint, "native", arithmetic=name, isa=args.isa)
                for name in ARITHMETICS
            ]
            kl: dict[str, list[np.ndarray]] = {name: [] for name in ARITHMETICS}
            for window in windows:
                expected = window_logits(reference, window)
                for name, executor in zip(ARITHMETICS, executors, strict=True):
                    kl[name].append(divergences(expected, window_logits(executor, window)))
            row = {"bits": bits, "spec": written.spec, "bits_per_param": written.bits_per_param}
            for name, place in PARTS.items():
                row[name] = compare({k: np.stack(v)[:, place] for k, v in kl.items()})
            rows.append(row)
            print(written.spec, {name: row[name] for name in PARTS}, flush=True)
    command = (
        f"python benchmarks/arithmetic.py {args.name} MODEL {args.text.name}"
        f" --windows {args.windows} --context {args.context}"
    ) + (f" --isa {args.isa}" if args.isa else "")
    save(
        f"arithmetic-{args.name}" + (f"-{args.isa}" if args.isa else ""),
        command,
        {
            "model": args.name,
            "text": args.text.name,
            "tokens": windows.size,
            "isa": args.isa or reference.isa,  # type: ignore[attr-defined]
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
