"""Records of one text as arrays: losses, paired degradations, divergences and their errors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kbit.errors import KbitError
from kbit_kernels.formats import DATA_TYPES
from kbit_kernels.spec import QuantSpec

from .laws import Points
from .records import Record
from .weights import NONE

Array = NDArray[Any]
Target = Literal["loss", "divergence"]
UNQUANTIZED = "16-bit"


def group_of(record: Record) -> str:
    """What a record's weights have in common besides the width: `nf-b64`, `int-b32+search`, ..."""
    if record.spec == NONE:
        return UNQUANTIZED
    spec = QuantSpec.parse(record.spec)
    place = str(spec).partition("-")[2]
    extra = "+search" if record.search else ""
    extra += "" if record.method == "rtn" else f"+{record.method}"
    extra += "" if record.embedding == "same" else f"+embedding {record.embedding}"
    return f"{spec.dtype}-{place}{extra}"


def group_order(group: str) -> tuple[int, int, str]:
    """Key that sorts groups: by data type as in the table of types, block, and the rest."""
    dtype, _, place = group.partition("-")
    block = re.match(r"b(\d+)", place)
    known = list(DATA_TYPES)
    return known.index(dtype) if dtype in known else -1, int(block[1]) if block else 0, place


def width_of(record: Record) -> int:
    """k, 16 for the unquantized model."""
    return 16 if record.spec == NONE else QuantSpec.parse(record.spec).bits


def ratio_stderr(sums: Array, sizes: Array) -> Array:
    """Standard error over documents of sum(sums) / sum(sizes) along the last axis."""
    count = sums.shape[-1]
    if count < 2:
        return np.full(sums.shape[:-1], np.nan)
    value = sums.sum(-1) / sizes.sum(-1)
    spread = ((sums - value[..., None] * sizes) ** 2).sum(-1) * count / (count - 1)
    return np.asarray(np.sqrt(spread) / sizes.sum(-1))


@dataclass(frozen=True)
class Frame:
    """R cells of one text over C documents. Every row has its unquantized model beside it.

    log_likelihood, base [R, C]: nats of this cell and of its unquantized model. kl, agree [R, C]:
    sums over tokens. tokens, bytes [R, C].
    """

    metric: str
    records: tuple[Record, ...]
    log_likelihood: Array
    base: Array
    kl: Array
    agree: Array
    tokens: Array
    bytes: Array
    orphans: int = 0  # quantized cells without a record of their unquantized model

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        return tuple(group_of(r) for r in self.records)

    @cached_property
    def widths(self) -> Array:
        return np.array([width_of(r) for r in self.records])

    @cached_property
    def bits_per_param(self) -> Array:
        return np.array([r.bits_per_param for r in self.records])

    @cached_property
    def total_bits(self) -> Array:
        return np.array([8.0 * r.bytes for r in self.records])

    @cached_property
    def quantized(self) -> Array:
        return self.widths < 16

    def select(self, keep: Callable[[Record], bool] | Sequence[bool] | Array) -> Frame:
        """The rows that a condition (or mask) keeps."""
        mask = (
            np.array([keep(r) for r in self.records], dtype=bool)
            if callable(keep)
            else np.asarray(keep, dtype=bool)
        )
        arrays = ("log_likelihood", "base", "kl", "agree", "tokens", "bytes")
        return Frame(
            self.metric,
            tuple(r for r, kept in zip(self.records, mask, strict=True) if kept),
            **{name: getattr(self, name)[mask] for name in arrays},
        )

    def loss(self, weights: Array | None = None) -> Array:
        """Nats per byte [R]; weights [C]: how often a bootstrap drew each document."""
        return -_total(self.log_likelihood, weights) / _total(self.bytes, weights)

    def base_loss(self, weights: Array | None = None) -> Array:
        """Nats per byte [R] of the unquantized models."""
        return -_total(self.base, weights) / _total(self.bytes, weights)

    def divergence(self, weights: Array | None = None) -> Array:
        """KL(unquantized || this), nats per token [R]."""
        return _total(self.kl, weights) / _total(self.tokens, weights)

    def agreement(self) -> Array:
        """Share of tokens [R] where both find the same one likeliest."""
        return self.agree.sum(1) / self.tokens.sum(1)

    def bits_per_byte(self) -> tuple[Array, Array]:
        """Value and standard error over documents [R]."""
        scale = 1 / np.log(2)
        return self.loss() * scale, ratio_stderr(-self.log_likelihood, self.bytes) * scale

    def degradation(self) -> tuple[Array, Array]:
        """Paired difference to the unquantized model in nats per byte, and its error [R]."""
        difference = self.base - self.log_likelihood
        return difference.sum(1) / self.bytes.sum(1), ratio_stderr(difference, self.bytes)

    def divergence_stderr(self) -> Array:
        return ratio_stderr(self.kl, self.tokens)

    def points(self, target: Target = "loss", weights: Array | None = None) -> Points:
        """The rows as a table for the laws. N: non-embedding parameters in millions, D: tokens in
        millions (their units are part of the fitted constants)."""
        runs = {r.model: f"{r.family} {r.non_embedding}" for r in self.records}
        models = tuple(runs)
        groups = tuple(dict.fromkeys(self.groups))
        tokens = np.array([r.training_tokens or np.nan for r in self.records], dtype=float)
        if target == "loss":
            loss, base = self.loss(weights), self.base_loss(weights)
        else:
            loss = np.maximum(self.divergence(weights), 1e-12)
            base = np.zeros(len(self))
        return Points(
            params=np.array([float(r.non_embedding) for r in self.records]),
            tokens=tokens,
            bits=self.widths.astype(float),
            group=np.array([groups.index(g) for g in self.groups], dtype=np.int64),
            loss=loss,
            base=base,
            model=np.array([models.index(r.model) for r in self.records], dtype=np.int64),
            groups=groups,
            models=models,
            runs=tuple(runs.values()),
            n_unit=1e6,
            d_unit=1e6,
        )


def _total(values: Array, weights: Array | None) -> Array:
    return np.asarray(values.sum(1) if weights is None else values @ weights)


def _newest(records: Sequence[Record]) -> list[Record]:
    """Without what was measured on another text, or on a model before it was trained anew."""
    text, model = "", dict[str, str]()
    for r in sorted(records, key=lambda r: r.made.get("time", "")):
        text = str(r.identity["metric"].get("text"))
        model[r.model] = str(r.identity["model"])
    return [
        r
        for r in records
        if str(r.identity["metric"].get("text")) == text
        and str(r.identity["model"]) == model[r.model]
    ]


def frame(records: Iterable[Record], metric: str) -> Frame:
    """All successful cells of a text. KbitError if there are none."""
    ok = _newest([r for r in records if r.status == "ok" and r.metric == metric and r.documents])
    plain = {
        (r.model, str(r.identity["model"]), str(r.identity["metric"])): r
        for r in ok
        if r.spec == NONE
    }
    rows, bases, orphans = [], [], 0
    count = max((len(r.documents.tokens) for r in ok if r.documents), default=0)
    for r in ok:
        base = plain.get((r.model, str(r.identity["model"]), str(r.identity["metric"])))
        assert r.documents is not None
        if base is None or len(r.documents.tokens) != count:
            orphans += 1
            continue
        rows.append(r)
        bases.append(base)
    if not rows:
        raise KbitError(
            f"no finished cells of the text {metric!r} with their unquantized model; run "
            "`kbit sweep` first, or look at the failures it reports"
        )
    documents = [r.documents for r in rows if r.documents]

    def stacked(name: str) -> Array:
        return np.array([getattr(d, name) for d in documents], dtype=float)

    return Frame(
        metric,
        tuple(rows),
        stacked("log_likelihood"),
        np.array([b.documents.log_likelihood for b in bases if b.documents], dtype=float),
        stacked("kl"),
        stacked("agree"),
        stacked("tokens"),
        stacked("bytes"),
        orphans,
    )


def text_metrics(records: Iterable[Record]) -> list[str]:
    """Names of the texts among the records, the one with most cells first."""
    cells = Counter(r.metric for r in records if r.documents is not None)
    return [name for name, _ in sorted(cells.items(), key=lambda item: (-item[1], item[0]))]


def task_metrics(records: Iterable[Record]) -> list[str]:
    """Names of the tasks among the records, in their order."""
    return list(dict.fromkeys(r.metric for r in records if r.items is not None))
