"""What a GGUF file says about its decoder: config.json, and which tensor goes where.

One entry of `ARCHITECTURES` for each `general.architecture`. Every key below the architecture's
prefix is used or known to be without effect; any other is refused by name, because a key that is
not understood may change what the model computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kbit.checkpoint.gguf_file import GGUFFile
from kbit_kernels.errors import KbitError

MAX_COUNT = 1 << 24  # heads, widths, contexts: far above any model, far below overflow

Transform = Literal["", "rotary", "minus_one"]

WITHOUT_EFFECT = {
    "vocab_size",  # the embedding's rows say it
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "pooling_type",
    "expert_count",  # zero, or the feed-forward tensors have other names
    "expert_used_count",
}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the checkpoint: its name there, its name in the GGUF file, its shape.

    `rotary`: rows of each of `heads` heads are interleaved pairs and become two halves;
    `minus_one`: the file stores 1 + weight.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    transform: Transform = ""
    heads: int = 0


@dataclass
class Plan:
    config: dict[str, Any]
    tensors: list[PlannedTensor] = field(default_factory=list)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32 (the file stores 1e-05 as 9.99999974e-06)."""
    return float(str(np.float32(value)))


class Keys:
    """Typed access to the keys below one architecture's prefix; remembers what was asked for."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.path: Path = file.path
        self.tensors = file.tensors
        self.prefix = prefix + "."
        self.values = {
            key.removeprefix(self.prefix): value
            for key, value in file.metadata.items()
            if key.startswith(self.prefix)
        }
        self.asked: set[str] = set(WITHOUT_EFFECT)

    def error(self, key: str, reason: str) -> KbitError:
        return KbitError(f"{self.path}: the key {self.prefix + key[:60]!r} {reason}")

    def _get(self, key: str, kind: type, default: Any) -> Any:
        self.asked.add(key)
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise self.error(key, "is missing; the file is damaged")
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # the same number for every layer
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            found = f"a {type(value).__name__}" if np.ndim(value) == 0 else "a value for each layer"
            raise self.error(key, f"holds {found}, where one {kind.__name__} is expected")
        return value

    def count(self, key: str, default: Any = ..., least: int = 1) -> Any:
        value = self._get(key, int, default)
        if value is not default and not least <= value <= MAX_COUNT:
            raise self.error(key, f"is {value}; {least} to {MAX_COUNT} are possible")
        return value

    def real(self, key: str, default: Any = ...) -> Any:
        """A positive, finite number, or the default."""
        value = self._get(key, float, default)
        if value is not default and not (math.isfinite(value) and value > 0):
            raise self.error(key, f"is {value}, no positive number")
        return value if value is default else _shortest(value)

    def text(self, key: str, default: Any = ...) -> Any:
        return self._get(key, str, default)

    def refuse_others(self) -> None:
        others = sorted(set(self.values) - self.asked)
        if others:
            raise self.error(
                others[0], "is not understood, so the model might be computed wrongly; not imported"
            )


def _rope_scaling(keys: Keys, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json: none, linear, yarn, llama3 or longrope."""
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.real("rope.scaling.factor", None)
    original = keys.count("rope.scaling.original_context_length", None)
    attention_factor = keys.real("rope.scaling.attn_factor", None)
    longrope = "rope_factors_long.weight" in file.tensors
    if "rope_freqs.weight" in file.tensors and kind == "none":
        return _llama3_scaling(file, config)
    if longrope and kind in ("none", "longrope", "su"):
        return _longrope_scaling(file, config, original, attention_factor)
    if attention_factor not in (None, 1.0):
        raise keys.error("rope.scaling.attn_factor", f"is {attention_factor}; only 1 is understood")
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    if kind not in ("linear", "yarn") or factor is None:
        raise keys.error(
            "rope.scaling.type", f"is {kind!r} with factor {factor}; known are none, linear, yarn"
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        if original is None:
            raise keys.error("rope.scaling.original_context_length", "is missing for yarn scaling")
        scaling["original_max_position_embeddings"] = original
        for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if (value := keys.real(f"rope.scaling.{key}", None)) is not None:
                scaling[name] = value
    return scaling


def _factors(file: GGUFFile, name: str, count: int) -> np.ndarray:
    if name not in file.tensors or file.tensors[name].shape != (count,):
        raise KbitError(f"{file.path}: the tensor {name!r} should hold {count} rotary factors")
    values = file.array(name).astype(np.float64)
    if not (values > 0).all():
        raise KbitError(f"{file.path}: the tensor {name!r} holds a factor that is not positive")
    return values


def _llama3_scaling(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling out of `rope_freqs.weight`, the factors that divide each frequency.

    The file has the factors f of the pairs but not the four numbers they were made of. Between
    the two bounds 1/f = (1 - s) / factor + s with s = (original / wavelength - low) / (high - low):
    a straight line over 1/wavelength, whose slope and offset fix low and high once `original` is
    chosen (any choice gives the same factors; 8192 is what the Llama 3 models have).
    """
    half = config["head_dim"] // 2
    factors = _factors(file, "rope_freqs.weight", half)
    if (factors == 1).all():
        return {"rope_type": "linear", "factor": 1.0}
    inverse_wavelength = config["rope_theta"] ** (-np.arange(half) / half) / (2 * np.pi)
    factor, original = float(factors.max()), 8192
    low, high = 1.0, 4.0
    between = (factors > 1) & (factors < factor)
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(inverse_wavelength[between], smooth, 1)
        low = -offset * original / slope
        high = low + original / slope
        low, high = round(float(low), 4), round(float(high), 4)
    smooth = np.clip((original * inverse_wavelength - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
        raise KbitError(
            f"{file.path}: the tensor 'rope_freqs.weight' follows no rotary scaling known here "
            "(llama3 is)"
        )
    return {
        "rope_type": "llama3",
        "factor": _shortest(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _longrope_scaling(
    file: GGUFFile, config: dict[str, Any], original: int | None, attention_factor: float | None
) -> dict[str, Any]:
    if config["model_type"] != "phi3" or original is None:
        raise KbitError(f"{file.path}: long rotary factors are understood in phi3 files only")
    half = int(config["head_dim"] * config["partial_rotary_factor"]) // 2
    config["original_max_position_embeddings"] = original
    scaling: dict[str, Any] = {"type": "longrope"}
    for key in ("long", "short"):
        values = _factors(file, f"rope_factors_{key}.weight", half)
        scaling[f"{key}_factor"] = [_shortest(value) for value in values]
    ratio = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    if attention_factor is not None and abs(attention_factor - usual) > 1e-4:
        scaling["attention_factor"] = attention_factor
    return scaling


def _common(keys: Keys, file: GGUFFile, model_type: str, architecture: str) -> dict[str, Any]:
    """The part of config.json that all architectures share."""
    if any(keys.count(key, 0, least=0) for key in ("expert_count", "expert_used_count")):
        raise keys.error("expert_count", "is not zero; mixtures of experts are not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise KbitError(f"{file.path}: has no matrix 'token_embd.weight'; the file is damaged")
    heads = keys.count("attention.head_count")
    hidden = keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", hidden // heads)
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise keys.error("attention.value_length", f"differs from the key length {head_dim}")
    layers = keys.count("block_count")
    if layers > len(file.tensors):
        raise keys.error("block_count", f"is {layers}, but there are {len(file.tensors)} tensors")
    rotary = keys.count("rope.dimension_count", head_dim)
    if rotary > head_dim or rotary % 2:
        raise keys.error("rope.dimension_count", f"is {rotary} for heads of {head_dim}")
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if heads % config["num_key_value_heads"]:
        raise keys.error("attention.head_count_kv", f"does not divide the {heads} heads")
    if model_type == "phi3":
        config["partial_rotary_factor"] = rotary / head_dim
    elif rotary != head_dim:
        raise keys.error("rope.dimension_count", f"is {rotary}, less than the heads' {head_dim}")
    return config


def _llama(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    config = _common(keys, file, "llama", "LlamaForCausalLM")
    config["hidden_act"] = "silu"
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    config["rope_scaling"] = _rope_scaling(keys, file, config)
    return config


def _qwen2(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    config = _common(keys, file, "qwen2", "Qwen2ForCausalLM")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise keys.error("attention.key_length", "does not fit: qwen2 has hidden size / heads")
    config |= {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None}
    config["rope_scaling"] = _rope_scaling(keys, file, config)
    return config


def _qwen3(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    config = _common(keys, file, "qwen3", "Qwen3ForCausalLM")
    config |= {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None}
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["rope_scaling"] = _rope_scaling(keys, file, config)
    return config


def _gemma(keys: Keys, config: dict[str, Any], layers_of_27b: int, period: int) -> dict[str, Any]:
    """What gemma 2 and 3 share: activation, windows, soft caps, the scale of the queries."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    # The file has no key for the query scale: the 27B models divide by the square root of
    # hidden / heads, all others by that of the head dimension.
    scalar = hidden // heads if layers == layers_of_27b else config["head_dim"]
    if (scale := keys.real("attention.scale", None)) is not None:
        scalar = _shortest(scale**-2)
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.count("attention.sliding_window"),
        "attn_logit_softcapping": keys.real("attn_logit_softcapping", None),
        "final_logit_softcapping": keys.real("final_logit_softcapping", None),
    }
    keys.asked.add("attention.sliding_window_pattern")
    pattern = keys.values.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, np.ndarray) and pattern.shape == (layers,):
        sliding = [bool(flag) for flag in pattern]
    elif type(pattern) is int and 1 <= pattern <= MAX_COUNT:
        sliding = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        raise keys.error("attention.sliding_window_pattern", f"is no period or {layers} flags")
    config["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in sliding]
    return config


def _gemma2(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    config = _common(keys, file, "gemma2", "Gemma2ForCausalLM")
    config = _gemma(keys, config, layers_of_27b=46, period=2)
    if _rope_scaling(keys, file, config) is not None:
        raise keys.error("rope.scaling.type", "asks for rotary scaling, which gemma2 has not")
    return config


def _gemma3(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    config = _common(keys, file, "gemma3_text", "Gemma3ForCausalLM")
    config = _gemma(keys, config, layers_of_27b=62, period=6)
    config["rope_local_base_freq"] = keys.real("rope.freq_base_swa", 10000.0)
    config["rope_scaling"] = _rope_scaling(keys, file, config)  # of the full layers only
    return config


def _phi3(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    config = _common(keys, file, "phi3", "Phi3ForCausalLM")
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise keys.error("attention.key_length", "does not fit: phi3 has hidden size / heads")
    window = keys.count("attention.sliding_window", 0, least=0)
    config |= {"hidden_act": "silu", "sliding_window": window or None}
    config["original_max_position_embeddings"] = config["max_position_embeddings"]
    config["rope_scaling"] = _rope_scaling(keys, file, config)
    if config["rope_scaling"] is not None and "long_factor" not in config["rope_scaling"]:
        raise keys.error("rope.scaling.type", "is not longrope, the only one that phi3 has")
    return config


ARCHITECTURES: dict[str, Callable[[Keys, GGUFFile], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
}


def _tensor_shapes(arch: str, config: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Hugging Face name -> (shape, heads whose rows the file interleaves, else 0)."""
    D, F = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    Q, KV = heads * config["head_dim"], kv_heads * config["head_dim"]
    linear: dict[str, tuple[int, int, bool]] = {}
    if arch == "phi3":
        linear["self_attn.qkv_proj"] = (Q + 2 * KV, D, False)
        linear["mlp.gate_up_proj"] = (2 * F, D, False)
    else:
        bias = arch == "qwen2" or bool(config.get("attention_bias"))
        linear["self_attn.q_proj"] = (Q, D, bias)
        linear["self_attn.k_proj"] = (KV, D, bias)
        linear["self_attn.v_proj"] = (KV, D, bias)
        linear["mlp.gate_proj"] = (F, D, bool(config.get("mlp_bias")))
        linear["mlp.up_proj"] = (F, D, bool(config.get("mlp_bias")))
    linear["self_attn.o_proj"] = (D, Q, bool(config.get("attention_bias")))
    linear["mlp.down_proj"] = (D, F, bool(config.get("mlp_bias")))
    norms = {"input_layernorm": D, "post_attention_layernorm": D}
    if arch in ("gemma2", "gemma3"):
        norms |= {"pre_feedforward_layernorm": D, "post_feedforward_layernorm": D}
    if arch in ("qwen3", "gemma3"):
        norms |= {
            "self_attn.q_norm": config["head_dim"],
            "self_attn.k_norm": config["head_dim"],
        }
    interleaved = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}

    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "model.embed_tokens.weight": ((config["vocab_size"], D), 0)
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, (rows, columns, bias) in linear.items():
            turned = interleaved.get(name, 0) if arch == "llama" else 0
            shapes[f"{at}{name}.weight"] = ((rows, columns), turned)
            if bias:
                shapes[f"{at}{name}.bias"] = ((rows,), turned)
        for name, size in norms.items():
            shapes[f"{at}{name}.weight"] = ((size,), 0)
    shapes["model.norm.weight"] = ((D,), 0)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = ((config["vocab_size"], D), 0)
    return shapes


def plan_import(file: GGUFFile) -> Plan:
    """config.json and the tensors, in the order to write them.

    Raises KbitError for an unknown architecture or key, and for a tensor that is missing, has
    another shape, or has no place in the architecture.
    """
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise KbitError(
            f"{file.path}: the GGUF architecture {str(arch)[:60]!r} is not supported; "
            f"known are {', '.join(ARCHITECTURES)}"
        )
    pieces = file.metadata.get("split.count")
    if isinstance(pieces, int) and pieces > 1:
        raise KbitError(
            f"{file.path}: is one of {pieces} pieces of a split model; "
            "join them with llama.cpp's llama-gguf-split --merge"
        )
    keys = Keys(file, arch)
    config = ARCHITECTURES[arch](keys, file)
    keys.refuse_others()

    library_arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(library_arch, config["num_hidden_layers"])
    plan = Plan(config)
    left = dict(file.tensors)
    for name in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"):
        left.pop(name, None)  # went into rope_scaling
    for name, (shape, heads) in _tensor_shapes(arch, config).items():
        source = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name == "lm_head.weight":
            source = "output.weight"  # the library's table for gemma2 leaves it out
        if source is None or source not in left:
            raise KbitError(
                f"{file.path}: has no tensor {source!r} ({name}); the file is incomplete"
            )
        found = left.pop(source).shape
        if found != shape:
            raise KbitError(
                f"{file.path}: tensor {source!r} has the shape {list(found)}, but the metadata "
                f"ask for {list(shape)}; the file is damaged"
            )
        transform: Transform = "rotary" if heads else ""
        if arch in ("gemma2", "gemma3") and len(shape) == 1:
            transform = "minus_one"
        plan.tensors.append(PlannedTensor(name, source, shape, transform, heads))
    if left:
        raise KbitError(
            f"{file.path}: the tensor {next(iter(left))!r} has no place in a {arch} model; "
            "not imported, since the model would be computed without it"
        )
    return plan
