"""What a study says: laws compared, the best width per byte, what a data type is worth in bits.

Pure functions over frames. Intervals are percentiles of a bootstrap that draws documents (the same
for all cells, so that differences stay paired) and, for the laws, models as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.errors import KbitError

from .fit import Fit, Resample, base_curve, bootstrap, fit_kbit, with_intervals
from .frame import UNQUANTIZED, Frame, Target
from .laws import KBIT_LAWS, KbitLaw, Points

Array = NDArray[Any]
MIN_MODELS = 3
MOST_DRAWS = 200  # until one has all it needs


@dataclass(frozen=True)
class LawResult:
    """One law on one frame.

    held_out_log: median |log(predicted / observed degradation)| on the held-out largest model;
    held_out_nats: median |predicted - observed loss| there (nats per byte; per token for the
    divergence). nan if the law could not be fitted without that model, and why stands in `note`.
    """

    name: str
    label: str
    title: str
    fit: Fit | None
    held_out_log: float = float("nan")
    held_out_nats: float = float("nan")
    note: str = ""

    @property
    def full_name(self) -> str:
        """`H2 kumar`."""
        return self.name if self.label == self.name else f"{self.label} {self.name}"


@dataclass(frozen=True)
class LawStudy:
    """All laws on the same points."""

    metric: str
    target: Target
    groups: tuple[str, ...]
    points: Points
    base: Fit | None
    held_out: str
    results: tuple[LawResult, ...]

    @property
    def best_held_out(self) -> LawResult | None:
        known = [r for r in self.results if np.isfinite(r.held_out_log)]
        return min(known, key=lambda r: r.held_out_log) if known else None

    @property
    def best_aic(self) -> LawResult | None:
        known = [r for r in self.results if r.fit is not None]
        return min(known, key=lambda r: r.fit.aic if r.fit else np.inf) if known else None


def compare_laws(
    frame: Frame,
    laws: dict[str, KbitLaw],
    *,
    groups: Sequence[str] = (),
    target: Target = "loss",
    replicates: int = 100,
    seed: int = 42,
) -> LawStudy:
    """Fits every law to the quantized cells of `groups` (default: all), once to all models with
    bootstrap intervals and once without the largest model, which it then predicts."""
    chosen = frame.select(
        [
            q and (not groups or g in groups)
            for q, g in zip(frame.quantized, frame.groups, strict=True)
        ]
    )
    if not len(chosen):
        known = ", ".join(sorted(set(frame.groups) - {UNQUANTIZED}))
        raise KbitError(f"no cells of {', '.join(groups) or 'any group'}; the study has: {known}")
    plain = frame.select(~frame.quantized)
    return study_laws(
        chosen.points(target),
        plain.points("loss"),
        laws,
        metric=frame.metric,
        target=target,
        resample=Resampler(chosen, target),
        replicates=replicates,
        seed=seed,
    )


def study_laws(
    points: Points,
    unquantized: Points,
    laws: dict[str, KbitLaw],
    *,
    metric: str,
    target: Target,
    resample: Resample,
    replicates: int,
    seed: int,
) -> LawStudy:
    """`compare_laws` on points: quantized ones, and one point for each unquantized model.

    The largest model (by N; of those, the one trained on most tokens) is held out together with all
    checkpoints of its size.
    """
    largest = points.params == points.params.max()
    base = _base(unquantized)
    smaller = unquantized.select(unquantized.params < points.params.max())
    base_smaller = _base(smaller) if len(smaller) else None
    results = []
    for name, law in laws.items():
        entry = KBIT_LAWS[name]
        try:
            fitted = fit_kbit(law, points, base)
            if replicates:
                draws = bootstrap(fitted, resample, replicates=replicates, seed=seed)
                fitted = with_intervals(fitted, draws)
        except KbitError as error:
            results.append(LawResult(name, entry.label, law.title, None, note=str(error)))
            continue
        log_error = nats = float("nan")
        note = "one size only: there is none to hold out"
        if not largest.all():
            try:
                without = fit_kbit(law, points.select(~largest), base_smaller)
                unseen = points.select(largest)
                log_error, nats = held_out_errors(without.predict(unseen), unseen)
                note = ""
            except KbitError as error:
                note = str(error)
        results.append(LawResult(name, entry.label, law.title, fitted, log_error, nats, note))
    return LawStudy(
        metric,
        target,
        points.groups,
        points,
        base,
        ", ".join(dict.fromkeys(points.models[m] for m in points.model[largest])),
        tuple(results),
    )


def _base(points: Points) -> Fit | None:
    try:
        return base_curve(points)
    except KbitError:
        return None


def held_out_errors(predicted: Array, unseen: Points) -> tuple[float, float]:
    """(median |log(predicted / observed degradation)|, median |predicted - observed|); the first
    over points whose observed degradation is positive."""
    delta, truth = predicted - unseen.base, unseen.loss - unseen.base
    known = (truth > 0) & (delta > 0)
    log_error = np.abs(np.log(delta[known] / truth[known])) if known.any() else np.array([np.nan])
    return float(np.median(log_error)), float(np.median(np.abs(predicted - unseen.loss)))


class Resampler:
    """Draws documents and models with replacement."""

    def __init__(self, frame: Frame, target: Target) -> None:
        self._frame, self._target = frame, target

    def __call__(self, rng: np.random.Generator) -> Points:
        documents = self._frame.tokens.shape[1]
        weights = rng.multinomial(documents, np.full(documents, 1 / documents)).astype(float)
        points = self._frame.points(self._target, weights)
        return points.select(rows_of(points, draw_models(points, rng)))


def draw_models(points: Points, rng: np.random.Generator) -> list[str]:
    """The models of training runs drawn with replacement: checkpoints of one run are no independent
    models, so they are drawn together.

    A draw is repeated if a law could not be fitted to it: with fewer sizes than `MIN_MODELS` (or
    all, if there are fewer), no difference in tokens where there is one, or an empty cell of a
    law's table.
    """
    runs = points.runs or points.models
    names = tuple(dict.fromkeys(runs))
    members = {name: [m for m, run in zip(points.models, runs, strict=True) if run == name]
               for name in names}  # fmt: skip
    for _ in range(MOST_DRAWS):
        drawn = [m for i in rng.integers(len(names), size=len(names)) for m in members[names[i]]]
        if _enough(points.select(rows_of(points, drawn)), points):
            break
    return drawn


def rows_of(points: Points, models: Sequence[str]) -> Array:
    """Indices of the observations of these models, as often as they are named."""
    known = [points.models.index(m) for m in models if m in points.models]
    return np.concatenate([np.flatnonzero(points.model == m) for m in known])


def _enough(drawn: Points, points: Points) -> bool:
    sizes, tokens = (len(np.unique(a)) for a in (drawn.params, drawn.tokens))
    return (
        sizes >= min(MIN_MODELS, len(np.unique(points.params)))
        and tokens >= min(2, len(np.unique(points.tokens)))
        and _cells(drawn) == _cells(points)
    )


def _cells(points: Points) -> set[tuple[float, int]]:
    return set(zip(points.bits.tolist(), points.group.tolist(), strict=True))


@dataclass(frozen=True)
class BestWidth:
    """At one number of total bits: the width with the lowest loss among those whose curve reaches
    it, and how often each won in the bootstrap."""

    total_bits: float
    best: int
    share: dict[int, float]
    loss: dict[int, float]


def _curves(frame: Frame, weights: Array | None) -> dict[int, tuple[Array, Array]]:
    """Width -> (log total bits ascending, loss)."""
    loss = frame.loss(weights)
    found = {}
    for k in sorted(set(frame.widths.tolist())):
        rows = np.flatnonzero(frame.widths == k)
        rows = rows[np.argsort(frame.total_bits[rows])]
        found[k] = np.log(frame.total_bits[rows]), loss[rows]
    return found


def best_widths(
    frame: Frame, group: str, *, steps: int = 25, replicates: int = 400, seed: int = 42
) -> list[BestWidth]:
    """Which width is best for a number of bytes; losses between two sizes are interpolated linearly
    in log bits. Only where the next lower and the next higher width reach that size too: past the
    largest model's size at a width it is no candidate, and a higher one would win by default."""
    chosen = frame.select([g in (group, UNQUANTIZED) for g in frame.groups])
    curves = _curves(chosen, None)
    ladder = sorted(curves)
    ends = sorted((x[0], x[-1]) for x, _ in curves.values() if len(x) > 1)
    if len(ends) < 2:
        return []
    low, high = ends[1][0], sorted(e[1] for e in ends)[-2]
    if low >= high:
        return []
    rng = np.random.default_rng(seed)
    documents = chosen.tokens.shape[1]
    draws = [
        _curves(chosen, rng.multinomial(documents, np.full(documents, 1 / documents)).astype(float))
        for _ in range(replicates)
    ]

    def at(curves: dict[int, tuple[Array, Array]], x: float) -> dict[int, float]:
        return {
            k: float(np.interp(x, bits, loss))
            for k, (bits, loss) in curves.items()
            if bits[0] <= x <= bits[-1]
        }

    found = []
    for x in np.linspace(low, high, steps):
        here = at(curves, float(x))
        best = min(here, key=lambda k: here[k])
        place = ladder.index(best)
        if not set(ladder[max(0, place - 1) : place + 2]) <= set(here):
            continue
        wins: dict[int, int] = dict.fromkeys(here, 0)
        for draw in draws:
            drawn = at(draw, float(x))
            wins[min(drawn, key=lambda k: drawn[k])] += 1
        share = {k: n / max(1, replicates) for k, n in wins.items()}
        found.append(BestWidth(float(np.exp(x)), best, share, here))
    return found


@dataclass(frozen=True)
class Worth:
    """What a group saves against a reference group at equal divergence, in measured bits per
    parameter (positive: fewer bits for the same divergence), at nominal width k."""

    group: str
    bits: int
    saved: float
    low: float
    high: float
    models: int


def worth_in_bits(
    frame: Frame, group: str, reference: str, *, replicates: int = 200, seed: int = 42
) -> list[Worth]:
    """For every width: the reference's bits (interpolated in log divergence) at this group's
    divergence, less this group's own, averaged over models. Bootstrap over documents and models."""
    models = tuple(dict.fromkeys(r.model for r in frame.records))
    cells = {
        (r.model, g, int(k)): i
        for i, (r, g, k) in enumerate(zip(frame.records, frame.groups, frame.widths, strict=True))
    }
    widths = sorted({k for m, g, k in cells if g == group})
    rng = np.random.default_rng(seed)
    documents = frame.tokens.shape[1]
    uniform = np.full(documents, 1 / documents)
    weights = [
        None,
        *(rng.multinomial(documents, uniform).astype(float) for _ in range(replicates)),
    ]
    saved = np.full((len(weights), len(models), len(widths)), np.nan)
    for row, w in enumerate(weights):
        with np.errstate(divide="ignore"):
            log_kl = np.log(frame.divergence(w))
        for m, model in enumerate(models):
            line = [
                cells[model, reference, k] for k in range(2, 9) if (model, reference, k) in cells
            ]
            if len(line) < 2:
                continue
            # ascending in divergence for np.interp; more bits, less divergence
            order = np.argsort(log_kl[line])
            x, y = log_kl[line][order], frame.bits_per_param[line][order]
            for c, k in enumerate(widths):
                i = cells.get((model, group, k))
                if i is not None and x[0] <= log_kl[i] <= x[-1]:
                    saved[row, m, c] = np.interp(log_kl[i], x, y) - frame.bits_per_param[i]
    found = []
    for c, k in enumerate(widths):
        known = np.flatnonzero(np.isfinite(saved[0, :, c]))
        if not len(known):
            continue
        draws = [
            np.nanmean(values)
            for row in range(1, len(weights))
            if np.isfinite(values := saved[row, rng.choice(known, len(known)), c]).any()
        ]
        low, high = np.quantile(draws, [0.025, 0.975]) if draws else (np.nan, np.nan)
        found.append(
            Worth(group, k, float(saved[0, known, c].mean()), float(low), float(high), len(known))
        )
    return found


def pareto(total_bits: Array, loss: Array) -> Array:
    """Indices of cells that no other beats in both bits and loss, ascending in bits."""
    order = np.lexsort((loss, total_bits))
    front, best = [], np.inf
    for i in order:
        if loss[i] < best:
            front.append(i)
            best = loss[i]
    return np.array(front, dtype=np.int64)
