"""Gemma 3's text decoder (Gemma Team 2025): q/k norms, five windowed layers to a full one, and
rotary positions of their own for each of the two kinds."""

from kbit.models.base import Decoder
from kbit.models.config import MOST_PARTS, Config
from kbit.models.gemma2 import cap, gemma
from kbit.models.llama import PREFIXES
from kbit.models.registry import Names, register


@register("gemma3_text", *PREFIXES)
def gemma3_text(config: Config, names: Names) -> Decoder:
    """Gemma 3, 270M and 1B, and the text part of the others once it is stored on its own."""
    config.expect("attn_logit_softcapping", None)
    count = config.size("num_hidden_layers", most=MOST_PARTS)
    head_dim = config.size("head_dim", 256)
    every = config.size(("sliding_window_pattern", "_sliding_window_pattern"), 6)
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    windows = config.windows(count, config.get("sliding_window", int, 4096), kinds)

    kinds_of_rope = Config(config.get("rope_parameters", dict, {}), "config.json: rope_parameters")
    near = kinds_of_rope.get("sliding_attention", dict, {})
    wide = kinds_of_rope.get("full_attention", dict, {}) | config.get("rope_scaling", dict, {})
    kinds_of_rope.finish()
    theta = config.positive("rope_theta", 1_000_000.0)
    local_theta = config.positive("rope_local_base_freq", 10_000.0)
    full = config.rotary_of(wide, head_dim, theta)
    local = config.rotary_of(near, head_dim, local_theta)
    return gemma(
        config,
        names,
        windows=windows,
        logit_softcap=cap(config, "final_logit_softcapping", None),
        qk_norm=True,
        rotaries=[full if window is None else local for window in windows],
    )
