"""`kbit`: finds the command, imports it alone, and turns errors into one line."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup, TyperOption

# Name -> module:function, in the order of the help. Nothing here is imported before it is called:
# their help lines are read from the docstrings in the source.
COMMANDS = {
    name: f"kbit.cli.{name}:{name}"
    for name in (
        "pull",
        "quantize",
        "inspect",
        "verify",
        "generate",
        "chat",
        "eval",
        "tune",
        "doctor",
    )
}
ENTRY_POINTS = "kbit.commands"  # the group in which other packages (the study) add theirs


class Interrupted(Exception):  # noqa: N818 (no error)
    """Ctrl-C."""


class LazyGroup(TyperGroup):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *sorted(_added())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        target = COMMANDS.get(cmd_name) or _added().get(cmd_name)
        if target is None:
            return None
        module, _, name = target.partition(":")
        found = getattr(import_module(module), name)
        return _command(cmd_name, found)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would end the process without a word
            raise Interrupted from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        targets = {**COMMANDS, **dict(sorted(_added().items()))}
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(target)) for name, target in targets.items()])


def _command(name: str, found: Callable[..., Any] | typer.Typer) -> Any:
    """A function, or an app with commands of its own, as what a group holds."""
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name)(found)
        found = app
    command = typer.main.get_command(found)
    command.name = name
    for param in command.params:
        if isinstance(param, TyperOption) and param.is_flag and param.default is False:
            param.show_default = "off"  # which typer leaves unsaid
    return command


def _added() -> dict[str, str]:
    """Commands of installed packages: name -> module:object."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def _summary(target: str) -> str:
    """First line of the docstring of a function, else of its module, without importing it."""
    module, _, name = target.partition(":")
    try:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            return "(cannot be found)"
        with open(spec.origin, encoding="utf-8") as source:
            tree = ast.parse(source.read())
    except (ImportError, OSError, SyntaxError):
        return "(cannot be loaded)"
    text = ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            text = ast.get_docstring(node) or text
    return text.split("\n", 1)[0]


def _version(wanted: bool) -> None:
    if wanted:
        from kbit import __version__

        print(f"kbit {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def kbit(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from (after any command).")
    ] = False,
) -> None:
    """Store a language model's weights in 2 to 8 bits, run it, and measure what the bits cost."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 otherwise, after one sentence that says why."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal without the model's letters shows "?"
        sys.stdout.reconfigure(errors="replace")
    try:
        typer.main.get_command(app)(args=arguments, prog_name="kbit")
    except (KeyboardInterrupt, Interrupted):
        if sys.stderr.isatty():
            print(file=sys.stderr)  # leaves the line that the terminal ended in ^C
        _fail("interrupted", 2)
    except Exception as error:
        if debug:
            raise
        _fail(_sentence(error), 2)


def _sentence(error: Exception) -> str:
    from kbit.errors import KbitError

    if isinstance(error, KbitError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return "there is not enough memory for this"
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if extra := _extra_with(package):
            return f"this needs {package}, which is an extra: pip install 'kbit[{extra}]'"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be there
        return "the GPU has not enough memory for this; take fewer bits, a smaller batch or context"
    told = f"{type(error).__name__}: {error}".split("\n")[0]
    return f"something went wrong inside kbit ({told}); --debug shows where"


def _extra_with(package: str) -> str | None:
    """The first extra of this distribution that brings a package, read from its metadata."""
    from importlib.metadata import requires

    for requirement in requires("kbit") or ():
        found = re.fullmatch(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if found and found[1].replace("-", "_") == package:
            return found[2]
    return None


def _fail(sentence: str, status: int) -> None:
    sys.stdout.flush()
    print(f"kbit: {sentence}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
