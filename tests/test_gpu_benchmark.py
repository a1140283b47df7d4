"""The GPU benchmark from end to end where there is no GPU: tiny, under Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def fails() -> Iterator[int]:
    yield 1
    raise ValueError("a section of its own")


def dies() -> Iterator[int]:
    yield 2
    os._exit(3)


def ends() -> Iterator[int]:
    yield 3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.find_spec("gpu")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("work", "rows", "problem"),
    [(fails, [1], "a section of its own"), (dies, [2], "exit status 3"), (ends, [3], None)],
)
def test_what_a_section_measured_outlives_it(
    gpu: Any, work: Callable[[], Iterator[int]], rows: list[int], problem: str | None
) -> None:
    kept: list[int] = []
    found = gpu.apart(work, (), time.monotonic() + 600, kept.append)
    assert kept == rows
    assert found is None if problem is None else problem in found


def test_a_section_without_time_is_stopped(gpu: Any) -> None:
    assert gpu.apart(ends, (), time.monotonic() - 1, print) == "stopped: no time left"


AHEAD = """
import gpu_compile
from gpu_scale import Scale

gpu_compile.SCALE = Scale("meta", ((48, 512),), (1, 16))
gpu_compile.pretend("sm_90")
gpu_compile.compile_sweep("int4-b64", "float16")
"""


def test_what_is_compiled_ahead_is_in_the_cache(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    for _ in range(2):  # the second time it is there
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", AHEAD],
            cwd=ROOT,
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": str(tmp_path),
                "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
                "TRITON_CACHE_DIR": str(tmp_path),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        # up to 8 rows of x, and 16
        found = sorted(path.stem for path in tmp_path.glob("*/*.cubin"))
        assert found == ["gemm_kernel", "linear_kernel"]


@pytest.mark.slow
def test_the_dry_run_reaches_the_end(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--dry-run"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("kbit-dry-run-*/gpu-interpreter.json")
    result = json.loads(written.read_text())
    assert {"gate", "baseline", "decode", "sweep", "cross-over", "wall_s"} <= result.keys()
    specs = {row["spec"] for row in result["sweep"] if "spec" in row}
    assert specs == {"int4-b64", "uint4-b64", "nf4-b64", "fp4e2-b64"}
    assert {row["attention"] for row in result["decode"]} == {"kbit", "torch"}
    assert len(list(written.parent.glob("*.png"))) == 2
