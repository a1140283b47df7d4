"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on q, k and v."""

from kbit.models.base import Decoder
from kbit.models.config import MOST_PARTS, Config
from kbit.models.llama import PREFIXES, llama_like
from kbit.models.registry import Names, register


@register("qwen2", *PREFIXES)
def qwen2(config: Config, names: Names) -> Decoder:
    """Qwen2 and Qwen2.5, dense."""
    return llama_like(
        config,
        names,
        kv_heads=config.get("num_key_value_heads", int, 32),
        attention_bias=(True, False),
        windows=upper_windows(config),
    )


def upper_windows(config: Config) -> list[int | None]:
    """Qwen's windows: on from layer `max_window_layers`, if `use_sliding_window` says so."""
    config.expect("use_mrope", False)
    count = config.size("num_hidden_layers", most=MOST_PARTS)
    full = config.get("max_window_layers", int, 28)
    window = config.get("sliding_window", int, None if config.given("sliding_window") else 4096)
    if not config.get("use_sliding_window", bool, False):
        window = None
    kinds = [
        "full_attention" if window is None or i < full else "sliding_attention"
        for i in range(count)
    ]
    return config.windows(count, window, kinds)
