"""Reading config.json: what is refused, by name, and what old and new spellings mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kbit.checkpoint.reader import open_checkpoint
from kbit.engine.executor import BACKENDS, backend_support, load_executor
from kbit.errors import KbitError
from kbit.models import describe, known_model_types, register
from tests.kbit.models.tiny import CASES, Tiny

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("model_type", ["mamba", "gemma3", None, 7])
def test_unknown_model_type_lists_the_known(model_type: object) -> None:
    with pytest.raises(KbitError) as caught:
        describe(LLAMA | {"model_type": model_type, "text_config": {}})
    assert repr(model_type) in str(caught.value)
    assert all(name in str(caught.value) for name in known_model_types())


def test_two_builders_under_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="llama"):
        register("llama")(lambda config, names: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sparse_attention": 3}, "sparse_attention"),
        ({"sliding_window": 7}, "sliding_window"),
        ({"hidden_act": "tanh"}, "gelu_pytorch_tanh"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"hidden_size": "24"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"head_dim": 7}, "rotary"),
        ({"rope_scaling": {"type": "cubic", "factor": 2.0}}, "cubic"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "twist": 1}}, "twist"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
    ],
)
def test_options_are_refused_by_name(change: dict[str, Any], told: str) -> None:
    with pytest.raises(KbitError, match=told):
        describe(LLAMA | change)


@pytest.mark.parametrize(
    ("case", "change", "told"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types lists 1"),
        ("gemma2", {"layer_types": ["full_attention", "chunked", "x"]}, "chunked"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_head": 5}, "5 heads"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual"),
        ("phi3-longrope-long", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            "1 entries",
        ),
    ],
)
def test_options_of_other_families_are_refused(
    case: str, change: dict[str, Any], told: str, tiny_model: Callable[[str], Tiny]
) -> None:
    config = open_checkpoint(tiny_model(case).path).config
    describe(config)
    with pytest.raises(KbitError, match=told):
        describe(config | change)


def test_null_private_and_harmless_options_pass() -> None:
    extra = {"sparse_attention": None, "_my_note": 3, "torch_dtype": "bfloat16", "use_cache": False}
    assert describe(LLAMA | extra) == describe(LLAMA)


def test_missing_and_unknown_tensors_are_refused() -> None:
    decoder = describe(LLAMA)
    names = list(decoder.tensors)
    assert describe(LLAMA, names) == decoder
    with pytest.raises(KbitError, match=r"lacks model\.norm\.weight"):
        describe(LLAMA, [n for n in names if n != "model.norm.weight"])
    with pytest.raises(KbitError, match=r"q_proj\.bias"):
        describe(LLAMA, [*names, "model.layers.0.self_attn.q_proj.bias"])
    describe(LLAMA, [*names, "model.layers.0.self_attn.rotary_emb.inv_freq"])


def test_prefix_and_head_follow_the_stored_names() -> None:
    bare = [name.removeprefix("model.") for name in describe(LLAMA).tensors]
    assert describe(LLAMA, bare).embedding == "embed_tokens.weight"
    tied = LLAMA | {"tie_word_embeddings": True}
    names = list(describe(tied).tensors)
    assert describe(tied, names).tied
    assert "lm_head.weight" not in describe(tied, names).tensors
    stored = describe(tied, [*names, "lm_head.weight"])
    assert not stored.tied
    assert stored.head.weight == "lm_head.weight"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 300.0}, {"rope_type": "default", "rope_theta": 300.0}),
        (
            {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_old_and_new_rotary_options_mean_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert describe(LLAMA | old) == describe(LLAMA | {"rope_parameters": new})


def test_old_gemma3_rotary_options() -> None:
    config = dict(CASES["gemma3_text"][1]) | {"model_type": "gemma3_text"}
    config |= {"rope_theta": 900.0, "rope_local_base_freq": 50.0, "sliding_window_pattern": 2}
    config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    layers = describe(config).layers
    assert [layer.attention.window for layer in layers] == [6, None, 6, None, 6, None, 6]
    near, far = layers[0].attention.rotary, layers[1].attention.rotary
    assert near is not None
    assert far is not None
    assert (near.theta, near.scaling) == (50.0, "default")
    assert (far.theta, far.scaling, far.factor) == (900.0, "linear", 8.0)


def test_mistral_tells_null_from_absent() -> None:
    config = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2}
    assert describe(config).layers[0].attention.window == 4096
    assert describe(config | {"sliding_window": None}).layers[0].attention.window is None


def test_roles_and_shapes_cover_the_checkpoint(tiny: Tiny) -> None:
    """Every stored tensor has a role, its stored shape, and rows that add up to the matrix."""
    checkpoint = open_checkpoint(tiny.path)
    decoder = describe(checkpoint.config, checkpoint.names())
    assert set(decoder.tensors) == set(checkpoint.names())
    for name, info in decoder.tensors.items():
        assert checkpoint.shape(name) == info.shape, name
        assert (len(info.shape) == 2) == (info.role in ("embedding", "position", "linear", "head"))
    covered: dict[str, list[int]] = {}
    for layer in decoder.layers:
        a, m = layer.attention, layer.mlp
        for part in filter(None, (a.q, a.k, a.v, a.o, m.gate, m.up, m.down)):
            rows = range(part.out_features) if part.rows is None else part.rows.index().tolist()
            assert len(rows) == part.out_features
            covered.setdefault(part.weight, []).extend(rows)
    for name, rows in covered.items():
        info = decoder.tensors[name]
        assert sorted(rows) == list(range(info.shape[1 if info.transposed else 0]))
    assert set(covered) | {
        "model.decoder.project_in.weight",
        "model.decoder.project_out.weight",
    } >= set(decoder.linear_names())


def test_rotary_tables_of_a_longer_cache_begin_with_those_of_a_shorter() -> None:
    """Except for the scalings that depend on the length, beyond the trained one."""
    for kind in ("default", "linear", "yarn", "dynamic"):
        scaling = {"type": kind} if kind == "default" else {"type": kind, "factor": 2.0}
        found = describe(LLAMA | {"rope_scaling": scaling}).layers[0].attention.rotary
        assert found is not None
        short, long = found.tables(40)[0], found.tables(64)[0]
        assert np.array_equal(short, long[:40])
        beyond = found.tables(100)[0][:40]
        assert np.array_equal(short, beyond) == (kind != "dynamic")
        assert found.tables(40)[0].shape == (40, 3)


def test_executor_refuses_what_does_not_fit(tiny_model: Callable[[str], Tiny]) -> None:
    checkpoint = open_checkpoint(tiny_model("gpt2").path)
    with pytest.raises(KbitError, match="known: auto, native, torch"):
        load_executor(checkpoint, "jax")
    with pytest.raises(KbitError, match="fp8"):
        load_executor(checkpoint, "torch", dtype="fp8")
    with pytest.raises(KbitError, match=r"no option 'isa'.*dtype"):
        load_executor(checkpoint, "torch", isa="avx2")
    with pytest.raises(KbitError, match=r"'int8' is the native executor's"):
        load_executor(checkpoint, "torch", arithmetic="int8")
    with pytest.raises(KbitError, match="no executor can run this gpt2 model on 'tpu'"):
        load_executor(checkpoint, "torch", "tpu")
    executor = load_executor(checkpoint, "torch")
    with pytest.raises(KbitError, match=r"65.*64"):
        executor.new_cache(1, 65)
    with pytest.raises(KbitError, match="capacity"):
        executor.new_cache(1, 0)
    cache = executor.new_cache(2, 8)
    with pytest.raises(KbitError, match=r"9 tokens.*8"):
        executor.forward([np.zeros(1, int), np.zeros(9, int)], cache)
    for bad in (-1, 101):
        with pytest.raises(KbitError, match="vocabulary of 101"):
            executor.forward([np.array([3]), np.array([bad])], cache)
    with pytest.raises(KbitError, match="1 sequences were given to a cache of 2"):
        executor.forward([np.array([3])], cache)
    assert list(cache.lengths) == [0, 0]


def test_a_tensor_of_the_wrong_shape_is_named(tiny_model: Callable[[str], Tiny]) -> None:
    class Wrong:
        def __init__(self) -> None:
            self._base = open_checkpoint(tiny_model("llama").path)
            self.path, self.config = self._base.path, self._base.config

        def names(self) -> list[str]:
            return self._base.names()

        def tensor(self, name: str) -> Any:
            tensor = self._base.tensor(name)
            return tensor[:-1] if name.endswith("layers.1.mlp.down_proj.weight") else tensor

    with pytest.raises(KbitError, match=r"layers\.1\.mlp\.down_proj\.weight.*\[47, 37\]"):
        load_executor(Wrong(), "torch")


def test_description_is_hashable_data(tiny: Tiny) -> None:
    decoder = describe(open_checkpoint(tiny.path).config)
    assert replace(decoder) == decoder
    assert hash(decoder.layers) == hash(replace(decoder).layers)


BAD = [None, True, -1, 0, 3, 2**40, 1e-9, -0.5, math.nan, math.inf, "x", "", [], [1], {}, {"a": 1}]


@pytest.mark.parametrize("case", sorted(CASES))
def test_damaged_configs_are_described_or_refused(
    case: str, tiny_model: Callable[[str], Tiny]
) -> None:
    """Any option, also inside rope_parameters, replaced by anything: KbitError or a description,
    and then finite rotary tables; never another exception, a hang or unbounded memory."""
    config = open_checkpoint(tiny_model(case).path).config
    changed: list[dict[str, Any]] = []
    for key, value in config.items():
        changed += [config | {key: bad} for bad in BAD]
        if isinstance(value, dict):
            for inner, nested in value.items():
                changed += [config | {key: value | {inner: bad}} for bad in BAD]
                if isinstance(nested, dict):
                    changed += [
                        config | {key: value | {inner: nested | {deep: bad}}}
                        for deep in nested
                        for bad in BAD
                    ]
    refused = 0
    for values in changed:
        try:
            decoder = describe(values)
        except KbitError:
            refused += 1
            continue
        rotary = decoder.layers[0].attention.rotary
        if rotary is not None and rotary.dim < 1000:
            assert np.isfinite(rotary.tables(90)[0]).all()
    assert len(changed) > 300
    assert refused > len(changed) // 4


def test_auto_takes_the_first_backend_that_can(tiny_model: Callable[[str], Tiny]) -> None:
    checkpoint = open_checkpoint(tiny_model("llama").path)
    support = backend_support(describe(checkpoint.config))
    assert list(support) == list(BACKENDS)
    assert support["torch"][0]
    assert all(reason for _, reason in support.values())
    able = [name for name, (ok, _) in support.items() if ok]
    assert load_executor(checkpoint).name == able[0]
    assert not any(ok for ok, _ in backend_support(describe(checkpoint.config), "tpu").values())


RELEASED: dict[str, dict[str, Any]] = {
    "llama": {"pretraining_tp": 1, "rope_interleaved": False, "is_llama_config": True},
    "qwen2": {"use_mrope": False, "use_sliding_window": False, "sliding_window": 32768},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    "gemma3_text": {"_sliding_window_pattern": 6, "use_bidirectional_attention": False},
    "phi3": {
        "lm_head_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "interpolate_factor": 1,
        "full_attn_mod": 1,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    },
    "gpt2": {"n_ctx": 64, "task_specific_params": {"text-generation": {"max_length": 50}}},
    "gpt_neox": {"rotary_pct": 0.25, "partial_rotary_factor": 0.25, "rotary_emb_base": 10000},
    "opt": {"_remove_final_layer_norm": False, "prefix": "</s>", "layerdrop": 0.0},
    "bloom": {
        "seq_length": 2048,
        "offset_alibi": 100,
        "masked_softmax_fusion": True,
        "n_inner": None,
        "skip_bias_add": True,
    },
}


@pytest.mark.parametrize("case", RELEASED)
def test_what_released_configs_carry_passes(case: str, tiny_model: Callable[[str], Tiny]) -> None:
    config = open_checkpoint(tiny_model(case).path).config
    found = describe(config | RELEASED[case])
    expected = describe(config)
    assert found.layers == expected.layers


@pytest.mark.parametrize(
    ("case", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")]
)
def test_checkpoints_of_the_bare_model_are_found(
    case: str, prefix: str, tiny_model: Callable[[str], Tiny]
) -> None:
    """The first releases of these families lack the prefix, and carry buffers."""
    checkpoint = open_checkpoint(tiny_model(case).path)
    bare = [name.removeprefix(prefix) for name in checkpoint.names()]
    buffers = ["h.0.attn.bias", "h.1.attn.masked_bias"] if case == "gpt2" else []
    decoder = describe(checkpoint.config, bare + buffers)
    assert list(decoder.tensors) == [
        name.removeprefix(prefix) for name in describe(checkpoint.config).tensors
    ]
