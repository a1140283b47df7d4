"""A family of two tiny random models with a tokenizer, and a text for them: made in a second."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kbit_scaling.family import data, model
from kbit_scaling.family.presets import Preset, Size
from kbit_scaling.family.train import _Trainer

WORDS = ("the", "of", "and", "a", "to", "in", "he", "was", "that", "it", "his", "her", "with", "as",
         "had", "she", "not", "at", "for", "on", "be", "but")  # fmt: skip


def words(count: int, seed: int = 0) -> str:
    """Made-up sentences."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        word = WORDS[rng.zipf(1.4) % len(WORDS)] + (
            "" if rng.random() < 0.5 else str(rng.integers(50))
        )
        out.append(word.capitalize() if i % 14 == 0 else word)
        if i % 14 == 13:
            out[-1] += ".\n" if i % 70 == 69 else "."
    return " ".join(out)


@dataclass(frozen=True)
class Tiny:
    """Where the family and its text lie."""

    folder: Path
    text: Path
    models: tuple[Path, ...]


PRESET = Preset(
    "tiny",
    (Size("s0", 32, 1, 2, 48), Size("s1", 48, 2, 3, 80)),
    vocab=320,
    context=64,
    batch=4,
    tokens=2048,
    first_tokens=512,
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Two untrained models with weights large enough for their logits to differ."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("family")
    text = folder / "text.txt"
    text.write_text(words(6000), encoding="utf-8")
    data.train_tokenizer([text], PRESET.vocab, folder / "tokenizer.json")
    paths = []
    for size in PRESET.sizes:
        trainer = _Trainer(size, PRESET, folder / size.name, 0, "cpu")
        for p in trainer.params.values():
            if p.ndim == 2:
                p.data *= 4
        paths.append(trainer.save_checkpoint(5.0, folder / "tokenizer.json", {}).path)
    assert model.config(PRESET.sizes[0], 320, 64)["model_type"] == "llama"
    return Tiny(folder, text, tuple(paths))
