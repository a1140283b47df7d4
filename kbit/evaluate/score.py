"""Log-likelihoods and divergences of windows of tokens, streamed: the core under `kbit eval` and
under the scaling study.

Logits come as float32, everything after them is float64. Only a slice of a window's logits exists
at a time, whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from kbit.engine.executor import Executor
from kbit.errors import KbitError
from kbit.evaluate.protocols import Window

LOGITS_BYTES = 64 << 20  # of float32 logits of one model that may exist at a time
GPU_LOGITS_BYTES = 1 << 30  # the same on a GPU, which smaller steps would leave idle
# Rows handled together below: their float64 temporaries should stay in the cache of a core.
_ROWS_BYTES = 1 << 20


@dataclass(frozen=True)
class WindowScore:
    """One window's result. log_likelihoods: natural, float64 [scored]. nonfinite: scored positions
    whose logits held NaN or infinity (their log-likelihood is then NaN)."""

    window: Window
    log_likelihoods: np.ndarray
    nonfinite: int


@dataclass(frozen=True)
class WindowComparison:
    """One window scored by a reference p and a model q at once, per scored token.

    kl: KL(p || q) in nats, float64 [scored]; agrees: whether both find the same token most likely,
    bool [scored].
    """

    reference: WindowScore
    model: WindowScore
    kl: np.ndarray
    agrees: np.ndarray


def score_windows(executor: Executor, windows: Iterable[Window]) -> Iterator[WindowScore]:
    """Log-likelihoods of every window, in order."""
    for group in groups([executor], windows):
        parts: list[list[np.ndarray]] = [[] for _ in group]
        for slices in sliced_logits(executor, group):
            for b, (logits, targets) in enumerate(slices):
                parts[b].append(log_likelihood(logits, targets))
        for window, part in zip(group, parts, strict=True):
            yield _score(window, part)


def compare_windows(
    reference: Executor, model: Executor, windows: Iterable[Window]
) -> Iterator[WindowComparison]:
    """Score every window with both, and the divergence of the model from the reference."""
    if reference.decoder.vocab_size != model.decoder.vocab_size:
        raise KbitError(
            f"the reference predicts {reference.decoder.vocab_size} tokens and the model "
            f"{model.decoder.vocab_size}: their distributions can't be compared"
        )
    for group in groups([reference, model], windows):
        parts: list[list[_Compared]] = [[] for _ in group]
        pairs = zip(sliced_logits(reference, group), sliced_logits(model, group), strict=True)
        for of_reference, of_model in pairs:
            for b, ((p, targets), (q, _)) in enumerate(zip(of_reference, of_model, strict=True)):
                parts[b].append(_compare(p, q, targets))
        for window, part in zip(group, parts, strict=True):
            yield WindowComparison(
                _score(window, [c.p_log_likelihood for c in part]),
                _score(window, [c.q_log_likelihood for c in part]),
                np.concatenate([c.kl for c in part]),
                np.concatenate([c.agrees for c in part]),
            )


def log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log softmax(logits)[targets]: float32 [T, V] and int [T] -> float64 [T].

    NaN where a row holds NaN or +infinity.
    """
    out = np.empty(len(targets))
    for at in _row_slices(logits):
        x = logits[at].astype(np.float64)
        out[at] = x[np.arange(len(x)), targets[at]] - _logsumexp(x)
    return out


def kl_divergence(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """KL(softmax(p) || softmax(q)) in nats per row: float32 [T, V] twice -> float64 [T]."""
    return _compare(p_logits, q_logits, np.zeros(len(p_logits), dtype=np.int64)).kl


@dataclass(frozen=True)
class _Compared:
    p_log_likelihood: np.ndarray
    q_log_likelihood: np.ndarray
    kl: np.ndarray
    agrees: np.ndarray


def _compare(p: np.ndarray, q: np.ndarray, targets: np.ndarray) -> _Compared:
    """All measures of rows p, q: float32 [T, V], targets int [T]."""
    count = len(targets)
    result = _Compared(
        np.empty(count), np.empty(count), np.empty(count), np.empty(count, dtype=bool)
    )
    for at in _row_slices(p):
        x, y = p[at].astype(np.float64), q[at].astype(np.float64)
        rows = np.arange(len(x))
        result.agrees[at] = x.argmax(axis=1) == y.argmax(axis=1)
        x -= _logsumexp(x)[:, None]
        y -= _logsumexp(y)[:, None]
        result.p_log_likelihood[at] = x[rows, targets[at]]
        result.q_log_likelihood[at] = y[rows, targets[at]]
        probability = np.exp(x)
        # A logit of -infinity in both (a masked token) adds nothing, but -inf - -inf is NaN.
        with np.errstate(invalid="ignore"):
            x -= y
            x *= probability
        masked = probability == 0
        if masked.any():
            x[masked] = 0
        # Rounding can leave a sum of -1e-17 for equal rows.
        result.kl[at] = np.maximum(x.sum(axis=1), 0)
    return result


def _logsumexp(x: np.ndarray) -> np.ndarray:
    """log sum exp of each row, float64 [T, V] -> [T]; NaN for a row with NaN or +infinity."""
    top = x.max(axis=1)
    with np.errstate(invalid="ignore"):
        return top + np.log(np.exp(x - top[:, None]).sum(axis=1))


def _row_slices(logits: np.ndarray) -> Iterator[slice]:
    rows = max(1, _ROWS_BYTES // (8 * max(1, logits.shape[1])))
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


def _score(window: Window, parts: Sequence[np.ndarray]) -> WindowScore:
    found = np.concatenate(parts)
    assert len(found) == window.scored
    return WindowScore(window, found, int(np.count_nonzero(~np.isfinite(found))))


def groups(executors: Sequence[Executor], windows: Iterable[Window]) -> Iterator[list[Window]]:
    """Windows to be computed together: as many as fit the budget for logits, at most 32 (on a GPU
    256)."""
    vocabulary = max(e.decoder.vocab_size for e in executors)
    on_gpu = all(_on_gpu(e) for e in executors)
    todo = iter(windows)
    for first in todo:
        wanted = _budget(on_gpu) // (4 * vocabulary * len(first.tokens))
        yield [first, *islice(todo, min(max(wanted, 1), 256 if on_gpu else 32) - 1)]


def _on_gpu(executor: Executor) -> bool:
    return str(getattr(executor, "device", "cpu")).startswith("cuda")


def _budget(on_gpu: bool) -> int:
    return GPU_LOGITS_BYTES if on_gpu else LOGITS_BYTES


def sliced_logits(
    executor: Executor, group: Sequence[Window]
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Run the windows through a cache, a slice of positions at a time; yields for each slice and
    window the logits [T, V] at scored positions and the tokens [T] that they should predict."""
    inputs = [w.tokens[:-1] for w in group]
    longest = max(len(i) for i in inputs)
    cache = executor.new_cache(len(group), longest)
    # Positions before the first scored one need no logits.
    start = min(w.first for w in group) - 1
    if start:
        executor.forward([i[:start] for i in inputs], cache)
    vocabulary = executor.decoder.vocab_size
    size = max(1, _budget(_on_gpu(executor)) // (4 * vocabulary * len(group)))
    for begin in range(start, longest, size):
        logits = executor.forward([i[begin : begin + size] for i in inputs], cache, all_logits=True)
        slices = []
        for window, found in zip(group, logits, strict=True):
            if found.ndim != 2:  # a window that has ended
                found = np.empty((0, vocabulary), dtype=np.float32)
            skip = max(0, window.first - 1 - begin)
            targets = window.tokens[begin + 1 + skip : begin + 1 + len(found)]
            slices.append((found[skip:], targets))
        yield slices
