"""`kbit chat`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli import options

if TYPE_CHECKING:
    import numpy as np

    from kbit.engine.model import Model

HELP = """\
/reset         forget the conversation (the system message stays)
/system TEXT   set the system message and start anew; without TEXT show it
/help          this list
/exit          leave; so does Ctrl-D
Ctrl-C stops an answer. Anything else is said to the model."""


def chat(
    model: options.ModelArgument,
    system: Annotated[
        str | None, typer.Option(help="The system message.", show_default="the template's")
    ] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.1,  # greedy, small models go in circles
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    backend: options.Backend = "auto",
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    context: options.Context = None,
) -> None:
    """Talk to a model with its own chat template; /help lists what else can be typed."""
    options.import_numpy()
    loaded = options.load_model(
        model,
        backend=backend,
        device=device,
        dtype=dtype,
        threads=threads,
        context=context,
        arithmetic="fast",
    )
    conversation = Conversation(
        loaded,
        system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=options.parse_logit_bias(logit_bias),
        seed=seed,
        stop=options.parse_stops(stop),
    )
    conversation.prepare([{"role": "user", "content": "?"}])  # refuses bad options before a word
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its history and editing
        print("/help lists the commands, Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        if line in ("/exit", "/quit"):
            return
        if line.startswith("/"):
            print(_command(conversation, line), file=sys.stderr)
        elif line:
            _answer(conversation, line)


def _command(conversation: Conversation, line: str) -> str:
    name, _, rest = line.partition(" ")
    if name == "/reset":
        conversation.reset()
        return "(the conversation starts anew)"
    if name == "/system":
        if not rest.strip():
            return f"(system message: {conversation.system or 'none of yours'})"
        conversation.system = rest.strip()
        conversation.reset()
        return "(system message set; the conversation starts anew)"
    return HELP if name == "/help" else f"({name} is no command; /help lists them)"


def _answer(conversation: Conversation, line: str) -> None:
    """Print the model's answer as it comes; Ctrl-C keeps what came so far."""
    from kbit.errors import KbitError

    try:
        for text in conversation.say(line):
            print(text, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        print("(stopped)", file=sys.stderr)
    except KbitError as error:
        print(f"({error})", file=sys.stderr)
    for note in conversation.notes():
        print(f"({note})", file=sys.stderr)


class Conversation:
    """Messages so far, and the cache that makes the next answer compute only what is new."""

    def __init__(self, model: Model, system: str | None, **sampling: Any) -> None:
        from kbit.engine.generate import PromptCache

        self.model = model
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self._sampling = sampling
        self._cache = PromptCache()
        self._notes: list[str] = []

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = []

    def notes(self) -> list[str]:
        """What the user should know about the last answer; empties the list."""
        told, self._notes = self._notes, []
        return told

    def prepare(self, messages: list[dict[str, Any]]) -> np.ndarray:
        """Token ids of the conversation, int64 [T]."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.model.encode_chat([*first, *messages])

    def say(self, text: str) -> Any:
        """Yield the answer in pieces. The oldest turns are forgotten where the context is full.

        An answer that is interrupted stays in the conversation as far as it came. KbitError leaves
        the conversation as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.prepare(messages)
        # A quarter of the context is kept for the answer.
        room = self.model.context - min(self._sampling["max_tokens"], self.model.context // 4)
        forgotten = 0
        while len(ids) > room and len(messages) > 2:
            messages = messages[2:]
            forgotten += 1
            ids = self.prepare(messages)
        pieces = self.model.stream(ids.tolist(), prompt_cache=self._cache, **self._sampling)
        if forgotten:
            self._notes.append(f"the context is full: the oldest {forgotten} turns are forgotten")
        said: list[str] = []
        try:
            for piece in pieces:
                said.append(piece.text)
                if piece.completion is not None and piece.completion.finish_reason == "length":
                    self._notes.append("cut at --max-tokens or the context's end")
                if piece.text:
                    yield piece.text
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
