"""Tiny GGUF files out of tiny transformers models, by llama.cpp's conventions.

The inverse of what the import does, written from the other side: names, row order and the 1 that
gemma's norms carry stand here as llama.cpp's converter has them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.25, 1.5],
    "long_factor": [1.0, 2.5, 5.0],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-llama3": ("llama", {"rope_theta": 500000.0, "head_dim": 32, "rope_scaling": _LLAMA3}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-yarn": ("qwen2", {"rope_scaling": _YARN}),
    "qwen3": ("qwen3", {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "num_hidden_layers": 7,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": ("phi3", {"sliding_window": 24, "original_max_position_embeddings": 256}),
    "phi3-longrope": (
        "phi3",
        {
            "partial_rotary_factor": 0.375,
            "original_max_position_embeddings": 64,
            "rope_scaling": _LONGROPE,
        },
    ),
}


def tiny_model(case: str) -> PreTrainedModel:
    """A random float32 model; its norms and biases too are away from their initial values."""
    model_type, options = CASES[case]
    config = AutoConfig.for_model(model_type, **(_SMALL | options))
    torch.manual_seed(sum(case.encode()))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return model.float()


def _source(name: str, gemma: bool) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    if gemma and part == "post_attention_layernorm":
        return f"blk.{layer}.post_attention_norm.{kind}"
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _rope_freqs(theta: float, dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """Llama 3.1's division of each pair's frequency (its reference code, pair by pair)."""
    factors = []
    for pair in range(dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / dim)
        original = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(scaling["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def _metadata(writer: gguf.GGUFWriter, arch: str, config: PretrainedConfig) -> None:
    def count(key: str, value: int) -> None:
        writer.add_uint32(f"{arch}.{key}", value)

    def real(key: str, value: float) -> None:
        writer.add_float32(f"{arch}.{key}", value)

    count("block_count", config.num_hidden_layers)
    count("context_length", config.max_position_embeddings)
    count("embedding_length", config.hidden_size)
    count("feed_forward_length", config.intermediate_size)
    count("attention.head_count", config.num_attention_heads)
    count("attention.head_count_kv", config.num_key_value_heads)
    real("attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if arch in ("qwen3", "gemma2", "gemma3") or head_dim * config.num_attention_heads != 64:
        count("attention.key_length", head_dim)
        count("attention.value_length", head_dim)
    rope = config.rope_parameters
    if arch == "gemma3":
        rope = rope["full_attention"]
    real("rope.freq_base", rope["rope_theta"])
    kind = rope["rope_type"]
    if arch == "llama":
        count("vocab_size", config.vocab_size)
        count("rope.dimension_count", head_dim)
    if kind in ("linear", "yarn"):
        writer.add_string(f"{arch}.rope.scaling.type", kind)
        real("rope.scaling.factor", rope["factor"])
    if kind == "yarn":
        count("rope.scaling.original_context_length", rope["original_max_position_embeddings"])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_freqs(rope["rope_theta"], head_dim, rope))
    if arch == "phi3":
        count("rope.dimension_count", int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        count("attention.sliding_window", config.sliding_window or 0)
    if kind == "longrope":
        original = config.original_max_position_embeddings
        ratio = config.max_position_embeddings / original
        count("rope.scaling.original_context_length", original)
        real("rope.scaling.attn_factor", math.sqrt(1 + math.log(ratio) / math.log(original)))
        for key in ("long", "short"):
            factors = np.array(rope[f"{key}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{key}.weight", factors)
    if arch in ("gemma2", "gemma3"):
        count("attention.sliding_window", config.sliding_window)
    if arch == "gemma2":
        real("attn_logit_softcapping", config.attn_logit_softcapping)
        real("final_logit_softcapping", config.final_logit_softcapping)


def add_plain_vocabulary(writer: gguf.GGUFWriter, size: int, **specials: int) -> None:
    """A byte-level vocabulary with one merge: three special tokens, 256 bytes, fillers, "th"."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<pad>", "<bos>", "<eos>", *sorted(ByteLevel.alphabet())]
    tokens += [f"<extra{index}>" for index in range(size - len(tokens) - 1)] + ["th"]
    types = [3, 3, 3] + [1] * 256 + [5] * (size - 260) + [1]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_array("tokenizer.ggml.merges", ["t h"])  # the library refuses to write none
    for name, index in (specials or {"padding": 0, "bos": 1, "eos": 2}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    matrices: Type = Type.F32,
    vocabulary: Any = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Write the model; returns what each tensor is worth in the file, by transformers' names."""
    config = model.config
    arch = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    gemma = arch.startswith("gemma")
    writer = gguf.GGUFWriter(str(path), arch)
    _metadata(writer, arch, config)
    (vocabulary or add_plain_vocabulary)(writer, config.vocab_size)
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    worth = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = parameter.numpy()
        stored = value
        if gemma and "norm" in name:
            stored = value + np.float32(1)
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            stored = _interleave(value, getattr(config, heads))
        worth[name] = value
        if value.ndim == 2 and matrices != Type.F32:
            packed = gguf.quantize(stored, matrices)
            writer.add_tensor(_source(name, gemma), packed, raw_dtype=matrices)
        else:
            writer.add_tensor(_source(name, gemma), np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth
