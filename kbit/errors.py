"""The error that a user can meet (defined with the formats, used by every layer above)."""

from kbit_kernels.errors import KbitError

__all__ = ["KbitError"]
