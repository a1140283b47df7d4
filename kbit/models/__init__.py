"""Descriptions of decoders: one file per architecture, named after its Hugging Face `model_type`.

Torch-free. `describe(config)` turns a config.json into a `Decoder` (base.py), which executors run
and the quantizer reads; `describe_checkpoint(checkpoint)` also settles and checks tensor names.
To add an architecture, add a file here whose builder is registered under its `model_type`.
"""

from importlib import import_module
from pkgutil import iter_modules

from kbit.models.base import (
    Attention,
    Decoder,
    Layer,
    Linear,
    Mlp,
    Norm,
    Positions,
    Rows,
    TensorInfo,
)
from kbit.models.registry import describe, describe_checkpoint, known_model_types, register
from kbit.models.rotary import Rotary

__all__ = [
    "Attention",
    "Decoder",
    "Layer",
    "Linear",
    "Mlp",
    "Norm",
    "Positions",
    "Rotary",
    "Rows",
    "TensorInfo",
    "describe",
    "describe_checkpoint",
    "known_model_types",
    "register",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
