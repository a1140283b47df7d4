"""`kbit.load`: a checkpoint that is ready to speak."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.engine.executor import Executor, load_executor
from kbit.engine.generate import Completion, Options, Piece, PromptCache, generate
from kbit.engine.sampler import Sampling
from kbit.engine.tokenizer import Tokenizer
from kbit.errors import KbitError

if TYPE_CHECKING:
    from kbit.engine.chat import ChatTemplate, Message
    from kbit.evaluate.protocols import Protocol
    from kbit.evaluate.run import Evaluation

Prompt = str | Sequence[int]
"""A text, or token ids that are taken as they are."""


def load(
    model: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    context: int | None = None,
    **executor_options: Any,
) -> Model:
    """Open a model for generating and evaluating.

    model: a directory (plain or quantized by kbit), a .gguf file, a Hub id or an alias such as
    "smollm2-135m-instruct". backend: auto, native or torch. device: cpu or cuda. threads: None
    leaves it to the backend. context: the most tokens a text may have; None is the model's own.
    Further options go to the executor (dtype, ...). Raises KbitError for whatever is wrong with
    the model or an option.
    """
    checkpoint = open_checkpoint(_locate(model))
    if threads is not None:
        if threads < 1:
            raise KbitError(f"threads is {threads}, but has to be 1 or above")
        executor_options["threads"] = threads
    executor = load_executor(checkpoint, backend, device, **executor_options)
    return Model(checkpoint, executor, context=context)


def _locate(model: str | os.PathLike[str]) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    from kbit.hub import resolve  # imports the hub's client, which a local directory doesn't need

    return Path(resolve(os.fspath(model)))


class Model:
    """A checkpoint, its tokenizer and an executor.

    context: the most tokens of prompt and completion together. eos: the token ids that end a text.
    """

    def __init__(
        self, checkpoint: Checkpoint, executor: Executor, *, context: int | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.executor = executor
        self.tokenizer = Tokenizer.load(checkpoint.path, checkpoint.config)
        longest = executor.decoder.max_positions
        if context is not None and not 1 <= context <= longest:
            raise KbitError(
                f"context is {context}, but this model's texts have 1 to {longest} tokens"
            )
        self.context = longest if context is None else context
        self.eos = _eos(checkpoint)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's chat template; None where it has none."""
        from kbit.engine.chat import ChatTemplate

        return ChatTemplate.load(
            self.checkpoint.path, self.tokenizer.config, self.tokenizer.special_tokens
        )

    def encode(self, prompt: Prompt) -> np.ndarray:
        """Token ids of a prompt, int64 [T], with BOS as the checkpoint says.

        An empty text becomes the model's BOS token where it has one: a text from nothing.
        """
        if not isinstance(prompt, str):
            ids = np.asarray(prompt, dtype=np.int64)
            known = self.executor.decoder.vocab_size
            if ids.ndim != 1 or (ids.size and not 0 <= ids.min() <= ids.max() < known):
                raise KbitError(
                    f"a prompt of token ids has to be a row of ids from 0 to {known - 1}"
                )
            return ids
        ids = self.tokenizer.encode(prompt)
        if ids.size == 0 and self.tokenizer.bos_id is not None:
            return np.asarray([self.tokenizer.bos_id], dtype=np.int64)
        return ids

    def encode_chat(self, messages: Sequence[Message], **values: Any) -> np.ndarray:
        """Token ids of a conversation up to where the assistant is to speak, int64 [T]."""
        if self.chat_template is None:
            raise KbitError(
                f"{self.checkpoint.path}: has no chat template, so it is no chat model; "
                "use kbit generate"
            )
        text = self.chat_template.render(messages, **values)
        # The template writes special tokens itself.
        return self.tokenizer.encode(text, special=False)

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        prompt_cache: PromptCache | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        n: int = 1,
        logprobs: int | None = None,
        batch: int = 16,
        ignore_eos: bool = False,
    ) -> Iterator[Piece]:
        """Generate and yield text as it comes; the last piece of each sample has `.completion`.

        The options are those of `kbit.engine.generate.Options` and `kbit.engine.sampler.Sampling`.
        Everything is checked before this returns (KbitError).
        """
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=dict(logit_bias or {}),
            seed=seed,
        )
        options = Options(
            max_tokens=max_tokens,
            sampling=sampling,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            n=n,
            logprobs=logprobs,
            batch=batch,
            ignore_eos=ignore_eos,
        )
        return generate(
            self.executor,
            self.tokenizer,
            [self.encode(p) for p in _prompts(prompt)],
            options,
            eos=self.eos,
            context=self.context,
            prompt_cache=prompt_cache,
        )

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> list[Completion]:
        """Complete one prompt or several; options as for `stream`.

        Returns the samples in the order of the prompts, n for each.
        """
        done = [p.completion for p in self.stream(prompt, **options) if p.completion is not None]
        return sorted(done, key=lambda c: (c.prompt, c.sample))

    def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        """The assistant's answer to a conversation; options as for `stream`."""
        return self.generate(self.encode_chat(messages).tolist(), **options)[0]

    def evaluate(
        self,
        text: str,
        *,
        against: Model | None = None,
        protocol: Protocol | str = "kbit",
        **options: Any,
    ) -> Evaluation:
        """Perplexity and bits per byte of a text, and the divergence from a reference model.

        protocol: a name of `kbit.evaluate.protocols.PROTOCOLS` or a Protocol; options as for
        `kbit.evaluate.run.evaluate`.
        """
        from kbit.evaluate.run import evaluate

        return evaluate(self, text, against=against, protocol=protocol, **options)


def _prompts(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list: a row of integers is one prompt of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    several: list[Any] = list(prompt)
    if several and all(isinstance(item, (int, np.integer)) for item in several):
        return [several]
    if not several:
        raise KbitError("there is no prompt")
    return several


def _eos(checkpoint: Checkpoint) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json, else of config.json."""
    named = checkpoint.generation_config.get("eos_token_id")
    if named is None:
        named = checkpoint.config.get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    return frozenset(int(i) for i in ids)
