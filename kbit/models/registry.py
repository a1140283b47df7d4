"""`model_type` -> architecture. Each architecture file registers one builder under its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kbit.errors import KbitError
from kbit.models.base import Decoder
from kbit.models.config import Config


@dataclass(frozen=True)
class Names:
    """How a checkpoint names its tensors: the prefix before every name but the head's, and (where
    known) the names that are stored."""

    prefix: str
    stored: frozenset[str] | None = None

    def head(self, embedding: str, tied: bool, *candidates: str) -> tuple[str, bool]:
        """(name of the head's weight, whether it is the embedding).

        A head that is stored is used even where the config calls it tied, as transformers does
        when the two differ; `candidates` are the head's names, the usual one first.
        """
        found = next((c for c in candidates if self.stored and c in self.stored), None)
        if found is not None:
            return found, False
        return (embedding, True) if tied else (candidates[0], False)


Builder = Callable[[Config, Names], Decoder]


class Readable(Protocol):
    """The part of a checkpoint that a description needs."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    def names(self) -> list[str]: ...


@dataclass(frozen=True)
class Architecture:
    build: Builder
    prefixes: tuple[str, ...]


_KNOWN: dict[str, Architecture] = {}


def register(model_type: str, *prefixes: str) -> Callable[[Builder], Builder]:
    """Register `build(config, names) -> Decoder` for a Hugging Face `model_type`.

    `prefixes` are the beginnings of tensor names under which checkpoints are found, the usual
    one first ("model." and "", say).
    """

    def decorate(build: Builder) -> Builder:
        if model_type in _KNOWN:
            raise ValueError(f"two architectures are registered as {model_type!r}")
        _KNOWN[model_type] = Architecture(build, prefixes)
        return build

    return decorate


def known_model_types() -> list[str]:
    """Every `model_type` that kbit runs, sorted."""
    return sorted(_KNOWN)


def describe(config: Mapping[str, Any], names: Collection[str] | None = None) -> Decoder:
    """The decoder that a config.json means.

    With `names` (the checkpoint's tensor names) the prefix of the names is found out, a head that
    is stored is used even if the config calls it tied, and missing or unknown tensors are refused.
    Raises KbitError for an unknown model_type or option, by name.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _KNOWN:
        hint = ""
        if "text_config" in config:
            hint = "; a multimodal model's text part is not read out of it"
        raise KbitError(
            f"config.json: model_type {model_type!r} is not known to kbit{hint} "
            f"(known: {', '.join(known_model_types())})"
        )
    architecture = _KNOWN[model_type]
    stored = frozenset(names) if names is not None else None
    decoder = _build(architecture, config, Names(architecture.prefixes[0], stored))
    if stored is None:
        return decoder
    for prefix in architecture.prefixes[1:]:
        if decoder.embedding in stored:
            break
        decoder = _build(architecture, config, Names(prefix, stored))
    if decoder.embedding not in stored:  # so that the error tells the usual name
        decoder = _build(architecture, config, Names(architecture.prefixes[0], stored))
    decoder.check_names(stored)
    return decoder


def _build(architecture: Architecture, values: Mapping[str, Any], names: Names) -> Decoder:
    config = Config(values, "config.json")
    decoder = architecture.build(config, names)
    config.finish()
    return decoder


def describe_checkpoint(checkpoint: Readable, names: Collection[str] | None = None) -> Decoder:
    """`describe` with the checkpoint's own names, or these, and its path in the errors: the way
    that quantizer and executors use."""
    try:
        return describe(checkpoint.config, checkpoint.names() if names is None else names)
    except KbitError as error:
        raise KbitError(f"{checkpoint.path}: {error}") from None
