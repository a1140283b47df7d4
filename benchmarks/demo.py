"""A real model from download to table: pull, quantize to 4 bits, evaluate, chat.

    python benchmarks/demo.py [--model smollm2-135m-instruct] [--bits 4]

What is downloaded and quantized is kept in kbit's cache, so a second run only measures. Speed and
memory are those of `kbit chat`'s work in a process of its own, one for each of the two models.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import kbit
from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.hub import cache_directory, resolve
from kbit.quantize.progress import make_progress

QUESTION = "What is the capital of France?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="default: %(default)s")
    parser.add_argument("--bits", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--one-answer", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.one_answer:
            print(json.dumps(answer(args.one_answer)))
        else:
            demo(args.model, args.bits)
    except kbit.KbitError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("\ndemo: interrupted; run again, it goes on from what is there")


def demo(model: str, bits: int) -> None:
    begin = time.perf_counter()
    say(f"1. pull {model}")
    original = resolve(model)
    say(f"   {original}")
    say(f"2. quantize to {bits} bits")
    quantized = quantized_copy(original, bits)
    say(f"   {quantized}")
    say("3. evaluate both on the beginning of Treasure Island")
    scores = evaluate(original, quantized)
    say(f'4. ask both: "{QUESTION}"')
    answers = [measured_answer(path) for path in (original, quantized)]
    for name, found in zip(("original", f"{bits} bits"), answers, strict=True):
        say(f"   {name}: {found['text']}")
    say("")
    print(table([open_checkpoint(p) for p in (original, quantized)], answers, scores))
    print(f"\n{time.perf_counter() - begin:.0f} seconds in all")
    command = os.path.relpath(Path(sys.executable).parent / "kbit")
    print(f"Talk to it: {command} chat {shlex.quote(str(quantized))}")


def say(text: str) -> None:
    print(text, flush=True)


def quantized_copy(original: Path, bits: int) -> Path:
    """The model at so many bits, in the cache; made if it isn't there."""
    out = cache_directory() / "demo" / f"{original.name}-{bits}bit-{kbit.__version__}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        progress = make_progress()
        try:
            kbit.quantize(original, out, bits=bits, progress=progress)
        finally:
            progress.close()
    return out


def evaluate(original: Path, quantized: Path) -> dict[str, Any]:
    text = (files("kbit") / "data" / "treasure-island.txt").read_text(encoding="utf-8")
    reference, model = kbit.load(original), kbit.load(quantized)
    return model.evaluate(text, against=reference).record()


def measured_answer(path: Path) -> dict[str, Any]:
    """`answer` in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one-answer", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise kbit.KbitError(f"answering with {path} failed; its message stands above")
    return json.loads(done.stdout)


def answer(path: str) -> dict[str, Any]:
    """The model's answer to the question, and the speed of a longer text."""
    from kbit.engine.memory import peak_memory_bytes

    model = kbit.load(path, arithmetic="fast")  # as `kbit chat` does
    messages = [{"role": "user", "content": QUESTION}]
    said = model.chat(messages, max_tokens=64, repetition_penalty=1.1)  # that command's default
    # The longest of a few short runs is the machine's, not that of what else it does.
    speeds = [
        model.chat(messages, max_tokens=48, ignore_eos=True).timings.decode_tokens_per_second
        for _ in range(3)
    ]
    return {
        "text": said.text,
        "seconds_to_first_token": said.timings.seconds_to_first_token,
        "decode_tokens_per_second": max(s for s in speeds if s is not None),
        "peak_memory_bytes": peak_memory_bytes(),
        "backend": model.executor.name,
    }


def table(
    checkpoints: list[Checkpoint], answers: list[dict[str, Any]], scores: dict[str, Any]
) -> str:
    stored = [sum(c.nbytes(n) for n in c.names()) for c in checkpoints]
    parameters = [sum(_size(c.shape(n)) for n in c.names()) for c in checkpoints]
    rows = [("", "original", "quantized")]
    rows.append(("bytes of tensors", *(f"{n:,}" for n in stored)))
    widths = (8 * n / p for n, p in zip(stored, parameters, strict=True))
    rows.append(("bits per parameter, measured", *(f"{w:.3f}" for w in widths)))
    rows.append(
        (
            "bits per byte of text",
            with_error(scores, "reference_bits_per_byte", 4),
            with_error(scores, "bits_per_byte", 4),
        )
    )
    rows.append(("KL divergence, nats per token", "", with_error(scores, "kl_mean", 5)))
    rows.append(("same likeliest token", "", with_error(scores, "top1_agreement", 4)))
    rows.append(("tokens per second", *(f"{a['decode_tokens_per_second']:.1f}" for a in answers)))
    rows.append(("peak memory, MB", *(f"{a['peak_memory_bytes'] / 1e6:.0f}" for a in answers)))
    rows.append(("backend", *(a["backend"] for a in answers)))
    return "\n".join(f"{a:<32}{b:>20}{c:>20}" for a, b, c in rows)


def with_error(scores: dict[str, Any], name: str, digits: int) -> str:
    return f"{scores[name]:.{digits}f} ± {scores[f'{name}_stderr']:.{digits}f}"


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


if __name__ == "__main__":
    main()
