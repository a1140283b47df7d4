"""Numbers and tables in a page of findings, filled in from a study's fits.

A place for one is written `<!-- =NAME ARGUMENT ... --> <!-- / -->` in Markdown; see FILLERS for the
names. `kbit report --findings` fills them, so that what the page says is what was fitted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from kbit.errors import KbitError

Fits = dict[str, Any]
_PLACE = re.compile(r"(<!-- =(.+?) -->).*?(<!-- / -->)", re.DOTALL)


def fill(text: str, fits: Fits) -> str:
    """The text with every place filled. KbitError names a place that the fits have nothing for."""

    def filled(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        try:
            return match[1] + FILLERS[name](fits, *arguments) + match[3]
        except (KeyError, StopIteration, TypeError) as error:
            raise KbitError(
                f"the findings ask for {match[2]!r}, which the fits lack ({error!r}); known names: "
                f"{', '.join(FILLERS)}"
            ) from None

    return _PLACE.sub(filled, text)


def plain(text: str) -> str:
    """The text without its comments."""
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def _interval(value: float, low: float | None, high: float | None, digits: str) -> str:
    span = "" if low is None or high is None else f" [{low:{digits}}, {high:{digits}}]"
    return f"{value:{digits}}{span}"


def _study(fits: Fits, metric: str, target: str, group: str) -> dict[str, Any]:
    return next(
        s
        for s in fits["laws"]
        if (s["metric"], s["target"], s["groups"]) == (metric, target, [group])
    )


def _law(fits: Fits, metric: str, target: str, group: str, law: str) -> dict[str, Any]:
    return next(r for r in _study(fits, metric, target, group)["laws"] if r["law"] == law)


def estimate(fits: Fits, metric: str, target: str, group: str, law: str, name: str) -> str:
    """One constant of a law with its interval."""
    found = next(
        e for e in _law(fits, metric, target, group, law)["estimates"] if e["name"] == name
    )
    return _interval(found["value"], found["low"], found["high"], ".2f")


def off(fits: Fits, metric: str, target: str, group: str, law: str) -> str:
    """By which factor a law misses the held-out model."""
    return f"x{math.exp(_law(fits, metric, target, group, law)['held_out_log_error']):.2f}"


def laws(fits: Fits) -> str:
    """Every comparison of laws: factor on the held-out model, AIC; the best in bold."""
    first = fits["laws"][0]["laws"]
    names = [
        r["law"] if r["hypothesis"] == r["law"] else f"{r['hypothesis']} {r['law']}" for r in first
    ]
    rows = []
    for s in fits["laws"]:
        errors = [r["held_out_log_error"] for r in s["laws"]]
        best = min((e for e in errors if e is not None), default=None)
        cells = []
        for r, error in zip(s["laws"], errors, strict=True):
            cell = "not fitted" if error is None else f"x{math.exp(error):.2f}"
            cell = f"**{cell}**" if error is not None and error == best else cell
            cells.append(cell if r["aic"] is None else f"{cell} ({r['aic']:.0f})")
        rows.append([f"{s['metric']}, {s['target']}, {', '.join(s['groups'])}", *cells])
    return _table(["held out", *names], rows)


def saved(fits: Fits, metric: str, slug: str, group: str, bits: str) -> str:
    """Bits that a group saves at one width, with its interval."""
    w = next(
        w
        for w in fits["worth_in_bits"][metric][slug]
        if (w["group"], w["bits"]) == (group, int(bits))
    )
    return _interval(w["saved"], w["low"], w["high"], "+.2f")


def worth(fits: Fits, metric: str, slug: str) -> str:
    """What types, blocks or search are worth in bits."""
    found = fits["worth_in_bits"][metric][slug]
    widths = sorted({w["bits"] for w in found})
    cells = {
        (w["group"], w["bits"]): _interval(w["saved"], w["low"], w["high"], "+.2f") for w in found
    }
    if not found:
        raise KeyError(slug)
    rows = [
        [f"`{group}`", *(cells.get((group, k), "") for k in widths)]
        for group in dict.fromkeys(w["group"] for w in found)
    ]
    return _table([metric, *(f"k = {k}" for k in widths)], rows)


def best(fits: Fits, metric: str) -> str:
    """Which width is best at which size, how often it won, and what the second costs."""
    found = fits["best_width"][metric]
    rows = []
    for b in found[:: max(1, len(found) // 8)]:
        order = sorted(b["loss"], key=b["loss"].__getitem__)
        behind = (b["loss"][order[1]] - b["loss"][order[0]]) / math.log(2)
        rows.append(
            [
                f"{b['total_bits'] / 8000:.0f} kB",
                f"{b['best']}-bit",
                f"{b['share'][str(b['best'])]:.0%}",
                f"{b['loss'][order[0]] / math.log(2):.4f}",
                f"{order[1]}-bit, +{behind:.4f}",
            ]
        )
    return _table([metric, "best", "of draws", "bits per byte", "second"], rows)


def cost(fits: Fits, metric: str, group: str, *models: str) -> str:
    """What 2, 3, 4 and 5 bits cost each model: bits per byte, divergence, same likeliest token."""
    cells = {(w["model"], w["bits"]): w for w in fits["widths"][metric] if w["group"] == group}
    names = [m for m in dict.fromkeys(m for m, _ in cells) if not models or m.startswith(models)]
    rows = [
        [
            model,
            *(
                f"{w['change']:+.4f} ± {w['change_stderr']:.4f}; {w['kl']:.2g}; {w['agree']:.0%}"
                for k in (2, 3, 4, 5)
                for w in [cells[model, k]]
            ),
        ]
        for model in names
    ]
    return _table([f"{metric}, `{group}`", *(f"k = {k}" for k in (2, 3, 4, 5))], rows)


FILLERS: dict[str, Callable[..., str]] = {
    f.__name__: f for f in (estimate, off, laws, saved, worth, best, cost)
}
