"""A directory that appears under its name only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kbit_kernels.errors import KbitError


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its name at the end, or vanishes.

    The caller syncs the files it writes; the directory's own entry is synced here. Raises
    KbitError where `out` exists, the place cannot be written, or the disk is full.
    """
    if out.exists() or out.is_symlink():
        raise KbitError(f"{out}: exists already; remove it or choose another output")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise KbitError(f"{out.parent}: cannot be written ({error.strerror})") from None
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp makes it private
        os.rename(staging, out)
        sync_directory(out.parent)
    except OSError as error:
        raise KbitError(
            f"{out}: could not be written ({error.strerror or error}); nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Make the directory's entries (a rename in it) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """A synced JSON file; large ones without indentation, for which Python's encoder is slow."""
    with open(path, "w", encoding="utf-8") as out:
        out.write(json.dumps(value, ensure_ascii=False, indent=indent) + "\n")
        out.flush()
        os.fsync(out.fileno())
