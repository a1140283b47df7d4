"""What the laws say about models that the study does not have: the best size and width for an
amount of memory, by the curve through the unquantized models and the law of the degradation.

An extrapolation, and reported as one: by how much, with an interval from refits to models drawn
with replacement, in which the same draw gives both curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .analysis import LawStudy, draw_models, rows_of
from .fit import Fit, bootstrap
from .laws import Points

Array = NDArray[Any]
SCALE_BITS = 0.25  # of a 16-bit scale for 64 weights


@dataclass(frozen=True)
class Size:
    """A width, the parameters that fit at it, and the loss in nats per byte with its 95% interval.

    behind: loss above the best width's, with its interval (both widths in the same draw).
    """

    bits: int
    parameters: float
    loss: float
    low: float
    high: float
    behind: float
    behind_low: float
    behind_high: float


@dataclass(frozen=True)
class Beyond:
    """Sizes by loss, the law that was used, how many times the largest model they are."""

    sizes: tuple[Size, ...]
    law: str
    times: float
    tokens: float


def _cache_bytes(parameters: float, context: int) -> float:
    """16-bit keys and values, for 12 L D^2 parameters, D = 32 L, without grouped queries."""
    width = (32 * parameters / 12) ** (1 / 3)
    return 2.0 * 2 * (width / 32) * width * context


def parameters_that_fit(room: float, bits: float, context: int) -> float:
    """Parameters whose weights and cache fill the room; 0 if none do."""
    low, high = 0.0, max(0.0, 8 * room / bits)
    for _ in range(60):
        middle = (low + high) / 2
        fits = middle * bits / 8 + _cache_bytes(middle, context) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low


def beyond(
    study: LawStudy,
    unquantized: Points,
    room: float,
    context: int,
    *,
    replicates: int = 60,
    seed: int = 42,
) -> Beyond | None:
    """The best sizes for `room` bytes of weights and cache, or None if the base curve or every law
    could not be fitted, or nothing larger than the study's models fits.

    study: laws of the loss for one group of cells. Embeddings are not counted apart.
    """
    best, base = study.best_held_out, study.base
    largest = float(study.points.params.max())
    if best is None or best.fit is None or base is None:
        return None
    widths = study.points.widths
    sizes = np.array([parameters_that_fit(room, k + SCALE_BITS, context) for k in widths])
    if not (sizes > largest).all():
        return None
    tokens = float(np.nanmax(study.points.tokens)) if study.points.tokens.size else float("nan")
    curves = [_losses(base, best.fit, study.points, sizes, widths, tokens)]
    draws = _draws(base, best.fit, unquantized, study.points, replicates, seed)
    curves += [_losses(b, f, study.points, sizes, widths, tokens) for b, f in draws]
    table = np.array([c for c in curves if np.isfinite(c).all()])
    order = np.argsort(table[0])
    above = table - table[:, order[:1]]
    low, high = np.quantile(table, [0.025, 0.975], axis=0)
    behind_low, behind_high = np.quantile(above, [0.025, 0.975], axis=0)
    found = tuple(
        Size(
            int(widths[i]), float(sizes[i]), float(table[0, i]), float(low[i]), float(high[i]),
            float(above[0, i]), float(behind_low[i]), float(behind_high[i]),
        )
        for i in order
    )  # fmt: skip
    return Beyond(found, best.full_name, float(sizes.max() / largest), tokens)


def _losses(base: Fit, law: Fit, like: Points, sizes: Array, widths: Array, tokens: float) -> Array:
    n = len(sizes)
    points = Points(
        sizes, np.full(n, tokens), widths.astype(float), np.zeros(n, np.int64), np.ones(n),
        np.zeros(n), np.zeros(n, np.int64), like.groups, ("",), (), like.n_unit, like.d_unit,
    )  # fmt: skip
    return law.predict(replace(points, base=base.predict(points)))


def _draws(
    base: Fit, law: Fit, unquantized: Points, points: Points, replicates: int, seed: int
) -> list[tuple[Fit, Fit]]:
    """Both curves refitted to the same models, drawn with replacement."""

    def drawn(of: Points, models: Sequence[str], unused: np.random.Generator) -> Points:
        return of.select(rows_of(of, models))

    rng = np.random.default_rng(seed)
    found: list[tuple[Fit, Fit]] = []
    for _ in range(replicates):
        models = draw_models(points, rng)
        refit = []
        for fit, of in ((base, unquantized), (law, points)):
            theta = bootstrap(fit, partial(drawn, of, models), replicates=1)[0]
            refit.append(replace(fit, theta=theta))
        found.append((refit[0], refit[1]))
    return found
