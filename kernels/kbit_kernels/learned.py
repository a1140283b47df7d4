"""Codebooks learned from a tensor: quantiles and Lloyd-Max."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SAMPLE = 1 << 22  # weights looked at for a codebook of at most 256 entries
_BINS = 1 << 14
_COARSE_BINS = 1 << 6


def quantile_midpoints(
    quantile: Callable[[NDArray[np.float64]], NDArray[np.float64]], bits: int
) -> NDArray[np.float32]:
    """Equation 6 of 2212.09720: midpoints of 2^k + 1 quantiles, and zero, divided by the largest.

    Args:
        quantile: the inverse distribution function, over probabilities in (0, 1).
        bits: width k.

    Returns:
        Ascending fp32 `[2^k]`. For a symmetric distribution zero stands in it twice.
    """
    levels = 1 << bits
    edges = quantile(np.arange(1, levels + 1) / (levels + 1))
    values = np.concatenate([(edges[:-1] + edges[1:]) / 2, [0.0]])
    peak = np.abs(values).max()
    return np.sort(values / (peak or 1.0)).astype(np.float32)


def quantile_codebook(
    normalized: NDArray[np.float32], importance: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """The quantile codebook of a tensor's block-normalized weights; see `quantile_midpoints`."""
    sample = normalized[:: max(1, normalized.size // SAMPLE)].astype(np.float64)
    return quantile_midpoints(lambda p: np.quantile(sample, p), bits)


def lloyd_max(
    points: NDArray[np.float64],
    weights: NDArray[np.float64],
    levels: NDArray[np.float64],
    *,
    keep_zero: bool = False,
    iterations: int = 300,
) -> NDArray[np.float64]:
    """Lloyd's iteration in one dimension: levels that minimize the weighted squared error.

    Args:
        points: ascending `[P]`.
        weights: non-negative `[P]`.
        levels: ascending start `[L]`.
        keep_zero: hold the level nearest to zero at exactly zero.
        iterations: at most so many steps; stops when no level moves by 1e-9 of the range.

    Returns:
        Ascending levels `[L]`.
    """
    # interpolated between the points: on a fixed grid the iteration would stick as soon as no
    # midpoint crosses a point any more
    mass, moment = np.cumsum(weights), np.cumsum(weights * points)
    total_mass, total_moment = mass[-1], moment[-1]
    mass, moment = mass - weights / 2, moment - weights * points / 2
    levels = levels.astype(np.float64).copy()
    zero = int(np.abs(levels).argmin())
    if keep_zero:
        levels[zero] = 0.0
    for _ in range(iterations):
        cuts = (levels[:-1] + levels[1:]) / 2
        cell_mass = np.diff(np.interp(cuts, points, mass), prepend=0.0, append=total_mass)
        cell_moment = np.diff(np.interp(cuts, points, moment), prepend=0.0, append=total_moment)
        moved = np.where(cell_mass > 0, cell_moment / np.maximum(cell_mass, 1e-300), levels)
        if keep_zero:
            moved[zero] = 0.0
        shift = np.abs(moved - levels).max()
        levels = np.sort(moved)
        if shift <= 1e-9 * (points[-1] - points[0]):
            break
    return levels


def lloyd_codebook(
    normalized: NDArray[np.float32], importance: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """The codebook `[2^k]` of least squared error for a tensor, zero among its entries.

    Args:
        normalized: weights divided by their block's scale, flat fp32 in [-1, 1].
        importance: squares of those scales, flat fp32, so that the error counted is the tensor's.
        bits: width k.
    """
    step = max(1, normalized.size // SAMPLE)
    weights, edges = np.histogram(
        normalized[::step],
        bins=_BINS,
        range=(-1.0, 1.0),
        weights=importance[::step].astype(np.float64),
    )
    points = (edges[:-1] + edges[1:]) / 2
    if not weights.sum() > 0:
        weights = np.ones_like(weights)
    # spaced by density^(1/3), asymptotically optimal; coarse bins, since a small tensor leaves most
    # of the fine ones empty
    density = weights.reshape(_COARSE_BINS, -1).sum(axis=1)
    share = np.concatenate([[0.0], np.cumsum(density ** (1 / 3))])
    levels = 1 << bits
    start = np.interp(
        (np.arange(levels) + 0.5) / levels, share / share[-1], np.linspace(-1, 1, share.size)
    )
    return lloyd_max(points, weights, start, keep_zero=True).astype(np.float32)
