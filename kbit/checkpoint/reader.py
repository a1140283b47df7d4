"""Open a checkpoint directory: plain Hugging Face safetensors or a kbit checkpoint, one class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from kbit.checkpoint.format import Quantization, check_files, part_name, read_quantization
from kbit.checkpoint.safetensors import DTYPES, Entry, SafetensorsFile, parse_json_object
from kbit_kernels.errors import KbitError
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import QuantizedTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; KbitError names the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise KbitError(
                f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB, no checkpoint's JSON"
            )
        data = path.read_bytes()
    except OSError as error:
        raise KbitError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json_object(data, str(path))


class Checkpoint:
    """A checkpoint directory, read through memory mapping; made by `open_checkpoint`.

    Names are logical: a quantized `X.weight` counts once, though it is stored as `X.weight.codes`,
    `X.weight.scales`, ... Tensors are read-only views, bfloat16 as `ml_dtypes.bfloat16`.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    quantization: dict[str, Any] | None  # config.json's quantization_config of a kbit checkpoint
    block: Quantization | None  # the same, parsed and checked
    files: dict[str, SafetensorsFile]  # by file name, in the order of the shards

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        # Before any file of weights, so that an unknown version is called that and not damage.
        self.block = read_quantization(self.config, str(path / "config.json"))
        self.quantization = self.config["quantization_config"] if self.block else None
        self.files, self._stored = _open_files(path)
        if self.block:
            self._stored = check_files(self.block, self.files, path)
        self._quantized = self.block.tensors if self.block else {}
        owner = {part: name for name in self._quantized for part in self.stored_names(name)}
        # an index may list a tensor's parts in any order: dict.fromkeys keeps the first place
        self._names = dict.fromkeys(owner.get(stored, stored) for stored in self._stored)

    def names(self) -> list[str]:
        """Logical tensor names in the order of the files."""
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def stored_names(self, name: str) -> list[str]:
        """The safetensors names that store a logical tensor: itself, or its parts."""
        if name in self._quantized:
            return [part_name(name, suffix) for suffix in self._quantized[name].parts()]
        return [name]

    def _file(self, stored: str) -> SafetensorsFile:
        try:
            return self._stored[stored]
        except KeyError:
            raise KbitError(f"{self.path}: has no tensor {stored!r}") from None

    def entry(self, stored: str) -> Entry:
        """Where a stored tensor (or part) lies in its file."""
        return self._file(stored).entries[stored]

    def data(self, stored: str) -> memoryview:
        """The raw bytes of a stored tensor (or part)."""
        return self._file(stored).data(stored)

    def tensor(self, name: str) -> np.ndarray | QuantizedTensor:
        """The tensor as read-only views of the file; KbitError for an unknown name.

        A quantized tensor is [out, in], also where the source stored [in, out].
        """
        entry = self._quantized.get(name)
        if entry is None:
            return self._file(name).tensor(name)
        stored = {suffix: part_name(name, suffix) for suffix in entry.parts()}
        parts = {suffix: self._file(part).tensor(part) for suffix, part in stored.items()}
        try:
            return QuantizedTensor.from_parts(entry.spec, entry.shape, parts)
        except KbitError as error:
            raise KbitError(f"{self.path}: tensor {name!r}: {error}") from None

    def spec(self, name: str) -> QuantSpec | None:
        """How the tensor is quantized; None for a plain one."""
        if name in self._quantized:
            return self._quantized[name].spec
        self._file(name)
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape (of a quantized tensor: [out, in])."""
        return self._quantized[name].shape if name in self._quantized else self.entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        """dtype of a plain tensor."""
        return DTYPES[self.entry(name).dtype]

    def nbytes(self, name: str) -> int:
        """Bytes the tensor takes in the files, all its parts together."""
        return sum(self.entry(stored).nbytes for stored in self.stored_names(name))

    def release(self, name: str) -> None:
        """Drop the tensor's pages from this process's memory (see SafetensorsFile.release)."""
        for stored in self.stored_names(name):
            self.release_stored(stored)

    def release_stored(self, stored: str) -> None:
        """The same for one stored tensor (or part)."""
        self._file(stored).release(stored)

    def file_of(self, stored: str) -> Path:
        """The file that holds a stored tensor (or part)."""
        return self._file(stored).path


def _open_files(path: Path) -> tuple[dict[str, SafetensorsFile], dict[str, SafetensorsFile]]:
    """The directory's safetensors files by file name, and the file of every stored tensor."""
    if (path / SINGLE).exists():
        file = SafetensorsFile(path / SINGLE)
        return {SINGLE: file}, dict.fromkeys(file.entries, file)
    index_path = path / INDEX
    if not index_path.exists():
        others = [p.name for p in sorted(path.iterdir()) if p.suffix in (".bin", ".pt", ".gguf")]
        hint = f" (it holds {others[0]}, which has to be converted first)" if others else ""
        raise KbitError(f"{path}: has neither {SINGLE} nor {INDEX}{hint}")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise KbitError(f"{index_path}: has no weight_map from tensor names to files")
    for name, file_name in weight_map.items():
        # A path that leaves the directory could make kbit read any file of the machine.
        if (
            not isinstance(file_name, str)
            or os.path.basename(file_name) != file_name
            or not file_name
        ):
            raise KbitError(f"{index_path}: tensor {name!r} points to {file_name!r}, no file name")
    files: dict[str, SafetensorsFile] = {}
    for file_name in sorted(set(weight_map.values())):
        if not (path / file_name).exists():
            count = sum(value == file_name for value in weight_map.values())
            raise KbitError(
                f"{path}: the shard {file_name} is missing, which holds {count} of the model's "
                f"{len(weight_map)} tensors; fetch the model again"
            )
        files[file_name] = SafetensorsFile(path / file_name)
    stored: dict[str, SafetensorsFile] = {}
    for name, file_name in weight_map.items():
        if name not in files[file_name].entries:
            raise KbitError(f"{path}: {file_name} lacks tensor {name!r}, which {INDEX} puts there")
        stored[name] = files[file_name]
    return files, stored


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint directory for reading; nothing but headers is read yet.

    Raises KbitError in one sentence for a missing path, a directory without config.json, a missing
    shard, and any header that does not fit its file.
    """
    directory = Path(path)
    if not directory.exists():
        raise KbitError(f"{directory}: no such directory")
    if not directory.is_dir():
        raise KbitError(f"{directory}: is a file, but a checkpoint is a directory with config.json")
    if not (directory / "config.json").exists():
        raise KbitError(f"{directory}: has no config.json, so it is no checkpoint directory")
    return Checkpoint(directory)
