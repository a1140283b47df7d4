"""Laws and fit: a published refit, exact recovery, and honesty about what cannot be known."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kbit.errors import KbitError
from kbit_scaling.fit import base_curve, bootstrap, fit, fit_kbit, huber, jacobian, with_intervals
from kbit_scaling.laws import KBIT_LAWS, Chinchilla, Effective, Points, get_laws

SIZES = np.array([1e5, 4e5, 1.6e6, 6.4e6, 2.5e7])
TOKENS = np.array([4e6, 1.6e7, 6.4e7])
WIDTHS = np.arange(2, 9).astype(float)


def grid(groups: tuple[str, ...] = ("int",), tokens: np.ndarray = TOKENS) -> Points:
    """Every size x token count x width x group, with losses still to be filled in."""
    n, d, k, g = (
        axis.ravel()
        for axis in np.meshgrid(SIZES, tokens, WIDTHS, np.arange(len(groups)), indexing="ij")
    )
    base = 1.2 + 12.0 / n**0.25 + 200.0 / d**0.4
    size = np.searchsorted(SIZES, n)
    return Points(
        n, d, k, g.astype(np.int64), base.copy(), base, size, groups, n_unit=1e6, d_unit=1e7
    )


def synthetic(name: str, points: Points) -> tuple[Points, np.ndarray]:
    """Noise-free losses of a law with known parameters."""
    law = KBIT_LAWS[name].law
    if isinstance(law, Effective):
        law = law.with_base(np.array([np.log(0.8), np.log(1.2), 0.25]))
    law = law.bind(points)
    truth = []
    for i, parameter in enumerate(law.parameters()):
        if parameter.name.startswith("log_offset"):
            truth.append(2.0 - 0.6 * i)
        elif parameter.name.startswith("logit_eff"):
            truth.append(-2.0 + 0.7 * i)
        elif parameter.name.startswith("log_C["):
            truth.append(1.0 - 0.7 * i)
        elif parameter.name.startswith(("gamma_N", "gamma_D")):
            truth.append(0.2 + 0.03 * i)
        else:
            known = {"log_C": 2.0, "log_gamma": -0.4 if name == "kumar" else 1.3}
            truth.append(known.get(parameter.name, 0.35))
    theta = np.array(truth)
    return replace(points, loss=np.exp(law.log_loss(theta, points))), theta


@pytest.mark.parametrize("name", list(KBIT_LAWS))
@pytest.mark.parametrize("groups", [("int",), ("int", "nf")])
def test_law_recovers_its_own_parameters_from_noise_free_data(
    name: str, groups: tuple[str, ...]
) -> None:
    points, truth = synthetic(name, grid(groups))
    law = KBIT_LAWS[name].law
    if isinstance(law, Effective):
        law = law.with_base(np.array([np.log(0.8), np.log(1.2), 0.25]))
    fitted = fit(law, points)
    np.testing.assert_allclose(fitted.theta, truth, rtol=1e-5, atol=1e-6)
    assert fitted.objective < 1e-12
    assert {e.status for e in fitted.estimates} == {"identified"}


@pytest.mark.parametrize("name", list(KBIT_LAWS))
def test_law_describes_a_divergence_when_the_base_is_zero(name: str) -> None:
    points = replace(grid(), base=np.zeros(len(grid())))
    points, _ = synthetic(name, points)
    law = KBIT_LAWS[name].law
    if isinstance(law, Effective):
        law = law.with_base(np.array([np.log(0.8), np.log(1.2), 0.25]))
    assert fit(law, points).median_error < 1e-8


def test_base_curve_is_recovered_and_feeds_effective_parameters() -> None:
    points = grid(tokens=TOKENS[:1])
    unquantized = points.select(points.bits == 8)
    curve = base_curve(unquantized)
    assert curve["alpha"] == pytest.approx(0.25, rel=1e-4)
    assert curve["A"] == pytest.approx(12.0 / 1e6**0.25, rel=1e-4)
    with pytest.raises(KbitError, match="base curve"):
        fit_kbit(Effective(), points, None)
    quantized, truth = synthetic("effective", points)
    np.testing.assert_allclose(
        fit_kbit(Effective(), quantized, replace_alpha(curve)).theta, truth, atol=1e-3
    )


def replace_alpha(curve):  # type: ignore[no-untyped-def]
    return replace(curve, theta=np.array([np.log(0.8), 0.0, 0.25]))


@pytest.mark.parametrize("law", [Chinchilla(), *get_laws(["kumar", "ouyang"]).values()])
def test_complex_step_agrees_with_finite_differences(law) -> None:  # type: ignore[no-untyped-def]
    points = grid(("int", "nf"))
    law = law.bind(points)
    theta = np.array([p.starts[-1] for p in law.parameters()]) + 0.1
    exact = jacobian(law, theta, points)
    for i in range(len(theta)):
        step = np.zeros(len(theta))
        step[i] = 1e-6
        low, high = law.log_loss(theta - step, points), law.log_loss(theta + step, points)
        np.testing.assert_allclose(exact[:, i], (high - low) / 2e-6, rtol=1e-5, atol=1e-8)


def test_huber_is_quadratic_inside_and_linear_outside() -> None:
    np.testing.assert_allclose(huber(np.array([5e-4, -5e-3])), [1.25e-7, 1e-3 * (5e-3 - 5e-4)])


def test_constants_of_a_term_that_does_not_vary_are_reported_as_unidentified() -> None:
    points = grid(tokens=TOKENS[:1])
    fitted = fit(Chinchilla(data=True), points.select(points.bits == 8))
    status = {e.name: e.status for e in fitted.estimates}
    assert status["B"] == status["beta"] == "unidentified"
    assert "beta" in next(e for e in fitted.estimates if e.name == "B").tied_to
    law = get_laws(["kumar"])["kumar"].bind(points)
    assert not any("gamma_D" in p.name for p in law.parameters())


def test_size_exponent_from_one_model_is_unidentified() -> None:
    points, _ = synthetic("ouyang", grid(tokens=TOKENS[:1]))
    one = points.select(points.model == 2)
    status = {e.name: e.status for e in fit(get_laws(["ouyang"])["ouyang"], one).estimates}
    assert status["gamma_N"] == "unidentified"
    assert status["gamma"] == "identified"


def test_an_outlier_does_not_move_the_fit() -> None:
    points, truth = synthetic("kumar", grid())
    loss = points.loss.copy()
    loss[40] *= 3
    fitted = fit(get_laws(["kumar"])["kumar"], replace(points, loss=loss))
    np.testing.assert_allclose(fitted.theta, truth, atol=1e-3)


def test_bootstrap_interval_covers_the_truth_and_shrinks_without_noise() -> None:
    points, truth = synthetic("kumar", grid())
    rng = np.random.default_rng(0)
    noisy = replace(points, loss=points.loss * np.exp(rng.normal(scale=0.01, size=len(points))))
    fitted = fit(get_laws(["kumar"])["kumar"], noisy)
    n = len(noisy)
    draws = bootstrap(fitted, lambda r: noisy.select(r.integers(n, size=n)), replicates=60)
    for estimate, parameter, value in zip(
        with_intervals(fitted, draws).estimates, fitted.law.parameters(), truth, strict=True
    ):
        margin = estimate.high - estimate.low
        assert estimate.low - margin < parameter.natural(value) < estimate.high + margin
        assert margin > 0


def test_too_few_points_say_which_law_and_how_many() -> None:
    points = grid().select(np.arange(3))
    with pytest.raises(KbitError, match=r"'kumar' has 4 parameters .* only 3 usable cells"):
        fit(get_laws(["kumar"])["kumar"], replace(points, tokens=np.array([1.0, 2.0, 3.0])[:3]))


def test_asking_for_a_width_outside_the_table_is_refused() -> None:
    points, _ = synthetic("offset", grid())
    fitted = fit(get_laws(["offset"])["offset"], points)
    with pytest.raises(KbitError, match="fitted widths: 2, 3, 4"):
        fitted.predict(replace(points, bits=points.bits + 0.5))


def test_unknown_law_lists_the_known_ones() -> None:
    with pytest.raises(KbitError, match="offset, effective, kumar, ouyang, free"):
        get_laws(["kummar"])


def test_epoch_refit_of_chinchilla(shared: Path) -> None:
    """245 points, the five with the highest loss left out, as in the published notebook."""
    rows = list(csv.DictReader((shared / "data/laws/chinchilla_epoch.csv").open()))
    n = np.array([float(row["Model Size"]) for row in rows])
    d = np.array([float(row["Training FLOP"]) for row in rows]) / (6 * n)
    loss = np.array([float(row["loss"]) for row in rows])
    kept = np.sort(np.argsort(loss)[:-5])
    count = len(kept)
    points = Points(
        n[kept],
        d[kept],
        np.full(count, 16.0),
        np.zeros(count, np.int64),
        loss[kept],
        np.zeros(count),
        np.arange(count),
    )
    fitted = fit(Chinchilla(), points)
    # the published objective to all its digits, and the grid fit to the precision of its optimizer
    assert fitted.objective == pytest.approx(0.00101827, abs=1e-8)
    grid_fit = {"A": 477.84, "B": 2143.86, "E": 1.81724, "alpha": 0.34731, "beta": 0.36718}
    for name, value in grid_fit.items():
        assert fitted[name] == pytest.approx(value, rel=1e-3), name
    draws = bootstrap(
        fitted, lambda rng: points.select(rng.integers(count, size=count)), replicates=40
    )
    published = {
        "A": (482.0, 124.5),
        "B": (2085.0, 1293.0),
        "E": (1.8169, 0.0257),
        "alpha": (0.3478, 0.0154),
        "beta": (0.3659, 0.0206),
    }
    for estimate in with_intervals(fitted, draws).estimates:
        value, stderr = published[estimate.name]
        assert abs(estimate.value - value) < stderr
        # B's distribution has a heavy tail, so 40 draws know its width only roughly
        assert stderr / 3 < estimate.stderr < 3 * stderr
