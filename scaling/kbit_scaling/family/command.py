"""Train a family of small models, for a study from nothing to the report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import TaskID

    from .train import Progress

family = typer.Typer(
    help="Train a small model family.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@family.callback()
def _family() -> None:
    """Train a small model family."""


@family.command("train")
def train(
    out: Annotated[Path, typer.Option(help="Folder of the family.", metavar="DIR")],
    text: Annotated[
        list[Path], typer.Option(help="A plain text file; may be repeated.", metavar="FILE")
    ],
    preset: Annotated[str, typer.Option(help="pocket, books or desk.")] = "pocket",
    sizes: Annotated[
        str, typer.Option(help="Sizes of the preset, with commas.", show_default="all")
    ] = "",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens for each size.", show_default="the preset's")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="An existing tokenizer.json.", metavar="FILE")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights and order of data.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all")] = None,
    workers: Annotated[
        int, typer.Option(help="Sizes trained side by side; they share the threads.", min=1)
    ] = 1,
    stop_after: Annotated[
        float | None,
        typer.Option(help="Save and stop after so many seconds.", show_default="never"),
    ] = None,
) -> None:
    """Train five sizes of Llama with one tokenizer; run again to go on where it stopped."""
    from dataclasses import replace

    import torch

    from .presets import get_preset
    from .train import train as run

    chosen = get_preset(preset).with_sizes(tuple(name for name in sizes.split(",") if name))
    if tokens is not None:
        chosen = replace(chosen, tokens=tokens, first_tokens=min(chosen.first_tokens, tokens))
    torch.set_num_threads(max(1, (threads or torch.get_num_threads()) // workers))
    with _TrainingBar() as bar:
        done = run(
            chosen,
            list(text),
            out,
            tokenizer=tokenizer,
            seed=seed,
            device=device,
            workers=workers,
            stop_after_s=stop_after,
            on_step=bar.on_step,
            on_checkpoint=lambda c: print(f"{c.path}: {c.loss:.4f} nats per token"),
        )
    if not done:
        print("stopped before the end; the same command goes on", file=sys.stderr)


class _TrainingBar:
    """Tokens of the size in training, on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    def on_step(self, step: Progress) -> None:
        if step.size not in self._tasks:
            self._tasks[step.size] = self._progress.add_task(
                step.size, total=step.total_tokens, speed=""
            )
        speed = f"{step.tokens_per_second:,.0f} tokens/s, loss {step.loss:.3f}"
        self._progress.update(self._tasks[step.size], completed=step.tokens, speed=speed)
