"""`kbit tune`: find the fastest kernel configurations on this GPU."""

from __future__ import annotations

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
    """Search kernel configurations on this GPU and keep the best ones in the cache directory."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("starting", total=len(specs) * len(sizes) * len(counts))

        def show(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        for found in search(specs, sizes, counts, show):
            bar.console.print(
                f"{found.key}: {found.us:.1f} us (rule: {found.rule_us:.1f} us), {found.config}"
            )
        bar.update(task, description="where dequantizing and cuBLAS is faster")
        most = tune_cross_over(specs, sizes)
        bar.console.print(f"fused up to {most} tokens at once, above that by cuBLAS")
    typer.echo(f"Saved to {tuned_path()}.")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise KbitError(f"{option} is {text!r}; give whole numbers separated by commas") from None


def _shape(text: str) -> tuple[int, int]:
    out, _, inner = text.partition("x")
    if not (out.isdigit() and inner.isdigit()) or int(inner) % 32:
        raise KbitError(
            f"--shapes has {text!r}; give OUTxIN such as 4096x14336, IN a multiple of 32"
        )
    return int(out), int(inner)
