"""`kbit tune`: find the fastest kernel configurations on this GPU."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from kbit.errors import KbitError


def tune(
    bits: Annotated[str, typer.Option(help="Widths, separated by commas.")] = "2,3,4,5,6,7,8",
    shapes: Annotated[
        str,
        typer.Option(help="Shapes of the layers, separated by commas.", metavar="OUTxIN,..."),
    ] = "4096x4096,14336x4096,4096x14336",
    rows: Annotated[
        str, typer.Option(help="Tokens computed at once, separated by commas.")
    ] = "1,16,32,64,128",
    dtype: Annotated[str, typer.Option(help="Data type to measure with.")] = "int",
) -> None:
    """Search kernel configurations on this GPU and keep the best ones in the cache directory.

    Each is saved as soon as it is found: an interrupted search has kept them, and --bits, --shapes
    and --rows can name what is missing. Most of the time goes into compiling.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from kbit_kernels import QuantSpec
    from kbit_kernels.triton import available

    specs = [QuantSpec(dtype, width) for width in _numbers("--bits", bits)]
    sizes = [_shape(text) for text in shapes.split(",")]
    counts = _numbers("--rows", rows)
    usable, reason = available()
    if not usable:
        raise KbitError(f"there is no GPU to tune for: {reason}")

    from kbit_kernels.triton.configs import tuned_path
    from kbit_kernels.triton.tune import tune as search
    from kbit_kernels.triton.tune import tune_cross_over

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    try:
        with Progress(*columns, *times, speed_estimate_period=600) as bar:
            task = bar.add_task("starting", total=None)

            def show(done: float, total: int, text: str) -> None:
                bar.update(task, completed=done, total=total, description=text)

            for found in search(specs, sizes, counts, show):
                bar.console.print(
                    f"{found.key}: {found.us:.1f} us (rule: {found.rule_us:.1f} us), {found.config}"
                )
            task = bar.add_task("", total=None)
            most = tune_cross_over(specs, sizes, show)
            bar.console.print(f"fused up to {most} tokens at once, above that by cuBLAS")
    except KeyboardInterrupt:
        typer.echo(f"What was found so far is in {tuned_path()}.")
        raise
    typer.echo(f"Saved to {tuned_path()}.")


def _numbers(option: str, text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise KbitError(f"{option} is {text!r}; give whole numbers separated by commas")
    return [int(part) for part in text.split(",")]


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None or int(match[2]) % 32:
        raise KbitError(
            f"--shapes has {text!r}; give OUTxIN such as 4096x14336, IN a multiple of 32"
        )
    return int(match[1]), int(match[2])
