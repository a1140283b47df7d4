"""The sweep: numbers held to `kbit eval`, nothing done twice, failures kept, deaths survived."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kbit.engine.executor import load_executor
from kbit.errors import KbitError
from kbit.evaluate.score import compare_windows
from kbit_scaling import executors, run, weights
from kbit_scaling.claims import Claims
from kbit_scaling.executors import ATTEMPTS, Inline, Pool, get_executor
from kbit_scaling.records import Record, Store
from kbit_scaling.run import Planned, Settings, plan, sweep
from kbit_scaling.study import read_study
from kbit_scaling.weights import Source, Treatment
from kbit_scaling.workers import process_pool

from .conftest import Tiny
from .test_study import GRID, write


@pytest.fixture
def setup(tmp_path: Path, tiny: Tiny) -> tuple[list[Planned], Store, Settings]:
    study = read_study(write(tmp_path, tiny))
    settings = Settings(study.texts, study.tasks, tmp_path / "cache")
    store = Store(tmp_path / "records.jsonl")
    return plan(study, store, settings, retry=False).todo, store, settings


def by_spec(store: Store, model: str = "tiny-s1-0") -> dict[str, Record]:
    return {r.spec: r for r in store if r.model == model}


def test_scores_are_those_of_the_evaluator(
    setup: tuple[list[Planned], Store, Settings], tiny: Tiny
) -> None:
    jobs, store, settings = setup
    assert sweep(jobs, store, settings, Inline()) == 10
    assert [r.error for r in store if r.status != "ok"] == []
    source = Source(tiny.models[1])
    windows = settings.texts[0].windows(source.tokenizer, 64)
    load = load_executor
    plain, coarse = (load(source.treat(Treatment(s)), "torch") for s in ("none", "int3-b64"))
    expected = list(compare_windows(plain, coarse, windows))
    found = by_spec(store)
    for spec, of in (("none", "reference"), ("int3-b64", "model")):
        documents = found[spec].documents
        assert documents is not None
        want = sum(float(getattr(c, of).log_likelihoods.sum()) for c in expected)
        assert sum(documents.log_likelihood) == pytest.approx(want, rel=1e-5)
        assert sum(documents.tokens) == sum(w.scored for w in windows)
        assert sum(documents.bytes) == sum(w.bytes for w in windows)
    documents = found["int3-b64"].documents
    assert documents is not None
    # the reference's probabilities are kept in half precision
    assert sum(documents.kl) == pytest.approx(sum(c.kl.sum() for c in expected), rel=2e-3)
    assert sum(documents.agree) == pytest.approx(sum(c.agrees.sum() for c in expected), abs=1)
    assert len(documents.tokens) == 5
    unquantized = found["none"].documents
    assert unquantized is not None
    assert sum(unquantized.kl) == 0


def test_sizes_are_measured_bytes(setup: tuple[list[Planned], Store, Settings], tiny: Tiny) -> None:
    jobs, store, settings = setup
    sweep([j for j in jobs if "s1" in j.job.model.name], store, settings, Inline())
    source = Source(tiny.models[1])
    found = by_spec(store)
    size = source.checkpoint.path / "model.safetensors"
    assert found["none"].bytes == source.parameters * 2 < size.stat().st_size
    assert found["none"].non_embedding == source.parameters - 320 * 48
    treated = source.treat(Treatment("int3-b64"))
    assert found["int3-b64"].bytes == treated.nbytes() < found["int8-b64"].bytes
    # 48 columns are stored as 64: padding counts
    assert found["int3-b64"].bits_per_param > 3 + 16 / 48


def test_a_second_sweep_has_nothing_to_do(
    setup: tuple[list[Planned], Store, Settings], tmp_path: Path, tiny: Tiny
) -> None:
    jobs, store, settings = setup
    sweep(jobs[:4], store, settings, Inline())
    study = read_study(write(tmp_path, tiny))
    rest = plan(study, Store(store.path), settings, retry=False)
    assert (rest.done, rest.cells) == (4, 6)
    before = store.path.read_bytes()
    sweep(rest.todo, store, settings, Inline())
    assert store.path.read_bytes().startswith(before)
    assert plan(study, Store(store.path), settings, retry=False).todo == []


def _sweep_and_die(jobs: list[Planned], path: Path, settings: Settings) -> None:
    done: list[Record] = []

    def die(record: Record, new: bool) -> None:
        done.append(record)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    sweep(jobs, Store(path), settings, Pool(1), die)


def test_a_killed_sweep_goes_on_and_repeats_nothing(
    setup: tuple[list[Planned], Store, Settings], tmp_path: Path, tiny: Tiny
) -> None:
    jobs, store, settings = setup
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_sweep_and_die, args=(jobs, store.path, settings))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    before = store.path.read_bytes()
    again = Store(store.path)
    rest = plan(read_study(write(tmp_path, tiny)), again, settings, retry=False)
    assert (rest.done, rest.cells) == (3, 7)
    assert sweep(rest.todo, again, settings, Inline()) == 7
    assert store.path.read_bytes().startswith(before)
    assert len(store.path.read_text().splitlines()) == len(Store(store.path)) == 10


def _claim(path: Path, cells: list[str], held: Any, go_on: Any) -> None:
    claims = Claims(path)
    assert claims.take(cells)
    held.set()
    go_on.wait(60)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_another_sweep_is_at_is_left_to_it_and_taken_over_when_it_dies(
    setup: tuple[list[Planned], Store, Settings],
) -> None:
    jobs, store, settings = setup
    context = multiprocessing.get_context("spawn")
    held, go_on = context.Event(), context.Event()
    theirs = list(jobs[0].cells.values())
    process = context.Process(target=_claim, args=(store.path, theirs, held, go_on))
    process.start()
    assert held.wait(60)
    order: list[str] = []
    waited: list[int] = []

    def on_wait(cells: int) -> None:
        waited.append(cells)
        go_on.set()

    done = sweep(
        jobs, store, settings, Inline(), lambda r, new: order.append(r.cell), on_wait=on_wait
    )
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert done == 10
    assert waited == [1]
    assert order[-1] == theirs[0]
    assert len(set(order)) == len(order) == 10


def test_what_another_sweep_recorded_meanwhile_is_not_measured_again(
    setup: tuple[list[Planned], Store, Settings],
) -> None:
    jobs, store, settings = setup
    assert sweep(jobs[:3], Store(store.path), settings, Inline()) == 3
    seen: list[bool] = []
    assert sweep(jobs, store, settings, Inline(), lambda r, new: seen.append(new)) == 7
    assert seen == [False] * 3 + [True] * 7


def _stay(unused: int) -> None:
    threading.Event().wait(60)


def test_an_exception_ends_a_pool_in_the_middle_of_its_work() -> None:
    block = process_pool(1)
    pool = block.__enter__()
    assert pool.submit(abs, -1).result() == 1  # it runs
    [worker] = pool._processes.values()
    pool.submit(_stay, 0)
    interrupt = KeyboardInterrupt()
    assert not block.__exit__(KeyboardInterrupt, interrupt, None)
    # its exit status may go to the pool's own thread, which waits for it too
    assert wait([worker.sentinel], 30)


def test_another_text_is_another_cell(
    setup: tuple[list[Planned], Store, Settings], tmp_path: Path, tiny: Tiny
) -> None:
    jobs, store, settings = setup
    sweep(jobs[:1], store, settings, Inline())
    study = read_study(write(tmp_path, tiny))
    other = replace(study, texts=(replace(study.texts[0], cut_bytes=2000),))
    changed = replace(settings, texts=other.texts)
    assert plan(other, Store(store.path), changed, retry=False).done == 0


def test_weights_are_quantized_once_for_all_metrics(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = GRID + '[[texts]]\nname = "more"\npath = "{family}/text.txt"\ncut_bytes = 1000\n'
    study = read_study(write(tmp_path, tiny, more))
    settings = Settings(study.texts, (), tmp_path / "cache")
    store = Store(tmp_path / "records.jsonl")
    made: list[tuple[object, ...]] = []
    method = weights.get_method("rtn")
    original = method.quantize

    def counted(w: np.ndarray, spec: object, *rest: object) -> object:
        made.append((w.shape, float(w.astype(float).sum()), str(spec)))
        return original(w, spec, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(method, "quantize", counted)
    assert sweep(plan(study, store, settings, retry=False).todo, store, settings, Inline()) == 20
    assert len(made) == len(set(made)) == 4 * (7 + 1 + 14 + 1)


def test_a_failed_cell_is_recorded_with_its_reason_and_can_be_retried(
    setup: tuple[list[Planned], Store, Settings], tmp_path: Path, tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    jobs, store, settings = setup
    original = run._compute

    def broken(planned: Planned, settings: Settings) -> list[Record]:
        if planned.job.treatment.spec == "nf3-b64":
            raise MemoryError("no room for it")
        return original(planned, settings)

    monkeypatch.setattr(run, "_compute", broken)
    sweep(jobs, store, settings, Inline())
    failed = [r for r in Store(store.path) if r.status == "failed"]
    assert [r.error for r in failed] == ["MemoryError: no room for it"] * 2
    assert len(store) == 10
    study = read_study(write(tmp_path, tiny))
    again = plan(study, store, settings, retry=False)
    assert (again.cells, again.old_failures) == (0, 2)
    monkeypatch.undo()
    retried = plan(study, store, settings, retry=True)
    assert retried.cells == 2
    sweep(retried.todo, store, settings, Inline())
    assert [r.error for r in Store(store.path) if r.status != "ok"] == []


def test_a_model_that_cannot_be_opened_fails_alone(tmp_path: Path, tiny: Tiny) -> None:
    folder = tmp_path / "family"
    for path in tiny.models:
        target = folder / path.parent.name / path.name
        target.mkdir(parents=True)
        for file in path.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    (folder / "text.txt").write_text(tiny.text.read_text())
    (folder / "s0" / "tokens-0" / "model.safetensors").write_bytes(b"nothing")
    broken = replace(tiny, folder=folder)
    study = read_study(write(tmp_path, broken))
    settings = Settings(study.texts, (), tmp_path / "cache")
    found = plan(study, Store(tmp_path / "r.jsonl"), settings, retry=False)
    assert len(found.failures) == 5
    assert all("model.safetensors" in (r.error or "") for r in found.failures)
    assert {j.job.model.name for j in found.todo} == {"tiny-s1-0"}


def test_reference_logits_stay_within_their_limit(
    setup: tuple[list[Planned], Store, Settings],
) -> None:
    jobs, store, settings = setup
    one = sum(w.scored for w in run._windows(jobs[0].job.model.path, settings.texts[0])) * 320 * 2
    sweep(jobs, store, replace(settings, cache_bytes=int(1.5 * one)), Inline())
    assert [r.error for r in store if r.status != "ok"] == []
    kept = [f.stat().st_size for f in settings.cache.glob("*.f16")]
    assert sum(kept) <= 1.5 * one
    small = replace(settings, cache_bytes=1000, cache=settings.cache / "small")
    [record] = run.compute(jobs[1], small)
    assert record.status == "failed"
    assert "raise --cache-gb" in (record.error or "")


def test_a_job_is_kept_where_the_pool_breaks_before_it_is_out(
    setup: tuple[list[Planned], Store, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, store, settings = setup
    broken: list[bool] = []

    @contextmanager
    def breaking(workers: int) -> Iterator[Any]:
        with process_pool(workers) as pool:
            submit = pool.submit

            def once(*job: Any) -> Any:
                if not broken:
                    broken.append(True)
                    raise BrokenProcessPool("a worker died")
                return submit(*job)

            monkeypatch.setattr(pool, "submit", once)
            yield pool

    monkeypatch.setattr(executors, "process_pool", breaking)
    sweep(jobs, store, settings, Pool(2))
    assert broken
    assert len(store) == 10
    assert [r.error for r in store if r.status != "ok"] == []


def test_a_pool_survives_the_death_of_a_worker(
    setup: tuple[list[Planned], Store, Settings],
) -> None:
    jobs, store, settings = setup
    killed: list[int | None] = []

    def kill_one(record: Record, new: bool) -> None:
        if not killed:
            victim = multiprocessing.active_children()[0]
            victim.kill()
            killed.append(victim.pid)

    sweep(jobs, store, settings, Pool(2), kill_one)
    assert killed
    assert len(store.path.read_text().splitlines()) == len(store) == 10
    assert [r.error for r in store if r.status != "ok"] == []


def test_executors_by_name() -> None:
    with pytest.raises(KbitError, match="known executors: inline, pool, ray"):
        get_executor("slurm")
    with pytest.raises(KbitError, match="--workers"):
        get_executor("pool", workers=0)
    assert ATTEMPTS >= 2


def test_a_ray_cluster_loses_a_node_and_every_cell_arrives_once(
    setup: tuple[list[Planned], Store, Settings],
) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'kbit[ray]'")
    from ray.cluster_utils import Cluster

    from kbit_scaling.executors import Ray

    jobs, store, settings = setup
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        doomed, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
        ray.init(address=cluster.address, log_to_driver=False)
        assert ray.cluster_resources()["CPU"] == 2
        gone: list[bool] = []

        def remove(record: Record, new: bool) -> None:
            if not gone:
                gone.append(True)
                cluster.remove_node(doomed, allow_graceful=False)

        sweep(jobs, store, settings, Ray(), remove)
        assert gone
        assert not doomed.any_processes_alive()
    finally:
        ray.shutdown()
        cluster.shutdown()
    cells = [r.cell for r in Store(store.path)]
    assert len(store.path.read_text().splitlines()) == len(cells) == 10
    assert [r.error for r in store if r.status != "ok"] == []
