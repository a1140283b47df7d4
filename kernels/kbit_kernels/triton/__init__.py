"""The GPU backend: Triton kernels for every data type at every width, on torch tensors.

Nothing here imports torch or triton until an operation is asked for.
"""

from typing import TYPE_CHECKING, Any

from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import QuantizedTensor

if TYPE_CHECKING:
    from kbit_kernels.triton.device import DeviceTensor, dequantize, fused_linear, linear, prepare

__all__ = [
    "DeviceTensor",
    "available",
    "dequantize",
    "fused_linear",
    "linear",
    "name",
    "prepare",
    "supports",
]

name = "triton"


def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and the GPU or why not."""
    from importlib.util import find_spec

    for package in ("torch", "triton"):
        if find_spec(package) is None:
            return False, f"{package} is not installed (pip install 'kbit[gpu]')"
    import torch

    if not torch.cuda.is_available():
        return False, "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and major < 8:
        return False, f"{torch.cuda.get_device_name()} is sm_{major}{minor}; sm_80 or newer needed"
    return True, torch.cuda.get_device_name()


def supports(tensor: QuantizedTensor | QuantSpec) -> tuple[bool, str]:
    """Takes every spec and shape."""
    return True, "takes every spec"


def __getattr__(attribute: str) -> Any:
    if attribute in ("DeviceTensor", "dequantize", "fused_linear", "linear", "prepare"):
        from kbit_kernels.triton import device

        return getattr(device, attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
