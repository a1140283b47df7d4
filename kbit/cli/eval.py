"""`kbit eval`: what a model's bits cost on a text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli import options

if TYPE_CHECKING:
    from kbit.evaluate.run import Evaluation

# As kbit.evaluate.protocols has them, which would import numpy for a help text; a test compares.
PROTOCOL_NAMES = ("kbit", "gptq", "lm-eval", "llama.cpp", "hf-strided")


def eval(  # the command's name
    model: options.ModelArgument,
    text: Annotated[Path, typer.Option("--text", help='The text, UTF-8; "-" is standard input.')],
    against: Annotated[
        str | None,
        typer.Option(
            help="A reference, such as the model before quantization: adds the divergence from it.",
            metavar="MODEL",
            show_default="none",
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help=f"How the text is cut and scored: {', '.join(PROTOCOL_NAMES)}.", metavar="NAME"
        ),
    ] = "kbit",
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a window.", show_default="the protocol's; 512 for kbit"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from one window to the next.", show_default="the protocol's, or a window"
        ),
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos",
            help="Begin with the beginning-of-sequence token.",
            show_default="as the checkpoint says",
        ),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(help="Score only the first of them.", show_default="all")
    ] = None,
    as_json: options.AsJson = False,
    backend: options.Backend = "auto",
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Measure perplexity and bits per byte, and the divergence from a reference model.

    Every number comes with its standard error. Perplexities compare only under one protocol and
    one tokenizer; bits per byte compare across tokenizers.
    """
    import kbit.evaluate.protocols
    from kbit.evaluate.run import evaluate

    kbit.evaluate.protocols.protocol(protocol)  # a wrong name is told before anything is loaded
    content = options.read_text(text)
    how: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype, "threads": threads}
    loaded = options.load_model(model, **how)
    reference = None if against is None else options.load_model(against, **how)
    bar = _Bar()
    try:
        found = evaluate(
            loaded,
            content,
            against=reference,
            protocol=protocol,
            context=context,
            stride=stride,
            bos=bos,
            max_windows=max_windows,
            progress=bar,
        )
    finally:
        bar.close()
    record = _record(found, model, against, str(text), loaded.executor.name, device)
    print(json.dumps(record) if as_json else _table(found, record))
    if found.nonfinite_tokens:
        print(
            f"kbit: {found.nonfinite_tokens} of {found.tokens} scored positions had NaN or "
            "infinite logits, so the means are no numbers: the weights overflow or are damaged",
            file=sys.stderr,
        )


class _Bar:
    """A progress bar on standard error, where that is a terminal. It begins without a total, since
    cutting a long text into tokens takes seconds."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        if sys.stderr.isatty():
            self._start()

    def __call__(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("evaluating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _record(
    found: Evaluation, model: str, against: str | None, text: str, backend: str, device: str
) -> dict[str, Any]:
    """What --json prints."""
    from kbit import __version__
    from kbit.engine.memory import peak_memory_bytes

    return {
        "kbit_version": __version__,
        "model": model,
        "against": against,
        "text": text,
        "backend": backend,
        "device": device,
        **found.record(),
        "tokens_per_second": found.tokens / found.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


# Name in the record -> how the table calls it, and how it prints a number.
_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("perplexity", "perplexity per token", "{:.4f}".format),
    ("word_perplexity", "perplexity per word", "{:.4f}".format),
    ("bits_per_byte", "bits per byte", "{:.5f}".format),
    ("reference_perplexity", "reference: perplexity", "{:.4f}".format),
    ("reference_bits_per_byte", "reference: bits per byte", "{:.5f}".format),
    ("log_likelihood_change", "change of log-likelihood, nats/token", "{:+.6f}".format),
    ("kl_mean", "KL divergence, mean, nats/token", "{:.6f}".format),
    ("kl_median", "  median", "{:.6f}".format),
    ("kl_p90", "  90 percent", "{:.6f}".format),
    ("kl_p99", "  99 percent", "{:.6f}".format),
    ("kl_p999", "  99.9 percent", "{:.6f}".format),
    ("kl_max", "  max", "{:.6f}".format),
    ("top1_agreement", "same likeliest token", "{:.3%}".format),
)


def _table(found: Evaluation, record: dict[str, Any]) -> str:
    p = found.protocol
    lines = [
        f"protocol {p.name}: context {p.context}, stride {p.stride}, "
        f"{'BOS added' if found.bos_added else 'no BOS'}",
        f"{found.tokens:,} tokens, {found.bytes:,} bytes, {len(found.parts):,} windows, "
        f"{found.seconds:.1f} s",
        "",
    ]
    for name, title, spell in _ROWS:
        estimate = found.estimates.get(name)
        if estimate is None:
            continue
        error = "" if estimate.stderr is None else f"  ± {spell(estimate.stderr).lstrip('+')}"
        lines.append(f"{title:<38}{spell(estimate.value):>12}{error}")
    if any(estimate.stderr is not None for estimate in found.estimates.values()):
        lines.append("")
        lines.append(f"± one standard error, {record['stderr_clusters']} taken as independent")
    return "\n".join(lines)
