"""One safetensors file, memory-mapped: header checked to the last byte, tensors as numpy views.

The format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, a JSON
object, the data). The library's numpy mode copies every tensor and has no bfloat16, so the header
is read here; it is also the gate that untrusted files pass through.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kbit_kernels.errors import KbitError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 48  # keeps shape arithmetic far from overflow, also where a dimension is 0


@dataclass(frozen=True)
class Entry:
    """Where one stored tensor lies: dtype name, shape, byte range [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """JSON object from bytes; `what` names it in the error. Repeated keys are refused."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            keys = [key for key, _ in items]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {repeated!r} stands there twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise KbitError(f"{what} is no valid JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise KbitError(f"{what} is no JSON object but a {type(value).__name__}")
    return value


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _entry(name: str, value: object, data_start: int, data_bytes: int, path: Path) -> Entry:
    def bad(reason: str) -> KbitError:
        return KbitError(f"{path}: tensor {name!r} in the header {reason}; the file is damaged")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad("has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise KbitError(
            f"{path}: tensor {name!r} has the data type {dtype!r}; known are {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise bad(f"has the shape {str(shape)[:80]}, which is no list of up to 8 sizes")
    if math.prod(size for size in shape if size) > MAX_ELEMENTS:
        raise bad(f"has the impossible shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise bad(f"has the data_offsets {str(offsets)[:80]}, which are no two positions")
    start, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != expected:
        raise bad(
            f"has the shape {shape} of {dtype} ({expected} bytes) but {end - start} bytes of data"
        )
    if end > data_bytes:
        raise KbitError(
            f"{path}: tensor {name!r} ends at byte {data_start + end}, but the file has only "
            f"{data_start + data_bytes}; it is truncated, fetch it again"
        )
    return Entry(dtype, tuple(shape), data_start + start, data_start + end)


class SafetensorsFile:
    """A read-only, memory-mapped safetensors file.

    Raises KbitError, naming the file and the tensor, for a header that does not describe exactly
    the bytes that follow it: lengths, dtypes, shapes, offsets, overlaps, holes, trailing bytes.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    header: bytes  # the raw header with its length prefix

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                length = int.from_bytes(prefix, "little")
                if size == 0:
                    raise KbitError(f"{self.path}: is empty; fetch it again")
                if len(prefix) < 8 or length > size - 8:
                    raise KbitError(
                        f"{self.path}: the header should be {length} bytes, but the file has "
                        f"{size}; it is truncated or no safetensors file"
                    )
                if length > MAX_HEADER_BYTES:
                    raise KbitError(
                        f"{self.path}: the header claims {length} bytes, more than the "
                        f"{MAX_HEADER_BYTES} the format allows; the file is damaged"
                    )
                text = file.read(length)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    # a file that is read now lies in pages of 2 MB where its file system has them:
                    # a decode step reads 5 to 20 % faster; kernels without them refuse
                    with suppress(OSError):
                        self._map.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            raise KbitError(f"{self.path}: cannot be read ({error.strerror})") from None
        self.header = prefix + text
        self._read_header(text, data_start=8 + length, data_bytes=size - 8 - length)

    def _read_header(self, text: bytes, data_start: int, data_bytes: int) -> None:
        header = parse_json_object(text, f"{self.path}: the header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise KbitError(f"{self.path}: __metadata__ in the header is no table of strings")
        self.metadata = metadata
        self.entries = {
            name: _entry(name, value, data_start, data_bytes, self.path)
            for name, value in header.items()
        }
        position = data_start
        for name, entry in sorted(
            self.entries.items(), key=lambda item: (item[1].start, item[1].end)
        ):
            if entry.start != position:
                what = (
                    "overlaps the tensor before it" if entry.start < position else "leaves a hole"
                )
                raise KbitError(
                    f"{self.path}: tensor {name!r} {what} (starts at byte {entry.start}, expected "
                    f"{position}); the file is damaged"
                )
            position = entry.end
        if position != data_start + data_bytes:
            raise KbitError(
                f"{self.path}: the header describes {position} bytes, but the file has "
                f"{data_start + data_bytes}; the file is damaged"
            )

    def tensor(self, name: str) -> np.ndarray:
        """Read-only view of the mapped file (a copy only where the data is misaligned)."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        count = math.prod(entry.shape)
        array = np.frombuffer(self._map, dtype, count, entry.start).reshape(entry.shape)
        if entry.start % dtype.itemsize:  # the mapping starts on a page, so the offset decides
            array = array.copy()
            array.flags.writeable = False
        return array

    def data(self, name: str) -> memoryview:
        """The tensor's raw bytes."""
        entry = self.entries[name]
        return memoryview(self._map)[entry.start : entry.end]

    def release(self, name: str) -> None:
        """Drop the tensor's pages from this process's memory; reading it again maps them anew."""
        entry = self.entries[name]
        page = mmap.PAGESIZE
        start = -(-entry.start // page) * page  # whole pages only, the edges belong to neighbours
        length = entry.end // page * page - start
        if length > 0 and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, start, length)
