"""What stands between the matrix products of a layer and after the last, one kernel each instead of
a dozen: at batch 1 a decode step is as much launching as computing. Attention: cuda_attention.

Computed in fp32 whatever the dtype of the tensors, like torch_layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_kernels.activations import ACTIVATIONS
from kbit_kernels.triton.device import overlapping, workspace
from kbit_kernels.triton.functions import activate, after_others

LIKELIEST_BLOCK = 4096


@triton.jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, out_ptr, eps, D, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
    after_others(OVERLAPS)
    x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
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
            rows,
            self.weight,
            out,
            self.eps,
            D,
            BLOCK=(block := triton.next_power_of_2(D)),
            num_warps=max(1, min(16, block // 256)),
            **overlapping(x.device, True),
        )
        return out.view(x.shape)


@triton.jit
def _gate_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, F, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    after_others(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    gate = activate(gate, ACTIVATION)
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
            x.contiguous(),
            out,
            F,
            ACTIVATION=self.activation,
            BLOCK=1024,
            **overlapping(x.device),
        )
        return out


@triton.jit
def _largest(x):  # type: ignore[no-untyped-def]
    """The largest entry, NaN if any is, and the first place of the largest number."""
    bad = tl.max((x != x).to(tl.int32), 0) > 0
    x = tl.where(x != x, float("-inf"), x)
    return tl.where(bad, float("nan"), tl.max(x, 0)), tl.argmax(x, 0)


@triton.jit
def _likeliest_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    V,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    after_others(OVERLAPS)
    # A program takes one part of a row; the last to arrive compares the parts.
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    v = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf"))
    largest, best = _largest(x)
    best += part * BLOCK

    partial_ptr += row * (2 * PARTS)
    tl.store(partial_ptr + part, largest)
    tl.store(partial_ptr + PARTS + part, best.to(tl.float32))  # exact up to 2^24
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel")
    if arrived < PARTS - 1:
        return
    tl.store(counter_ptr + row, 0)
    p = tl.arange(0, triton.next_power_of_2(PARTS))
    x = tl.load(partial_ptr + p, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg")
    largest, best = _largest(x)
    best = tl.load(partial_ptr + PARTS + best, cache_modifier=".cg")
    tl.store(out_ptr + row * 2, best.to(tl.float64))
    tl.store(out_ptr + row * 2 + 1, largest.to(tl.float64))


def likeliest(logits_BV: Tensor) -> Tensor:
    """Logits fp32 [B, V] -> fp64 [B, 2]: the first token with the largest logit, and that logit,
    NaN if any is (then the token means nothing)."""
    B, V = logits_BV.shape
    parts = triton.cdiv(V, LIKELIEST_BLOCK)
    space = workspace(logits_BV.device)
    space.fit(2 * B * parts, B)
    out = logits_BV.new_empty((B, 2), dtype=torch.float64)
    _likeliest_kernel[(B, parts)](
        logits_BV,
        out,
        space.partial,
        space.counters,
        V,
        PARTS=parts,
        BLOCK=LIKELIEST_BLOCK,
        **overlapping(logits_BV.device),
        num_warps=8,
    )
    return out
