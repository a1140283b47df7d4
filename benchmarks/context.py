"""Long prompts, and decoding after them: kbit beside llama.cpp, both at 4 bits, SmolLM2.

llama.cpp runs with and without its flash attention: prompts are faster with it, decoding slower.

    python benchmarks/context.py [--rounds 7] [--foreign 0.05]

Before anything is timed, kbit is held to the torch executor, on a text as on the longest context.
Section "context" of the machine's results.
"""

import argparse
import statistics
from typing import Any

import numpy as np

from decode import held, quiet_run, stored
from kbit.checkpoint.reader import open_checkpoint
from kbit.engine.executor import load_executor
from kbit.engine.native_executor import default_threads
from kbit.errors import KbitError
from models import Model
from peers import prompt_ids
from record import save_section

NAME, BITS, THEIRS = "smollm2-135m-instruct", 4, "Q4_0"
CONTEXTS, TOKENS = (512, 2048, 7936), 48  # within the model's 8192 positions
GREEDY = 256
BOUND = {"float": 1e-3, "fast": 0.1}  # of the largest logit


def differences(path: str, threads: int) -> dict[str, float]:
    """Of the logits after the longest context, from the torch executor's, over the largest."""
    checkpoint, ids = open_checkpoint(path), np.array(prompt_ids(CONTEXTS[-1]))

    def last(executor: Any) -> np.ndarray:
        logits: np.ndarray = executor.forward([ids], executor.new_cache(1, len(ids)))[0]
        return logits

    expected = last(load_executor(checkpoint, "torch"))
    found = {}
    for arithmetic, bound in BOUND.items():
        executor = load_executor(checkpoint, "native", threads=threads, arithmetic=arithmetic)
        found[arithmetic] = float(np.abs(last(executor) - expected).max() / np.abs(expected).max())
        if not found[arithmetic] <= bound:
            raise KbitError(f"nothing was timed: {arithmetic} differs by {found[arithmetic]:.2g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--foreign", type=float, default=0.05)
    args = parser.parse_args()
    model, threads = Model(NAME), default_threads()
    path = model.kbit(BITS)
    arithmetic = stored(path)[1]
    held(path, threads, GREEDY)
    correct = differences(str(path), threads)
    print(f"agrees with the torch executor after {CONTEXTS[-1]} tokens: {correct}", flush=True)
    theirs = model.gguf(THEIRS)
    engines = {f"kbit-{arithmetic}": path, "llama.cpp": theirs, "llama.cpp-unfused": theirs}
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    for turn in range(args.rounds):
        for context in CONTEXTS:
            for engine, file in engines.items():
                arguments = engine, str(file), threads, context, TOKENS
                result, _ = quiet_run(args.foreign, *arguments)
                runs.setdefault((context, engine), []).append(result)
        print(f"round {turn + 1} of {args.rounds}", flush=True)
    rows = []
    for (context, engine), results in runs.items():
        row: dict[str, Any] = {"context": context, "engine": engine}
        for key in ("prompt_tokens_per_second", "decode_after_prompt_tokens_per_second"):
            row[key] = statistics.median(r[key] for r in results)
        rows.append(row)
        print(row)
    command = f"python benchmarks/context.py --rounds {args.rounds}"
    setting = {"model": NAME, "bits": BITS, "type": THEIRS, "threads": threads}
    save_section("context", command, {**setting, "correct": correct, "rows": rows})


if __name__ == "__main__":
    main()
