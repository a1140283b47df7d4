"""GPT-NeoX (Black et al. 2022) and Pythia: rotary on part of each head, parallel residual."""

from dataclasses import replace

from kbit.models.base import Attention, Decoder, Layer, Linear, Mlp, Norm, Rows
from kbit.models.config import MOST_PARTS, Config
from kbit.models.registry import Names, register

BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


@register("gpt_neox", "gpt_neox.", "")
def gpt_neox(config: Config, names: Names) -> Decoder:
    """GPT-NeoX-20B and Pythia."""
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    heads = config.size("num_attention_heads", most=MOST_PARTS)
    count = config.size("num_hidden_layers", most=MOST_PARTS)
    vocabulary = config.size("vocab_size")
    eps = config.positive("layer_norm_eps", 1e-5)
    function = config.activation("hidden_act", "gelu")
    head_dim = config.split(hidden, heads)
    attention_bias = config.get("attention_bias", bool, True)
    parallel = config.get("use_parallel_residual", bool, True)
    rotary = config.rotary(
        head_dim,
        theta_key=("rotary_emb_base", "rope_theta"),  # some releases of transformers write both
        fraction=0.25,
        fraction_key=("rotary_pct", "partial_rotary_factor"),
    )

    def norm(name: str) -> Norm:
        at = f"{names.prefix}{name}"
        return Norm("layer", hidden, eps, f"{at}.weight", f"{at}.bias")

    def linear(name: str, out_features: int, in_features: int, bias: bool = True) -> Linear:
        at = f"{names.prefix}{name}"
        return Linear(f"{at}.weight", out_features, in_features, f"{at}.bias" if bias else None)

    def layer(i: int) -> Layer:
        at, mlp = f"layers.{i}.attention", f"layers.{i}.mlp"
        fused = linear(f"{at}.query_key_value", 3 * hidden, hidden, attention_bias)
        q, k, v = interleaved(fused, heads, head_dim)
        return Layer(
            attention=Attention(
                heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                q=q,
                k=k,
                v=v,
                o=linear(f"{at}.dense", hidden, hidden, attention_bias),
                rotary=rotary,
            ),
            mlp=Mlp(
                function,
                gate=None,
                up=linear(f"{mlp}.dense_h_to_4h", inner, hidden),
                down=linear(f"{mlp}.dense_4h_to_h", hidden, inner),
            ),
            attention_in=norm(f"layers.{i}.input_layernorm"),
            mlp_in=norm(f"layers.{i}.post_attention_layernorm"),
            parallel=parallel,
        )

    embedding = f"{names.prefix}embed_in.weight"
    head, tied = names.head(
        embedding,
        config.get("tie_word_embeddings", bool, False),
        "embed_out.weight",
        "lm_head.weight",
    )
    return Decoder(
        model_type="gpt_neox",
        vocab_size=vocabulary,
        hidden_size=hidden,
        max_positions=config.size("max_position_embeddings"),
        embedding=embedding,
        embedding_size=hidden,
        layers=tuple(layer(i) for i in range(count)),
        final_norm=norm("final_layer_norm"),
        head=Linear(head, vocabulary, hidden),
        tied=tied,
        ignored=BUFFERS,
    )


def interleaved(fused: Linear, heads: int, head_dim: int) -> list[Linear]:
    """q, k and v out of a matrix whose rows are head by head [q, k, v]."""
    return [
        replace(
            fused,
            out_features=heads * head_dim,
            rows=Rows(part * head_dim, head_dim, stride=3 * head_dim, count=heads),
        )
        for part in range(3)
    ]
