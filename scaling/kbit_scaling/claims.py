"""Which cells a sweep is measuring, so that another sweep of the same store leaves them to it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from pathlib import Path


class Claims:
    """A claim is a lock on one byte of a file beside the store. The system drops it when its
    process ends, however that happens.

    These locks belong to a process, and closing any descriptor of the file drops them all: one
    `Claims` for a store in a process.
    """

    def __init__(self, store: Path) -> None:
        store.parent.mkdir(parents=True, exist_ok=True)
        self._file = store.with_name(store.name + ".lock").open("ab")

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def take(self, cells: Iterable[str]) -> bool:
        """Claims all of the cells, or none if another process has one of them."""
        taken: list[str] = []
        for cell in cells:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(cell))
            except (BlockingIOError, PermissionError):
                self.drop(taken)
                return False
            taken.append(cell)
        return True

    def drop(self, cells: Iterable[str]) -> None:
        """Gives claims back."""
        for cell in cells:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _byte(cell))

    def wait(self, cell: str) -> None:
        """Returns when no other process claims the cell. To be called without claims of one's own:
        two sweeps could wait for each other."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _byte(cell))
        self.drop([cell])


def _byte(cell: str) -> int:
    return int(cell[:15], 16)  # 60 bits: an offset that a file can have
