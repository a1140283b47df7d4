"""The seam between a described decoder and what computes it: numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kbit.errors import KbitError
from kbit.models import Decoder, describe_checkpoint
from kbit_kernels.tensor import QuantizedTensor


class Weights(Protocol):
    """The part of a checkpoint (kbit.checkpoint.reader.Checkpoint) that an executor reads."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    def names(self) -> list[str]: ...
    def tensor(self, name: str) -> np.ndarray | QuantizedTensor: ...


class Cache(Protocol):
    """Keys and values of the tokens seen so far, one row a sequence."""

    @property
    def capacity(self) -> int: ...
    @property
    def lengths(self) -> Sequence[int]: ...
    def truncate(self, sequence: int, length: int) -> None:
        """Forget a sequence's tokens from position `length` on."""
        ...


class Executor(Protocol):
    """Computes logits; `torch` and `native` are interchangeable.

    One that can choose tokens where the logits lie has a `sample` too; see CudaExecutor.
    """

    name: str
    decoder: Decoder

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty cache for `batch` sequences of up to `capacity` tokens each."""
        ...

    def forward(
        self, tokens: Sequence[np.ndarray], cache: Any, *, all_logits: bool = False
    ) -> list[np.ndarray]:
        """Append tokens[b] (int [T_b], ragged, may be empty) to sequence b and compute.

        Returns per sequence float32 [V], the logits after its last new token (an empty array [0]
        where T_b = 0), or [T_b, V] with all_logits. Raises KbitError when a sequence would
        outgrow the cache or a token is outside the vocabulary.
        """
        ...


BACKENDS = {"native": "kbit.engine.native_executor", "torch": "kbit.engine.torch_executor"}
"""Name -> module, best first. A backend module has `supports(decoder, device) -> (bool, reason)`
and `load(checkpoint, decoder, device, **options) -> Executor`; it is imported only when asked."""


def backend_support(decoder: Decoder, device: str = "cpu") -> dict[str, tuple[bool, str]]:
    """Backend name -> (whether it runs this decoder on this device, why or why not)."""
    return {name: _supports(name, decoder, device) for name in BACKENDS}


def _supports(name: str, decoder: Decoder, device: str) -> tuple[bool, str]:
    try:
        return import_module(BACKENDS[name]).supports(decoder, device)
    except ImportError as error:
        if error.name == "torch":
            return False, "it needs torch, which is an extra: pip install 'kbit[torch]'"
        return False, f"cannot be imported ({error})"


def load_executor(
    checkpoint: Weights, backend: str = "auto", device: str = "cpu", **options: Any
) -> Executor:
    """The executor for a checkpoint.

    backend: `native` (CPU, C++), `torch`, or `auto`: the first of them that can run this decoder
    on this device. options go to the backend; `dtype` ("fp32", "bf16", "fp16") is common to both.
    Raises KbitError with each backend's reason when none can, or the one asked for by name can't.
    """
    if backend != "auto" and backend not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise KbitError(f"backend {backend!r} is not known (known: {known})")
    decoder = describe_checkpoint(checkpoint)
    reasons = []
    for name in BACKENDS if backend == "auto" else (backend,):
        able, reason = _supports(name, decoder, device)
        if able:
            load = import_module(BACKENDS[name]).load
            taken = [o for o in signature(load).parameters.values() if o.kind is o.KEYWORD_ONLY]
            names = [o.name for o in taken]
            for option in options.keys() - set(names):
                raise KbitError(
                    f"the {name} executor has no option {option!r} (its options: "
                    f"{', '.join(names)})"
                )
            return load(checkpoint, decoder, device, **options)
        reasons.append(f"{name}: {reason}")
    raise KbitError(
        f"no executor can run this {decoder.model_type} model on {device!r} ({'; '.join(reasons)})"
    )


def check_cache_size(decoder: Decoder, batch: int, capacity: int) -> None:
    """Raise KbitError if the decoder can't have a cache of this size."""
    if batch < 1 or capacity < 1:
        raise KbitError(
            f"a cache needs a batch and a capacity of 1 or more, not {batch}, {capacity}"
        )
    if decoder.positions is not None and capacity > decoder.max_positions:
        raise KbitError(
            f"{capacity} tokens were asked for, but this {decoder.model_type} model has "
            f"learned positions for {decoder.max_positions} only"
        )
