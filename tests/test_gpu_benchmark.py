"""The GPU benchmark from end to end where there is no GPU: tiny, under Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
