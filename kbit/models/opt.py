"""OPT (Zhang et al. 2022): learned positions that begin at row 2, relu; the 350M model has norms
after each part and embeddings narrower than the model."""

from kbit.models.base import Attention, Decoder, Layer, Linear, Mlp, Norm, Positions
from kbit.models.config import MOST_PARTS, Config
from kbit.models.registry import Names, register

POSITION_OFFSET = 2  # two rows were reserved for padding, and stayed


@register("opt", "model.decoder.", "decoder.", "model.", "")
def opt(config: Config, names: Names) -> Decoder:
    """OPT in all sizes."""
    hidden, inner = config.size("hidden_size"), config.size("ffn_dim")
    heads = config.size("num_attention_heads", most=MOST_PARTS)
    count = config.size("num_hidden_layers", most=MOST_PARTS)
    vocabulary = config.size("vocab_size")
    width = config.size("word_embed_proj_dim", hidden)
    before = config.get("do_layer_norm_before", bool, True)
    removed = config.get("_remove_final_layer_norm", bool, False)
    bias = config.get("enable_bias", bool, True)
    affine = config.get("layer_norm_elementwise_affine", bool, True)
    function = config.activation("activation_function", "relu")
    head_dim = config.split(hidden, heads)

    def norm(name: str) -> Norm:
        at = f"{names.prefix}{name}"
        if not affine:
            return Norm("layer", hidden, 1e-5, None)
        return Norm("layer", hidden, 1e-5, f"{at}.weight", f"{at}.bias")

    def linear(name: str, out_features: int, in_features: int, bias: bool = bias) -> Linear:
        at = f"{names.prefix}{name}"
        return Linear(f"{at}.weight", out_features, in_features, f"{at}.bias" if bias else None)

    def layer(i: int) -> Layer:
        at = f"layers.{i}.self_attn"
        attention_norm = norm(f"{at}_layer_norm")
        mlp_norm = norm(f"layers.{i}.final_layer_norm")
        return Layer(
            attention=Attention(
                heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                q=linear(f"{at}.q_proj", hidden, hidden),
                k=linear(f"{at}.k_proj", hidden, hidden),
                v=linear(f"{at}.v_proj", hidden, hidden),
                o=linear(f"{at}.out_proj", hidden, hidden),
            ),
            mlp=Mlp(
                function,
                gate=None,
                up=linear(f"layers.{i}.fc1", inner, hidden),
                down=linear(f"layers.{i}.fc2", hidden, inner),
            ),
            attention_in=attention_norm if before else None,
            attention_after=None if before else attention_norm,
            mlp_in=mlp_norm if before else None,
            mlp_after=None if before else mlp_norm,
        )

    narrow = width != hidden
    embedding = f"{names.prefix}embed_tokens.weight"
    head, tied = names.head(
        embedding, config.get("tie_word_embeddings", bool, True), "lm_head.weight"
    )
    return Decoder(
        model_type="opt",
        vocab_size=vocabulary,
        hidden_size=hidden,
        max_positions=config.size("max_position_embeddings"),
        embedding=embedding,
        embedding_size=width,
        embedding_projection=linear("project_in", hidden, width, False) if narrow else None,
        positions=Positions(f"{names.prefix}embed_positions.weight", hidden, POSITION_OFFSET),
        layers=tuple(layer(i) for i in range(count)),
        final_norm=norm("final_layer_norm") if before and not removed else None,
        output_projection=linear("project_out", width, hidden, False) if narrow else None,
        head=Linear(head, vocabulary, width),
        tied=tied,
    )
