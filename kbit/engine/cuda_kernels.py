"""What stands between the matrix products of a layer, one kernel each instead of a dozen: at batch
1 a decode step is as much launching as computing.

Computed in fp32 whatever the dtype of the tensors, like torch_layers and torch_attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit.engine.torch_attention import Step
from kbit.engine.torch_cache import TorchCache
from kbit.models import Attention

INTERPRETED: bool = triton.knobs.runtime.interpret
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    x *= tl.load(weight_ptr + d, mask=d < D, other=0.0)
    tl.store(out_ptr + row * D + d, x.to(out_ptr.dtype.element_ty), mask=d < D)


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        D = self.weight.shape[0]
        rows = x.reshape(-1, D)
        out = torch.empty_like(rows)
        _rms_norm_kernel[(rows.shape[0],)](
            rows, self.weight, out, self.eps, D, BLOCK=triton.next_power_of_2(D)
        )
        return out.view(x.shape)


@triton.jit
def _gate_kernel(x_ptr, out_ptr, F, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate *= tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        gate *= 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh y) = sigmoid(2 y)
        gate *= tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate = tl.maximum(gate, 0.0)
    tl.store(out_ptr + row * F + f, (gate * up).to(out_ptr.dtype.element_ty), mask=f < F)


class Gate:
    """activation(gate) * up of [N, 2 F], gate first."""

    def __init__(self, activation: str) -> None:
        assert activation in ACTIVATIONS, activation
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        N, F = x.shape[0], x.shape[1] // 2
        out = x.new_empty((N, F))
        _gate_kernel[(N, triton.cdiv(F, 1024))](
            x.contiguous(), out, F, ACTIVATION=self.activation, BLOCK=1024
        )
        return out


@triton.jit
def _place_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    q_row,
    k_row,
    v_row,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    sequences_ptr,
    out_ptr,
    keys_ptr,
    values_ptr,
    capacity,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    position = tl.load(positions_ptr + n)
    group = tl.where(head < H, 0, (head - H) % G)
    slot = ((tl.load(sequences_ptr + n) * G + group) * capacity + position) * D + d
    if head >= H + G:
        v = tl.load(v_ptr + n * v_row + group * D + d, mask=d < D)
        tl.store(values_ptr + slot, v.to(values_ptr.dtype.element_ty), mask=d < D)
    else:
        source = k_ptr + n * k_row + group * D
        if head < H:
            source = q_ptr + n * q_row + head * D
        turned = d < 2 * HALF
        partner = tl.where(d < HALF, d + HALF, d - HALF)
        x = tl.load(source + d, mask=d < D, other=0.0).to(tl.float32)
        y = tl.load(source + partner, mask=turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + position * HALF + d % HALF, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + position * HALF + d % HALF, mask=turned, other=0.0)
        x = x * cos + tl.where(d < HALF, -y, y) * sin
        if head < H:
            at = out_ptr + (n * H + head) * D + d
            tl.store(at, x.to(out_ptr.dtype.element_ty), mask=d < D)
        else:
            # rounded to the compute dtype first, as where keys are computed before they are stored
            key = x.to(out_ptr.dtype.element_ty)
            tl.store(keys_ptr + slot, key.to(keys_ptr.dtype.element_ty), mask=d < D)


def place(
    a: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: TorchCache, step: Step
) -> Tensor:
    """Rotary positions on q and k, k and v into the cache; returns the turned q [N, H, D].

    q, k, v are [N, heads, D] with heads and entries contiguous.
    """
    assert a.rotary is not None
    N, H, D = q.shape
    G = k.shape[1]
    q, k, v = (x if x.stride()[1:] == (D, 1) else x.contiguous() for x in (q, k, v))
    cos, sin = cache.rotary[a.rotary]
    keys, values = cache.keys[layer], cache.values[layer]
    out = q.new_empty((N, H, D))
    _place_kernel[(N, H + 2 * G)](
        q,
        k,
        v,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        cos,
        sin,
        step.positions,
        step.sequences,
        out,
        keys,
        values,
        cache.capacity,
        H=H,
        G=G,
        D=D,
        HALF=cos.shape[-1],
        BLOCK=triton.next_power_of_2(D),
    )
    return out
