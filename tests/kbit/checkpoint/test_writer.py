"""The places of a checkpoint's files are filled in any order and in any pieces."""

import errno
import mmap
import os
import threading
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kbit.checkpoint import writer
from kbit.checkpoint.writer import FilledFiles, plan_layout

PIECES = (0, 1, 4_000_000, 4_000_001, 2 << 20, 5 << 20, (5 << 20) + 77)


def fill(directory: Path) -> None:
    """Writes 5 MB in pieces that begin and end beside pages of 2 MB, the last one first."""
    data = np.random.default_rng(0).integers(0, 256, PIECES[-1], dtype=np.uint8)
    layout = plan_layout({"w": {"w": (data.dtype, data.shape)}, "empty": {"e": (data.dtype, (0,))}})
    with closing(FilledFiles(directory, layout)) as files:
        for start, stop in reversed([*pairwise(sorted(PIECES))]):
            files.write("w", data[start:stop], start)
        files.write("e", data[:0])
    place = layout.places["w"]
    found = (directory / place.file).read_bytes()
    assert found == layout.headers[place.file] + data.tobytes()


def test_pieces_beside_large_pages(tmp_path: Path) -> None:
    fill(tmp_path)


def test_files_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENODEV, "no such device")

    monkeypatch.setattr(mmap, "mmap", refused)
    fill(tmp_path)


def test_a_write_that_failed_in_the_background_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, threads = os.fsync, []

    def failing_once(descriptor: int) -> None:  # as the kernel does
        threads.append(threading.current_thread())
        if len(threads) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(writer, "_WRITE_BACK_BYTES", 4)
    monkeypatch.setattr(os, "fsync", failing_once)
    layout = plan_layout({"w": {"w": (np.dtype(np.uint8), (4,))}})
    with closing(FilledFiles(tmp_path, layout)) as files:
        files.write("w", np.ones(4, np.uint8))
        files.finished(["w"])
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            files.sync()
    assert threads[0] is not threading.current_thread()
