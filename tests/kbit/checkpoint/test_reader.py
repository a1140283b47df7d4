"""Checkpoint directories, plain and kbit: reading, and refusing what does not fit."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import kbit
from kbit.checkpoint.reader import open_checkpoint
from kbit.checkpoint.verify import verify_checkpoint
from kbit_kernels import QuantizedTensor
from kbit_kernels.errors import KbitError
from tests.kbit.checkpoint.build import llama_config, llama_tensors, write_llama, write_model


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_plain_directories(tmp_path: Path, dtype: str, shards: int) -> None:
    config = llama_config()
    tensors = llama_tensors(config, np.dtype(dtype))
    checkpoint = open_checkpoint(write_model(tmp_path / "a model", config, tensors, shards))
    assert sorted(checkpoint.names()) == sorted(tensors)
    assert checkpoint.config == config
    assert checkpoint.generation_config == {"eos_token_id": 2}
    assert checkpoint.quantization is None
    for name, expected in tensors.items():
        assert name in checkpoint
        found = checkpoint.tensor(name)
        assert isinstance(found, np.ndarray)
        assert found.dtype == expected.dtype == checkpoint.dtype(name)
        assert found.tobytes() == expected.tobytes()
        assert checkpoint.shape(name) == expected.shape
        assert checkpoint.spec(name) is None
        assert checkpoint.nbytes(name) == expected.nbytes
    assert "model.nothing" not in checkpoint
    for call in (checkpoint.tensor, checkpoint.spec, checkpoint.shape, checkpoint.nbytes):
        with pytest.raises(KbitError, match=r"has no tensor 'model\.nothing'"):
            call("model.nothing")


def _drop_shard(path: Path) -> None:
    (path / "model-00002-of-00003.safetensors").unlink()


def _edit_index(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        index = path / "model.safetensors.index.json"
        table = json.loads(index.read_text())
        edit(table)
        index.write_text(json.dumps(table))

    return apply


BAD_DIRECTORIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "no such directory"),
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json"),
    "config cut off": (lambda path: (path / "config.json").write_text('{"a": '), "JSON"),
    "config a list": (lambda path: (path / "config.json").write_text("[]"), "object"),
    "generation config": (lambda path: (path / "generation_config.json").write_text("x"), "JSON"),
    "missing shard": (_drop_shard, "shard model-00002-of-00003.safetensors is missing"),
    "no weights": (lambda path: (path / "model.safetensors.index.json").unlink(), "has neither"),
    "no weight map": (_edit_index(lambda table: table.pop("weight_map")), "weight_map"),
    "shard elsewhere": (
        _edit_index(lambda table: table["weight_map"].update(x="../secret.safetensors")),
        "'../secret.safetensors'",
    ),
    "tensor not in its shard": (
        _edit_index(lambda table: table["weight_map"].update(x=table["weight_map"].popitem()[1])),
        "lacks tensor 'x'",
    ),
    "another quantizer": (
        lambda path: (path / "config.json").write_text(
            '{"quantization_config": {"quant_method": "gptq"}}'
        ),
        "'gptq'",
    ),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_bad_directories_are_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    damage, reason = BAD_DIRECTORIES[case]
    path = write_llama(tmp_path / "model", shards=3)
    damage(path)
    with pytest.raises(KbitError, match=reason) as caught:
        open_checkpoint(path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model")
    with pytest.raises(KbitError, match="is a file"):
        open_checkpoint(path / "model.safetensors")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("quantized")
    kbit.quantize(write_llama(base / "model"), base / "out", spec="int3-b32")
    return base / "out"


@pytest.fixture
def copy(quantized: Path, tmp_path: Path) -> Path:
    return shutil.copytree(quantized, tmp_path / "copy")


def test_kbit_directory(quantized: Path) -> None:
    checkpoint = open_checkpoint(quantized)
    names = list(llama_tensors(llama_config()))
    assert checkpoint.names() == names
    assert checkpoint.quantization is not None
    assert checkpoint.quantization["quant_method"] == "kbit"
    assert checkpoint.quantization["format_version"] == 1
    raw = dict(safetensors.deserialize((quantized / "model.safetensors").read_bytes()))
    for name in names:
        if name.endswith("norm.weight"):
            assert checkpoint.spec(name) is None
            assert isinstance(checkpoint.tensor(name), np.ndarray)
            continue
        tensor = checkpoint.tensor(name)
        assert isinstance(tensor, QuantizedTensor)
        assert str(tensor.spec) == str(checkpoint.spec(name)) == "int3-b32"
        assert tensor.shape == checkpoint.shape(name)
        assert set(tensor.parts()) == {"codes", "scales"}
        for suffix, part in tensor.parts().items():
            assert part.tobytes() == bytes(raw[f"{name}.{suffix}"]["data"])
            assert part.ctypes.data % part.dtype.itemsize == 0
        assert tensor.nbytes == checkpoint.nbytes(name)
    assert verify_checkpoint(checkpoint) == []


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def _edit_block(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        edit(config["quantization_config"])
        (path / "config.json").write_text(json.dumps(config))

    return apply


def _set(*keys: str, to: Any) -> Callable[[Path], None]:
    def edit(block: dict[str, Any]) -> None:
        for key in keys[:-1]:
            block = block[key]
        block[keys[-1]] = to

    return _edit_block(edit)


BAD_KBIT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "newer version": (_set("format_version", to=2), "format version 2"),
    "version no number": (_set("format_version", to="1"), "format version '1'"),
    "version true": (_set("format_version", to=True), "format version True"),
    "version missing": (_edit_block(lambda b: b.pop("format_version")), "format version missing"),
    "block a list": (_set("tensors", to=[]), "tensors is"),
    "unknown spec": (_set("tensors", Q_PROJ, "spec", to="int9-b32"), f"{Q_PROJ}'.*9"),
    "other width": (_set("tensors", Q_PROJ, "spec", to="int4-b32"), f"{Q_PROJ}.codes'"),
    "other block": (_set("tensors", Q_PROJ, "spec", to="int3-b16"), f"{Q_PROJ}.scales'"),
    "other scale dtype": (_set("tensors", Q_PROJ, "spec", to="int3-b32-bf16"), "bfloat16"),
    "other parts": (_set("tensors", Q_PROJ, "spec", to="uint3-b32"), "zeros"),
    "other shape": (_set("tensors", Q_PROJ, "shape", to=[48, 80]), f"{Q_PROJ}.codes'"),
    "huge shape": (_set("tensors", Q_PROJ, "shape", to=[1 << 40, 1 << 40]), "impossibly"),
    "empty shape": (_set("tensors", Q_PROJ, "shape", to=[0, 48]), r"no \[out, in\]"),
    "shape of strings": (_set("tensors", Q_PROJ, "shape", to=["48", "48"]), "no list of sizes"),
    "no checksum": (_set("tensors", Q_PROJ, "sha256", to={}), "checksums"),
    "bad checksum": (_set("tensors", Q_PROJ, "sha256", "codes", to="123"), "no sha256"),
    "tensor unlisted": (_edit_block(lambda b: b["tensors"].pop(Q_PROJ)), "does not list"),
    "tensor twice": (
        _edit_block(lambda b: b["kept"].update({Q_PROJ: b["kept"]["model.norm.weight"]})),
        "as quantized and as kept",
    ),
    "tensor absent": (
        _edit_block(lambda b: b["kept"].update(x=b["kept"]["model.norm.weight"])),
        "'x' is missing",
    ),
    "kept dtype": (_set("kept", "model.norm.weight", "dtype", to="F16"), "model.norm.weight"),
    "header checksum": (_set("headers", "model.safetensors", to="0" * 64), "header fails"),
    "header unlisted": (_set("headers", to={}), "no header checksum"),
    "same sizes, other codes": (
        lambda path: [
            (path / "config.json").write_text(
                (path / "config.json").read_text().replace("int3", "fp3e2")
            )
        ],
        "quantization_config in config.json fails its checksum",
    ),
    "file absent": (
        _edit_block(lambda b: b["headers"].update({"b.safetensors": "0" * 64})),
        "b.safetensors is missing",
    ),
}


@pytest.mark.parametrize("case", BAD_KBIT)
def test_what_does_not_fit_is_refused_by_name(copy: Path, case: str) -> None:
    damage, reason = BAD_KBIT[case]
    damage(copy)
    with pytest.raises(KbitError, match=reason) as caught:
        open_checkpoint(copy)
    assert "\n" not in str(caught.value)


def test_every_flipped_header_bit_shows_at_open(copy: Path) -> None:
    path = copy / "model.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little") + 8
    rng = np.random.default_rng(0)
    for bit in [*range(64), *rng.integers(64, 8 * length, 200)]:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        path.unlink()  # a new file: other tests' mappings of the old one stay whole
        path.write_bytes(bad)
        with pytest.raises(KbitError, match=r"model\.safetensors"):
            open_checkpoint(copy)


def test_every_flipped_body_bit_is_found_and_named(copy: Path) -> None:
    path = copy / "model.safetensors"
    good = path.read_bytes()
    entries = open_checkpoint(copy).files["model.safetensors"].entries
    for stored, entry in entries.items():
        for position in {entry.start, entry.end - 1}:
            bad = bytearray(good)
            bad[position] ^= 0x10
            path.unlink()
            path.write_bytes(bad)
            damages = verify_checkpoint(open_checkpoint(copy), threads=2)
            assert [damage.stored for damage in damages] == [stored]
            assert damages[0].found != damages[0].expected


def test_checksums_are_plain_sha256(quantized: Path) -> None:
    """Someone without kbit can check them."""
    block = json.loads((quantized / "config.json").read_text())["quantization_config"]
    raw = dict(safetensors.deserialize((quantized / "model.safetensors").read_bytes()))
    for name, entry in block["tensors"].items():
        for suffix, digest in entry["sha256"].items():
            data = bytes(raw.pop(f"{name}.{suffix}")["data"])
            assert hashlib.sha256(data).hexdigest() == digest
    for name, entry in block["kept"].items():
        assert hashlib.sha256(bytes(raw.pop(name)["data"])).hexdigest() == entry["sha256"]
    assert not raw


def test_truncated_body_shows_at_open(copy: Path) -> None:
    path = copy / "model.safetensors"
    good = path.read_bytes()
    path.unlink()
    path.write_bytes(good[:-1])
    with pytest.raises(KbitError, match="truncated"):
        open_checkpoint(copy)
