"""The hidden directory that a checkpoint grows in: one owner, resumable, renamed when whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

from kbit.checkpoint.writer import check_replaceable, publish
from kbit_kernels.errors import KbitError

JOURNAL = "progress.jsonl"


class WorkDirectory:
    """`.NAME.partial` beside the output NAME, locked by this process.

    The journal's first line says which source and options the work is for; every further line is
    one finished tensor with its checksums. A line is written after the tensor's data, and the
    checksums are held against the data on resuming, so a machine that lost power cannot pass off
    half a tensor as finished.
    """

    path: Path
    done: dict[str, dict[str, str]]  # finished tensors -> stored name -> sha256

    def __init__(self, target: Path, identity: str, force: bool) -> None:
        """Take or create the directory. Raises KbitError if the output exists or another process
        works on it; work for another source or other options is thrown away."""
        self.target = target
        self._force = force
        self.path = target.with_name(f".{target.name}.partial")
        check_replaceable(target, force)
        self._lock = self._take()
        try:
            self.done = self._read_journal(identity)
            if not self.done:
                self._empty()
            self._journal = open(self.path / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115
            if not self.done:
                self._append({"identity": identity})
        except BaseException:
            os.close(self._lock)
            raise

    def _take(self) -> int:
        """Create the directory and lock it. The lock is on the directory itself, so that it moves
        with the rename and leaves no file behind."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.path.mkdir(exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # between mkdir and lock another process may have finished and renamed it
                if os.path.samestat(os.stat(self.path), os.fstat(descriptor)):
                    check_replaceable(self.target, self._force)
                    return descriptor
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                os.close(descriptor)
                raise KbitError(
                    f"{self.target}: another kbit process is writing it; wait for it or choose "
                    "another -o"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            check_replaceable(self.target, self._force)

    def _read_journal(self, identity: str) -> dict[str, dict[str, str]]:
        try:
            lines = (self.path / JOURNAL).read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        done: dict[str, dict[str, str]] = {}
        try:
            if json.loads(lines[0]) != {"identity": identity}:
                return {}
            for line in lines[1:-1]:  # a killed process may leave half a last line
                record = json.loads(line)
                done[record["tensor"]] = record["sha256"]
        except (ValueError, KeyError, TypeError):
            return {}
        if lines[-1]:  # so that the next record starts on a line of its own
            with open(self.path / JOURNAL, "r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        return done

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _append(self, record: dict[str, object]) -> None:
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()

    def record(self, name: str, checksums: dict[str, str]) -> None:
        """Note a finished tensor."""
        self._append({"tensor": name, "sha256": checksums})
        self.done[name] = checksums

    def publish(self) -> None:
        """Give the finished directory its name."""
        self._journal.close()
        (self.path / JOURNAL).unlink()
        publish(self.path, self.target, self._force)
        os.close(self._lock)

    def discard(self) -> None:
        """Remove the directory with all work in it."""
        self._journal.close()
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def leave(self) -> None:
        """Keep the work for the same command to resume."""
        self._journal.close()
        os.close(self._lock)
