"""`kbit inspect`: what a checkpoint stores, tensor by tensor."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import typer

from kbit.cli.options import AsJson, ModelArgument

if TYPE_CHECKING:
    from kbit.checkpoint.reader import Checkpoint


def inspect(
    model: ModelArgument,
    as_json: AsJson = False,
) -> None:
    """Show every tensor of a checkpoint: shape, spec, bytes, measured bits; and the totals."""
    from kbit.checkpoint.reader import open_checkpoint
    from kbit.quantize.api import resolve_model

    report = describe_contents(open_checkpoint(resolve_model(model)))
    typer.echo(json.dumps(report) if as_json else _table(report))


def describe_contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """The machine-readable report: parameters, bytes, bits_per_param, tensors, and more."""
    tensors = []
    for name in checkpoint.names():
        spec, shape, nbytes = checkpoint.spec(name), checkpoint.shape(name), checkpoint.nbytes(name)
        tensors.append(
            {
                "name": name,
                "shape": list(shape),
                "spec": None if spec is None else str(spec),
                "dtype": checkpoint.entry(name).dtype if spec is None else None,
                "bytes": nbytes,
                "bits_per_param": 8 * nbytes / max(math.prod(shape), 1),
            }
        )
    parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    total = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    block = checkpoint.block
    return {
        "path": str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "format_version": checkpoint.quantization["format_version"]
        if checkpoint.quantization
        else None,
        "method": block.method if block else None,
        "parameters": parameters,
        "bytes": total,
        "bits_per_param": 8 * total / max(parameters, 1),
        "tensors": tensors,
    }


def _table(report: dict[str, Any]) -> str:
    rows = [("tensor", "shape", "stored as", "bits/param", "bytes")]
    groups: dict[str, list[int]] = {}
    for tensor in report["tensors"]:
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        stored = tensor["spec"] or f"{tensor['dtype']}, kept"
        if not report["method"]:
            stored = tensor["dtype"]
        rows.append(
            (
                tensor["name"],
                shape,
                stored,
                f"{tensor['bits_per_param']:.3f}",
                f"{tensor['bytes']:,}",
            )
        )
        group = groups.setdefault(stored, [0, 0, 0])
        for i, value in enumerate((1, math.prod(tensor["shape"]), tensor["bytes"])):
            group[i] += value
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.append("")
    for stored, (count, parameters, nbytes) in groups.items():
        lines.append(
            f"{stored}: {count} tensors, {parameters:,} parameters, {nbytes:,} bytes, "
            f"{8 * nbytes / max(parameters, 1):.3f} bits per parameter"
        )
    lines.append(
        f"total: {len(report['tensors'])} tensors, {report['parameters']:,} parameters, "
        f"{report['bytes']:,} bytes, {report['bits_per_param']:.3f} bits per parameter"
    )
    return "\n".join(lines)
