"""Every family against transformers: logits, cache, chunks, ragged batches, quantized weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.engine.executor import Executor, load_executor
from kbit.models import describe_checkpoint, known_model_types
from kbit_kernels import QuantizedTensor, QuantSpec, dequantize, quantize
from tests.kbit.models.tiny import CASES, Tiny

LENGTH = 33
TOLERANCE = 1e-4  # of the largest logit, in fp32


@pytest.fixture
def executor(tiny: Tiny) -> Executor:
    return load_executor(open_checkpoint(tiny.path), "torch")


def text(length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 101, length)


def run(executor: Executor, *pieces: np.ndarray, capacity: int = LENGTH) -> np.ndarray:
    """One sequence through the cache piece by piece, all logits."""
    cache = executor.new_cache(1, capacity)
    parts = [executor.forward([piece], cache, all_logits=True)[0] for piece in pieces]
    assert cache.lengths == [sum(map(len, pieces))]
    return np.concatenate(parts)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> bool:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())


def test_every_family_has_a_case() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(known_model_types())


def test_logits_agree_with_transformers(tiny: Tiny, executor: Executor) -> None:
    tokens = text()
    expected = tiny.logits(tokens)
    assert expected.std() > 0.05
    assert close(run(executor, tokens), expected)


def test_token_by_token_agrees_with_one_pass(executor: Executor) -> None:
    tokens = text()
    assert close(run(executor, *np.split(tokens, len(tokens))), run(executor, tokens), 1e-5)


def test_chunks_agree_with_one_pass(executor: Executor) -> None:
    tokens = text()
    pieces = (tokens[:1], tokens[1:9], tokens[9:9], tokens[9:26], tokens[26:])
    assert close(run(executor, *pieces), run(executor, tokens), 1e-5)


def test_ragged_batch_agrees_with_each_alone(executor: Executor) -> None:
    texts = [text(n, seed=n) for n in (5, LENGTH, 1, 12)]
    more = [text(n, seed=50 + n) for n in (3, 0, 2, 1)]
    cache = executor.new_cache(4, 40)
    first = executor.forward(texts, cache, all_logits=True)
    second = executor.forward(more, cache, all_logits=True)
    assert list(cache.lengths) == [8, LENGTH, 3, 13]
    for begin, end, found, later in zip(texts, more, first, second, strict=True):
        alone = run(executor, begin, end, capacity=40)
        assert close(found, alone[: len(begin)], 1e-5)
        assert later.shape == (len(end), 101)
        assert not len(end) or close(later, alone[len(begin) :], 1e-5)


def test_last_logits_only(executor: Executor) -> None:
    texts = [text(n, seed=n) for n in (5, 0, 9)]
    found = executor.forward(texts, executor.new_cache(3, 9))
    assert found[1].shape == (0,)
    for tokens, last in ((texts[0], found[0]), (texts[2], found[2])):
        assert close(last, run(executor, tokens, capacity=9)[-1], 1e-5)


def test_truncated_cache_agrees(executor: Executor) -> None:
    tokens = text()
    cache = executor.new_cache(1, LENGTH)
    executor.forward([text(20, seed=1)], cache)
    cache.truncate(0, 0)
    executor.forward([tokens[:10]], cache)
    cache.truncate(0, 7)
    found = executor.forward([tokens[7:]], cache, all_logits=True)[0]
    assert close(found, run(executor, tokens)[7:], 1e-5)


class Mixed:
    """A checkpoint whose linear layers, embedding and head are quantized, every second one if
    asked; `plain` gives the same weights dequantized, as a peer without kbit would store them."""

    def __init__(self, base: Checkpoint, spec: str, step: int, plain: bool) -> None:
        self._base = base
        self.path, self.config = base.path, base.config
        decoder = describe_checkpoint(base)
        matrices = [
            i for i in decoder.tensors.values() if i.role in ("linear", "embedding", "head")
        ]
        self._tensors: dict[str, np.ndarray | QuantizedTensor] = {}
        for info in matrices[::step]:
            stored = base.tensor(info.name)
            assert isinstance(stored, np.ndarray)
            weight = stored.T if info.transposed else stored
            quantized = quantize(np.ascontiguousarray(weight), QuantSpec.parse(spec))
            dense = dequantize(quantized)
            self._tensors[info.name] = (
                (dense.T if info.transposed else dense) if plain else quantized
            )

    def names(self) -> list[str]:
        return self._base.names()

    def tensor(self, name: str) -> np.ndarray | QuantizedTensor:
        return self._tensors.get(name, self._base.tensor(name))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    "name", ["llama-tied-biases", "qwen3", "phi3", "gpt2", "gpt_neox", "opt-350m", "bloom"]
)
def test_quantized_weights_are_interchangeable(
    name: str, step: int, tiny_model: Callable[[str], Tiny]
) -> None:
    base = open_checkpoint(tiny_model(name).path)
    spec = "nf4-b32-fp16-dq" if step == 1 else "uint3-b16"
    quantized = run(load_executor(Mixed(base, spec, step, plain=False), "torch"), text())
    dense = run(load_executor(Mixed(base, spec, step, plain=True), "torch"), text())
    assert close(quantized, dense, 1e-5)
    assert not close(quantized, run(load_executor(base, "torch"), text()), 1e-2)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": "bf16"}, 6e-2),
        ({"dtype": "fp16"}, 8e-3),
        ({"cache_dtype": "bf16"}, 3e-2),
        ({"cache_dtype": "fp16"}, 4e-3),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom-heads", "opt"])
def test_half_precision(
    name: str, options: dict, tolerance: float, tiny_model: Callable[[str], Tiny]
) -> None:
    checkpoint = open_checkpoint(tiny_model(name).path)
    exact = run(load_executor(checkpoint, "torch"), text())
    found = run(load_executor(checkpoint, "torch", **options), *np.split(text(), 3))
    assert close(found, exact, tolerance)
    assert not close(found, exact, 1e-6)
