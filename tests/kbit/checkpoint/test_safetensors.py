"""The safetensors reader against the safetensors library, and against damaged files."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kbit.checkpoint.safetensors import DTYPES, SafetensorsFile
from kbit_kernels.errors import KbitError
from tests.kbit.checkpoint.build import safetensors_bytes


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        "half": rng.standard_normal((3, 5)).astype(np.float16),
        "single": rng.standard_normal(7).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "bytes": rng.integers(0, 256, (2, 3, 4), dtype=np.uint8),
        "long": rng.integers(-5, 5, 3),
        "mask": np.array([True, False]),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", {"format": "np"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert set(file.entries) == set(tensors)
    assert file.metadata == {"format": "np"}
    for name, expected in tensors.items():
        found = file.tensor(name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        assert not found.flags.writeable


@given(data=st.data(), pad=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_agrees_with_the_library_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, data: Any, pad: int
) -> None:
    """bfloat16 and misaligned data included; the library's raw bytes are the truth."""
    dtypes = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tensors = {
        f"t{i}": rng.standard_normal(data.draw(st.lists(st.integers(0, 4), max_size=3))).astype(
            data.draw(st.sampled_from(dtypes))
        )
        for i in range(data.draw(st.integers(0, 4)))
    }
    raw = safetensors_bytes(tensors, pad)
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    path.write_bytes(raw)
    file = SafetensorsFile(path)
    truth = dict(safetensors.deserialize(raw))
    assert set(file.entries) == set(truth)
    for name, value in truth.items():
        found = file.tensor(name)
        assert found.flags.aligned
        assert list(found.shape) == value["shape"]
        assert file.entries[name].dtype == value["dtype"]
        assert found.tobytes() == bytes(value["data"]) == bytes(file.data(name))
        file.release(name)
        assert found.tobytes() == bytes(value["data"])


def _file(table: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = {"t": _entry()}
DAMAGED = {
    "empty file": (b"", "is empty"),
    "half a length": (b"\x01\x00", "truncated"),
    "header longer than the file": (_file(GOOD, bytes(8), 1000), "truncated"),
    "header length of 2^63": (_file(GOOD, bytes(8), 1 << 63), "truncated"),
    "not JSON": (_file(b"{]"), "JSON"),
    "not UTF-8": (_file(b'{"\xff": 1}'), "JSON"),
    "deep JSON": (_file(b"[" * 100_000), "JSON"),
    "a huge number": (_file(b'{"t": ' + b"9" * 5000 + b"}"), "JSON"),
    "no object": (_file([1]), "object"),
    "the same tensor twice": (_file(b'{"a": 1, "a": 2}'), "twice"),
    "metadata no strings": (_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry no object": (_file({"t": 3}), "'t'"),
    "a key too many": (_file({"t": {**_entry(), "more": 1}}, bytes(8)), "'t'"),
    "unknown dtype": (_file({"t": _entry("F33")}, bytes(8)), "F33"),
    "dtype no string": (_file({"t": _entry(7)}, bytes(8)), "'t'"),
    "negative size": (_file({"t": _entry(shape=[-2])}, bytes(8)), "shape"),
    "fractional size": (_file({"t": _entry(shape=[2.0])}, bytes(8)), "shape"),
    "boolean size": (_file({"t": _entry("U8", [True], [0, 1])}, bytes(1)), "shape"),
    "too many dimensions": (_file({"t": _entry(shape=[1] * 99)}, bytes(4)), "shape"),
    "huge beside zero": (_file({"t": _entry(shape=[0, 1 << 60], offsets=[0, 0])}), "impossible"),
    "size and bytes differ": (_file({"t": _entry(shape=[3])}, bytes(8)), "12 bytes"),
    "end before start": (_file({"t": _entry(offsets=[8, 0])}, bytes(8)), "bytes"),
    "one offset": (_file({"t": _entry(offsets=[0])}, bytes(8)), "data_offsets"),
    "data cut off": (_file(GOOD, bytes(7)), "truncated"),
    "data too long": (_file(GOOD, bytes(9)), "describes"),
    "overlap": (_file({"t": _entry(), "u": _entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
    "hole": (_file({"t": _entry(), "u": _entry(offsets=[12, 20])}, bytes(20)), "hole"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    raw, reason = DAMAGED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(KbitError, match=reason) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_every_known_dtype_has_its_size(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        path = tmp_path / f"{name}.safetensors"
        table = {"t": _entry(name, [3], [0, 3 * dtype.itemsize])}
        path.write_bytes(_file(table, bytes(3 * dtype.itemsize)))
        assert SafetensorsFile(path).tensor("t").dtype == dtype


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(KbitError, match="cannot be read"):
            SafetensorsFile(path)
