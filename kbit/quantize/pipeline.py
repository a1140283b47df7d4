"""Run a plan: tensors in pieces of rows over threads, straight into their place in the output."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import kbit
from kbit.checkpoint.format import (
    KeptEntry,
    Quantization,
    QuantizedEntry,
    part_name,
    sha256,
)
from kbit.checkpoint.reader import Checkpoint
from kbit.checkpoint.writer import (
    FilledFiles,
    Layout,
    copy_side_files,
    write_index,
    write_text,
)
from kbit.quantize.methods import get_method
from kbit.quantize.plan import Plan, Task, is_float
from kbit.quantize.progress import Progress
from kbit.quantize.workdir import WorkDirectory
from kbit_kernels import cpu
from kbit_kernels.cpu import library
from kbit_kernels.errors import KbitError
from kbit_kernels.tensor import expected_parts

# numpy's temporaries take some 40 bytes a weight: all threads together stay below 400 MB
_ELEMENTS_IN_FLIGHT = 8 << 20
_MAX_PIECE_ELEMENTS = 1 << 20
_MIN_PIECE_ELEMENTS = 1 << 16


@dataclass
class _Open:
    """A tensor being worked on: pieces not finished yet, and what its method learned of it."""

    task: Task
    left: int
    matrix: np.ndarray | None = None  # read once: a misaligned file gives a copy each time
    prepared: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a tensor; a kept tensor counts bytes instead of rows."""

    tensor: _Open
    start: int
    stop: int

    @property
    def source_bytes(self) -> int:
        task = self.tensor.task
        rows = task.source_bytes if task.spec is None else task.shape[0]
        return task.source_bytes * (self.stop - self.start) // max(rows, 1)


class Pipeline:
    """One run of a plan into a work directory.

    Threads, not processes: numpy releases the interpreter lock in everything that takes time here
    (1.9x on 2 cores), and nothing has to be copied between processes.
    """

    def __init__(
        self,
        source: Checkpoint,
        plan: Plan,
        layout: Layout,
        work: WorkDirectory,
        threads: int,
        progress: Progress,
    ) -> None:
        self.source, self.plan, self.layout, self.work = source, plan, layout, work
        self.threads, self.progress = threads, progress
        self._method = get_method(plan.method)
        # A matrix that is not cut into rows needs its own size several times over.
        self._whole = threading.Lock()
        self._stop = threading.Event()

    def run(self) -> int:
        """Quantize everything that is not done yet and write config and side files; how many
        tensors were taken over from an earlier run."""
        files = FilledFiles(self.work.path, self.layout)
        try:
            reused = self._check_done(files)
            done_bytes = sum(t.source_bytes for t in self.plan.tasks if t.name in self.work.done)
            self.progress.start(self.plan.source_bytes, done_bytes, "quantizing")
            self._run_tasks(files)
            files.sync()
        finally:
            files.close()
        copy_side_files(self.source.path, self.work.path)
        write_index(self.work.path, self.layout)
        config = {**self.source.config, "quantization_config": self._quantization().to_json()}
        write_text(self.work.path / "config.json", json.dumps(config, indent=1) + "\n")
        return reused

    def _check_done(self, files: FilledFiles) -> int:
        """Forget finished tensors whose data is not what was recorded."""
        for name, checksums in list(self.work.done.items()):
            if any(files.sha256(stored) != digest for stored, digest in checksums.items()):
                del self.work.done[name]
        return len(self.work.done)

    def _run_tasks(self, files: FilledFiles) -> None:
        pieces = self._pieces()
        running: dict[Future[None], _Piece] = {}
        with ThreadPoolExecutor(self.threads, initializer=_compute_alone) as pool:
            try:
                # a short queue, so that tensors finish in the model's order
                while True:
                    while len(running) < self.threads + 1 and (piece := next(pieces, None)):
                        running[pool.submit(self._work, piece, files)] = piece
                    if not running:
                        return
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        piece = running.pop(future)
                        future.result()
                        self._finish(piece, files)
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _pieces(self) -> Iterator[_Piece]:
        target = _ELEMENTS_IN_FLIGHT // self.threads
        target = max(_MIN_PIECE_ELEMENTS, min(_MAX_PIECE_ELEMENTS, target))
        for task in self.plan.tasks:
            if task.name in self.work.done:
                continue
            if task.spec is None:
                rows, step = task.source_bytes, 8 * _MAX_PIECE_ELEMENTS
            elif self._method.rows_apart(task.spec):
                rows, step = task.shape[0], max(1, target // task.shape[1])
            else:
                rows = step = task.shape[0]
            starts = range(0, rows, step) if rows else [0]
            tensor = _Open(task, len(starts))
            for start in starts:
                yield _Piece(tensor, start, min(start + step, rows))

    def _matrix(self, task: Task) -> np.ndarray:
        """The source as [out, in], a view of the mapped file."""
        w = self.source.tensor(task.name)
        assert isinstance(w, np.ndarray)
        return w.T if task.transposed else w

    def _work(self, piece: _Piece, files: FilledFiles) -> None:
        if self._stop.is_set():
            return
        task = piece.tensor.task
        if task.spec is None:
            self._copy(piece, files)
        elif piece.stop - piece.start == task.shape[0] and not self._method.rows_apart(task.spec):
            with self._whole:
                self._quantize(piece, files)
        else:
            self._quantize(piece, files)
        self.progress.advance(piece.source_bytes)

    def _copy(self, piece: _Piece, files: FilledFiles) -> None:
        name = piece.tensor.task.name
        data = self.source.data(name)[piece.start : piece.stop]
        if is_float(self.source.entry(name).dtype):
            values = np.frombuffer(data, self.source.dtype(name))
            if not np.isfinite(values).all():
                raise KbitError(f"{self.source.path}: tensor {name!r} has NaN or infinite values")
        files.write(name, np.frombuffer(data, np.uint8), piece.start)

    def _quantize(self, piece: _Piece, files: FilledFiles) -> None:
        tensor, task = piece.tensor, piece.tensor.task
        assert task.spec is not None
        try:
            with tensor.lock:  # the first piece prepares, while other threads have other tensors
                if tensor.matrix is None:
                    matrix = self._matrix(task)
                    tensor.prepared = self._method.prepare(matrix, task.spec)
                    tensor.matrix = matrix
            rows = tensor.matrix[piece.start : piece.stop]
            result = self._method.quantize(rows, task.spec, self.plan.search, tensor.prepared)
        except KbitError as error:
            raise KbitError(f"{self.source.path}: tensor {task.name!r}: {error}") from None
        for suffix, part in result.parts().items():
            stored = part_name(task.name, suffix)
            place = self.layout.places[stored]
            # the outlier columns' numbers belong to all rows: every piece writes the same ones
            whole = part.nbytes == place.nbytes
            row_bytes = place.nbytes // task.shape[0]
            files.write(stored, part, 0 if whole else piece.start * row_bytes)

    def _finish(self, piece: _Piece, files: FilledFiles) -> None:
        """After a piece: when it was the tensor's last, record the tensor."""
        tensor = piece.tensor
        tensor.left -= 1
        if tensor.left:
            return
        name, spec, shape = tensor.task.name, tensor.task.spec, tensor.task.shape
        self.source.release(name)
        stored = (
            [name]
            if spec is None
            else [part_name(name, s) for s in expected_parts(spec, (shape[0], shape[1]))]
        )
        self.work.record(name, {part: files.sha256(part) for part in stored})
        files.finished(stored)

    def _quantization(self) -> Quantization:
        done = self.work.done
        tensors, kept = {}, {}
        for task in self.plan.tasks:
            if task.spec is None:
                dtype = self.source.entry(task.name).dtype
                kept[task.name] = KeptEntry(dtype, task.shape, done[task.name][task.name])
            else:
                shape = (task.shape[0], task.shape[1])
                sums = {
                    suffix: done[task.name][part_name(task.name, suffix)]
                    for suffix in expected_parts(task.spec, shape)
                }
                tensors[task.name] = QuantizedEntry(task.spec, shape, task.transposed, sums)
        return Quantization(
            method=self.plan.method,
            kbit_version=kbit.__version__,
            tensors=tensors,
            kept=kept,
            headers={name: sha256(header) for name, header in self.layout.headers.items()},
            extra={"search": self.plan.search},
        )


def _compute_alone() -> None:
    if cpu.available()[0]:
        library.work_alone()


def default_threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
