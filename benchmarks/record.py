"""Where results go: JSON under benchmarks/results/, with machine, versions and git revision."""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "kbit",
    "numpy",
    "torch",
    "triton",
    "transformers",
    "bitsandbytes",
    "llama-cpp-python",
)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _revision() -> str:
    """The commit that was measured; `+` marks a tree with changes beside results."""
    run = {"capture_output": True, "text": True, "cwd": Path(__file__).parent}
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run)  # type: ignore[call-overload]
        dirty = subprocess.run(  # type: ignore[call-overload]
            ["git", "status", "--porcelain", "--untracked-files=no", "..", ":!results"], **run
        )
    except OSError:
        return "unknown"
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def last_level_cache_bytes() -> int:
    """As the system reports it: in a virtual machine that is the host's, shared with others."""
    sizes = []
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(size.read_text().strip().removesuffix("K")) << 10)
    return max(sizes, default=32 << 20)


def environment() -> dict[str, Any]:
    """What a result was measured on and with."""
    affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": _versions(),
        "git_revision": _revision(),
    }


def machine() -> str:
    """This machine's name in results, such as intel-xeon-processor-2-cores."""
    here = environment()
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)", " ", here["cpu"].lower()))
    return "-".join([*words, str(here["cores"]), "cores"])


def save(name: str, command: str, result: dict[str, Any]) -> Path:
    """Write `results/NAME.json`: the environment, the command that repeats it, and `result`."""
    return _write(RESULTS / f"{name}.json", _stamped(command, result))


def save_section(section: str, command: str, result: dict[str, Any]) -> Path:
    """Put one section into `results/MACHINE.json`; the others stay as they are."""
    path = RESULTS / f"{machine()}.json"
    sections = json.loads(path.read_text()) if path.exists() else {}
    return _write(path, sections | {section: _stamped(command, result)})


def _stamped(command: str, result: dict[str, Any]) -> dict[str, Any]:
    return {"environment": environment(), "command": command, **result}


def _write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    return path
