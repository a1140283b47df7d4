"""`kbit advise`: the best model and spec for an amount of memory, by measurement where there is one
and by the law where there is none, with how sure that is.

Memory is weights + cache + overhead. The cache holds keys and values of `context` tokens in 16 bits
for the model's own layers. Overhead is what a process takes besides (see OVERHEAD_BYTES).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kbit.checkpoint.reader import open_checkpoint
from kbit.errors import KbitError
from kbit.models import describe_checkpoint
from kbit_kernels.spec import QuantSpec

from .analysis import LawStudy
from .beyond import Beyond
from .frame import Frame
from .laws import Points
from .records import Record
from .study import Study

OVERHEAD_BYTES = 120_000_000
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_memory(text: str) -> float:
    """Bytes of 6GB, 500MB, 1.5GiB, 4096."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise KbitError(f"memory {text!r}: write a number of bytes such as 6GB, 500MB or 1.5GiB")
    unit = match[2].upper()
    base = _UNITS[unit]
    if match[3]:
        base = 1024.0 ** ("KMGT".index(unit) + 1) if unit else 1.0
    value = float(match[1]) * base
    if value <= 0:
        raise KbitError(f"memory {text!r}: has to be above zero")
    return value


@dataclass(frozen=True)
class Candidate:
    """One model at one spec.

    loss: nats per byte; low, high: its 95% interval. measured: whether the cell was measured, else
    the law predicted its degradation. extrapolated: why the law is outside of what it was fitted
    to, empty if it is not.
    """

    model: str
    family: str
    spec: str
    search: bool
    embedding: str
    weights_bytes: float
    cache_bytes: float
    loss: float
    low: float
    high: float
    measured: bool
    extrapolated: str = ""

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.cache_bytes


@dataclass(frozen=True)
class Advice:
    """Candidates that fit, best first; `behind`: nats per byte from first to second place, with a
    standard error where both were measured (paired)."""

    ranked: tuple[Candidate, ...]
    too_large: int
    behind: float
    behind_stderr: float


def shapes_of(study: Study) -> dict[str, tuple[int, int]]:
    """Model -> (layers, numbers of keys a token and layer), of the models that can be opened."""
    found = {}
    for model in study.models:
        try:
            decoder = describe_checkpoint(open_checkpoint(model.path))
        except KbitError:
            continue
        attention = decoder.layers[0].attention
        found[model.name] = len(decoder.layers), attention.kv_heads * attention.head_dim
    return found


def cache_bytes(record: Record, context: int, shape: tuple[int, int] | None) -> float:
    """Keys and values of `context` tokens at 16 bits. shape: (layers, width of keys), if known;
    else guessed from the number of parameters."""
    if shape is not None:
        layers, width = shape
        return 2.0 * 2 * layers * width * context
    # N = 12 L D^2 with D = 32 L gives D; no grouped queries: rather too much than too little
    guess = (32 * record.non_embedding / 12) ** (1 / 3)
    return 2.0 * 2 * (guess / 32) * guess * context


def advise(
    frame: Frame,
    study: LawStudy | None,
    memory_bytes: float,
    *,
    context: int = 2048,
    overhead_bytes: float = OVERHEAD_BYTES,
    family: str | None = None,
    shapes: dict[str, tuple[int, int]] | None = None,
) -> Advice:
    """Ranks everything that fits. study: laws of the loss on the same text, for specs of the law's
    groups that a model has not been measured at; None uses measurements alone.

    Raises KbitError if the family is unknown or nothing fits.
    """
    families = sorted({r.family for r in frame.records})
    if family is not None and family not in families:
        raise KbitError(f"no family named {family!r} in the study; it has: {', '.join(families)}")
    room = memory_bytes - overhead_bytes
    found = _measured(frame, context, shapes or {})
    found += _predicted(frame, study, context, shapes or {}) if study is not None else []
    found = [c for c in found if family in (None, c.family)]
    fitting = sorted((c for c in found if c.total_bytes <= room), key=lambda c: c.loss)
    if not fitting:
        least = min(found, key=lambda c: c.total_bytes)
        raise KbitError(
            f"nothing in the study fits {memory_bytes / 1e6:.0f} MB: the smallest is {least.model} "
            f"as {least.spec} with {(least.total_bytes + overhead_bytes) / 1e6:.0f} MB "
            f"({overhead_bytes / 1e6:.0f} MB of overhead counted; change it with --overhead)"
        )
    behind, stderr = _behind(frame, fitting)
    return Advice(tuple(fitting), len(found) - len(fitting), behind, stderr)


def _measured(frame: Frame, context: int, shapes: dict[str, tuple[int, int]]) -> list[Candidate]:
    value, stderr = frame.bits_per_byte()
    loss, error = value * np.log(2), stderr * np.log(2)
    return [
        Candidate(
            r.model, r.family, r.spec, r.search, r.embedding, r.bytes,
            cache_bytes(r, context, shapes.get(r.model)),
            float(loss[i]), float(loss[i] - 1.96 * error[i]), float(loss[i] + 1.96 * error[i]),
            True,
        )
        for i, r in enumerate(frame.records)
        if r.embedding in ("same", "keep")
    ]  # fmt: skip


def _predicted(
    frame: Frame, study: LawStudy, context: int, shapes: dict[str, tuple[int, int]]
) -> list[Candidate]:
    """The law's groups at every width of the study, for models that lack the cell."""
    best = study.best_held_out
    if best is None or best.fit is None:
        return []
    have = {(r.model, g, int(k)) for r, g, k in zip(frame.records, frame.groups, frame.widths,
                                                    strict=True)}  # fmt: skip
    fitted = study.points
    out = []
    for r in (r for r in frame.records if r.spec == "none"):
        base = frame.loss()[frame.records.index(r)]
        for g, group in enumerate(fitted.groups):
            if "+" in group:
                continue
            for k in fitted.widths.astype(int):
                if (r.model, group, int(k)) in have:
                    continue
                points = Points(
                    np.array([float(r.non_embedding)]),
                    np.array([r.training_tokens or np.nan]),
                    np.array([float(k)]),
                    np.array([g]),
                    np.array([base]),
                    np.array([base]),
                    np.array([0]),
                    fitted.groups,
                    (r.model,),
                    (),
                    fitted.n_unit,
                    fitted.d_unit,
                )
                try:
                    loss = float(best.fit.predict(points)[0])
                except KbitError:
                    continue
                spread = float(np.exp(best.held_out_log)) if np.isfinite(best.held_out_log) else 2
                delta = loss - base
                dtype, _, place = group.partition("-")
                spec = QuantSpec.parse(f"{dtype}{k}-{place}")
                overhead = 16 / spec.block if spec.block else 0.0
                out.append(
                    Candidate(
                        r.model, r.family, str(spec), False, "same",
                        r.parameters * (k + overhead) / 8,
                        cache_bytes(r, context, shapes.get(r.model)),
                        loss, base + delta / spread, base + delta * spread, False,
                        _outside(r, fitted),
                    )
                )  # fmt: skip
    return out


def _outside(record: Record, fitted: Points) -> str:
    low, high = fitted.params.min(), fitted.params.max()
    if not low <= record.non_embedding <= high:
        return f"its {record.non_embedding:.3g} parameters lie outside {low:.3g} to {high:.3g}"
    tokens = record.training_tokens
    if tokens and np.isfinite(fitted.tokens).any():
        first, last = np.nanmin(fitted.tokens), np.nanmax(fitted.tokens)
        if not first <= tokens <= last:
            return f"its {tokens:.3g} training tokens lie outside {first:.3g} to {last:.3g}"
    return ""


def _behind(frame: Frame, ranked: Sequence[Candidate]) -> tuple[float, float]:
    if len(ranked) < 2:
        return float("nan"), float("nan")
    first, second = ranked[:2]
    behind = second.loss - first.loss
    rows = []
    for c in (first, second):
        for i, r in enumerate(frame.records):
            cell = (r.model, r.spec, r.search, r.embedding)
            if c.measured and cell == (c.model, c.spec, c.search, c.embedding):
                rows.append(i)
                break
    if len(rows) < 2:
        return behind, float("nan")
    a, b = rows
    per_document = (
        frame.log_likelihood[a] / frame.bytes[a].sum()
        - frame.log_likelihood[b] / frame.bytes[b].sum()
    )
    count = len(per_document)
    return behind, float(per_document.std(ddof=1) * np.sqrt(count))


def describe(candidate: Candidate) -> str:
    """One line about a candidate."""
    how = "measured" if candidate.measured else "by the law"
    if candidate.extrapolated:
        how += f", extrapolating: {candidate.extrapolated}"
    spec = candidate.spec + (" with scale search" if candidate.search else "")
    spec += " and the embedding in 16 bits" if candidate.embedding == "keep" else ""
    scale = 1 / np.log(2)
    return (
        f"{candidate.model} as {spec if candidate.spec != 'none' else 'it is (16-bit)'}: "
        f"{candidate.loss * scale:.4f} bits per byte [{candidate.low * scale:.4f}, "
        f"{candidate.high * scale:.4f}] ({how}); weights {candidate.weights_bytes / 1e6:.2f} MB, "
        f"cache {candidate.cache_bytes / 1e6:.2f} MB"
    )


GUESSING = 8.0  # bits per byte where every byte is as likely as any other


def _interval(low: float, high: float) -> str:
    """Bits per byte of two bounds in nats; one that says nothing is named and not printed."""
    low, high = low / np.log(2), high / np.log(2)
    upper = f"{high:.4f}" if high < GUESSING else "open: the law bounds it no better than guessing"
    return f"[{low:.4f}, {upper}]"


def describe_beyond(found: Beyond, group: str) -> str:
    """What the laws say about larger models, as text."""
    scale = 1 / np.log(2)
    lines = [
        f"the study has no larger model. Its laws (the base curve and {found.law}), extrapolated "
        f"to {found.times:,.0f} times its largest, {group}"
        + (f", trained on {found.tokens / 1e6:.3g}M tokens:" if np.isfinite(found.tokens) else ":")
    ]
    for place, s in enumerate(found.sizes[:3], 1):
        behind = (
            f"; {s.behind * scale:.4f} behind {_interval(s.behind_low, s.behind_high)}"
            if place > 1
            else ""
        )
        lines.append(
            f"  {place}. {s.bits}-bit, {s.parameters:.3g} parameters: {s.loss * scale:.4f} bits "
            f"per byte {_interval(s.low, s.high)}{behind}"
        )
    return "\n".join(lines)
