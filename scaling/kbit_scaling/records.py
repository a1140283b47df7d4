"""Measured cells, one JSON object a line: append-only, typed, safe for several writers at once."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kbit.errors import KbitError

FORMAT = 1


def identity_hash(identity: dict[str, Any]) -> str:
    """Key of a cell: 24 hex digits over everything that can change its number."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Documents(BaseModel):
    """Sums by document, in the order of the text: the material of every score and interval.

    tokens, bytes: scored tokens and the bytes of text behind them. log_likelihood: nats. kl: sum of
    KL(unquantized || this) in nats. agree: tokens where both find the same one likeliest.
    """

    model_config = ConfigDict(extra="forbid")

    tokens: list[int]
    bytes: list[int]
    log_likelihood: list[float]
    kl: list[float]
    agree: list[int]


class Items(BaseModel):
    """Task items in their order: 1 if the answer was right, by log-likelihood and by the same
    divided by the answer's length in characters. log_likelihood: of the right answer, nats."""

    model_config = ConfigDict(extra="forbid")

    correct: list[int]
    correct_norm: list[int]
    log_likelihood: list[float]


class Record(BaseModel):
    """One cell: a model at a spec, measured by one metric.

    cell: hash of `identity`. model, family, training_tokens, parameters, non_embedding: the model;
    training_tokens is None if unknown. spec: how the linear layers are stored ("none": as in the
    source). embedding: "same", "keep" or a spec. bytes: of all weights as stored, scales and all;
    embedding_bytes: of the embedding and head among them. metric: name of the text or task.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    cell: str
    identity: dict[str, Any]
    status: Literal["ok", "failed"]
    error: str | None = None
    model: str
    family: str
    parameters: int = 0
    non_embedding: int = 0
    training_tokens: float | None = None
    spec: str
    method: str = "rtn"
    search: bool = False
    embedding: str = "same"
    bytes: int = 0
    embedding_bytes: int = 0
    metric: str
    documents: Documents | None = None
    items: Items | None = None
    seconds: dict[str, float] = {}
    made: dict[str, str] = {}

    @property
    def bits_per_param(self) -> float:
        """Measured: all stored bytes over all parameters."""
        return 8 * self.bytes / self.parameters


class Store:
    """A file of records. Reading never changes it; `add` appends one line under a lock.

    damaged: line numbers that are no record, such as one cut in half by a crash; they are left
    where they are, reported, and their cells run again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged: list[int] = []
        self._records: dict[str, Record] = {}
        self._offset = 0
        self._line = 0
        if path.suffix == ".gz":
            self._read_packed()
        else:
            self.refresh()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def get(self, cell: str) -> Record | None:
        """The record of a cell; a success takes the place of an earlier failure."""
        return self._records.get(cell)

    def refresh(self) -> None:
        """Reads what was appended since, by this process or another."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        # A last line without an end is being written at this moment, or was cut: not yet read.
        whole, newline, rest = data.rpartition(b"\n")
        if newline:
            self._parse(whole.split(b"\n"))
            self._offset += len(whole) + 1
        self._torn = bool(rest)

    @property
    def torn(self) -> bool:
        """Whether the file ends in the middle of a line."""
        return self._torn

    _torn = False

    def _read_packed(self) -> None:
        try:
            self._parse(gzip.decompress(self.path.read_bytes()).rstrip(b"\n").split(b"\n"))
        except (OSError, EOFError) as error:
            raise KbitError(f"{self.path}: cannot be read as packed records ({error})") from None

    def _parse(self, lines: list[bytes]) -> None:
        for line in lines:
            self._line += 1
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                version = fields["format"]
            except (ValueError, KeyError, TypeError):
                self.damaged.append(self._line)
                continue
            if version != FORMAT:
                raise KbitError(
                    f"{self.path}: line {self._line} was written in format {version}, this kbit "
                    f"reads format {FORMAT}; use the kbit that wrote it, or another store"
                )
            try:
                record = Record.model_validate(fields)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise KbitError(
                    f"{self.path}: line {self._line} is no record of format {FORMAT} ({where}: "
                    f"{first['msg']}); use another store, or remove the line"
                ) from None
            old = self._records.get(record.cell)
            if old is None or (old.status == "failed" and record.status == "ok"):
                self._records[record.cell] = record

    @contextmanager
    def _locked(self) -> Iterator[int]:
        if self.path.suffix == ".gz":
            raise KbitError(f"{self.path}: packed records are read only; sweep into a .jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def add(self, record: Record) -> bool:
        """Appends a record; False (and nothing written) if the cell is there already, put there by
        this sweep or by another one. A failure is not written over by a failure."""
        with self._locked() as descriptor:
            self.refresh()
            old = self._records.get(record.cell)
            if old is not None and (old.status == "ok" or record.status == "failed"):
                return False
            data = record.model_dump_json(exclude_defaults=False).encode() + b"\n"
            if self._torn:  # close the line that a crash cut, so that this one starts afresh
                data = b"\n" + data
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
            os.fsync(descriptor)
            self.refresh()
        return True


def pack(store: Store, out: Path, keep: Callable[[Record], bool] = lambda record: True) -> None:
    """Writes the store's records as one .jsonl.gz, sorted by cell, byte for byte repeatable."""
    lines = [r.model_dump_json() for r in sorted(store, key=lambda r: r.cell) if keep(r)]
    aside = out.with_name(out.name + ".part")
    aside.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0))
    aside.replace(out)


def unpack(packed: Path, out: Path) -> None:
    """Writes packed records as a store that can grow, unless another process was first."""
    lines = [r.model_dump_json() + "\n" for r in Store(packed)]
    aside = out.with_name(f"{out.name}.{os.getpid()}.part")
    aside.write_text("".join(lines), encoding="utf-8")
    with suppress(FileExistsError):
        os.link(aside, out)
    aside.unlink()
