"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer."""

from kbit.models.base import Decoder
from kbit.models.config import MOST_PARTS, Config
from kbit.models.llama import PREFIXES, llama_like
from kbit.models.registry import Names, register


@register("mistral", *PREFIXES)
def mistral(config: Config, names: Names) -> Decoder:
    """Mistral 7B; `sliding_window: null` (version 0.2 and later) turns the window off."""
    # null and absent differ: an absent window is the first release's.
    window = config.get("sliding_window", int, None if config.given("sliding_window") else 4096)
    count = config.size("num_hidden_layers", most=MOST_PARTS)
    kind = "full_attention" if window is None else "sliding_attention"
    return llama_like(
        config,
        names,
        kv_heads=config.get("num_key_value_heads", int, 8),
        windows=config.windows(count, window, [kind] * count),
    )
