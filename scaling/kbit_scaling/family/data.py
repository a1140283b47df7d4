"""Text to tokens: one tokenizer for the family, one token file, the same batches for every size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kbit.errors import KbitError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_TRAINING_BYTES = 20_000_000
_CHUNK_CHARS = 1 << 20


def check_texts(paths: Sequence[Path]) -> None:
    """KbitError unless every path is a readable, non-empty file and there is one at all."""
    if not paths:
        raise KbitError("no text to train on; give one or more plain text files with --text")
    for path in paths:
        if not path.is_file():
            raise KbitError(f"{path}: no such text file")
        if path.stat().st_size == 0:
            raise KbitError(f"{path}: the text file is empty")


def texts_hash(paths: Sequence[Path]) -> str:
    """Hash of the texts' contents in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _pieces(path: Path, limit_bytes: int | None = None) -> Iterator[str]:
    """The text in pieces that end at a line end."""
    left = limit_bytes if limit_bytes is not None else 1 << 62
    rest = ""
    try:
        with path.open(encoding="utf-8") as file:
            while left > 0 and (piece := file.read(min(_CHUNK_CHARS, left))):
                left -= len(piece)
                head, newline, rest_of_line = piece.rpartition("\n")
                if newline:
                    yield rest + head + newline
                    rest = rest_of_line
                else:
                    rest += piece
    except UnicodeDecodeError as error:
        raise KbitError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if rest:
        yield rest


def train_tokenizer(paths: Sequence[Path], vocab: int, out: Path) -> None:
    """Byte-level BPE (GPT-2's splitting, no prefix space) written to `out`; token 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    share = TOKENIZER_TRAINING_BYTES // len(paths)
    pieces = (piece for path in paths for piece in _pieces(path, share))
    tokenizer.train_from_iterator(pieces, trainer)
    if tokenizer.get_vocab_size() < vocab:
        raise KbitError(
            f"the text gives a vocabulary of {tokenizer.get_vocab_size()} tokens, the preset wants "
            f"{vocab}; give more text"
        )
    aside = out.with_name(out.name + f".{os.getpid()}.part")
    tokenizer.save(str(aside))
    aside.replace(out)


def encode(paths: Sequence[Path], tokenizer_path: Path, out: Path) -> NDArray[np.uint16]:
    """The texts' tokens as a memory-mapped uint16 array, each text followed by token 0."""
    if not out.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        if tokenizer.get_vocab_size() > 1 << 16:
            raise KbitError(f"{tokenizer_path}: more than 65536 tokens; use a smaller vocabulary")
        aside = out.with_name(out.name + f".{os.getpid()}.part")
        with aside.open("wb") as file:
            for path in paths:
                for piece in _pieces(path):
                    ids = tokenizer.encode(piece, add_special_tokens=False).ids
                    np.asarray(ids, dtype=np.uint16).tofile(file)
                np.zeros(1, dtype=np.uint16).tofile(file)
        aside.replace(out)
    return np.memmap(out, dtype=np.uint16, mode="r")


def batch(
    tokens: NDArray[np.uint16], step: int, *, windows: int, context: int, seed: int
) -> NDArray[np.int64]:
    """Windows [windows, context + 1] of training step `step`: a function of (seed, step) alone, so
    that every size sees the same batches and a resumed run goes on exactly."""
    rng = np.random.default_rng((seed, step))
    starts = rng.integers(0, len(tokens) - context - 1, size=windows)
    return np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64)
