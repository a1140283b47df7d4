"""`kbit quantize`: a model in, a kbit checkpoint out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kbit.cli.options import AsJson, ModelArgument, Threads

if TYPE_CHECKING:
    from kbit.quantize.api import QuantizeResult


def quantize(
    model: ModelArgument,
    bits: Annotated[
        int | None, typer.Option(help="Bits of a code, 2 to 8.", show_default="4")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type: int, uint, fp, fpb, bnb, nf, af4, dynamic, quantile, lloyd.",
            show_default="by bits",
        ),
    ] = None,
    block: Annotated[
        str | None,
        typer.Option(
            help="Weights that share a scale: a power of two from 16 to 1024, or 'row'.",
            show_default="64",
        ),
    ] = None,
    exponent: Annotated[
        int | None, typer.Option(help="Exponent bits of fp and fpb.", show_default="by bits")
    ] = None,
    scale_dtype: Annotated[
        str | None, typer.Option(help="Scales in fp16, bf16 or fp32.", show_default="fp16")
    ] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="Store the scales themselves in 8 bits.")
    ] = False,
    center: Annotated[
        bool, typer.Option("--center", help="Subtract each block's mean first.")
    ] = False,
    outliers: Annotated[
        float, typer.Option(help="Fraction of input columns kept at 16 bits.")
    ] = 0.0,
    spec: Annotated[
        str | None,
        typer.Option(
            help="All of the above in one, such as nf4-b64 or int3-b32-dq.", show_default="none"
        ),
    ] = None,
    search: Annotated[
        bool | None,
        typer.Option(
            "--search/--no-search",
            help="Choose each block's scale for the least squared error.",
            show_default="no, or the recipe's",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="TOML file: patterns of tensor names and their specs.", show_default="none"
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Quantization method.", show_default="rtn")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Directory to write.", show_default="./MODEL-SPEC"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that is there already.")
    ] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model to 2 to 8 bits and write it as a kbit checkpoint.

    Every linear layer, the embeddings and the output head are quantized; norms and biases are kept
    as they are. A recipe decides otherwise. Interrupted, the same command resumes.
    """
    from kbit.quantize.api import quantize as run
    from kbit.quantize.progress import make_progress

    result = run(
        model,
        out,
        bits,
        dtype=dtype,
        block=_block(block),
        exponent=exponent,
        scale_dtype=scale_dtype,
        double_quant=double_quant,
        center=center,
        outliers=outliers,
        spec=spec,
        search=search,
        recipe=recipe,
        method=method,
        force=force,
        threads=threads,
        progress=make_progress(),
    )
    typer.echo(json.dumps(result.to_json()) if as_json else _summary(result))


def _block(text: str | None) -> int | None:
    from kbit.errors import KbitError

    if text is None or text == "row":
        return None if text is None else 0
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise KbitError(
            f"--block is {text!r}; choose a power of two from 16 to 1024, or 'row' for whole rows"
        )
    return int(text)


def _summary(result: QuantizeResult) -> str:
    kept = ", ".join(f"{count} {role}" for role, count in result.kept_roles.items())
    specs = list(result.quantized_specs.items())
    told = specs[0][0] if len(specs) == 1 else ", ".join(f"{n} {spec}" for spec, n in specs)
    lines = [
        f"{result.path}",
        f"  {result.quantized_tensors} tensors quantized ({told or 'none'}; {result.method}), "
        f"{result.kept_tensors} kept as they were ({kept or 'none'}; "
        f"{result.kept_bytes / 1e6:.2f} MB)",
        f"  {result.source_bytes / 1e6:.2f} MB -> {result.bytes / 1e6:.2f} MB "
        f"({result.bytes / max(result.source_bytes, 1):.1%}), "
        f"{result.bits_per_param:.3f} bits per parameter",
        f"  {result.seconds:.1f} s, {result.source_bytes / result.seconds / 1e6:.0f} MB/s, "
        f"peak memory {result.peak_memory_bytes / 1e6:.0f} MB",
    ]
    if result.dropped_tensors:
        lines.insert(2, f"  left out, nothing reads them: {', '.join(result.dropped_tensors[:4])}")
        if len(result.dropped_tensors) > 4:
            lines[2] += f" and {len(result.dropped_tensors) - 4} more"
    return "\n".join(lines)
