"""Only what changed is compiled; without a C++ compiler the install goes on, and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cpu.script import ROOT, setup_script


def test_only_what_changed_is_compiled(tmp_path: Path) -> None:
    script, folder = setup_script(), tmp_path / "a folder"
    folder.mkdir()
    compiler = script.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    header, source = folder / "one.h", folder / "one.cpp"
    made, needs = folder / "one.o", folder / "one.d"
    header.write_text("")
    source.write_text('#include "one.h"\n')
    for path in (header, source):
        os.utime(path, (0, 0))
    command = [*compiler, "-MD", "-MF", needs, "-c", source, "-o", made]
    subprocess.run(list(map(str, command)), check=True)
    assert script.is_newer(made, needs)
    os.utime(header, (0, made.stat().st_mtime + 1))
    assert not script.is_newer(made, needs)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"PATH": "", "CXX": ""}, "no C++ compiler; the native CPU library is left out"),
        ({"CXX": "/no/such/compiler"}, "the native CPU library is left out"),
    ],
)
def test_without_a_compiler_the_install_goes_on(
    tmp_path: Path, environment: dict[str, str], told: str
) -> None:
    places = ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", *places],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert told in done.stderr
    assert not list(tmp_path.rglob("*.so"))
