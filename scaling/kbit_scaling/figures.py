"""What is drawn, as data: `plot` renders it with matplotlib, `report` as interactive SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .analysis import BestWidth, LawStudy, Worth, pareto
from .frame import UNQUANTIZED, Frame

Array = NDArray[Any]
EDGE = 100


@dataclass(frozen=True)
class Series:
    """One line or cloud of points. error: half the height of a bar (one standard error), or None.
    labels: what a point is, shown on hover."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    error: tuple[float, ...] | None = None
    labels: tuple[str, ...] = ()
    style: Literal["line", "points", "dashed"] = "line"


@dataclass(frozen=True)
class Figure:
    """A chart. slug: its file name. caption: what to see in it."""

    slug: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    x_names: tuple[str, ...] = ()  # of x = 0, 1, 2, ...
    y_top: float | None = None  # points above are left out
    caption: str = ""


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _size(bits: float) -> str:
    size = bits / 8
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def _family(frame: Frame, family: str | None) -> Frame:
    return frame.select([family in (None, r.family) for r in frame.records])


def clipped(figure: Figure) -> tuple[Series, ...]:
    """The series without points above the figure's top."""
    if figure.y_top is None:
        return figure.series
    out = []
    for s in figure.series:
        rows = [i for i, y in enumerate(s.y) if y <= figure.y_top]
        out.append(
            Series(
                s.name,
                tuple(s.x[i] for i in rows),
                tuple(s.y[i] for i in rows),
                tuple(s.error[i] for i in rows) if s.error else None,
                tuple(s.labels[i] for i in rows) if s.labels else (),
                s.style,
            )
        )
    return tuple(out)


def loss_over_bits(frame: Frame, group: str, family: str | None = None) -> Figure:
    """The paper's figure: loss over total bits, one line a width."""
    chosen = _family(frame, family)
    chosen = chosen.select([g in (group, UNQUANTIZED) for g in chosen.groups])
    value, stderr = chosen.bits_per_byte()
    top = float(value[~chosen.quantized].max()) + 0.3
    series, above = [], []
    for k in sorted(set(chosen.widths.tolist())):
        rows = np.flatnonzero(chosen.widths == k)
        if value[rows].min() > top:
            above.append(f"{k}-bit")
            continue
        rows = rows[np.argsort(chosen.total_bits[rows])]
        names = tuple(
            f"{chosen.records[i].model}, {k}-bit, {_size(chosen.total_bits[i])}: "
            f"{value[i]:.4f} ± {stderr[i]:.4f}"
            for i in rows
        )
        series.append(
            Series(
                f"{k}-bit",
                _floats(chosen.total_bits[rows] / 8),
                _floats(value[rows]),
                _floats(stderr[rows]),
                names,
                "dashed" if k == 16 else "line",
            )
        )
    return Figure(
        f"loss-{frame.metric}-{group}",
        f"{frame.metric}: loss over size, {group}",
        "bytes of weights",
        "bits per byte of text",
        tuple(series),
        x_log=True,
        y_top=top,
        caption="One line a width, one point a model. The lowest line at a size is the best width "
        "for it. Error bars are one standard error over documents, shared by all lines."
        + (f" Above the figure: {', '.join(above)}." if above else ""),
    )


def divergence_over_bits(frame: Frame, model: str, groups: Sequence[str], slug: str) -> Figure:
    """KL divergence over measured bits per parameter, one line a group."""
    chosen = frame.select([r.model == model for r in frame.records])
    kl, stderr = chosen.divergence(), chosen.divergence_stderr()
    series = []
    for group in groups:
        rows = np.flatnonzero(np.array([g == group for g in chosen.groups]))
        rows = rows[np.argsort(chosen.bits_per_param[rows])]
        if not len(rows):
            continue
        names = tuple(
            f"{chosen.records[i].spec}, {chosen.bits_per_param[i]:.2f} bits: {kl[i]:.3g}"
            for i in rows
        )
        series.append(
            Series(
                group,
                _floats(chosen.bits_per_param[rows]),
                _floats(kl[rows]),
                _floats(stderr[rows]),
                names,
            )
        )
    return Figure(
        f"{slug}-{frame.metric}-{model}",
        f"{frame.metric}: divergence over bits per parameter, {model}",
        "bits per parameter, all bytes counted",
        "KL divergence, nats per token",
        tuple(series),
        y_log=True,
        caption="Lower and further left is better.",
    )


def worth(worths: Sequence[Worth], reference: str, metric: str, slug: str) -> Figure:
    """Bits saved against a reference at equal divergence, one line a group."""
    groups = tuple(dict.fromkeys(w.group for w in worths))
    series = []
    for group in groups:
        here = [w for w in worths if w.group == group]
        series.append(
            Series(
                group,
                _floats(w.bits for w in here),
                _floats(w.saved for w in here),
                _floats((w.high - w.low) / 3.92 for w in here),
                tuple(
                    f"{group}, k={w.bits}: {w.saved:+.3f} [{w.low:+.3f}, {w.high:+.3f}] bits, "
                    f"{w.models} models"
                    for w in here
                ),
            )
        )
    return Figure(
        f"{slug}-{metric}",
        f"{metric}: bits saved against {reference} at equal divergence",
        "nominal width k",
        "bits per parameter saved",
        tuple(series),
        caption="Above zero: fewer measured bits for the same divergence. Mean over models; bars "
        "are one bootstrap standard error over documents and models.",
    )


def best_width(found: Sequence[BestWidth], metric: str, group: str) -> Figure:
    """How often each width won at each size."""
    widths = sorted({k for b in found for k, share in b.share.items() if share})
    series = [
        Series(
            f"{k}-bit",
            _floats(b.total_bits / 8 for b in found if k in b.share),
            _floats(b.share[k] for b in found if k in b.share),
            labels=tuple(
                f"{k}-bit wins {b.share[k]:.0%} at {_size(b.total_bits)}"
                for b in found
                if k in b.share
            ),
        )
        for k in widths
    ]
    return Figure(
        f"best-{metric}-{group}",
        f"{metric}: which width is best for a size, {group}",
        "bytes of weights",
        "share of bootstrap draws won",
        tuple(s for s in series if s.x),
        x_log=True,
        caption="Between two sizes of model the loss is interpolated. Draws are over documents.",
    )


def law_residuals(study: LawStudy) -> Figure:
    """Predicted over observed degradation, one cloud a law."""
    points = study.points
    observed = points.loss - points.base
    series = []
    for result in study.results:
        if result.fit is None:
            continue
        ratio = (result.fit.predict(points) - points.base) / observed
        rows = np.flatnonzero((observed > 0) & (ratio > 0))
        series.append(
            Series(
                result.full_name,
                _floats(observed[rows]),
                _floats(np.clip(ratio[rows], 1 / EDGE, EDGE)),
                labels=tuple(
                    f"{result.name}: {points.models[points.model[i]]} k={points.bits[i]:g} "
                    f"{points.groups[points.group[i]]}: x{ratio[i]:.2f}"
                    for i in rows
                ),
                style="points",
            )
        )
    return Figure(
        f"residuals-{study.metric}-{study.target}-{'-'.join(study.groups)}",
        f"{study.metric}: predicted over observed {_of(study)}, {', '.join(study.groups)}",
        f"observed {_of(study)}",
        "predicted / observed",
        tuple(series),
        x_log=True,
        y_log=True,
        caption="At 1 a law is right. Fitted to all models. What is off by more than a factor of "
        f"{EDGE} is drawn at the edge.",
    )


def _of(study: LawStudy) -> str:
    return "divergence" if study.target == "divergence" else "degradation (nats)"


def held_out(studies: Sequence[LawStudy]) -> Figure:
    """Error of each law on the held-out largest model, one line a data set."""
    series = []
    for study in studies:
        rows = [(i, r) for i, r in enumerate(study.results) if np.isfinite(r.held_out_log)]
        series.append(
            Series(
                f"{study.metric}, {study.target}, {'+'.join(study.groups)}",
                _floats(i for i, _ in rows),
                _floats(r.held_out_log for _, r in rows),
                labels=tuple(f"{r.full_name}: {r.held_out_log:.2f}" for _, r in rows),
                style="points",
            )
        )
    return Figure(
        "held-out",
        "Error on the held-out largest model",
        "law",
        "median |log ratio|",
        tuple(series),
        x_names=tuple(r.label for r in studies[0].results),
        caption="The laws were fitted without the largest model. 0.1 is 10 percent off. "
        + ", ".join(r.full_name for r in studies[0].results)
        + ".",
    )


def pareto_front(frame: Frame) -> Figure:
    """All cells, and those that no other beats in bytes and loss."""
    value, stderr = frame.bits_per_byte()
    labels = tuple(
        f"{r.model} {r.spec}{' search' if r.search else ''}: {v:.4f} ± {e:.4f}, {_size(b)}"
        for r, v, e, b in zip(frame.records, value, stderr, frame.total_bits, strict=True)
    )
    front = pareto(frame.total_bits, value)
    size = frame.total_bits / 8
    return Figure(
        f"pareto-{frame.metric}",
        f"{frame.metric}: all cells and the Pareto front",
        "bytes of weights",
        "bits per byte of text",
        (
            Series("all cells", _floats(size), _floats(value), labels=labels, style="points"),
            Series(
                "front",
                _floats(size[front]),
                _floats(value[front]),
                labels=tuple(labels[i] for i in front),
            ),
        ),
        x_log=True,
        y_top=float(value[~frame.quantized].max()) + 0.3,
        caption="A cell on the front is beaten by none that is both smaller and better.",
    )


def over_tokens(frame: Frame, group: str) -> Figure | None:
    """Divergence over training tokens, one line a size and width; None without such an axis."""
    chosen = frame.select([g == group for g in frame.groups])
    kl = chosen.divergence()
    series = []
    sizes = sorted({(r.family, r.non_embedding) for r in chosen.records})
    for family, size in sizes:
        for k in (2, 4, 6):
            rows = [
                i
                for i, r in enumerate(chosen.records)
                if (r.family, r.non_embedding) == (family, size)
                and chosen.widths[i] == k
                and r.training_tokens
            ]
            rows.sort(key=lambda i: chosen.records[i].training_tokens or 0)
            if len(rows) < 2:
                continue
            series.append(
                Series(
                    f"{family} {size / 1e3:.0f}k, {k}-bit",
                    _floats(chosen.records[i].training_tokens or 0 for i in rows),
                    _floats(kl[rows]),
                    labels=tuple(f"{chosen.records[i].model} k={k}: {kl[i]:.3g}" for i in rows),
                )
            )
    if not series:
        return None
    return Figure(
        f"tokens-{frame.metric}-{group}",
        f"{frame.metric}: divergence over training tokens, {group}",
        "training tokens",
        "KL divergence, nats per token",
        tuple(series),
        x_log=True,
        y_log=True,
        caption="Rising lines: the longer a model is trained, the more the same bits cost it.",
    )
