"""k-bit tensors and the operations on them; nothing of checkpoints or tokens."""

from kbit_kernels.errors import KbitError
from kbit_kernels.ops import backends, dequantize, linear, quantize
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import QuantizedTensor, expected_parts

__all__ = [
    "KbitError",
    "QuantSpec",
    "QuantizedTensor",
    "backends",
    "dequantize",
    "expected_parts",
    "linear",
    "quantize",
]
