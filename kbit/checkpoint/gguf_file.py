"""One GGUF file, memory-mapped: header checked to the last byte, tensors as numpy arrays.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf library's reader
takes 16 s for a vocabulary of 262,144 (one numpy object a string) and follows hostile counts and
lengths off the end of the file, so the header is read here; type tables and dequantization are
the library's.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from kbit_kernels.errors import KbitError

MAX_DIMENSIONS = 4  # ggml's own limit
MAX_KEY_BYTES = 65_535  # the specification's limit
MAX_NAME_BYTES = 64
CHUNK_ELEMENTS = 1 << 22  # dequantized at a time: 16 MB of float32

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
PLAIN: dict[GGMLQuantizationType, np.dtype] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.F64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: shape in numpy order (rows first), ggml type, byte range."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes


class _Cursor:
    """Reads forward through the mapping; every length is held against what is left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position, self.size = path, data, 0, len(data)

    def truncated(self, what: str) -> KbitError:
        return KbitError(
            f"{self.path}: {what} at byte {self.position} reaches beyond the end of the file "
            f"({self.size} bytes); it is truncated or damaged, fetch it again"
        )

    def scalar(self, layout: str, what: str) -> Any:
        size = struct.calcsize(layout)
        if self.position + size > self.size:
            raise self.truncated(what)
        (value,) = struct.unpack_from(layout, self.data, self.position)
        self.position += size
        return value

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.scalar("<Q", what)
        end = self.position + length
        if end > self.size or (limit is not None and length > limit):
            raise self.truncated(f"{what} of {length} bytes")
        raw = self.data[self.position : end]
        self.position = end
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise KbitError(
                f"{self.path}: {what} before byte {end} is no UTF-8; the file is damaged"
            ) from None

    def value(self, kind: int, what: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text(what)
        if kind == GGUFValueType.ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise KbitError(f"{self.path}: {what} has the unknown type {kind}; the file is damaged")
        return self.scalar(_SCALARS[GGUFValueType(kind)], what)

    def array(self, what: str) -> list[str] | np.ndarray:
        """A list of strings, or a numpy array of numbers (a view of the file)."""
        kind, count = self.scalar("<I", what), self.scalar("<Q", what)
        if kind == GGUFValueType.STRING:
            if count > (self.size - self.position) // 8:  # a string takes at least its length
                raise self.truncated(f"{what} of {count} strings")
            return [self.text(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise KbitError(
                f"{self.path}: {what} is an array of the unsupported type {kind}; "
                "the file is damaged or newer than this reader"
            )
        dtype = np.dtype(_SCALARS[GGUFValueType(kind)])
        if count > (self.size - self.position) // dtype.itemsize:
            raise self.truncated(f"{what} of {count} numbers")
        values = np.frombuffer(self.data, dtype, count, self.position)
        self.position += values.nbytes
        return values


class GGUFFile:
    """A read-only, memory-mapped GGUF file (versions 2 and 3, little-endian).

    `metadata` maps keys to str, int, float, bool, list[str] or numpy arrays; `tensors` maps names
    to GGUFTensor. Raises KbitError, naming the file and the place, for a header that does not
    describe bytes which are there; nothing is allocated on the word of a length in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                magic = file.read(8)
                if magic[:4] != b"GGUF":
                    raise KbitError(f"{self.path}: is no GGUF file (it does not begin with GGUF)")
                if len(magic) < 8:
                    raise KbitError(f"{self.path}: ends after {len(magic)} bytes; fetch it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise KbitError(f"{self.path}: cannot be read ({error.strerror})") from None
        version = int.from_bytes(magic[4:], "little")
        if version not in (2, 3):
            big = int.from_bytes(magic[4:], "big") in (2, 3)
            found = "a big-endian file" if big else f"version {version}"
            raise KbitError(
                f"{self.path}: is GGUF, but {found}; little-endian versions 2 and 3 are supported"
            )
        self._read_header()

    def _read_header(self) -> None:
        cursor = _Cursor(self.path, self._map)
        cursor.position = 8
        tensor_count = cursor.scalar("<Q", "the tensor count")
        key_count = cursor.scalar("<Q", "the key count")
        if max(tensor_count, key_count) > cursor.size // 12:  # the least bytes an entry takes
            raise KbitError(
                f"{self.path}: claims {tensor_count} tensors and {key_count} keys in "
                f"{cursor.size} bytes; the file is damaged"
            )
        self.metadata = {}
        for _ in range(key_count):
            key = cursor.text("a key", MAX_KEY_BYTES)
            if key in self.metadata:
                raise KbitError(f"{self.path}: the key {key[:60]!r} stands there twice")
            kind = cursor.scalar("<I", f"the type of {key[:60]!r}")
            self.metadata[key] = cursor.value(kind, f"the value of {key[:60]!r}")
        raw = [self._tensor_info(cursor) for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise KbitError(f"{self.path}: general.alignment is {alignment!r}, no sensible size")
        data_start = -(-cursor.position // alignment) * alignment
        self.tensors = {}
        for name, shape, kind, offset in raw:
            if name in self.tensors:
                raise KbitError(f"{self.path}: the tensor {name!r} stands there twice")
            self.tensors[name] = self._place(name, shape, kind, data_start + offset)
        position = data_start
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.start):
            if tensor.start < position:
                raise KbitError(
                    f"{self.path}: tensor {tensor.name!r} overlaps its neighbour; "
                    "the file is damaged"
                )
            position = tensor.start + tensor.nbytes

    def _tensor_info(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.text("a tensor name", MAX_NAME_BYTES)
        what = f"the description of tensor {name!r}"
        dimensions = cursor.scalar("<I", what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise KbitError(f"{self.path}: tensor {name!r} has {dimensions} dimensions; 1 to 4 can")
        shape = tuple(cursor.scalar("<Q", what) for _ in range(dimensions))[::-1]
        return name, shape, cursor.scalar("<I", what), cursor.scalar("<Q", what)

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GGUFTensor:
        try:
            ggml_type = GGMLQuantizationType(kind)
        except ValueError:
            raise KbitError(
                f"{self.path}: tensor {name!r} has the unknown ggml type {kind}; a newer gguf "
                "library may know it"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        if min(shape) < 1 or shape[-1] % block:
            raise KbitError(
                f"{self.path}: tensor {name!r} has the shape {list(shape)}, which {ggml_type.name} "
                f"(blocks of {block}) cannot have; the file is damaged"
            )
        nbytes = math.prod(shape) // block * block_bytes
        if start + nbytes > len(self._map):
            raise KbitError(
                f"{self.path}: tensor {name!r} ends at byte {start + nbytes}, but the file has "
                f"only {len(self._map)}; it is truncated, fetch it again"
            )
        return GGUFTensor(name, shape, ggml_type, start, nbytes)

    def rows(self, tensor: GGUFTensor) -> Iterator[np.ndarray]:
        """The tensor as [rows, columns] arrays of some 4 million values, in order.

        Plain types keep their dtype (F32, F16, F64), everything else is dequantized to float32.
        Raises KbitError for a type the library cannot dequantize, and for NaN and infinities.
        """
        from gguf.quants import dequantize

        columns = tensor.shape[-1]
        count = math.prod(tensor.shape[:-1])
        step = max(1, CHUNK_ELEMENTS // columns)
        dtype = PLAIN.get(tensor.type)
        for first in range(0, count, step):
            number = min(step, count - first)
            start = tensor.start + first * tensor.row_bytes
            if dtype is not None:
                part = np.frombuffer(self._map, dtype, number * columns, start)
            else:
                raw = np.frombuffer(self._map, np.uint8, number * tensor.row_bytes, start)
                try:
                    with np.errstate(all="ignore"):  # what overflowed is refused below
                        part = dequantize(raw.reshape(number, -1), tensor.type)
                except NotImplementedError:
                    raise KbitError(
                        f"{self.path}: tensor {tensor.name!r} is stored as {tensor.type.name}, "
                        "which the gguf library cannot dequantize"
                    ) from None
            if not np.isfinite(part).all():
                raise KbitError(
                    f"{self.path}: tensor {tensor.name!r} holds NaN or infinity; "
                    "the file is damaged, fetch it again"
                )
            yield part.reshape(number, columns)
            self._release(start, start + number * tensor.row_bytes)

    def array(self, name: str) -> np.ndarray:
        """A whole (small) tensor in its shape, as `rows` gives it."""
        tensor = self.tensors[name]
        return np.concatenate(list(self.rows(tensor))).reshape(tensor.shape)

    def _release(self, start: int, end: int) -> None:
        """Drop pages from this process's memory; reading them again maps them anew."""
        page = mmap.PAGESIZE
        start = -(-start // page) * page  # whole pages only, the edges belong to neighbours
        length = end // page * page - start
        if length > 0 and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, start, length)
