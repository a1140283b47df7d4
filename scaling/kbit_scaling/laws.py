"""The laws: formulas for the loss of a quantized model, nothing of records or optimizers.

Every law predicts the logarithm of a loss from a `Points` table and a parameter vector. The k-bit
laws are laws of the *degradation* delta: the predicted loss is `base + delta`, where `base` is the
measured loss of the same model unquantized. So all laws see the same data and the same target,
and none is helped or hurt by how well a curve through the unquantized models happens to fit.
With `base = 0` the same laws describe a divergence (KL to the unquantized model), which is the
degradation itself.

| name       | delta(N, D, P)                        | from                                      |
|------------|---------------------------------------|-------------------------------------------|
| offset     | table[k, group]                       | H0, Dettmers & Zettlemoyer 2212.09720     |
| effective  | A N^-alpha (eff[k, group]^-alpha - 1) | H1, Frantar et al. 2502.16440             |
| kumar      | C D^gD N^-gN exp(-P / g)              | H2, Kumar et al. 2411.04330               |
| ouyang     | C D^b N^-a P^-g                       | H3, Ouyang et al. 2411.17691              |
| free       | C[k, group] D^b[k] N^-a[k]            | baseline: no relation between the widths  |

N is the number of non-embedding parameters, D the number of training tokens, k the nominal bits.
In `kumar` and `ouyang` P = k + shift[group]: what a data type, block size or method is worth is
measured in bits, against the first group, whose shift is 0.

Positive constants are fitted as logarithms (`log_` in front of the name), so that the search is
unconstrained; `Law.natural` turns them back. N and D enter as ratios to `Points.n_unit` and
`Points.d_unit` in order to keep the problem well conditioned.

Formulas are written for parameter arrays [..., p] (a batch in front) and hold for complex numbers,
because `fit` takes exact gradients by a complex step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kbit.errors import KbitError

Array = NDArray[Any]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Points:
    """n observations, one a row; loss and base in one unit (nats per byte in kbit's studies).

    params, tokens [n] float: N and D. bits [n] float: k. group [n] int: index into `groups`.
    loss [n] > 0. base [n] >= 0: loss of the unquantized model, 0 if `loss` is a divergence.
    model [n] int: index into `models`. runs: the training run of each of `models` (its own if
    empty), which is what a bootstrap over models draws.
    """

    params: Array
    tokens: Array
    bits: Array
    group: Index
    loss: Array
    base: Array
    model: Index
    groups: tuple[str, ...] = ("all",)
    models: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    n_unit: float = 1.0
    d_unit: float = 1.0

    def __post_init__(self) -> None:
        n = len(self.loss)
        for name in ("params", "tokens", "bits", "group", "base", "model"):
            if getattr(self, name).shape != (n,):
                raise KbitError(f"points: {name} has shape {getattr(self, name).shape}, not ({n},)")
        if n and not (np.all(np.isfinite(self.loss)) and np.all(self.loss > 0)):
            raise KbitError("points: a loss is not a positive finite number; leave those cells out")

    def __len__(self) -> int:
        return len(self.loss)

    def select(self, rows: Array) -> Points:
        """The observations `rows` (mask or indices), with the same groups, models and units."""
        names = ("params", "tokens", "bits", "group", "loss", "base", "model")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @property
    def log_n(self) -> Array:
        return np.log(self.params / self.n_unit)

    @property
    def log_d(self) -> Array:
        return np.log(self.tokens / self.d_unit)

    @property
    def widths(self) -> Array:
        return np.unique(self.bits)


def log_sum_exp(*terms: Array) -> Array:
    """log(sum(exp(terms))), elementwise, for real or complex terms; -inf is allowed."""
    stacked = np.stack(np.broadcast_arrays(*terms))
    top = stacked.real.max(axis=0)
    return np.asarray(top + np.log(np.exp(stacked - top).sum(axis=0)))


def _log_base(points: Points) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(points.base)


@dataclass(frozen=True)
class Parameter:
    """One fitted number: its name and the grid of values that a search starts from."""

    name: str
    starts: tuple[float, ...]

    @property
    def natural_name(self) -> str:
        return self.name.removeprefix("log_")

    def natural(self, value: float) -> float:
        """The value as it stands in the paper's formula."""
        return float(np.exp(min(value, 700.0))) if self.name.startswith("log_") else float(value)


class Law(ABC):
    """A formula. `bind(points)` fixes tables and units; the rest works on the bound law."""

    name: str = ""
    title: str = ""

    def bind(self, points: Points) -> Law:
        """The law with its tables laid out for these points' widths and groups."""
        return self

    @abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """The fitted numbers, in the order of the parameter vector."""

    @abstractmethod
    def log_loss(self, theta: Array, points: Points) -> Array:
        """theta [..., p] -> log predicted loss [..., n]."""

    def extra_parameters(self) -> int:
        """Numbers taken from the data elsewhere, which AIC has to count as well."""
        return 0


@dataclass(frozen=True)
class Chinchilla(Law):
    """L = E + A / N^alpha + B / D^beta (the parametric form of Hoffmann et al., approach 3).

    With `data=False` the last term is left out: the base curve of a family trained alike.
    Ignores bits and base. The start grid is the one of Epoch's replication.
    """

    data: bool = True
    name: str = "chinchilla"
    title: str = "E + A/N^alpha + B/D^beta"

    def parameters(self) -> tuple[Parameter, ...]:
        tens = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
        steps = (0.0, 0.5, 1.0, 1.5, 2.0)
        e = Parameter("log_E", (-1.0, -0.5, 0.0, 0.5, 1.0))
        curve = (Parameter("log_A", tens), e, Parameter("alpha", steps))
        if not self.data:
            return curve
        return (*curve, Parameter("log_B", tens), Parameter("beta", steps))

    def log_loss(self, theta: Array, points: Points) -> Array:
        a, e, alpha = (theta[..., i : i + 1] for i in range(3))
        terms = [a - alpha * points.log_n, e]
        if self.data:
            terms.append(theta[..., 3:4] - theta[..., 4:5] * points.log_d)
        return log_sum_exp(*terms)


@dataclass(frozen=True)
class KbitLaw(Law):
    """A law of the degradation; `widths` and `groups` are what its tables are laid out for."""

    widths: tuple[float, ...] = ()
    groups: tuple[str, ...] = ()
    cells: tuple[tuple[float, int], ...] = ()
    start: tuple[float, ...] = ()
    use_tokens: bool = False

    def bind(self, points: Points) -> KbitLaw:
        """Tables over the widths and groups present, started at the observed degradations; the
        exponent of D is part of the law only if D varies and is known."""
        widths = tuple(float(k) for k in points.widths)
        pairs = zip(points.bits.tolist(), points.group.tolist(), strict=True)
        cells = tuple(sorted(set(pairs)))
        delta = np.maximum(points.loss - points.base, 1e-6 * points.loss)
        start = tuple(
            float(np.median(np.log(delta[(points.bits == k) & (points.group == g)])))
            for k, g in cells
        )
        varies = bool(np.all(np.isfinite(points.tokens)) and len(np.unique(points.tokens)) > 1)
        return replace(
            self, widths=widths, groups=points.groups, cells=cells, start=start, use_tokens=varies
        )

    def _cell(self, points: Points) -> Index:
        """Index of each point's (width, group) in `cells`; -1 where the law has no such entry."""
        return _find([k * 4096 + g for k, g in self.cells], points.bits * 4096 + points.group)

    def _width(self, points: Points) -> Index:
        return _find(list(self.widths), points.bits)

    def _label(self, k: float, group: int) -> str:
        return f"{k:g}" if len(self.groups) == 1 else f"{k:g},{self.groups[group]}"

    def _table(self, name: str) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(f"{name}[{self._label(k, g)}]", (s,))
            for (k, g), s in zip(self.cells, self.start, strict=True)
        )

    def log_loss(self, theta: Array, points: Points) -> Array:
        return log_sum_exp(_log_base(points), self.log_delta(theta, points))

    @abstractmethod
    def log_delta(self, theta: Array, points: Points) -> Array:
        """theta [..., p] -> log predicted degradation [..., n]."""

    def _known(self, index: Index, what: str) -> Index:
        if np.any(index < 0):
            raise KbitError(
                f"the law {self.name!r} has a table over {what} and was fitted without one that is "
                f"asked for; fitted widths: {', '.join(f'{k:g}' for k in self.widths)}"
            )
        return index


def _find(table: Sequence[float], values: Array) -> Index:
    """Position of every value in the ascending table, -1 where it has none."""
    keys = np.asarray(table, dtype=np.float64)
    at = np.minimum(np.searchsorted(keys, values), len(keys) - 1)
    return np.where(keys[at] == values, at, -1).astype(np.int64)


def _fields(law: KbitLaw) -> dict[str, Any]:
    names = ("widths", "groups", "cells", "start", "use_tokens")
    return {name: getattr(law, name) for name in names}


@dataclass(frozen=True)
class Offset(KbitLaw):
    """H0: the paper's picture, parallel curves; delta depends on width and group alone."""

    name: str = "offset"
    title: str = "base + offset per width and group (Dettmers & Zettlemoyer)"

    def parameters(self) -> tuple[Parameter, ...]:
        return self._table("log_offset")

    def log_delta(self, theta: Array, points: Points) -> Array:
        return theta[..., self._known(self._cell(points), "widths and groups")]


@dataclass(frozen=True)
class Effective(KbitLaw):
    """H1: a k-bit model is an unquantized one with eff*N parameters (Frantar et al.).

    `log_a` and `alpha` are those of the family's base curve E + A/N^alpha: only the data of
    unquantized models can tell A from eff. Table entries are logit(eff), so 0 < eff < 1.
    """

    log_a: float = 0.0
    alpha: float = 0.3
    name: str = "effective"
    title: str = "E + A/(N eff)^alpha (effective parameters)"

    def bind(self, points: Points) -> Effective:
        """As `KbitLaw.bind`; a start is the eff that explains the observed degradation."""
        law = super().bind(points)
        size = float(np.median(self.log_a - self.alpha * points.log_n))
        minus_log_eff = np.log1p(np.exp(np.array(law.start) - size)) / self.alpha
        start = -np.log(np.expm1(np.clip(minus_log_eff, 1e-9, 500.0)))
        return replace(self, **{**_fields(law), "start": tuple(start.tolist())})

    def parameters(self) -> tuple[Parameter, ...]:
        return self._table("logit_eff")

    def extra_parameters(self) -> int:
        return 2

    def with_base(self, theta: Array) -> Effective:
        """The law with A and alpha of a fitted base curve (`Chinchilla`'s parameter vector)."""
        return replace(self, log_a=float(theta[0]), alpha=float(theta[2]))

    def log_delta(self, theta: Array, points: Points) -> Array:
        logit = theta[..., self._known(self._cell(points), "widths and groups")]
        # eff^-alpha - 1 with eff = 1/(1+exp(-logit)): softplus(-logit) = -log(eff)
        minus_log_eff = log_sum_exp(np.zeros_like(logit), -logit)
        with np.errstate(divide="ignore", over="ignore"):
            grown = np.log(np.expm1(self.alpha * minus_log_eff))
        return self.log_a - self.alpha * points.log_n + grown


@dataclass(frozen=True)
class _Shifted(KbitLaw):
    """Shared by the two laws in which a data type is worth bits: P = k + shift[group]."""

    def _shape(self) -> tuple[Parameter, ...]:
        raise NotImplementedError

    def parameters(self) -> tuple[Parameter, ...]:
        tokens = (Parameter("gamma_D", (0.0, 0.5)),) if self.use_tokens else ()
        present = sorted({g for _, g in self.cells})
        shifts = tuple(Parameter(f"shift[{self.groups[g]}]", (0.0,)) for g in present[1:])
        return (*self._shape(), Parameter("gamma_N", (0.0, 0.3, 0.6)), *tokens, *shifts)

    def _scale(self, theta: Array, points: Points) -> Array:
        """gamma_D log D - gamma_N log N."""
        tokens = theta[..., 3:4] * points.log_d if self.use_tokens else 0.0
        return tokens - theta[..., 2:3] * points.log_n

    def _bits(self, theta: Array, points: Points) -> Array:
        """P [..., n]."""
        present = sorted({g for _, g in self.cells})
        if len(present) == 1:
            return points.bits + 0.0 * theta[..., :1]
        first = 3 + self.use_tokens
        zero = np.zeros_like(theta[..., :1])
        table = np.concatenate([zero, theta[..., first:]], axis=-1)
        return points.bits + table[..., self._known(_find(present, points.group), "groups")]


@dataclass(frozen=True)
class Kumar(_Shifted):
    """H2: delta falls exponentially with the bits, by exp(-1/gamma) for each."""

    name: str = "kumar"
    title: str = "C D^gD / N^gN exp(-P/gamma) (Kumar et al.)"

    def _shape(self) -> tuple[Parameter, ...]:
        return (Parameter("log_C", (-2.0, 2.0, 6.0)), Parameter("log_gamma", (-1.0, -0.5, 0.0)))

    def log_delta(self, theta: Array, points: Points) -> Array:
        c, log_gamma = theta[..., 0:1], theta[..., 1:2]
        return c + self._scale(theta, points) - self._bits(theta, points) * np.exp(-log_gamma)


@dataclass(frozen=True)
class Ouyang(_Shifted):
    """H3: delta falls as a power of the bits. Bits shifted below a quarter count as a quarter."""

    name: str = "ouyang"
    title: str = "C D^b / (N^a P^gamma) (Ouyang et al.)"

    def _shape(self) -> tuple[Parameter, ...]:
        return (Parameter("log_C", (-2.0, 2.0, 6.0)), Parameter("log_gamma", (1.0, 1.5, 2.0)))

    def log_delta(self, theta: Array, points: Points) -> Array:
        c, log_gamma = theta[..., 0:1], theta[..., 1:2]
        bits = self._bits(theta, points)
        bits = np.where(bits.real > 0.25, bits, 0.25)
        return c + self._scale(theta, points) - np.exp(log_gamma) * np.log(bits)


@dataclass(frozen=True)
class Free(KbitLaw):
    """Baseline: a power law in N (and D) of its own for every width; the widths share nothing."""

    name: str = "free"
    title: str = "a power law in N and D for every width on its own"

    def parameters(self) -> tuple[Parameter, ...]:
        slopes = tuple(Parameter(f"gamma_N[{k:g}]", (0.3,)) for k in self.widths)
        tokens = tuple(Parameter(f"gamma_D[{k:g}]", (0.0,)) for k in self.widths)
        return (*self._table("log_C"), *slopes, *(tokens if self.use_tokens else ()))

    def log_delta(self, theta: Array, points: Points) -> Array:
        cell = self._known(self._cell(points), "widths and groups")
        width = self._width(points) + len(self.cells)
        log_delta = theta[..., cell] - theta[..., width] * points.log_n
        if self.use_tokens:
            log_delta = log_delta + theta[..., width + len(self.widths)] * points.log_d
        return log_delta


@dataclass(frozen=True)
class LawEntry:
    """A row of the registry: what `kbit fit` fits, and its short hypothesis name."""

    label: str
    law: KbitLaw = field(repr=False)


KBIT_LAWS: dict[str, LawEntry] = {
    law.name: LawEntry(label, law)
    for label, law in (
        ("H0", Offset()),
        ("H1", Effective()),
        ("H2", Kumar()),
        ("H3", Ouyang()),
        ("free", Free()),
    )
}


def get_laws(names: Sequence[str]) -> dict[str, KbitLaw]:
    """The k-bit laws by name, all of them if `names` is empty."""
    unknown = [name for name in names if name not in KBIT_LAWS]
    if unknown:
        raise KbitError(f"no law named {unknown[0]!r}; known laws: {', '.join(KBIT_LAWS)}")
    return {name: KBIT_LAWS[name].law for name in (names or KBIT_LAWS)}
