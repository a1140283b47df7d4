"""What a kbit checkpoint's config.json says about its tensors, and how their parts are named.

    "quantization_config": {
        "quant_method": "kbit", "format_version": 1, "method": "rtn", "kbit_version": "0.1.0",
        "tensors": {"model.layers.0.mlp.up_proj.weight": {
            "spec": "nf4-b64", "shape": [N, K], "transposed": false,
            "sha256": {"codes": "...", "scales": "..."}}},
        "kept": {"model.norm.weight": {"dtype": "BF16", "shape": [N], "sha256": "..."}},
        "headers": {"model.safetensors": "sha256 of the file's header"},
        "sha256": "of this block without this line, as JSON with sorted keys and no spaces"
    }

A quantized `X.weight` is stored as the tensors `X.weight.codes`, `X.weight.scales`, ... (the
suffixes of `kbit_kernels.tensor.expected_parts`). `shape` is [out, in]; `transposed` says that the
source stored [in, out] (GPT-2's Conv1D). Every stored tensor and every file header carries a
sha256: the processor has instructions for it (2 GB/s here, more than quantizing reads), it also
proves a download whole, and `sha256sum` can check it without kbit. The block has its own, because
a changed digit can turn one valid spec into another with parts of the same sizes. Damage to
headers and block shows at open, damage to the data in `kbit verify`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kbit.checkpoint.safetensors import DTYPES, MAX_ELEMENTS, SafetensorsFile
from kbit_kernels.errors import KbitError
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import expected_parts

QUANT_METHOD = "kbit"
FORMAT_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


def part_name(name: str, suffix: str) -> str:
    """Stored name of one part of a quantized tensor."""
    return f"{name}.{suffix}"


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class QuantizedEntry:
    """One quantized tensor: shape is [out, in], sha256 maps each part's suffix to its checksum."""

    spec: QuantSpec
    shape: tuple[int, int]
    transposed: bool
    sha256: Mapping[str, str]

    def parts(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """dtype and shape of every part by suffix."""
        return expected_parts(self.spec, self.shape)


@dataclass(frozen=True)
class KeptEntry:
    """One tensor stored as it was: dtype is the safetensors name."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Quantization:
    """The whole block. `tensors` and `kept` name every logical tensor exactly once."""

    method: str
    kbit_version: str
    tensors: Mapping[str, QuantizedEntry]
    kept: Mapping[str, KeptEntry]
    headers: Mapping[str, str]  # file name -> sha256 of the safetensors header, length included
    intact: bool = True  # the block fits its own checksum
    extra: Mapping[str, Any] = field(default_factory=dict)  # the method's own options, for people

    def to_json(self) -> dict[str, Any]:
        block = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "kbit_version": self.kbit_version,
            **self.extra,
            "tensors": {
                name: {
                    "spec": str(entry.spec),
                    "shape": list(entry.shape),
                    "transposed": entry.transposed,
                    "sha256": dict(entry.sha256),
                }
                for name, entry in self.tensors.items()
            },
            "kept": {
                name: {"dtype": entry.dtype, "shape": list(entry.shape), "sha256": entry.sha256}
                for name, entry in self.kept.items()
            },
            "headers": dict(self.headers),
        }
        return {**block, "sha256": _block_sha256(block)}


def _block_sha256(block: Mapping[str, Any]) -> str:
    told = {key: value for key, value in block.items() if key != "sha256"}
    return sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode())


class _Table:
    """A JSON object read field by field; every complaint names where it stands."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise KbitError(f"{where} is {_short(value)}, but should be a table")
        self.value: dict[str, Any] = value
        self.where = where

    def get(self, key: str, kind: type) -> Any:
        value = self.value.get(key)
        if type(value) is not kind:
            raise KbitError(f"{self.where}: {key} is {_short(value)}, no {kind.__name__}")
        return value

    def shape(self) -> tuple[int, ...]:
        value = self.get("shape", list)
        count = 1
        for size in value:
            if type(size) is not int or not 0 <= size <= MAX_ELEMENTS:
                raise KbitError(f"{self.where}: the shape is {_short(value)}, no list of sizes")
            count *= max(size, 1)
        if count > MAX_ELEMENTS:
            raise KbitError(f"{self.where}: the shape {_short(value)} is impossibly large")
        return tuple(value)

    def sha256(self, key: str) -> str:
        value = self.get(key, str)
        if not _SHA256.fullmatch(value):
            raise KbitError(f"{self.where}: {key} is {_short(value)}, no sha256")
        return value


def _short(value: object) -> str:
    text = repr(value) if value is not None else "missing"
    return text if len(text) <= 60 else text[:57] + "..."


def read_quantization(config: Mapping[str, Any], where: str) -> Quantization | None:
    """The block of a config.json; None for a plain checkpoint.

    `where` names the file in errors. Raises KbitError for a block of another quantizer, an unknown
    format version, and anything that does not fit the layout above.
    """
    block = config.get("quantization_config")
    if block is None:
        return None
    top = _Table(block, f"{where}: quantization_config")
    if top.value.get("quant_method") != QUANT_METHOD:
        raise KbitError(
            f"{where}: the model is quantized by {_short(top.value.get('quant_method'))}, which "
            "kbit does not read; take the unquantized model"
        )
    version = top.value.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise KbitError(
            f"{where}: has kbit format version {_short(version)}, but this kbit reads only "
            f"{FORMAT_VERSION}; quantize the model again or change the kbit version"
        )
    tensors: dict[str, QuantizedEntry] = {}
    for name, value in top.get("tensors", dict).items():
        table = _Table(value, f"{where}: tensor {name!r}")
        shape = table.shape()
        if len(shape) != 2 or 0 in shape:
            raise KbitError(f"{table.where}: the shape is {list(shape)}, no [out, in]")
        try:
            spec = QuantSpec.parse(table.get("spec", str))
        except KbitError as error:
            raise KbitError(f"{table.where}: {error}") from None
        sums = _Table(table.get("sha256", dict), f"{table.where}: sha256")
        checksums = {suffix: sums.sha256(suffix) for suffix in sums.value}
        entry = QuantizedEntry(spec, (shape[0], shape[1]), table.get("transposed", bool), checksums)
        if set(checksums) != set(entry.parts()):
            raise KbitError(
                f"{table.where}: has checksums of {sorted(checksums)}, but {spec} has the parts "
                f"{sorted(entry.parts())}"
            )
        tensors[name] = entry
    kept: dict[str, KeptEntry] = {}
    for name, value in top.get("kept", dict).items():
        table = _Table(value, f"{where}: tensor {name!r}")
        if name in tensors:
            raise KbitError(f"{table.where}: is listed as quantized and as kept")
        kept[name] = KeptEntry(table.get("dtype", str), table.shape(), table.sha256("sha256"))
    headers = _Table(top.get("headers", dict), f"{where}: headers")
    return Quantization(
        method=top.get("method", str),
        kbit_version=top.get("kbit_version", str),
        tensors=tensors,
        kept=kept,
        headers={name: headers.sha256(name) for name in headers.value},
        intact=top.sha256("sha256") == _block_sha256(top.value),
    )


def check_files(
    quantization: Quantization, files: Mapping[str, SafetensorsFile], where: Path
) -> dict[str, SafetensorsFile]:
    """Hold every stored name, dtype and shape against the block; the file of each stored name.

    Raises KbitError that names the tensor and what differs. Reads headers only.
    """
    wanted: dict[str, tuple[str, np.dtype, tuple[int, ...]]] = {}
    for name, entry in quantization.tensors.items():
        for suffix, (dtype, shape) in entry.parts().items():
            wanted[part_name(name, suffix)] = (name, np.dtype(dtype), tuple(shape))
    for name, kept in quantization.kept.items():
        if kept.dtype not in DTYPES:
            raise KbitError(f"{where}: tensor {name!r} has the unknown data type {kept.dtype!r}")
        if name in wanted:
            raise KbitError(f"{where}: tensor {name!r} is also a part of {wanted[name][0]!r}")
        wanted[name] = (name, DTYPES[kept.dtype], kept.shape)
    stored: dict[str, SafetensorsFile] = {}
    for file_name, file in files.items():
        for part, found in file.entries.items():
            if part not in wanted:
                raise KbitError(f"{file.path}: holds {part!r}, which config.json does not list")
            if part in stored:
                raise KbitError(f"{file.path}: holds {part!r}, as does {stored[part].path.name}")
            name, dtype, shape = wanted[part]
            if (DTYPES[found.dtype], found.shape) != (dtype, shape):
                raise KbitError(
                    f"{file.path}: {part!r} is {found.dtype} {list(found.shape)}, but by "
                    f"config.json it is {dtype.name} {list(shape)}; the checkpoint is damaged"
                )
            stored[part] = file
        if file_name not in quantization.headers:
            raise KbitError(f"{where}: config.json lists no header checksum of {file_name}")
        if sha256(file.header) != quantization.headers[file_name]:
            raise KbitError(f"{file.path}: the header fails its checksum; the file is damaged")
    for part in wanted:
        if part not in stored:
            raise KbitError(f"{where}: {part!r} is missing, which config.json lists")
    for file_name in quantization.headers:
        if file_name not in files:
            raise KbitError(f"{where}: {file_name} is missing, which config.json lists")
    if not quantization.intact:  # last: what is above says more
        raise KbitError(
            f"{where}: quantization_config in config.json fails its checksum; the file is damaged"
        )
    return stored
