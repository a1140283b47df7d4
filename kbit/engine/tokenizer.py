"""Text to token ids and back, from the checkpoint's own tokenizer.json.

Whether a text starts with the beginning-of-sequence token is the checkpoint's business: the
post-processor inside tokenizer.json decides, as in transformers 5, and only where it has none do
`add_bos_token` and `add_eos_token` of tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kbit.errors import KbitError

# A UTF-8 character has at most 4 bytes and a token at least one, so text that still ends in a
# replacement character after 4 tokens is not the beginning of a character: it is invalid.
_MAX_PENDING_TOKENS = 4
# Tokens of the prompt that the first generated token is decoded behind, so that decoders which
# strip a leading space don't strip one in the middle of the text.
_SEED_TOKENS = 16


@dataclass(frozen=True)
class Encoding:
    """A text's token ids and where each one ends.

    ids: int64 [T]; byte_ends: int64 [T], the number of the text's UTF-8 bytes that lie before the
    end of each token, never falling and equal to the text's length at the last token. A character
    that is cut into several tokens counts with its first.
    """

    ids: np.ndarray
    byte_ends: np.ndarray


class Tokenizer:
    """A checkpoint's tokenizer; made by `Tokenizer.load`.

    config: tokenizer_config.json as it stands; bos_id, eos_id: None where none is named.
    """

    def __init__(self, backend: Any, config: dict[str, Any], bos_id: int | None = None) -> None:
        self.backend = backend
        self.config = config
        self.special_tokens = _special_tokens(config)
        named_bos = self.special_tokens.get("bos_token")
        self.bos_id = bos_id if named_bos is None else backend.token_to_id(named_bos)
        named_eos = self.special_tokens.get("eos_token")
        self.eos_id = None if named_eos is None else backend.token_to_id(named_eos)
        if backend.post_processor is None:
            self._set_post_processor()
        self.begins = [int(i) for i in backend.encode("", add_special_tokens=True).ids]

    @classmethod
    def load(cls, path: Path, config: dict[str, Any] | None = None) -> Tokenizer:
        """Read tokenizer.json and tokenizer_config.json from a checkpoint directory.

        config: the model's config.json, for a bos_token_id where the tokenizer names no BOS token.
        Raises KbitError where tokenizer.json is missing or is no tokenizer.
        """
        file = path / "tokenizer.json"
        if not file.exists():
            raise KbitError(
                f"{path}: has no tokenizer.json, which kbit needs to read and write text; "
                "take it from the original model (transformers writes it with save_pretrained)"
            )
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for whatever is wrong
            raise KbitError(f"{file}: is no tokenizer that can be read ({error})") from None
        backend.no_truncation()
        backend.no_padding()
        config_file = path / "tokenizer_config.json"
        tokenizer_config: dict[str, Any] = {}
        if config_file.exists():
            try:
                tokenizer_config = json.loads(config_file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise KbitError(f"{config_file}: is no JSON ({error})") from None
            if not isinstance(tokenizer_config, dict):
                raise KbitError(f"{config_file}: should hold a JSON object")
        named = (config or {}).get("bos_token_id")
        return cls(backend, tokenizer_config, named if isinstance(named, int) else None)

    def _set_post_processor(self) -> None:
        from tokenizers.processors import TemplateProcessing

        template, special = ["$A:0"], []
        bos, eos = self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")
        if self.config.get("add_bos_token") and bos is not None and self.bos_id is not None:
            template.insert(0, f"{bos}:0")
            special.append((bos, self.bos_id))
        if self.config.get("add_eos_token") and eos is not None and self.eos_id is not None:
            template.append(f"{eos}:0")
            special.append((eos, self.eos_id))
        self.backend.post_processor = TemplateProcessing(single=template, special_tokens=special)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def adds_bos(self) -> bool:
        """Whether the checkpoint starts every text with its BOS token."""
        return self.bos_id is not None and self.begins[:1] == [self.bos_id]

    def encode(self, text: str, *, special: bool = True) -> np.ndarray:
        """Token ids of a text, int64 [T]; with `special`, BOS and EOS as the checkpoint adds them.

        Special tokens that stand in the text itself become those tokens.
        """
        ids = self.backend.encode(_valid(text), add_special_tokens=special).ids
        return np.asarray(ids, dtype=np.int64)

    def encode_with_bytes(self, text: str) -> Encoding:
        """Token ids without special tokens added, and the byte of the text where each one ends."""
        encoding = self.backend.encode(_valid(text), add_special_tokens=False)
        ids = np.asarray(encoding.ids, dtype=np.int64)
        ends = np.asarray([end for _, end in encoding.offsets], dtype=np.int64)
        bytes_before = np.zeros(len(text) + 1, dtype=np.int64)
        np.cumsum(_utf8_lengths(text), out=bytes_before[1:])
        byte_ends = np.maximum.accumulate(bytes_before[ends]) if ends.size else ends
        if byte_ends.size:
            byte_ends[-1] = bytes_before[-1]
        return Encoding(ids, byte_ends)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """The text of token ids; ids that the tokenizer doesn't know decode to nothing."""
        tokens = [int(i) for i in ids]
        return str(self.backend.decode(tokens, skip_special_tokens=skip_special))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token."""
        found = self.backend.id_to_token(int(token_id))
        return None if found is None else str(found)


class Detokenizer:
    """Decodes one sequence token by token; what it returns, joined, is the text of the whole.

    A token that ends inside a character returns "" until the character is complete, so every
    piece is whole UTF-8. `prompt` are the ids that come before: they are context and not returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray = ()) -> None:
        self._decode = tokenizer.decode
        self._ids = _seed(tokenizer, [int(i) for i in prompt])
        self._read = len(self._ids)  # tokens of the window whose text is out
        self._text = self._decode(self._ids)  # that text

    def push(self, token_id: int) -> str:
        """The text that this token completes, often ""."""
        self._ids.append(int(token_id))
        text = self._decode(self._ids)
        pending = len(self._ids) - self._read
        if text.endswith("\ufffd") and pending < _MAX_PENDING_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is left at the end: an incomplete character, as replacement characters."""
        if self._read == len(self._ids):
            return ""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[len(self._text) :]
        if piece:
            # The tokens that made this piece are the context of the next ones. A window without
            # text (special tokens) would let the decoder strip the next token's leading space.
            del self._ids[: self._read]
            self._text = self._decode(self._ids)
        self._read = len(self._ids)
        return piece


def _seed(tokenizer: Tokenizer, prompt: list[int]) -> list[int]:
    """The last tokens of the prompt, from the beginning of a character on."""
    start = max(0, len(prompt) - _SEED_TOKENS)
    for earlier in range(start, max(start - _MAX_PENDING_TOKENS, -1), -1):
        if "\ufffd" not in tokenizer.decode(prompt[earlier:]):
            return prompt[earlier:]
    return prompt[start:]


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... of tokenizer_config.json: strings, or AddedToken objects."""
    found = {}
    for name, value in config.items():
        if not name.endswith("_token"):
            continue
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _valid(text: str) -> str:
    """Refuse lone surrogates, which Python strings can hold and UTF-8 can't."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise KbitError(
            f"the text holds something that is no UTF-8 (character {error.start})"
        ) from None
    return text


def _utf8_lengths(text: str) -> np.ndarray:
    """Bytes of each character in UTF-8, int64 [len(text)]."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return (
        1
        + (points >= 0x80).astype(np.int64)
        + (points >= 0x800).astype(np.int64)
        + (points >= 0x10000).astype(np.int64)
    )
