"""One model at one spec, in memory: the source's tensors with the quantized ones in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.engine.tokenizer import Tokenizer
from kbit.errors import KbitError
from kbit.models import describe_checkpoint
from kbit.quantize.methods import get_method
from kbit.quantize.recipe import KEEP, Recipe, Rule
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import QuantizedTensor

NONE = "none"
_TABLES = ("embedding", "head")


@dataclass(frozen=True)
class Treatment:
    """What is done to a model's weights.

    spec: of the linear layers, `none` for the unquantized model. embedding: of embedding and head:
    `same`, `keep`, or a spec. method, search: as in `kbit quantize`.
    """

    spec: str = NONE
    method: str = "rtn"
    search: bool = False
    embedding: str = "same"

    @property
    def quantized(self) -> bool:
        return self.spec != NONE

    def recipe(self) -> Recipe:
        """The recipe of `kbit quantize` that does the same."""
        if self.embedding == "same":
            return Recipe()
        table = None if self.embedding == KEEP else QuantSpec.parse(self.embedding)
        return Recipe((Rule((), _TABLES, table),))


class Source:
    """An unquantized model: its checkpoint, description and tokenizer, opened once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: Checkpoint = open_checkpoint(path)
        if self.checkpoint.quantization is not None:
            raise KbitError(f"{path}: is quantized already; a study starts from the original")
        self.decoder = describe_checkpoint(self.checkpoint)
        self.tokenizer = Tokenizer.load(path, self.checkpoint.config)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hashes of the weights, the configuration and the tokenizer."""
        weights = hashlib.sha256()
        for name in sorted(self.decoder.tensors):
            tensor = self.checkpoint.tensor(name)
            assert isinstance(tensor, np.ndarray)
            weights.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            weights.update(np.ascontiguousarray(tensor).view(np.uint8).data)
        files = {
            "config": ("config.json",),
            "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
        }
        found = {"weights": weights.hexdigest()[:24]}
        for key, names in files.items():
            digest = hashlib.sha256()
            for name in names:
                if (self.path / name).exists():
                    digest.update((self.path / name).read_bytes())
            found[key] = digest.hexdigest()[:24]
        return found

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return sum(int(np.prod(info.shape)) for info in self.decoder.tensors.values())

    @property
    def non_embedding(self) -> int:
        """Parameters outside of embedding, positions and head."""
        tables = {*self._tables, *self._positions}
        return self.parameters - sum(
            int(np.prod(self.decoder.tensors[name].shape)) for name in tables
        )

    @property
    def _tables(self) -> list[str]:
        return [name for name, info in self.decoder.tensors.items() if info.role in _TABLES]

    @property
    def _positions(self) -> list[str]:
        positions = self.decoder.positions
        return [] if positions is None else [positions.weight]

    def treat(self, treatment: Treatment) -> Treated:
        """The weights under a treatment; quantizing happens here, once."""
        quantized: dict[str, QuantizedTensor] = {}
        if treatment.quantized:
            roles = {
                name: info.role
                for name, info in self.decoder.tensors.items()
                if info.role in ("linear", *_TABLES)
            }
            specs = treatment.recipe().assign(roles, QuantSpec.parse(treatment.spec))
            method = get_method(treatment.method)
            for name, spec in specs.items():
                if spec is None:
                    continue
                w = self.checkpoint.tensor(name)
                assert isinstance(w, np.ndarray)
                w = w.T if self.decoder.tensors[name].transposed else w
                prepared = method.prepare(w, spec)
                quantized[name] = method.quantize(w, spec, treatment.search, prepared)
        return Treated(self, quantized)


class Treated:
    """`kbit.engine.executor.Weights`: what an executor reads."""

    def __init__(self, source: Source, quantized: Mapping[str, QuantizedTensor]) -> None:
        self._source = source
        self._quantized = quantized
        self.path = source.checkpoint.path
        self.config: dict[str, Any] = source.checkpoint.config

    def names(self) -> list[str]:
        return self._source.checkpoint.names()

    def tensor(self, name: str) -> np.ndarray | QuantizedTensor:
        found = self._quantized.get(name)
        return self._source.checkpoint.tensor(name) if found is None else found

    def nbytes(self, tables_only: bool = False) -> int:
        """Bytes of all weights as they are stored (a tied head once), or of the tables alone."""
        names = self._source._tables if tables_only else list(self._source.decoder.tensors)
        return sum(
            self._quantized[name].nbytes
            if name in self._quantized
            else self._source.checkpoint.nbytes(name)
            for name in names
        )
