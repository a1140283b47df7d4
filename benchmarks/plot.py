"""Draws README's picture of speed from the machines' results: tokens/s over bits per parameter.

`python benchmarks/plot.py` writes benchmarks/results/MACHINE.svg.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
COLORS = {
    "kbit": "#0b6e4f",
    "llama.cpp": "#c8553d",
    "transformers": "#6c757d",
    "bitsandbytes": "#5f4bb6",
    "torch": "#e0a100",
}


def series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name they are drawn under: kbit as it generates, and what differs from that."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        engine = row["engine"]
        if engine == "xllamacpp":  # the slower build
            continue
        name = engine
        if engine.startswith("kbit"):
            name = "kbit" if row["default"] else engine.replace("-", ", ")
        found.setdefault(name, []).append(row)
    return found


def draw(axes: Axes, name: str, data: dict[str, Any]) -> None:
    for label, rows in series(data["rows"]).items():
        rows = sorted(rows, key=lambda row: row["bits_per_param"])
        x = [row["bits_per_param"] for row in rows]
        y = [row["decode_tokens_per_second"] for row in rows]
        color = COLORS[label.partition(",")[0]]
        style = ":" if "," in label else "-" if label in ("kbit", "llama.cpp") else ""
        axes.plot(x, y, style, color=color, marker="o", markersize=4, label=label)
        if "," in label:
            continue
        place: dict[str, Any] = {"xytext": (4, 4), "ha": "left"}
        if label == "llama.cpp":  # below kbit's, and many of about the same size
            place = {"xytext": (2, -4), "ha": "right", "va": "top", "rotation": 55}
        for row, across, up in zip(rows, x, y, strict=True):
            axes.annotate(row["type"].removesuffix("-b64"), (across, up), fontsize=6, color=color,
                          textcoords="offset points", **place)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, 3, 4, 6, 8, 16, 32], ["2", "3", "4", "6", "8", "16", "32"])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bits per parameter, measured")
    axes.set_ylabel("tokens per second, decoding")
    axes.set_title(f"{name}, {data['environment']['cpu']}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)


def main() -> None:
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "kbit", "font.size": 8}
    for path in sorted(RESULTS.glob("*-cores.json")):
        results = json.loads(path.read_text())
        models = {name: data for name, data in results.items() if "prompt" in data}
        if not models:
            continue
        figure, all_axes = plt.subplots(1, len(models), figsize=(6.4 * len(models), 4.6))
        for axes, (name, data) in zip([all_axes] if len(models) == 1 else all_axes,
                                      models.items(), strict=True):  # fmt: skip
            draw(axes, name, data)
        figure.tight_layout()
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
