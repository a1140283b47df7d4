"""A GGUF file's vocabulary as `tokenizer.json` and `tokenizer_config.json`.

Two kinds: byte-level BPE (`gpt2`: tokens, merges, and the name of a pre-tokenizer) and
SentencePiece BPE (`llama`: pieces with scores; merges are derived from the scores). The
rebuilt tokenizer adds and splits as llama.cpp does with `parse_special`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kbit.checkpoint.gguf_file import GGUFFile
from kbit_kernels.errors import KbitError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "\u2581"  # SentencePiece's visible space
MAX_TOKEN_CHARACTERS = 4096

# Names of tokens that end a turn; one counts if the file's chat template writes it.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cl100k(digits: str) -> str:
    return _ENGLISH + "|" + _WORD + r"\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL


def _o200k(digits: str, english: str) -> str:
    return (
        f"{_WORD}{_UPPER}*{_LOWER}+{english}|{_WORD}{_UPPER}+{_LOWER}*{english}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
    )


@dataclass(frozen=True)
class PreTokenizer:
    """Expressions that cut a text one after the other; the flags that come with the name."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False  # where the file has no add_bos_token
    nfc: bool = False


_LLAMA3 = PreTokenizer((_cl100k(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_cl100k(r"\p{N}"),), nfc=True)
_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "phi-2": PreTokenizer((_GPT2,)),
    "olmo": PreTokenizer((_GPT2,)),
    "default": PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "dbrx": PreTokenizer((_cl100k(r"\p{N}{1,3}"),)),
    "smaug-bpe": PreTokenizer((_cl100k(r"\p{N}{1,3}"),)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": PreTokenizer((_cl100k(r"\p{N}"),)),
    "megrez": _QWEN2,
    "stablelm2": PreTokenizer((_cl100k(r"\p{N}"),)),
    "tekken": PreTokenizer((_o200k(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer((_o200k(r"\p{N}{1,3}", _ENGLISH + "?"),)),
}


@dataclass(frozen=True)
class Tokenizer:
    """The two files' contents, and what config.json and generation_config.json need."""

    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    token_ids: dict[str, int]  # "bos", "eos", "pad", where the file has them
    stop_ids: list[int]  # every token that ends an answer, eos first


class _Vocabulary:
    """Tokens, kinds and special ids of a file, checked."""

    def __init__(self, file: GGUFFile, rows: int) -> None:
        self.file = file
        self.tokens: list[str] = self._array("tokens", list)
        count = len(self.tokens)
        if not 0 < count <= rows:
            raise self.error(f"there are {count} tokens for an embedding of {rows} rows")
        self.types = self._array("token_type", np.ndarray, count, np.full(count, NORMAL))
        if max(map(len, self.tokens)) > MAX_TOKEN_CHARACTERS:
            raise self.error(f"a token is longer than {MAX_TOKEN_CHARACTERS} characters")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != count:
            repeated = next(t for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise self.error(f"the token {repeated[:40]!r} stands there twice")

    def error(self, reason: str) -> KbitError:
        return KbitError(f"{self.file.path}: the vocabulary is damaged: {reason}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.file.metadata.get("tokenizer." + key, default)
        if value is not default and type(value) is not kind:
            raise self.error(f"tokenizer.{key} is a {type(value).__name__}, no {kind.__name__}")
        return value

    def _array(self, key: str, kind: type, count: int | None = None, default: Any = None) -> Any:
        value = self.get("ggml." + key, kind, default)
        if value is None:
            raise self.error(f"tokenizer.ggml.{key} is missing")
        if count is not None and len(value) != count:
            raise self.error(f"tokenizer.ggml.{key} has {len(value)} entries for {count} tokens")
        return value

    def merges(self) -> list[str]:
        return self._array("merges", list)

    def scores(self) -> np.ndarray:
        scores = self._array("scores", np.ndarray, len(self.tokens))
        if not np.isfinite(scores).all():
            raise self.error("tokenizer.ggml.scores holds NaN or infinity")
        return scores

    def special(self, name: str) -> int | None:
        value = self.get(f"ggml.{name}_token_id", int, None)
        if value is not None and not 0 <= value < len(self.tokens):
            raise self.error(f"{name}_token_id is {value} of {len(self.tokens)} tokens")
        return value


def _byte_level(vocabulary: _Vocabulary) -> tuple[dict[str, Any], PreTokenizer]:
    name = vocabulary.get("ggml.pre", str, "default")
    if name not in PRE_TOKENIZERS:
        raise KbitError(
            f"{vocabulary.file.path}: the pre-tokenizer {name[:60]!r} is not supported; "
            f"known are {', '.join(PRE_TOKENIZERS)}"
        )
    pre = PRE_TOKENIZERS[name]
    merges = []
    for merge in vocabulary.merges():
        left, _, right = merge[1:].partition(" ")  # a part may itself begin with a space
        left = merge[:1] + left
        if not right or any(part not in vocabulary.ids for part in (left, right, left + right)):
            raise vocabulary.error(f"the merge {merge[:60]!r} is not made of tokens")
        merges.append([left, right])
    split = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts = {
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*split, level | {"use_regex": False}],
        },
        "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocabulary.ids,
            "merges": merges,
        },
    }
    return parts, pre


def _score_merges(vocabulary: _Vocabulary) -> list[list[str]]:
    """Every way to join two pieces into a third, best score of the third first."""
    pieces = {
        token: index for token, index in vocabulary.ids.items() if vocabulary.types[index] == NORMAL
    }
    scores = vocabulary.scores().tolist()

    def pairs() -> Iterator[tuple[float, int, int, str, str]]:
        for piece, index in pieces.items():
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in pieces and right in pieces:
                    yield -scores[index], pieces[left], pieces[right], left, right

    return [[left, right] for _, _, _, left, right in sorted(pairs())]


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    prefix = vocabulary.get("ggml.add_space_prefix", bool, True)
    if vocabulary.get("ggml.remove_extra_whitespaces", bool, False):
        raise KbitError(
            f"{vocabulary.file.path}: the tokenizer removes extra spaces, which is not supported"
        )
    unknown = vocabulary.special("unknown")
    if unknown is None and UNKNOWN in vocabulary.types:
        unknown = int(np.argmax(vocabulary.types == UNKNOWN))
    bytes_known = all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256))
    if unknown is None and not bytes_known:
        raise vocabulary.error("there is neither an unknown token nor one for every byte")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizers: list[dict[str, Any]] = [replace]
    if prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bytes_known,
            "ignore_merges": False,
            "vocab": vocabulary.ids,
            "merges": _score_merges(vocabulary),
        },
    }


def _added_tokens(vocabulary: _Vocabulary, strip_right: bool) -> list[dict[str, Any]]:
    """Control and user-defined tokens: matched in the raw text, longest first.

    Phi-3's vocabulary (`strip_right`) takes the white space after its turn markers away, which
    the file does not say.
    """
    added = []
    for index in np.flatnonzero(np.isin(vocabulary.types, (UNKNOWN, CONTROL, USER_DEFINED))):
        content = vocabulary.tokens[index]
        if not content:
            raise vocabulary.error(f"the special token {index} is empty")
        special = vocabulary.types[index] != USER_DEFINED
        strip = strip_right and content not in ("<unk>", "<s>", "<|endoftext|>")
        added.append(
            {
                "id": int(index),
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": strip,
                "normalized": False,
                "special": bool(special),
            }
        )
    return added


def _post_processor(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> dict[str, Any]:
    def special(token: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": segment}}

    def sequence(name: str, segment: int) -> list[dict[str, Any]]:
        return [
            *(special(token, segment) for token, _ in before),
            {"Sequence": {"id": name, "type_id": segment}},
            *(special(token, segment) for token, _ in after),
        ]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [index], "tokens": [token]}
            for token, index in {*before, *after}
        },
    }


def import_tokenizer(file: GGUFFile, rows: int, context: int) -> Tokenizer:
    """Rebuild the tokenizer; `rows` of the embedding, `context` in tokens.

    Raises KbitError for an unknown kind or pre-tokenizer and for a vocabulary that contradicts
    itself.
    """
    vocabulary = _Vocabulary(file, rows)
    kind = vocabulary.get("ggml.model", str, "")
    if kind == "gpt2":
        parts, pre = _byte_level(vocabulary)
        add_bos = pre.add_bos
    elif kind == "llama":
        for index in np.flatnonzero(vocabulary.types == USER_DEFINED):
            plain = vocabulary.tokens[index].replace(SPACE, " ")  # older files have it visible
            if plain != vocabulary.tokens[index] and plain not in vocabulary.ids:
                del vocabulary.ids[vocabulary.tokens[index]]
                vocabulary.tokens[index] = plain
                vocabulary.ids[plain] = int(index)
        parts, add_bos = _sentencepiece(vocabulary), True
    else:
        raise KbitError(
            f"{file.path}: the tokenizer kind {kind[:60]!r} is not supported; "
            "known are gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    add_bos = vocabulary.get("ggml.add_bos_token", bool, add_bos)
    add_eos = vocabulary.get("ggml.add_eos_token", bool, False)
    specials = {
        name: vocabulary.special(key)
        for name, key in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        )
    }
    ids = {name: index for name, index in specials.items() if index is not None}
    ends = [(vocabulary.tokens[ids["eos"]], ids["eos"])] if add_eos and "eos" in ids else []
    starts = [(vocabulary.tokens[ids["bos"]], ids["bos"])] if add_bos and "bos" in ids else []
    phi3 = file.metadata.get("general.architecture") == "phi3" and kind == "llama"
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary, strip_right=phi3),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _post_processor(starts, ends) if starts or ends else None,
        "decoder": parts["decoder"],
        "model": parts["model"],
    }
    template = vocabulary.get("chat_template", str, None)
    stop_ids = [ids["eos"]] if "eos" in ids else []
    for key in ("eot", "eom"):
        stop_ids.append(vocabulary.special(key) or -1)
    for token in TURN_ENDS:
        if template is not None and token in template and token in vocabulary.ids:
            stop_ids.append(vocabulary.ids[token])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(starts),
        "add_eos_token": bool(ends),
    }
    config |= {f"{name}_token": vocabulary.tokens[index] for name, index in ids.items()}
    if template is not None:
        config["chat_template"] = template
    _try_out(file, tokenizer)
    return Tokenizer(
        tokenizer,
        config,
        {name: index for name, index in ids.items() if name != "unk"},
        [index for index in dict.fromkeys(stop_ids) if index >= 0],
    )


def _try_out(file: GGUFFile, tokenizer: dict[str, Any]) -> None:
    """Let the library that will read it read it, so that a damaged vocabulary shows here."""
    from tokenizers import Tokenizer as Library

    try:
        Library.from_str(json.dumps(tokenizer)).encode("a b\u00e9 12")
    except Exception as error:  # the library raises plain Exception
        raise KbitError(
            f"{file.path}: no tokenizer can be built of the vocabulary ({error})"
        ) from None
