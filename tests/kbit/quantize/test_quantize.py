"""The pipeline against quantizing each tensor at once, and what it writes around the tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kbit
import kbit_kernels
from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.checkpoint.verify import verify_checkpoint
from kbit.checkpoint.writer import plan_layout
from kbit.quantize import api, pipeline
from kbit.quantize.api import QuantizeResult
from kbit.quantize.methods import get_method, known_methods
from kbit_kernels import QuantizedTensor, QuantSpec
from kbit_kernels.errors import KbitError
from kbit_kernels.reference.quantize import largest_deviation_columns
from tests.kbit.checkpoint.build import llama_config, llama_tensors, write_llama, write_model

SPECS = ["nf4-b64", "int3-b32", "uint8-row", "fp5e2-b16-bf16", "lloyd2-b64", "int4-b16-dq"]
SPECS += ["int6-b128-fp32-center", "nf3-b32-out0.1"]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces even of tiny tensors, ragged ones too."""
    monkeypatch.setattr(pipeline, "_MIN_PIECE_ELEMENTS", 400)
    monkeypatch.setattr(pipeline, "_MAX_PIECE_ELEMENTS", 400)


@pytest.mark.usefixtures("small_pieces")
def test_a_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose data lies misaligned gives a copy of the whole tensor each time."""
    read: list[str] = []
    tensor = Checkpoint.tensor

    def counted(checkpoint: Checkpoint, name: str) -> Any:
        read.append(name)
        return tensor(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    kbit.quantize(write_llama(tmp_path / "model"), tmp_path / "out", spec="int4-b64", threads=3)
    assert len(read) == len(set(read))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("text", SPECS)
def test_every_part_equals_the_matrix_quantized_at_once(
    tmp_path: Path, text: str, shards: int
) -> None:
    dtype = np.dtype(["float32", "float16", "bfloat16"][len(text) % 3])
    if dtype.name == "bfloat16":
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    config = llama_config()
    tensors = llama_tensors(config, dtype)
    model = write_model(tmp_path / "model", config, tensors, shards)
    result = kbit.quantize(model, tmp_path / "out", spec=text, threads=3)
    written = open_checkpoint(tmp_path / "out")
    assert verify_checkpoint(written) == []
    assert set(written.names()) == set(tensors)
    total = 0
    for name, w in tensors.items():
        found = written.tensor(name)
        if name.endswith("norm.weight"):
            assert isinstance(found, np.ndarray)
            assert found.dtype == w.dtype
            assert found.tobytes() == w.tobytes()
            total += w.nbytes
            continue
        expected = kbit_kernels.quantize(w, QuantSpec.parse(text))
        assert isinstance(found, QuantizedTensor)
        assert str(found.spec) == text
        assert found.parts().keys() == expected.parts().keys()
        for suffix, part in expected.parts().items():
            np.testing.assert_array_equal(found.parts()[suffix], part, err_msg=f"{name} {suffix}")
        total += expected.nbytes
    parameters = sum(w.size for w in tensors.values())
    assert (result.bytes, result.parameters) == (total, parameters)
    assert result.bits_per_param == 8 * total / parameters
    assert result.source_bytes == sum(w.nbytes for w in tensors.values())
    assert result.kept_roles == {"norm": 5}


def test_search_is_passed_on_and_recorded(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config())
    model = write_model(tmp_path / "model", llama_config(), tensors)
    kbit.quantize(model, tmp_path / "out", spec="int2-b32", search=True)
    written = open_checkpoint(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    found = written.tensor(name)
    assert isinstance(found, QuantizedTensor)
    expected = kbit_kernels.quantize(tensors[name], found.spec, search=True)
    plain = kbit_kernels.quantize(tensors[name], found.spec)
    np.testing.assert_array_equal(found.scales, expected.scales)
    np.testing.assert_array_equal(found.codes, expected.codes)
    assert not np.array_equal(found.scales, plain.scales)
    assert written.quantization is not None
    assert written.quantization["search"] is True


def test_outlier_columns_are_those_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((300, 70)).astype(np.float32) * rng.random(70, np.float32) + 3
    spec = QuantSpec.parse("int4-b32-out0.1")
    found = get_method("rtn").prepare(w, spec)["outlier_columns"]
    np.testing.assert_array_equal(found, largest_deviation_columns(w, 7))


def _gpt2(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    config = {
        "model_type": "gpt2",
        "vocab_size": 50,
        "n_embd": 24,
        "n_layer": 1,
        "n_head": 3,
        "n_positions": 16,
        "tie_word_embeddings": True,
    }
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (50, 24), "wpe.weight": (16, 24)}
    for name, (rows, columns) in {
        "attn.c_attn": (24, 72),
        "attn.c_proj": (24, 24),
        "mlp.c_fc": (24, 96),
        "mlp.c_proj": (96, 24),
    }.items():
        shapes |= {f"h.0.{name}.weight": (rows, columns), f"h.0.{name}.bias": (columns,)}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes |= {f"{name}.weight": (24,), f"{name}.bias": (24,)}
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), bool))  # a buffer nothing reads
    return write_model(tmp_path / "gpt2", config, tensors), tensors


@pytest.mark.usefixtures("small_pieces")
def test_transposed_weights_are_stored_out_by_in_and_flagged(tmp_path: Path) -> None:
    model, tensors = _gpt2(tmp_path)
    result = kbit.quantize(model, tmp_path / "out", spec="int8-b16")
    written = open_checkpoint(tmp_path / "out")
    assert written.quantization is not None
    for name in ("h.0.attn.c_attn.weight", "h.0.mlp.c_proj.weight"):
        found = written.tensor(name)
        assert isinstance(found, QuantizedTensor)
        assert found.shape == written.shape(name) == tensors[name].shape[::-1]
        assert written.quantization["tensors"][name]["transposed"] is True
        expected = kbit_kernels.quantize(np.ascontiguousarray(tensors[name].T), found.spec)
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scales, expected.scales)
    assert written.quantization["tensors"]["wte.weight"]["transposed"] is False
    assert result.dropped_tensors == ("h.0.attn.bias",)
    assert "h.0.attn.bias" not in written
    assert result.kept_roles == {"position": 1, "norm": 3, "bias": 7}


def test_tied_head_stays_one_tensor(tmp_path: Path) -> None:
    """Also where the source stores the head a second time."""
    config = llama_config()
    tensors = llama_tensors(config)
    twice = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    once = kbit.quantize(write_model(tmp_path / "once", config, tensors), tmp_path / "a")
    both = kbit.quantize(write_model(tmp_path / "both", config, twice), tmp_path / "b")
    assert once.bytes == both.bytes
    assert both.dropped_tensors == ("lm_head.weight",)
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "b")


def test_untied_head_is_quantized_and_recipes_reach_it(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", tie_word_embeddings=False)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        """default = "int4-b32"
        rules = [{roles = "head", spec = "int8-b32"}, {tensors = "*embed*", spec = "keep"}]"""
    )
    result = kbit.quantize(model, tmp_path / "out", recipe=recipe)
    written = open_checkpoint(tmp_path / "out")
    assert str(written.spec("lm_head.weight")) == "int8-b32"
    assert written.spec("model.embed_tokens.weight") is None
    assert str(written.spec("model.layers.0.mlp.up_proj.weight")) == "int4-b32"
    assert result.kept_roles == {"embedding": 1, "norm": 5}


def test_files_around_the_weights(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "my model")
    (model / "pytorch_model.bin").write_bytes(b"old weights")
    (model / ".cache").mkdir()
    kbit.quantize(model, tmp_path / "out dir")
    out = tmp_path / "out dir"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    for name in ("generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    block = config.pop("quantization_config")
    assert config == llama_config()
    assert block["method"] == "rtn"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my model", "out dir"]


def test_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", num_hidden_layers=4)
    for threads in (1, 5):
        kbit.quantize(model, tmp_path / f"{threads}", threads=threads)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "5" / path.name).read_bytes()


def test_shards_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_llama(tmp_path / "model")
    monkeypatch.setattr(
        api, "plan_layout", lambda tensors: plan_layout(tensors, max_shard_bytes=4000)
    )
    kbit.quantize(model, tmp_path / "out")
    written = open_checkpoint(tmp_path / "out")
    assert len(written.files) > 3
    assert verify_checkpoint(written) == []
    assert set(written.names()) == set(llama_tensors(llama_config()))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "nf4-b64"),
        ({"bits": 2}, "lloyd2-b64"),
        ({"bits": 3}, "nf3-b64"),
        ({"bits": 5}, "int5-b64"),
        ({"bits": 4, "dtype": "int", "block": 128}, "int4-b128"),
        ({"bits": 4, "block": 0, "scale_dtype": "bf16"}, "nf4-row-bf16"),
        ({"bits": 5, "dtype": "fp", "exponent": 2, "center": True}, "fp5e2-b64-center"),
        ({"double_quant": True, "outliers": 0.02}, "nf4-b64-dq-out0.02"),
        ({"spec": "uint2-b16"}, "uint2-b16"),
    ],
)
def test_options_name_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: str
) -> None:
    write_llama(tmp_path / "model", num_hidden_layers=1)
    monkeypatch.chdir(tmp_path)
    result = kbit.quantize("model", **options)
    assert result.path == tmp_path / f"model-{expected}"
    assert isinstance(result, QuantizeResult)
    assert json.loads(json.dumps(result.to_json()))["spec"] == expected
    specs = {
        str(open_checkpoint(result.path).spec(n)) for n in open_checkpoint(result.path).names()
    }
    assert specs == {expected, "None"}


def test_unknown_method_lists_the_known(tmp_path: Path) -> None:
    assert "rtn" in known_methods()
    with pytest.raises(KbitError, match=r"'gptqq'; known are .*rtn"):
        kbit.quantize(write_llama(tmp_path / "m"), tmp_path / "o", method="gptqq")


@pytest.mark.parametrize("name", known_methods())
def test_every_method_keeps_the_protocol(name: str) -> None:
    method = get_method(name)
    assert method.summary
    w = np.random.default_rng(0).standard_normal((20, 96)).astype(np.float32)
    for text in SPECS:
        spec = QuantSpec.parse(text)
        prepared = method.prepare(w, spec)
        whole = method.quantize(w, spec, False, prepared)
        if method.rows_apart(spec):
            apart = [method.quantize(w[r : r + 7], spec, False, prepared) for r in (0, 7, 14)]
            codes = np.concatenate([piece.codes for piece in apart])
            np.testing.assert_array_equal(codes, whole.codes)
