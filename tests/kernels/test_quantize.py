"""quantize and dequantize of the reference: the bound on the error, and hard inputs."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kbit_kernels as kk
from kbit_kernels import KbitError, QuantizedTensor, QuantSpec
from kbit_kernels.packing import unpack
from kbit_kernels.tensor import block_size, expected_parts, outlier_count
from tests.kernels.strategies import ALL_TYPES, specs

RNG_SEEDS = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 300))


def quantize(w: np.ndarray, spec: QuantSpec, **options: bool) -> QuantizedTensor:
    return kk.quantize(w, spec, backend="reference", **options)


def matrix(seed: int, shape: tuple[int, int], kind: str = "normal") -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    if kind == "heavy":
        w = w**5
    elif kind == "sparse":
        w[rng.random(shape) < 0.7] = 0
    elif kind == "constant":
        w[:] = rng.standard_normal()
    elif kind == "tiny":
        w *= 1e-9
    elif kind == "denormal":
        w *= 1e-41
    elif kind == "zero":
        w[:] = 0
    return w.astype(np.float32)


KINDS = ["normal", "heavy", "sparse", "constant", "tiny", "denormal", "zero"]


@settings(max_examples=300, deadline=None)
@given(specs(), shapes, RNG_SEEDS, st.sampled_from(KINDS), st.booleans())
def test_parts_are_as_the_spec_says(spec, shape, seed, kind, search) -> None:
    w = matrix(seed, shape, kind)
    tensor = quantize(w, spec, search=search)
    found = {suffix: (part.dtype, part.shape) for suffix, part in tensor.parts().items()}
    assert found == expected_parts(spec, shape)
    again = QuantizedTensor.from_parts(spec, shape, tensor.parts())
    decoded = kk.dequantize(again, backend="reference")
    assert decoded.shape == shape
    assert np.isfinite(decoded).all()


@settings(max_examples=300, deadline=None)
@given(specs(), shapes, RNG_SEEDS, st.sampled_from(KINDS))
def test_error_is_at_most_half_a_step_times_the_scale(spec, shape, seed, kind) -> None:
    """Between two codes: half their distance. Beyond the last one: the distance to it."""
    if spec.double_quant:  # its scales are rounded too coarsely to reach every block's largest
        return
    w = matrix(seed, shape, kind)
    tensor = quantize(w, spec)
    block = block_size(spec, shape[1])
    values = tensor.values().astype(np.float64)
    peak = max(values[-1], 1e-300) if spec.dtype == "int" else 1.0
    gap = np.diff(values[1:] if spec.dtype == "int" else values).max()
    beyond = max(peak - values[-1], peak + min(values[0], 0), 0.0)
    if spec.dtype == "uint":
        gap, beyond = 1.0, 0.0
    # a scale rounded to its dtype may fall short of the largest weight by so much
    rounding = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-23}[spec.scale_dtype] * peak
    bound = max(gap / 2, beyond + rounding, rounding) + 1e-5 * peak
    scale = np.repeat(np.abs(tensor.scale_values()), block, axis=1)[:, : shape[1]].astype(float)
    decoded = kk.dequantize(tensor, backend="reference").astype(np.float64)
    error = np.abs(decoded - w)
    if tensor.outlier_columns is not None:
        half = np.abs(w[:, tensor.outlier_columns]) * 2.0**-11 + 2.0**-25
        assert (error[:, tensor.outlier_columns] <= half).all()
        error[:, tensor.outlier_columns] = 0
    # fp32 arithmetic: adding a mean back rounds at the mean's size; denormals have one ulp
    slack = 2.0**-149 if tensor.means is None else 1e-6 * np.abs(w).max() + 2.0**-149
    assert (error <= bound * scale + slack).all()


@pytest.mark.parametrize(("dtype", "bits", "exponent"), ALL_TYPES)
def test_zeros_stay_zero(dtype: str, bits: int, exponent: int | None) -> None:
    w = matrix(1, (5, 130), "sparse")
    w[0] = np.abs(w[0]) + (w[0] != 0)  # a row without negatives: its range still holds zero
    for options in ({}, {"search": True}):
        decoded = kk.dequantize(quantize(w, QuantSpec(dtype, bits, 64, exponent), **options))
        assert (decoded[w == 0] == 0).all()


@settings(max_examples=60, deadline=None)
@given(specs(), shapes, RNG_SEEDS)
# a column at 16 bits is no weight of the centered rest
@example(QuantSpec("fpb", 5, 0, 1, center=True, outliers=0.02), (1, 3), 0)
def test_the_search_never_makes_a_tensor_worse(spec, shape, seed) -> None:
    if spec.double_quant:
        return
    w = matrix(seed, shape)
    plain, searched = (
        np.square(kk.dequantize(quantize(w, spec, search=s), backend="reference") - w).sum()
        for s in (False, True)
    )
    # bf16 scales may round the unit factor onto another neighbour
    assert searched <= plain * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("bits", range(2, 9))
def test_lloyd_has_the_least_error(bits: int) -> None:
    """Of all codebooks over the same blocks, on a tensor large enough to learn from."""
    w = matrix(3, (256, 512))

    def error(dtype: str) -> float:
        decoded = kk.dequantize(quantize(w, QuantSpec(dtype, bits, 64, None, "fp32")))
        return float(np.square(decoded - w).mean())

    best = error("lloyd")
    assert all(best < error(dtype) for dtype in ("int", "fp", "fpb", "nf", "dynamic", "quantile"))


def test_error_falls_with_the_width() -> None:
    w = matrix(4, (64, 256))
    for dtype in ("int", "uint", "nf", "dynamic", "quantile", "lloyd"):
        errors = [
            np.square(kk.dequantize(quantize(w, QuantSpec(dtype, bits))) - w).mean()
            for bits in range(2, 9)
        ]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_input_dtypes(dtype: type) -> None:
    w = matrix(5, (3, 100)).astype(dtype)
    same = quantize(w.astype(np.float32), QuantSpec())
    np.testing.assert_array_equal(quantize(w, QuantSpec()).codes, same.codes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("text", ["int4", "uint8", "nf4", "lloyd3", "int4-b64-out0.5"])
def test_nan_and_infinity_are_refused(value: float, text: str) -> None:
    w = matrix(0, (4, 40))
    w[2, 7] = value
    with pytest.raises(KbitError, match=r"NaN|infinite|beyond fp16"):
        quantize(w, QuantSpec.parse(text))


def test_scales_beyond_fp16_are_refused_by_name() -> None:
    w = matrix(0, (2, 64)) * np.float32(1e7)
    with pytest.raises(KbitError, match="scale dtype bf16 or fp32"):
        quantize(w, QuantSpec("nf", 4))
    assert np.isfinite(kk.dequantize(quantize(w, QuantSpec("nf", 4, scale_dtype="bf16")))).all()


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(KbitError, match="a matrix is quantized"):
        kk.quantize(np.zeros(5, dtype=np.float32), QuantSpec())
    with pytest.raises(KbitError, match="takes fp32, fp16 or bf16"):
        kk.quantize(np.zeros((5, 5)), QuantSpec())


def test_outlier_columns_given_or_found() -> None:
    w = matrix(0, (20, 100))
    w[:, 17] *= 50
    spec = QuantSpec("int", 3, outliers=0.02)
    assert outlier_count(spec, 100) == 2
    assert 17 in quantize(w, spec).outlier_columns
    chosen = kk.quantize(w, spec, outlier_columns=np.array([40, 3]), backend="reference")
    np.testing.assert_array_equal(chosen.outlier_columns, [3, 40])
    np.testing.assert_array_equal(kk.dequantize(chosen)[:, 3], w[:, 3].astype(np.float16))


@settings(max_examples=60, deadline=None)
@given(specs(), RNG_SEEDS)
def test_rows_of_a_tensor(spec, seed) -> None:
    tensor = quantize(matrix(seed, (9, 77)), spec)
    whole = kk.dequantize(tensor, backend="reference")
    for index in (slice(2, 6), np.array([7, 0, 7])):
        part = kk.dequantize(tensor.rows(index), backend="reference")
        np.testing.assert_array_equal(part, whole[index])


@settings(max_examples=60, deadline=None)
@given(specs(), shapes, RNG_SEEDS)
def test_linear_is_the_product_with_the_decoded_weights(spec, shape, seed) -> None:
    tensor = quantize(matrix(seed, shape), spec)
    x, bias = matrix(seed + 1, (3, shape[1])), matrix(seed, (1, shape[0]))[0]
    expected = x.astype(np.float64) @ kk.dequantize(tensor).astype(np.float64).T + bias
    found = kk.linear(x, tensor, bias, backend="reference")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_linear_checks_shapes() -> None:
    tensor = quantize(matrix(0, (4, 64)), QuantSpec())
    with pytest.raises(KbitError, match="does not fit weights"):
        kk.linear(np.zeros((1, 63), np.float32), tensor)
    with pytest.raises(KbitError, match="bias"):
        kk.linear(np.zeros((1, 64), np.float32), tensor, np.zeros(3, np.float32))
    with pytest.raises(KbitError, match="unknown backend 'gpu'"):
        kk.linear(np.zeros((1, 64), np.float32), tensor, backend="gpu")


def test_from_parts_names_what_does_not_fit() -> None:
    spec = QuantSpec("int", 4, 64, outliers=0.1)
    parts = quantize(matrix(0, (4, 64)), spec).parts()

    def refused(changes: dict[str, np.ndarray | None], says: str) -> None:
        changed = {k: v for k, v in {**parts, **changes}.items() if v is not None}
        with pytest.raises(KbitError, match=says):
            QuantizedTensor.from_parts(spec, (4, 64), changed)

    refused({"scales": None}, "'scales' of a int4-b64-out0.1 tensor is missing")
    refused({"zeros": parts["codes"]}, "'zeros' does not belong")
    refused({"codes": parts["codes"][:3]}, r"uint8 \[3, 32\]")
    refused({"scales": parts["scales"].astype(np.float32)}, "float32")
    refused({"outlier_columns": np.array([5, 4, 3, 2, 1, 0], np.int32)}, "must ascend")
    refused({"outlier_columns": np.array([0, 1, 2, 3, 4, 64], np.int32)}, "must ascend")


def test_bits_per_param_counts_every_byte() -> None:
    tensor = quantize(matrix(0, (8, 128)), QuantSpec("int", 4, 64))
    assert tensor.bits_per_param == 4 + 16 / 64
    ragged = quantize(matrix(0, (8, 100)), QuantSpec("int", 4, 64))
    assert ragged.bits_per_param == 8 * (8 * 64 + 8 * 2 * 2) / 800
    tensor = quantize(matrix(0, (64, 1024)), QuantSpec("nf", 4, 64, double_quant=True))
    np.testing.assert_allclose(tensor.bits_per_param, 4 + 8 / 64 + 32 / (64 * 256), atol=1e-3)


def test_codes_of_the_asymmetric_type() -> None:
    w = np.array([[-1.0, 0.0, 2.0, 0.5]], dtype=np.float32)
    tensor = quantize(w, QuantSpec("uint", 2, 0, None, "fp32"))
    np.testing.assert_array_equal(unpack(tensor.codes, 2, 4), [[0, 1, 3, 1]])
    np.testing.assert_array_equal(kk.dequantize(tensor), [[-1, 0, 2, 0]])
