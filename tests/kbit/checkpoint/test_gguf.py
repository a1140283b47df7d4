"""GGUF import against transformers: the same model, the same logits, for every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from kbit.checkpoint import gguf as importer
from kbit.checkpoint.gguf import import_gguf
from kbit.checkpoint.gguf_config import ARCHITECTURES
from kbit.checkpoint.reader import open_checkpoint
from kbit.errors import KbitError
from kbit.models import describe
from tests.kbit.checkpoint.gguf_build import CASES, tiny_model, write_gguf


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A case's model and the directory that its file was imported into, made once."""

    @cache
    def make(case: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp(case)
        model = tiny_model(case)
        write_gguf(folder / "m.gguf", model)
        return model, import_gguf(folder / "m.gguf", folder / "out")

    return make


def test_every_architecture_has_a_case() -> None:
    built = {"gemma3" if kind == "gemma3_text" else kind for kind, _ in CASES.values()}
    assert built == set(ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_the_file_was_made_of(
    case: str, converted: Callable[[str], tuple[Any, Path]]
) -> None:
    model, out = converted(case)
    # 100 tokens: beyond the windows (16, 24) and the original contexts (64) of the scaled ones
    tokens = torch.randint(3, 250, (2, 100), generator=torch.Generator().manual_seed(0))
    expected = logits(model, tokens)
    found = logits(load(out), tokens)
    # The weights are equal bit for bit but for gemma's norms (1 added and subtracted in float32);
    # llama3's bounds come back from a fit.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    describe(open_checkpoint(out).config)  # kbit's own decoder knows what the import writes


@pytest.mark.parametrize("case", CASES)
def test_config_is_the_models_own(case: str, converted: Callable[[str], tuple[Any, Path]]) -> None:
    model, out = converted(case)
    expected, found = model.config.to_dict(), load(out).config.to_dict()
    beside = {"architectures", "dtype", "_name_or_path", "transformers_version", "head_dim"}
    for key in set(expected) - beside:
        if key == "rope_parameters":
            compare_rope(found[key], expected[key])
        else:
            assert found[key] == expected[key], key


def compare_rope(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if isinstance(value, dict):
            compare_rope(found[key], value)
        elif isinstance(value, float | list):
            np.testing.assert_allclose(found[key], value, rtol=1e-3, err_msg=key)
        else:
            assert found[key] == value, key


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Type.F16, np.float16),
        (Type.BF16, ml_dtypes.bfloat16),
        (Type.Q8_0, np.float16),
        (Type.Q4_0, np.float16),
        (Type.Q4_1, np.float16),
        (Type.Q5_1, np.float16),
    ],
)
def test_stored_types(kind: Type, dtype: Any, tmp_path: Path) -> None:
    """Float files are kept exactly; block types come back rounded once, to float16."""
    model = tiny_model("qwen2")
    write_gguf(tmp_path / "m.gguf", model, matrices=kind)
    found = open_checkpoint(import_gguf(tmp_path / "m.gguf", tmp_path / "out"))
    exact = open_checkpoint(import_gguf(tmp_path / "m.gguf", tmp_path / "exact", exact=True))
    name = "model.layers.1.mlp.down_proj.weight"
    value = model.state_dict()[name].numpy()
    expected = gguf.dequantize(gguf.quantize(value, kind), kind)
    assert found.tensor(name).dtype == dtype
    np.testing.assert_array_equal(found.tensor(name), expected.astype(dtype))
    np.testing.assert_array_equal(exact.tensor(name).astype(np.float32), expected)
    norm = "model.layers.1.input_layernorm.weight"
    np.testing.assert_array_equal(found.tensor(norm), model.state_dict()[norm].numpy())


def test_float32_values_that_fit_16_bits_take_16_bits(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16().float()
    write_gguf(tmp_path / "m.gguf", model)
    checkpoint = open_checkpoint(import_gguf(tmp_path / "m.gguf", tmp_path / "out"))
    for name, parameter in model.state_dict().items():
        stored = checkpoint.tensor(name)
        assert stored.dtype.itemsize == 2, name
        np.testing.assert_array_equal(stored.astype(np.float32), parameter.numpy())


def test_pieces_and_shards_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    write_gguf(tmp_path / "m.gguf", model, matrices=Type.Q8_0)
    whole = open_checkpoint(import_gguf(tmp_path / "m.gguf", tmp_path / "whole"))
    monkeypatch.setattr("kbit.checkpoint.gguf_file.CHUNK_ELEMENTS", 7 * 64)  # ragged last piece
    pieces = open_checkpoint(
        import_gguf(tmp_path / "m.gguf", tmp_path / "pieces", shard_bytes=30_000)
    )
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 3
    assert pieces.names() == whole.names()
    for name in whole.names():
        np.testing.assert_array_equal(pieces.tensor(name), whole.tensor(name))


class Told:
    """Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, total_bytes: int, done_bytes: int, title: str) -> None:
        self.total, self.done = total_bytes, done_bytes

    def advance(self, count_bytes: int) -> None:
        self.done += count_bytes

    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


def test_progress_counts_every_byte_written(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    told = Told()
    out = import_gguf(tmp_path / "m.gguf", tmp_path / "out", progress=told)
    stored = open_checkpoint(out)
    assert told.done == told.total == sum(stored.entry(name).nbytes for name in stored.names())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_broken_import_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model("llama"))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(importer.os, "fsync", fail)
    expected = KbitError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is KbitError else None):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    (tmp_path / "out").mkdir()
    with pytest.raises(KbitError, match="exists already"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def refused(path: Path, sentence: str) -> None:
    with pytest.raises(KbitError, match=sentence) as caught:
        import_gguf(path, path.parent / "out")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (path.parent / "out").exists()


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    refused(path, "cannot be read")
    path.write_bytes(b"PK\x03\x04 something else")
    refused(path, "is no GGUF file")
    path.write_bytes(b"GGUF")
    refused(path, "ends after 4 bytes")

    model = tiny_model("llama")
    write_gguf(path, model)
    good = path.read_bytes()
    path.write_bytes(b"GGUF\x01\0\0\0" + good[8:])
    refused(path, "version 1")
    path.write_bytes(b"GGUF\0\0\0\x03" + good[8:])
    refused(path, "big-endian")
    path.write_bytes(good[:-1])
    refused(path, "truncated")
    path.write_bytes(good[:3000])
    refused(path, "truncated or damaged")
    path.write_bytes(good.replace(b"llama", b"lemma"))
    refused(path, "architecture 'lemma' is not supported; known are llama, qwen2")
    path.write_bytes(good.replace(b"llama.rope.freq_base", b"llama.rope.freq_case"))
    refused(path, "'llama.rope.freq_case' is not understood")
    path.write_bytes(good.replace(b"llama.block_count", b"llama.block_bount"))
    refused(path, "'llama.block_count' is missing")
    path.write_bytes(good.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    refused(path, r"has no tensor 'blk.1.attn_q.weight'")
    write_gguf(path, model, extra={"llama.expert_count": 8})
    refused(path, "mixtures of experts")
    write_gguf(path, model, extra={"split.count": 3})
    refused(path, "one of 3 pieces of a split model")
    write_gguf(path, model, extra={"tokenizer.ggml.pre": "klingon"})
    refused(path, "pre-tokenizer 'klingon' is not supported; known are gpt-2")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    write_gguf(path, model)
    refused(path, r"'blk.1.ffn_up.weight' holds NaN or infinity")


def test_written_json_is_plain(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model("qwen3"))
    out = import_gguf(tmp_path / "m.gguf", tmp_path / "out", extra_files={"x.json": {"a": 1}})
    assert json.loads((out / "x.json").read_text()) == {"a": 1}
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
