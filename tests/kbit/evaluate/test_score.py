"""Log-likelihoods, divergences and their errors, against torch in fp64 and plain formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbit.engine.model import Model
from kbit.errors import KbitError
from kbit.evaluate import score
from kbit.evaluate.protocols import protocol, windows
from kbit.evaluate.run import by_document, part
from kbit.evaluate.score import compare_windows, kl_divergence, log_likelihood, score_windows
from kbit.evaluate.statistics import quantiles, ratio
from tests.kbit.speaker import TEXT


def logits(seed: int, spread: float, rows: int = 7, vocabulary: int = 300) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((rows, vocabulary)) * spread
    return drawn.astype(np.float32)


@pytest.mark.parametrize("spread", [0.01, 3.0, 60.0, 3000.0])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3, 1.0, 50.0])
def test_kl_as_torch_in_fp64(spread: float, noise: float) -> None:
    p = logits(0, spread)
    q = p + logits(1, noise) + np.float32(5)
    reference = torch.log_softmax(torch.from_numpy(p).double(), -1)
    other = torch.log_softmax(torch.from_numpy(q).double(), -1)
    expected = torch.nn.functional.kl_div(other, reference, log_target=True, reduction="none")
    np.testing.assert_allclose(
        kl_divergence(p, q), expected.sum(-1).clamp(min=0).numpy(), rtol=1e-9, atol=1e-12
    )


def test_kl_of_equal_rows_is_zero_and_of_small_changes_is_quadratic() -> None:
    p = logits(2, 3.0)
    assert np.all(kl_divergence(p, p) == 0)
    assert np.all(kl_divergence(p, p + np.float32(0.5)) < 1e-11)  # p + 0.5 rounds in fp32
    # KL(p, p + e) = variance of e under p / 2, to second order.
    e = logits(3, 1e-3).astype(np.float64)
    q = (p.astype(np.float64) + e).astype(np.float32)
    e = q.astype(np.float64) - p
    weight = np.exp(p.astype(np.float64))
    weight /= weight.sum(1, keepdims=True)
    variance = (weight * e**2).sum(1) - (weight * e).sum(1) ** 2
    np.testing.assert_allclose(kl_divergence(p, q), variance / 2, rtol=0.01)


def test_masked_tokens_and_broken_rows() -> None:
    p = logits(4, 2.0)
    p[:, 5] = -np.inf
    q = p + logits(5, 0.1)
    assert np.all(np.isfinite(kl_divergence(p, q)))
    likely = log_likelihood(p, np.full(7, 3))
    assert np.all(np.isfinite(likely))
    q[2, 9] = np.nan
    q[4, 9] = np.inf
    found = log_likelihood(q, np.full(7, 3))
    assert np.isnan(found[[2, 4]]).all()
    assert np.isfinite(np.delete(found, [2, 4])).all()


def test_log_likelihood_as_torch() -> None:
    x, targets = logits(6, 4.0, rows=50), np.arange(50)
    expected = torch.log_softmax(torch.from_numpy(x).double(), -1)[range(50), targets]
    np.testing.assert_allclose(log_likelihood(x, targets), expected.numpy(), rtol=1e-12)


@pytest.fixture
def cut(model: Model) -> list:
    return windows(TEXT, model.tokenizer, protocol("hf-strided", context=16, stride=6).resolved(48))


@pytest.mark.parametrize("budget", [1, 40_000, 64 << 20])
def test_slices_and_groups_do_not_change_the_sums(
    model: Model, quantized: Model, cut: list, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = [*cut[:4], cut[-1]]  # the last one is shorter
    whole = [s.log_likelihoods for s in score_windows(model.executor, cut)]
    monkeypatch.setattr(score, "LOGITS_BYTES", budget)
    sliced = list(score_windows(model.executor, cut))
    assert [s.window for s in sliced] == cut
    for a, b in zip(whole, sliced, strict=True):
        np.testing.assert_allclose(a, b.log_likelihoods, atol=2e-4)
    pairs = list(compare_windows(model.executor, quantized.executor, cut))
    for a, pair in zip(whole, pairs, strict=True):
        np.testing.assert_allclose(a, pair.reference.log_likelihoods, atol=2e-4)
        assert len(pair.kl) == len(pair.agrees) == len(a)


def test_comparison_is_of_the_two_models(model: Model, quantized: Model, cut: list) -> None:
    cache = [e.new_cache(1, 16) for e in (model.executor, quantized.executor)]
    window = cut[1]
    p = model.executor.forward([window.tokens[:-1]], cache[0], all_logits=True)[0]
    q = quantized.executor.forward([window.tokens[:-1]], cache[1], all_logits=True)[0]
    p, q = (x[window.first - 1 :] for x in (p, q))
    found = list(compare_windows(model.executor, quantized.executor, cut))[1]
    np.testing.assert_allclose(found.kl, kl_divergence(p, q), atol=1e-4)
    assert found.kl.mean() > 1e-4
    np.testing.assert_array_equal(found.agrees, p.argmax(1) == q.argmax(1))
    expected = log_likelihood(q, window.tokens[window.first :])
    np.testing.assert_allclose(found.model.log_likelihoods, expected, atol=2e-4)


def test_a_model_against_itself(model: Model) -> None:
    record = model.evaluate(TEXT, against=model, context=16).record()
    for name in ("kl_mean", "kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max"):
        assert record[name] == 0
        assert record[f"{name}_stderr"] == 0
    assert record["top1_agreement"] == 1
    assert record["log_likelihood_change"] == 0
    assert record["perplexity"] == record["reference_perplexity"]


def test_evaluation_adds_up(model: Model, quantized: Model) -> None:
    seen: list[tuple[int, int]] = []
    found = quantized.evaluate(
        TEXT, against=model, context=16, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (found.tokens, found.tokens)
    assert sum(p.tokens for p in found.parts) == found.tokens
    total = sum(p.log_likelihood for p in found.parts)
    assert found.estimates["nats_per_token"].value == pytest.approx(-total / found.tokens)
    assert by_document(found.parts)[0].log_likelihood == pytest.approx(total)
    change = total - sum(p.log_likelihood for p in found.reference_parts)
    assert found.estimates["log_likelihood_change"].value == pytest.approx(change / found.tokens)
    levels = [found.estimates[n].value for n in ("kl_median", "kl_p90", "kl_p99", "kl_max")]
    assert levels == sorted(levels)
    assert all(e.stderr is not None and e.stderr > 0 for e in found.estimates.values())
    alone = quantized.evaluate(TEXT, context=16)
    assert alone.estimates["perplexity"].value == pytest.approx(found.estimates["perplexity"].value)
    assert alone.reference_parts == []
    assert "kl_mean" not in alone.record()
    first = model.evaluate(TEXT, context=16, max_windows=2)
    assert first.parts == pytest.approx(found.reference_parts[:2])


def test_nonfinite_logits_are_counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model.executor.forward

    def broken(tokens, cache, *, all_logits=False):  # type: ignore[no-untyped-def]
        found = forward(tokens, cache, all_logits=all_logits)
        found[0] = found[0].copy()
        found[0][0, 7] = np.nan
        return found

    monkeypatch.setattr(model.executor, "forward", broken)
    found = model.evaluate(TEXT, context=16)
    assert found.nonfinite_tokens > 0
    assert found.record()["perplexity"] is None


def test_different_tokens_are_refused(model: Model, tmp_path) -> None:  # type: ignore[no-untyped-def]
    import kbit
    from tests.kbit.speaker import write_model

    other = kbit.load(
        write_model(tmp_path, context=48, add_bos=not model.tokenizer.adds_bos), backend="torch"
    )
    with pytest.raises(KbitError, match="different tokens"):
        model.evaluate(TEXT, against=other, context=16)


@given(
    sums=st.lists(st.floats(-50, 50), min_size=2, max_size=30),
    sizes=st.lists(st.integers(1, 40), min_size=30, max_size=30),
)
def test_ratio(sums: list[float], sizes: list[int]) -> None:
    s, n = np.asarray(sums), np.asarray(sizes[: len(sums)], dtype=float)
    found = ratio(s, n)
    value = s.sum() / n.sum()
    # The same in words: the standard error of the mean of the residuals, per unit of size.
    residuals = s - value * n
    expected = residuals.std(ddof=1) / np.sqrt(len(s)) / n.mean()
    assert found.value == pytest.approx(value)
    assert found.stderr == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_ratio_of_one_cluster_has_no_error() -> None:
    assert ratio(np.asarray([3.0]), np.asarray([2.0])).stderr is None


def test_errors_hold_what_they_promise() -> None:
    """Over many texts, the spread of the estimates is what one text's error says."""
    random = np.random.default_rng(0)
    means, errors, medians, median_errors = [], [], [], []
    for _ in range(150):
        level = random.standard_normal(40)  # of a window: its tokens are alike
        values = level[:, None] + random.standard_normal((40, 25))
        found = ratio(values.sum(1), np.full(40, 25.0))
        means.append(found.value)
        errors.append(found.stderr)
        median = quantiles(values.ravel(), np.repeat(np.arange(40), 25), (0.5,))[0]
        medians.append(median.value)
        median_errors.append(median.stderr)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.2)
    assert np.mean(median_errors) == pytest.approx(np.std(medians), rel=0.25)


def test_quantiles() -> None:
    values = np.random.default_rng(1).permutation(np.arange(1, 1001)).astype(float)
    levels = (0.5, 0.9, 0.99, 0.999, 1.0)
    found = quantiles(values, np.arange(1000) // 10, levels)
    assert [e.value for e in found] == [500, 900, 990, 999, 1000]
    assert all(e.stderr is not None and e.stderr >= 0 for e in found)
    assert found == quantiles(values, np.arange(1000) // 10, levels)
    assert quantiles(values, np.zeros(1000, dtype=int), (1.0,))[0].stderr is None


def test_parts_are_plain_sums(model: Model, cut: list) -> None:
    scored = list(score_windows(model.executor, cut))
    one = part(scored[0])
    assert one.tokens == cut[0].scored
    assert one.log_likelihood == pytest.approx(float(scored[0].log_likelihoods.sum()))
