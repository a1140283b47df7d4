"""Native round-to-nearest: codes, scales and refusals are the reference's."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kbit_kernels import KbitError, QuantizedTensor, QuantSpec, cpu, reference
from kbit_kernels.cpu import library
from kbit_kernels.cpu.library import Isa
from kbit_kernels.cpu.rounding import quantize
from kbit_kernels.formats import DATA_TYPES
from tests.kernels.strategies import specs

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def assert_same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert found.spec == expected.spec
    parts = found.parts()
    for suffix, array in expected.parts().items():
        assert parts[suffix].dtype == array.dtype
        assert np.array_equal(parts[suffix], array), (str(found.spec), suffix)
    assert parts.keys() == expected.parts().keys()


def weights(rng: np.random.Generator, shape: tuple[int, int], dtype: Any) -> NDArray[Any]:
    """Gaussian weights with zero blocks, ties between codes, tiny blocks and large ones."""
    w = rng.standard_normal(shape) * 0.05
    w[0] = 0
    w[1 % shape[0]] = rng.integers(-14, 15, shape[1]) / 4.0
    w[2 % shape[0]] *= 1e-7
    w[3 % shape[0], : shape[1] // 2] *= 1000
    return w.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_the_references(isa: Isa, bits: int, dtype: Any) -> None:
    rng = np.random.default_rng(bits)
    for name, row in DATA_TYPES.items():
        if bits not in row.widths:
            continue
        for i, block in enumerate(row.blocks or (16, 32, 64, 256, 0)):
            w = weights(rng, [(9, 97), (4, 576), (5, 33)][i % 3], dtype)
            spec = QuantSpec(name, bits, block)
            assert_same(quantize(w, spec, isa=isa), reference.quantize(w, spec))


def outcome(run: Callable[..., Any], w: NDArray[Any], spec: QuantSpec) -> QuantizedTensor | str:
    """The tensor, or the sentence that refuses it."""
    try:
        tensor: QuantizedTensor = run(w, spec)
    except KbitError as error:
        return str(error)
    return tensor


@settings(max_examples=60, deadline=None)
@given(
    spec=specs(),
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_spec(spec: QuantSpec, rows: int, columns: int, dtype: Any, seed: int) -> None:
    w = weights(np.random.default_rng(seed), (rows, columns), dtype)
    expected, found = outcome(reference.quantize, w, spec), outcome(cpu.quantize, w, spec)
    if isinstance(expected, QuantizedTensor) and isinstance(found, QuantizedTensor):
        assert_same(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize(("bad", "what"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_bad_weights_are_refused(isa: Isa, bad: float, what: str) -> None:
    for dtype in DTYPES:
        w = np.ones((5, 70), dtype=dtype)
        w[4, 69] = bad
        with pytest.raises(KbitError, match=what):
            quantize(w, QuantSpec("nf", 4, 64), isa=isa)


def test_threads_share_rows() -> None:
    w = weights(np.random.default_rng(0), (37, 128), np.float32)
    spec = QuantSpec("uint", 3, 32, outliers=0.05)
    expected = reference.quantize(w, spec)
    for threads in (1, 2, 5):
        assert_same(quantize(w, spec, pool=library.Pool(threads)), expected)
