"""Fitting a law to points: robust loss, many starts, and what the data can and cannot tell.

The objective is that of Hoffmann et al. and Epoch's replication: the sum over the points of the
Huber loss (delta 1e-3) of log(predicted) - log(observed). It is minimized by L-BFGS from the most
promising of many starts, and the best result is polished by a trust-region least-squares step on
the same objective. Gradients are exact (complex step through the law's formula).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

from kbit.errors import KbitError

from .laws import Chinchilla, Effective, KbitLaw, Law, Points

Array = NDArray[Any]

HUBER_DELTA = 1e-3
MAX_GRID = 6000
SCOUT_STEPS = 60
_STEP = 1e-30
# Below this ratio to the largest singular value of the (column-scaled) Jacobian a direction in
# parameter space leaves every prediction unchanged: the data says nothing about it.
_NULL_RATIO = 1e-7


def huber(residual: Array, delta: float = HUBER_DELTA) -> Array:
    """Elementwise: r^2/2 within delta, delta(|r| - delta/2) outside."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def residuals(law: Law, theta: Array, points: Points) -> Array:
    """theta [..., p] -> log(predicted) - log(observed) [..., n]."""
    return law.log_loss(theta, points) - np.log(points.loss)


def linearize(law: Law, theta: Array, points: Points) -> tuple[Array, Array]:
    """Residuals [n] and their derivatives [n, p], by complex steps (exact to rounding)."""
    value = residuals(law, theta + 1j * _STEP * np.eye(len(theta)), points)
    return value[0].real, np.asarray(value.imag.T / _STEP)


def jacobian(law: Law, theta: Array, points: Points) -> Array:
    """d log(predicted) / d theta, [n, p]."""
    return linearize(law, theta, points)[1]


@dataclass(frozen=True)
class Estimate:
    """One parameter, as in the paper's formula.

    status: 'identified'; 'weak' where two standard errors cover a factor of e^2 of a positive
    constant or zero for an exponent; 'unidentified' where changing it, together with `tied_to`,
    changes no prediction, or where the search ended at its bound. low, high: 95% bootstrap
    interval (nan without a bootstrap).
    """

    name: str
    value: float
    stderr: float
    status: str
    tied_to: tuple[str, ...] = ()
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class Fit:
    """A bound law and the parameter vector that fits best."""

    law: Law
    theta: Array
    objective: float
    n: int
    median_error: float  # median |log predicted - log observed|
    log_likelihood: float
    estimates: tuple[Estimate, ...]

    @property
    def p(self) -> int:
        """Number of fitted numbers, those taken from elsewhere in the data included."""
        return len(self.theta) + self.law.extra_parameters()

    @property
    def aic(self) -> float:
        """Akaike's criterion under Laplace noise on the log loss: the Huber loss with a delta far
        below the residuals is an absolute loss, whose likelihood that is."""
        return 2 * self.p - 2 * self.log_likelihood

    def __getitem__(self, name: str) -> float:
        for estimate in self.estimates:
            if estimate.name == name:
                return estimate.value
        raise KeyError(name)

    def predict(self, points: Points) -> Array:
        """Predicted loss [n], in the unit of the points."""
        return np.exp(self.law.log_loss(self.theta, points))


def _starts(law: Law, seed: int, jitter: int) -> Array:
    grids = [parameter.starts for parameter in law.parameters()]
    size = int(np.prod([len(grid) for grid in grids], dtype=np.float64))
    rng = np.random.default_rng(seed)
    if size <= MAX_GRID:
        grid = np.array(list(itertools.product(*grids)), dtype=np.float64)
    else:
        grid = np.stack([rng.choice(g, MAX_GRID) for g in grids], axis=1)
    noise = rng.normal(scale=0.3, size=(jitter, len(grids)))
    return np.concatenate([grid, grid[rng.integers(len(grid), size=jitter)] + noise])


def _objective(law: Law, theta: Array, points: Points, delta: float) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        value = huber(residuals(law, theta, points), delta).sum(axis=-1)
    return np.where(np.isfinite(value), value, np.inf)


def _polish(law: Law, theta: Array, points: Points, delta: float) -> Array:
    # in units of delta, so that the tolerances (one of which is absolute) mean something
    def value(t: Array) -> Array:
        return residuals(law, t, points) / delta

    def slope(t: Array) -> Array:
        return jacobian(law, t, points) / delta

    result = least_squares(
        value,
        theta,
        jac=slope,
        loss="huber",
        f_scale=1.0,
        x_scale="jac",
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
        max_nfev=400,
    )
    return np.asarray(result.x)


def _bounds(law: Law) -> Array:
    """[p, 2]: far beyond what can be meant; keeps exponents that the data does not know from
    running away."""
    widest = [5.0 if p.name.startswith("gamma_") else 60.0 for p in law.parameters()]
    return np.array([[-w, w] for w in widest])


def _lbfgs(
    law: Law,
    theta: Array,
    points: Points,
    delta: float,
    *,
    steps: int = 300,
    ftol: float = 1e-15,
    near: bool = False,
) -> Array:
    """near: theta is close to the optimum. Each parameter is then measured by its effect on the
    predictions there; else one with a small effect (the degradation at 8 bits, say) would not move
    before the others have ended the search. Far away the effects say nothing yet."""
    scale = np.ones(len(theta))
    if near:
        effect = np.linalg.norm(jacobian(law, theta, points), axis=0)
        usable = np.isfinite(effect) & (effect > 1e-9 * np.nanmax(effect, initial=0.0))
        scale = np.where(usable, effect, 1.0)

    # In units of delta^2 the objective is of the order of n, which L-BFGS' tolerances expect.
    def value_and_gradient(scaled: Array) -> tuple[float, Array]:
        r, slope = linearize(law, scaled / scale, points)
        gradient = slope.T @ (np.clip(r, -delta, delta) / delta**2)
        return float(huber(r, delta).sum() / delta**2), gradient / scale

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = minimize(
            value_and_gradient,
            theta * scale,
            jac=True,
            method="L-BFGS-B",
            bounds=_bounds(law) * scale[:, None],
            options={"maxiter": steps, "ftol": ftol, "gtol": 1e-9},
        )
    return np.asarray(found.x / scale)


def optimum(
    law: Law,
    points: Points,
    *,
    delta: float = HUBER_DELTA,
    keep: int = 8,
    jitter: int = 16,
    seed: int = 0,
) -> Array:
    """The parameter vector [p] with the smallest objective found.

    law has to be bound to the points. keep: L-BFGS runs, from the best of the start grid.
    """
    starts = _starts(law, seed, jitter)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        order = np.argsort(
            np.concatenate([_objective(law, part, points, delta) for part in _parts(starts)])
        )
    # All of them a short way, the three best to the end.
    scouts = [_lbfgs(law, starts[i], points, delta, steps=SCOUT_STEPS) for i in order[:keep]]
    scouts.sort(key=lambda theta: float(_objective(law, theta, points, delta)))
    best, best_value = scouts[0], np.inf
    for theta in scouts[:3]:
        found = _lbfgs(law, theta, points, delta)
        value = float(_objective(law, found, points, delta))
        if value < best_value:
            best, best_value = found, value
        if best_value < 1e-6 * delta**2:  # residuals of noise-free data: nothing left to find
            break
    if not np.isfinite(best_value):
        raise KbitError(f"law {law.name!r}: no start gives a finite prediction for these points")
    polished = _polish(law, best, points, delta)
    inside = bool((np.abs(polished) <= _bounds(law)[:, 1]).all())
    return polished if inside and _objective(law, polished, points, delta) <= best_value else best


def _parts(starts: Array) -> list[Array]:
    return np.array_split(starts, max(1, len(starts) // 512))


def _estimates(law: Law, theta: Array, points: Points) -> tuple[Estimate, ...]:
    """Values with Gauss-Newton standard errors, and which of them the data can tell."""
    parameters = law.parameters()
    j = jacobian(law, theta, points)
    scale = np.linalg.norm(j, axis=0)
    dead = scale <= 1e-12 * max(float(scale.max()), 1e-300)
    scale = np.where(dead, 1.0, scale)
    _, s, vt = np.linalg.svd(j / scale, full_matrices=True)
    s = np.concatenate([s, np.zeros(len(theta) - len(s))])
    null = s <= _NULL_RATIO * max(float(s[0]), 1e-300)
    loading = np.abs(vt[null]) > 1e-3
    r = residuals(law, theta, points)
    # 1.4826 MAD estimates the standard deviation without following the outliers
    noise = max(1.4826 * float(np.median(np.abs(r))), 1e-12)
    inverse = np.where(null, 0.0, 1.0 / np.where(null, 1.0, s))
    stderr = noise * np.linalg.norm(vt.T * inverse, axis=1) / scale
    names = [parameter.natural_name for parameter in parameters]
    bounds = _bounds(law)
    out = []
    for i, parameter in enumerate(parameters):
        value = parameter.natural(theta[i])
        positive = parameter.name.startswith("log_")
        error = float(stderr[i] * (value if positive else 1.0))
        partners: set[str] = set()
        for row in loading:
            if row[i]:
                partners |= {names[m] for m in np.flatnonzero(row) if m != i}
        if partners or dead[i] or abs(theta[i]) > 0.999 * bounds[i, 1]:
            status, error = "unidentified", float("inf")
        elif (positive and stderr[i] > 1.0) or (not positive and 2 * stderr[i] > abs(theta[i])):
            status = "weak"
        else:
            status = "identified"
        out.append(Estimate(names[i], value, error, status, tuple(sorted(partners))))
    return tuple(out)


def fit(
    law: Law,
    points: Points,
    *,
    delta: float = HUBER_DELTA,
    keep: int = 8,
    jitter: int = 16,
    seed: int = 0,
) -> Fit:
    """The law fitted to the points. KbitError if there are fewer points than parameters."""
    law = law.bind(points)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return _fit(law, points, delta, keep, jitter, seed)


def _fit(law: Law, points: Points, delta: float, keep: int, jitter: int, seed: int) -> Fit:
    p = len(law.parameters())
    if len(points) < p:
        raise KbitError(
            f"law {law.name!r} has {p} parameters and the study only {len(points)} usable cells; "
            "add models or widths, or fit a smaller law with --laws"
        )
    theta = optimum(law, points, delta=delta, keep=keep, jitter=jitter, seed=seed)
    size = np.abs(residuals(law, theta, points))
    spread = max(float(size.mean()), 1e-15)
    return Fit(
        law=law,
        theta=theta,
        objective=float(huber(size, delta).sum()),
        n=len(points),
        median_error=float(np.median(size)),
        log_likelihood=-len(points) * (np.log(2 * spread) + 1),
        estimates=_estimates(law, theta, points),
    )


def fit_kbit(law: KbitLaw, points: Points, base: Fit | None = None, **options: Any) -> Fit:
    """`fit` for a law of the degradation; `effective` takes A and alpha from `base`."""
    if isinstance(law, Effective):
        if base is None:
            raise KbitError(
                "the law 'effective' needs the base curve of the unquantized models; the study has "
                "too few of them"
            )
        law = law.with_base(base.theta)
    return fit(law, points, **options)


def base_curve(points: Points, *, delta: float = HUBER_DELTA, seed: int = 0) -> Fit:
    """E + A/N^alpha (+ B/D^beta where D varies) through unquantized models.

    KbitError if there are fewer distinct models than parameters.
    """
    varies = bool(np.all(np.isfinite(points.tokens)) and len(np.unique(points.tokens)) > 1)
    return fit(Chinchilla(data=varies), points, delta=delta, seed=seed)


Resample = Callable[[np.random.Generator], Points]


def bootstrap(
    fitted: Fit,
    resample: Resample,
    *,
    replicates: int = 200,
    delta: float = HUBER_DELTA,
    seed: int = 42,
) -> Array:
    """Parameter vectors [replicates, p] of fits to resampled points, each started at the fit."""
    rng = np.random.default_rng(seed)
    out = np.empty((replicates, len(fitted.theta)))
    for row in range(replicates):
        points = resample(rng)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            # no search: the optimum of a resample lies near that of all data, and an interval
            # needs it to a few digits
            out[row] = _lbfgs(
                fitted.law, fitted.theta, points, delta, steps=100, ftol=1e-8, near=True
            )
    return out


def with_intervals(fitted: Fit, replicates: Array, level: float = 0.95) -> Fit:
    """The fit with percentile intervals and bootstrap standard errors from `replicates` [r, p].

    An identified parameter whose interval is wide becomes weak, by the same rule as in `Estimate`.
    """
    tail = (1 - level) / 2
    estimates = []
    for i, (parameter, old) in enumerate(
        zip(fitted.law.parameters(), fitted.estimates, strict=True)
    ):
        values = np.array([parameter.natural(v) for v in replicates[:, i]])
        low, high = np.quantile(values, [tail, 1 - tail])
        positive = parameter.name.startswith("log_")
        wide = high > np.e**4 * max(low, 1e-300) if positive else low <= 0 <= high
        status = "weak" if old.status == "identified" and wide else old.status
        estimates.append(
            Estimate(
                old.name,
                old.value,
                old.stderr if old.status == "unidentified" else float(values.std(ddof=1)),
                status,
                old.tied_to,
                float(low),
                float(high),
            )
        )
    return Fit(
        fitted.law,
        fitted.theta,
        fitted.objective,
        fitted.n,
        fitted.median_error,
        fitted.log_likelihood,
        tuple(estimates),
    )
