"""What a decoder is: frozen data that every executor (torch, native) and the quantizer read.

A `Decoder` says everything needed to compute logits from token ids; it holds no weights, only the
names, shapes and roles of checkpoint tensors. The computation, with h [T, hidden] and every
sequence's positions counted from 0:

    h = embedding[token] * embedding_scale
    h = embedding_projection(h)                      where present (OPT-350m)
    h = h + positions[position + offset]             where present (learned positions)
    h = embedding_norm(h)                            where present (BLOOM)
    for layer in layers:
        a = layer.attention_out(attention(layer.attention_in(h)))
        if layer.parallel:
            h = h + a + layer.mlp_out(mlp(layer.mlp_in(h)))
        else:
            h = layer.attention_after(h + a)
            h = layer.mlp_after(h + layer.mlp_out(mlp(layer.mlp_in(h))))
    h = final_norm(h)
    h = output_projection(h)                         where present (OPT-350m)
    logits = head(h)
    logits = logit_softcap * tanh(logits / logit_softcap)     where set

A norm that is None is the identity. `Norm`, `Attention` and `Mlp` say the rest. All of it is
defined in fp32; an executor that computes in less says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from kbit.errors import KbitError
from kbit.models.rotary import Rotary

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Names in Hugging Face configs -> the functions: silu(x) = x sigmoid(x); gelu with erf;
gelu_tanh = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); relu."""

Role = Literal["embedding", "position", "linear", "head", "norm", "bias"]


@dataclass(frozen=True)
class Rows:
    """Rows of a stored matrix: `count` runs of `length` rows each, `stride` apart, from `start`.

    A run of consecutive rows has count 1; GPT-NeoX and BLOOM store query, key and value of one
    head next to each other, so their q is `heads` runs of head_dim rows, 3 * head_dim apart.
    """

    start: int
    length: int
    stride: int = 0
    count: int = 1

    def index(self) -> np.ndarray:
        """The row numbers in order, int64 [count * length]."""
        runs = self.start + self.stride * np.arange(self.count)[:, None]
        return (runs + np.arange(self.length)).reshape(-1)


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b with W [out_features, in_features].

    W is the tensor `weight` of the checkpoint, or its `rows` where several layers share one stored
    matrix (`stored_rows` rows in all); `bias` is shared and cut in the same way. `transposed`: a
    plain (unquantized) tensor is stored as W^T, [in, stored_rows], as GPT-2's Conv1D does; a
    QuantizedTensor is always [stored_rows, in].
    """

    weight: str
    out_features: int
    in_features: int
    bias: str | None = None
    transposed: bool = False
    rows: Rows | None = None
    stored_rows: int = 0

    def __post_init__(self) -> None:
        if not self.stored_rows:
            object.__setattr__(self, "stored_rows", self.out_features)


@dataclass(frozen=True)
class Norm:
    """rms: x / sqrt(mean(x^2) + eps) * (weight + weight_offset);
    layer: (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, var without Bessel's correction.

    A missing weight is ones, a missing bias zeros. Over the last axis, `size` long. Gemma stores
    weight - 1, hence its weight_offset of 1.
    """

    kind: Literal["rms", "layer"]
    size: int
    eps: float
    weight: str | None
    bias: str | None = None
    weight_offset: float = 0.0


@dataclass(frozen=True)
class Attention:
    """Causal self-attention; query head i reads key/value head i // (heads // kv_heads).

        q = rotary(q_norm(q(x)))   k = rotary(k_norm(k(x)))   per head, norm and rotary optional
        s = scale * q . k          softcap: s = softcap * tanh(s / softcap)
        s = s - alibi_slopes[head] * (i - j)                   for query position i, key position j
        j is visible from i when i - window < j <= i           (no window: j <= i)
        o(concatenated heads of softmax(s) v)

    q, k, v have heads * head_dim and kv_heads * head_dim outputs; heads * head_dim may differ from
    the hidden size.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotary: Rotary | None = None
    alibi_slopes: tuple[float, ...] | None = None
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Mlp:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where there is no gate."""

    activation: Activation
    gate: Linear | None
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Layer:
    """One decoder block; the formula stands at the head of this module."""

    attention: Attention
    mlp: Mlp
    attention_in: Norm | None = None
    attention_out: Norm | None = None
    attention_after: Norm | None = None
    mlp_in: Norm | None = None
    mlp_out: Norm | None = None
    mlp_after: Norm | None = None
    parallel: bool = False


@dataclass(frozen=True)
class Positions:
    """Learned positions: row `position + offset` of `weight`, [max_positions + offset, size]."""

    weight: str
    size: int
    offset: int = 0


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the checkpoint: its role, its shape as stored unquantized, and its layer.

    Only `linear`, `head` and `embedding` tensors are matrices worth quantizing: [out, in], or
    [in, out] where `transposed`. A tied head has no tensor: the embedding then serves both.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    layer: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Decoder:
    """A whole decoder-only language model; the formula stands at the head of this module.

    `head.weight` is the embedding's name where `tied`. `max_positions` is the context length:
    a hard limit with learned positions, the trained length otherwise. `ignored` are endings of
    names of tensors that checkpoints carry and that mean nothing (buffers).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    embedding: str
    embedding_size: int
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Linear
    tied: bool
    embedding_scale: float = 1.0
    embedding_projection: Linear | None = None
    embedding_norm: Norm | None = None
    positions: Positions | None = None
    output_projection: Linear | None = None
    logit_softcap: float | None = None
    ignored: tuple[str, ...] = field(default=(), repr=False)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor that the decoder reads, by checkpoint name, in order of use."""
        return {info.name: info for info in _walk(self)}

    def tensor_roles(self) -> dict[str, Role]:
        """Checkpoint name -> role, for recipes."""
        return {name: info.role for name, info in self.tensors.items()}

    def linear_names(self) -> list[str]:
        """Names of the weights of linear layers: without embedding and head."""
        return [name for name, info in self.tensors.items() if info.role == "linear"]

    def is_ignored(self, name: str) -> bool:
        """Whether a checkpoint may carry this tensor although nothing reads it."""
        return name.endswith(self.ignored) if self.ignored else False

    def check_names(self, names: Collection[str]) -> None:
        """Refuse a checkpoint that lacks a tensor, or has one that the description doesn't read:
        computing without it would give another model's answers."""
        stored = set(names)
        missing = [name for name in self.tensors if name not in stored]
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise KbitError(
                f"the checkpoint lacks {missing[0]}{more}, which a {self.model_type} model with "
                "this config.json needs; the download may be incomplete or the config another's"
            )
        extra = sorted(n for n in stored if n not in self.tensors and not self.is_ignored(n))
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise KbitError(
                f"the checkpoint has a tensor {extra[0]}{more} that kbit's {self.model_type} does "
                "not know; the model has parts that would be left out, so it is refused"
            )


def _walk(decoder: Decoder) -> Iterator[TensorInfo]:
    width = decoder.embedding_size
    yield TensorInfo(decoder.embedding, "embedding", (decoder.vocab_size, width))
    yield from _linear(decoder.embedding_projection)
    if decoder.positions is not None:
        rows = decoder.max_positions + decoder.positions.offset
        yield TensorInfo(decoder.positions.weight, "position", (rows, decoder.positions.size))
    yield from _norm(decoder.embedding_norm)
    for i, layer in enumerate(decoder.layers):
        attention, mlp = layer.attention, layer.mlp
        yield from _norm(layer.attention_in, i)
        for linear in (attention.q, attention.k, attention.v, attention.o):
            yield from _linear(linear, i)
        for norm in (attention.q_norm, attention.k_norm, layer.attention_out):
            yield from _norm(norm, i)
        yield from _norm(layer.attention_after, i)
        yield from _norm(layer.mlp_in, i)
        for part in (mlp.gate, mlp.up, mlp.down):
            yield from _linear(part, i)
        yield from _norm(layer.mlp_out, i)
        yield from _norm(layer.mlp_after, i)
    yield from _norm(decoder.final_norm)
    yield from _linear(decoder.output_projection)
    if not decoder.tied:
        yield from _linear(decoder.head, role="head")


def _linear(
    linear: Linear | None, layer: int | None = None, role: Role = "linear"
) -> Iterator[TensorInfo]:
    if linear is None:
        return
    shape = (linear.stored_rows, linear.in_features)
    stored = shape[::-1] if linear.transposed else shape
    yield TensorInfo(linear.weight, role, stored, layer, linear.transposed)
    if linear.bias is not None:
        yield TensorInfo(linear.bias, "bias", (linear.stored_rows,), layer)


def _norm(norm: Norm | None, layer: int | None = None) -> Iterator[TensorInfo]:
    if norm is None:
        return
    if norm.weight is not None:
        yield TensorInfo(norm.weight, "norm", (norm.size,), layer)
    if norm.bias is not None:
        yield TensorInfo(norm.bias, "bias", (norm.size,), layer)
