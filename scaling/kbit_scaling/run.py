"""Running a study: which cells are missing, how one job is computed, and the loop over all.

A job is one model at one treatment with all its metrics: its weights are quantized once, and its
cells (one a metric) are recorded one by one. Executors (`kbit_scaling.executors`) only decide where
`compute` runs; the process that called `sweep` writes every record.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import kbit
from kbit.errors import KbitError
from kbit.evaluate.protocols import Window

from .claims import Claims
from .records import Items, Record, Store, identity_hash
from .study import Job, Study, StudyModel, Task
from .texts import Text
from .weights import Source, Treatment

CACHE_BYTES = 4_000_000_000


@dataclass(frozen=True)
class Settings:
    """What a worker needs besides a job; small and picklable."""

    texts: tuple[Text, ...]
    tasks: tuple[Task, ...]
    cache: Path
    cache_bytes: int = CACHE_BYTES
    threads: int = 1
    device: str = "cpu"

    def text(self, name: str) -> Text | None:
        return next((t for t in self.texts if t.name == name), None)

    def task(self, name: str) -> Task:
        return next(t for t in self.tasks if t.metric == name)


@dataclass(frozen=True)
class Planned:
    """A job with the metrics still to be measured and the identity of each cell."""

    job: Job
    identities: dict[str, dict[str, Any]]

    @property
    def cells(self) -> dict[str, str]:
        """Metric -> cell."""
        return {metric: identity_hash(i) for metric, i in self.identities.items()}


@lru_cache(maxsize=16)
def _source(path: Path) -> Source:
    return Source(path)


@lru_cache(maxsize=32)
def _windows(path: Path, text: Text) -> list[Window]:
    source = _source(path)
    return text.windows(source.tokenizer, source.decoder.max_positions)


@lru_cache(maxsize=32)
def _text_identity(text: Text, max_positions: int) -> dict[str, Any]:
    return {
        "kind": "text",
        "text": text.digest(),
        "protocol": text.resolved(max_positions).record(),
    }


def identity(
    source: Source, treatment: Treatment, metric: Text | Task, device: str = "cpu"
) -> dict[str, Any]:
    """Everything that can change the number of a cell."""
    from .measure import CODE_VERSION, arithmetic
    from .tasks import items_digest

    if isinstance(metric, Text):
        measured = _text_identity(metric, source.decoder.max_positions)
    else:
        measured = {"kind": metric.name, "items": items_digest(metric)}
    done: dict[str, Any] = {"spec": treatment.spec}
    if treatment.quantized:
        done |= {
            "method": treatment.method,
            "search": treatment.search,
            "embedding": treatment.embedding,
            "calibration": None,
        }
    return {
        "model": source.hashes,
        "treatment": done,
        "metric": measured,
        "arithmetic": arithmetic(device),
        "code": CODE_VERSION,
    }


def plan(study: Study, store: Store, settings: Settings, *, retry: bool) -> Plan:
    """The cells that the store lacks. A model that cannot be opened gives failed records; a text or
    task that cannot be read is a KbitError, as it concerns every model."""
    from .tasks import items_digest

    used = {metric for job in study.jobs for metric in job.metrics}
    for each in study.texts:
        if each.name in used:
            each.check()
    for task in study.tasks:
        if task.metric in used:
            items_digest(task)
    todo: list[Planned] = []
    failures: list[Record] = []
    total = done = old_failures = reference_bytes = 0
    largest: dict[str, int] = {}
    wanted: set[str] = set()
    for job in study.jobs:
        total += len(job.metrics)
        try:
            source = _source(job.model.path)
            identities = {
                m: identity(
                    source, job.treatment, settings.text(m) or settings.task(m), settings.device
                )
                for m in job.metrics
            }
        except KbitError as error:
            failures += [_unopened(job, metric, str(error)) for metric in job.metrics]
            wanted |= {record.cell for record in failures[-len(job.metrics) :]}
            continue
        missing = {}
        for metric, fields in identities.items():
            cell = identity_hash(fields)
            wanted.add(cell)
            record = store.get(cell)
            if record is None or (record.status == "failed" and retry):
                missing[metric] = fields
            elif record.status == "failed":
                old_failures += 1
            else:
                done += 1
        if missing:
            todo.append(Planned(job, missing))
            for metric in missing:
                if (text := settings.text(metric)) is not None:
                    key = f"{job.model.path} {metric}"
                    tokens = sum(w.scored for w in _windows(job.model.path, text))
                    largest[key] = 2 * source.decoder.vocab_size * tokens
    reference_bytes = sum(largest.values())
    return Plan(todo, failures, total, done, old_failures, reference_bytes, frozenset(wanted))


@dataclass(frozen=True)
class Plan:
    """What a sweep would do. reference_bytes: disk that the reference logits would take. wanted:
    all cells of the study."""

    todo: list[Planned]
    failures: list[Record]
    total: int
    done: int
    old_failures: int
    reference_bytes: int
    wanted: frozenset[str]

    @property
    def cells(self) -> int:
        return sum(len(planned.identities) for planned in self.todo)


def _unopened(job: Job, metric: str, error: str) -> Record:
    fields = {"model": str(job.model.name), "treatment": str(job.treatment), "metric": metric}
    return _record(job, metric, fields, status="failed", error=error)


def _record(job: Job, metric: str, fields: dict[str, Any], **more: Any) -> Record:
    model, treatment = job.model, job.treatment
    made = {"kbit": kbit.__version__, "machine": platform.machine(), "time": _now()}
    return Record(
        cell=identity_hash(fields),
        identity=fields,
        model=model.name,
        family=model.family,
        spec=treatment.spec,
        method=treatment.method,
        search=treatment.search,
        embedding=treatment.embedding if treatment.quantized else "keep",
        metric=metric,
        made=made,
        **more,
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def compute(planned: Planned, settings: Settings) -> list[Record]:
    """The records of a job; whatever goes wrong becomes the record of a failure."""
    job = planned.job
    try:
        return _compute(planned, settings)
    except Exception as error:
        reason = (
            f"{type(error).__name__}: {error}" if not isinstance(error, KbitError) else f"{error}"
        )
        return [
            _record(job, metric, fields, status="failed", error=reason[:2000])
            for metric, fields in planned.identities.items()
        ]


def _compute(planned: Planned, settings: Settings) -> list[Record]:
    from kbit.engine.executor import load_executor

    from .measure import DTYPE, ReferenceCache, compare

    job = planned.job
    source = _source(job.model.path)
    cache = ReferenceCache(settings.cache, settings.cache_bytes)
    options: dict[str, Any] = {
        "device": settings.device,
        "dtype": DTYPE,
        "threads": settings.threads,
    }
    started = time.perf_counter()
    treated = source.treat(job.treatment)
    quantized = time.perf_counter()
    executor = load_executor(treated, "torch", **options)
    about = {
        "parameters": source.parameters,
        "non_embedding": source.non_embedding,
        "training_tokens": training_tokens(job.model),
        "bytes": treated.nbytes(),
        "embedding_bytes": treated.nbytes(tables_only=True),
    }
    seconds = {"quantize": quantized - started, "load": time.perf_counter() - quantized}
    records = []
    for metric, fields in planned.identities.items():
        begun = time.perf_counter()
        text = settings.text(metric)
        documents, items = None, None
        if text is None:
            items = _items(settings.task(metric), executor, source)
        else:
            windows = _windows(job.model.path, text)
            key = cache.key(source.hashes["weights"] + settings.device, windows)
            reference = cache.get(None, key, windows)
            if reference is None:
                plain = executor
                if job.treatment.quantized:
                    plain = load_executor(source.treat(Treatment()), "torch", **options)
                reference = cache.get(plain, key, windows)
                assert reference is not None
            if job.treatment.quantized:
                documents = compare(executor, reference, windows)
            else:
                documents = reference.documents
        took = {**seconds, "evaluate": time.perf_counter() - begun}
        rounded = {name: round(value, 3) for name, value in took.items()}
        seconds = {}  # quantizing and loading count once
        records.append(
            _record(
                job,
                metric,
                fields,
                status="ok",
                documents=documents,
                items=items,
                seconds=rounded,
                **about,
            )
        )
    return records


def _items(task: Task, executor: Any, source: Source) -> Items:
    from .tasks import score

    return score(task, executor, source.tokenizer)


def training_tokens(model: StudyModel) -> float | None:
    """What the study file says, else the checkpoint's own training.json."""
    if model.training_tokens is not None:
        return model.training_tokens
    import json

    path = model.path / "training.json"
    if not path.exists():
        return None
    try:
        return float(json.loads(path.read_text())["tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise KbitError(f"{path}: has no number of training tokens ({error})") from None


Results = Generator[list[Record], None, None]


class SweepExecutor(Protocol):
    """Where jobs run. Yields the records of each job as it ends, in any order; a job whose worker
    died is run again elsewhere, and after a few deaths yields failures."""

    def run(self, jobs: Iterable[Planned], settings: Settings) -> Results: ...


def sweep(
    jobs: Sequence[Planned],
    store: Store,
    settings: Settings,
    executor: SweepExecutor,
    on_record: Callable[[Record, bool], None] = lambda record, new: None,
    stop_after_s: float | None = None,
    on_wait: Callable[[int], None] = lambda cells: None,
) -> int:
    """Runs the jobs and appends their records; returns how many were new.

    Jobs that another sweep of this store is at are left to it and looked at again in the end: what
    it did not finish is done here. on_record gets each record and whether it was new here.
    stop_after_s: start no job after so many seconds. on_wait gets the number of cells that the
    other sweep still has, before waiting for it.
    """
    count = 0
    deadline = time.monotonic() + stop_after_s if stop_after_s is not None else float("inf")
    failed_before = {record.cell for record in store if record.status == "failed"}

    def open_cells(planned: Planned) -> list[str]:
        store.refresh()
        found = {cell: store.get(cell) for cell in planned.cells.values()}
        return [
            cell
            for cell, record in found.items()
            if record is None or (record.status == "failed" and cell in failed_before)
        ]

    def mine(waiting: Sequence[Planned], taken: list[Planned]) -> Iterator[Planned]:
        for planned in waiting:
            if time.monotonic() > deadline:
                return
            claimed = open_cells(planned)
            if not claims.take(claimed):
                taken.append(planned)
                continue
            cells = open_cells(planned)  # another sweep may have been done just before the claim
            claims.drop(set(claimed) - set(cells))
            rest = {m: planned.identities[m] for m, cell in planned.cells.items() if cell in cells}
            for cell in planned.cells.values():
                if cell not in cells and (record := store.get(cell)) is not None:
                    on_record(record, False)
            if rest:
                yield Planned(planned.job, rest)

    with Claims(store.path) as claims:
        waiting: Sequence[Planned] = jobs
        while waiting:
            taken: list[Planned] = []
            # closing: what runs elsewhere ends with this loop, not when the garbage is collected
            with closing(executor.run(mine(waiting, taken), settings)) as results:
                for records in results:
                    for record in records:
                        new = store.add(record)
                        count += new
                        on_record(record, new)
                    claims.drop(record.cell for record in records)
            waiting = taken
            if not taken or time.monotonic() > deadline:
                break
            if left := sum(len(open_cells(planned)) for planned in taken):
                on_wait(left)
            if cells := open_cells(taken[0]):
                claims.wait(cells[0])
    return count
