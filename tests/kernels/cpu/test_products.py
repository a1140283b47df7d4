"""Native products and dequantizing against numpy: every type, width, block and arithmetic."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kbit_kernels import KbitError, QuantizedTensor, QuantSpec, linear, quantize, reference
from kbit_kernels.cpu import library
from kbit_kernels.cpu.library import Arithmetic, Isa, Matrix, Pool
from kbit_kernels.formats import DATA_TYPES
from tests.kernels.cpu.tensors import random_tensor
from tests.kernels.strategies import ALL_TYPES, specs

# largest error, relative to |x| |w| of the row: fp32 sums; 8-bit inputs with a scale a block (and
# codebooks of up to 16 entries on 8 bits); 13-bit inputs with 12-bit codebooks; two factors of 8
# bits
TOLERANCE: dict[Arithmetic, float] = {"float": 2e-6, "int8": 6e-3, "int16": 1.5e-4, "bf16": 4e-3}
BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 0)
TOKENS = (1, 2, 3, 4, 5, 13, 16, 35)


def check(
    tensor: QuantizedTensor, x: np.ndarray, isa: Isa, pool: Pool, ariths: tuple[Arithmetic, ...]
) -> None:
    """Holds products of `tensor` to numpy's in fp64."""
    weights = reference.dequantize(tensor)
    matrix = Matrix(tensor, isa)
    assert np.array_equal(matrix.dequantize(pool), weights)
    exact = x.astype(np.float64) @ weights.astype(np.float64).T
    # fp32 rounds relative to the weights, before zero points are taken off and means added; fixed
    # point relative to the largest weight that a block's scale allows
    peak = float(np.abs(tensor.values()).max())
    # (a double-quantized scale may come out below zero)
    largest = np.abs(tensor.scale_values()).max(axis=1, initial=0) * peak
    for extra in (tensor.means, tensor.outliers):
        if extra is not None:
            largest = largest + np.abs(extra.astype(np.float32)).max(axis=1)
    for arithmetic in ariths:
        exactly = arithmetic == "float" and tensor.zeros is None and tensor.means is None
        size = np.abs(weights).max(axis=1) if exactly else largest
        norm = np.linalg.norm(x, axis=1)[:, None] * size * np.sqrt(weights.shape[1]) + 1e-30
        found = matrix.linear(x, arithmetic=arithmetic, pool=pool)
        worst = float((np.abs(found - exact) / norm).max())
        assert worst <= TOLERANCE[arithmetic], (str(tensor.spec), isa, arithmetic, x.shape, worst)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_type_and_block(isa: Isa, pool: Pool, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for dtype, row in DATA_TYPES.items():
        if bits not in row.widths:
            continue
        for i, block in enumerate(row.blocks or BLOCKS):
            # rows around a tile's, columns around a unit's, a step's and a segment's
            shape = [(37, 97), (5, 576), (33, 160), (3, 2081), (19, 31), (70, 1056)][
                (i + bits + len(dtype)) % 6
            ]
            tensor = random_tensor(QuantSpec(dtype, bits, block), shape, rng)
            for tokens in (TOKENS[i % 4], TOKENS[4 + i % 4]):
                x = rng.standard_normal((tokens, shape[1])).astype(np.float32)
                check(tensor, x, isa, pool, library.ARITHMETICS)


@settings(max_examples=60, deadline=None)
@example(  # a mean that all but cancels the weight
    spec=QuantSpec.parse("int2-row-dq-center"),
    rows=15,
    columns=1,
    tokens=1,
    arithmetic="float",
    seed=14,
)
@given(
    spec=specs(),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 20),
    arithmetic=st.sampled_from(library.ARITHMETICS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_spec_and_shape(
    spec: QuantSpec, rows: int, columns: int, tokens: int, arithmetic: Arithmetic, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tensor = random_tensor(spec, (rows, columns), rng)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    for isa in filter(library.isa_available, library.ISAS):
        check(tensor, x, isa, library.default_pool(), (arithmetic,))


@pytest.mark.parametrize("spec", ["int8-b64", "nf4-b256", "int3-row", "uint2-b64-dq"])
def test_rows_longer_than_a_span_of_scales(isa: Isa, pool: Pool, spec: str) -> None:
    rng = np.random.default_rng(5)
    tensor = random_tensor(QuantSpec.parse(spec), (19, 33_000), rng)
    for tokens in (1, 2, 17):
        x = rng.standard_normal((tokens, 33_000)).astype(np.float32)
        check(tensor, x, isa, pool, library.ARITHMETICS)


@settings(max_examples=60, deadline=None)
@example(spec=QuantSpec.parse("int8-b64"), rows=33, columns=131, tokens=17, flat=True, seed=0)
@example(spec=QuantSpec.parse("nf8-b16"), rows=33, columns=131, tokens=17, flat=True, seed=0)
@given(
    spec=specs(),
    rows=st.integers(1, 70),
    columns=st.integers(1, 1400),
    tokens=st.integers(16, 30),
    flat=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_sums_are_exact(
    spec: QuantSpec, rows: int, columns: int, tokens: int, flat: bool, seed: int
) -> None:
    """With half the multiplications sums are the same; `flat`: at the ends of what 16 bits hold."""
    if not library.isa_available("avx512"):
        pytest.skip("nothing else multiplies sums")
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    if flat:
        weights, x = np.sign(weights), np.sign(x)
    tensor = quantize(weights, spec)
    native, matrix, found = library.load(), Matrix(tensor, "avx512"), []
    for on in (0, 1):
        before = native.kbit_multiply_sums(on)
        found.append(matrix.linear(x, arithmetic="int16", pool=library.default_pool()))
        native.kbit_multiply_sums(before)
    assert np.array_equal(*found), str(spec)


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(
        ["int4-b64", "int3-b16", "int2-row", "uint4-b32", "uint2-b128", "fp3e1-b64", "fp2e1-b16"]
    ),
    rows=st.integers(1, 70),
    columns=st.integers(1, 1400),
    tokens=st.integers(16, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_sums_of_bytes_are_exact(
    spec: str, rows: int, columns: int, tokens: int, seed: int
) -> None:
    """Of inputs that rounding leaves alone, at the ends of what 8 bits hold."""
    if not library.isa_available("avx512"):
        pytest.skip("nothing else multiplies sums")
    rng = np.random.default_rng(seed)
    tensor = random_tensor(QuantSpec.parse(spec), (rows, columns), rng)
    weights = reference.dequantize(tensor).astype(np.float64)
    x = rng.choice([-1.0, 0.0, 1.0], (tokens, columns), p=[0.45, 0.1, 0.45]).astype(np.float32)
    native, matrix = library.load(), Matrix(tensor, "avx512")
    before = native.kbit_multiply_sums(1)
    found = matrix.linear(x, arithmetic="int8", pool=library.default_pool())
    native.kbit_multiply_sums(before)
    largest = np.abs(weights).max(axis=1)
    if tensor.zeros is not None:  # they are taken off after rounding
        largest += 16 * np.abs(tensor.scale_values()).max(axis=1)
    bound = 4e-6 * largest * np.sqrt(columns)  # one integer more or less is 7e-6 or more
    assert (np.abs(found - x @ weights.T) <= bound).all(), spec


def test_every_float_format(isa: Isa, pool: Pool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 96)).astype(np.float32)
    for dtype, bits, exponent in ALL_TYPES:
        tensor = random_tensor(QuantSpec(dtype, bits, 64, exponent), (9, 96), rng)
        check(tensor, x, isa, pool, library.ARITHMETICS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_plain_matrices(isa: Isa, pool: Pool, dtype: type, tokens: int) -> None:
    rng = np.random.default_rng(0)
    for shape in ((37, 97), (5, 576), (1, 1), (33, 259)):
        weights: NDArray[Any] = rng.standard_normal(shape).astype(dtype)
        x = rng.standard_normal((tokens, shape[1])).astype(np.float32)
        matrix = Matrix(weights, isa)
        assert np.array_equal(matrix.dequantize(pool), weights.astype(np.float32))
        exact = x.astype(np.float64) @ weights.astype(np.float64).T
        norm = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(
            weights.astype(np.float32), axis=1
        )
        for arithmetic in library.ARITHMETICS:  # all are float here
            found = matrix.linear(x, arithmetic=arithmetic, pool=pool)
            assert (np.abs(found - exact) / norm).max() < 1e-6


@pytest.mark.parametrize("text", ["int4-b64", "nf4-b32", "uint3-b16", "nf7-row", "int5-b64-out0.1"])
@pytest.mark.parametrize("arithmetic", library.ARITHMETICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [3, 7, 18])
def test_bad_activations_stay_bad(
    isa: Isa, pool: Pool, text: str, arithmetic: Arithmetic, bad: float, tokens: int
) -> None:
    rng = np.random.default_rng(0)
    tensor = random_tensor(QuantSpec.parse(text), (9, 200), rng)
    x = rng.standard_normal((tokens, 200)).astype(np.float32)
    good = Matrix(tensor, isa).linear(x, arithmetic=arithmetic, pool=pool)
    x[1, 130] = bad
    found = Matrix(tensor, isa).linear(x, arithmetic=arithmetic, pool=pool)
    assert not np.isfinite(found[1]).any()
    others = np.arange(tokens) != 1
    assert np.array_equal(found[others], good[others])


@pytest.mark.parametrize("arithmetic", library.ARITHMETICS)
def test_extreme_activations(isa: Isa, pool: Pool, arithmetic: Arithmetic) -> None:
    rng = np.random.default_rng(0)
    tensor = random_tensor(QuantSpec("nf", 4, 64), (9, 192), rng)
    matrix = Matrix(tensor, isa)
    assert not matrix.linear(np.zeros((2, 192)), arithmetic=arithmetic, pool=pool).any()
    x = rng.standard_normal((1, 192)).astype(np.float32)
    for power in (-60, 60):  # powers of two: only scales change
        scaled = matrix.linear(np.ldexp(x, power), arithmetic=arithmetic, pool=pool)
        expected = np.ldexp(matrix.linear(x, arithmetic=arithmetic, pool=pool), power)
        assert np.allclose(scaled, expected, rtol=1e-6)
    tiny = np.full((1, 192), 1e-40, dtype=np.float32)  # subnormal
    assert np.isfinite(matrix.linear(tiny, arithmetic=arithmetic, pool=pool)).all()


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("tokens", [1, 6])
def test_threads_do_not_change_results(threads: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    tensor = random_tensor(QuantSpec("nf", 3, 32), (301, 128), rng)
    x = rng.standard_normal((tokens, 128)).astype(np.float32)
    alone = Matrix(tensor).linear(x, arithmetic="int8", pool=Pool(1))
    crowd = Pool(threads)
    for _ in range(20):
        found = Matrix(tensor).linear(x, arithmetic="int8", pool=crowd)
        assert np.array_equal(found, alone)


def test_the_native_backend_is_the_default() -> None:
    rng = np.random.default_rng(0)
    tensor = quantize(rng.standard_normal((8, 64)).astype(np.float32), QuantSpec("int", 4, 64))
    x = rng.standard_normal((2, 64)).astype(np.float32)
    bias = rng.standard_normal(8).astype(np.float32)
    by_name = linear(x, tensor, bias, backend="cpu")
    assert np.array_equal(linear(x, tensor, bias), by_name)
    assert np.allclose(by_name, reference.linear(x, tensor, bias), atol=1e-4)


def test_malformed_tensors_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(KbitError, match="plain matrix"):
        Matrix(np.zeros((3, 3)))
    missing = [isa for isa in library.ISAS if not library.isa_available(isa)]
    tensor = random_tensor(QuantSpec("int", 4, 64), (4, 64), rng)
    for isa in missing:
        with pytest.raises(KbitError, match="instruction set"):
            Matrix(tensor, isa)
    object.__setattr__(tensor, "scales", np.zeros((4, 1), dtype=np.uint8))
    with pytest.raises(KbitError, match="double-quantized"):
        Matrix(tensor)


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(KbitError, match="other sources"):
        library.load.__wrapped__()
