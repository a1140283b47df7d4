"""What a preset fixes: five sizes, a vocabulary, and how many tokens everyone sees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kbit.errors import KbitError


@dataclass(frozen=True)
class Size:
    """One Llama-style model; head_dim = width / heads."""

    name: str
    width: int
    layers: int
    heads: int
    mlp: int

    @property
    def non_embedding(self) -> int:
        """Parameters without the (tied) embedding."""
        block = 4 * self.width**2 + 3 * self.width * self.mlp + 2 * self.width
        return self.layers * block + self.width

    def total(self, vocab: int) -> int:
        """Parameters with the embedding."""
        return self.non_embedding + vocab * self.width

    def peak_rate(self) -> float:
        """Peak learning rate of AdamW: falls as 1/sqrt(width), 4.6e-3 at width 48."""
        return float(0.032 / self.width**0.5)


@dataclass(frozen=True)
class Preset:
    """A family. tokens: what every size sees; checkpoints are kept at `first_tokens` and at every
    doubling of it up to `tokens`."""

    name: str
    sizes: tuple[Size, ...]
    vocab: int
    context: int
    batch: int  # windows a step
    tokens: int
    first_tokens: int
    doc: str = field(default="", compare=False)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context

    def milestones(self) -> tuple[int, ...]:
        """Token counts at which a checkpoint is kept, ascending; whole steps, the last is `tokens`
        rounded up to a whole step."""
        marks, at = [], self.first_tokens
        while at < self.tokens:
            marks.append(at)
            at *= 2
        steps = {-(-mark // self.tokens_per_step) for mark in (*marks, self.tokens)}
        return tuple(step * self.tokens_per_step for step in sorted(steps))

    def with_sizes(self, names: tuple[str, ...]) -> Preset:
        known = {size.name: size for size in self.sizes}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise KbitError(
                f"preset {self.name!r} has no size {unknown[0]!r}; its sizes: {', '.join(known)}"
            )
        return replace(self, sizes=tuple(known[name] for name in names)) if names else self


def _sizes(*rows: tuple[int, int, int, int]) -> tuple[Size, ...]:
    return tuple(Size(f"s{i}", *row) for i, row in enumerate(rows))


_ALL = (
    Preset(
        "pocket",
        _sizes(
            (32, 2, 2, 96), (48, 3, 3, 128), (80, 3, 5, 224), (128, 4, 4, 352), (192, 5, 6, 512)
        ),
        vocab=2048,
        context=256,
        batch=8,
        tokens=1 << 20,
        first_tokens=1 << 17,
        doc="below 20 minutes on 2 cores",
    ),
    Preset(
        "books",
        _sizes(
            (48, 3, 3, 128), (64, 4, 4, 176), (96, 6, 6, 256), (160, 6, 5, 432), (256, 8, 8, 688)
        ),
        vocab=4096,
        context=256,
        batch=8,
        tokens=1 << 25,
        first_tokens=1 << 19,
        doc="hours on 2 cores; small sizes and more tokens than parameters",
    ),
    Preset(
        "desk",
        _sizes(
            (128, 4, 4, 352),
            (256, 6, 8, 688),
            (448, 8, 7, 1200),
            (640, 10, 10, 1712),
            (896, 12, 14, 2400),
        ),
        vocab=8192,
        context=512,
        batch=64,
        tokens=1 << 30,
        first_tokens=1 << 25,
        doc="1M to 100M parameters, one GPU",
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def get_preset(name: str) -> Preset:
    """The preset by name; KbitError lists the known ones."""
    if name not in PRESETS:
        raise KbitError(f"no preset named {name!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]
