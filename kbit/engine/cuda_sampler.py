"""Choosing next tokens where the logits lie: kbit.engine.sampler's draws in torch.

With the same random number the choice is the same as there, but for rounding: probabilities are
fp64, and the tokens are added up in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kbit.engine.sampler import Draw


def choose(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """fp64 [B, 2]: the token that each draw takes, and the largest logit (NaN if any is)."""
    largest_B, token_B = logits_BV.max(1)
    if any(draw.temperature for draw in draws):
        token_B = torch.where(*_draw(logits_BV, draws), token_B)
    return torch.stack([token_B.double(), largest_B.double()], dim=1)


def _draw(logits_BV: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Where a token is drawn at all, and which."""
    V = logits_BV.shape[1]
    columns = [
        (d.temperature or 1.0, min(d.top_k, V) or V, d.top_p, d.min_p, d.uniform) for d in draws
    ]
    numbers = torch.tensor(columns, dtype=torch.float64).to(logits_BV.device)
    temperature, top_k, top_p, min_p, uniform = numbers[:, :, None].unbind(1)  # [B, 1] each
    ordered = any(d.temperature and (d.top_k or d.top_p < 1) for d in draws)
    if ordered:  # by the logits themselves, which takes half as long
        logits_BV, ids = torch.sort(logits_BV, dim=1, descending=True, stable=True)
        largest = logits_BV[:, :1]
    else:
        largest = logits_BV.amax(1, keepdim=True)
    scaled = logits_BV.double() / temperature
    p = torch.exp(scaled - largest.double() / temperature)
    if ordered:
        # ties with the last of the top k are kept
        p = torch.where(scaled >= scaled.gather(1, top_k.long() - 1), p, 0.0)
        p = p / p.sum(1, keepdim=True)
        p = torch.where((p.cumsum(1) - p < top_p) | (top_p >= 1), p, 0.0)
        p = torch.where(p >= min_p * p[:, :1], p, 0.0)
        # added up from the likeliest where top_p cuts, else in the order of the vocabulary
        by_token = torch.zeros_like(p).scatter(1, ids, p)
        sums = torch.where(top_p < 1, p, by_token).cumsum(1)
    else:
        sums = torch.where(p >= min_p, p, 0.0).cumsum(1)  # the largest is 1
    total = sums[:, -1:]
    at = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # of NaN it is V, and a place that does not exist would end the device's context
    place = torch.searchsorted(sums, at, right=True).clamp_(max=V - 1)
    drawn = place[:, 0]
    if ordered:
        drawn = torch.where(top_p < 1, ids.gather(1, place), place)[:, 0]
    return torch.tensor([d.temperature > 0 for d in draws]).to(drawn.device), drawn
