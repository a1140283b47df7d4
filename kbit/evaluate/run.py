"""Evaluate a model on a text by a protocol, alone or against a reference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kbit.errors import KbitError
from kbit.evaluate.protocols import Protocol, Window, windows
from kbit.evaluate.protocols import protocol as named
from kbit.evaluate.score import WindowComparison, WindowScore, compare_windows, score_windows
from kbit.evaluate.statistics import Estimate, quantiles, ratio

if TYPE_CHECKING:
    from kbit.engine.model import Model

_Result = TypeVar("_Result")

KL_LEVELS = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999, "kl_max": 1.0}


@dataclass(frozen=True)
class Part:
    """Sums over one window, or over all windows of one document.

    log_likelihood: in nats, summed over `tokens` tokens that `bytes` bytes of text (and `words`
    words, where the protocol counts them) stand behind.
    """

    document: int
    tokens: int
    bytes: int
    words: int
    log_likelihood: float


@dataclass(frozen=True)
class Evaluation:
    """What `kbit eval` measures; `record()` is its JSON form.

    tokens: scored ones; bytes: of the text behind them. clusters: what the standard errors take as
    independent, "windows" or "documents". nonfinite_tokens: scored positions with NaN or infinite
    logits; if there are any, the means are NaN. estimates: name -> value with standard error.
    parts, reference_parts: the sums behind them, one per window (empty without a reference).
    """

    protocol: Protocol
    bos_added: bool
    tokens: int
    bytes: int
    documents: int
    clusters: str
    nonfinite_tokens: int
    estimates: dict[str, Estimate]
    parts: list[Part]
    reference_parts: list[Part]
    seconds: float

    def record(self) -> dict[str, Any]:
        """One flat JSON object: every estimate as NAME and NAME_stderr."""
        values: dict[str, Any] = {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "windows": len(self.parts),
            "documents": self.documents,
        }
        for name, estimate in self.estimates.items():
            values[name] = _finite(estimate.value)
            values[f"{name}_stderr"] = _finite(estimate.stderr)
        values["nonfinite_tokens"] = self.nonfinite_tokens
        values["stderr_clusters"] = self.clusters
        values["protocol"] = {**self.protocol.record(), "bos_added": self.bos_added}
        values["seconds"] = round(self.seconds, 3)
        return values


def evaluate(
    model: Model,
    text: str,
    *,
    against: Model | None = None,
    protocol: Protocol | str = "kbit",
    context: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a text with a model and, if given, measure its divergence from a reference.

    context, stride: take the place of the protocol's. bos: False leaves BOS tokens out, True puts
    them in although the checkpoint adds none. max_windows: only the first of them. progress:
    called with tokens scored so far and in all. Raises KbitError where the two models have
    different tokens, or where an option does not fit.
    """
    begin = time.perf_counter()
    longest = model.context if against is None else min(model.context, against.context)
    chosen = named(protocol, context=context, stride=stride).resolved(longest)
    if bos is False:
        chosen = replace(chosen, bos="never")
    cut = windows(text, model.tokenizer, chosen, bos=bos)
    if against is not None:
        _check_same_tokens(cut, windows(text, against.tokenizer, chosen, bos=bos))
    if max_windows is not None:
        cut = _first(cut, max_windows, chosen)
    total = sum(w.scored for w in cut)
    comparisons: list[WindowComparison] = []
    if against is None:
        scores = list(_report(score_windows(model.executor, cut), cut, progress))
    else:
        pairs = compare_windows(against.executor, model.executor, cut)
        comparisons = list(_report(pairs, cut, progress))
        scores = [c.model for c in comparisons]
    reference = [c.reference for c in comparisons]
    by_document = chosen.text == "wikitext-pages"
    cluster_of = [w.document if by_document else i for i, w in enumerate(cut)]
    parts = [part(s) for s in scores]
    estimates = likelihood(parts, cluster_of)
    if comparisons:
        of_reference = likelihood([part(s) for s in reference], cluster_of)
        estimates |= {f"reference_{name}": e for name, e in of_reference.items()}
        estimates |= divergence(comparisons, cluster_of)
    return Evaluation(
        protocol=chosen,
        bos_added=any(w.tokens[0] == model.tokenizer.bos_id for w in cut[:1]),
        tokens=total,
        bytes=sum(p.bytes for p in parts),
        documents=len({p.document for p in parts}),
        clusters="documents" if by_document else "windows",
        nonfinite_tokens=sum(s.nonfinite for s in (*scores, *reference)),
        estimates=estimates,
        parts=parts,
        reference_parts=[part(s) for s in reference],
        seconds=time.perf_counter() - begin,
    )


def part(score: WindowScore) -> Part:
    """The sums of one window."""
    w = score.window
    return Part(w.document, w.scored, w.bytes, w.words, float(score.log_likelihoods.sum()))


def by_document(parts: Iterable[Part]) -> list[Part]:
    """The sums of all windows of each document, in the order of the documents."""
    found: dict[int, Part] = {}
    for p in parts:
        old = found.get(p.document, Part(p.document, 0, 0, 0, 0.0))
        found[p.document] = Part(
            p.document,
            old.tokens + p.tokens,
            old.bytes + p.bytes,
            old.words + p.words,
            old.log_likelihood + p.log_likelihood,
        )
    return list(found.values())


def likelihood(parts: Sequence[Part], cluster_of: Sequence[int]) -> dict[str, Estimate]:
    """Loss in nats per token, perplexity, bits per byte, and per word where words are counted.

    cluster_of: the cluster of each part, for the standard errors.
    """
    loss = _sums(cluster_of, [-p.log_likelihood for p in parts])
    per_token = ratio(loss, _sums(cluster_of, [p.tokens for p in parts]))
    per_byte = ratio(loss / math.log(2), _sums(cluster_of, [p.bytes for p in parts]))
    found = {
        "nats_per_token": per_token,
        "perplexity": _exponential(per_token),
        "bits_per_byte": per_byte,
    }
    words = _sums(cluster_of, [p.words for p in parts])
    if words.any():
        found["word_perplexity"] = _exponential(ratio(loss, words))
    return found


def divergence(
    comparisons: Sequence[WindowComparison], cluster_of: Sequence[int]
) -> dict[str, Estimate]:
    """KL(reference || model) in nats per token, top-1 agreement, change of log-likelihood."""
    tokens = _sums(cluster_of, [len(c.kl) for c in comparisons])
    change = ratio(
        _sums(
            cluster_of,
            [
                float((c.model.log_likelihoods - c.reference.log_likelihoods).sum())
                for c in comparisons
            ],
        ),
        tokens,
    )
    kl = np.concatenate([c.kl for c in comparisons])
    clusters = np.repeat(np.asarray(cluster_of), [len(c.kl) for c in comparisons])
    levels = quantiles(kl, clusters, tuple(KL_LEVELS.values()))
    return {
        "kl_mean": ratio(_sums(cluster_of, [float(c.kl.sum()) for c in comparisons]), tokens),
        **dict(zip(KL_LEVELS, levels, strict=True)),
        "top1_agreement": ratio(
            _sums(cluster_of, [int(c.agrees.sum()) for c in comparisons]), tokens
        ),
        "log_likelihood_change": change,
    }


def _sums(cluster_of: Sequence[int], values: Sequence[float]) -> np.ndarray:
    """Sums by cluster, float64 [C]."""
    return np.bincount(cluster_of, weights=np.asarray(values, dtype=np.float64))


def _exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate, its error to first order."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf
    return Estimate(value, None if estimate.stderr is None else value * estimate.stderr)


def _first(cut: list[Window], count: int, chosen: Protocol) -> list[Window]:
    if count < 1:
        raise KbitError(f"max_windows is {count}, but has to be 1 or above")
    if chosen.text == "wikitext-pages":
        raise KbitError(
            f"the protocol {chosen.name} scores whole articles, so max_windows does not go with "
            "it; give it a shorter text"
        )
    return cut[:count]


def _check_same_tokens(mine: list[Window], theirs: list[Window]) -> None:
    same = len(mine) == len(theirs) and all(
        np.array_equal(a.tokens, b.tokens) for a, b in zip(mine, theirs, strict=True)
    )
    if not same:
        raise KbitError(
            "the model and the reference cut this text into different tokens, so their "
            "distributions can't be compared; the reference has to be the same model unquantized"
        )


def _report(
    results: Iterator[_Result], cut: Sequence[Window], progress: Callable[[int, int], None] | None
) -> Iterator[_Result]:
    """Pass results on, telling progress how many tokens are done."""
    done, total = 0, sum(w.scored for w in cut)
    for window, result in zip(cut, results, strict=True):
        yield result
        done += window.scored
        if progress is not None:
            progress(done, total)


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity; null says that there is no number."""
    return value if value is not None and math.isfinite(value) else None
