"""Keys and values of a batch of sequences, preallocated."""

from __future__ import annotations

import torch
from torch import Tensor

from kbit.engine.executor import check_cache_size
from kbit.errors import KbitError
from kbit.models import Decoder, Rotary


class TorchCache:
    """Per layer keys and values, each [batch, kv_heads, capacity, head_dim], and the rotary tables
    of this capacity (see kbit.models.Rotary).

    Filled with zeros, not left as it comes from the allocator: masked entries are read and
    multiplied by 0, which turns garbage that happens to be NaN into NaN.
    """

    def __init__(
        self, decoder: Decoder, batch: int, capacity: int, dtype: torch.dtype, device: str
    ) -> None:
        check_cache_size(decoder, batch, capacity)
        self.capacity = capacity
        self.lengths = [0] * batch
        shapes = [
            (batch, layer.attention.kv_heads, capacity, layer.attention.head_dim)
            for layer in decoder.layers
        ]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        rotaries = {layer.attention.rotary for layer in decoder.layers} - {None}
        self.rotary: dict[Rotary, tuple[Tensor, Tensor]] = {}
        for rotary in rotaries:
            assert rotary is not None
            cos, sin = rotary.tables(capacity)
            self.rotary[rotary] = (
                torch.from_numpy(cos).to(device),
                torch.from_numpy(sin).to(device),
            )

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return len(self.lengths)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget a sequence's tokens from position `length` on."""
        if not 0 <= length <= self.lengths[sequence]:
            raise KbitError(
                f"a sequence of {self.lengths[sequence]} tokens can't be cut to {length}"
            )
        self.lengths[sequence] = length
