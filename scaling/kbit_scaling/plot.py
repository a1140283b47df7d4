"""Figures as files, with matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .chart import COLORS, MANY_POINTS, number
from .figures import Figure, clipped

MARKERS = "osD^vP*Xhd"


def draw(figure: Figure, path: Path) -> None:
    """Writes one figure; the suffix of the path (.png, .svg, .pdf) decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    with plt.rc_context({"svg.hashsalt": "kbit", "font.size": 9, "axes.grid": True,
                         "grid.alpha": 0.25, "axes.spines.top": False,
                         "axes.spines.right": False}):  # fmt: skip
        canvas, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        lines = {"line": "-", "dashed": "--", "points": ""}
        for i, series in enumerate(clipped(figure)):
            cloud = series.style == "points" and len(series.x) > MANY_POINTS
            axes.errorbar(
                series.x,
                series.y,
                yerr=series.error,
                fmt=MARKERS[i % len(MARKERS)] + lines[series.style],
                color=COLORS[i % len(COLORS)],
                markersize=2.5 if cloud else 4,
                linewidth=1.2,
                elinewidth=0.8,
                alpha=0.6 if cloud else 1.0,
                label=series.name,
            )
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label, title=figure.title)
        for axis, log in ((axes.xaxis, figure.x_log), (axes.yaxis, figure.y_log)):
            if log:
                axis.axes.set(**{f"{axis.axis_name}scale": "log"})
                low, high = axis.get_view_interval()
                if high / low < 300:
                    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(lambda value, place: number(value))
                axis.set_minor_formatter(NullFormatter())
        if figure.x_names:
            axes.set_xticks(range(len(figure.x_names)), figure.x_names)
        if len(figure.series) > 1:
            widest = max(len(series.name) for series in figure.series)
            columns = max(1, min(4, 110 // (widest + 6)))
            canvas.legend(loc="outside lower center", fontsize=7, ncols=columns, frameon=False)
        metadata = {"Date": None} if path.suffix in (".svg", ".pdf") else None
        canvas.savefig(path, dpi=130, metadata=metadata)
        plt.close(canvas)


def draw_all(figures: Sequence[Figure], folder: Path, suffix: str = ".svg") -> list[Path]:
    """Writes every figure into a folder and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [re.sub(r"[^\w.+-]+", "-", figure.slug) for figure in figures]
    paths = [folder / f"{name}{suffix}" for name in names]
    for figure, path in zip(figures, paths, strict=True):
        draw(figure, path)
    return paths
