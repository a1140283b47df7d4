"""Quantizing a checkpoint: recipe (which tensor gets which spec), methods, the pipeline.

`kbit.quantize` is this package and also the function `kbit.quantize.api.quantize`: importing any of
its modules makes Python bind the package to that name, so the package itself can be called.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from kbit.quantize.api import quantize

        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
