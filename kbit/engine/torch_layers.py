"""The layers of a decoder in torch: built once at load, then called.

Shapes: N tokens of all sequences flat, D features in or out. Norms compute in fp32 whatever the
compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import kbit_kernels
from kbit.engine.executor import Weights
from kbit.engine.torch_cache import TorchCache
from kbit.errors import KbitError
from kbit.models import Attention, Decoder, Linear, Norm
from kbit_kernels.tensor import QuantizedTensor

Layer = Callable[[Tensor], Tensor]


class LinearLayer(Protocol):
    """y [N, out] = x [N, in] W^T + b, and `onto` [N, out] if given."""

    def __call__(self, x_ND: Tensor, onto: Tensor | None = None, /) -> Tensor: ...


Attend = Callable[[int, Tensor, Tensor, Tensor, TorchCache, Tensor], Tensor]


class Loader:
    """Reads a checkpoint's tensors for one decoder, checked against its description."""

    def __init__(
        self, checkpoint: Weights, decoder: Decoder, dtype: torch.dtype, device: str
    ) -> None:
        self._checkpoint = checkpoint
        self._decoder = decoder
        self.dtype = dtype
        self.device = device

    def stored(self, name: str) -> np.ndarray | QuantizedTensor:
        """The tensor `name`, refused if its shape is not the described one; a plain tensor that
        is stored transposed comes back as [out, in], like a quantized one."""
        info = self._decoder.tensors[name]
        tensor = self._checkpoint.tensor(name)
        flipped = info.transposed and isinstance(tensor, QuantizedTensor)
        expected = info.shape[::-1] if flipped else info.shape
        if tuple(tensor.shape) != expected:
            raise KbitError(
                f"{self._checkpoint.path}: tensor {name} has the shape {list(tensor.shape)}, but "
                f"config.json asks for {list(expected)}"
            )
        if info.transposed and not isinstance(tensor, QuantizedTensor):
            return tensor.T
        return tensor

    def fused(self, parts: Sequence[Linear]) -> LinearLayer | None:
        """The parts as quantized kernels, where a loader has some; None: dense."""
        return None

    def fused_norm(self, weight: Tensor, eps: float) -> Layer | None:
        """RMS norm as one kernel, where a loader has one."""
        return None

    def fused_gate(self, activation: str) -> Layer | None:
        """[N, 2 F] -> activation(first half) * second half as one kernel, likewise."""
        return None

    def fused_gated(self, gate: Linear, up: Linear, activation: str) -> Layer | None:
        """x -> activation(gate(x)) * up(x) as one kernel, likewise."""
        return None

    def fused_place(self) -> Callable[..., Tensor] | None:
        """Rotary positions and the cache write as one kernel (cuda_attention.place), likewise."""
        return None

    def fused_attend(self, attention: Attention, slopes: Tensor | None) -> Attend | None:
        """Attention of one new token a sequence, with its rotary positions and its place in the
        cache, as one kernel (cuda_attention.Attend), likewise."""
        return None

    def rows(self, linear: Linear) -> np.ndarray | QuantizedTensor:
        """The weight [out, in] of one linear layer, cut out of the stored matrix."""
        tensor = self.stored(linear.weight)
        if linear.rows is None:
            return tensor
        index = linear.rows.index()
        return tensor.rows(index) if isinstance(tensor, QuantizedTensor) else tensor[index]

    def bias(self, linear: Linear) -> Tensor | None:
        """The bias [out] of one linear layer in the compute dtype."""
        if linear.bias is None:
            return None
        bias = self._plain(linear.bias)
        cut = bias if linear.rows is None else bias[linear.rows.index()]
        return as_torch(cut).to(self.device, self.dtype)

    def matrix(self, name: str) -> Tensor:
        """A whole tensor as a matrix in the compute dtype, dequantized."""
        return self.dense(self.stored(name))

    def dense(self, weight: np.ndarray | QuantizedTensor) -> Tensor:
        """A weight in the compute dtype, dequantized."""
        if isinstance(weight, QuantizedTensor):
            weight = kbit_kernels.dequantize(weight)
        return as_torch(weight).to(self.device, self.dtype)

    def vector(self, name: str) -> Tensor:
        """A norm's weight or bias in fp32."""
        return as_torch(self._plain(name)).to(self.device, torch.float32)

    def _plain(self, name: str) -> np.ndarray:
        tensor = self.stored(name)
        if isinstance(tensor, QuantizedTensor):
            raise KbitError(f"tensor {name} is a vector and can't be quantized, but it is")
        return tensor


def as_torch(array: np.ndarray) -> Tensor:
    """A torch copy of an array (memory-mapped arrays are read-only, which torch can't express)."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def make_linear(loader: Loader, parts: Sequence[Linear]) -> LinearLayer:
    """x [N, D_in] -> [N, sum of the parts' outputs]: layers that share an input as one matrix.

    This is the seam for quantized kernels: here quantized weights are dequantized once into the
    compute dtype, which is exact arithmetic and the reference for them.
    """
    fused = loader.fused(parts)
    if fused is not None:
        return fused
    weight = torch.cat([loader.dense(loader.rows(part)) for part in parts])
    biases = [loader.bias(part) for part in parts]
    if all(bias is None for bias in biases):
        return DenseLinear(weight, None)
    filled = [
        weight.new_zeros(part.out_features) if bias is None else bias
        for part, bias in zip(parts, biases, strict=True)
    ]
    return DenseLinear(weight, torch.cat(filled))


class DenseLinear:
    """y = x W^T + b with a dense W [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x_ND: Tensor, onto: Tensor | None = None) -> Tensor:
        y = functional.linear(x_ND, self.weight, self.bias)
        return y if onto is None else onto + y


def make_norm(loader: Loader, norm: Norm | None) -> Layer:
    """The norm over the last axis; `identity` for None."""
    if norm is None:
        return identity
    weight = torch.ones(norm.size, device=loader.device)
    if norm.weight is not None:
        weight = loader.vector(norm.weight) + norm.weight_offset
    bias = None if norm.bias is None else loader.vector(norm.bias)
    if norm.kind == "rms":
        return loader.fused_norm(weight, norm.eps) or RmsNorm(weight, bias, norm.eps)
    return LayerNorm(weight, bias, norm.eps)


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight, in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        assert bias is None
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class LayerNorm:
    """(x - mean) / sqrt(var + eps) * weight + bias, in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        return functional.layer_norm(x.float(), shape, self.weight, self.bias, self.eps).to(x.dtype)


def identity(x: Tensor) -> Tensor:
    """x."""
    return x
