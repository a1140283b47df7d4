"""Figures as files, with matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .figures import Figure, clipped


def draw(figure: Figure, path: Path) -> None:
    """Writes one figure; the suffix of the path (.png, .svg, .pdf) decides the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "kbit", "font.size": 9, "axes.grid": True,
                         "grid.alpha": 0.25, "axes.spines.top": False,
                         "axes.spines.right": False}):  # fmt: skip
        canvas, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        colors = plt.get_cmap("viridis")
        for i, series in enumerate(clipped(figure)):
            color = colors(i / max(1, len(figure.series) - 1) * 0.92)
            line = {"line": "-", "dashed": "--", "points": ""}[series.style]
            axes.errorbar(
                series.x,
                series.y,
                yerr=series.error,
                fmt="o" + line,
                color=color,
                markersize=2.5 if series.style == "points" else 3.5,
                linewidth=1.2,
                elinewidth=0.8,
                alpha=0.6 if series.style == "points" else 1.0,
                label=series.name,
            )
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label, title=figure.title)
        if figure.x_log:
            axes.set_xscale("log")
        if figure.y_log:
            axes.set_yscale("log")
        if len(figure.series) > 1:
            axes.legend(fontsize=7, ncols=1 + len(figure.series) // 9, framealpha=0.6)
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
