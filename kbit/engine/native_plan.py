"""What the native library needs to run a decoder: its structs, filled from a description.

The structs mirror kernels/kbit_kernels/cpu/src/plan.h. Matrices stay where the checkpoint maps
them; only norms, biases and rotary tables are copied (to fp32).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np

from kbit.engine.executor import Weights
from kbit.errors import KbitError
from kbit.models import Decoder, Layer, Linear, Norm, Rotary
from kbit_kernels.cpu import library
from kbit_kernels.tensor import QuantizedTensor

NORMS = {"rms": 1, "layer": 2}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
MOST_MATRICES = 3


class NormSpec(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32),
        ("size", c_int32),
        ("eps", c_float),
        ("weight", c_void_p),
        ("bias", c_void_p),
    )


class ProductSpec(ctypes.Structure):
    _fields_ = (("count", c_int32), ("matrices", c_int32 * MOST_MATRICES), ("bias", c_void_p))


class HeadsSpec(ctypes.Structure):
    _fields_ = (("base", c_int64), ("stride", c_int64))


class LayerSpec(ctypes.Structure):
    _fields_ = (
        ("attention_in", NormSpec),
        ("attention_out", NormSpec),
        ("attention_after", NormSpec),
        ("mlp_in", NormSpec),
        ("mlp_out", NormSpec),
        ("mlp_after", NormSpec),
        ("q_norm", NormSpec),
        ("k_norm", NormSpec),
        ("qkv", ProductSpec),
        ("out", ProductSpec),
        ("up", ProductSpec),
        ("down", ProductSpec),
        ("q", HeadsSpec),
        ("k", HeadsSpec),
        ("v", HeadsSpec),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary", c_int32),
        ("rotary_half", c_int32),
        ("window", c_int32),
        ("activation", c_int32),
        ("gated", c_int32),
        ("parallel", c_int32),
        ("inner", c_int64),
        ("gate_base", c_int64),
        ("up_base", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("slopes", c_void_p),
    )


class DecoderSpec(ctypes.Structure):
    _fields_ = (
        ("vocabulary", c_int64),
        ("hidden", c_int64),
        ("embedding_size", c_int64),
        ("position_offset", c_int64),
        ("n_layers", c_int32),
        ("n_tensors", c_int32),
        ("layers", POINTER(LayerSpec)),
        ("tensors", POINTER(library.Tensor)),
        ("embedding", c_int32),
        ("positions", c_int32),
        ("embedding_projection", ProductSpec),
        ("output_projection", ProductSpec),
        ("head", ProductSpec),
        ("embedding_norm", NormSpec),
        ("final_norm", NormSpec),
        ("embedding_scale", c_float),
        ("logit_softcap", c_float),
        ("threads", c_int32),
        ("arithmetic", c_int32),
        ("isa", c_int32),
    )


class CacheSpec(ctypes.Structure):
    _fields_ = (
        ("batch", c_int64),
        ("capacity", c_int64),
        ("type", c_int32),
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        ("cos", POINTER(c_void_p)),
        ("sin", POINTER(c_void_p)),
    )


def pointers(arrays: Iterable[np.ndarray]) -> Any:
    """A C array of the addresses of arrays, which must be kept alive."""
    addresses = [array.ctypes.data for array in arrays]
    return (c_void_p * max(len(addresses), 1))(*addresses)


def rotaries(decoder: Decoder) -> list[Rotary]:
    """The decoder's different rotary positions: their places number a cache's tables."""
    found = (layer.attention.rotary for layer in decoder.layers)
    return list(dict.fromkeys(rotary for rotary in found if rotary is not None))


def heads_of(linear: Linear, base: int, heads: int, head_dim: int) -> HeadsSpec | None:
    """Where the heads of q, k or v lie in a product's outputs, whose part for the stored matrix
    begins at `base`; None if they are not evenly spaced."""
    rows = linear.rows
    if rows is None:
        return HeadsSpec(base, head_dim)
    if rows.count == 1 and rows.length == heads * head_dim:
        return HeadsSpec(base + rows.start, head_dim)
    if rows.count == heads and rows.length == head_dim:
        return HeadsSpec(base + rows.start, rows.stride)
    return None


def stored_bases(parts: Sequence[Linear]) -> dict[str, int]:
    """Name of each stored matrix of a product -> where its outputs begin."""
    bases: dict[str, int] = {}
    end = 0
    for part in parts:
        if part.weight not in bases:
            bases[part.weight] = end
            end += part.stored_rows
    return bases


def plan_support(decoder: Decoder) -> tuple[bool, str]:
    """Whether the native library can run this decoder, and why not."""
    for i, layer in enumerate(decoder.layers):
        attention, mlp = layer.attention, layer.mlp
        bases = stored_bases((attention.q, attention.k, attention.v))
        sizes = (attention.heads, attention.kv_heads, attention.kv_heads)
        for part, heads in zip((attention.q, attention.k, attention.v), sizes, strict=True):
            if heads_of(part, bases[part.weight], heads, attention.head_dim) is None:
                return False, f"layer {i} stores its heads in an order that it does not know"
        for part in (mlp.up, mlp.down, attention.o, mlp.gate or mlp.up):
            if part.rows is not None and part.rows.count != 1:
                return False, f"layer {i} interleaves rows of its MLP"
        for part in (attention.o, mlp.down):
            if part.rows is not None:
                return False, f"layer {i} shares the matrix {part.weight}"
    return True, "runs every layer in one call"


class Plan:
    """A DecoderSpec and everything that it points to.

    Raises KbitError for a tensor that doesn't have the described shape or type.
    """

    def __init__(
        self, checkpoint: Weights, decoder: Decoder, threads: int, arithmetic: int, isa: int
    ) -> None:
        self._checkpoint = checkpoint
        self._decoder = decoder
        self._kept: list[Any] = []
        self._numbers: dict[str, int] = {}
        self._tensors: list[library.Tensor] = []
        self._rotaries = rotaries(decoder)
        layers = (LayerSpec * max(len(decoder.layers), 1))(*map(self._layer, decoder.layers))
        positions = decoder.positions
        self.spec = DecoderSpec(
            vocabulary=decoder.vocab_size,
            hidden=decoder.hidden_size,
            embedding_size=decoder.embedding_size,
            position_offset=0 if positions is None else positions.offset,
            n_layers=len(decoder.layers),
            layers=layers,
            embedding=self._matrix(decoder.embedding),
            positions=-1 if positions is None else self._matrix(positions.weight),
            embedding_projection=self._product(decoder.embedding_projection),
            output_projection=self._product(decoder.output_projection),
            head=self._product(decoder.head),
            embedding_norm=self._norm(decoder.embedding_norm),
            final_norm=self._norm(decoder.final_norm),
            embedding_scale=decoder.embedding_scale,
            logit_softcap=decoder.logit_softcap or 0.0,
            threads=threads,
            arithmetic=arithmetic,
            isa=isa,
        )
        tensors = (library.Tensor * len(self._tensors))(*self._tensors)
        self.spec.tensors = tensors
        self.spec.n_tensors = len(self._tensors)
        self._kept += [layers, tensors]

    def _layer(self, layer: Layer) -> LayerSpec:
        attention, mlp = layer.attention, layer.mlp
        qkv = (attention.q, attention.k, attention.v)
        bases = stored_bases(qkv)
        counts = (attention.heads, attention.kv_heads, attention.kv_heads)
        q, k, v = (
            heads_of(part, bases[part.weight], heads, attention.head_dim)
            for part, heads in zip(qkv, counts, strict=True)
        )
        up = (mlp.up,) if mlp.gate is None else (mlp.gate, mlp.up)
        places = [
            stored_bases(up)[part.weight] + (part.rows.start if part.rows else 0) for part in up
        ]
        rotary = attention.rotary
        slopes = None
        if attention.alibi_slopes is not None:
            slopes = self._keep(np.array(attention.alibi_slopes, dtype=np.float32))
        return LayerSpec(
            attention_in=self._norm(layer.attention_in),
            attention_out=self._norm(layer.attention_out),
            attention_after=self._norm(layer.attention_after),
            mlp_in=self._norm(layer.mlp_in),
            mlp_out=self._norm(layer.mlp_out),
            mlp_after=self._norm(layer.mlp_after),
            q_norm=self._norm(attention.q_norm),
            k_norm=self._norm(attention.k_norm),
            qkv=self._product(*qkv),
            out=self._product(attention.o),
            up=self._product(*up),
            down=self._product(mlp.down),
            q=q,
            k=k,
            v=v,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            rotary=-1 if rotary is None else self._rotaries.index(rotary),
            rotary_half=0 if rotary is None else rotary.dim // 2,
            window=attention.window or 0,
            activation=ACTIVATIONS.index(mlp.activation),
            gated=mlp.gate is not None,
            parallel=layer.parallel,
            inner=mlp.down.in_features,
            gate_base=places[0],
            up_base=places[-1],
            scale=attention.scale,
            softcap=attention.softcap or 0.0,
            slopes=slopes,
        )

    def _product(self, *parts: Linear | None) -> ProductSpec:
        linears = [part for part in parts if part is not None]
        stored = {part.weight: part for part in linears}
        numbers = [self._matrix(name) for name in stored]
        bias = None
        if any(part.bias is not None for part in stored.values()):
            vectors = [
                np.zeros(part.stored_rows, np.float32)
                if part.bias is None
                else self._vector(part.bias)
                for part in stored.values()
            ]
            bias = self._keep(np.concatenate(vectors))
        return ProductSpec(len(numbers), (c_int32 * MOST_MATRICES)(*numbers), bias)

    def _norm(self, norm: Norm | None) -> NormSpec:
        if norm is None:
            return NormSpec()
        weight = bias = None
        if norm.weight is not None:
            weight = self._keep(self._vector(norm.weight) + np.float32(norm.weight_offset))
        if norm.bias is not None:
            bias = self._keep(self._vector(norm.bias))
        return NormSpec(NORMS[norm.kind], norm.size, norm.eps, weight, bias)

    def _keep(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array)
        self._kept.append(array)
        return array.ctypes.data

    def _matrix(self, name: str) -> int:
        """The number of a matrix, [out, in]. A plain one that is stored [in, out] is copied."""
        if name not in self._numbers:
            tensor = self._stored(name)
            if self._decoder.tensors[name].transposed and not isinstance(tensor, QuantizedTensor):
                tensor = tensor.T
            try:
                view, kept = library.describe(tensor)
            except KbitError as error:
                raise KbitError(f"tensor {name}: {error}") from None
            self._numbers[name] = len(self._tensors)
            self._tensors.append(view)
            self._kept.append(kept)
        return self._numbers[name]

    def _vector(self, name: str) -> np.ndarray:
        tensor = self._stored(name)
        if isinstance(tensor, QuantizedTensor):
            raise KbitError(f"tensor {name} is a vector and can't be quantized, but it is")
        return tensor.astype(np.float32)

    def _stored(self, name: str) -> np.ndarray | QuantizedTensor:
        info = self._decoder.tensors[name]
        tensor = self._checkpoint.tensor(name)
        flipped = info.transposed and isinstance(tensor, QuantizedTensor)
        expected = info.shape[::-1] if flipped else info.shape
        if tuple(tensor.shape) != expected:
            raise KbitError(
                f"{self._checkpoint.path}: tensor {name} has the shape {list(tensor.shape)}, but "
                f"config.json asks for {list(expected)}"
            )
        return tensor
