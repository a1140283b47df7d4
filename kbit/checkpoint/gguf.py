"""Import a GGUF file: a directory in Hugging Face layout, written one tensor at a time.

Block-quantized tensors are dequantized and stored as float16, which keeps 11 significant bits:
a value d * q (+ m) of 2 to 8 bit codes moves by at most 2^-11 of itself, far below the file's own
step, where bfloat16's 8 bits would move it by up to half a step of Q8_0. Tensors that the file
holds in float are stored without loss: as float16 or bfloat16 where every value fits exactly
(checked), else as float32.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType

from kbit.checkpoint.gguf_config import PlannedTensor, plan_import
from kbit.checkpoint.gguf_file import GGUFFile
from kbit.checkpoint.gguf_tokenizer import import_tokenizer
from kbit.checkpoint.reader import INDEX, SINGLE
from kbit.checkpoint.safetensors import DTYPE_NAMES
from kbit.checkpoint.staging import staged_directory, write_json
from kbit_kernels.errors import KbitError

if TYPE_CHECKING:
    from kbit.quantize.progress import Progress

SHARD_BYTES = 4 << 30
BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


def _ready(rows: np.ndarray, tensor: PlannedTensor) -> np.ndarray:
    """The values that the checkpoint holds, before they are stored."""
    return rows - np.float32(1) if tensor.transform == "minus_one" else rows


def _storage_dtype(file: GGUFFile, tensor: PlannedTensor, exact: bool) -> np.dtype:
    kind = file.tensors[tensor.source].type
    if kind == GGMLQuantizationType.BF16:
        return BF16
    if kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F64):
        return F32 if exact and kind != GGMLQuantizationType.F16 else F16
    candidates = [F16, BF16]
    for rows in file.rows(file.tensors[tensor.source]):
        values = _ready(rows, tensor)
        with np.errstate(over="ignore"):
            candidates = [
                dtype
                for dtype in candidates
                if (values.astype(dtype).astype(values.dtype) == values).all()
            ]
        if not candidates:
            return F32
    return candidates[0]


def _split_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs back apart: rows (2i, 2i+1) of each head become rows i and i + half."""
    half = rows.shape[0] // heads // 2
    paired = rows.reshape(heads, half, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _stored(file: GGUFFile, tensor: PlannedTensor, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensor's values in storage dtype, in pieces, in order."""
    pieces = file.rows(file.tensors[tensor.source])
    if tensor.transform == "rotary":  # the rows of a head must be together
        whole = np.concatenate(list(pieces)).reshape(tensor.shape)
        pieces = iter([_split_halves(whole, tensor.heads)])
    for rows in pieces:
        with np.errstate(over="ignore"):
            values = _ready(rows, tensor).astype(dtype)
        if not np.isfinite(values).all():
            raise KbitError(
                f"{file.path}: tensor {tensor.source!r} holds values beyond {dtype.name}; "
                "the file is damaged"
            )
        yield values


def _write_shard(
    out: BinaryIO,
    file: GGUFFile,
    tensors: list[tuple[PlannedTensor, np.dtype]],
    advance: Callable[[int], None],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor, dtype in tensors:
        end = position + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for tensor, dtype in tensors:
        for values in _stored(file, tensor, dtype):
            out.write(values.tobytes())
            advance(values.nbytes)
    out.flush()
    os.fsync(out.fileno())


def _shards(
    tensors: list[tuple[PlannedTensor, np.dtype]], limit: int
) -> list[list[tuple[PlannedTensor, np.dtype]]]:
    shards: list[list[tuple[PlannedTensor, np.dtype]]] = [[]]
    filled = 0
    for tensor, dtype in tensors:
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append((tensor, dtype))
        filled += nbytes
    return shards


def import_gguf(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    exact: bool = False,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    extra_files: dict[str, Any] | None = None,
) -> Path:
    """Convert a GGUF file into the new directory `out`; returns it.

    Writes config.json, generation_config.json, safetensors, tokenizer.json and
    tokenizer_config.json (and `extra_files`: name -> JSON value). `exact` stores dequantized
    tensors as float32 instead of float16. Some 50 MB of values are in memory at a time (or a whole
    q or k projection of a llama file), beside the vocabulary. The directory appears under its name
    only when complete. Raises KbitError for a file that is damaged or not understood.
    """
    file = GGUFFile(path)
    plan = plan_import(file)
    config = plan.config
    tokenizer = import_tokenizer(file, config["vocab_size"], config["max_position_embeddings"])
    dtypes = [(tensor, _storage_dtype(file, tensor, exact)) for tensor in plan.tensors]
    matrices = [dtype for tensor, dtype in dtypes if len(tensor.shape) == 2]
    config["torch_dtype"] = max(set(matrices), key=matrices.count).name
    for name in ("bos", "eos", "pad"):
        config[f"{name}_token_id"] = tokenizer.token_ids.get(name)
    generation: dict[str, Any] = {
        f"{name}_token_id": index for name, index in tokenizer.token_ids.items() if name != "eos"
    }
    if tokenizer.stop_ids:
        stop = tokenizer.stop_ids
        generation["eos_token_id"] = stop[0] if len(stop) == 1 else stop

    total = sum(math.prod(tensor.shape) * dtype.itemsize for tensor, dtype in dtypes)
    if progress is not None:
        progress.start(total, 0, f"importing {file.path.name}")

    def advance(nbytes: int) -> None:
        if progress is not None:
            progress.advance(nbytes)

    out = Path(out)
    with staged_directory(out) as staging:
        shards = _shards(dtypes, shard_bytes)
        places: dict[str, str] = {}
        for number, tensors in enumerate(shards, 1):
            name = SINGLE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with open(staging / name, "wb") as shard:
                _write_shard(shard, file, tensors, advance)
            places |= {tensor.name: name for tensor, _ in tensors}
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            write_json(staging / INDEX, index)
        files = {
            "config.json": config,
            "generation_config.json": generation,
            "tokenizer_config.json": tokenizer.tokenizer_config,
        } | (extra_files or {})
        write_json(staging / "tokenizer.json", tokenizer.tokenizer, indent=None)
        for name, value in files.items():
            write_json(staging / name, value)
    return out
