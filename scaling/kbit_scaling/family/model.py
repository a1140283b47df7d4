"""A Llama in torch for training: the forward pass over Hugging Face's tensor names.

Shapes: B batch, T positions, D width, H heads, C head dimension, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .presets import Size

ROPE_THETA = 10000.0
NORM_EPS = 1e-5
INIT_STD = 0.02

Params = dict[str, torch.Tensor]


def config(size: Size, vocab: int, context: int) -> dict[str, Any]:
    """config.json of the model, as transformers' LlamaForCausalLM reads it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": size.width // size.heads,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": INIT_STD,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float16",
    }


def init(size: Size, vocab: int, seed: int, device: str) -> Params:
    """Fresh parameters, drawn on the CPU so that every device starts alike."""
    generator = torch.Generator().manual_seed(seed)
    width, mlp = size.width, size.mlp

    def normal(*shape: int, std: float = INIT_STD) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    params = {"model.embed_tokens.weight": normal(vocab, width)}
    into_residual = INIT_STD / (2 * size.layers) ** 0.5
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        for name in "qkv":
            params[f"{layer}self_attn.{name}_proj.weight"] = normal(width, width)
        params[layer + "self_attn.o_proj.weight"] = normal(width, width, std=into_residual)
        for name in ("gate", "up"):
            params[f"{layer}mlp.{name}_proj.weight"] = normal(mlp, width)
        params[layer + "mlp.down_proj.weight"] = normal(width, mlp, std=into_residual)
        params[layer + "input_layernorm.weight"] = torch.ones(width)
        params[layer + "post_attention_layernorm.weight"] = torch.ones(width)
    params["model.norm.weight"] = torch.ones(width)
    return {name: p.to(device).requires_grad_() for name, p in params.items()}


def _rotate(x_BHTC: torch.Tensor) -> torch.Tensor:
    t, c = x_BHTC.shape[-2:]
    device = x_BHTC.device
    rate = ROPE_THETA ** (-torch.arange(0, c, 2, device=device, dtype=torch.float32) / c)
    angle = torch.arange(t, device=device, dtype=torch.float32)[:, None] * rate
    cos, sin = angle.cos().to(x_BHTC.dtype), angle.sin().to(x_BHTC.dtype)
    first, second = x_BHTC.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _TiedLoss(torch.autograd.Function):
    """Sum of the cross entropies of x_ND @ table_VD.T against targets_N.

    Works through the rows in pieces and keeps the gradients instead of the logits: on a small model
    with a large vocabulary, writing and reading [N, V] costs more than everything else together.
    """

    ROWS = 512

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, table: torch.Tensor, targets: torch.Tensor) -> Any:
        total = x.new_zeros((), dtype=torch.float32)
        x_grad, table_grad = torch.empty_like(x), torch.zeros_like(table)
        for at in range(0, len(x), _TiedLoss.ROWS):
            rows = slice(at, at + _TiedLoss.ROWS)
            logits = (x[rows] @ table.T).float()
            peak = logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, targets[rows, None])
            scale = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)
            total += (scale.log() + peak - chosen).sum()
            grad = logits.div_(scale).scatter_add_(
                1, targets[rows, None], torch.full_like(chosen, -1.0)
            )
            grad = grad.to(x.dtype)
            x_grad[rows] = grad @ table
            table_grad += grad.T @ x[rows]
        ctx.save_for_backward(x_grad, table_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x_grad, table_grad = ctx.saved_tensors
        return x_grad * grads[0], table_grad * grads[0], None


def hidden(params: Params, size: Size, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Normed last hidden states [B, T, D], causal."""
    b, t = tokens_BT.shape

    def norm(x_BTD: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x_BTD, (size.width,), params[name], NORM_EPS)

    def heads(x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD.view(b, t, size.heads, -1).transpose(1, 2)

    x = F.embedding(tokens_BT, params["model.embed_tokens.weight"])
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm.weight")
        q, k, v = (heads(F.linear(h, params[f"{layer}self_attn.{n}_proj.weight"])) for n in "qkv")
        mixed = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(b, t, size.width)
        x = x + F.linear(mixed, params[layer + "self_attn.o_proj.weight"])
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate = F.silu(F.linear(h, params[layer + "mlp.gate_proj.weight"]))
        up = F.linear(h, params[layer + "mlp.up_proj.weight"])
        x = x + F.linear(gate * up, params[layer + "mlp.down_proj.weight"])
    return norm(x, "model.norm.weight")


def forward(params: Params, size: Size, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of every next token, causal."""
    return F.linear(hidden(params, size, tokens_BT), params["model.embed_tokens.weight"])


def loss(params: Params, size: Size, window: torch.Tensor) -> torch.Tensor:
    """Mean nats per token of windows [B, T+1]."""
    x = hidden(params, size, window[:, :-1]).flatten(0, 1)
    targets = window[:, 1:].flatten()
    table = params["model.embed_tokens.weight"].to(x.dtype)
    total: torch.Tensor = _TiedLoss.apply(x, table, targets)
    return total / len(targets)
