"""Trained models: llama2.c's own greedy text, and the losses published with the books family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kbit.checkpoint.reader import open_checkpoint
from kbit.engine.executor import load_executor
from kbit.engine.tokenizer import Tokenizer

# Nats per token over the first 8 windows of 256 predictions of books/valid.txt, by transformers
# (fp32, eager attention, float64 log-softmax).
LOSSES = {
    "books-s0": 4.713665,
    "books-s1": 4.599043,
    "books-s2": 4.507612,
    "books-s3": 4.368249,
    "books-s4": 4.299959,
}
WINDOWS, CONTEXT = 8, 256


def test_stories260k_writes_what_llama2c_writes(shared: Path) -> None:
    path = shared / "models" / "stories260k"
    checkpoint = open_checkpoint(path)
    executor = load_executor(checkpoint, "torch")
    cache = executor.new_cache(1, 256)
    ids = [1]
    while len(ids) <= 256:
        ids.append(int(executor.forward([np.array(ids[-1:])], cache)[0].argmax()))
    notes = (path / "llama2c-notes.md").read_text()
    expected = notes.split("-t 0.0\n", 1)[1].split("\n```", 1)[0]
    assert len(expected) > 500
    tokenizer = Tokenizer.load(path, checkpoint.config)
    assert tokenizer.backend.decode(ids[1:]).strip() == expected


@pytest.mark.parametrize("name", LOSSES)
def test_books_losses(name: str, shared: Path) -> None:
    path = shared / "models" / name
    checkpoint = open_checkpoint(path)
    executor = load_executor(checkpoint, "torch")
    text = (shared / "data" / "books" / "valid.txt").read_text("utf-8")[:40_000]
    ids = Tokenizer.load(path, checkpoint.config).encode(text)
    windows = [ids[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(WINDOWS)]
    cache = executor.new_cache(WINDOWS, CONTEXT)
    found = executor.forward([w[:-1] for w in windows], cache, all_logits=True)
    losses = [
        np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
        - logits[np.arange(CONTEXT), window[1:]]
        for window, logits in zip(windows, found, strict=True)
    ]
    assert np.mean(losses) == pytest.approx(LOSSES[name], abs=2e-5)
