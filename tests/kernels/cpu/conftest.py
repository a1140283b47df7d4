"""Fixtures for the native kernels."""

import platform
import shutil

import pytest

from kbit_kernels import cpu
from kbit_kernels.cpu import library

COMPILERS = ("c++", "g++", "clang++")
# what the library has code of: on aarch64 NEON, elsewhere everything but that
ON_ARM = platform.machine() in ("aarch64", "arm64")
COMPILED = [isa for isa in library.ISAS if isa == "portable" or (isa == "neon") == ON_ARM]


@pytest.fixture(scope="session", autouse=True)
def native() -> None:
    """Skips where the library cannot be there; fails where it should be and is not."""
    usable, reason = cpu.available()
    if not usable:
        if any(map(shutil.which, COMPILERS)):
            pytest.fail(f"there is a compiler, but no native library: {reason}")
        pytest.skip(reason)


@pytest.fixture(params=COMPILED)
def isa(request: pytest.FixtureRequest) -> library.Isa:
    """Every instruction set that this machine has."""
    if not library.isa_available(request.param):
        pytest.skip(f"this machine has no {request.param}: compiled, not tested here")
    found: library.Isa = request.param
    return found


@pytest.fixture(scope="session")
def pool() -> library.Pool:
    """Two threads."""
    return library.Pool(2)
