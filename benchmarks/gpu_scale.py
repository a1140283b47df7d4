"""How large a run of gpu.py is, and what it goes through."""

import multiprocessing
from dataclasses import dataclass

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
DTYPES = ("int", "uint", "nf", "fp")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SHAPES = ((8192, 8192), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Scale:
    """How large everything is: the real run, or a dry one on a CPU."""

    device: str = "cuda"
    shapes: tuple[tuple[int, int], ...] = SHAPES
    rows: tuple[int, ...] = ROWS
    widths: tuple[int, ...] = WIDTHS
    gate_shape: tuple[int, int] = (1040, 4096)
    copy_bytes: int = 1 << 30
    rounds: int = 9


DRY = Scale("cpu", ((48, 512),), (1, 16), (4,), (24, 512), 1 << 20, 1)
