"""A process with Triton's interpreter for the tests of one pytest worker."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Run]:
    """`run(spec=..., n=..., ...)` answers with `worker.run`'s result."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.triton.worker"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(**case: Any) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(case), file=process.stdin, flush=True)
        line = process.stdout.readline()
        assert line, f"the interpreter died on {case}"
        answer: dict[str, Any] = json.loads(line)
        assert "traceback" not in answer, answer["traceback"]
        return answer

    yield run
    process.stdin.close()
    process.wait()
