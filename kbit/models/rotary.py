"""Rotary positions (Su et al. 2021) and their scalings, as numbers: no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Scaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class Rotary:
    """Rotation of the first `dim` entries of each head's query and key; the rest passes through.

    With half = dim / 2, entries e and e + half (e < half) form a pair ("rotate half", the order of
    Hugging Face checkpoints) and turn by the angle a = position * inverse_frequencies[e]:

        x'[e]        = x[e] cos(a) - x[e + half] sin(a)
        x'[e + half] = x[e + half] cos(a) + x[e] sin(a)

    `tables` gives cos and sin with `magnitude` multiplied in; executors need nothing else.
    The scalings `dynamic` and `longrope` depend on the length of the text. Their frequencies are
    those of the capacity of the cache (the longest text it can come to hold), so that keys already
    in the cache stay valid; up to `original_positions` nothing changes.

    `factor` stretches positions (linear, dynamic, llama3, yarn); `magnitude` multiplies cos and
    sin (yarn's and longrope's attention factor). The other fields belong to the scaling they
    begin with: low_frequency/high_frequency to llama3; beta_fast, beta_slow, truncate to yarn;
    short_factors and long_factors [half] to longrope.
    """

    dim: int
    theta: float
    scaling: Scaling = "default"
    factor: float = 1.0
    original_positions: int = 0
    magnitude: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def inverse_frequencies(self, capacity: int) -> np.ndarray:
        """float32 [half]: radians a position, for a cache that holds up to `capacity` tokens."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float64) / self.dim
        plain = self.theta**-exponents
        match self.scaling:
            case "default":
                result = plain
            case "linear":
                result = plain / self.factor
            case "dynamic":
                result = self._dynamic_theta(capacity) ** -exponents
            case "llama3":
                result = self._llama3(plain)
            case "yarn":
                result = self._yarn(plain)
            case "longrope":
                long = capacity > self.original_positions
                result = plain / np.array(self.long_factors if long else self.short_factors)
        return result.astype(np.float32)

    def tables(self, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """cos, sin: float32 [capacity, half], row p for position p.

        The angle is rounded to fp32 before the cosine, as in training code, so that long texts
        agree with it.
        """
        positions = np.arange(capacity, dtype=np.float32)
        angles = positions[:, None] * self.inverse_frequencies(capacity)
        scale = np.float32(self.magnitude)
        return np.cos(angles) * scale, np.sin(angles) * scale

    def _dynamic_theta(self, capacity: int) -> float:
        """NTK-aware base (bloc97, emozilla): theta grows with the length beyond the trained one."""
        length = max(capacity, self.original_positions)
        stretch = self.factor * length / self.original_positions - (self.factor - 1)
        return self.theta * stretch ** (self.dim / (self.dim - 2))

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Llama 3.1: long waves stretched by `factor`, short ones kept, a linear blend between."""
        turns = self.original_positions * plain / (2 * math.pi)
        low, high = self.low_frequency, self.high_frequency
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return keep * plain + (1 - keep) * plain / self.factor

    def _yarn(self, plain: np.ndarray) -> np.ndarray:
        """YaRN (Peng et al. 2023), section 3.2: entries that turn more than beta_fast times over
        the trained length are kept, fewer than beta_slow interpolated, a ramp between."""

        def entry(turns: float) -> float:
            waves = math.log(self.original_positions / (turns * 2 * math.pi))
            return self.dim * waves / (2 * math.log(self.theta))

        low, high = entry(self.beta_fast), entry(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(self.dim // 2) - low) / (high - low), 0.0, 1.0)
        return (1 - ramp) * plain + ramp * plain / self.factor
