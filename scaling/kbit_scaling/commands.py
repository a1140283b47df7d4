"""`kbit sweep`; light at import, like all commands."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .records import Record, Store
    from .run import Plan, Settings
    from .study import Study

StudyArgument = Annotated[
    Path, typer.Argument(help="A study file (TOML).", show_default=False, metavar="STUDY.toml")
]
Paths = Annotated[
    list[str] | None,
    typer.Option(
        "--path", help="Folder for a name in [paths]; may be repeated.", metavar="NAME=DIR"
    ),
]
Records = Annotated[
    Path | None,
    typer.Option(
        help="The records, in place of the study's.", metavar="FILE", show_default="study's"
    ),
]


def _paths(given: list[str] | None) -> dict[str, str]:
    from kbit.errors import KbitError

    found = {}
    for item in given or []:
        name, separator, folder = item.partition("=")
        if not separator or not name or not folder:
            raise KbitError(f"--path {item!r}: write NAME=DIR")
        found[name] = folder
    return found


def _terminated(number: int, unused: object) -> None:
    """Ends as after an error, so that workers end too."""
    print("kbit: ended by SIGTERM; the same command goes on", file=sys.stderr)
    raise SystemExit(128 + number)


def sweep(
    study: StudyArgument,
    path: Paths = None,
    records: Records = None,
    executor: Annotated[str, typer.Option(help="inline, pool or ray.")] = "pool",
    workers: Annotated[
        int, typer.Option(help="Processes of the pool, or of a Ray started here.")
    ] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads of each worker.")] = 1,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster: its address, or auto.", show_default="none")
    ] = None,
    device: Annotated[str, typer.Option(help="Where models run: cpu or cuda.")] = "cpu",
    cache: Annotated[Path, typer.Option(help="Folder for reference logits.", metavar="DIR")] = Path(
        "build/study-cache"
    ),
    cache_gb: Annotated[float, typer.Option(help="Most disk for reference logits.")] = 4.0,
    retry_failed: Annotated[bool, typer.Option(help="Run failed cells again.")] = False,
    stop_after: Annotated[
        float | None,
        typer.Option(help="Start nothing new after so many seconds.", show_default="never"),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Say what would run, and stop.")
    ] = False,
    pack: Annotated[
        bool, typer.Option("--pack", help="Write the study's records once more, as .gz.")
    ] = False,
) -> None:
    """Measure every cell of a study that is not recorded yet."""
    signal.signal(signal.SIGTERM, _terminated)
    from collections import Counter

    from kbit.errors import KbitError

    from . import records as files
    from .executors import get_executor
    from .run import Settings, plan
    from .run import sweep as run_sweep
    from .study import read_study

    read = read_study(study, _paths(path))
    place = records or read.records
    packed = place.with_name(place.name + ".gz")
    if packed.exists() and not place.exists():
        if plan_only:
            place = packed
        else:
            files.unpack(packed, place)
    store = files.Store(place)
    settings = Settings(
        read.texts, read.tasks, cache.resolve(), int(cache_gb * 1e9), threads, device
    )
    planned = plan(read, store, settings, retry=retry_failed)
    _announce(read, store, planned, settings)
    if plan_only:
        return
    if device != "cpu" and executor != "ray":  # Ray's workers may be on other machines
        from kbit.engine.torch_executor import has_device

        able, reason = has_device(device)
        if not able:
            raise KbitError(f"--device {device}: {reason}")
    for record in planned.failures:
        store.add(record)
    failed = planned.old_failures + len(planned.failures)
    if planned.todo:
        chosen = get_executor(executor, workers, address)
        with _Bar(planned, failed) as bar:
            run_sweep(planned.todo, store, settings, chosen, bar.on_record, stop_after, bar.on_wait)
            failed = bar.failed
            left = planned.cells - bar.done
        if left > 0:
            print(f"{left} cells are left; the same command goes on with them", file=sys.stderr)
    ours = [record for record in store if record.cell in planned.wanted]
    reasons = Counter(record.error or "" for record in ours if record.status == "failed")
    print(f"{len(ours) - reasons.total()} cells recorded in {store.path}, {reasons.total()} failed")
    for reason, count in reasons.most_common(5):
        print(f"  failed {count} x: {reason}", file=sys.stderr)
    if ours and reasons.total() == len(ours):
        raise KbitError(
            f"all cells failed, for the reasons above (they stand in {store.path} too); mend them "
            "and run the same command with --retry-failed"
        )
    if pack:
        models = {model.name for model in read.models}
        # Cells that the study no longer has go; those of a model that is not here now stay.
        files.pack(store, packed, lambda r: r.cell in planned.wanted or r.model not in models)
        print(packed)


def _announce(study: Study, store: Store, plan: Plan, settings: Settings) -> None:
    def say(text: str) -> None:
        print(text, file=sys.stderr)

    say(f"{study.name}: {plan.total} cells of {len(study.models)} models; {plan.done} recorded, "
        f"{plan.cells} to run")  # fmt: skip
    if study.left_out:
        say(f"  {study.left_out} combinations left out: the data type has no such width or block")
    for pattern in study.missing:
        say(f"  no model at {pattern}: its cells are not part of this run")
    if store.damaged:
        lines = ", ".join(map(str, store.damaged[:5]))
        say(f"  {store.path}: line {lines} is damaged (a crash?); its cells run again")
    if store.torn:
        say(f"  {store.path} ends in half a record (a crash?); its cell runs again")
    if plan.reference_bytes:
        used = min(plan.reference_bytes, settings.cache_bytes)
        size = f"{used / 1e9:.1f} GB" if used >= 1e9 else f"{used / 1e6:.0f} MB"
        say(f"  reference logits: at most {size} in {settings.cache}")


class _Bar:
    """Cells done, failed and time left, on standard error; plain lines where it is no terminal."""

    def __init__(self, plan: Plan, failed: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.failed = failed
        self.done = 0
        self._waited = False
        self._total = plan.cells
        self._progress = Progress(
            TextColumn("cells"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("cells", total=plan.cells, failed=failed, last="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    def on_record(self, record: Record, new: bool) -> None:
        self.done += 1
        self.failed += record.status == "failed"
        last = f"{record.model} {record.spec} {record.metric}"
        self._progress.update(self._task, advance=1, failed=self.failed, last=last)
        if not sys.stderr.isatty() and self.done % 50 == 0:
            print(f"{self.done}/{self._total} cells, {self.failed} failed", file=sys.stderr)

    def on_wait(self, cells: int) -> None:
        if not self._waited:
            self._progress.console.print(
                f"waiting for another sweep of these records; it is at the cells left: {cells}"
            )
        self._waited = True
