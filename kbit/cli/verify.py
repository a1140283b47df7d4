"""`kbit verify`: is every byte of a checkpoint what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kbit.cli.options import Threads


def verify(
    path: Annotated[Path, typer.Argument(help="A kbit checkpoint.", show_default=False)],
    threads: Threads = None,
) -> None:
    """Check a kbit checkpoint's structure and the checksum of every tensor.

    Exit status 0 if all is well, 2 and the damaged tensors' names otherwise.
    """
    from contextlib import closing

    from kbit.checkpoint.reader import open_checkpoint
    from kbit.checkpoint.verify import verify_checkpoint
    from kbit.errors import KbitError
    from kbit.quantize.pipeline import default_threads
    from kbit.quantize.progress import make_progress

    checkpoint = open_checkpoint(path)
    if checkpoint.block is None:
        raise KbitError(
            f"{path}: is a plain checkpoint, which carries no checksums; its headers fit its files"
        )
    total = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    with closing(make_progress()) as progress:
        progress.start(total, 0, "verifying")
        damages = verify_checkpoint(checkpoint, threads or default_threads(), progress.advance)
    if damages:
        for damage in damages[1:]:
            typer.echo(f"{damage.file}: tensor {damage.stored!r} fails its checksum", err=True)
        first = damages[0]
        raise KbitError(
            f"{path / first.file}: tensor {first.stored!r} fails its checksum "
            f"({len(damages)} damaged of {len(checkpoint.names())} tensors); "
            "quantize or fetch the model again"
        )
    typer.echo(f"{path}: {len(checkpoint.names())} tensors, {total:,} bytes, every checksum fits")
