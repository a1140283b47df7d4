"""`kbit generate`: prompts in, text out, as it comes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kbit.cli import options

if TYPE_CHECKING:
    from kbit.engine.generate import Completion, Piece
    from kbit.engine.model import Model


def generate(
    model: options.ModelArgument,
    text: Annotated[
        str | None,
        typer.Argument(help="A prompt, as with -p.", metavar="PROMPT", show_default=False),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--prompt",
            help="A prompt; may be repeated.",
            metavar="TEXT",
            show_default="standard input",
        ),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "-f",
            "--file",
            help="A file that is a prompt, without its last line break; may be repeated.",
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    n: Annotated[int, typer.Option("-n", "--samples", help="Samples of each prompt.")] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: every token's log-probability, and those of the N likeliest.",
            metavar="N",
            show_default="off",
        ),
    ] = None,
    as_json: options.AsJson = False,
    backend: options.Backend = "auto",
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    context: options.Context = None,
) -> None:
    """Complete prompts, printing the text as it comes.

    The prompts are PROMPT and those of -p and -f, in this order, or else standard input. Text is
    completed as it stands; for questions to a chat model there is `kbit chat`.
    """
    options.import_numpy()
    from kbit.errors import KbitError

    if logprobs is not None and not as_json:
        raise KbitError("--logprobs needs --json, whose output has a place for them")
    prompts = _prompts([*([] if text is None else [text]), *(prompt or [])], file or [])
    begin = time.perf_counter()
    loaded = options.load_model(
        model,
        backend=backend,
        device=device,
        dtype=dtype,
        threads=threads,
        context=context,
        arithmetic="fast",
    )
    load_seconds = time.perf_counter() - begin
    pieces = loaded.stream(
        prompts,
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
        n=n,
        logprobs=logprobs,
    )
    show = None if as_json else _Printer(headed=len(prompts) * n > 1)
    done: list[Completion] = []
    for piece in pieces:
        if show is not None:
            show(piece)
        if piece.completion is not None:
            done.append(piece.completion)
    done.sort(key=lambda c: (c.prompt, c.sample))
    if as_json:
        print(json.dumps(_record(loaded, model, device, prompts, done, load_seconds)))
    elif sys.stderr.isatty():
        print(_footer(done), file=sys.stderr)


def _prompts(texts: list[str], files: list[Path]) -> list[str]:
    if texts or files:
        return [*texts, *(options.read_text(f).removesuffix("\n") for f in files)]
    if sys.stdin.isatty():
        print("kbit: reading the prompt from the terminal; Ctrl-D ends it", file=sys.stderr)
    return [options.read_text(Path("-")).removesuffix("\n")]


class _Printer:
    """Prints samples one after the other although they grow together: the first unfinished one
    live, those behind it once it is their turn."""

    def __init__(self, *, headed: bool) -> None:
        self._headed = headed
        self._turn: tuple[int, int] | None = None
        self._waiting: dict[tuple[int, int], list[str]] = {}
        self._finished: set[tuple[int, int]] = set()

    def __call__(self, piece: Piece) -> None:
        place = (piece.prompt, piece.sample)
        self._waiting.setdefault(place, []).append(piece.text)
        if piece.completion is not None:
            self._finished.add(place)
        if self._turn is None:
            self._begin(min(self._waiting))
        while self._turn in self._waiting:
            turn = self._turn
            sys.stdout.write("".join(self._waiting[turn]))
            self._waiting[turn].clear()
            sys.stdout.flush()
            if turn not in self._finished:
                break
            sys.stdout.write("\n")
            sys.stdout.flush()
            del self._waiting[turn]
            self._turn = None
            if self._waiting:
                self._begin(min(self._waiting))

    def _begin(self, turn: tuple[int, int]) -> None:
        self._turn = turn
        if self._headed:
            print(f"== prompt {turn[0] + 1}, sample {turn[1] + 1}", flush=True)


def _record(
    loaded: Model,
    name: str,
    device: str,
    prompts: list[str],
    done: list[Completion],
    load_seconds: float,
) -> dict[str, Any]:
    """What --json prints; times in seconds, of all samples together."""
    from kbit import __version__
    from kbit.engine.memory import peak_memory_bytes

    timings = done[0].timings
    return {
        "kbit_version": __version__,
        "model": name,
        "backend": loaded.executor.name,
        "device": device,
        "samples": [_sample(prompts[c.prompt], c) for c in done],
        "load_seconds": load_seconds,
        "seconds_to_first_token": timings.seconds_to_first_token,
        "prompt_tokens_per_second": timings.prompt_tokens_per_second,
        "decode_tokens_per_second": timings.decode_tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _sample(prompt: str, completion: Completion) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt": prompt,
        "sample": completion.sample,
        "text": completion.text,
        "tokens": len(completion.tokens),
        "token_ids": completion.tokens,
        "prompt_tokens": completion.prompt_tokens,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
    }
    if completion.logprobs is not None:
        found["logprobs"] = [
            {
                "token": c.token,
                "logprob": c.logprob,
                "top": [{"token": token, "logprob": value} for token, value in c.top],
            }
            for c in completion.logprobs
        ]
    return found


def _footer(done: list[Completion]) -> str:
    timings = done[0].timings
    count = sum(len(c.tokens) for c in done)
    parts = [f"{count} tokens", f"first after {timings.seconds_to_first_token:.2f} s"]
    if timings.decode_tokens_per_second is not None:
        parts.append(f"then {timings.decode_tokens_per_second:.1f} a second")
    if any(c.finish_reason == "length" for c in done):
        parts.append("cut at --max-tokens or the context's end")
    return f"[{', '.join(parts)}]"
