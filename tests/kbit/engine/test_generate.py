"""The loop, on an executor whose next token is known: it copies a script."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbit.engine.generate import Options, Piece, PromptCache, StopMatcher, generate
from kbit.engine.sampler import Sampling
from kbit.engine.tokenizer import Tokenizer
from kbit.errors import KbitError
from tests.kbit.speaker import byte_level

EOS = 1


class Script:
    """Says, after a prompt, the text that stands behind it in a book, then EOS; counts its work."""

    name = "script"

    def __init__(self, book: Sequence[int], context: int = 1000) -> None:
        self.decoder: Any = SimpleNamespace(vocab_size=330, max_positions=context)
        self.book = list(book)
        self.fed: list[list[int]] = []

    def new_cache(self, batch: int, capacity: int) -> Any:
        rows: list[list[int]] = [[] for _ in range(batch)]

        def truncate(row: int, length: int) -> None:
            del rows[row][length:]

        return SimpleNamespace(rows=rows, capacity=capacity, truncate=truncate)

    def forward(
        self, tokens: Sequence[np.ndarray], cache: Any, *, all_logits: bool = False
    ) -> list[np.ndarray]:
        self.fed.append([len(t) for t in tokens])
        found = []
        for row, new in zip(cache.rows, tokens, strict=True):
            row.extend(new.tolist())
            assert len(row) <= cache.capacity
            logits = np.zeros(330, dtype=np.float32)
            following = len(row)
            logits[self.book[following] if following < len(self.book) else EOS] = 9.0
            found.append(logits if len(new) else np.empty(0, dtype=np.float32))
        return found


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level(), {"eos_token": "</s>", "bos_token": "<s>"})


def run(
    tokenizer: Tokenizer, text: str, cut: int = 3, context: int = 1000, **options: Any
) -> tuple[list[Piece], Script]:
    book = tokenizer.encode(text)
    script = Script(book.tolist(), context)
    prompts = options.pop("prompts", [book[:cut]])
    cache = options.pop("prompt_cache", None)
    pieces = generate(
        script,
        tokenizer,
        prompts,
        Options(**options),
        eos=frozenset([EOS]),
        prompt_cache=cache,
    )
    return list(pieces), script


BOOK = "It was a bright cold day in April, and the clocks were striking thirteen. 😀🎉 Ça va?"


def test_pieces_and_completion(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, BOOK)
    done = pieces[-1].completion
    assert done is not None
    ids = tokenizer.encode(BOOK).tolist()
    assert done.tokens == ids[3:]
    assert (
        done.text
        == "".join(p.text for p in pieces)
        == tokenizer.decode(ids)[len(tokenizer.decode(ids[:3])) :]
    )
    assert (done.finish_reason, done.prompt_tokens) == ("stop", 3)
    assert done.logprobs is None
    assert all(p.completion is None for p in pieces[:-1])
    assert done.timings.prompt_tokens == 3
    # The step that chose EOS counts: it took its time.
    assert done.timings.decode_tokens == len(done.tokens)


def test_length_and_context(tokenizer: Tokenizer) -> None:
    pieces, script = run(tokenizer, BOOK, max_tokens=4)
    assert pieces[-1].completion.finish_reason == "length"  # type: ignore[union-attr]
    assert len(pieces[-1].completion.tokens) == 4  # type: ignore[union-attr]
    assert script.fed == [[3], [1], [1], [1]]  # the last token is not fed
    # A context of 5: tokens 4 and 5 are fed, and 5 still has a successor.
    pieces, script = run(tokenizer, BOOK, context=5)
    assert len(pieces[-1].completion.tokens) == 3  # type: ignore[union-attr]
    pieces, script = run(tokenizer, BOOK, cut=5, context=5)
    assert len(pieces[-1].completion.tokens) == 1  # type: ignore[union-attr]


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(
    tokenizer: Tokenizer,
) -> None:
    with pytest.raises(KbitError, match=r"6 tokens.*holds 5"):
        run(tokenizer, BOOK, cut=6, context=5)
    with pytest.raises(KbitError, match="prompt 2 is empty"):
        run(tokenizer, BOOK, prompts=[np.asarray([3]), np.asarray([], dtype=np.int64)])


def test_ragged_batches_and_samples(tokenizer: Tokenizer) -> None:
    book = tokenizer.encode(BOOK)
    prompts = [book[:2], book[:7], book[:4]]
    pieces, script = run(tokenizer, BOOK, prompts=prompts, n=2, batch=4)
    done = {(p.prompt, p.sample): p.completion for p in pieces if p.completion is not None}
    assert len(done) == 6
    for (prompt, _), completion in done.items():
        assert completion.tokens == book[len(prompts[prompt]) :].tolist()
    assert script.fed[0] == [2, 2, 7, 7]
    # The longer prompts end first and feed nothing while the others go on.
    assert [1, 1, 0, 0] in script.fed
    assert [4, 4] in script.fed


@pytest.mark.parametrize(
    "stop", ["clocks", " cold", "🎉", "thirteen. 😀", "t", "April, and the clo"]
)
def test_stop_strings_are_cut_out(tokenizer: Tokenizer, stop: str) -> None:
    pieces, _ = run(tokenizer, BOOK, stop=(stop, "never seen"))
    done = pieces[-1].completion
    assert done is not None
    tail = tokenizer.decode(tokenizer.encode(BOOK)[3:])
    assert done.text == tail[: tail.index(stop)]
    assert done.finish_reason == "stop"
    assert "".join(p.text for p in pieces) == done.text


def test_what_only_begins_like_a_stop_string_is_shown(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, BOOK, stop=("va? Oui",))
    assert pieces[-1].completion.text.endswith("Ça va?")  # type: ignore[union-attr]
    pieces, _ = run(tokenizer, BOOK, stop=("va? Oui", "?"))
    assert pieces[-1].completion.text.endswith("Ça va")  # type: ignore[union-attr]


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_matcher_is_the_plain_search(text: str, stops: list[str], cuts: list[int]) -> None:
    bounds = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    matcher, shown = StopMatcher(stops), ""
    for start, end in itertools.pairwise(bounds):
        piece, stopped = matcher.push(text[start:end])
        shown += piece
        seen = text[:end]
        assert stopped == any(s in seen for s in stops)
        if stopped:
            # Of the text so far the first stop string counts.
            assert shown == seen[: min(seen.index(s) for s in stops if s in seen)]
            return
    assert shown + matcher.flush() == text


def test_eos_can_be_ignored(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, "It was", cut=1, max_tokens=30, ignore_eos=True)
    assert len(pieces[-1].completion.tokens) == 30  # type: ignore[union-attr]


def test_a_prompt_cache_computes_only_what_is_new(tokenizer: Tokenizer) -> None:
    book = tokenizer.encode(BOOK)
    cache = PromptCache()
    run(tokenizer, BOOK, cut=5, max_tokens=3, prompt_cache=cache)
    assert cache.tokens == book[:7].tolist()
    # The conversation goes on: 5 + 3 tokens said, one new.
    second, script = run(tokenizer, BOOK, cut=9, max_tokens=3, prompt_cache=cache)
    assert second[-1].completion.tokens == book[9:12].tolist()  # type: ignore[union-attr]
    assert script.fed[0] == [2]
    # The same prompt again: its last token is computed for its logits.
    _, script = run(tokenizer, BOOK, cut=9, max_tokens=1, prompt_cache=cache)
    assert script.fed[0] == [1]
    # Another beginning: nothing is shared after the first difference.
    other = np.asarray([*book[:2], 9, 9, 9])
    _, script = run(tokenizer, BOOK, prompts=[other], max_tokens=1, prompt_cache=cache)
    assert script.fed[0] == [3]
    with pytest.raises(KbitError, match="one prompt"):
        run(tokenizer, BOOK, n=2, prompt_cache=cache)


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"n": 0}, {"batch": 0}, {"logprobs": -1}, {"stop": ("",)}]
)
def test_refusals(wrong: dict[str, Any]) -> None:
    with pytest.raises(KbitError, match=next(iter(wrong))):
        Options(**wrong)


def test_the_seed_is_told_and_repeats(tokenizer: Tokenizer) -> None:
    sampling = Sampling(temperature=3.0)
    first, _ = run(tokenizer, BOOK, sampling=sampling, max_tokens=20)
    seed = first[-1].completion.seed  # type: ignore[union-attr]
    again, _ = run(tokenizer, BOOK, sampling=Sampling(temperature=3.0, seed=seed), max_tokens=20)
    assert again[-1].completion.tokens == first[-1].completion.tokens  # type: ignore[union-attr]
