"""Holds the native executor to the torch executor on one checkpoint; prints JSON.

    python benchmarks/correct.py CHECKPOINT THREADS TOKENS [ISA]

Logits of 64 tokens read as a prompt, and a greedy text of so many tokens through the cache. Exits
with a sentence where `float` differs by more than 1e-3 of the largest logit or writes another text,
or where rounded inputs move the logits by more than BOUND of their size.
"""

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from agreement import continuation
from arithmetic import divergences
from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.engine.executor import load_executor
from kbit.engine.tokenizer import Tokenizer
from kbit_kernels import QuantizedTensor
from peers import prompt_ids

# root mean squares; unrelated logits have 1.4
BOUND = {"float": 1e-4, "int16": 0.05, "bf16": 0.1, "int8": 0.4}
BROKEN_BOUND = {"bf16": 0.2, "int8": 1.0}  # a model that 2 bits broke moves by 0.14 and 0.6


def some_ids(checkpoint: Checkpoint, count: int) -> np.ndarray:
    """The beginning of Treasure Island, or any ids where there is no tokenizer."""
    if not (Path(checkpoint.path) / "tokenizer.json").exists():
        return np.array(prompt_ids(count))
    text = (files("kbit") / "data" / "treasure-island.txt").read_text(encoding="utf-8")
    return Tokenizer.load(checkpoint.path, checkpoint.config).encode(text)[:count]


def check(
    path: str, threads: int, tokens: int, isa: str | None = None
) -> dict[str, dict[str, float]]:
    """By arithmetic: largest and mean difference of logits, divergence, length of equal text."""
    checkpoint = open_checkpoint(path)
    ids = some_ids(checkpoint, 64)

    def outcome(executor: Any) -> tuple[np.ndarray, list[int]]:
        logits = executor.forward([ids], executor.new_cache(1, len(ids)), all_logits=True)[0]
        return logits, continuation(executor, ids[:16], tokens)

    expected, text = outcome(load_executor(checkpoint, "torch"))
    result: dict[str, dict[str, float]] = {}
    tensors = map(checkpoint.tensor, checkpoint.names())
    broken = max((t.spec.bits for t in tensors if isinstance(t, QuantizedTensor)), default=16) == 2
    for arithmetic, bound in BOUND.items():
        if broken:
            bound = BROKEN_BOUND.get(arithmetic, bound)
        executor = load_executor(
            checkpoint, "native", threads=threads, arithmetic=arithmetic, isa=isa
        )
        found, written = outcome(executor)
        equal = next((i for i, pair in enumerate(zip(text, written, strict=True))
                      if pair[0] != pair[1]), tokens)  # fmt: skip
        difference = found - expected
        largest = float(np.abs(difference).max() / np.abs(expected).max())
        size = float(np.sqrt(np.square(difference).mean() / expected.var()))
        result[arithmetic] = {
            "largest_difference_over_largest_logit": largest,
            "rms_difference_over_spread": size,
            "kl_mean": float(divergences(expected, found).mean()),
            "top1_agreement": float((found.argmax(-1) == expected.argmax(-1)).mean()),
            "equal_greedy_tokens": equal,
            "greedy_tokens": tokens,
        }
        exact = arithmetic != "float" or (largest < 1e-3 and equal == tokens)
        if not exact or not size < bound:
            sys.exit(f"{path}: {arithmetic} is not the torch executor's: {result[arithmetic]}")
    return result


if __name__ == "__main__":
    where, threads, tokens, *isa = sys.argv[1:]
    print(json.dumps(check(where, int(threads), int(tokens), *isa)))
