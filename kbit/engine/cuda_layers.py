"""Quantized linear layers on a GPU: the kernels of kbit_kernels.triton at make_linear's seam."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kbit.engine.torch_layers import Attend, Layer, Loader
from kbit.models import Attention, Linear
from kbit_kernels.tensor import QuantizedTensor

_PER_ROW = ("codes", "scales", "zeros", "means")
HALVES = (torch.float16, torch.bfloat16)


class CudaLoader(Loader):
    """Loads quantized matrices as they are, one tensor of the file after the other."""

    def fused(self, parts: Sequence[Linear]) -> Layer | None:
        """The parts as one kernel call where they are stored alike, else as one call each; None if
        one isn't quantized or the compute dtype is fp32, which the kernels don't take."""
        stored = [self.rows(part) for part in parts]
        if self.dtype not in HALVES:
            return None
        quantized = [tensor for tensor in stored if isinstance(tensor, QuantizedTensor)]
        if len(quantized) < len(stored):
            return None
        biases = [self.bias(part) for part in parts]
        stacked = stack(quantized)
        if stacked is None:
            return _Several(
                [
                    KernelLinear(tensor, bias, self)
                    for tensor, bias in zip(quantized, biases, strict=True)
                ]
            )
        if all(bias is None for bias in biases):
            return KernelLinear(stacked, None, self)
        filled = [
            torch.zeros(part.out_features, dtype=self.dtype, device=self.device)
            if bias is None
            else bias
            for part, bias in zip(parts, biases, strict=True)
        ]
        return KernelLinear(stacked, torch.cat(filled), self)

    def fused_norm(self, weight: Tensor, eps: float) -> Layer | None:
        kernels = self._kernels()
        return None if kernels is None else kernels.RmsNorm(weight, eps)

    def fused_gate(self, activation: str) -> Layer | None:
        kernels = self._kernels()
        return None if kernels is None else kernels.Gate(activation)

    def fused_place(self) -> Callable[..., Tensor] | None:
        kernels = self._kernels()
        return None if kernels is None else kernels.place

    def fused_attend(self, attention: Attention, slopes: Tensor | None) -> Attend | None:
        kernels = self._kernels()
        return None if kernels is None else kernels.Attend(attention, slopes)

    def _kernels(self) -> ModuleType | None:
        """The small kernels; None on a CPU, unless Triton's interpreter stands in for a GPU."""
        if not self.device.startswith("cuda") and "TRITON_INTERPRET" not in os.environ:
            return None
        from kbit.engine import cuda_kernels

        return cuda_kernels


def stack(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """The matrices one below the other; None where they can't share one kernel call: other specs,
    learned codebooks or 16-bit columns, which belong to a matrix each."""
    if len(tensors) == 1:
        return tensors[0]
    plain = [tensor.with_plain_scales() for tensor in tensors]
    first = plain[0]
    alike = all(tensor.spec == first.spec for tensor in plain)
    if not alike or first.codebook is not None or first.outliers is not None:
        return None
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(tensor, name) for tensor in plain])
        for name in _PER_ROW
        if getattr(first, name) is not None
    }
    rows = sum(tensor.shape[0] for tensor in plain)
    return replace(first, shape=(rows, first.shape[1]), **joined)


class KernelLinear:
    """y = x W^T + b with W in k bits."""

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None, loader: Loader) -> None:
        from kbit_kernels.triton import linear, prepare

        self.weight = prepare(tensor, loader.device, loader.dtype)
        self.bias = bias
        self._linear = linear

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self._linear(x_ND, self.weight, self.bias)


class _Several:
    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    def __call__(self, x_ND: Tensor) -> Tensor:
        return torch.cat([layer(x_ND) for layer in self.layers], dim=-1)
