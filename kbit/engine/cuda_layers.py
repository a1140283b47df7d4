"""Quantized linear layers on a GPU: the kernels of kbit_kernels.triton at make_linear's seam."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kbit.engine.torch_layers import Attend, Layer, LinearLayer, Loader
from kbit.models import Attention, Linear
from kbit_kernels.activations import ACTIVATIONS
from kbit_kernels.tensor import QuantizedTensor

_PER_ROW = ("codes", "scales", "zeros", "means")
HALVES = (torch.float16, torch.bfloat16)


class CudaLoader(Loader):
    """Loads quantized matrices as they are, one tensor of the file after the other."""

    def fused(self, parts: Sequence[Linear]) -> LinearLayer | None:
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

    def fused_gated(self, gate: Linear, up: Linear, activation: str) -> Layer | None:
        """Where the two are stored alike, and eight rows of the one can lie beside eight of the
        other."""
        stacked = None
        if activation in ACTIVATIONS and self.dtype in HALVES and gate.out_features % 8 == 0:
            parts = [self.rows(part) for part in (gate, up)]
            quantized = [part for part in parts if isinstance(part, QuantizedTensor)]
            stacked = stack(quantized) if len(quantized) == 2 else None
        if stacked is None:
            return None
        order = np.arange(stacked.shape[0]).reshape(2, -1, 8).swapaxes(0, 1).reshape(-1)
        biases = [self.bias(part) for part in (gate, up)]
        bias = None
        if any(b is not None for b in biases):
            zero = torch.zeros(gate.out_features, dtype=self.dtype, device=self.device)
            bias = torch.cat([zero if b is None else b for b in biases])[torch.from_numpy(order)]
        return KernelLinear(stacked.rows(order), bias, self, gate=activation)

    def fused_norm(self, weight: Tensor, eps: float) -> Layer | None:
        if not has_kernels(self.device):
            return None
        from kbit.engine.cuda_kernels import RmsNorm

        return RmsNorm(weight, eps)

    def fused_gate(self, activation: str) -> Layer | None:
        if not has_kernels(self.device):
            return None
        from kbit.engine.cuda_kernels import Gate

        return Gate(activation)

    def fused_place(self) -> Callable[..., Tensor] | None:
        if not has_kernels(self.device):
            return None
        from kbit.engine.cuda_attention import place

        return place

    def fused_attend(self, attention: Attention, slopes: Tensor | None) -> Attend | None:
        if not has_kernels(self.device):
            return None
        from kbit.engine.cuda_attention import Attend

        return Attend(attention, slopes)


def has_kernels(device: str) -> bool:
    """Whether the small kernels run; on a CPU only where Triton's interpreter stands in for a
    GPU."""
    return device.startswith("cuda") or "TRITON_INTERPRET" in os.environ


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
    """y = x W^T + b with W in k bits; or gated, see kbit_kernels.triton.linear."""

    def __init__(
        self, tensor: QuantizedTensor, bias: Tensor | None, loader: Loader, *, gate: str = ""
    ) -> None:
        from kbit_kernels.triton import linear, prepare

        self.weight = prepare(tensor, loader.device, loader.dtype)
        self.bias = bias
        self._linear = linear
        self._gate = gate

    def __call__(self, x_ND: Tensor, onto: Tensor | None = None) -> Tensor:
        return self._linear(x_ND, self.weight, self.bias, onto, self._gate)


class _Several:
    def __init__(self, layers: Sequence[LinearLayer]) -> None:
        self.layers = layers

    def __call__(self, x_ND: Tensor, onto: Tensor | None = None) -> Tensor:
        y = torch.cat([layer(x_ND) for layer in self.layers], dim=-1)
        return y if onto is None else onto + y
