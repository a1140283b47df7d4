"""How a text is cut into windows and which tokens are scored: the part of a perplexity that makes
two of them comparable, as data.

A protocol turns a text into documents, a document's tokens into a row z, and z into windows. A
window's tokens are fed to the model at once; each of its tokens but the first can be predicted from
the ones before it, and the window says from which one on that prediction counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from kbit.engine.tokenizer import Tokenizer
from kbit.errors import KbitError

DEFAULT_CONTEXT = 512


@dataclass(frozen=True)
class Protocol:
    """One way to score a text.

    text: how the text becomes documents. `verbatim`: it is one document; `rows`: one, its lines
    joined by empty lines (the Hugging Face data set's rows joined by two newlines; bytes are those
    of the joined text);
    `wikitext-pages`: one per article, detokenized, bytes and words of the original counted.

    context: tokens of a window that the model is fed (None: 512, or the model's context if that is
    shorter). stride: tokens from one window's start to the next one's (None: context).
    shared: windows overlap by one token, so that the first of the second window is predicted too.

    bos: where the BOS token goes if the checkpoint adds one. `text`: before the document, once;
    `window`: before every window, as one token of its context; `replace`: also in place of every
    window's first token; `never`. `prefix`: before the document even if the checkpoint adds none
    (its EOS token if it has no BOS).

    score: `new`: every token that no earlier window scored; `second-half`: the predictions made at
    positions context/2 and later. tail: what happens to the tokens that don't fill a window:
    `keep`, `drop`, or `refill` (the last window starts earlier, so that it is full).
    """

    name: str
    about: str
    text: Literal["verbatim", "rows", "wikitext-pages"] = "verbatim"
    context: int | None = None
    stride: int | None = None
    shared: bool = False
    bos: Literal["text", "window", "replace", "prefix", "never"] = "text"
    score: Literal["new", "second-half"] = "new"
    tail: Literal["keep", "drop", "refill"] = "keep"

    def resolved(self, max_positions: int) -> Protocol:
        """The protocol with its numbers filled in, for a model of this context.

        Raises KbitError where they don't fit the model or each other.
        """
        context = min(DEFAULT_CONTEXT, max_positions) if self.context is None else self.context
        stride = context if self.stride is None else self.stride
        if not 2 <= context <= max_positions:
            raise KbitError(
                f"an evaluation context of {context} tokens: this model takes 2 to "
                f"{max_positions}; say how many with --context"
            )
        if not 1 <= stride <= context:
            raise KbitError(
                f"a stride of {stride} tokens with a context of {context}: it has to be 1 to "
                f"{context}, or tokens would be left out"
            )
        if stride != context and (self.score == "second-half" or self.tail == "refill"):
            raise KbitError(f"the protocol {self.name} has no stride other than its context")
        return replace(self, context=context, stride=stride)

    def record(self) -> dict[str, Any]:
        """The fields as JSON values, for a result."""
        return asdict(self)


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            "kbit",
            "every token once, in windows that don't overlap; BOS before each, if there is one",
            shared=True,
            bos="window",
        ),
        Protocol(
            "gptq",
            "GPTQ and its followers: rows joined by empty lines, windows of 2048, tail dropped",
            text="rows",
            context=2048,
            tail="drop",
        ),
        Protocol(
            "lm-eval",
            "lm-evaluation-harness' wikitext: articles, rolling, words and bytes of the original",
            text="wikitext-pages",
            context=2048,
            shared=True,
            bos="prefix",
            tail="refill",
        ),
        Protocol(
            "llama.cpp",
            "llama.cpp's perplexity tool: windows of 512 of which the second half is scored",
            context=512,
            bos="replace",
            score="second-half",
            tail="drop",
        ),
        Protocol(
            "hf-strided",
            "Hugging Face's guide: windows of 1024 that move by 512, new tokens scored",
            text="rows",
            context=1024,
            stride=512,
        ),
    )
}


def protocol(name: str | Protocol, **changes: Any) -> Protocol:
    """A preset by name, with the fields in `changes` that are not None put in their place.

    A context below twice the preset's stride takes a stride of half of it, unless one is given.
    """
    if isinstance(name, str):
        if name not in PROTOCOLS:
            raise KbitError(f"protocol {name!r} is not known (known: {', '.join(PROTOCOLS)})")
        name = PROTOCOLS[name]
    context = changes.get("context")
    if context is not None and name.stride is not None and changes.get("stride") is None:
        changes["stride"] = min(name.stride, max(1, context // 2))
    return replace(name, **{key: value for key, value in changes.items() if value is not None})


@dataclass(frozen=True)
class Window:
    """Tokens for one pass. tokens: int64 [T]; those from index `first` (at least 1) on are scored,
    each predicted from all before it. bytes, words: of the text behind the scored tokens (words: 0
    unless the protocol counts them). document: its number."""

    tokens: np.ndarray
    first: int
    bytes: int
    words: int
    document: int

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.tokens) - self.first


def windows(
    text: str, tokenizer: Tokenizer, protocol: Protocol, *, bos: bool | None = None
) -> list[Window]:
    """Cut a text into the windows of a resolved protocol.

    bos: whether the checkpoint counts as one that adds BOS; None asks the tokenizer. Raises
    KbitError where the text is too short for a single scored token.
    """
    found: list[Window] = []
    bos_id = bos_token(tokenizer, bos)
    for number, (document, original) in enumerate(_DOCUMENTS[protocol.text](text)):
        found.extend(_document_windows(document, original, number, tokenizer, protocol, bos_id))
    if not any(w.scored for w in found):
        raise KbitError(
            f"the text is too short for the protocol {protocol.name} with a context of "
            f"{protocol.context} tokens: no token would be scored"
        )
    return found


def bos_token(tokenizer: Tokenizer, wanted: bool | None) -> int | None:
    """The BOS token to add, or None for none; wanted: None asks the tokenizer."""
    if wanted is None:
        return tokenizer.bos_id if tokenizer.adds_bos else None
    if wanted and tokenizer.bos_id is None:
        raise KbitError("BOS tokens were asked for, but this tokenizer names none")
    return tokenizer.bos_id if wanted else None


def _document_windows(
    document: str,
    original: str,
    number: int,
    tokenizer: Tokenizer,
    protocol: Protocol,
    bos: int | None,
) -> Iterator[Window]:
    encoding = tokenizer.encode_with_bytes(document)
    start: int | None = bos if protocol.bos in ("text", "replace") else None
    if protocol.bos == "prefix":
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if start is None:
            raise KbitError(
                f"the protocol {protocol.name} begins with a BOS or EOS token, and this "
                "tokenizer names neither"
            )
    head = np.asarray([] if start is None else [start], dtype=np.int64)
    z = np.concatenate([head, encoding.ids])
    ends = np.concatenate([np.zeros(len(head), dtype=np.int64), encoding.byte_ends])
    window_bos = bos if protocol.bos == "window" else None

    spans = list(_spans(len(z), protocol, window_bos is not None))
    whole = protocol.text == "wikitext-pages"
    for i, (begin, end, first) in enumerate(spans):
        tokens = z[begin:end]
        if window_bos is not None:
            tokens = np.concatenate([[window_bos], tokens])
            first += 1
        elif protocol.bos == "replace" and bos is not None:
            tokens = np.concatenate([[bos], tokens[1:]])
        place = end - (len(tokens) - first)  # of the first scored token in z
        n_bytes = int(ends[end - 1] - (ends[place - 1] if place else 0))
        words = 0
        if whole:
            # The harness divides by the original page, so its bytes and words go with the page's
            # first window: only sums over pages mean anything.
            n_bytes = len(original.encode("utf-8")) if i == 0 else 0
            words = len(re.split(r"\s+", original)) if i == 0 else 0
        yield Window(tokens, first, n_bytes, words, number)


def _spans(total: int, protocol: Protocol, window_bos: bool) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored relative to begin) of each window over z of `total` tokens.

    With a BOS token before every window the first token of a span is predicted from it.
    """
    context, stride = protocol.context, protocol.stride
    assert context is not None, "an unresolved protocol"
    assert stride is not None, "an unresolved protocol"
    # Fed tokens are all but the last: with `shared` a window predicts one more token than it feeds.
    size = context + 1 if protocol.shared else context
    earliest = 1
    if window_bos:
        size, earliest = size - 1, 0
    done = earliest  # tokens of z before this one are scored, or can't be
    begin = 0
    while done < total:
        end = min(begin + size, total)
        if end - begin < size:
            if protocol.tail == "drop":
                return
            if protocol.tail == "refill":
                begin = max(0, end - size)
        first = max(done - begin, earliest)
        if protocol.score == "second-half":
            first = context // 2 + 1
        if first < end - begin:
            yield begin, end, first
        done = end
        begin += stride


def _verbatim(text: str) -> Iterator[tuple[str, str]]:
    yield text, text


def _rows(text: str) -> Iterator[tuple[str, str]]:
    lines = text.split("\n")
    ended = lines[:-1]
    rows = [line + "\n" if line.strip() else "" for line in ended]
    if lines[-1]:
        rows.append(lines[-1] if lines[-1].strip() else "")
    joined = "\n\n".join(rows)
    yield joined, joined


def _wikitext_pages(text: str) -> Iterator[tuple[str, str]]:
    """Articles of WikiText, each as (detokenized, original)."""
    page: list[str] = []
    for line in text.split("\n"):
        spelled = line.replace("= = =", "===").replace("= =", "==").strip()
        if spelled.startswith("= ") and spelled.endswith(" ="):
            if "".join(page).strip():
                original = "\n".join(page)
                yield detokenize_wikitext(original), original
            page = []
        page.append(line)
    if "".join(page).strip():
        original = "\n".join(page)
        yield detokenize_wikitext(original), original


_DOCUMENTS: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
    "verbatim": _verbatim,
    "rows": _rows,
    "wikitext-pages": _wikitext_pages,
}

# (pattern, replacement) in order; the harness' wikitext task applies the same ones, its mistakes
# included (the second pattern never matches), since they are part of the number.
_DETOKENIZE: tuple[tuple[str, str], ...] = (
    (r"s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    (r" @-@ ", "-"),
    (r" @,@ ", ","),
    (r" @\.@ ", "."),
    (r" : ", ": "),
    (r" ; ", "; "),
    (r" \. ", ". "),
    (r" ! ", "! "),
    (r" \? ", "? "),
    (r" , ", ", "),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (" \u00b0 ", "\u00b0"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


def detokenize_wikitext(page: str) -> str:
    """Undo WikiText's spacing of punctuation, exactly as lm-evaluation-harness does."""
    for pattern, replacement in _DETOKENIZE:
        page = re.sub(pattern, replacement, page)
    return page
