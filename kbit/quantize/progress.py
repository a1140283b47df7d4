"""Progress of a long command: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """What the pipeline tells: bytes of input that are done, and sentences. Thread-safe."""

    def start(self, total_bytes: int, done_bytes: int, title: str) -> None: ...
    def advance(self, count_bytes: int) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class Silent:
    """Tells nothing."""

    def start(self, total_bytes: int, done_bytes: int, title: str) -> None: ...
    def advance(self, count_bytes: int) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class Lines:
    """Plain lines on a stream that is no terminal: at most one in `every_s` seconds."""

    def __init__(self, stream: TextIO, every_s: float = 5.0) -> None:
        self._stream, self._every_s = stream, every_s
        self._lock = threading.Lock()
        self._total = self._done = self._before = 0
        self._began = self._told = time.monotonic()
        self._title = ""

    def start(self, total_bytes: int, done_bytes: int, title: str) -> None:
        self._total, self._done, self._before, self._title = (
            total_bytes,
            done_bytes,
            done_bytes,
            title,
        )
        self._began = self._told = time.monotonic()

    def advance(self, count_bytes: int) -> None:
        with self._lock:
            self._done += count_bytes
            now = time.monotonic()
            if now - self._told < self._every_s:
                return
            self._told = now
            rate = (self._done - self._before) / (now - self._began)
            left_s = (self._total - self._done) / rate
            share = self._done / self._total
            self.note(f"{self._title}: {share:.0%}, {rate / 1e6:.0f} MB/s, {left_s:.0f} s left")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None: ...


class Bar:
    """A rich progress bar with speed and time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=stream),
            transient=True,
        )
        self._task: Any = None

    def start(self, total_bytes: int, done_bytes: int, title: str) -> None:
        self._task = self._progress.add_task(title, total=total_bytes, completed=done_bytes)
        self._progress.start()

    def advance(self, count_bytes: int) -> None:
        self._progress.advance(self._task, count_bytes)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def make_progress(stream: TextIO | None = None) -> Progress:
    """A bar where the stream (standard error) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    return Bar(stream) if stream.isatty() else Lines(stream)
