"""Write a checkpoint: files laid out in full before the first tensor, filled in any order, renamed.

Sizes of quantized parts follow from spec and shape, so the safetensors headers and every offset
are known from the start. Space is reserved at once (a full disk shows in the first second), workers
write their rows straight to their place, and a killed run leaves a directory whose finished tensors
can be told from the unfinished by their checksums.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kbit.checkpoint.reader import INDEX, SINGLE
from kbit.checkpoint.safetensors import DTYPE_NAMES
from kbit_kernels.errors import KbitError

ALIGNMENT = 64  # bytes, a cache line and an AVX-512 register
MAX_SHARD_BYTES = 4_000_000_000
_HASH_CHUNK_BYTES = 1 << 20
_LARGE_PAGE_BYTES = 2 << 20
_WRITE_BACK_BYTES = 64 << 20

Parts = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # stored name -> dtype, shape


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes: bytes [start, start + nbytes) of a file."""

    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """File sizes and headers by file name, and every stored tensor's place."""

    sizes: Mapping[str, int]
    headers: Mapping[str, bytes]
    places: Mapping[str, Place]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


def plan_layout(tensors: Mapping[str, Parts], max_shard_bytes: int = MAX_SHARD_BYTES) -> Layout:
    """Lay out logical tensors (name -> its parts) over one or more safetensors files, in order.

    The parts of one tensor share a file. Within a file parts of a multiple of 64 bytes come first
    and the others by falling item size, so that everything is aligned although the format allows
    no padding between tensors.
    """
    shards: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for parts in tensors.values():
        size = sum(_nbytes(dtype, shape) for dtype, shape in parts.values())
        if filled and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1].update(parts)
        filled += size
    total = len(shards)
    names = (
        [SINGLE]
        if total == 1
        else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    )
    sizes, headers, places = {}, {}, {}
    for file_name, parts in zip(names, shards, strict=True):
        header, starts, size = _plan_file(parts)
        sizes[file_name], headers[file_name] = size, header
        for stored, start in starts.items():
            places[stored] = Place(file_name, start, _nbytes(*parts[stored]))
    return Layout(sizes, headers, places)


def _nbytes(dtype: np.dtype, shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _plan_file(parts: Parts) -> tuple[bytes, dict[str, int], int]:
    """Header with its length prefix, absolute starts, file size."""

    def rank(stored: str) -> tuple[bool, int]:
        dtype, shape = parts[stored]
        return _nbytes(dtype, shape) % ALIGNMENT != 0, -dtype.itemsize

    relative, position = {}, 0
    for stored in sorted(parts, key=rank):  # stable: the model's order within a rank
        relative[stored] = position
        position += _nbytes(*parts[stored])
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers wants this
    for stored, (dtype, shape) in parts.items():
        start = relative[stored]
        table[stored] = {
            "dtype": DTYPE_NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [start, start + _nbytes(dtype, shape)],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    starts = {stored: start + len(header) for stored, start in relative.items()}
    return header, starts, len(header) + position


class FilledFiles:
    """The safetensors files of a layout, open for writing by place. Thread-safe."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.layout = layout
        self._descriptors: dict[str, int] = {}
        self._large_pages: set[tuple[str, int]] = set()
        self._disk = ThreadPoolExecutor(1)
        self._write_back: Future[None] | None = None
        self._waiting_bytes = 0
        try:
            for name, size in layout.sizes.items():
                descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o666)
                self._descriptors[name] = descriptor
                reserve(descriptor, size)
                self._write_at(name, layout.headers[name], 0)
        except BaseException:
            self.close()
            raise

    def write(self, stored: str, data: np.ndarray, byte_offset: int = 0) -> None:
        """Write an array's bytes into the stored tensor, `byte_offset` bytes from its start."""
        place = self.layout.places[stored]
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        assert byte_offset + raw.nbytes <= place.nbytes, (stored, byte_offset, raw.nbytes, place)
        self._write_at(place.file, raw, place.start + byte_offset)

    def _write_at(self, file: str, data: bytes | memoryview, position: int) -> None:
        last = position + max(len(data), 1) - 1
        for page in range(position // _LARGE_PAGE_BYTES, last // _LARGE_PAGE_BYTES + 1):
            if (file, page) not in self._large_pages:
                self._large_pages.add((file, page))
                make_large_page(self._descriptors[file], page)
        write_at(self._descriptors[file], data, position)

    def sha256(self, stored: str) -> str:
        """Checksum of what the file now holds for the stored tensor."""
        place = self.layout.places[stored]
        digest = hashlib.sha256()
        position, end = place.start, place.start + place.nbytes
        while position < end:
            chunk = os.pread(
                self._descriptors[place.file], min(_HASH_CHUNK_BYTES, end - position), position
            )
            if not chunk:
                break
            digest.update(chunk)
            position += len(chunk)
        return digest.hexdigest()

    def finished(self, stored: Iterable[str]) -> None:
        """Told of stored tensors that are whole: their bytes go to the disk beside the caller's
        work, many at a time, so that `sync` has little left. Not thread-safe."""
        self._waiting_bytes += sum(self.layout.places[name].nbytes for name in stored)
        if self._waiting_bytes < _WRITE_BACK_BYTES:
            return
        if self._write_back and not self._write_back.done():
            return
        self._check_write_back()
        self._waiting_bytes = 0
        self._write_back = self._disk.submit(self._sync_all)

    def sync(self) -> None:
        """Everything is on the disk, or OSError."""
        self._check_write_back()
        self._sync_all()

    def _check_write_back(self) -> None:
        """The kernel tells of a failed write once: one that the other thread heard of counts."""
        if self._write_back:
            self._write_back.result()

    def _sync_all(self) -> None:
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)

    def close(self) -> None:
        self._disk.shutdown()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def reserve(descriptor: int, size: int) -> None:
    """Give the file its size and its disk blocks now; OSError ENOSPC where they don't fit."""
    os.ftruncate(descriptor, size)
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            # A file system that can't reserve (some network mounts) reports a full disk later.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def make_large_page(descriptor: int, page: int) -> None:
    """Have 2 MB of a new file lie in one page of the page cache, where it can hold such.

    A write makes pages no larger than itself, and from small pages a large model decodes by an
    eighth slower until its file is read from the disk again. Reading the zeros that a reserved file
    consists of makes large ones. Only on a disk of this machine: over a network the zeros would
    travel.
    """
    status = os.fstat(descriptor)
    start = page * _LARGE_PAGE_BYTES
    if (
        os.major(status.st_dev) == 0
        or start >= status.st_size
        or not hasattr(mmap, "MADV_HUGEPAGE")
    ):
        return
    nbytes = min(_LARGE_PAGE_BYTES, status.st_size - start)
    with (
        suppress(OSError),  # kernels without large pages refuse
        mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ, offset=start) as mapped,
    ):
        mapped.madvise(mmap.MADV_HUGEPAGE)
        mapped[0]


def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Write everything at the position, however often the kernel takes only a part."""
    view = memoryview(data)
    while view.nbytes:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_index(directory: Path, layout: Layout) -> None:
    """model.safetensors.index.json, where there are several files."""
    if len(layout.sizes) > 1:
        index = {
            "metadata": {"total_size": sum(place.nbytes for place in layout.places.values())},
            "weight_map": {stored: place.file for stored, place in layout.places.items()},
        }
        write_text(directory / INDEX, json.dumps(index, indent=1) + "\n")


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config, licence, ...: every small file that holds
    no weights. config.json, the index and files of weights are left to the caller."""
    copied = []
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or not path.is_file() or path.name.endswith(weights):
            continue
        if path.name == "config.json" or path.name.endswith(".index.json"):
            continue
        shutil.copyfile(path, target / path.name)
        copied.append(path.name)
    return copied


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_replaceable(target: Path, force: bool) -> None:
    """Refuse an existing output, unless `force` and it is a checkpoint directory: `--force` with a
    mistyped path must not delete somebody's files. Raises KbitError."""
    if not os.path.lexists(target):
        return
    if not force:
        raise KbitError(f"{target}: exists already; choose another -o, or --force to replace it")
    if target.is_symlink() or not target.is_dir():
        raise KbitError(f"{target}: is no directory, so --force does not replace it")
    if any(target.iterdir()) and not (target / "config.json").exists():
        raise KbitError(
            f"{target}: holds files but no config.json, so it is no checkpoint and --force does "
            "not replace it"
        )


def publish(work: Path, target: Path, force: bool) -> None:
    """Rename the finished directory to its name in one step; an old one is swapped out whole.

    At every moment the name shows nothing, the old checkpoint, or the new one.
    """
    sync_directory(work)
    check_replaceable(target, force)
    if not target.exists():
        os.rename(work, target)
    else:
        if not _exchange(work, target):
            aside = work.with_name(work.name + ".old")
            os.rename(target, aside)
            os.rename(work, target)
            work = aside
        shutil.rmtree(work, ignore_errors=True)  # now the old checkpoint
    sync_directory(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically (Linux renameat2); False where the system can't."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_cwd, exchange = -100, 2
    return rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0
