"""The launch itself, up to the moment when a driver would load the binary: arguments, dtypes and
constants as `fused_linear` and `dequantize` pass them, compiled for a chip that is not here."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Absent:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)

driver.set_active(Absent())

from kbit_kernels import QuantSpec, quantize
from kbit_kernels.triton import device, kernels
from kbit_kernels.triton.configs import Config

compiled = []

class Warm:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *a, **k: compiled.append(self.kernel.warmup(*a, grid=grid, **k).hash)

class Kernels:
    linear_kernel = Warm(kernels.linear_kernel)
    dequantize_kernel = Warm(kernels.dequantize_kernel)

device.kernels = Kernels
w = np.random.default_rng(0).standard_normal((48, 512)).astype(np.float32)
tensor = quantize(w, QuantSpec.parse("nf8-b64-out0.02"), backend="reference")
weight = device.prepare(tensor, "cpu", torch.float16, use_ptx=True)
config = Config(8, 1, 1, 1, 2)
for rows in (1, 2, 8):
    device.fused_linear(torch.zeros(rows, 512).half(), weight, config)
device.fused_linear(torch.zeros(3, 512).half(), weight, config, bias=torch.zeros(48).half())
device.dequantize(weight)
print(len(compiled), len(set(compiled)))
"""


def test_rows_share_one_binary() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # 1, 2 and 8 rows are one compilation; the bias and dequantization one each
    assert done.stdout == "5 3\n", done.stderr
