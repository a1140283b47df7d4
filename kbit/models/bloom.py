"""BLOOM (Le Scao et al. 2022): ALiBi (Press et al. 2021), a norm on the embeddings."""

import math

from kbit.models.base import Attention, Decoder, Layer, Linear, Mlp, Norm
from kbit.models.config import MOST_PARTS, Config
from kbit.models.gpt_neox import interleaved
from kbit.models.registry import Names, register

# No learned positions and no trained limit in config.json; BLOOM was trained on 2048 tokens.
TRAINED_POSITIONS = 2048


@register("bloom", "transformer.", "")
def bloom(config: Config, names: Names) -> Decoder:
    """BLOOM and BLOOMZ in all sizes."""
    config.expect("apply_residual_connection_post_layernorm", False)
    config.ignore("offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "attention_softmax_in_fp32")
    config.ignore("bias_dropout_fusion", "masked_softmax_fusion", "n_inner")
    hidden = config.size(("n_embed", "hidden_size"))
    heads = config.size(("n_head", "num_attention_heads"), most=MOST_PARTS)
    count = config.size(("n_layer", "num_hidden_layers"), most=MOST_PARTS)
    vocabulary = config.size("vocab_size")
    eps = config.positive("layer_norm_epsilon", 1e-5)
    head_dim = config.split(hidden, heads)
    slopes = alibi_slopes(heads)

    def norm(name: str) -> Norm:
        at = f"{names.prefix}{name}"
        return Norm("layer", hidden, eps, f"{at}.weight", f"{at}.bias")

    def linear(name: str, out_features: int, in_features: int) -> Linear:
        at = f"{names.prefix}{name}"
        return Linear(f"{at}.weight", out_features, in_features, f"{at}.bias")

    def layer(i: int) -> Layer:
        at, mlp = f"h.{i}.self_attention", f"h.{i}.mlp"
        fused = linear(f"{at}.query_key_value", 3 * hidden, hidden)
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
                o=linear(f"{at}.dense", hidden, hidden),
                alibi_slopes=slopes,
            ),
            mlp=Mlp(
                "gelu_tanh",
                gate=None,
                up=linear(f"{mlp}.dense_h_to_4h", 4 * hidden, hidden),
                down=linear(f"{mlp}.dense_4h_to_h", hidden, 4 * hidden),
            ),
            attention_in=norm(f"h.{i}.input_layernorm"),
            mlp_in=norm(f"h.{i}.post_attention_layernorm"),
        )

    embedding = f"{names.prefix}word_embeddings.weight"
    head, tied = names.head(
        embedding, config.get("tie_word_embeddings", bool, True), "lm_head.weight"
    )
    return Decoder(
        model_type="bloom",
        vocab_size=vocabulary,
        hidden_size=hidden,
        max_positions=config.size("seq_length", TRAINED_POSITIONS),
        embedding=embedding,
        embedding_size=hidden,
        embedding_norm=norm("word_embeddings_layernorm"),
        layers=tuple(layer(i) for i in range(count)),
        final_norm=norm("ln_f"),
        head=Linear(head, vocabulary, hidden),
        tied=tied,
    )


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 h / n) for h = 1..n, n the power of two up to `heads`; the rest take every other slope
    of the next power's, as the paper's code does."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * (heads - power) + 1, 2)]
    return tuple(slopes + between)
