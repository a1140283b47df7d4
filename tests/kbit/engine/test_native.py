"""The native executor against transformers and the torch executor, every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the peer that the decoders are compared with")

from kbit.checkpoint.reader import Checkpoint, open_checkpoint
from kbit.engine.executor import Executor, load_executor
from kbit.engine.native_executor import default_threads, supports
from kbit.errors import KbitError
from kbit.models import describe_checkpoint
from kbit_kernels import QuantizedTensor, QuantSpec, quantize
from kbit_kernels.cpu import available, library
from tests.kbit.models.conftest import tiny, tiny_model  # noqa: F401 (fixtures)
from tests.kbit.models.tiny import CASES, Tiny

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

LENGTH = 33
TOLERANCE = 1e-4  # of the largest logit; fp32 weights, inputs and cache
ROUNDING = 1e-5  # the same numbers summed in another order
ATTENTION = 8e-4  # a prompt's in products of 16 bits; all of these models stay within 6e-4
VOCABULARY = 101
ISAS = [isa for isa in library.ISAS if available()[0] and library.isa_available(isa)]


def text(length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)


def native(checkpoint: Any, **options: Any) -> Executor:
    return load_executor(checkpoint, "native", **options)


def run(executor: Executor, *pieces: np.ndarray, capacity: int = 0) -> np.ndarray:
    """One sequence through the cache piece by piece, all logits."""
    cache = executor.new_cache(1, capacity or sum(map(len, pieces)))
    return np.concatenate([executor.forward([p], cache, all_logits=True)[0] for p in pieces])


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())


class Changed:
    """A checkpoint with some tensors replaced."""

    def __init__(self, base: Checkpoint, change: Callable[[str, np.ndarray], Any]) -> None:
        self._base = base
        self._change = change
        self.path, self.config = base.path, base.config

    def names(self) -> list[str]:
        return self._base.names()

    def tensor(self, name: str) -> np.ndarray | QuantizedTensor:
        stored = self._base.tensor(name)
        assert isinstance(stored, np.ndarray)
        return self._change(name, stored)


def quantized(base: Checkpoint, *specs: str) -> Changed:
    """All matrices quantized, the specs taken in turn."""
    tensors = describe_checkpoint(base).tensors
    matrices = [
        info.name for info in tensors.values() if info.role in ("linear", "head", "embedding")
    ]

    def change(name: str, stored: np.ndarray) -> Any:
        if name not in matrices:
            return stored
        weight = np.ascontiguousarray(stored.T if tensors[name].transposed else stored)
        return quantize(weight, QuantSpec.parse(specs[matrices.index(name) % len(specs)]))

    return Changed(base, change)


@pytest.mark.parametrize("isa", ISAS)
def test_every_family_agrees_with_transformers(isa: str, tiny: Tiny) -> None:  # noqa: F811
    executor = native(open_checkpoint(tiny.path), isa=isa, threads=1 + ISAS.index(isa))
    tokens = text()
    expected = tiny.logits(tokens)
    assert expected.std() > 0.05
    assert close(run(executor, tokens), expected, TOLERANCE)
    assert close(run(executor, *np.split(tokens, LENGTH)), expected, TOLERANCE)
    chunks = (tokens[:1], tokens[1:9], tokens[9:9], tokens[9:26], tokens[26:])
    assert close(run(executor, *chunks), expected, TOLERANCE)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("cache_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("arithmetic", ["float", "int16"])
def test_long_ragged_batches_agree_with_torch(
    name: str,
    cache_dtype: str,
    arithmetic: str,
    tiny_model: Callable[[str], Tiny],  # noqa: F811
) -> None:
    """Several chunks of keys, windows within them, threads that share a head's keys; of these
    plain weights int16 rounds nothing but a prompt's attention."""
    checkpoint = open_checkpoint(tiny_model(name).path)
    decoder = describe_checkpoint(checkpoint)
    longest = decoder.max_positions if decoder.positions is not None else 300
    lengths = [longest - 20, 0, 1, longest // 2]
    mine, theirs = (
        native(checkpoint, cache_dtype=cache_dtype, threads=3, arithmetic=arithmetic),
        load_executor(checkpoint, "torch", cache_dtype=cache_dtype),
    )
    caches = mine.new_cache(4, longest), theirs.new_cache(4, longest)
    exact = TOLERANCE if arithmetic == "float" else ATTENTION
    tolerance = exact if cache_dtype == "fp32" else 5e-3
    for step, counts in enumerate(
        [lengths, [1, 1, 1, 1], [1, 0, 0, 0], [0, 3, 9, 1], [1, 1, 0, 1]]
    ):
        tokens = [text(count, seed=10 * step + b) for b, count in enumerate(counts)]
        for all_logits in (False, True) if step == 3 else (step == 0,):
            before = list(caches[0].lengths)
            found = mine.forward(tokens, caches[0], all_logits=all_logits)
            expected = theirs.forward(tokens, caches[1], all_logits=all_logits)
            for row, count in enumerate(counts):
                assert found[row].shape == expected[row].shape
                assert not count or close(found[row], expected[row], tolerance)
            assert list(caches[0].lengths) == list(caches[1].lengths)
            if step == 3 and not all_logits:  # once more, with all logits
                for row, length in enumerate(before):
                    caches[0].truncate(row, length)
                    caches[1].truncate(row, length)


@pytest.mark.parametrize(
    "specs",
    [
        ("int4-b32",),
        ("nf3-b64", "uint5-b16-bf16"),
        ("nf4-b64-fp16-dq-center", "int8-row", "fp6e3-b32"),
        ("int2-b16-out0.05", "quantile8-b64", "lloyd4-row"),
    ],
    ids=lambda specs: "+".join(specs),
)
@pytest.mark.parametrize(
    "name", ["llama-tied-biases", "qwen3", "phi3", "gpt2", "gpt_neox", "opt-350m"]
)
def test_quantized_weights_agree_with_torch(
    name: str,
    specs: tuple[str, ...],
    tiny_model: Callable[[str], Tiny],  # noqa: F811
) -> None:
    checkpoint = quantized(open_checkpoint(tiny_model(name).path), *specs)
    expected = run(load_executor(checkpoint, "torch"), text())
    executor = native(checkpoint, threads=2)
    assert close(run(executor, text()), expected, TOLERANCE)
    assert close(run(executor, *np.split(text(), LENGTH)), expected, TOLERANCE)
    for arithmetic, tolerance in (("int16", 2e-3), ("bf16", 0.05), ("int8", 0.1)):
        rounded = run(native(checkpoint, threads=2, arithmetic=arithmetic), text(), text()[:1])[:-1]
        assert close(rounded, expected, tolerance)


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (("nf4-b64", "int2-b32"), "int8"),
        (("nf4-b64", "int5-b64"), "bf16"),
        (("int6-b64", "int7-b64"), "bf16"),
        (("int7-b64", "int8-b64"), "int16"),
    ],
)
def test_fast_arithmetic_is_the_measured_one(
    specs: tuple[str, ...],
    expected: str,
    tiny_model: Callable[[str], Tiny],  # noqa: F811
) -> None:
    checkpoint = quantized(open_checkpoint(tiny_model("llama").path), *specs)
    executor: Any = native(checkpoint, arithmetic="fast")
    assert executor.arithmetic == expected
    with pytest.raises(KbitError, match="the torch executor has float"):
        load_executor(checkpoint, "torch", arithmetic="int8")
    assert load_executor(checkpoint, "torch", arithmetic="fast").name == "torch"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_plain_half_weights(dtype: str, tiny_model: Callable[[str], Tiny]) -> None:  # noqa: F811
    import ml_dtypes

    kind = np.dtype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    checkpoint = Changed(
        open_checkpoint(tiny_model("gemma2").path), lambda _, stored: stored.astype(kind)
    )
    expected = run(load_executor(checkpoint, "torch"), text())
    assert close(run(native(checkpoint), text()), expected, TOLERANCE)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_and_batches_do_not_change_the_answer(
    threads: int,
    tiny_model: Callable[[str], Tiny],  # noqa: F811
) -> None:
    checkpoint = open_checkpoint(tiny_model("llama").path)
    executor = native(checkpoint, threads=threads)
    alone = native(checkpoint, threads=1)
    texts = [text(1 + b % 11, seed=b) for b in range(64)]
    cache = executor.new_cache(64, 16)
    first = executor.forward(texts, cache)
    second = executor.forward([text(1, seed=b) for b in range(64)], cache)
    for b in (0, 5, 31, 63):
        expected = run(alone, texts[b], text(1, seed=b))
        assert close(first[b], expected[-2], ROUNDING)
        assert close(second[b], expected[-1], ROUNDING)


@pytest.mark.parametrize("name", ["llama", "llama-wide", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("arithmetic", ["float", "int16"])
def test_the_last_layer_answers_for_the_last_tokens_alone(
    name: str,
    arithmetic: str,
    tiny_model: Callable[[str], Tiny],  # noqa: F811
) -> None:
    """A short prompt; prompts of several blocks, of which some end in no sequence's last token."""
    executor = native(open_checkpoint(tiny_model(name).path), threads=2, arithmetic=arithmetic)
    texts = [text(count, seed=count) for count in (1200, 1, 30, 0, 95)]
    last, every = executor.new_cache(5, 1220), executor.new_cache(5, 1220)
    tolerance = ROUNDING if arithmetic == "float" else ATTENTION
    short = [text(17), *[text(0)] * 4]
    for pieces in (short, texts, [text(1, seed=b) for b in range(5)]):
        found = executor.forward(pieces, last)
        expected = executor.forward(pieces, every, all_logits=True)
        for piece, few, all_of_them in zip(pieces, found, expected, strict=True):
            assert not piece.size or close(few, all_of_them[-1], tolerance)


def test_the_same_bits_every_time(tiny_model: Callable[[str], Tiny]) -> None:  # noqa: F811
    executor = native(open_checkpoint(tiny_model("llama").path), threads=3)
    runs = [run(executor, text(200), text(1)) for _ in range(3)]
    assert np.array_equal(runs[0], runs[1])
    assert np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("arithmetic", "tolerance"), [("float", ROUNDING), ("int16", ATTENTION)])
def test_nan_reaches_its_sequence_and_no_other(
    name: str,
    arithmetic: str,
    tolerance: float,
    poison: float,
    tiny_model: Callable[[str], Tiny],  # noqa: F811
) -> None:
    """Token 7's embedding is poisoned: everything after it is NaN, nothing before it, and no
    other sequence; a cache that is truncated forgets it."""
    base = open_checkpoint(tiny_model(name).path)
    decoder = describe_checkpoint(base)

    def change(tensor: str, stored: np.ndarray) -> np.ndarray:
        if tensor != decoder.embedding:
            return stored
        bad = stored.copy()
        bad[7] = poison
        return bad

    clean = native(base, threads=2, arithmetic=arithmetic)
    bad = native(Changed(base, change), threads=2, arithmetic=arithmetic)
    tokens = text(20, seed=3)
    tokens[tokens == 7] = 8
    ill = tokens.copy()
    ill[10] = 7
    others = np.arange(VOCABULARY) != 7  # a tied head has a poisoned row too
    cache = bad.new_cache(2, 32)
    found = bad.forward([ill, tokens], cache, all_logits=True)
    expected = run(clean, tokens)
    assert close(found[0][:10, others], expected[:10, others], tolerance)
    assert np.isnan(found[0][10:]).all()
    assert close(found[1][:, others], expected[:, others], tolerance)
    later = bad.forward([text(1), text(1)], cache)
    assert np.isnan(later[0]).all()
    assert np.isfinite(later[1][others]).all()
    cache.truncate(0, 10)
    again = bad.forward([tokens[10:], np.empty(0, int)], cache, all_logits=True)[0]
    assert close(again[:, others], expected[10:, others], tolerance)


def test_refusals_name_what_is_wrong(tiny_model: Callable[[str], Tiny]) -> None:  # noqa: F811
    base = open_checkpoint(tiny_model("llama").path)
    executor = native(base)
    cache = executor.new_cache(2, 8)
    with pytest.raises(KbitError, match="sequence 1 would grow to 9 tokens, the cache holds 8"):
        executor.forward([text(1), text(9)], cache)
    for wrong in (VOCABULARY, -1):
        with pytest.raises(KbitError, match="sequence 1 has a token outside the vocabulary"):
            executor.forward([text(1), np.array([1, wrong])], cache)
    with pytest.raises(KbitError, match="1 sequences were given to a cache of 2"):
        executor.forward([text(1)], cache)
    assert cache.lengths == [0, 0]
    with pytest.raises(KbitError, match="can't be cut to 1"):
        cache.truncate(0, 1)
    with pytest.raises(KbitError, match="batch and a capacity of 1 or more"):
        executor.new_cache(0, 8)
    for options, words in (
        ({"dtype": "bf16"}, "computes in fp32"),
        ({"cache_dtype": "bf16"}, "cache_dtype 'bf16' is not known"),
        ({"arithmetic": "exact"}, "arithmetic 'exact' is not known"),
        ({"isa": "sse9"}, "isa 'sse9' is not known"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 100_000}, "threads is 100000, but has to be from 1 to 1024"),
    ):
        with pytest.raises(KbitError, match=words):
            native(base, **options)


def test_tensors_that_do_not_fit_are_refused_at_load(
    tiny_model: Callable[[str], Tiny],  # noqa: F811
) -> None:
    base = open_checkpoint(tiny_model("llama").path)
    name = "model.layers.1.mlp.down_proj.weight"

    def cut(tensor: str, stored: np.ndarray) -> np.ndarray:
        return stored[:, :-1] if tensor == name else stored

    with pytest.raises(KbitError, match=f"tensor {name} has the shape"):
        native(Changed(base, cut))
    wrong_type = Changed(base, lambda t, stored: stored.astype(int) if t == name else stored)
    with pytest.raises(KbitError, match=f"tensor {name}: a plain matrix is fp32"):
        native(wrong_type)


def test_learned_positions_bound_the_cache(tiny_model: Callable[[str], Tiny]) -> None:  # noqa: F811
    executor = native(open_checkpoint(tiny_model("gpt2").path))
    with pytest.raises(KbitError, match="learned positions for 64 only"):
        executor.new_cache(1, 65)


def test_support_has_reasons(
    tiny_model: Callable[[str], Tiny],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = describe_checkpoint(open_checkpoint(tiny_model("llama").path))
    able, reason = supports(decoder, "cpu")
    assert able
    assert library.best_isa() in reason
    assert supports(decoder, "cuda") == (False, "it runs on the CPU, not on 'cuda'")
    layer = decoder.layers[0]
    from dataclasses import replace

    from kbit.models import Rows

    odd = replace(layer.attention.q, rows=Rows(0, 2, stride=4, count=24))
    broken = replace(decoder, layers=(replace(layer, attention=replace(layer.attention, q=odd)),))
    assert supports(broken, "cpu") == (
        False,
        "layer 0 stores its heads in an order that it does not know",
    )
    assert default_threads() >= 1
