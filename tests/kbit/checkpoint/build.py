"""Tiny checkpoints for tests, written by a few lines of their own: no kbit, no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
BF16 = np.dtype(ml_dtypes.bfloat16)


def safetensors_bytes(tensors: Mapping[str, np.ndarray], pad: int = 0) -> bytes:
    table: dict[str, Any] = {}
    position = 0
    for name, array in tensors.items():
        table[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(table).encode() + b" " * pad
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    return len(text).to_bytes(8, "little") + text + data


def llama_config(**changes: Any) -> dict[str, Any]:
    """Widths that are no multiples of 32 or of a block, grouped queries."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **changes,
    }


def llama_tensors(
    config: Mapping[str, Any], dtype: np.dtype = BF16, seed: int = 0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns), np.float32) * 0.05).astype(dtype)

    def norm() -> np.ndarray:
        return rng.random(hidden, np.float32).astype(dtype)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(kv, hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(kv, hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{layer}.post_attention_layernorm.weight": norm(),
            f"{layer}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{layer}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{layer}.mlp.down_proj.weight": matrix(hidden, inner),
        }
    tensors["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return tensors


def write_model(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1
) -> Path:
    """A plain Hugging Face directory."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    (path / "tokenizer.json").write_text('{"not": "a real one"}\n')
    if shards == 1:
        (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return path
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file_name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        (path / file_name).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_llama(
    path: Path, dtype: np.dtype = BF16, shards: int = 1, seed: int = 0, **changes: Any
) -> Path:
    config = llama_config(**changes)
    return write_model(path, config, llama_tensors(config, dtype, seed), shards)
