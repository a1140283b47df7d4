"""Choosing the next token from its logits, in numpy.

The steps and their order are those of transformers' logits processors: logit bias, repetition
penalty, presence and frequency penalties (OpenAI's; transformers has none), then, when sampling,
temperature, top-k, top-p, min-p. Every sequence has its own random numbers, so that what it says
does not depend on which others are in its batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from kbit.errors import KbitError

# Sorting a whole vocabulary costs as long as a small model's decode step; the most likely tokens
# nearly always hold top_p of the mass, and if not, eight times as many are tried.
_FIRST_CANDIDATES = 256
_STRETCH = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults take the most likely one.

    temperature: divides the logits; 0 is greedy and makes top_k, top_p, min_p and seed moot.
    top_k: keep the k most likely tokens (0: all). top_p: keep the most likely tokens that together
    reach this probability (1: all). min_p: keep tokens at least this fraction as likely as the most
    likely (0: all). repetition_penalty: logits of tokens in prompt or output are divided by it if
    positive, multiplied if negative (1: none). presence_penalty, frequency_penalty: subtracted
    once, or times its count, from the logit of a token in the output. logit_bias: token id ->
    added to its logit. seed: None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (off) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("seed", self.seed is None or self.seed >= 0, "0 or above"),
        ):
            if not good:
                raise KbitError(f"{name} is {getattr(self, name)}, but has to be {wanted}")
        for token, bias in self.logit_bias.items():
            if token < 0 or math.isnan(bias) or bias == math.inf:
                raise KbitError(
                    f"logit_bias {token}={bias}: wants a token id and a number below infinity"
                )


@dataclass(frozen=True)
class Choice:
    """A chosen token. logprob, top: natural log-probabilities under the model's own distribution,
    before any penalty or temperature; only filled where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Draw:
    """One choice that needs nothing but logits, for an executor that samples where they lie: the
    options of Sampling, and where between 0 and 1 to draw."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


GREEDY = Draw(0.0, 0, 1.0, 0.0, 0.0)


class Sampler:
    """Chooses the tokens of one sequence; holds its random numbers and what it has said.

    seed: the run's; sample: the number of this sample of its prompt, so that the samples differ.
    prompt: its token ids, for the repetition penalty.
    """

    def __init__(
        self, options: Sampling, *, seed: int, sample: int = 0, prompt: Iterable[int] = ()
    ) -> None:
        self.options = options
        self._random = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(sample,)))
        )
        self._seen = {int(i) for i in prompt}
        self._said: Counter[int] = Counter()

    def choose(self, logits: np.ndarray, *, logprobs: int | None = None) -> Choice:
        """The next token for float32 logits [V].

        logprobs: None for none, else how many of the most likely tokens to report as well.
        Raises KbitError where the logits are not finite.
        """
        top = int(np.argmax(logits))
        _check_finite(top, float(logits[top]))
        scores = self.penalized(logits)
        if self.options.temperature == 0:
            token = top if scores is logits else int(np.argmax(scores))
        else:
            ids, weights = candidates(scores, self.options)
            token = int(ids[_drawn(weights, self._random.random())])
        self._seen.add(token)
        self._said[token] += 1
        if logprobs is None:
            return Choice(token)
        return _with_logprobs(token, logits, logprobs)

    @property
    def needs_logits_only(self) -> bool:
        """Whether a choice depends on nothing that was said before: then `draw` can stand in."""
        o = self.options
        penalties = o.presence_penalty or o.frequency_penalty or o.repetition_penalty != 1
        return not (penalties or o.logit_bias)

    def draw(self) -> Draw:
        """What `choose` would do with the next logits; uses up the random number it would use."""
        o = self.options
        uniform = self._random.random() if o.temperature else 0.0
        return Draw(o.temperature, o.top_k, o.top_p, o.min_p, uniform)

    def accept(self, token: int, largest: float) -> Choice:
        """The choice of a token that was drawn elsewhere, from logits whose largest is given.

        Raises KbitError where the logits are not finite.
        """
        _check_finite(token, largest)
        return Choice(token)

    def penalized(self, logits: np.ndarray) -> np.ndarray:
        """Logits with bias and penalties applied, float32 [V]; the input is left as it was."""
        o = self.options
        penalize = o.repetition_penalty != 1 and self._seen
        if not (o.logit_bias or penalize or o.presence_penalty or o.frequency_penalty):
            return logits
        scores = logits.astype(np.float32)
        for token, bias in o.logit_bias.items():
            if token >= scores.size:
                raise KbitError(
                    f"logit_bias names token {token}, but the vocabulary has {scores.size}"
                )
            scores[token] += np.float32(bias)
        if penalize:
            seen = np.fromiter(self._seen, dtype=np.int64)
            s, penalty = scores[seen], np.float32(o.repetition_penalty)
            scores[seen] = np.where(s < 0, s * penalty, s / penalty)
        if (o.presence_penalty or o.frequency_penalty) and self._said:
            said = np.fromiter(self._said.keys(), dtype=np.int64)
            counts = np.fromiter(self._said.values(), dtype=np.float32)
            scores[said] -= (
                np.float32(o.presence_penalty) + np.float32(o.frequency_penalty) * counts
            )
        return scores


def _check_finite(token: int, logit: float) -> None:
    if not math.isfinite(logit):
        raise KbitError(
            f"the model's logits hold {logit} at token {token}: its weights overflow or are damaged"
        )


def candidates(scores: np.ndarray, options: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, int64 [C], and their weights, float64 [C]: probabilities but
    for a common factor.

    scores: float32 [V], penalties applied; options.temperature above 0.
    """
    weights = scores.astype(np.float64)
    weights -= weights.max()
    weights /= options.temperature
    np.exp(weights, out=weights)
    ids = np.arange(weights.size)
    if 0 < options.top_k < weights.size:
        kth = np.partition(scores, scores.size - options.top_k)[-options.top_k]
        ids = np.flatnonzero(scores >= kth)
        weights = weights[ids]
    if options.top_p < 1:
        keep = _nucleus(weights, options.top_p * weights.sum())
        ids, weights = ids[keep], weights[keep]
    if options.min_p > 0:
        keep = weights >= options.min_p * weights.max()
        ids, weights = ids[keep], weights[keep]
    return ids, weights


def _drawn(weights: np.ndarray, uniform: float) -> int:
    """A position, drawn by weight. A running sum over a whole vocabulary would take longer than
    everything else here; so it goes over the sums of stretches, and then over one stretch."""
    starts = np.arange(0, weights.size, _STRETCH)
    place, rest = _first_beyond(np.add.reduceat(weights, starts), uniform)
    start = starts[place]
    within = weights[start : start + _STRETCH]
    return int(start) + _first_beyond(within, rest)[0]


def _first_beyond(weights: np.ndarray, share: float) -> tuple[int, float]:
    """Where the running sum passes this share of the whole, and how far into that weight."""
    sums = np.cumsum(weights)
    # below the whole and not below 0, so that what it falls on has a weight
    target = min(share * sums[-1], np.nextafter(sums[-1], 0))
    place = int(np.searchsorted(sums, target, side="right"))
    into = (target - (sums[place] - weights[place])) / weights[place]
    return place, max(float(into), 0.0)


def _nucleus(p: np.ndarray, mass: float) -> np.ndarray:
    """Positions, largest first, of the fewest weights that together reach `mass`."""
    count = min(_FIRST_CANDIDATES, p.size)
    while True:
        some = np.argpartition(p, p.size - count)[-count:] if count < p.size else np.arange(p.size)
        order = some[np.lexsort((some, -p[some]))]  # ties by position, whatever argpartition did
        before = np.cumsum(p[order]) - p[order]
        if count == p.size or before[-1] >= mass:
            return order[before < mass]
        count = min(count * 8, p.size)


def _with_logprobs(token: int, logits: np.ndarray, count: int) -> Choice:
    x = logits.astype(np.float64)
    x -= x.max()
    x -= math.log(np.exp(x).sum())
    count = min(count, x.size)
    best = np.argpartition(x, x.size - count)[x.size - count :] if count else np.empty(0, np.int64)
    best = best[np.lexsort((best, -x[best]))]
    return Choice(token, float(x[token]), tuple((int(i), float(x[i])) for i in best))
