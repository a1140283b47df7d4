"""Where jobs run: in this process, in a local pool, or on a Ray cluster. The records are the same.

A worker may die (out of memory, a lost node). Its job is run again, at most `ATTEMPTS` times in
all, and then yields records of failure that say so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from kbit.errors import KbitError

from .records import Record
from .run import Planned, Results, Settings, SweepExecutor, _record, compute
from .workers import process_pool

ATTEMPTS = 3


def _died(planned: Planned, how: str) -> list[Record]:
    reason = f"the worker died {ATTEMPTS} times ({how}); run with --retry-failed to try again"
    return [
        _record(planned.job, metric, fields, status="failed", error=reason)
        for metric, fields in planned.identities.items()
    ]


class _Queue:
    """Jobs with the number of their attempt; new ones are drawn from the iterator when needed."""

    def __init__(self, jobs: Iterable[Planned]) -> None:
        self._new = iter(jobs)
        self._waiting: deque[tuple[Planned, int]] = deque()

    def __bool__(self) -> bool:
        if not self._waiting:
            self._waiting.extend((planned, 1) for planned in islice(self._new, 1))
        return bool(self._waiting)

    def append(self, item: tuple[Planned, int]) -> None:
        self._waiting.append(item)

    def popleft(self) -> tuple[Planned, int]:
        return self._waiting.popleft()


class Inline:
    """One job after the other, in this process."""

    def run(self, jobs: Iterable[Planned], settings: Settings) -> Results:
        for planned in jobs:
            yield compute(planned, settings)


class Pool:
    """`workers` processes on this machine."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise KbitError(f"a pool of {workers} workers; use --workers 1 or more")
        self.workers = workers

    def run(self, jobs: Iterable[Planned], settings: Settings) -> Results:
        todo = _Queue(jobs)
        while todo:
            running: dict[Future[list[Record]], tuple[Planned, int]] = {}
            try:
                with process_pool(self.workers) as pool:
                    while todo or running:
                        # a short queue keeps neighbours (the same model) running side by side
                        while todo and len(running) < 2 * self.workers:
                            planned, attempt = todo.popleft()
                            try:
                                future = pool.submit(compute, planned, settings)
                            except BrokenProcessPool:  # a worker died since; this one never ran
                                todo.append((planned, attempt))
                                raise
                            running[future] = planned, attempt
                        done, _ = wait(running, return_when=FIRST_COMPLETED)
                        for future in done:
                            records = future.result()
                            del running[future]
                            yield records
            except BrokenProcessPool as error:
                # Nobody knows whose worker it was: all that were out count an attempt.
                for planned, attempt in running.values():
                    if attempt < ATTEMPTS:
                        todo.append((planned, attempt + 1))
                    else:
                        yield _died(planned, str(error))


class Ray:
    """A Ray cluster: the one at `address` ("auto": the one this machine belongs to), or one that is
    started here. Models, texts and the cache have to lie at the same paths on all nodes."""

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise KbitError(
                "the executor 'ray' needs Ray; install it with: pip install 'kbit[ray]'"
            ) from None
        self._ray: Any = ray
        if not ray.is_initialized():
            try:
                ray.init(
                    address=address,
                    num_cpus=None if address else workers,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise KbitError(f"no Ray cluster at {address!r} ({error})") from None

    def run(self, jobs: Iterable[Planned], settings: Settings) -> Results:
        ray = self._ray
        # Ray's own retries are off: a job counts its attempts here, so that it ends as a record.
        remote = ray.remote(num_cpus=settings.threads, max_retries=0)(compute)
        shared = ray.put(settings)
        todo = _Queue(jobs)
        running: dict[Any, tuple[Planned, int]] = {}
        while todo or running:
            room = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
            while todo and len(running) < room:
                planned, attempt = todo.popleft()
                running[remote.remote(planned, shared)] = planned, attempt
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                planned, attempt = running.pop(reference)
                try:
                    records = ray.get(reference)
                except ray.exceptions.RayError as error:
                    if attempt < ATTEMPTS:
                        todo.append((planned, attempt + 1))
                        continue
                    records = _died(planned, type(error).__name__)
                yield records


EXECUTORS: dict[str, Callable[..., SweepExecutor]] = {
    "inline": lambda workers, address: Inline(),
    "pool": lambda workers, address: Pool(workers),
    "ray": lambda workers, address: Ray(address, workers),
}


def get_executor(name: str, workers: int = 2, address: str | None = None) -> SweepExecutor:
    """The executor by name; KbitError lists the known ones."""
    if name not in EXECUTORS:
        raise KbitError(f"no executor named {name!r}; known executors: {', '.join(EXECUTORS)}")
    return EXECUTORS[name](workers, address)
