"""Hold a checkpoint's data against its checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kbit.checkpoint.format import part_name
from kbit.checkpoint.reader import Checkpoint

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Damage:
    """A stored tensor whose bytes are not those that were written."""

    tensor: str  # logical name
    stored: str  # the part
    file: str
    expected: str  # sha256
    found: str


def verify_checkpoint(
    checkpoint: Checkpoint, threads: int = 1, advance: Callable[[int], None] = lambda _: None
) -> list[Damage]:
    """Every damaged part of a kbit checkpoint, in order; [] if all is well.

    `checkpoint.block` must be there (a plain checkpoint carries no checksums). Names, dtypes,
    shapes and headers were checked when it was opened. `advance` is told the bytes read.
    """
    block = checkpoint.block
    assert block is not None, "a plain checkpoint has no checksums"
    expected: dict[str, tuple[str, str]] = {
        name: (name, kept.sha256) for name, kept in block.kept.items()
    }
    for name, entry in block.tensors.items():
        for suffix, digest in entry.sha256.items():
            expected[part_name(name, suffix)] = (name, digest)

    def check(stored: str) -> Damage | None:
        name, digest = expected[stored]
        data, found = checkpoint.data(stored), hashlib.sha256()
        for start in range(0, data.nbytes, _CHUNK_BYTES):
            found.update(data[start : start + _CHUNK_BYTES])
        checkpoint.release_stored(stored)
        advance(data.nbytes)
        if found.hexdigest() == digest:
            return None
        file = checkpoint.file_of(stored).name
        return Damage(name, stored, file, digest, found.hexdigest())

    with ThreadPoolExecutor(threads) as pool:
        return [damage for damage in pool.map(check, expected) if damage is not None]
