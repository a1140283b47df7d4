"""kbit and llama.cpp on SmolLM2, held to the instruction sets of older and smaller processors.

    python benchmarks/instruction_sets.py [--rounds 7]

llama.cpp is its own build for all processors (`make .venv/variants`), of which the library for each
set is loaded. Before anything is timed, kbit is held to the torch executor with each set. All then
run in turn as in decode.py; medians go into the machine's results, section "instruction sets".
Processors that have no more than such a set differ from this one in clock and memory too.
"""

import argparse
import statistics

from decode import held, quiet_run, stored
from kbit.engine.native_executor import default_threads
from kbit_kernels.cpu import library
from models import Model, gguf_tensor_bytes
from record import save_section

NAME = "smollm2-135m-instruct"
PROMPT, TOKENS, GREEDY = 512, 48, 64
TYPES = {8: "Q8_0", 6: "Q6_K", 5: "Q5_K_M", 4: "Q4_0", 3: "Q3_K_M", 2: "Q2_K"}
VARIANTS = {"avx2": "haswell", "avxvnni": "alderlake", "avx512": "icelake"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--foreign", type=float, default=0.05)
    args = parser.parse_args()
    model, threads = Model(NAME), default_threads()
    rows = []
    for isa in filter(library.isa_available, VARIANTS):
        for bits, kind in TYPES.items():
            path, file = model.kbit(bits), model.gguf(kind)
            size, arithmetic = stored(path)
            correct = held(path, threads, GREEDY, isa)[arithmetic]
            print(f"{isa}, {bits} bits: {correct}", flush=True)
            engine = f"kbit-{arithmetic}"
            rows.append({"isa": isa, "bits": bits, "engine": engine, **size, "correct": correct,
                         "run": (f"{engine}@{isa}", path)})  # fmt: skip
            rows.append({"isa": isa, "bits": bits, "engine": "llama.cpp", "type": kind,
                         "model_bytes": gguf_tensor_bytes(file),
                         "run": (f"llama.cpp@{VARIANTS[isa]}", file)})  # fmt: skip
    runs: list[list[dict[str, float]]] = [[] for _ in rows]
    thrown = 0
    for turn in range(args.rounds):
        for row, results in zip(rows, runs, strict=True):
            engine, path = row["run"]
            result, wasted = quiet_run(args.foreign, engine, str(path), threads, PROMPT, TOKENS)
            results.append(result)
            thrown += wasted
        print(f"round {turn + 1} of {args.rounds}", flush=True)
    for row, results in zip(rows, runs, strict=True):
        del row["run"]
        for key in ("decode_tokens_per_second", "prompt_tokens_per_second"):
            row[key] = statistics.median(r[key] for r in results)
        print(
            f"{row['isa']:8} {row['bits']} {row['engine']:12} "
            f"{row['decode_tokens_per_second']:7.1f} {row['prompt_tokens_per_second']:7.0f} tok/s"
        )
    save_section(
        "instruction sets",
        f"python benchmarks/instruction_sets.py --rounds {args.rounds}",
        {
            "model": NAME,
            "prompt_tokens": PROMPT,
            "threads": threads,
            "foreign_limit": args.foreign,
            "runs_thrown_away": thrown,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
