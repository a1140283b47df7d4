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
from kbit_kernels.activations import ACTIVATIONS
from kbit_kernels.triton.configs import gpu_class, power_of_two
from kbit_kernels.triton.device import overlapping, workspace
from kbit_kernels.triton.functions import activate, after_others

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
            **overlapping(x.device),
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
    OVERLAPS: tl.constexpr,
):
    after_others(OVERLAPS)
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
        keys.shape[2],
        H=H,
        G=G,
        D=D,
        HALF=cos.shape[-1],
        BLOCK=triton.next_power_of_2(D),
        **overlapping(q.device),
    )
    return out


@triton.jit
def _dot(a, b):  # type: ignore[no-untyped-def]
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bf16
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    slopes_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    scale,
    softcap,
    capacity,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    after_others(OVERLAPS)
    # A program takes the R queries of one key/value head and one of SPLITS parts of the positions
    # that they see. The last to arrive adds the parts in their order and sets its counter back.
    pair = tl.program_id(0)
    split = tl.program_id(1)
    position = tl.load(positions_ptr + pair // G).to(tl.int32)
    begin = tl.maximum(position + 1 - WINDOW, 0) if WINDOW > 0 else 0
    each = tl.cdiv(tl.cdiv(position + 1 - begin, BLOCK_S), SPLITS) * BLOCK_S
    first = begin + split * each
    stop = tl.minimum(first + each, position + 1)

    r = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    at = (pair.to(tl.int64) * R + r)[:, None] * D + d
    inside = (r < R)[:, None] & (d < D)
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(first, stop, BLOCK_S):
        j = start + tl.arange(0, BLOCK_S)
        slot = (pair.to(tl.int64) * capacity + j) * D
        seen = j < stop
        k = tl.load(keys_ptr + slot[None, :] + d[:, None], mask=(d < D)[:, None] & seen, other=0.0)
        v = tl.load(values_ptr + slot[:, None] + d, mask=seen[:, None] & (d < D), other=0.0)
        scores = _dot(q, k.to(q.dtype)) * scale
        if HAS_SOFTCAP:  # tanh y = 2 sigmoid(2 y) - 1
            scores = softcap * (2 * tl.sigmoid(scores * (2.0 / softcap)) - 1)
        if HAS_SLOPES:
            slopes = tl.load(slopes_ptr + (pair % G) * R + r, mask=r < R, other=0.0)
            scores -= slopes[:, None] * (position - j)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - higher)
        p = tl.exp(scores - higher[:, None])
        acc = acc * shrink[:, None] + _dot(p.to(q.dtype), v.to(q.dtype))
        total = total * shrink + tl.sum(p, 1)
        largest = higher

    if SPLITS > 1:
        # partial [pairs, SPLITS, ROWS, BLOCK_D + 2]: sums, then largest score and total
        size: tl.constexpr = ROWS * (BLOCK_D + 2)
        base = partial_ptr + pair.to(tl.int64) * (SPLITS * size)
        mine = base + split * size
        real = (r < R)[:, None] & (d >= 0)
        tl.store(mine + r[:, None] * BLOCK_D + d, acc, mask=real)
        tl.store(mine + ROWS * BLOCK_D + r, largest)
        tl.store(mine + ROWS * (BLOCK_D + 1) + r, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel")
        if arrived < SPLITS - 1:
            return
        tl.store(counter_ptr + pair, 0)
        # unrolled: else every part would wait for the one before
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        for s in tl.static_range(SPLITS):
            part = tl.load(base + s * size + ROWS * BLOCK_D + r, cache_modifier=".cg")
            largest = tl.maximum(largest, part)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for s in tl.static_range(SPLITS):
            part = base + s * size
            weight = tl.load(part + ROWS * BLOCK_D + r, cache_modifier=".cg")
            weight = tl.exp(weight - largest)  # 0 for a part that saw nothing
            total += weight * tl.load(part + ROWS * (BLOCK_D + 1) + r, cache_modifier=".cg")
            sums = tl.load(
                part + r[:, None] * BLOCK_D + d, mask=real, other=0, cache_modifier=".cg"
            )
            acc += weight[:, None] * sums
    out = acc / total[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


class Attend:
    """Attention of one new token a sequence over the cache, whatever the sequences' lengths: what
    is read follows the positions on the device, so that one captured launch serves all of them."""

    most_splits = 16

    def __init__(self, attention: Attention, slopes: Tensor | None) -> None:
        self._attention = attention
        self._slopes = slopes

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """q [B, H, D], keys and values [B, G, capacity, D], positions int64 [B] -> [B, H, D].

        Position b sees itself and what is before it; keys and values stand there already.
        """
        a = self._attention
        (B, H, D), G, capacity = q.shape, keys.shape[1], keys.shape[2]
        rows, width = (max(16, triton.next_power_of_2(size)) for size in (H // G, D))
        # positions at once: two stages of keys and values stay below 64 KB of shared memory
        block = max(16, min(64, 16384 // (width * keys.element_size())))
        _, processors = gpu_class(q.device)
        splits = min(
            self.most_splits,
            power_of_two(2 * processors // (B * G)),
            triton.next_power_of_2(triton.cdiv(capacity, block)),
        )
        space = workspace(q.device)
        space.fit(B * G * splits * rows * (width + 2), B * G)
        out = torch.empty_like(q)
        _attend_kernel[(B * G, splits)](
            q,
            keys,
            values,
            positions,
            q if self._slopes is None else self._slopes,
            out,
            space.partial,
            space.counters,
            a.scale,
            1.0 if a.softcap is None else a.softcap,
            capacity,
            G=G,
            R=H // G,
            D=D,
            WINDOW=a.window or 0,
            HAS_SOFTCAP=a.softcap is not None,
            HAS_SLOPES=self._slopes is not None,
            SPLITS=splits,
            ROWS=rows,
            BLOCK_D=width,
            BLOCK_S=block,
            **overlapping(q.device),
            num_warps=4,
            num_stages=2,
        )
        return out
