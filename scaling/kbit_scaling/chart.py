"""A figure as SVG that a page makes interactive: hover shows a point, the legend hides a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .figures import Figure, Series, clipped

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 12, 10, 54
# Okabe & Ito's colours and four of Tol's, told apart by colour-blind readers
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#777777",
          "#5548b4", "#a03060")  # fmt: skip
MANY_POINTS = 40  # a cloud, drawn smaller
MOST_POINTS = 1500

SCRIPT = """
for (const figure of document.querySelectorAll('figure.chart')) {
  const tip = figure.querySelector('.tip'), svg = figure.querySelector('svg');
  const show = (mark, x, y) => {
    tip.textContent = mark.dataset.t; tip.hidden = false;
    const box = figure.getBoundingClientRect();
    const left = Math.min(x - box.left + 12, box.width - tip.offsetWidth - 4);
    tip.style.left = Math.max(0, left) + 'px'; tip.style.top = (y - box.top + 14) + 'px';
  };
  svg.addEventListener('pointermove', event => {
    let best = null, least = 18 * 18;
    for (const mark of svg.querySelectorAll('g.series:not(.off) circle')) {
      const box = mark.getBoundingClientRect();
      const dx = box.left + box.width / 2 - event.clientX;
      const dy = box.top + box.height / 2 - event.clientY;
      if (dx * dx + dy * dy < least) { least = dx * dx + dy * dy; best = mark; }
    }
    if (best) show(best, event.clientX, event.clientY); else tip.hidden = true;
  });
  svg.addEventListener('pointerleave', () => { tip.hidden = true; });
  figure.querySelectorAll('.legend button').forEach((button, i) => {
    button.addEventListener('click', () => {
      const off = svg.querySelectorAll('g.series')[i].classList.toggle('off');
      button.setAttribute('aria-pressed', String(!off));
    });
  });
}
"""


class _Scale:
    """Values to pixels, linear or logarithmic, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        self.log = log
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(known), max(known)) if known else (1.0, 2.0)
        a, b = (math.log10(low), math.log10(high)) if log else (low, high)
        pad = 0.04 * (b - a) or 0.5
        self.a, self.b, self.start, self.end = a - pad, b + pad, start, end

    def __call__(self, value: float) -> float:
        t = (math.log10(value) if self.log else value) - self.a
        return self.start + t / (self.b - self.a) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(self.a), math.ceil(self.b) + 1)
            steps = (1, 2, 5) if self.b - self.a < 2.5 else (1,)
            marks = [m * 10.0**d for d in decades for m in steps]
            return [m for m in marks if self.a <= math.log10(m) <= self.b]
        raw = (self.b - self.a) / 6
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        first = math.ceil(self.a / step)
        return [i * step for i in range(first, math.floor(self.b / step) + 1)]


def number(value: float) -> str:
    """A tick's label: 12k, 3.4M, 0.02."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:.3g}"


def svg(figure: Figure) -> str:
    """The chart without its legend."""
    lines = clipped(figure)
    xs = [v for s in lines for v in s.x]
    ys = [v for s in lines for v in s.y]
    x = _Scale(xs, LEFT, WIDTH - RIGHT, figure.x_log)
    y = _Scale(ys, HEIGHT - BOTTOM, TOP, figure.y_log)
    out = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(figure.title)}">',
    ]
    named = dict(enumerate(figure.x_names))
    for tick in named or x.ticks():
        at = x(tick)
        out.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{escape(named[int(tick)]) if named else number(tick)}</text>"
        )
    for tick in y.ticks():
        at = y(tick)
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    out.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(figure.x_label)}</text>'
        f'<text class="label" transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(figure.y_label)}</text>'
    )
    out += [_series(s, COLORS[i % len(COLORS)], x, y) for i, s in enumerate(lines)]
    out.append("</svg>")
    return "".join(out)


def _series(series: Series, color: str, x: _Scale, y: _Scale) -> str:
    rows = [i for i in range(len(series.x)) if x.holds(series.x[i]) and y.holds(series.y[i])]
    if len(rows) > MOST_POINTS:
        rows = rows[:: -(-len(rows) // MOST_POINTS)]
    places = [(x(series.x[i]), y(series.y[i])) for i in rows]
    out = [f'<g class="series" fill="{color}" stroke="{color}">']
    if series.style != "points":
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        dash = ' stroke-dasharray="5 4"' if series.style == "dashed" else ""
        out.append(f'<polyline fill="none" stroke-width="1.6"{dash} points="{path}"/>')
    radius = 2.0 if series.style == "points" and len(rows) > MANY_POINTS else 3.0
    for i, (px, py) in zip(rows, places, strict=True):
        error = series.error[i] if series.error else 0.0
        if error > 0 and y.holds(series.y[i] - error):
            out.append(
                f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y(series.y[i] - error):.1f}" '
                f'y2="{y(series.y[i] + error):.1f}"/>'
            )
        label = series.labels[i] if series.labels else f"{series.name}: {series.y[i]:.4g}"
        out.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius}" stroke="none" '
            f'data-t="{escape(label)}"/>'
        )
    out.append("</g>")
    return "".join(out)


def html(figure: Figure) -> str:
    """The chart with title, legend and caption, for a page that carries SCRIPT."""
    legend = "".join(
        f'<button type="button" aria-pressed="true"><span style="background:'
        f'{COLORS[i % len(COLORS)]}"></span>{escape(s.name)}</button>'
        for i, s in enumerate(figure.series)
    )
    return (
        f'<figure class="chart" id="{escape(figure.slug.replace(" ", "-"))}">'
        f"<h3>{escape(figure.title)}</h3>{svg(figure)}"
        f'<div class="legend">{legend}</div><div class="tip" hidden></div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )
