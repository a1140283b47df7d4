"""Attention of a decode step as one kernel, and what puts prompts' keys and values into the cache.

Computed in fp32 whatever the dtype of the tensors, like torch_attention.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kbit.engine.torch_attention import Step
from kbit.engine.torch_cache import TorchCache
from kbit.models import Attention
from kbit_kernels.triton.configs import gpu_class, power_of_two
from kbit_kernels.triton.device import overlapping, workspace
from kbit_kernels.triton.functions import after_others

SUMS = 128 * 128  # 128 of each thread's registers
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _pairs(x_ptr, d, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries d of a head, and what a rotation adds of their partners, in fp32."""
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    turned = inside & (d < 2 * HALF)
    far = tl.load(x_ptr + tl.where(d < HALF, HALF, -HALF), mask=turned, other=0.0).to(tl.float32)
    return x, tl.where(d < HALF, -far, far)


@triton.jit
def _angle(cos_ptr, sin_ptr, position, d, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosine and sine for entries d of a head; those after 2 * HALF aren't turned."""
    at = position * HALF + tl.where(d < HALF, d, d - HALF)
    cos = tl.load(cos_ptr + at, mask=d < 2 * HALF, other=1.0)
    return cos, tl.load(sin_ptr + at, mask=d < 2 * HALF, other=0.0)


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
        x, far = _pairs(source + d, d, d < D, HALF)
        cos, sin = _angle(cos_ptr, sin_ptr, position, d, HALF)
        x = x * cos + far * sin
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
    q, k, v = (_of_rows(x) for x in (q, k, v))
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
    k_ptr,
    v_ptr,
    q_row,
    k_row,
    v_row,
    cos_ptr,
    sin_ptr,
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
    HALF: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    # A program takes the R queries of one key/value head and one of SPLITS parts of the positions
    # that they see. The last to arrive adds the parts in their order and sets its counter back.
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = (pair // G).to(tl.int64)
    group = pair % G
    position = tl.load(positions_ptr + b).to(tl.int32)
    begin = tl.maximum(position + 1 - WINDOW, 0) if WINDOW > 0 else 0
    each = tl.cdiv(tl.cdiv(position + 1 - begin, BLOCK_S), SPLITS) * BLOCK_S
    first = begin + split * each
    stop = tl.minimum(first + each, position + 1)
    stored = tl.minimum(stop, position)  # the new position isn't in the cache yet

    r = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    head = group * R + r[:, None]
    inside = (r < R)[:, None] & (d < D)
    DT: tl.constexpr = q_ptr.dtype.element_ty
    STORED: tl.constexpr = keys_ptr.dtype.element_ty

    # With a few hundred positions all of this is latency, so everything is asked for before
    # anything is waited for, and each block of positions while the one before is computed. Keys and
    # values of earlier steps are nobody's result in this one: they needn't wait for other kernels.
    slot = pair.to(tl.int64) * (capacity * D)
    at = (first + s)[:, None] * D + d
    seen = (first + s < stored)[:, None] & (d < D)
    keys = tl.load(keys_ptr + slot + at, mask=seen, other=0.0)
    values = tl.load(values_ptr + slot + at, mask=seen, other=0.0)
    after_others(OVERLAPS)
    cos, sin = _angle(cos_ptr, sin_ptr, position, d, HALF)
    q, q_far = _pairs(q_ptr + b * q_row + head * D + d, d[None, :], inside, HALF)
    k, k_far = _pairs(k_ptr + b * k_row + group * D + d, d, d < D, HALF)
    v = tl.load(v_ptr + b * v_row + group * D + d, mask=d < D, other=0.0)
    q = (q * cos + q_far * sin).to(DT)
    k = (k * cos + k_far * sin).to(DT).to(STORED)
    v = v.to(STORED)
    kept = tl.where((first < stop) & (stop > position), D, 0)  # by the program that sees it
    tl.store(keys_ptr + slot + position * D + d, k, mask=d < kept)
    tl.store(values_ptr + slot + position * D + d, v, mask=d < kept)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(first, stop, BLOCK_S):
        j = start + s
        new = (j == position)[:, None]
        near = tl.where(new, v, values).to(DT)
        scores = _dot(q, tl.trans(tl.where(new, k, keys).to(DT))) * scale
        at += BLOCK_S * D
        seen = (j + BLOCK_S < stored)[:, None] & (d < D)
        keys = tl.load(keys_ptr + slot + at, mask=seen, other=0.0)
        values = tl.load(values_ptr + slot + at, mask=seen, other=0.0)
        if HAS_SOFTCAP:  # tanh y = 2 sigmoid(2 y) - 1
            scores = softcap * (2 * tl.sigmoid(scores * (2.0 / softcap)) - 1)
        if HAS_SLOPES:
            slopes = tl.load(slopes_ptr + group * R + r, mask=r < R, other=0.0)
            scores -= slopes[:, None] * (position - j)
        scores = tl.where(j < stop, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - higher)
        p = tl.exp(scores - higher[:, None])
        acc = acc * shrink[:, None] + _dot(p.to(DT), near)
        total = total * shrink + tl.sum(p, 1)
        largest = higher

    if SPLITS == 1:
        at = (pair.to(tl.int64) * R + r)[:, None] * D + d
        tl.store(out_ptr + at, (acc / total[:, None]).to(DT), mask=inside)
    else:
        # partial [pairs, SPLITS, R * BLOCK_D + 2 R]: sums, then largest scores and totals
        size: tl.constexpr = R * (BLOCK_D + 2)
        base = partial_ptr + pair.to(tl.int64) * (SPLITS * size)
        part = base + split * size
        tl.store(part + r[:, None] * BLOCK_D + d, acc, mask=(r < R)[:, None] & (d >= 0))
        tl.store(part + R * BLOCK_D + r, largest, mask=r < R)
        tl.store(part + R * (BLOCK_D + 1) + r, total, mask=r < R)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel")
        if arrived < SPLITS - 1:
            return
        tl.store(counter_ptr + pair, 0)
        i = tl.arange(0, SPLITS)[:, None, None]
        r = tl.arange(0, triton.next_power_of_2(R))[None, :, None]
        d = tl.arange(0, BLOCK_D)[None, None, :]
        at = base + i * size + r
        highs = tl.load(at + R * BLOCK_D, mask=r < R, other=0, cache_modifier=".cg")
        totals = tl.load(at + R * (BLOCK_D + 1), mask=r < R, other=1, cache_modifier=".cg")
        at = base + i * size + r * BLOCK_D + d
        sums = tl.load(at, mask=(r < R) & (d >= 0), other=0, cache_modifier=".cg")
        weights = tl.exp(highs - tl.max(highs, 0, keep_dims=True))  # 0 where nothing was seen
        out = tl.sum(weights * sums, 0, keep_dims=True)
        out /= tl.sum(weights * totals, 0, keep_dims=True)
        at = (pair.to(tl.int64) * R + r) * D + d
        tl.store(out_ptr + at, out.to(DT), mask=(r < R) & (d < D))


class Attend:
    """Rotary positions, the new keys and values into the cache, and attention, for one new token a
    sequence, whatever the sequences' lengths: what is read follows the positions on the device, so
    that one captured launch serves all of them."""

    most_splits = 16

    def __init__(self, attention: Attention, slopes: Tensor | None) -> None:
        self._attention = attention
        self._slopes = slopes

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: TorchCache, positions: Tensor
    ) -> Tensor:
        """q [B, H, D], k and v [B, G, D], heads and entries contiguous, positions int64 [B] ->
        [B, H, D]. Position b, of sequence b, sees itself and what lies before it in the cache."""
        a = self._attention
        keys, values = cache.keys[layer], cache.values[layer]
        (B, H, D), G, capacity = q.shape, keys.shape[1], keys.shape[2]
        q, k, v = (_of_rows(x) for x in (q, k, v))
        cos, sin = (positions, positions) if a.rotary is None else cache.rotary[a.rotary]
        rows, width = (max(16, triton.next_power_of_2(size)) for size in (H // G, D))
        # positions at once: keys and values of a block fill 64 of each thread's registers
        block = max(16, min(64, 16384 // (width * keys.element_size())))
        _, processors = gpu_class(q.device)
        splits = min(
            self.most_splits,
            # what the last program adds up fits into its registers
            max(1, SUMS // (triton.next_power_of_2(H // G) * width)),
            power_of_two(2 * processors // (B * G)),
            triton.next_power_of_2(triton.cdiv(capacity, block)),
        )
        space = workspace(q.device)
        space.fit(B * H * splits * (width + 2), B * G)
        out = q.new_empty((B, H, D))
        _attend_kernel[(B * G, splits)](
            q,
            k,
            v,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            cos,
            sin,
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
            HALF=0 if a.rotary is None else cos.shape[-1],
            WINDOW=a.window or 0,
            HAS_SOFTCAP=a.softcap is not None,
            HAS_SLOPES=self._slopes is not None,
            SPLITS=splits,
            ROWS=rows,
            BLOCK_D=width,
            BLOCK_S=block,
            **overlapping(q.device, True),
            num_warps=4,
            num_stages=2,
        )
        return out


def _of_rows(x: Tensor) -> Tensor:
    """x [N, heads, D], copied where a row's heads and entries aren't contiguous."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
