"""Killed anywhere, quantizing leaves nothing under the final name, and the same call resumes."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kbit
from kbit.checkpoint import writer
from kbit.checkpoint.reader import open_checkpoint
from kbit.checkpoint.verify import verify_checkpoint
from kbit.quantize import pipeline, workdir
from kbit_kernels.errors import KbitError
from tests.kbit.checkpoint.build import write_llama

fork = multiprocessing.get_context("fork")


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at(owner: Any, name: str, call: int, after: bool) -> None:
    """Make the call-th call of owner.name kill this process, before or after it does its work."""
    original = getattr(owner, name)
    numbers = itertools.count(1)  # threads call too: each call needs a number of its own

    def dying(*args: Any, **kwargs: Any) -> Any:
        number = next(numbers)
        if number == call and not after:
            _die()
        result = original(*args, **kwargs)
        if number == call:
            _die()
        return result

    setattr(owner, name, dying)


def _in_child(action: Callable[[], Any]) -> int | None:
    child = fork.Process(target=action)
    child.start()
    child.join()
    return child.exitcode


POINTS: dict[str, tuple[Any, str, int]] = {
    "creating the directory": (workdir.WorkDirectory, "_take", 1),
    "reserving space": (writer, "reserve", 1),
    "first bytes": (pipeline.FilledFiles, "write", 1),
    "later bytes": (pipeline.FilledFiles, "write", 20),
    "first record": (workdir.WorkDirectory, "record", 1),
    "seventh record": (workdir.WorkDirectory, "record", 7),
    "last record": (workdir.WorkDirectory, "record", 20),
    "sync": (pipeline.FilledFiles, "sync", 1),
    "side files": (pipeline, "copy_side_files", 1),
    "config.json": (pipeline, "write_text", 1),
    "before the rename": (writer, "sync_directory", 1),
    "after the rename": (writer, "sync_directory", 2),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("m") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def uninterrupted(model: Path) -> dict[str, bytes]:
    kbit.quantize(model, model.parent / "whole", 3)
    return _files(model.parent / "whole")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at(
    model: Path,
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
    point: str,
    force: bool,
    after: bool,
) -> None:
    out = tmp_path / "out"
    before: dict[str, bytes] = {}
    if force:
        kbit.quantize(model, out, 8)
        before = _files(out)

    def run() -> None:
        _kill_at(*POINTS[point], after)
        kbit.quantize(model, out, 3, force=force)

    assert _in_child(run) == -signal.SIGKILL
    found = _files(out) if out.exists() else {}
    # nothing or the old checkpoint, or, when already renamed, all of the new one
    assert found in (before, uninterrupted)
    if found == uninterrupted:
        assert "rename" in point
        return
    hidden = [path.name for path in tmp_path.iterdir() if path != out]
    assert hidden in ([".out.partial"], [])
    result = kbit.quantize(model, out, 3, force=force)
    assert _files(out) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    finished = {"first record": 0, "seventh record": 6, "last record": 19}.get(point)
    if finished is not None:
        assert result.resumed_tensors == finished + after


def _partial(model: Path, out: Path, records: int = 9) -> Path:
    """A killed run with some finished tensors."""

    def run() -> None:
        _kill_at(workdir.WorkDirectory, "record", records, True)
        kbit.quantize(model, out, 3)

    assert _in_child(run) == -signal.SIGKILL
    return out.with_name(f".{out.name}.partial")


def test_other_options_and_other_sources_start_over(
    model: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _partial(model, out)
    assert kbit.quantize(model, out, 3, search=True).resumed_tensors == 0
    shutil.rmtree(out)
    _partial(model, out)
    other = write_llama(tmp_path / "model", seed=1, tie_word_embeddings=False)
    assert kbit.quantize(other, out, 3).resumed_tensors == 0
    assert _files(out) != uninterrupted


@pytest.mark.parametrize("damage", ["data", "half a line", "rubbish", "identity", "empty"])
def test_damaged_work_is_done_again(
    model: Path, uninterrupted: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    """As after a power cut: records without data, half a record, no journal at all."""
    out = tmp_path / "out"
    partial = _partial(model, out)
    journal = partial / workdir.JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 10
    expected = {"data": 8, "half a line": 8}.get(damage, 0)
    if damage == "data":
        record = json.loads(lines[4])
        place = open_checkpoint_place(partial, next(iter(record["sha256"])))
        with open(partial / "model.safetensors", "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
    elif damage == "half a line":
        journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    elif damage == "rubbish":
        journal.write_bytes(b"".join(lines[:3]) + b"{]\n" + b"".join(lines[3:]))
    elif damage == "identity":
        journal.write_bytes(b'{"identity": "0"}\n' + b"".join(lines[1:]))
    else:
        journal.write_bytes(b"")
    assert kbit.quantize(model, out, 3).resumed_tensors == expected
    assert _files(out) == uninterrupted


def open_checkpoint_place(partial: Path, stored: str) -> int:
    from kbit.checkpoint.safetensors import SafetensorsFile

    return SafetensorsFile(partial / "model.safetensors").entries[stored].start


def test_interrupted_twice(model: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    _partial(model, out, 3)
    _partial(model, out, 4)  # four more
    assert kbit.quantize(model, out, 3).resumed_tensors == 7
    assert _files(out) == uninterrupted


def test_two_processes_on_one_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = workdir.WorkDirectory(out, "first", force=False)
    with pytest.raises(KbitError, match="another kbit process"):
        kbit.quantize(model, out, 3)
    work.record("a", {})
    work.leave()
    assert kbit.quantize(model, out, 3).resumed_tensors == 0
    with pytest.raises(KbitError, match="exists already"):
        kbit.quantize(model, out, 3)


def test_ctrl_c_keeps_finished_work(
    model: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = workdir.WorkDirectory.record

    def interrupting(self: workdir.WorkDirectory, name: str, sums: dict[str, str]) -> None:
        record(self, name, sums)
        if len(self.done) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workdir.WorkDirectory, "record", interrupting)
        with pytest.raises(KeyboardInterrupt):
            kbit.quantize(model, tmp_path / "out", 3)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert kbit.quantize(model, tmp_path / "out", 3).resumed_tensors == 5
    assert _files(tmp_path / "out") == uninterrupted


WAITING = """
import sys
from kbit.cli.main import main
from kbit.quantize.workdir import WorkDirectory

record = WorkDirectory.record

def waiting(self, *arguments):
    record(self, *arguments)
    if len(self.done) == 6:
        print("six", flush=True)
        sys.stdin.read()

WorkDirectory.record = waiting
main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_command_killed_while_it_works(
    model: Path, uninterrupted: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    """The command in its own process, which gets a signal once six tensors are finished."""
    arguments = ["quantize", str(model), "--bits", "3", "-o", str(tmp_path / "an out")]
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "six\n"
        process.send_signal(number)
        _, errors = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 2
        assert "stopped with 6 of 21 tensors finished" in errors
        assert "Traceback" not in errors
    else:
        assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".an out.partial"]
    again = subprocess.run(
        [sys.executable, "-m", "kbit.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "resuming: 6 of 21 tensors" in again.stderr
    assert _files(tmp_path / "an out") == uninterrupted
    assert verify_checkpoint(open_checkpoint(tmp_path / "an out")) == []
