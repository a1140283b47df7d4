"""Options that several commands share, and what they need around a model."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="A checkpoint directory, a .gguf file, an alias or a Hugging Face id.",
        show_default=False,
    ),
]
Backend = Annotated[
    str, typer.Option(help="What computes: auto, native (CPU, C++) or torch.", metavar="NAME")
]
Device = Annotated[str, typer.Option(help="Where it computes: cpu or cuda.", metavar="NAME")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Arithmetic: fp32, bf16 or fp16, where the backend has it.",
        metavar="NAME",
        show_default="the backend's",
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")]
Context = Annotated[
    int | None,
    typer.Option(help="Most tokens of prompt and answer together.", show_default="the model's"),
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate per sample.")]
Temperature = Annotated[
    float, typer.Option(help="0 takes the likeliest token; 1 draws as the model says.")
]
TopK = Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 is off.")]
TopP = Annotated[
    float, typer.Option(help="Draw from the likeliest tokens that hold this mass; 1 is off.")
]
MinP = Annotated[
    float, typer.Option(help="Leave out tokens below this share of the likeliest; 0 is off.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Divides the logits of tokens in prompt and answer; 1 is off.")
]
PresencePenalty = Annotated[
    float, typer.Option(help="Taken from the logit of a token that the answer has; 0 is off.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="The same, times how often the answer has it; 0 is off.")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        help="Added to a token's logit; may be repeated.",
        metavar="ID=BIAS",
        show_default="none",
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Makes drawing repeatable.", show_default="a fresh one")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help=r"Ends the text, and is cut off; may be repeated; \n and \t are understood.",
        metavar="TEXT",
        show_default="none",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def parse_logit_bias(given: list[str] | None) -> dict[int, float]:
    """["12=-5", ...] as a mapping; KbitError for what is no such pair."""
    from kbit.errors import KbitError

    found = {}
    for pair in given or ():
        token, _, bias = pair.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError:
            raise KbitError(
                f"--logit-bias {pair!r}: wants a token id and a number, such as 12=-5"
            ) from None
    return found


def parse_stops(given: list[str] | None) -> list[str]:
    r"""Stop strings with \n, \t and \\ read as in a program, since a shell passes them on."""
    meaning = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return [re.sub(r"\\[nt\\]", lambda m: meaning[m[0]], stop) for stop in given or ()]


def read_text(path: Path) -> str:
    """A file's text ("-" is standard input), UTF-8; KbitError where it is none."""
    from kbit.errors import KbitError

    where = "standard input" if str(path) == "-" else path
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise KbitError(f"{where}: cannot be read ({error.strerror})") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise KbitError(f"{where}: is no UTF-8 text (byte {error.start})") from None


def import_numpy() -> None:
    """numpy, whose BLAS else starts a thread a core, which spin beside the first step (20 of 290 ms
    to the first token, on two cores). A decoder does not multiply with it."""
    name = "OPENBLAS_NUM_THREADS"  # read once, while numpy is loaded
    ours = name not in os.environ
    os.environ.setdefault(name, "1")
    import numpy  # noqa: F401

    if ours:
        del os.environ[name]


def load_model(
    model: str,
    *,
    backend: str,
    device: str,
    dtype: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    arithmetic: str = "float",
) -> Any:
    """kbit.load with a command's options; those that generate take the "fast" arithmetic."""
    import kbit

    extra = {"arithmetic": arithmetic} | ({} if dtype is None else {"dtype": dtype})
    return kbit.load(
        model, backend=backend, device=device, threads=threads, context=context, **extra
    )
