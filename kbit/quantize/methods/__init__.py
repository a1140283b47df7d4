"""Quantization methods: every module in this folder is one, found by its file name.

A method is a module with
    summary: str                            one line for help texts
    rows_apart(spec) -> bool                whether rows may be quantized apart with the same result
    prepare(w, spec) -> dict[str, Any]      what quantize needs to know of the whole matrix
    quantize(w, spec, search, prepared) -> QuantizedTensor
with w a [N, K] array (output rows, input columns) of fp32, fp16 or bf16, read-only.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np

from kbit_kernels.errors import KbitError
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import QuantizedTensor


class Method(Protocol):
    """The module of a method; see the package's docstring."""

    summary: str

    def rows_apart(self, spec: QuantSpec) -> bool: ...
    def prepare(self, w: np.ndarray, spec: QuantSpec) -> dict[str, Any]: ...
    def quantize(
        self, w: np.ndarray, spec: QuantSpec, search: bool, prepared: dict[str, Any]
    ) -> QuantizedTensor: ...


def known_methods() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_method(name: str) -> Method:
    """The method of that name; KbitError lists the known ones."""
    if name not in known_methods():
        raise KbitError(f"unknown method {name!r}; known are {', '.join(known_methods())}")
    return cast(Method, import_module(f"{__name__}.{name}"))
