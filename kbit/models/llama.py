"""Llama (Touvron et al. 2023) and the shape that its descendants share."""

from __future__ import annotations

from collections.abc import Sequence

from kbit.errors import KbitError
from kbit.models.base import Attention, Decoder, Layer, Linear, Mlp, Norm
from kbit.models.config import MOST_PARTS, Config
from kbit.models.registry import Names, register
from kbit.models.rotary import Rotary

PREFIXES = ("model.", "")
BUFFERS = (".rotary_emb.inv_freq",)


@register("llama", *PREFIXES)
def llama(config: Config, names: Names) -> Decoder:
    """SmolLM2, TinyLlama, Llama 2 and 3."""
    config.expect("rope_interleaved", False)
    return llama_like(
        config,
        names,
        kv_heads=config.get("num_key_value_heads", int, None),
        attention_bias=(config.get("attention_bias", bool, False),) * 2,
        mlp_bias=config.get("mlp_bias", bool, False),
    )


def llama_like(
    config: Config,
    names: Names,
    *,
    kv_heads: int | None,
    head_dim: int | None = None,
    eps: float = 1e-6,
    tied: bool = False,
    attention_bias: tuple[bool, bool] = (False, False),
    mlp_bias: bool = False,
    windows: Sequence[int | None] | None = None,
    qk_norm: bool = False,
    rotaries: Sequence[Rotary] | None = None,
    activation_key: str = "hidden_act",
    activation: str = "silu",
    scale: float | None = None,
    attention_softcap: float | None = None,
    logit_softcap: float | None = None,
    weight_offset: float = 0.0,
    sandwich: bool = False,
    embedding_scale: float = 1.0,
) -> Decoder:
    """RMS norms before each part, rotary positions, grouped queries, a gated MLP.

    Keyword defaults are those of the architecture, used where config.json is silent.
    attention_bias: of q, k, v and of o. windows, rotaries: one entry a layer. sandwich: Gemma's
    norms after attention and MLP too, which renames those before.
    """
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    heads = config.size("num_attention_heads", most=MOST_PARTS)
    count = config.size("num_hidden_layers", most=MOST_PARTS)
    vocabulary = config.size("vocab_size")
    kv_heads = kv_heads or heads
    head_dim = config.size("head_dim", head_dim or hidden // heads)
    check_heads(heads, kv_heads)
    eps = config.positive("rms_norm_eps", eps)
    function = config.activation(activation_key, activation)
    if rotaries is None:
        rotaries = [config.rotary(head_dim)] * count

    def norm(name: str, size: int = hidden) -> Norm:
        return Norm("rms", size, eps, f"{names.prefix}{name}.weight", weight_offset=weight_offset)

    def linear(name: str, out_features: int, in_features: int, bias: bool = False) -> Linear:
        weight = f"{names.prefix}{name}"
        return Linear(
            f"{weight}.weight", out_features, in_features, f"{weight}.bias" if bias else None
        )

    def layer(i: int) -> Layer:
        at, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        qkv_bias, o_bias = attention_bias
        attention = Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5 if scale is None else scale,
            q=linear(f"{at}.q_proj", heads * head_dim, hidden, qkv_bias),
            k=linear(f"{at}.k_proj", kv_heads * head_dim, hidden, qkv_bias),
            v=linear(f"{at}.v_proj", kv_heads * head_dim, hidden, qkv_bias),
            o=linear(f"{at}.o_proj", hidden, heads * head_dim, o_bias),
            q_norm=norm(f"{at}.q_norm", head_dim) if qk_norm else None,
            k_norm=norm(f"{at}.k_norm", head_dim) if qk_norm else None,
            rotary=rotaries[i],
            window=windows[i] if windows is not None else None,
            softcap=attention_softcap,
        )
        after = norm(f"layers.{i}.post_attention_layernorm")
        return Layer(
            attention=attention,
            mlp=Mlp(
                function,
                gate=linear(f"{mlp}.gate_proj", inner, hidden, mlp_bias),
                up=linear(f"{mlp}.up_proj", inner, hidden, mlp_bias),
                down=linear(f"{mlp}.down_proj", hidden, inner, mlp_bias),
            ),
            attention_in=norm(f"layers.{i}.input_layernorm"),
            attention_out=after if sandwich else None,
            mlp_in=norm(f"layers.{i}.pre_feedforward_layernorm") if sandwich else after,
            mlp_out=norm(f"layers.{i}.post_feedforward_layernorm") if sandwich else None,
        )

    embedding = f"{names.prefix}embed_tokens.weight"
    head, is_tied = names.head(
        embedding, config.get("tie_word_embeddings", bool, tied), "lm_head.weight"
    )
    return Decoder(
        model_type=config.get("model_type", str),
        vocab_size=vocabulary,
        hidden_size=hidden,
        max_positions=config.size("max_position_embeddings"),
        embedding=embedding,
        embedding_size=hidden,
        layers=tuple(layer(i) for i in range(count)),
        final_norm=norm("norm"),
        head=Linear(head, vocabulary, hidden),
        tied=is_tied,
        embedding_scale=embedding_scale,
        logit_softcap=logit_softcap,
        ignored=BUFFERS,
    )


def check_heads(heads: int, kv_heads: int) -> None:
    """Grouped queries need as many query heads per key/value head everywhere."""
    if kv_heads < 1 or heads % kv_heads:
        raise KbitError(
            f"config.json: num_attention_heads = {heads} is no multiple of "
            f"num_key_value_heads = {kv_heads}"
        )
