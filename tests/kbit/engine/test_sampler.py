"""Sampling against transformers' logits processors, and independence of the batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kbit.engine.sampler import Sampler, Sampling, _drawn, candidates
from kbit.errors import KbitError

V = 700  # more than the sampler's first candidates


def logits_of(seed: int, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(V) * spread).astype(np.float32)


def theirs(logits: np.ndarray, options: Sampling) -> np.ndarray:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(options.temperature))])
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        warpers.append(MinPLogitsWarper(options.min_p))
    scores = warpers(None, torch.from_numpy(logits).double()[None])
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 40, V, V + 5])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.3, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_distribution_as_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for seed, spread in ((0, 3.0), (1, 0.1)):  # 0.1: nearly flat, so the nucleus is wide
        logits = logits_of(seed, spread)
        ids, weights = candidates(logits, options)
        full = np.zeros(V)
        full[ids] = weights / weights.sum()
        np.testing.assert_allclose(full, theirs(logits, options), atol=1e-9)


def test_ties_at_top_k_stay() -> None:
    logits = np.asarray([1, 3, 2, 2, 0], dtype=np.float32)
    ids, _ = candidates(logits, Sampling(temperature=1, top_k=2))
    assert sorted(ids.tolist()) == [1, 2, 3]


@given(penalty=st.floats(0.5, 2.0), prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=30))
def test_repetition_penalty_and_bias_as_transformers(penalty: float, prompt: list[int]) -> None:
    logits = logits_of(2)
    bias = {3: -2.5, prompt[0]: 1.5}
    sampler = Sampler(Sampling(repetition_penalty=penalty, logit_bias=bias), seed=0, prompt=prompt)
    scores = torch.from_numpy(logits)[None]
    ids = torch.tensor([prompt])
    scores = SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()])(ids, scores)
    scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    np.testing.assert_allclose(sampler.penalized(logits), scores[0].numpy(), rtol=1e-6)


def test_presence_and_frequency_count_only_the_answer() -> None:
    options = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(options, seed=0, prompt=[7])
    logits = np.zeros(V, dtype=np.float32)
    logits[5] = 2.0
    chosen = [sampler.choose(logits).token for _ in range(3)]
    assert chosen == [5, 5, 5]
    expected = np.zeros(V, dtype=np.float32)
    expected[5] = 2.0 - 0.5 - 3 * 0.25
    np.testing.assert_allclose(sampler.penalized(logits), expected)
    assert logits[5] == 2.0  # the caller's array is untouched


def test_draws_follow_the_distribution() -> None:
    options = Sampling(temperature=0.8, top_p=0.9)
    logits = logits_of(3)
    ids, weights = candidates(logits, options)
    p = weights / weights.sum()
    sampler = Sampler(options, seed=11)
    draws = 4000
    counts = np.bincount([sampler.choose(logits).token for _ in range(draws)], minlength=V)
    assert set(np.flatnonzero(counts)) <= set(ids.tolist())
    # A fixed seed: 5 sigma of a binomial for every token.
    sigma = np.sqrt(draws * p * (1 - p))
    assert np.all(np.abs(counts[ids] - draws * p) < 5 * sigma + 1)


@given(
    zeros=st.sets(st.integers(0, V - 1), max_size=V - 1),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_draw_is_where_the_running_sum_passes_it(zeros: set[int], uniform: float) -> None:
    weights = np.random.default_rng(5).random(V) ** 8
    weights[list(zeros)] = 0
    sums = np.cumsum(weights)
    place = _drawn(weights, uniform)
    assert weights[place] > 0
    slack = 1e-12 * sums[-1]
    assert sums[place] - weights[place] - slack <= uniform * sums[-1] <= sums[place] + slack


def test_seeds_and_samples_differ_and_repeat() -> None:
    def draws(seed: int, sample: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0), seed=seed, sample=sample)
        return [sampler.choose(logits_of(i)).token for i in range(12)]

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(s, n)) for s in (1, 2) for n in (0, 1)}) == 4


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler(Sampling(), seed=0).choose(np.zeros(V, dtype=np.float32)).token == 0


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(4)
    options = Sampling(logit_bias={9: 100.0})
    choice = Sampler(options, seed=0).choose(logits, logprobs=3)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    assert choice.token == 9
    assert choice.logprob == pytest.approx(float(expected[9]), abs=1e-9)
    values, ids = torch.topk(expected, 3)
    assert [t for t, _ in choice.top] == ids.tolist()
    np.testing.assert_allclose([v for _, v in choice.top], values.numpy(), atol=1e-9)
    assert Sampler(options, seed=0).choose(logits, logprobs=0).top == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"seed": -1},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {1: math.nan}},
    ],
)
def test_refusals(wrong: dict[str, object]) -> None:
    with pytest.raises(KbitError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_refuses_what_only_the_logits_show() -> None:
    with pytest.raises(KbitError, match="vocabulary has 700"):
        Sampler(Sampling(logit_bias={V: 1.0}), seed=0).choose(logits_of(0))
    broken = logits_of(0)
    broken[17] = np.nan
    with pytest.raises(KbitError, match="nan at token 17"):
        Sampler(Sampling(), seed=0).choose(broken)
