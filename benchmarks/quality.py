"""What the bits cost: one model at 8 to 2 bits against itself unquantized, on a text.

    python benchmarks/quality.py NAME MODEL TEXT [--windows 40] [--bits 8 7 6 5 4 3 2]

Each width is `kbit quantize MODEL --bits k` with kbit's defaults; bits per byte of text, KL
divergence and top-1 agreement come from `kbit eval`'s code. Writes results/quality-NAME.json.
"""

import argparse
import tempfile
from pathlib import Path

import kbit
from kbit.evaluate.run import evaluate
from record import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=40, help="windows of --context tokens")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 7, 6, 5, 4, 3, 2])
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    options = {"context": args.context, "max_windows": args.windows}

    reference = kbit.load(args.model)
    base = evaluate(reference, text, **options).record()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for bits in args.bits:
            written = kbit.quantize(args.model, Path(scratch) / str(bits), bits=bits)
            model = kbit.load(written.path)
            scores = evaluate(model, text, against=reference, **options).record()
            rows.append(
                {
                    "bits": bits,
                    "spec": written.spec,
                    "model_bytes": written.bytes,
                    "bits_per_param": written.bits_per_param,
                    "quantize_seconds": written.seconds,
                    **scores,
                }
            )
            print(
                f"{written.spec:12} {written.bits_per_param:6.3f} bits/parameter"
                f"  {scores['bits_per_byte']:.4f} bits/byte  KL {scores['kl_mean']:.5f}"
                f" +- {scores['kl_mean_stderr']:.5f}",
                flush=True,
            )
    command = (
        f"python benchmarks/quality.py {args.name} MODEL {args.text.name}"
        f" --windows {args.windows} --context {args.context}"
    )
    save(
        f"quality-{args.name}",
        command,
        {
            "model": args.name,
            "text": args.text.name,
            "source_bytes": written.source_bytes,
            "parameters": written.parameters,
            "unquantized": base,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
