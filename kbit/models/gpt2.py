"""GPT-2 (Radford et al. 2019): learned positions, layer norms, matrices stored [in, out]."""

from kbit.models.base import Attention, Decoder, Layer, Linear, Mlp, Norm, Positions, Rows
from kbit.models.config import MOST_PARTS, Config
from kbit.models.registry import Names, register

BUFFERS = (".attn.bias", ".attn.masked_bias")


@register("gpt2", "transformer.", "")
def gpt2(config: Config, names: Names) -> Decoder:
    """GPT-2 in all sizes, and models of its shape."""
    config.expect("add_cross_attention", False)
    config.ignore("n_ctx")
    hidden = config.size(("n_embd", "hidden_size"))
    heads = config.size(("n_head", "num_attention_heads"), most=MOST_PARTS)
    count = config.size(("n_layer", "num_hidden_layers"), most=MOST_PARTS)
    inner = config.size("n_inner", 4 * hidden)
    vocabulary = config.size("vocab_size")
    eps = config.positive("layer_norm_epsilon", 1e-5)
    function = config.activation("activation_function", "gelu_new")
    head_dim = config.split(hidden, heads)
    scale = head_dim**-0.5 if config.get("scale_attn_weights", bool, True) else 1.0
    by_layer = config.get("scale_attn_by_inverse_layer_idx", bool, False)

    def norm(name: str) -> Norm:
        at = f"{names.prefix}{name}"
        return Norm("layer", hidden, eps, f"{at}.weight", f"{at}.bias")

    def linear(name: str, out_features: int, in_features: int) -> Linear:
        at = f"{names.prefix}{name}"
        return Linear(f"{at}.weight", out_features, in_features, f"{at}.bias", transposed=True)

    def layer(i: int) -> Layer:
        fused = linear(f"h.{i}.attn.c_attn", 3 * hidden, hidden)
        q, k, v = (
            Linear(
                fused.weight,
                hidden,
                hidden,
                fused.bias,
                transposed=True,
                rows=Rows(part * hidden, hidden),
                stored_rows=3 * hidden,
            )
            for part in range(3)
        )
        return Layer(
            attention=Attention(
                heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                scale=scale / (i + 1) if by_layer else scale,
                q=q,
                k=k,
                v=v,
                o=linear(f"h.{i}.attn.c_proj", hidden, hidden),
            ),
            mlp=Mlp(
                function,
                gate=None,
                up=linear(f"h.{i}.mlp.c_fc", inner, hidden),
                down=linear(f"h.{i}.mlp.c_proj", hidden, inner),
            ),
            attention_in=norm(f"h.{i}.ln_1"),
            mlp_in=norm(f"h.{i}.ln_2"),
        )

    embedding = f"{names.prefix}wte.weight"
    head, tied = names.head(
        embedding, config.get("tie_word_embeddings", bool, True), "lm_head.weight"
    )
    return Decoder(
        model_type="gpt2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        max_positions=config.size(("n_positions", "max_position_embeddings"), 1024),
        embedding=embedding,
        embedding_size=hidden,
        positions=Positions(f"{names.prefix}wpe.weight", hidden),
        layers=tuple(layer(i) for i in range(count)),
        final_norm=norm("ln_f"),
        head=Linear(head, vocabulary, hidden),
        tied=tied,
        ignored=BUFFERS,
    )
