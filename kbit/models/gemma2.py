"""Gemma 2 (Gemma Team 2024): norms around each part, soft caps, a window in every other layer."""

import math

from kbit.models.base import Decoder
from kbit.models.config import MOST_PARTS, Config
from kbit.models.llama import PREFIXES, llama_like
from kbit.models.registry import Names, register


@register("gemma2", *PREFIXES)
def gemma2(config: Config, names: Names) -> Decoder:
    """Gemma 2."""
    count = config.size("num_hidden_layers", most=MOST_PARTS)
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    return gemma(
        config,
        names,
        windows=config.windows(count, config.get("sliding_window", int, 4096), kinds),
        attention_softcap=cap(config, "attn_logit_softcapping", 50.0),
        logit_softcap=cap(config, "final_logit_softcapping", 30.0),
    )


def gemma(
    config: Config,
    names: Names,
    *,
    windows: list[int | None],
    logit_softcap: float | None,
    **options: object,
) -> Decoder:
    """What Gemma 2 and 3 share: (1 + w) norms around attention and MLP, scaled embeddings, gelu,
    a tied head, `query_pre_attn_scalar` in place of the head size in the scale of scores."""
    config.expect("use_bidirectional_attention", False)
    config.ignore("hidden_act")  # written by old converters, read by nobody
    bias = config.get("attention_bias", bool, False)
    return llama_like(
        config,
        names,
        kv_heads=config.get("num_key_value_heads", int, 4),
        head_dim=256,
        tied=True,
        attention_bias=(bias, bias),
        windows=windows,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
        scale=config.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        logit_softcap=logit_softcap,
        weight_offset=1.0,
        sandwich=True,
        embedding_scale=math.sqrt(config.size("hidden_size")),
        **options,  # type: ignore[arg-type]
    )


def cap(config: Config, key: str, default: float | None) -> float | None:
    """A soft cap; null, unlike absence, turns it off."""
    return config.positive(key, None if config.given(key) else default)
