"""Attention of ragged batches over the cache, in torch.

Shapes: N new tokens of all sequences flat; B sequences, T new tokens of the longest; S positions
of the cache; H query heads, G key/value heads, R = H / G; D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kbit.engine.torch_cache import TorchCache
from kbit.engine.torch_layers import Loader, make_linear, make_norm
from kbit.models import Attention

QUERY_CHUNK = 512  # queries at once: bounds the memory of masks and scores of long prompts


@dataclass(frozen=True)
class Step:
    """Where the new tokens of one forward call stand; the same for every layer.

    rows: the cache's sequences that get tokens; counts: how many each; starts: their lengths
    before. sequences, positions [N]: cache row and position of each flat token. slots [N]: its
    place in the padded [B * T] layout, None where all counts are equal and nothing is padded.
    padded_positions [B, T]: positions in the padded layout; padding repeats the last position, so
    that no row of scores is wholly masked.
    """

    rows: list[int]
    counts: list[int]
    starts: list[int]
    sequences: Tensor
    positions: Tensor
    slots: Tensor | None
    padded_positions: Tensor
    all_rows: bool

    @classmethod
    def plan(cls, counts: Sequence[int], cache: TorchCache, device: str) -> Step:
        rows = [b for b, count in enumerate(counts) if count]
        new = [counts[b] for b in rows]
        starts = [cache.lengths[b] for b in rows]
        longest = max(new)
        sequence = np.repeat(rows, new)
        offsets = np.concatenate([np.arange(count) for count in new])
        position = np.repeat(starts, new) + offsets
        slot = np.repeat(np.arange(len(rows)) * longest, new) + offsets
        padded = np.minimum(np.arange(longest), np.array(new)[:, None] - 1)
        padded_positions = np.array(starts)[:, None] + padded
        even = min(new) == longest

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            rows=rows,
            counts=new,
            starts=starts,
            sequences=put(sequence),
            positions=put(position),
            slots=None if even else put(slot),
            padded_positions=put(padded_positions),
            all_rows=len(rows) == cache.batch,
        )

    def pad(self, x_NHD: Tensor) -> Tensor:
        """[N, H, D] -> [B, H, T, D]."""
        B, T = self.padded_positions.shape
        if self.slots is not None:
            padded = x_NHD.new_zeros((B * T, *x_NHD.shape[1:]))
            padded[self.slots] = x_NHD
            x_NHD = padded
        return x_NHD.view(B, T, *x_NHD.shape[1:]).transpose(1, 2)

    def flat(self, x_BHTD: Tensor) -> Tensor:
        """[B, H, T, D] -> [N, H * D], padding dropped."""
        B, H, T, D = x_BHTD.shape
        x = x_BHTD.transpose(1, 2).reshape(B * T, H * D)
        return x if self.slots is None else x[self.slots]


class TorchAttention:
    """One layer's attention: projections, norms, rotary, cache, scores, output."""

    def __init__(self, loader: Loader, attention: Attention, layer: int) -> None:
        self._attention = attention
        self._layer = layer
        self._place = loader.fused_place() if attention.rotary is not None else None
        self._qkv = make_linear(loader, (attention.q, attention.k, attention.v))
        self._out = make_linear(loader, (attention.o,))
        self._q_norm = make_norm(loader, attention.q_norm)
        self._k_norm = make_norm(loader, attention.k_norm)
        slopes = attention.alibi_slopes
        self._slopes = None if slopes is None else torch.tensor(slopes, device=loader.device)
        self._attend_one = loader.fused_attend(attention, self._slopes)

    def __call__(self, x_ND: Tensor, cache: TorchCache, step: Step, onto: Tensor | None) -> Tensor:
        """[N, D] -> [N, D], added to `onto` if given."""
        a = self._attention
        sizes = (a.heads, a.kv_heads, a.kv_heads)
        heads_NHD = self._qkv(x_ND).view(x_ND.shape[0], sum(sizes), a.head_dim)
        q, k, v = heads_NHD.split(sizes, dim=1)
        q, k = self._q_norm(q), self._k_norm(k)
        if self._attend_one is not None and step.all_rows and max(step.counts) == 1:
            out = self._attend_one(self._layer, q, k, v, cache, step.positions)
            return self._out(out.view(x_ND.shape[0], -1), onto)
        if self._place is not None:
            q = self._place(a, self._layer, q, k, v, cache, step)
        else:
            q = place(a, self._layer, q, k, v, cache, step)
        keys, values = cache.keys[self._layer], cache.values[self._layer]
        if not step.all_rows:
            keys, values = keys[step.rows], values[step.rows]
        q_BHTD = step.pad(q)
        T = q_BHTD.shape[2]
        parts = [
            self._attend(q_BHTD[:, :, t : t + QUERY_CHUNK], keys, values, step, t)
            for t in range(0, T, QUERY_CHUNK)
        ]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return self._out(step.flat(joined), onto)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, step: Step, t: int) -> Tensor:
        """Queries t.. of the padded layout, [B, H, t, D], over the positions they can see."""
        a = self._attention
        T = q.shape[2]
        first = min(step.starts) + t
        stop = max(start + min(t + T, n) for start, n in zip(step.starts, step.counts, strict=True))
        lowest = min(s + min(t, n - 1) for s, n in zip(step.starts, step.counts, strict=True))
        begin = 0 if a.window is None else max(0, lowest - a.window + 1)
        k = keys[:, :, begin:stop].to(q.dtype)
        v = values[:, :, begin:stop].to(q.dtype)
        even = step.slots is None and min(step.starts) == max(step.starts)
        narrow = a.window is not None and a.window < stop - begin
        distance = None
        if not (even and T == 1 and not narrow) or self._slopes is not None:
            j = torch.arange(begin, stop, device=q.device)
            distance = step.padded_positions[:, t : t + T, None] - j  # [B, t, S], i - j
        if a.softcap is None and self._slopes is None:
            if even and not narrow and first == begin and T > 1:
                return sdpa(q, k, v, a.scale, None, causal=True)
            hidden = None if distance is None else visible(distance, a.window)[:, None]
            return sdpa(q, k, v, a.scale, hidden, causal=False)
        return self._explicit(q, k, v, distance)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, distance: Tensor | None) -> Tensor:
        """Scores by hand in fp32, for what scaled_dot_product_attention can't express."""
        a = self._attention
        B, H, T, D = q.shape
        G = k.shape[1]
        scores = q.reshape(B, G, -1, D).float() @ k.float().transpose(-1, -2) * a.scale
        scores = scores.view(B, H, T, -1)
        if a.softcap is not None:
            scores = torch.tanh(scores / a.softcap) * a.softcap
        if distance is not None:
            if self._slopes is not None:
                scores = scores - self._slopes[:, None, None] * distance[:, None]
            scores = scores.masked_fill(~visible(distance, a.window)[:, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1).to(q.dtype)
        return (weights.view(B, G, -1, k.shape[2]) @ v).view(B, H, T, D)


def place(
    a: Attention, layer: int, q: Tensor, k: Tensor, v: Tensor, cache: TorchCache, step: Step
) -> Tensor:
    """Rotary positions on q and k, k and v into the cache; returns the turned q [N, H, D]."""
    if a.rotary is not None:
        cos, sin = cache.rotary[a.rotary]
        cos, sin = cos[step.positions, None], sin[step.positions, None]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys, values = cache.keys[layer], cache.values[layer]
    keys[step.sequences, :, step.positions] = k.to(keys.dtype)
    values[step.sequences, :, step.positions] = v.to(values.dtype)
    return q


def visible(distance: Tensor, window: int | None) -> Tensor:
    """Whether a key at i - j = distance is seen."""
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> Tensor:
    """Softmax attention, [B, H, T, D] over [B, G, S, D]; mask bool [B, 1, T, S]."""
    B, H, T, D = q.shape
    G = k.shape[1]
    if T == 1 and H != G:  # the queries of one key/value head as its rows: no copy of the cache
        grouped = functional.scaled_dot_product_attention(
            q.reshape(B, G, H // G, D), k, v, attn_mask=mask, scale=scale
        )
        return grouped.reshape(B, H, T, D)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=H != G
    )


def rotate(x_NHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first 2 * half entries; cos, sin fp32 [N, 1, half]."""
    half = cos.shape[-1]
    x = x_NHD.float()
    left, right = x[..., :half], x[..., half : 2 * half]
    turned = (left * cos - right * sin, right * cos + left * sin, x[..., 2 * half :])
    return torch.cat(turned, dim=-1).to(x_NHD.dtype)
