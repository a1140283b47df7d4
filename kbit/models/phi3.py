"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama with q, k, v stored as one matrix, gate, up too."""

from dataclasses import replace

from kbit.models.base import Decoder, Layer, Linear, Rows
from kbit.models.config import MOST_PARTS, Config
from kbit.models.llama import PREFIXES, llama_like
from kbit.models.registry import Names, register


@register("phi3", *PREFIXES)
def phi3(config: Config, names: Names) -> Decoder:
    """Phi-3 mini and medium, Phi-3.5 mini, Phi-4."""
    for option in ("attention_bias", "mlp_bias", "lm_head_bias"):
        config.expect(option, False)
    config.expect("full_attn_mod", 1)
    config.expect("interpolate_factor", 1)
    count = config.size("num_hidden_layers", most=MOST_PARTS)
    window = config.get("sliding_window", int, None)
    kind = "full_attention" if window is None else "sliding_attention"
    decoder = llama_like(
        config,
        names,
        kv_heads=config.get("num_key_value_heads", int, None),
        eps=1e-5,
        windows=config.windows(count, window, [kind] * count),
    )
    return replace(decoder, layers=tuple(_fuse(layer) for layer in decoder.layers))


def _fuse(layer: Layer) -> Layer:
    attention, mlp = layer.attention, layer.mlp
    assert mlp.gate is not None
    q, k, v = stack("qkv_proj", attention.q, attention.k, attention.v)
    gate, up = stack("gate_up_proj", mlp.gate, mlp.up)
    return replace(
        layer,
        attention=replace(attention, q=q, k=k, v=v),
        mlp=replace(mlp, gate=gate, up=up),
    )


def stack(name: str, *parts: Linear) -> list[Linear]:
    """The parts as consecutive rows of one matrix that stands in the place of the first."""
    total = sum(part.out_features for part in parts)
    weight = f"{parts[0].weight.rsplit('.', 2)[0]}.{name}.weight"
    result, start = [], 0
    for part in parts:
        rows = Rows(start, part.out_features)
        result.append(replace(part, weight=weight, rows=rows, stored_rows=total))
        start += part.out_features
    return result
