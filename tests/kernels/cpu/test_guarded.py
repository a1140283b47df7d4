"""No kernel touches memory beyond a tensor: guard pages, and a build under sanitizers."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kbit_kernels.cpu.library import LIBRARY
from tests.kernels.cpu.script import setup_script

HERE = Path(__file__).parent
SOURCE = LIBRARY.parent / "src"
HARNESS = HERE / "guarded.cpp"
LINKED = (LIBRARY, f"-Wl,-rpath,{LIBRARY.parent}")


def compiler() -> list[str]:
    """The command that builds the library."""
    found: list[str] | None = setup_script().find_compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    return [*found, "-std=c++17", "-pthread", f"-I{SOURCE}"]


def run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """What `command` prints; its output in full where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-8000:]}"
    return done.stdout


def is_gcc(compiler: str) -> bool:
    return "Free Software Foundation" in run(compiler, "--version")


def test_every_kernel_stops_at_the_end(tmp_path: Path) -> None:
    program = tmp_path / "guarded"
    run(*compiler(), HARNESS, "-O1", *LINKED, "-o", program)
    assert "cases, 0 wrong" in run(program, "7")


@pytest.mark.parametrize(
    "flags", [[], ["-fsanitize=address,undefined"]], ids=["pages", "sanitized"]
)
def test_attention_stops_at_the_end(tmp_path: Path, flags: list[str]) -> None:
    """Sanitizers don't see what tiles load, guard pages do."""
    command = compiler()
    if flags and not is_gcc(command[0]):
        pytest.skip("sanitizers are tested with gcc")
    program = tmp_path / "attention"
    layers = sorted(SOURCE.glob("layers_*.cpp"))
    harness = HERE / "guarded_attention.cpp"
    run(*command, "-O1", *flags, harness, *layers, *LINKED, "-o", program)
    assert "cases, 0 wrong" in run(program)


def build_under_sanitizers(folder: Path, *options: str) -> Path:
    program = folder / "sanitized"
    flags = ["-O1", "-ffp-contract=off", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all", *options]
    command = compiler()
    if not is_gcc(command[0]):
        pytest.skip("sanitizers are tested with gcc")
    sources = [str(HARNESS), *sorted(str(path) for path in SOURCE.glob("*.cpp"))]
    objects = [folder / f"{Path(source).stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(
            lambda source, made: run(*command, *flags, "-c", source, "-o", made), sources, objects
        ):
            pass
    run(*command, *flags, *objects, "-o", program)
    return program


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """One variant of each kernel, which keeps the build short."""
    program = build_under_sanitizers(tmp_path, "-DKBIT_COMPACT")
    assert "cases, 0 wrong" in run(program, "17")


@pytest.mark.slow
def test_sanitizers_find_nothing_in_any_variant(tmp_path: Path) -> None:
    """Minutes to build."""
    assert "cases, 0 wrong" in run(build_under_sanitizers(tmp_path), "3")
