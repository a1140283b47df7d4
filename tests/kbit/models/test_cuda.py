"""What of the GPU executor runs without one: its decode step, uncaptured, and its loading."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import kbit
from kbit.checkpoint.reader import open_checkpoint
from kbit.engine.cuda_executor import SMALLEST_SPAN, CudaExecutor
from kbit.engine.cuda_layers import stack
from kbit.engine.executor import load_executor
from kbit.engine.torch_executor import TorchExecutor
from kbit.errors import KbitError
from kbit.models import describe_checkpoint
from kbit_kernels import QuantSpec, dequantize, quantize
from tests.kbit.models.tiny import Tiny

ROOT = Path(__file__).resolve().parents[3]


def pair(tiny: Tiny) -> tuple[TorchExecutor, CudaExecutor]:
    checkpoint = open_checkpoint(tiny.path)
    decoder = describe_checkpoint(checkpoint)
    f32 = torch.float32
    return (
        TorchExecutor(checkpoint, decoder, "cpu", f32, f32),
        CudaExecutor(checkpoint, decoder, "cpu", f32, f32),
    )


def test_decode_steps_are_the_ordinary_ones(tiny: Tiny) -> None:
    plain, static = pair(tiny)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 101, length) for length in (3, 14, 8)]
    caches = [executor.new_cache(3, 40) for executor in (plain, static)]
    for executor, cache in zip((plain, static), caches, strict=True):
        executor.forward(prompts, cache)
    for _ in range(6):
        tokens = [rng.integers(0, 101, 1) for _ in range(3)]
        expected = plain.forward(tokens, caches[0])
        found = static.forward(tokens, caches[1])
        assert caches[0].lengths == caches[1].lengths
        for row, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(row, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=1e-5)


def test_steps_grow_with_the_cache(tiny_model: Callable[[str], Tiny]) -> None:
    plain, static = pair(tiny_model("llama"))
    prompt = np.random.default_rng(0).integers(0, 101, SMALLEST_SPAN - 1)
    caches = [executor.new_cache(1, SMALLEST_SPAN + 20) for executor in (plain, static)]
    for executor, cache in zip((plain, static), caches, strict=True):
        executor.forward([prompt], cache)
    for token in range(3):  # the second goes to the first position of the next span
        expected = plain.forward([np.array([token])], caches[0])[0]
        found = static.forward([np.array([token])], caches[1])[0]
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)
    assert sorted(static._steps[caches[1]]) == [SMALLEST_SPAN, SMALLEST_SPAN + 20]


@pytest.mark.parametrize("text", ["int4-b64", "uint3-b32-dq", "nf4-row-bf16-center"])
def test_stacked_matrices_hold_the_same_weights(text: str) -> None:
    rng = np.random.default_rng(0)
    spec = QuantSpec.parse(text)
    parts = [rng.standard_normal((rows, 96)).astype(np.float32) for rows in (5, 16, 3)]
    tensors = [quantize(part, spec) for part in parts]
    stacked = stack(tensors)
    assert stacked is not None
    expected = np.concatenate([dequantize(tensor) for tensor in tensors])
    np.testing.assert_array_equal(dequantize(stacked), expected)


def test_what_belongs_to_one_matrix_is_not_stacked() -> None:
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for specs in (("lloyd3-b64", "lloyd3-b64"), ("int4-b64", "int4-b32")):
        assert stack([quantize(w, QuantSpec.parse(text)) for text in specs]) is None


SCRIPT = """
import sys
import numpy as np, torch
from kbit.checkpoint.reader import open_checkpoint
from kbit.engine.cuda_executor import CudaExecutor
from kbit.engine.cuda_layers import KernelLinear
from kbit.engine.torch_executor import TorchExecutor
from kbit.models import describe_checkpoint

checkpoint = open_checkpoint(sys.argv[1])
decoder = describe_checkpoint(checkpoint)
exact = TorchExecutor(checkpoint, decoder, "cpu", torch.float32, torch.float32)
fused = CudaExecutor(checkpoint, decoder, "cpu", torch.float16, torch.float16)
assert isinstance(fused._blocks[0]._mlp._up, KernelLinear)
caches = [executor.new_cache(2, 16) for executor in (exact, fused)]
for tokens in ([[1, 2, 3], [4]], [[5], [6]]):
    tokens = [np.array(t) for t in tokens]
    expected, found = (e.forward(tokens, c) for e, c in zip((exact, fused), caches))
    for row, wanted in zip(found, expected):
        error = np.abs(row - wanted).max() / np.abs(wanted).max()
        assert error < 2e-2, error
print("same logits")
"""


SMALL = """
import torch
from kbit.engine import cuda_kernels as fused, torch_attention, torch_layers
from kbit.engine.torch_cache import TorchCache
from types import SimpleNamespace

torch.manual_seed(0)
def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)

for shape in ((3, 48), (2, 5, 14), (1, 1000)):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    half = x.half()
    same(fused.RmsNorm(weight, 1e-6)(x), torch_layers.RmsNorm(weight, None, 1e-6)(x))
    same(fused.RmsNorm(weight, 1e-6)(half), torch_layers.RmsNorm(weight, None, 1e-6)(half))
for name in fused.ACTIVATIONS:
    for F in (37, 1500):
        x = torch.randn(3, 2 * F) * 3
        gate, up = x.chunk(2, dim=-1)
        same(fused.Gate(name)(x), torch_layers.ACTIVATIONS[name](gate) * up)
for half, D in ((8, 16), (5, 14), (3, 12)):
    qkv = torch.randn(5, 4 + 2 + 2, D)
    q, k, v = qkv.split((4, 2, 2), dim=1)
    step = SimpleNamespace(
        positions=torch.tensor([3, 4, 5, 0, 1]), sequences=torch.tensor([0, 0, 0, 1, 1])
    )
    a = SimpleNamespace(rotary="r")
    def cache():
        angles = torch.arange(9.0)[:, None] * torch.linspace(0.1, 1.0, half)
        zeros = [torch.zeros(2, 2, 9, D)]
        return SimpleNamespace(rotary={"r": (angles.cos(), angles.sin())}, capacity=9,
                               keys=[zeros[0].clone()], values=[zeros[0].clone()])
    one, other = cache(), cache()
    same(fused.place(a, 0, q, k, v, one, step), torch_attention.place(a, 0, q, k, v, other, step))
    same(one.keys[0], other.keys[0])
    same(one.values[0], other.values[0])
    assert one.keys[0].count_nonzero() == 5 * 2 * D
print("the same")
"""


def interpreted(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_small_kernels() -> None:
    pytest.importorskip("triton")
    done = interpreted(SMALL)
    assert done.stdout == "the same\n", done.stderr


def test_kernels_in_the_decoder(tiny_model: Callable[[str], Tiny], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    kbit.quantize(str(tiny_model("llama").path), tmp_path / "out", bits=5)
    done = interpreted(SCRIPT, str(tmp_path / "out"))
    assert done.stdout == "same logits\n", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_in_one_sentence(tiny_model: Callable[[str], Tiny]) -> None:
    with pytest.raises(KbitError, match="finds no CUDA device") as caught:
        load_executor(open_checkpoint(tiny_model("llama").path), "torch", "cuda")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_small_kernels_compile() -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kbit.engine import cuda_kernels

    half, f32, i64 = "*fp16", "*fp32", "*i64"
    halves = dict.fromkeys(
        ("x_ptr", "out_ptr", "q_ptr", "k_ptr", "v_ptr", "keys_ptr", "values_ptr"), half
    )
    types = halves | {
        "weight_ptr": f32,
        "cos_ptr": f32,
        "sin_ptr": f32,
        "positions_ptr": i64,
        "sequences_ptr": i64,
        "eps": "fp32",
    }
    heads = {"H": 6, "G": 2, "D": 64, "HALF": 24, "BLOCK": 64}
    cases = [
        (cuda_kernels._rms_norm_kernel, {"BLOCK": 1024}),
        (cuda_kernels._place_kernel, heads),
        *(
            (cuda_kernels._gate_kernel, {"ACTIVATION": name, "BLOCK": 1024})
            for name in cuda_kernels.ACTIVATIONS
        ),
    ]
    for kernel, constants in cases:
        signature = {
            name: "constexpr" if name in constants else types.get(name, "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
