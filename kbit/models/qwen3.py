"""Qwen3 (Yang et al. 2025): norms on each head's query and key, head size of its own."""

from kbit.models.base import Decoder
from kbit.models.config import Config
from kbit.models.llama import PREFIXES, llama_like
from kbit.models.qwen2 import upper_windows
from kbit.models.registry import Names, register


@register("qwen3", *PREFIXES)
def qwen3(config: Config, names: Names) -> Decoder:
    """Qwen3, dense."""
    bias = config.get("attention_bias", bool, False)
    return llama_like(
        config,
        names,
        kv_heads=config.get("num_key_value_heads", int, 32),
        head_dim=128,
        attention_bias=(bias, bias),
        windows=upper_windows(config),
        qk_norm=True,
    )
