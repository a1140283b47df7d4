"""What of the GPU executor runs without one: its decode step, uncaptured, and its loading."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kbit
from kbit.checkpoint.reader import open_checkpoint
from kbit.engine.cuda_executor import CudaExecutor, DecodeStep
from kbit.engine.cuda_layers import stack
from kbit.engine.cuda_sampler import choose
from kbit.engine.executor import load_executor
from kbit.engine.generate import Options, generate
from kbit.engine.sampler import GREEDY, Draw, Sampler, Sampling
from kbit.engine.torch_executor import TorchExecutor
from kbit.errors import KbitError
from kbit.models import describe_checkpoint
from kbit_kernels import QuantSpec, dequantize, quantize
from kbit_kernels.activations import ACTIVATIONS
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


class Letters:
    """As much of a tokenizer as generating needs."""

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(chr(0x4E00 + i) for i in ids)


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


def test_sequences_without_a_token_are_left_alone(tiny: Tiny) -> None:
    plain, static = pair(tiny)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 101, length) for length in (3, 6, 4)]
    caches = [executor.new_cache(3, 7) for executor in (plain, static)]
    for executor, cache in zip((plain, static), caches, strict=True):
        executor.forward(prompts, cache)
    # the second sequence is full after one token; then it and the third pause; then one goes on
    for counts in ((1, 1, 1), (1, 0, 0), (0, 0, 1), (1, 0, 1)):
        tokens = [rng.integers(0, 101, count) for count in counts]
        expected = plain.forward(tokens, caches[0])
        found = static.forward(tokens, caches[1])
        assert caches[0].lengths == caches[1].lengths
        for row, wanted in zip(found, expected, strict=True):
            assert row.shape == wanted.shape
            if wanted.size:
                atol = 1e-5 * np.abs(wanted).max()
                np.testing.assert_allclose(row, wanted, atol=atol, rtol=1e-5)


def test_arenas_are_used_again(tiny_model: Callable[[str], Tiny]) -> None:
    plain, static = pair(tiny_model("llama"))
    cache = static.new_cache(3, 20)
    step = cache.step
    assert cache.keys[0].shape[0] == 3
    static.forward([np.arange(5)] * 3, cache)
    static.forward([np.array([7])] * 3, cache)
    del cache
    other = static.new_cache(3, 40)
    assert other.step is step
    assert static.new_cache(4, 40).step is not step  # while the first is in use
    assert other.lengths == [0, 0, 0]
    expected = plain.forward([np.array([9])] * 3, plain.new_cache(3, 40))
    found = static.forward([np.array([9])] * 3, other)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)
    with pytest.raises(KbitError, match="1 or more, not 0"):
        static.new_cache(0, 5)


OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.5, "top_k": 1000},
]


UNORDERED = [options for options in OPTIONS if not {"top_k", "top_p"} & options.keys()]


@pytest.mark.parametrize("several", [OPTIONS, UNORDERED], ids=["sorted", "unsorted"])
def test_choices_on_the_device_are_those_of_the_host(several: list[dict[str, Any]]) -> None:
    rng = np.random.default_rng(0)
    here = [Sampler(Sampling(**options), seed=3, sample=i) for i, options in enumerate(several)]
    there = [Sampler(Sampling(**options), seed=3, sample=i) for i, options in enumerate(several)]
    for _ in range(200):
        logits = (rng.standard_normal((len(several), 300)) * 3).astype(np.float32)
        logits[:, 17] = logits[:, 4]  # ties
        found = choose(torch.from_numpy(logits), [sampler.draw() for sampler in there]).tolist()
        expected = [s.choose(row).token for s, row in zip(here, logits, strict=True)]
        assert [int(token) for token, _ in found] == expected
        np.testing.assert_array_equal([largest for _, largest in found], logits.max(1))


def test_broken_logits_are_found_on_the_device() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 3] = torch.nan
    ((token, largest),) = choose(logits, [GREEDY]).tolist()
    with pytest.raises(KbitError, match="damaged"):
        Sampler(Sampling(), seed=0).accept(int(token), largest)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_samples_on_the_device(
    tiny_model: Callable[[str], Tiny], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    executors = pair(tiny_model("llama"))
    calls = []
    sample = CudaExecutor.sample
    monkeypatch.setattr(CudaExecutor, "sample", lambda *args: calls.append(1) or sample(*args))
    options = Options(
        max_tokens=12, n=2, sampling=Sampling(temperature=temperature, top_p=0.9, seed=5)
    )
    prompts = [np.arange(3), np.arange(20, 31), np.array([50])]
    eos = frozenset(range(0, 101, 9))  # some sequences end before others
    found = []
    for executor in executors:
        pieces = generate(executor, Letters(), prompts, options, eos=eos)
        done = [piece.completion for piece in pieces if piece.completion is not None]
        found.append({(c.prompt, c.sample): (c.tokens, c.finish_reason) for c in done})
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert calls


def test_steps_ahead_are_used_and_left(
    tiny_model: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, static = pair(tiny_model("llama"))
    runs = []
    run = DecodeStep._run
    monkeypatch.setattr(DecodeStep, "_run", lambda step: runs.append(1) or run(step))
    prompts = [np.arange(3), np.arange(20, 26)]
    caches = [executor.new_cache(2, 16) for executor in (plain, static)]
    for executor, cache in zip((plain, static), caches, strict=True):
        executor.forward(prompts, cache)

    def chosen(tokens: list[list[int]]) -> list[list[int]]:
        """Both executors' next tokens after `tokens`, which are the same."""
        feed = [np.array(ids, dtype=np.int64) for ids in tokens]
        expected = [row.argmax() if row.size else None for row in plain.forward(feed, caches[0])]
        found = static.sample(feed, caches[1], [GREEDY] * 2)
        assert caches[0].lengths == caches[1].lengths
        for (token, _), wanted in zip(found, expected, strict=True):
            assert wanted is None or token == wanted
        return [[token] for token, _ in found]

    said = chosen([[7], [8]])
    assert len(runs) == 2
    for _ in range(3):
        said = chosen(said)
    assert len(runs) == 5  # one for each call, since all but the first were under way
    said = chosen([said[0], []])  # the second one pauses
    assert len(runs) == 6
    said = chosen([said[0], []])
    assert len(runs) == 7
    other = [[(said[0][0] + 1) % 101], [9]]
    said = chosen(other)  # neither as expected: a step of its own
    assert len(runs) == 9
    for cache in caches:
        cache.truncate(0, cache.lengths[0] - 2)
    said = chosen(said)  # the same tokens, but at another place
    assert len(runs) == 11
    for executor, cache in zip((plain, static), caches, strict=True):
        executor.forward([np.array([1]), np.array([2])], cache)
        cache.truncate(0, cache.lengths[0] - 1)
        cache.truncate(1, cache.lengths[1] - 1)
    chosen(said)  # at the same place, but something else was there meanwhile
    while max(caches[1].lengths) < 16:  # up to the end, where no step fits any more
        said = chosen(said)
    with pytest.raises(KbitError, match="would grow to 17"):
        static.sample([np.array(ids) for ids in said], caches[1], [GREEDY] * 2)


def test_broken_logits_do_not_leave_the_vocabulary() -> None:
    logits = torch.full((2, 8), torch.nan)
    for top_p in (0.9, 1.0):
        found = choose(logits, [Draw(1.0, 0, top_p, 0.0, 0.5)] * 2)
        assert ((found[:, 0] >= 0) & (found[:, 0] < 8)).all()
        assert found[:, 1].isnan().all()


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
from kbit.engine.cuda_attention import place
from kbit.engine.cuda_sampler import choose
from kbit.engine.sampler import GREEDY
from kbit.engine.torch_cache import TorchCache
from kbit_kernels.activations import ACTIVATIONS
from types import SimpleNamespace

torch.manual_seed(0)
def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)

for shape in ((3, 48), (2, 5, 14), (1, 1000)):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    half = x.half()
    same(fused.RmsNorm(weight, 1e-6)(x), torch_layers.RmsNorm(weight, None, 1e-6)(x))
    same(fused.RmsNorm(weight, 1e-6)(half), torch_layers.RmsNorm(weight, None, 1e-6)(half))
for name in ACTIVATIONS:
    for F in (37, 1500):
        x = torch.randn(3, 2 * F) * 3
        gate, up = x.chunk(2, dim=-1)
        same(fused.Gate(name)(x), ACTIVATIONS[name](gate) * up)
for V in (49, 4096, 9000):
    logits = torch.randn(3, V)
    logits[1, 7] = logits[1, V - 2] = 9.0  # the first of the largest is taken
    for _ in range(2):
        assert torch.equal(fused.likeliest(logits), choose(logits, [GREEDY]))
    logits[2, V - 1] = float("nan")
    assert fused.likeliest(logits)[:, 1].isnan().tolist() == [False, False, True]
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
    same(place(a, 0, q, k, v, one, step), torch_attention.place(a, 0, q, k, v, other, step))
    same(one.keys[0], other.keys[0])
    same(one.values[0], other.values[0])
    assert one.keys[0].count_nonzero() == 5 * 2 * D
print("the same")
"""


ATTEND = """
import numpy as np, torch
from types import SimpleNamespace
from kbit.engine import cuda_attention, torch_attention
from kbit.engine.torch_attention import TorchAttention

torch.manual_seed(0)
cuda_attention.gpu_class = lambda device: ("", 132)  # many parts of the positions

def case(H, G, D, capacity, positions, dtype=torch.float16, stored=None, half=0, **options):
    B = len(positions)
    a = SimpleNamespace(scale=D**-0.5, softcap=None, window=None, rotary="r" if half else None)
    vars(a).update(options)
    slopes = torch.rand(H) if options.get("alibi") else None
    q, k, v = torch.randn(B, H + 2 * G, D).to(dtype).split((H, G, G), dim=1)
    at = torch.tensor(positions)
    angles = torch.arange(capacity)[:, None] * torch.linspace(0.1, 1.0, half)
    before = torch.randn(2, B, G, capacity, D).to(stored or dtype)
    for b, position in enumerate(positions):  # what nobody may read
        before[:, b, :, position:] = float("nan")

    def cache():
        keys, values = before.clone()
        rotary = {"r": (angles.cos(), angles.sin())}
        return SimpleNamespace(keys=[keys], values=[values], rotary=rotary)

    wanted = cache()
    step = SimpleNamespace(positions=at, sequences=torch.arange(B))
    turned = torch_attention.place(a, 0, q, k, v, wanted, step)
    distance = at[:, None, None] - torch.arange(capacity)
    reference = SimpleNamespace(_attention=a, _slopes=slopes)
    clean = [torch.nan_to_num(x[0]).float() for x in (wanted.keys, wanted.values)]
    expected = TorchAttention._explicit(reference, turned.float()[:, :, None], *clean, distance)
    for most in (1, 4, 16):
        attend = cuda_attention.Attend(a, slopes)
        attend.most_splits = most
        for _ in range(2):  # the second call finds the counters of the first
            used = cache()
            found = attend(0, q, k, v, used, at).float()
        error = (found - expected[:, :, 0]).abs().max().item()
        bound = 2e-3 if dtype == torch.float16 else 2e-2
        assert error < bound, (error, most, options)
        for name in ("keys", "values"):
            one, other = vars(used)[name][0].float(), vars(wanted)[name][0].float()
            torch.testing.assert_close(one, other, rtol=bound, atol=bound, equal_nan=True)

case(8, 2, 16, 300, [0, 299, 64, 63], half=8)
case(4, 4, 40, 130, [129, 5], half=5)
case(6, 1, 24, 70, [69], window=9)
case(6, 3, 32, 200, [150, 3, 1], window=65, softcap=5.0, half=16)
case(6, 2, 16, 90, [80, 40], window=1, half=8)
case(6, 2, 16, 90, [80, 40], alibi=True)
case(20, 1, 16, 90, [80, 64], dtype=torch.bfloat16, stored=torch.float32, half=8)
print("the same")
"""


def test_attention_kernel() -> None:
    pytest.importorskip("triton")
    done = interpreted(ATTEND)
    assert done.stdout == "the same\n", done.stderr


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

    from kbit.engine import cuda_attention, cuda_kernels

    half, f32, i64 = "*fp16", "*fp32", "*i64"
    halves = dict.fromkeys(
        ("x_ptr", "out_ptr", "q_ptr", "k_ptr", "v_ptr", "keys_ptr", "values_ptr"), half
    )
    types = halves | {
        "weight_ptr": f32,
        "logits_ptr": f32,
        "cos_ptr": f32,
        "sin_ptr": f32,
        "positions_ptr": i64,
        "sequences_ptr": i64,
        "eps": "fp32",
        "scale": "fp32",
        "softcap": "fp32",
        "slopes_ptr": f32,
        "partial_ptr": f32,
        "counter_ptr": "*i32",
    }
    heads = {"H": 6, "G": 2, "D": 64, "HALF": 24, "BLOCK": 64}
    attend = {
        "G": 8,
        "R": 4,
        "D": 128,
        "HALF": 64,
        "WINDOW": 0,
        "HAS_SOFTCAP": False,
        "HAS_SLOPES": False,
    }
    attend |= {"SPLITS": 16, "ROWS": 16, "BLOCK_D": 128, "BLOCK_S": 64}
    cases = [
        (cuda_attention._attend_kernel, attend),
        (cuda_kernels._rms_norm_kernel, {"BLOCK": 1024}),
        (cuda_kernels._likeliest_kernel, {"PARTS": 5, "BLOCK": 4096}),
        (cuda_attention._place_kernel, heads),
        *((cuda_kernels._gate_kernel, {"ACTIVATION": name, "BLOCK": 1024}) for name in ACTIVATIONS),
    ]
    for kernel, constants in cases:
        signature = {
            name: "constexpr" if name in constants else types.get(name, "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
