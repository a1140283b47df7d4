"""Everything that fit, plot, report and advise show, computed once from the records."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from kbit.errors import KbitError

from . import figures
from .analysis import BestWidth, LawStudy, Worth, best_widths, compare_laws, worth_in_bits
from .figures import Figure
from .frame import UNQUANTIZED, Frame, Target, frame, group_order, text_metrics
from .laws import KbitLaw, get_laws
from .records import Record
from .weights import NONE
from .workers import process_pool

PREFERRED = ("nf-b64", "int-b64")
MOST_CELLS = 0.9


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one cell on a task, with its binomial standard error and the paired difference to
    the unquantized model."""

    metric: str
    model: str
    spec: str
    accuracy: float
    stderr: float
    difference: float
    difference_stderr: float
    items: int


@dataclass(frozen=True)
class Summary:
    """A study's results. panel: the family whose models differ in size alone, over which the
    curves are drawn; main: the group that covers most of it."""

    frames: dict[str, Frame]
    panels: dict[str, Frame]
    panel: str
    main: str
    laws: tuple[LawStudy, ...]
    best: dict[str, list[BestWidth]]
    worths: dict[str, dict[str, list[Worth]]]
    tasks: tuple[TaskScore, ...]
    failed: tuple[tuple[str, int], ...]

    def figures(self) -> list[Figure]:
        """All figures, in the order of the report."""
        out: list[Figure | None] = []
        for metric, panel in self.panels.items():
            groups = sorted(set(panel.groups), key=group_order)
            kinds = [g for g in groups if g.endswith("-b64")]
            blocks = [g for g in groups if "+" not in g]
            blocks = [g for g in blocks if g.split("-")[0] in _with_blocks(blocks)]
            out.append(figures.loss_over_bits(panel, self.main))
            out.append(figures.best_width(self.best[metric], metric, self.main))
            out.append(figures.divergence_over_bits(panel, _shown(panel, kinds), kinds, "types"))
            if blocks:
                model = _shown(panel, blocks)
                out.append(figures.divergence_over_bits(panel, model, blocks, "blocks"))
            for slug, worths in self.worths[metric].items():
                if worths:
                    out.append(figures.worth(worths, _reference(slug), metric, slug))
            out.append(figures.over_tokens(self.frames[metric], self.main))
            out.append(figures.pareto_front(panel))
        out += [figures.law_residuals(study) for study in self.laws]
        if self.laws:
            out.append(figures.held_out(self.laws))
        return [f for f in out if f is not None and any(s.x for s in f.series)]

    def law_groups(self, metric: str) -> list[str]:
        """The groups of cells that laws were fitted to."""
        return list(dict.fromkeys(g for s in self.laws if s.metric == metric for g in s.groups))

    def as_json(self) -> dict[str, Any]:
        """Fits, intervals and tables as plain values."""
        return {
            "main_group": self.main,
            "panel": self.panel,
            "laws": [law_json(study) for study in self.laws],
            "best_width": {m: [asdict(b) for b in found] for m, found in self.best.items()},
            "worth_in_bits": {
                m: {slug: [asdict(w) for w in ws] for slug, ws in by.items()}
                for m, by in self.worths.items()
            },
            "widths": {m: _widths(self.frames[m], self.law_groups(m)) for m in self.frames},
            "tasks": [asdict(t) for t in self.tasks],
            "failed": [{"reason": reason, "cells": n} for reason, n in self.failed],
        }


def _widths(f: Frame, groups: Sequence[str]) -> list[dict[str, Any]]:
    """The cells of some groups: what a width costs each model. change: bits per byte."""
    change, change_stderr = f.degradation()
    kl, kl_stderr, agree = f.divergence(), f.divergence_stderr(), f.agreement()
    return [
        {
            "model": r.model,
            "group": g,
            "bits": int(k),
            "change": round(change[i] / np.log(2), 6),
            "change_stderr": round(change_stderr[i] / np.log(2), 6),
            "kl": float(f"{kl[i]:.5g}"),
            "kl_stderr": float(f"{kl_stderr[i]:.3g}"),
            "agree": round(float(agree[i]), 4),
        }
        for i, (r, g, k) in sorted(
            enumerate(zip(f.records, f.groups, f.widths, strict=True)),
            key=lambda row: (
                row[1][0].family,
                row[1][0].non_embedding,
                row[1][0].training_tokens or 0,
                row[1][2],
            ),
        )
        if g in groups
    ]


def law_json(study: LawStudy) -> dict[str, Any]:
    """One comparison of laws as plain values (nan as null)."""
    return {
        "metric": study.metric,
        "target": study.target,
        "groups": list(study.groups),
        "cells": len(study.points),
        "models": len(study.points.models),
        "held_out_model": study.held_out,
        "base_curve": [_plain(asdict(e)) for e in study.base.estimates] if study.base else None,
        "laws": [
            _plain(
                {
                    "hypothesis": r.label,
                    "law": r.name,
                    "formula": r.title,
                    "parameters": r.fit.p if r.fit else None,
                    "aic": r.fit.aic if r.fit else None,
                    "objective": r.fit.objective if r.fit else None,
                    "median_log_error": r.fit.median_error if r.fit else None,
                    "held_out_log_error": r.held_out_log,
                    "held_out_nats": r.held_out_nats,
                    "note": r.note,
                    "estimates": [_plain(asdict(e)) for e in r.fit.estimates] if r.fit else [],
                }
            )
            for r in study.results
        ],
    }


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in fields.items()
    }


def _shown(panel: Frame, groups: Sequence[str]) -> str:
    """The model with most of the groups; of those, the largest."""
    cells = Counter(r.model for r, g in zip(panel.records, panel.groups, strict=True)
                    if g in groups)  # fmt: skip
    return max(panel.records, key=lambda r: (cells[r.model], r.non_embedding)).model


def _with_blocks(groups: Sequence[str]) -> set[str]:
    counts = Counter(g.split("-")[0] for g in groups)
    return {name for name, n in counts.items() if n > 1}


def _reference(slug: str) -> str:
    return {"types": "int-b64", "blocks": "the same type at b64"}.get(
        slug, "the same without search"
    )


def panel_of(f: Frame) -> tuple[str, Frame]:
    """The family (and training length) with most sizes, among equals the one trained longest: its
    models differ in size alone."""
    count = Counter((r.family, r.training_tokens) for r in f.records if r.spec == NONE)
    if not count:
        raise KbitError("no unquantized model has been measured yet")
    family, tokens = max(count, key=lambda key: (count[key], key[1] or 0.0))
    chosen = f.select([(r.family, r.training_tokens) == (family, tokens) for r in f.records])
    name = family if tokens is None else f"{family} at {tokens / 1e6:.3g}M tokens"
    return name, chosen


def main_group(f: Frame) -> str:
    """The group with most cells; among equals a preferred one."""
    counts = Counter(g for g in f.groups if g != UNQUANTIZED)
    if not counts:
        raise KbitError("no quantized cell has been measured yet; run `kbit sweep` first")
    most = max(counts.values())
    full = [g for g, n in counts.items() if n == most]
    return next((g for g in PREFERRED if g in full), full[0])


def _worths(panel: Frame, replicates: int) -> dict[str, list[Worth]]:
    groups = sorted(set(panel.groups) - {UNQUANTIZED}, key=group_order)
    out: dict[str, list[Worth]] = {"types": [], "blocks": [], "search": []}
    for group in groups:
        head, _, extra = group.partition("+")
        dtype, _, block = head.partition("-")
        if extra == "search" and head in groups:
            out["search"] += worth_in_bits(panel, group, head, replicates=replicates)
        elif not extra and block == "b64" and dtype != "int" and "int-b64" in groups:
            out["types"] += worth_in_bits(panel, group, "int-b64", replicates=replicates)
        elif not extra and block != "b64" and f"{dtype}-b64" in groups:
            out["blocks"] += worth_in_bits(panel, group, f"{dtype}-b64", replicates=replicates)
    return out


def _task_scores(records: Sequence[Record]) -> list[TaskScore]:
    plain = {(r.model, r.metric): r for r in records if r.spec == NONE and r.items}
    out = []
    for r in records:
        if r.items is None:
            continue
        right = np.array(r.items.correct, dtype=float)
        n = len(right)
        base = plain.get((r.model, r.metric))
        difference = np.full(n, np.nan)
        if base is not None and base.items is not None and len(base.items.correct) == n:
            difference = right - np.array(base.items.correct, dtype=float)
        error = max(1, n) ** 0.5
        out.append(
            TaskScore(
                r.metric,
                r.model,
                r.spec,
                float(right.mean()),
                float(right.std(ddof=1) / error) if n > 1 else float("nan"),
                float(difference.mean()),
                float(difference.std(ddof=1) / error) if n > 1 else float("nan"),
                n,
            )
        )
    return out


def summarize(
    records: Iterable[Record],
    *,
    laws: Sequence[str] = (),
    groups: Sequence[str] = (),
    replicates: int = 100,
    processes: int = 1,
) -> Summary:
    """All results of a store. groups: fit the laws to these together (default: to each group on its
    own that has nearly as many cells as the main one). replicates: of the laws' bootstrap.
    processes: that fit laws side by side."""
    everything = list(records)
    ok = [r for r in everything if r.status == "ok"]
    if not everything:
        raise KbitError("the store holds no records yet; run `kbit sweep` first")
    if not ok:
        reasons = Counter(r.error or "" for r in everything).most_common(1)
        most = f"; the commonest reason: {reasons[0][0]}" if reasons else ""
        raise KbitError(
            f"the store has no successful cell ({len(everything)} failed){most}; mend that and run "
            "`kbit sweep` with --retry-failed"
        )
    chosen: dict[str, KbitLaw] = get_laws(laws)
    frames = {m: frame(ok, m) for m in text_metrics(ok)}
    if not frames:
        raise KbitError("the store holds task scores only; the laws need a text")
    panels, name, main = {}, "", ""
    comparisons: list[Callable[[], LawStudy]] = []
    best, worths = {}, {}
    for metric, f in frames.items():
        panel_name, panel = panel_of(f)
        group = main_group(f)
        name, main = name or panel_name, main or group
        panels[metric] = panel
        counts = Counter(f.groups)
        others = [g for g in counts if g not in (group, UNQUANTIZED)]
        full = [group, *(g for g in others if counts[g] >= MOST_CELLS * counts[group])]
        targets: tuple[Target, ...] = ("loss", "divergence")
        for together in [list(groups)] if groups else [[g] for g in full]:
            comparisons += [
                partial(
                    compare_laws, f, chosen, groups=together, target=target, replicates=replicates
                )
                for target in targets
            ]
        best[metric] = best_widths(panel, main)
        worths[metric] = _worths(panel, max(20, replicates))
    # A model or text that was mended gives other cells: their success takes the failure's place.
    done = {_asked(r) for r in ok}
    failed = Counter(
        f"{r.model}, {r.spec}, {r.metric}: {r.error}"
        for r in everything
        if r.status == "failed" and _asked(r) not in done
    )
    return Summary(
        frames,
        panels,
        name,
        main,
        tuple(_all(comparisons, processes)),
        best,
        worths,
        tuple(_task_scores(ok)),
        tuple(failed.most_common()),
    )


def _asked(r: Record) -> tuple[object, ...]:
    """What a study file asks for with this record."""
    return r.model, r.spec, r.method, r.search, r.embedding, r.metric


def _all(comparisons: Sequence[Callable[[], LawStudy]], processes: int) -> list[LawStudy]:
    if processes == 1:
        return [compare() for compare in comparisons]
    # The matrices are tiny: threads of linear algebra would only fight for the cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with process_pool(processes) as pool:
        return [pending.result() for pending in [pool.submit(c) for c in comparisons]]


def law_table(study: LawStudy) -> str:
    """A comparison of laws as text."""
    lines = [
        f"{study.metric}, {study.target}: {len(study.points)} cells of "
        f"{len(study.points.models)} models, groups {', '.join(study.groups)}; held out: "
        f"{study.held_out}",
        f"  {'law':<16}{'p':>4}{'AIC':>10}{'median':>9}{'held out':>10}   parameters",
    ]
    for r in study.results:
        if r.fit is None:
            lines.append(f"  {r.full_name:<16}not fitted: {r.note}")
            continue
        held = f"{r.held_out_log:.3f}" if np.isfinite(r.held_out_log) else "-"
        shown = [_estimate(e) for e in r.fit.estimates[:8]]
        more = len(r.fit.estimates) - len(shown)
        lines.append(
            f"  {r.full_name:<16}{r.fit.p:>4}{r.fit.aic:>10.1f}"
            f"{r.fit.median_error:>9.4f}{held:>10}   "
            + ", ".join(shown)
            + (f", and {more} more" if more else "")
        )
        if r.note:
            lines.append(f"  {'':<16}{r.note}")
    return "\n".join(lines)


def _estimate(e: Any) -> str:
    interval = f" [{e.low:.3g}, {e.high:.3g}]" if np.isfinite(e.low) else ""
    if e.status == "unidentified":
        tied = f" with {', '.join(e.tied_to[:3])}" if e.tied_to else ""
        return f"{e.name} unidentified{tied}"
    return f"{e.name} {e.value:.4g}{interval}{' (weak)' if e.status == 'weak' else ''}"
