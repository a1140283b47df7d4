"""Evaluation texts: a file cut into documents, and the windows that a model sees of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from kbit.engine.tokenizer import Tokenizer
from kbit.errors import KbitError
from kbit.evaluate.protocols import Protocol, Window, protocol, windows


@dataclass(frozen=True)
class Text:
    """A text in the study: `pieces` documents of equal size, spread evenly over the file.

    cut_bytes: bytes to take in all; 0 takes the whole file (cut into `pieces` all the same, so that
    there is something to draw in a bootstrap). protocol: a preset of kbit.evaluate.
    """

    name: str
    path: Path
    cut_bytes: int = 0
    pieces: int = 32
    protocol: str = "kbit"
    context: int | None = None

    def documents(self) -> list[str]:
        """The documents; each begins and ends at a line end where one is near."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise KbitError(
                f"{self.path}: the text {self.name!r} cannot be read ({error.strerror}); "
                "mend its path in the study file, or say where it lies with --path NAME=DIR"
            ) from None
        return cut(data, self.cut_bytes or len(data), self.pieces)

    def check(self) -> None:
        """KbitError if no model can be scored on it."""
        if not self.documents():
            raise KbitError(f"{self.path}: the text {self.name!r} is empty")
        self.resolved(1 << 20)

    def digest(self) -> str:
        """Hash of the documents."""
        return hashlib.sha256("\x00".join(self.documents()).encode()).hexdigest()[:24]

    def resolved(self, max_positions: int) -> Protocol:
        """The protocol as this model is scored by it; documents are texts of their own."""
        chosen = protocol(self.protocol, context=self.context).resolved(max_positions)
        if chosen.text == "wikitext-pages":
            raise KbitError(
                f"the text {self.name!r}: the protocol {chosen.name!r} makes its own documents; "
                "use kbit, gptq, llama.cpp or hf-strided in a study"
            )
        return chosen

    def windows(self, tokenizer: Tokenizer, max_positions: int) -> list[Window]:
        """All windows, numbered by document."""
        chosen = self.resolved(max_positions)
        return [
            replace(window, document=number)
            for number, document in enumerate(self.documents())
            for window in windows(document, tokenizer, chosen)
            if window.scored
        ]


def cut(data: bytes, total: int, pieces: int) -> list[str]:
    """`pieces` documents of about total / pieces bytes, spread evenly over the data, moved to the
    next line end (if one is within a tenth of a piece) and never inside a character."""
    if not data:
        return []
    total = min(total, len(data))
    pieces = max(1, min(pieces, total // 64 or 1))
    size, pitch = total // pieces, len(data) / pieces

    def border(at: int) -> int:
        if at <= 0 or at >= len(data):
            return min(max(at, 0), len(data))
        line = data.find(b"\n", at, at + size // 10)
        if line >= 0:
            return line + 1
        while at < len(data) and data[at] & 0xC0 == 0x80:
            at += 1
        return at

    found = []
    for i in range(pieces):
        begin = round(i * pitch)
        end = round((i + 1) * pitch) if total == len(data) else begin + size
        found.append(data[border(begin) : border(end)].decode("utf-8", errors="replace"))
    return [document for document in found if document.strip()]
