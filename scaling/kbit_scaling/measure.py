"""What is computed for a cell: log-likelihood and divergence by document, in exact arithmetic.

The unquantized model runs once for a text. Its log-probabilities are kept in half precision in a
cache directory, [T, V] for the T scored tokens, so that every quantized model of it costs one pass.
The divergence from those rounded probabilities is taken in its form for unnormalized measures,
sum(p log(p / q) - p + q), which is never negative and in which the rounding cancels to first order.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kbit.engine.executor import Executor
from kbit.errors import KbitError
from kbit.evaluate.protocols import Window
from kbit.evaluate.score import groups, sliced_logits

from .records import Documents

# Raised whenever a change in this package or under it changes a number: it is part of the identity
# of every cell, so that old records are not taken for new ones.
CODE_VERSION = 1
DTYPE = "fp32"  # whatever the device's own default is
_ROWS_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # a core's cache; enough to keep a GPU busy


def arithmetic(device: str) -> str:
    """What a cell's numbers were computed in."""
    kind = device.partition(":")[0]
    return f"torch-{DTYPE}" if kind == "cpu" else f"torch-{DTYPE}-{kind}"


def _positions(
    executor: Executor, windows: Sequence[Window]
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """For every window in slices: (index of the window for each row, logits fp32 [R, V], targets
    int64 [R]) on the executor's device, few enough rows at a time for its cache or memory."""
    index = {id(window): i for i, window in enumerate(windows)}
    device = torch.device(getattr(executor, "device", "cpu"))
    for group in groups([executor], windows):
        for slices in sliced_logits(executor, group):
            for window, (logits, targets) in zip(group, slices, strict=True):
                rows = max(1, _ROWS_BYTES[device.type] // (4 * logits.shape[1]))
                for at in range(0, len(targets), rows):
                    part = torch.from_numpy(logits[at : at + rows])
                    goal = torch.from_numpy(np.ascontiguousarray(targets[at : at + rows]))
                    yield [index[id(window)]] * len(goal), part.to(device), goal.to(device)


@dataclass(frozen=True)
class Reference:
    """The unquantized model on one text. log_probabilities: float16 [T, V], memory-mapped, rows in
    the order in which `_positions` yields them; documents: its own sums."""

    log_probabilities: NDArray[np.float16]
    documents: Documents


class _Sums:
    """Adds rows up by document."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.document_of = np.array([w.document for w in windows])
        count = int(self.document_of.max()) + 1
        self.tokens = np.bincount(self.document_of, [w.scored for w in windows], count)
        self.bytes = np.bincount(self.document_of, [w.bytes for w in windows], count)
        self.log_likelihood = np.zeros(count)
        self.kl = np.zeros(count)
        self.agree = np.zeros(count)

    def add(self, window_of: list[int], name: str, values: torch.Tensor) -> None:
        rows = self.document_of[window_of]
        getattr(self, name)[:] += np.bincount(rows, values.double().cpu().numpy(), len(self.kl))

    def documents(self) -> Documents:
        if not np.isfinite(self.log_likelihood).all():
            raise KbitError("the model's logits hold NaN or infinity on this text")
        return Documents(
            tokens=[int(x) for x in self.tokens],
            bytes=[int(x) for x in self.bytes],
            log_likelihood=[round(float(x), 4) for x in self.log_likelihood],
            kl=[float(f"{x:.6g}") for x in self.kl],
            agree=[int(x) for x in self.agree],
        )


def _log_likelihood(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    log_q = torch.log_softmax(logits, dim=1)
    return log_q, log_q.gather(1, targets[:, None])[:, 0]


class ReferenceCache:
    """Half-precision log-probabilities on disk, at most `limit_bytes`; the least recently used of
    other models go first. Safe for several processes."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    @staticmethod
    def size(windows: Sequence[Window], vocabulary: int) -> int:
        """Bytes that the reference of these windows takes."""
        return 2 * vocabulary * sum(w.scored for w in windows)

    @staticmethod
    def key(weights: str, windows: Sequence[Window]) -> str:
        digest = hashlib.sha256(f"{CODE_VERSION} {weights}".encode())
        for window in windows:
            digest.update(window.tokens.tobytes())
            digest.update(f"{window.first} {window.document}".encode())
        return digest.hexdigest()[:24]

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def get(
        self, executor: Executor | None, key: str, windows: Sequence[Window]
    ) -> Reference | None:
        """The reference, computed now if it is not there; None if it is not there and no executor
        is given."""
        values, sums = self.folder / f"{key}.f16", self.folder / f"{key}.json"
        with self._locked(key):
            if not sums.exists():
                if executor is None:
                    return None
                vocabulary = executor.decoder.vocab_size
                self._make_room(self.size(windows, vocabulary), keep=key)
                documents = self._compute(executor, windows, values, vocabulary)
                aside = sums.with_suffix(".part")
                aside.write_text(
                    json.dumps({"vocabulary": vocabulary, "documents": documents.model_dump()})
                )
                aside.replace(sums)
            found = json.loads(sums.read_text())
            os.utime(values)
            shape = (-1, found["vocabulary"])
            data = np.memmap(values, dtype=np.float16, mode="r").reshape(shape)
        return Reference(data, Documents.model_validate(found["documents"]))

    @staticmethod
    def _compute(
        executor: Executor, windows: Sequence[Window], path: Path, vocabulary: int
    ) -> Documents:
        total = sum(w.scored for w in windows)
        aside = path.with_suffix(".part")
        out = np.memmap(aside, dtype=np.float16, mode="w+", shape=(total, vocabulary))
        sums, at = _Sums(windows), 0
        for window_of, logits, targets in _positions(executor, windows):
            log_p, log_likelihood = _log_likelihood(logits, targets)
            sums.add(window_of, "log_likelihood", log_likelihood)
            out[at : at + len(targets)] = log_p.clamp(min=-65000.0).half().cpu().numpy()
            at += len(targets)
        assert at == total
        out.flush()
        aside.replace(path)
        sums.agree[:] = sums.tokens
        return sums.documents()

    def _make_room(self, wanted: int, keep: str) -> None:
        if wanted > self.limit_bytes:
            raise KbitError(
                f"the reference logits of one model on one text take {wanted / 1e9:.1f} GB, the "
                f"limit is {self.limit_bytes / 1e9:.1f} GB; raise --cache-gb or cut the text"
            )
        files = sorted(self.folder.glob("*.f16"), key=lambda f: f.stat().st_mtime)
        used = sum(f.stat().st_size for f in files)
        for file in files:
            if used + wanted <= self.limit_bytes:
                return
            if file.stem != keep:
                used -= file.stat().st_size
                file.with_suffix(".json").unlink(missing_ok=True)
                file.unlink(missing_ok=True)


def compare(executor: Executor, reference: Reference, windows: Sequence[Window]) -> Documents:
    """A quantized model against the unquantized one, by document."""
    sums, at = _Sums(windows), 0
    for window_of, logits, targets in _positions(executor, windows):
        log_q, log_likelihood = _log_likelihood(logits, targets)
        stored = np.array(reference.log_probabilities[at : at + len(targets)])
        log_p = torch.from_numpy(stored).to(logits.device).float()
        sums.add(window_of, "agree", (log_p.argmax(1) == log_q.argmax(1)).float())
        sums.add(window_of, "log_likelihood", log_likelihood)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).sum(1) - p.sum(1) + 1.0
        sums.add(window_of, "kl", kl.clamp(min=0.0))
        at += len(targets)
    return sums.documents()


def total_scored(windows: Iterable[Window]) -> int:
    """Scored tokens in all."""
    return sum(w.scored for w in windows)
