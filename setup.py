"""Builds the native CPU library: a plain shared library, loaded with ctypes.

It is optional: without a C++17 compiler the install goes on, and `kbit doctor` says what is
missing. Objects stay in build/native, so that installing again compiles only what changed.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
SOURCE = ROOT / "kernels" / "kbit_kernels" / "cpu" / "src"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-psabi"]
FLAGS += ["-ffp-contract=off"]  # rounds as numpy does: fused only where it is written so


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, or the first one found."""
    if os.environ.get("CXX"):
        return os.environ["CXX"].split()
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return [found] if found else None


def is_newer(made: Path, needs: Path) -> bool:
    """Whether an object is newer than every file that the compiler's list `needs` names."""
    if not (made.exists() and needs.exists()):
        return False
    names = re.split(r"(?<!\\)\s+", needs.read_text().replace("\\\n", " ").strip())[1:]
    files = [name.replace("\\ ", " ") for name in names]
    return all(os.path.exists(f) and os.path.getmtime(f) < made.stat().st_mtime for f in files)


def compile_library(target: Path, compiler: list[str], flags: list[str], objects: Path) -> None:
    """Compiles every source in parallel and links `target`, written aside and renamed.

    Raises:
        subprocess.CalledProcessError: a source does not compile.
    """
    objects.mkdir(parents=True, exist_ok=True)
    command = [*compiler, *flags]
    stamp = objects / "command.txt"
    same_command = stamp.exists() and stamp.read_text() == " ".join(command)

    def compile_source(source: Path) -> str:
        made, needs = objects / f"{source.stem}.o", objects / f"{source.stem}.d"
        if not (same_command and is_newer(made, needs)):
            aside, started = f"{made}.{os.getpid()}", time.time()
            subprocess.run(
                [*command, "-MD", "-MF", str(needs), "-c", str(source), "-o", aside], check=True
            )
            os.utime(aside, (started, started))  # sources may change while they are compiled
            os.replace(aside, made)
        return str(made)

    # the largest first: they bound the time on few cores
    sources = sorted(SOURCE.glob("*.cpp"), key=lambda path: "kernels_avx" not in path.name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compile_source, sources))
    stamp.write_text(" ".join(command))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    subprocess.run([*command, "-shared", *made, "-o", str(aside)], check=True)
    os.replace(aside, target)


class BuildNative(build_ext):
    """Builds with one compiler command a file, and goes on without a library if that fails."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None:
            print("kbit: no C++ compiler; the native CPU library is left out", file=sys.stderr)
            return
        try:
            target = Path(self.get_ext_fullpath(ext.name))
            compile_library(target, compiler, FLAGS, ROOT / "build" / "native")
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"kbit: the native CPU library is left out: {error}", file=sys.stderr)


class AnyPythonWheel(bdist_wheel):
    """The library knows nothing of Python: one wheel a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("kbit_kernels.cpu._native", sources=[], optional=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    )
