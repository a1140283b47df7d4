"""Without a C++ compiler the install goes on, and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


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
