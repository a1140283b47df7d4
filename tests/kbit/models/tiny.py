"""Tiny random decoders of every family, made by transformers, with awkward shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {"vocab_size": 101, "num_hidden_layers": 3, "max_position_embeddings": 64}
LLAMA = COMMON | {
    "hidden_size": 48,
    "intermediate_size": 37,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
GEMMA = COMMON | {
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "sliding_window": 6,
    "query_pre_attn_scalar": 24,
}
PHI3 = LLAMA | {"pad_token_id": 0, "original_max_position_embeddings": 64}
GPT2 = {"vocab_size": 101, "n_layer": 3, "n_positions": 64, "n_embd": 36, "n_head": 3}
NEOX = COMMON | {"hidden_size": 64, "intermediate_size": 75, "num_attention_heads": 4}
OPT = COMMON | {"hidden_size": 36, "ffn_dim": 50, "num_attention_heads": 3}
BLOOM = {"vocab_size": 101, "n_layer": 3, "hidden_size": 48}
HALF = [1.0 + 0.3 * i for i in range(4)]


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **options}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied-biases": (
        "llama",
        LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-head-dim": ("llama", LLAMA | {"head_dim": 14, "num_key_value_heads": 3}),
    "llama-wide": ("llama", LLAMA | {"intermediate_size": 5200, "head_dim": 64}),
    "llama-linear": ("llama", LLAMA | rope("linear", factor=3.0)),
    "llama-dynamic": (
        "llama",
        LLAMA | rope("dynamic", factor=2.0) | {"max_position_embeddings": 20},
    ),
    "llama-llama3": (
        "llama",
        LLAMA
        | rope(
            "llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-yarn": (
        "llama",
        LLAMA | {"head_dim": 16} | rope("yarn", factor=2.0, original_max_position_embeddings=32),
    ),
    "mistral": ("mistral", LLAMA | {"sliding_window": 7, "head_dim": 10}),
    "mistral-full": ("mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (
        "qwen3",
        LLAMA | {"head_dim": 16, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "gemma2": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2-uncapped": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3_text": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "gemma3_text-scaled": (
        "gemma3_text",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3": ("phi3", PHI3 | {"sliding_window": 9}),
    "phi3-partial": ("phi3", PHI3 | {"partial_rotary_factor": 0.5}),
    "phi3-longrope-short": (
        "phi3",
        PHI3
        | {"max_position_embeddings": 128}
        | rope("longrope", short_factor=HALF, long_factor=[2 * f for f in HALF]),
    ),
    "phi3-longrope-long": (
        "phi3",
        PHI3
        | {"max_position_embeddings": 128, "original_max_position_embeddings": 16}
        | rope("longrope", short_factor=HALF, long_factor=[2 * f for f in HALF]),
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2-scaled": ("gpt2", GPT2 | {"n_inner": 55, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-sequential": (
        "gpt_neox",
        NEOX
        | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-bare": ("opt", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "bloom": ("bloom", BLOOM | {"n_head": 4}),
    "bloom-heads": ("bloom", BLOOM | {"n_head": 6}),
}


@dataclass
class Tiny:
    """A model of transformers, and its checkpoint directory."""

    name: str
    model: Any
    path: Path

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """transformers' logits for one sequence, float32 [T, V]."""
        with torch.no_grad():
            return self.model(torch.from_numpy(tokens)[None]).logits[0].numpy()


def make(name: str, folder: Path) -> Tiny:
    """Every parameter random, norms and biases too, so that none can be left out unseen."""
    model_type, options = CASES[name]
    config = AutoConfig.for_model(model_type, **options)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            noise = noise * parameter.shape[-1] ** -0.5
        else:
            centre = 1.0 if key.endswith("weight") and "gemma" not in model_type else 0.0
            noise = centre + 0.3 * noise
        parameter.data.copy_(noise)
    path = folder / name
    model.save_pretrained(path)
    return Tiny(name, model, path)
