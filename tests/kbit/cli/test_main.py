"""The front door: what it imports, what it says, how it fails."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import kbit
from kbit.cli import main as front
from tests.kbit.cli.conftest import Ran

HEAVY = {"numpy", "torch", "tokenizers", "jinja2", "rich", "huggingface_hub", "gguf"}
Run = Callable[..., Ran]


def test_help_and_version_import_nothing_heavy() -> None:
    for arguments in (["--help"], ["--version"]):
        code = (
            "import sys\n"
            "from kbit.cli.main import main\n"
            "try:\n"
            f"    main({arguments})\n"
            "except SystemExit as end:\n"
            "    assert not end.code\n"
            f"print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stderr.strip() == "[]"
        assert "generate" in done.stdout or kbit.__version__ in done.stdout


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_numpy_is_first_imported_where_its_threads_are_held_back(command: str) -> None:
    code = (
        "import os, sys\n"
        "from kbit.cli import options\n"
        "import_numpy = options.import_numpy\n"
        "def checked():\n"
        "    assert 'numpy' not in sys.modules\n"
        "    import_numpy()\n"
        "    assert 'numpy' in sys.modules and 'OPENBLAS_NUM_THREADS' not in os.environ\n"
        "    raise SystemExit(7)\n"
        "options.import_numpy = checked\n"
        "from kbit.cli.main import main\n"
        f"main(['{command}', 'nowhere'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 7, done.stderr


def test_help_lists_every_command_with_its_docstring(run: Run) -> None:
    told = run("--help")
    assert told.status == 0
    assert "cannot be" not in told.out
    for name in front.COMMANDS:
        line = next(x for x in told.out.splitlines() if x.startswith(f"  {name} "))
        assert len(line.split()) > 3


@pytest.mark.parametrize("name", front.COMMANDS)
def test_every_option_says_its_default(name: str) -> None:
    group: Any = typer.main.get_command(front.app)
    command = group.get_command(None, name)
    assert command.name == name
    for param in command.params:
        assert param.help, (name, param.name)
        if not param.opts[0].startswith("-") or param.required or param.name == "help":
            continue
        flag = param.is_flag and param.default is False
        told = isinstance(param.show_default, str) or (
            param.show_default is not False and param.default is not None
        )
        assert flag or told, f"kbit {name} {param.opts[0]} does not say its default"


def test_commands_of_other_packages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        SimpleNamespace(name="parse-back", value="tests.kbit.cli.test_main:added_command"),
        SimpleNamespace(name="gone", value="no_such_package.nowhere:f"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    told = run("--help")
    assert "Says a word back." in told.out
    assert "(cannot be" in told.out
    assert run("parse-back", "hello").out == "hello\n"


def added_command(word: str) -> None:
    """Says a word back."""
    print(word)


def test_errors_are_one_line_and_status_2(run: Run, tmp_path: Path) -> None:
    told = run("generate", tmp_path / "nope", "-p", "x")
    assert told.status == 2
    assert told.err.startswith("kbit: ")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert run("no-such-command").status == 2
    assert run("generate").status == 2


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(kbit.KbitError):
        front.main(["generate", str(tmp_path / "nope"), "-p", "x", "--debug"])


@pytest.mark.parametrize(
    ("error", "told", "status"),
    [
        (kbit.KbitError("two\nlines"), "kbit: two lines", 2),
        (OSError(28, "No space left on device", "out.bin"), "out.bin: No space left", 2),
        (MemoryError(), "not enough memory", 2),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "GPU has not enough memory", 2),
        (RuntimeError("odd"), "inside kbit (RuntimeError: odd)", 2),
        (KeyboardInterrupt(), "kbit: interrupted", 2),
    ],
)
def test_every_error_has_a_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, told: str, status: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("kbit.cli.doctor.examine", fail)
    ran = run("doctor")
    assert ran.status == status
    assert told in ran.err
    assert "Traceback" not in ran.err


def test_letters_that_the_terminal_lacks(speaker: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kbit", "eval", str(speaker), "--text", "-"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        input="It was a bright cold day in April. " * 40,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "? one standard error" in done.stdout


def test_a_closed_pipe_is_no_error(speaker: Path) -> None:
    # The reader is gone before the first word.
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kbit.cli.main", "inspect", str(speaker)],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(write)
    assert "Traceback" not in done.stderr
