"""kbit: store a language model's weights in 2 to 8 bits, run it, and measure what the bits cost.

    import kbit
    kbit.quantize("path/to/model", "model-nf4-b64", bits=4)
    model = kbit.load("model-nf4-b64")
    print(model.generate("The capital of France is")[0].text)

Attributes are imported on first use, so that `import kbit` and the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kbit.engine.model import Model, load
    from kbit.errors import KbitError
    from kbit.quantize.api import quantize

__version__ = "0.1.0"

_HOME = {
    "load": "kbit.engine.model",
    "Model": "kbit.engine.model",
    "quantize": "kbit.quantize.api",
    "KbitError": "kbit.errors",
}
__all__ = ["KbitError", "Model", "__version__", "load", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kbit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
