"""Means and quantiles over tokens, with standard errors that know that neighbours are alike.

Tokens of one window (or document) share a text, so they are not independent samples; the windows
are taken as the samples (cluster-robust), which is what a new text of the same kind would vary by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BOOTSTRAP_SAMPLES = 200


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error (None where one cluster is all there is)."""

    value: float
    stderr: float | None


def ratio(sums: np.ndarray, sizes: np.ndarray) -> Estimate:
    """sum(sums) / sum(sizes) over clusters, float64 [C] each, and its standard error.

    stderr = sqrt(C / (C - 1) sum((s_c - r n_c)^2)) / sum(n_c), the linearized ratio estimator.
    """
    used = sizes > 0
    sums, sizes = np.asarray(sums, np.float64)[used], np.asarray(sizes, np.float64)[used]
    total = float(sizes.sum())
    value = float(sums.sum()) / total
    clusters = len(sums)
    if clusters < 2:
        return Estimate(value, None)
    spread = float(((sums - value * sizes) ** 2).sum()) * clusters / (clusters - 1)
    return Estimate(value, float(np.sqrt(spread)) / total)


def quantiles(
    values: np.ndarray, clusters: np.ndarray, levels: tuple[float, ...], *, seed: int = 0
) -> list[Estimate]:
    """Quantiles of values, float64 [T]; clusters: int [T], the cluster of each value.

    A level q is the smallest value that at least a fraction q of all does not exceed (1: the
    maximum). Standard errors by resampling clusters; for the maximum it is a lower bound, since
    what was never seen can't be drawn.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    numbers, cluster_of = np.unique(clusters[order], return_inverse=True)
    found = _weighted(ordered, np.ones(len(ordered)), levels)
    if len(numbers) < 2:
        return [Estimate(float(v), None) for v in found]
    random = np.random.default_rng(seed)
    draws = np.empty((BOOTSTRAP_SAMPLES, len(levels)))
    for i in range(BOOTSTRAP_SAMPLES):
        times = random.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)))
        draws[i] = _weighted(ordered, times[cluster_of], levels)
    errors = draws.std(axis=0, ddof=1)
    return [Estimate(float(v), float(e)) for v, e in zip(found, errors, strict=True)]


def _weighted(ordered: np.ndarray, weights: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    cumulative = np.cumsum(weights)
    # The tiny allowance keeps 0.9 * 10 values at the ninth although 0.9 is no binary fraction.
    wanted = np.asarray(levels) * cumulative[-1] * (1 - 1e-12)
    return ordered[np.searchsorted(cumulative, wanted, side="left")]
