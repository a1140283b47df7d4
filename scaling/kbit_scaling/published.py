"""Published grids as studies: a CSV of family, model, params, method, bits and perplexity.

A column whose name ends in `ppl` holds perplexities per token; bits 16 is the unquantized model.
There are no documents to draw, so intervals come from a bootstrap over models alone.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.errors import KbitError

from .analysis import LawStudy, draw_models, rows_of, study_laws
from .laws import KbitLaw, Points

COLUMNS = ("family", "model", "params", "method", "bits")


@dataclass(frozen=True)
class Grid:
    """One family under one method: its quantized points and its unquantized ones."""

    family: str
    method: str
    quantized: Points
    unquantized: Points

    def resample(self, rng: np.random.Generator) -> Points:
        """The quantized points of models drawn with replacement."""
        return self.quantized.select(rows_of(self.quantized, draw_models(self.quantized, rng)))


def read_grid(path: Path) -> list[Grid]:
    """The grids of a CSV, one for each family and method; KbitError names the line at fault."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise KbitError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise KbitError(f"{path}: holds no rows")
    column = next((name for name in rows[0] if name and name.endswith("ppl")), None)
    absent = [name for name in COLUMNS if name not in rows[0]]
    if column is None or absent:
        need = ", ".join(absent or ["a column that ends in ppl"])
        raise KbitError(
            f"{path}: lacks {need}; it needs {', '.join(COLUMNS)} and one ending in ppl"
        )
    table = []
    for number, row in enumerate(rows, 2):
        try:
            size, bits, ppl = float(row["params"]), float(row["bits"]), float(row[column])
            if not (size > 0 and bits > 0 and ppl > 1):
                raise ValueError("params and bits have to be positive and a perplexity above 1")
        except (TypeError, ValueError) as error:
            raise KbitError(f"{path}: line {number}: {error}") from None
        table.append((row["family"], row["model"], size, row["method"], bits, float(np.log(ppl))))
    return _grids(table, path)


def _grids(table: list[tuple[str, str, float, str, float, float]], path: Path) -> list[Grid]:
    plain = {(f, m): (size, loss) for f, m, size, _, bits, loss in table if bits == 16}
    found = []
    for family, method in dict.fromkeys((r[0], r[3]) for r in table if r[4] != 16):
        rows = [r for r in table if r[0] == family and r[3] == method and r[4] != 16]
        for _, model, *_ in rows:
            if (family, model) not in plain:
                raise KbitError(f"{path}: {model} has no row with 16 bits to compare with")
        models = tuple(dict.fromkeys(r[1] for r in rows))
        quantized = _points(
            models,
            [(r[1], r[2], r[4], r[5], plain[family, r[1]][1]) for r in rows],
        )
        unquantized = _points(models, [(m, *_plain(plain[family, m])) for m in models])
        found.append(Grid(family, method, quantized, unquantized))
    return found


def _plain(entry: tuple[float, float]) -> tuple[float, float, float, float]:
    size, loss = entry
    return size, 16.0, loss, loss


def _points(models: tuple[str, ...], rows: list[tuple[str, float, float, float, float]]) -> Points:
    def column(i: int) -> NDArray[Any]:
        return np.array([row[i] for row in rows], dtype=float)

    return Points(
        params=column(1),
        tokens=np.full(len(rows), np.nan),
        bits=column(2),
        group=np.zeros(len(rows), np.int64),
        loss=column(3),
        base=column(4),
        model=np.array([models.index(row[0]) for row in rows], dtype=np.int64),
        models=models,
        n_unit=1e9,
    )


def published_laws(
    grid: Grid, laws: dict[str, KbitLaw], *, replicates: int = 200, seed: int = 42
) -> LawStudy:
    """All laws on one grid. Parameters are counted in billions, all of them."""
    return study_laws(
        grid.quantized,
        grid.unquantized,
        laws,
        metric=f"{grid.family}, {grid.method}",
        target="loss",
        resample=grid.resample,
        replicates=replicates,
        seed=seed,
    )
