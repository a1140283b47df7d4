"""The truth: every operation in plain numpy, exact, for every spec."""

from kbit_kernels.reference.dequantize import dequantize, linear
from kbit_kernels.reference.quantize import quantize

__all__ = ["available", "dequantize", "linear", "name", "quantize", "supports"]

name = "reference"


def available() -> tuple[bool, str]:
    """Always there."""
    return True, "plain numpy; exact, slow"


def supports(tensor: object) -> tuple[bool, str]:
    """Takes every tensor."""
    return True, "takes every spec"
