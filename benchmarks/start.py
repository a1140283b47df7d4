"""What it takes to begin: the small install, a cold process's first token, memory, shared pages.

    python benchmarks/start.py [--rounds 7] [--no-install]

The install goes into a fresh environment under build/bench, from a wheel built beforehand, and the
main job runs there without torch: quantize, inspect, generate, chat, eval. Everything else is
`kbit` as a user starts it, the file in the page cache. Section "start" of the machine's results.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from models import ROOT, Model

PROMPT = "The capital of France is"
KBIT = Path(sys.executable).with_name("kbit")
REPOSITORY = Path(__file__).resolve().parents[1]


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def run(*command: Any, given: str = "") -> str:
    words = list(map(str, command))
    return subprocess.run(words, input=given, check=True, capture_output=True, text=True).stdout


def first_token_seconds(checkpoint: Path) -> float:
    """From the start of the process to the first byte on its standard output."""
    command = [KBIT, "generate", checkpoint, "-p", PROMPT, "--max-tokens", "1"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        return time.perf_counter() - begin


def mapped_bytes(pid: int, path: Path) -> dict[str, int]:
    """Resident bytes of a file in a process, and its proportional share of them."""
    found, inside = {"Rss": 0, "Pss": 0}, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if "-" in key.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and key in found:
            found[key] += int(rest.split()[0]) << 10
    return found


def sharing(checkpoint: Path) -> list[dict[str, int]]:
    """Two processes that generate from one checkpoint at a time: the weights' pages in each."""
    file = next(checkpoint.glob("*.safetensors")).resolve()
    command = [KBIT, "generate", checkpoint, "-p", PROMPT, "--max-tokens", "4000"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.read(1)
        return [mapped_bytes(process.pid, file) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def imports_of_generate(checkpoint: Path) -> list[str]:
    """Top-level packages that `kbit generate` imports."""
    code = (
        "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
        "from kbit.cli.main import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "generate", checkpoint, "-p", "a", "--max-tokens", "1"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return sorted({name.partition(".")[0] for name in done.stderr.split()})


def one_model(checkpoint: Path, rounds: int) -> dict[str, Any]:
    answer = "generate", checkpoint, "-p", PROMPT, "--max-tokens", "64", "--json"
    told = [json.loads(run(KBIT, *answer)) for _ in range(rounds)]
    model_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    peak = median(t["peak_memory_bytes"] for t in told)
    return {
        "checkpoint": checkpoint.name,
        "model_bytes": model_bytes,
        "first_token_seconds": median(first_token_seconds(checkpoint) for _ in range(rounds)),
        "peak_bytes": peak,
        "peak_above_model_bytes": peak - model_bytes,
        "two_processes": sharing(checkpoint),
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if not path.is_symlink())


def small_install(checkpoint: Path, source: Path) -> dict[str, Any]:
    """A fresh environment with kbit and nothing else, and the main job in it."""
    folder = ROOT / "small"
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder / "venv")
    python, kbit = folder / "venv/bin/python", folder / "venv/bin/kbit"
    pip = python, "-m", "pip", "--disable-pip-version-check"
    built = seconds(lambda: run(*pip, "wheel", "--no-deps", "-w", folder, REPOSITORY))
    wheel = next(folder.glob("kbit-*.whl"))
    before = size_of(folder / "venv")
    constraints = REPOSITORY / "constraints.txt"
    installed = seconds(lambda: run(*pip, "install", "-c", constraints, wheel))
    packages = json.loads(run(*pip, "list", "--format", "json"))
    grown = size_of(folder / "venv") - before
    made, text = folder / "four-bits", REPOSITORY / "kbit/data/treasure-island.txt"
    run(kbit, "quantize", source, "--bits", 4, "-o", made)
    run(kbit, "inspect", made)
    assert run(kbit, "generate", made, "-p", PROMPT, "--max-tokens", 8).strip()
    assert run(kbit, "chat", made, "--max-tokens", 8, given="hello\n").strip()
    scores = json.loads(run(kbit, "eval", made, "--text", text, "--json"))
    first = median(first_token_seconds(checkpoint) for _ in range(3))
    shutil.rmtree(folder)
    return {
        "bytes": grown,
        "seconds": installed,
        "wheel_seconds": built,
        "packages": sorted(p["name"] for p in packages),
        "bits_per_byte_there": scores["bits_per_byte"],
        "first_token_seconds": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-install", action="store_true")
    args = parser.parse_args()
    model = Model("smollm2-135m-instruct")
    checkpoint = model.kbit(4)
    imported = imports_of_generate(checkpoint)
    assert not {"torch", "triton"} & set(imported), imported
    others = [name for name in imported if name not in sys.stdlib_module_names and name[0] != "_"]
    result: dict[str, Any] = {
        "help_seconds": median(seconds(lambda: run(KBIT, "--help")) for _ in range(args.rounds)),
        "packages_imported": others,
        "models": [one_model(model.kbit(bits), args.rounds) for bits in (8, 4, 2)],
    }
    if not args.no_install:
        result["install"] = small_install(checkpoint, model.source)
    print(json.dumps(result, indent=1))
    if not args.no_install:
        from record import save_section

        save_section("start", f"python benchmarks/start.py --rounds {args.rounds}", result)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
