"""The generation loop: token ids in, pieces of text out, over any executor.

One step of the loop feeds every unfinished sequence of the batch the token it chose last, and lets
each choose its next one. Finished sequences feed nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from kbit.engine.executor import Executor
from kbit.engine.sampler import GREEDY, Choice, Draw, Sampler, Sampling
from kbit.engine.tokenizer import Detokenizer, Tokenizer
from kbit.errors import KbitError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Options:
    """What to generate.

    max_tokens: at most this many tokens per sample; the context may end it sooner. stop: strings
    that end a sample and are cut off. n: samples of each prompt. logprobs: None, or how many
    alternatives to report for each token. batch: sequences computed together. ignore_eos: go on
    past end-of-sequence tokens (for benchmarks).
    """

    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    batch: int = 16
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "n", "batch"):
            if getattr(self, name) < 1:
                raise KbitError(f"{name} is {getattr(self, name)}, but has to be 1 or above")
        if self.logprobs is not None and self.logprobs < 0:
            raise KbitError(f"logprobs is {self.logprobs}, but has to be 0 or above")
        if "" in self.stop:
            raise KbitError("stop is an empty string, which would stop before the first token")


@dataclass
class Timings:
    """Of one call, all its sequences together; loading is not in it.

    seconds_to_first_token: from the call to the first token of the first batch.
    """

    prompt_tokens: int = 0
    decode_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    seconds_to_first_token: float = 0.0

    @property
    def prompt_tokens_per_second(self) -> float | None:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Of the steps after the first token; None where one token was all."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else None


@dataclass(frozen=True)
class Completion:
    """One finished sample.

    tokens: what was generated, without an end-of-sequence token; text: those tokens' text, up to
    a stop string. finish_reason: "stop" at an end-of-sequence token or a stop string, "length" at
    max_tokens or the end of the context. prompt, sample: which prompt, and which sample of it.
    seed: repeats this sample. logprobs: one per token, or None.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    prompt: int
    sample: int
    seed: int
    logprobs: list[Choice] | None
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """A bit of one sample's text, whole UTF-8; the last one of a sample carries its completion."""

    prompt: int
    sample: int
    text: str
    completion: Completion | None = None


class StopMatcher:
    """Finds stop strings in a text that arrives in pieces, and holds back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string was met (then it ends there)."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a proper beginning of stop."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class PromptCache:
    """Keeps one sequence's cache between calls, so that a conversation that goes on computes only
    its new tokens. Give the same one to `generate` each time; one prompt and one sample only."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.cache: Any = None

    def take(
        self, executor: Executor, prompt: np.ndarray, capacity: int, limit: int
    ) -> tuple[Any, int]:
        """A cache that holds the longest known beginning of the prompt, and that length."""
        if self.cache is None or self.cache.capacity < capacity:
            # Twice what is needed, up to the context: a conversation that grows rarely starts anew.
            roomy = max(capacity, min(max(256, 2 * capacity), limit))
            self.cache, self.tokens = executor.new_cache(1, roomy), []
        shared = 0
        # The last token of the prompt is always computed: its logits are what is wanted.
        for mine, theirs in zip(self.tokens, prompt[:-1].tolist(), strict=False):
            if mine != theirs:
                break
            shared += 1
        self.cache.truncate(0, shared)
        self.tokens = self.tokens[:shared]
        return self.cache, shared


class _Sequence:
    """One sample under way."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: np.ndarray,
        options: Options,
        place: tuple[int, int],
        seed: int,
        limit: int,
    ) -> None:
        self.prompt_index, self.sample_index = place
        self.prompt = tokens
        self.limit = limit
        self.seed = seed
        self.tokens: list[int] = []
        self.choices: list[Choice] = []
        self.finish: FinishReason | None = None
        self._text: list[str] = []
        self._options = options
        prompt = tokens.tolist()
        self._sampler = Sampler(
            options.sampling, seed=seed, sample=self.sample_index, prompt=prompt
        )
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopMatcher(options.stop)

    @property
    def needs_logits_only(self) -> bool:
        """Whether an executor may choose the next token by `draw`."""
        return self._options.logprobs is None and self._sampler.needs_logits_only

    def draw(self) -> Draw:
        """How an executor has to choose the next token."""
        return self._sampler.draw()

    def accept(self, token: int, largest: float) -> Choice:
        """The choice of what an executor drew."""
        return self._sampler.accept(token, largest)

    def choose(self, logits: np.ndarray) -> Choice:
        """Choose the next token here."""
        return self._sampler.choose(logits, logprobs=self._options.logprobs)

    def step(self, choice: Choice, eos: frozenset[int]) -> str:
        """Say the chosen token; returns the text that became certain."""
        if choice.token in eos and not self._options.ignore_eos:
            return self._end("stop", "")
        self.tokens.append(choice.token)
        self.choices.append(choice)
        shown, stopped = self._stops.push(self._detokenizer.push(choice.token))
        if stopped:
            self.finish = "stop"
        elif len(self.tokens) == self.limit:
            return self._end("length", shown)
        self._text.append(shown)
        return shown

    def _end(self, reason: FinishReason, shown: str) -> str:
        self.finish = reason
        rest, stopped = self._stops.push(self._detokenizer.flush())
        if stopped:
            self.finish = "stop"
        else:
            rest += self._stops.flush()
        self._text.append(shown + rest)
        return shown + rest

    def completion(self, timings: Timings) -> Completion:
        assert self.finish is not None
        return Completion(
            text="".join(self._text),
            tokens=self.tokens,
            prompt_tokens=len(self.prompt),
            finish_reason=self.finish,
            prompt=self.prompt_index,
            sample=self.sample_index,
            seed=self.seed,
            logprobs=self.choices if self._options.logprobs is not None else None,
            timings=timings,
        )


def generate(
    executor: Executor,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    options: Options,
    *,
    eos: frozenset[int] = frozenset(),
    context: int | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[Piece]:
    """Generate options.n samples of each prompt (int64 token ids), piece by piece.

    context: the most tokens a sequence may have; the decoder's own where None. Everything is
    checked before the first piece is asked for: raises KbitError for an empty prompt and for one
    longer than the context.
    """
    limit = executor.decoder.max_positions if context is None else context
    for i, prompt in enumerate(prompts):
        which = f"prompt {i + 1}" if len(prompts) > 1 else "the prompt"
        if len(prompt) == 0:
            raise KbitError(f"{which} is empty, and the model has no token to begin with")
        if len(prompt) > limit:
            raise KbitError(
                f"{which} has {len(prompt)} tokens, but the context holds {limit}: shorten it"
            )
    if prompt_cache is not None and len(prompts) * options.n != 1:
        raise KbitError("a prompt cache serves one prompt and one sample")
    seed = options.sampling.seed
    seed = secrets.randbits(32) if seed is None else seed
    sequences = [
        _Sequence(
            tokenizer,
            np.asarray(prompt, dtype=np.int64),
            options,
            (i, sample),
            seed,
            # The last token of a full context may still choose a successor.
            min(options.max_tokens, limit - len(prompt) + 1),
        )
        for i, prompt in enumerate(prompts)
        for sample in range(options.n)
    ]
    return _run(executor, sequences, options.batch, eos, prompt_cache, limit)


def _choices(
    executor: Executor,
    cache: Any,
    feed: Sequence[np.ndarray],
    group: Sequence[_Sequence],
    active: Sequence[int],
) -> dict[int, Choice]:
    """Compute one step, and choose the next token of every active sequence: on the device where
    the executor can sample and every choice needs logits only."""
    single = all(tokens.size <= 1 for tokens in feed)
    if single and hasattr(executor, "sample") and all(group[b].needs_logits_only for b in active):
        drawn = executor.sample(
            feed, cache, [group[b].draw() if b in active else GREEDY for b in range(len(group))]
        )
        return {b: group[b].accept(*drawn[b]) for b in active}
    logits = executor.forward(feed, cache)
    return {b: group[b].choose(logits[b]) for b in active}


def _run(
    executor: Executor,
    sequences: list[_Sequence],
    batch: int,
    eos: frozenset[int],
    prompt_cache: PromptCache | None,
    context: int,
) -> Iterator[Piece]:
    timings = Timings()
    begin = time.perf_counter()
    for start in range(0, len(sequences), batch):
        group = sequences[start : start + batch]
        capacity = max(len(s.prompt) + s.limit - 1 for s in group)
        known = 0
        if prompt_cache is None:
            cache = executor.new_cache(len(group), capacity)
        else:
            cache, known = prompt_cache.take(executor, group[0].prompt, capacity, context)
        feed = [s.prompt[known:] for s in group]
        first = True
        while any(s.finish is None for s in group):
            step_begin = time.perf_counter()
            active = [b for b, s in enumerate(group) if s.finish is None]
            choices = _choices(executor, cache, feed, group, active)
            if prompt_cache is not None:
                prompt_cache.tokens.extend(feed[0].tolist())
            pieces = [(group[b], group[b].step(choices[b], eos)) for b in active]
            now = time.perf_counter()
            if first:
                timings.prompt_tokens += sum(len(f) for f in feed)
                timings.prompt_seconds += now - step_begin
                timings.seconds_to_first_token = timings.seconds_to_first_token or now - begin
            else:
                timings.decode_tokens += len(active)
                timings.decode_seconds += now - step_begin
            first = False
            feed = [
                np.asarray(s.tokens[-1:] if s.finish is None else [], dtype=np.int64) for s in group
            ]
            for sequence, text in pieces:
                done = sequence.completion(timings) if sequence.finish is not None else None
                if text or done is not None:
                    yield Piece(sequence.prompt_index, sequence.sample_index, text, done)
