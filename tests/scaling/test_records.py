"""The store: append-only, one record a cell, whatever else writes or crashes."""

import json
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.errors import KbitError
from kbit_scaling.records import Documents, Record, Store, identity_hash, pack


def record(cell: str, status: str = "ok", model: str = "m") -> Record:
    documents = Documents(tokens=[3], bytes=[9], log_likelihood=[-7.5], kl=[0.25], agree=[2])
    return Record(
        cell=cell,
        identity={"cell": cell},
        status=status,  # type: ignore[arg-type]
        error=None if status == "ok" else "why",
        model=model,
        family="f",
        parameters=100,
        bytes=50,
        spec="int4-b64",
        metric="t",
        documents=documents if status == "ok" else None,
    )


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
def test_identity_hash_ignores_order_and_nothing_else(fields: dict[str, object]) -> None:
    assert identity_hash(fields) == identity_hash(dict(reversed(fields.items())))
    assert identity_hash(fields) != identity_hash({**fields, "one more": 1})


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path / "r.jsonl")
    assert store.add(record("a"))
    assert not store.add(record("a", model="another"))
    assert [r.model for r in Store(tmp_path / "r.jsonl")] == ["m"]
    assert Store(tmp_path / "r.jsonl").get("a") == record("a")
    assert record("a").bits_per_param == 4.0


def test_a_success_takes_the_place_of_a_failure_and_not_the_reverse(tmp_path: Path) -> None:
    store = Store(tmp_path / "r.jsonl")
    assert store.add(record("a", "failed"))
    assert not store.add(record("a", "failed"))
    assert store.add(record("a"))
    assert not store.add(record("a", "failed"))
    again = Store(tmp_path / "r.jsonl")
    assert [r.status for r in again] == ["ok"]
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_record_cut_by_a_crash_is_reported_and_its_cell_is_open_again(
    tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "r.jsonl"
    store = Store(path)
    store.add(record("a"))
    store.add(record("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    torn = Store(path)
    assert [r.cell for r in torn] == ["a"]
    assert torn.torn  # without its line end even a whole record counts as not yet written
    assert torn.add(record("b"))
    healed = Store(path)
    assert sorted(r.cell for r in healed) == ["a", "b"]
    assert healed.damaged == ([] if cut == 1 else [2])


def test_another_format_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Store(path).add(record("a"))
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "format": 7}) + "\n")
    with pytest.raises(KbitError, match="line 1 was written in format 7"):
        Store(path)


def test_a_record_that_does_not_fit_names_the_field(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Store(path).add(record("a"))
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "bytes": "many"}) + "\n")
    with pytest.raises(KbitError, match=r"line 1 is no record .*bytes"):
        Store(path)


def _write(path: Path, first: int) -> None:
    store = Store(path)
    for i in range(first, first + 40):
        store.add(record(str(i)))


def test_two_processes_write_one_store_and_every_cell_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, first)) for first in (0, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    cells = [json.loads(line)["cell"] for line in path.read_text().splitlines()]
    assert sorted(cells, key=int) == [str(i) for i in range(60)]


def test_packed_records_read_alike_and_refuse_to_grow(tmp_path: Path) -> None:
    store = Store(tmp_path / "r.jsonl")
    for cell in "ba":
        store.add(record(cell))
    pack(store, tmp_path / "r.jsonl.gz")
    first = (tmp_path / "r.jsonl.gz").read_bytes()
    pack(store, tmp_path / "r.jsonl.gz")
    assert (tmp_path / "r.jsonl.gz").read_bytes() == first
    packed = Store(tmp_path / "r.jsonl.gz")
    assert sorted(r.cell for r in packed) == ["a", "b"]
    with pytest.raises(KbitError, match="read only"):
        packed.add(record("c"))
