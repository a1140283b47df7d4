"""Bad input: one sentence, nothing written, nothing lost."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kbit
from kbit.checkpoint import writer
from kbit.checkpoint.reader import open_checkpoint
from kbit.quantize.pipeline import FilledFiles
from kbit_kernels.errors import KbitError
from tests.kbit.checkpoint.build import (
    BF16,
    llama_config,
    llama_tensors,
    safetensors_bytes,
    write_llama,
    write_model,
)

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def _tensors(edit: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = llama_tensors(llama_config())
        edit(tensors)
        (path / "model.safetensors").unlink()
        (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))

    return apply


def _put(name: str, value: float) -> Callable[[Path], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1)[3] = value

    return _tensors(edit)


def _cut(path: Path) -> None:
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw[:-100])


def _flip_header(path: Path) -> None:
    raw = bytearray((path / "model.safetensors").read_bytes())
    raw[raw.index(b"shape") + 9] ^= 1
    (path / "model.safetensors").write_bytes(raw)


def _config(**changes: Any) -> Callable[[Path], Any]:
    return lambda path: [(path / "config.json").write_text(json.dumps(llama_config(**changes)))]


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "has neither"),
    "truncated": (_cut, "truncated"),
    "header bit": (_flip_header, "damaged"),
    "NaN": (_put(UP, np.nan), f"'{UP}'.*NaN"),
    "infinite": (_put(UP, np.inf), f"'{UP}'.*infinite"),
    "NaN in a norm": (_put(NORM, np.nan), f"'{NORM}'.*NaN"),
    "wrong shape": (
        _tensors(lambda t: t.update({UP: t[UP][:-1]})),
        rf"'{UP}' has the shape \[79, 48\].*\[80, 48\]",
    ),
    "transposed": (_tensors(lambda t: t.update({UP: t[UP].T.copy()})), f"'{UP}' has the shape"),
    "lacks a tensor": (_tensors(lambda t: t.pop(UP)), f"lacks {UP}"),
    "unknown tensor": (_tensors(lambda t: t.update(adapter=t[NORM])), "adapter"),
    "integer weights": (
        _tensors(lambda t: t.update({UP: t[UP].astype(np.int32)})),
        f"'{UP}' is I32, which is not quantized",
    ),
    "unknown architecture": (_config(model_type="mamba"), "'mamba' is not known.*llama"),
    "scales beyond fp16": (
        _tensors(lambda t: t.update({UP: np.full((80, 48), 1e30, BF16)})),
        f"'{UP}'.*beyond fp16",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(tmp_path: Path, case: str) -> None:
    damage, reason = BAD_MODELS[case]
    model = write_llama(tmp_path / "a model")
    damage(model)
    with pytest.raises(KbitError, match=reason) as caught:
        kbit.quantize(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a model"]


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"bits": 1}, "bits is 1"),
    ({"bits": 9}, "bits is 9"),
    ({"bits": 4.5}, "bits is 4.5"),
    ({"block": 63}, "block is 63"),
    ({"block": "64"}, "block is '64'"),
    ({"dtype": "nf5x"}, "unknown data type 'nf5x'"),
    ({"dtype": "bnb", "bits": 3}, "not 3"),
    ({"scale_dtype": "fp8"}, "scale dtype is 'fp8'"),
    ({"outliers": 1.5}, "outliers is 1.5"),
    ({"exponent": 2}, "no exponent bits"),
    ({"spec": "nf4-b64-what"}, "'what'"),
    ({"spec": "nf4-b64", "bits": 4}, "leave out bits"),
    ({"threads": 0}, "threads is 0"),
    ({"method": "magic"}, "unknown method 'magic'"),
    ({"recipe": "none.toml"}, r"none\.toml: cannot be read"),
]


@pytest.mark.parametrize(("options", "reason"), BAD_OPTIONS)
def test_bad_options(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    model = write_llama(tmp_path / "model")
    with pytest.raises(KbitError, match=reason):
        kbit.quantize(model, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_recipe_that_matches_nothing(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    (tmp_path / "r.toml").write_text("[[rules]]\ntensors = 'transformer.*'\nspec = 'nf4-b64'")
    with pytest.raises(KbitError, match=r"r\.toml, rule 1 matches nothing.*model\.embed_tokens"):
        kbit.quantize(model, tmp_path / "out", recipe=tmp_path / "r.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "r.toml"]


def test_quantized_twice(tmp_path: Path) -> None:
    kbit.quantize(write_llama(tmp_path / "model"), tmp_path / "out")
    with pytest.raises(KbitError, match="is quantized already"):
        kbit.quantize(tmp_path / "out", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def _snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_an_output_that_exists(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    kbit.quantize(model, tmp_path / "out", 3)
    before = _snapshot(tmp_path)
    with pytest.raises(KbitError, match=r"exists already.*--force"):
        kbit.quantize(model, tmp_path / "out", 4)
    assert _snapshot(tmp_path) == before
    kbit.quantize(model, tmp_path / "out", 4, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert str(open_checkpoint(tmp_path / "out").spec(UP)) == "nf4-b64"


def test_force_replaces_nothing_but_checkpoints(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    before = _snapshot(tmp_path)
    for name, reason in (("home", "no checkpoint"), ("file", "no directory"), ("link", "no dir")):
        with pytest.raises(KbitError, match=reason):
            kbit.quantize(model, tmp_path / name, force=True)
    for out in (model, model / "inside", tmp_path):
        with pytest.raises(KbitError, match=r"overlaps|no checkpoint"):
            kbit.quantize(model, out, force=True)
    assert _snapshot(tmp_path) == before


def test_a_failing_force_loses_nothing(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    kbit.quantize(model, tmp_path / "out", 3)
    _put(UP, np.nan)(model)
    before = _snapshot(tmp_path)
    with pytest.raises(KbitError, match="NaN"):
        kbit.quantize(model, tmp_path / "out", 4, force=True)
    assert _snapshot(tmp_path) == before


@pytest.mark.parametrize("owner", ["os.posix_fallocate", "os.pwrite", "os.fsync"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    model = write_llama(tmp_path / "model")

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(owner, full)
        with pytest.raises(
            KbitError, match=r"out: the disk is full .*MB are needed.*MB are free"
        ) as caught:
            kbit.quantize(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".out.partial", "model"] if owner == "os.fsync" else left == ["model"]
    kbit.quantize(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_disk_that_fills_up_on_the_way_loses_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_llama(tmp_path / "model")
    write, calls = FilledFiles.write, 0

    def filling(self: FilledFiles, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FilledFiles, "write", filling)
        with pytest.raises(KbitError, match="the disk is full"):
            kbit.quantize(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert kbit.quantize(model, tmp_path / "out").resumed_tensors > 3


def test_file_systems_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    model = write_llama(tmp_path / "model")
    kbit.quantize(model, tmp_path / "a")
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    kbit.quantize(model, tmp_path / "b")
    assert _snapshot(tmp_path / "a") == _snapshot(tmp_path / "b")


def test_an_output_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_llama(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(KbitError, match="cannot be written"):
        kbit.quantize(model, tmp_path / "file" / "out")
    with pytest.raises(KbitError, match="cannot be written"):
        kbit.quantize(model, Path("/proc/kbit-out"))

    def denied(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", denied)  # root may write anywhere, so it can't be had for real
        with pytest.raises(KbitError, match=r"cannot be written \(Permission denied"):
            kbit.quantize(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_where_two_names_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_llama(tmp_path / "model")
    kbit.quantize(model, tmp_path / "out", 3)
    monkeypatch.setattr(writer, "_exchange", lambda first, second: False)
    kbit.quantize(model, tmp_path / "out", 4, force=True)
    assert str(open_checkpoint(tmp_path / "out").spec(UP)) == "nf4-b64"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_wide_values_keep_with_another_scale_dtype(tmp_path: Path) -> None:
    """What the error about fp16 scales advises works."""
    tensors = llama_tensors(llama_config())
    tensors[UP] = np.full((80, 48), 1e30, BF16)
    model = write_model(tmp_path / "model", llama_config(), tensors)
    kbit.quantize(model, tmp_path / "out", scale_dtype="fp32")
    found = kbit_values(tmp_path / "out")
    np.testing.assert_allclose(found, 1e30, rtol=0.01)


def kbit_values(path: Path) -> np.ndarray:
    import kbit_kernels

    tensor = open_checkpoint(path).tensor(UP)
    assert isinstance(tensor, kbit_kernels.QuantizedTensor)
    return kbit_kernels.dequantize(tensor)


def test_no_thread_outlives_a_failure(tmp_path: Path) -> None:
    import threading

    model = write_llama(tmp_path / "model")
    _put(UP, np.nan)(model)
    before = threading.active_count()
    with pytest.raises(KbitError, match="NaN"):
        kbit.quantize(model, tmp_path / "out", threads=4)
    assert threading.active_count() == before
