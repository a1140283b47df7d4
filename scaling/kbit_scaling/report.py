"""The report: one HTML page that needs nothing else, for a screen, a phone and paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from . import chart
from .analysis import LawStudy
from .fit import Estimate
from .frame import Frame
from .records import Record
from .summary import Summary
from .weights import NONE

CSS = """
:root { --ink: #1c1e21; --soft: #5b6168; --rule: #d9dce0; --paper: #fff; --tint: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a2a8b0; --rule: #3a3f46;
  --paper: #16181b; --tint: #202328; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 1.2rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { line-height: 1.2; margin: .6em 0 .3em; } h2 { margin: 1.8em 0 .5em; } h3 { margin: .4em 0; }
p, li { max-width: 46rem; } .soft { color: var(--soft); }
.charts { display: grid; gap: 1.4rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
figure.chart { margin: 0; position: relative; min-width: 0; }
figure.chart h3 { font-size: 1rem; } figcaption { font-size: .85rem; color: var(--soft); }
svg { width: 100%; height: auto; display: block; touch-action: pan-y; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } svg .label { fill: var(--ink); }
svg .grid { stroke: var(--rule); stroke-width: .7; } svg .off { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem .7rem; }
.legend button { all: unset; cursor: pointer; font-size: .82rem; padding: .1rem 0; }
.legend button:focus-visible { outline: 2px solid currentColor; }
.legend button[aria-pressed=false] { opacity: .35; }
.legend span { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .35em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.tip { position: absolute; pointer-events: none; background: var(--ink); color: var(--paper);
  font-size: .8rem; padding: .2rem .5rem; border-radius: 4px; max-width: 92%; z-index: 1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: .5em 0; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { background: var(--tint); }
pre { background: var(--tint); padding: .7rem; overflow-x: auto; font-size: .86rem; }
@media (max-width: 560px) { svg text { font-size: 19px; } }
@media print { body { max-width: none; font-size: 10pt; }
  .legend button[aria-pressed=false] { display: none; } .scroll { overflow: visible; }
  figure.chart, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .charts { grid-template-columns: 1fr 1fr; }
  table { font-size: 7.5pt; } th, td { padding: .1rem .3rem; white-space: normal; } }
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are plain text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    inside = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inside}</table></div>'


def _plus_minus(value: float, error: float, digits: int = 4) -> str:
    return (
        f"{value:.{digits}f} ± {error:.{digits}f}" if np.isfinite(error) else f"{value:.{digits}f}"
    )


def _best_section(summary: Summary) -> str:
    out = []
    for metric, found in summary.best.items():
        if not found:
            continue
        rows = []
        for b in found[:: max(1, len(found) // 8)]:
            share = b.share.get(b.best, 0.0)
            rest = sorted(b.loss.items(), key=lambda item: item[1])
            second = f"{rest[1][0]}-bit (+{(rest[1][1] - rest[0][1]) / np.log(2):.4f})"
            size = b.total_bits / 8
            rows.append((chart.number(float(f"{size:.3g}")) + "B", f"{b.best}-bit", f"{share:.0%}",
                         f"{b.loss[b.best] / np.log(2):.4f}", second))  # fmt: skip
        head = ("bytes", "best", "won", "bits per byte", "second")
        out.append(f"<h3>{escape(metric)}</h3>" + table(head, rows))
    return (
        f"<h2>Which width is best for a size</h2><p>Weights of {escape(summary.main)}, models of "
        f"{escape(summary.panel)}. The loss between two sizes of model is interpolated; "
        "<i>won</i> is the share of bootstrap draws over documents in which that width had the "
        "lowest loss.</p>" + "".join(out)
        if out
        else ""
    )


def _estimate(e: Estimate) -> str:
    if e.status == "unidentified":
        return "unidentified" + (f" (with {', '.join(e.tied_to[:3])})" if e.tied_to else "")
    interval = f" [{e.low:.3g}, {e.high:.3g}]" if np.isfinite(e.low) else ""
    return f"{e.value:.4g}{interval}" + (" weak" if e.status == "weak" else "")


def law_section(study: LawStudy) -> str:
    """Table of the laws of one comparison, and one of their parameters."""
    rows = []
    for r in study.results:
        if r.fit is None:
            rows.append((r.full_name, "-", "-", "-", "-", r.note))
            continue
        held = f"{r.held_out_log:.3f}" if np.isfinite(r.held_out_log) else "-"
        rows.append((r.full_name, str(r.fit.p), f"{r.fit.aic:.0f}",
                     f"{r.fit.median_error:.4f}", held, r.note or r.title))  # fmt: skip
    head = ("law", "parameters", "AIC", "median |log error|", "held-out |log ratio|", "")
    out = [
        f"<h3>{escape(study.metric)}: {escape(study.target)}</h3><p class=soft>{len(study.points)} "
        f"cells of {len(study.points.models)} models, {escape(', '.join(study.groups))}; held out: "
        f"{escape(study.held_out)}</p>",
        table(head, rows),
    ]
    parameters = [
        (r.name, e.name, _estimate(e))
        for r in study.results
        if r.fit is not None
        for e in r.fit.estimates
    ]
    if study.base is not None:
        parameters += [("base curve", e.name, _estimate(e)) for e in study.base.estimates]
    out.append(
        "<details><summary>Parameters with 95% intervals</summary>"
        + table(("law", "parameter", "value"), parameters)
        + "</details>"
    )
    return "".join(out)


def _worth_section(summary: Summary) -> str:
    out = []
    for metric, by in summary.worths.items():
        for slug, worths in by.items():
            if not worths:
                continue
            groups = list(dict.fromkeys(w.group for w in worths))
            widths = sorted({w.bits for w in worths})
            cells = {
                (w.group, w.bits): f"{w.saved:+.2f} [{w.low:+.2f}, {w.high:+.2f}]" for w in worths
            }
            rows = [(g, *(cells.get((g, k), "") for k in widths)) for g in groups]
            against = {"types": "int-b64", "blocks": "its block 64", "search": "no search"}[slug]
            out.append(f"<h3>{escape(metric)}: against {against}</h3>"
                       + table((slug, *(f"k={k}" for k in widths)), rows))  # fmt: skip
    if not out:
        return ""
    return (
        "<h2>What data types, blocks and scale search are worth</h2><p>Bits per parameter saved at "
        "equal KL divergence, all bytes of scales and codebooks counted; mean over models, 95% "
        "bootstrap interval over documents and models. Positive is better.</p>" + "".join(out)
    )


def _weights(record: Record) -> str:
    kept = record.spec == NONE or record.embedding == "same"
    search = " search" if record.search else ""
    return record.spec + search + ("" if kept else f", embedding {record.embedding}")


def _cells_section(frame: Frame) -> str:
    value, stderr = frame.bits_per_byte()
    delta, delta_stderr = frame.degradation()
    kl, kl_stderr, top = frame.divergence(), frame.divergence_stderr(), frame.agreement()
    rows = [
        (r.model, _weights(r),
         f"{frame.bits_per_param[i]:.3f}", f"{r.bytes:,}", _plus_minus(value[i], stderr[i]),
         _plus_minus(delta[i] / np.log(2), delta_stderr[i] / np.log(2), 5),
         f"{kl[i]:.3g} ± {kl_stderr[i]:.1g}", f"{top[i]:.1%}")
        for i, r in enumerate(frame.records)
    ]  # fmt: skip
    head = ("model", "weights", "bits/param", "bytes", "bits per byte", "change", "KL", "same top")
    return (
        f"<details><summary>{escape(frame.metric)}: {len(rows)} cells</summary>"
        + table(head, rows)
        + "</details>"
    )


def _tasks_section(summary: Summary) -> str:
    if not summary.tasks:
        return ""
    rows = [
        (t.metric, t.model, t.spec, _plus_minus(t.accuracy, t.stderr, 3),
         _plus_minus(t.difference, t.difference_stderr, 3), str(t.items))
        for t in summary.tasks
    ]  # fmt: skip
    head = ("task", "model", "weights", "accuracy", "paired change", "items")
    return (
        f"<h2>Tasks</h2><details><summary>{len(rows)} scores</summary>{table(head, rows)}</details>"
    )


def _failures_section(summary: Summary) -> str:
    if not summary.failed:
        return "<h2>Failures</h2><p>None: every cell that was asked for is in the tables.</p>"
    rows = [(reason[:300], str(n)) for reason, n in summary.failed[:200]]
    return "<h2>Failures</h2>" + table(("cell and reason", "times"), rows)


def page(
    summary: Summary, *, title: str, question: str, commands: Sequence[str], findings: str = ""
) -> str:
    """The report as HTML. findings: paragraphs in plain words (blank lines between them)."""
    cells = sum(len(f) for f in summary.frames.values()) + len(summary.tasks)
    models = {r.model for f in summary.frames.values() for r in f.records}
    words = "".join(f"<p>{escape(p)}</p>" for p in findings.split("\n\n") if p.strip())
    charts = "".join(chart.html(figure) for figure in summary.figures())
    best = [
        f"{s.metric}, {s.target}, {', '.join(s.groups)}: {b.full_name}, {b.held_out_log:.3f}"
        for s in summary.laws
        if (b := s.best_held_out) is not None
    ]
    method = (
        f"<p>{cells} cells of {len(models)} models. Each model is stored under each spec, run in "
        "exact arithmetic (fp32 over the dequantized weights) and scored on the same documents as "
        "the unquantized model, so differences are paired. Sizes are all bytes of the weights as "
        "stored: codes, scales, zero points, codebooks. Losses are bits per byte of text. Errors "
        "are standard errors over documents; the laws' intervals are 95% of a bootstrap over "
        "documents and training runs. Laws predict the degradation beside the measured unquantized "
        "loss, by Huber loss (1e-3) on log values; the largest model is held out to test them.</p>"
    )
    held = "".join(f"<li>{escape(line)}</li>" for line in best)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p><b>{escape(question)}</b></p>{words}"
        f"<h2>Method</h2>{method}"
        f"<h2>Figures</h2><p class=soft>Point at a mark for its numbers; click a name to hide its "
        f'line.</p><div class="charts">{charts}</div>'
        + _best_section(summary)
        + _worth_section(summary)
        + "<h2>Laws</h2><p>Smallest error on the held-out largest model (median |log(predicted / "
        f"observed)|):</p><ul>{held}</ul>"
        + "".join(law_section(study) for study in summary.laws)
        + _tasks_section(summary)
        + "<h2>All cells</h2>"
        + "".join(_cells_section(f) for f in summary.frames.values())
        + _failures_section(summary)
        + f"<h2>Repeat it</h2><pre>{escape(chr(10).join(commands))}</pre>"
        + f"</main><script>{chart.SCRIPT}</script></body></html>\n"
    )


def write(path: Path, text: str) -> None:
    """Writes the page aside and renames it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
