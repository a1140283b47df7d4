"""Every width and data type through the kernels, under Triton's interpreter, against the reference.

Two ways of decoding are held to the same bounds: plain Triton, and the PTX that NVIDIA chips run,
executed instruction by instruction by `ptx`. Outputs hold NaN before the kernels run.
"""

import itertools
from typing import Any

import pytest

from kbit_kernels.formats import DATA_TYPES
from tests.kernels.triton.conftest import Run

WIDTHS = range(2, 9)
BLOCKS = ("b32", "b64", "b128", "b256", "row")
ALL_BLOCKS = ("b16", *BLOCKS, "b512", "b1024")
# rows_x, bands, warps_n, warps_k, split, overlap, stages, arranged, registers, ahead
PLAIN = [8, 1, 1, 2, 1]
PATHS = {
    "one-warp": (1, [8, 1, 1, 1, 1]),
    "eight-rows": (8, [8, 1, 1, 4, 1]),
    "two-bands": (5, [8, 2, 1, 2, 1]),
    "split": (3, [8, 1, 1, 1, 2]),
    "split-uneven": (2, [8, 1, 1, 2, 4]),
    "sixteen-rows": (13, [16, 1, 1, 2, 1]),
    "sixteen-rows-split": (16, [16, 2, 1, 1, 2]),
    "gemm-32": (27, [32, 2, 2, 2, 1]),
    "programs-of-rows": (64, [32, 1, 4, 1, 1]),
    "gemm-32-split": (50, [32, 1, 2, 1, 2]),
    "many-rows": (37, [32, 1, 2, 1, 2]),
    "shared-x": (29, [32, 1, 4, 1, 1, False, 2]),
    "shared-x-split": (70, [64, 1, 4, 1, 2, False, 3]),
    "arranged-x": (21, [32, 1, 4, 1, 1, True, 3, True]),
    "ahead": (21, [32, 1, 4, 1, 1, True, 3, False, 0, True]),
    "ahead-split": (70, [64, 1, 4, 1, 2, True, 3, True, 0, True]),
}
PATH_CASES = [
    *((path, "int4-b64") for path in PATHS),
    ("split-uneven", "uint3-b32"),
    ("gemm-32", "uint8-row"),
    ("sixteen-rows", "nf5-row"),
    ("programs-of-rows", "fp6e3-b128"),
    ("shared-x", "uint3-b32"),
    ("shared-x", "fp7-b128-center"),
    ("shared-x", "nf8-row"),
    ("shared-x", "int6-b64-fp32"),
    ("shared-x-split", "int2-b16"),
    ("shared-x-split", "uint5-b1024"),
    ("arranged-x", "uint4-b16"),
    ("ahead", "uint3-b32"),
    ("ahead-split", "nf5-row"),
    ("ahead-split", "int8-b128-center"),
]


def names(width: int) -> list[str]:
    return [
        f"{row.name}{width}" if not row.name[-1].isdigit() else row.name
        for row in DATA_TYPES.values()
        if width in row.widths
    ]


ALL_TYPES = [(width, name) for width in WIDTHS for name in names(width)]
DECODED_APART = [(k, f"{name}{k}") for k in WIDTHS for name in ("int", "uint", "fp", "nf")]


def check(run: Run, spec: str, *, ptx: bool, **case: Any) -> None:
    shape = {"n": 40, "k": 352, "m": 3, "dtype": "float16", "config": PLAIN} | case
    answer = run(spec=spec, ptx=ptx, **shape)
    assert answer["linear"] <= 1.0, answer
    assert answer["dequantize"] <= 1.0, answer
    assert (answer["ptx_blocks"] > 0) == ptx


@pytest.mark.parametrize(("width", "name"), ALL_TYPES)
def test_every_type_and_width(interpreted: Run, width: int, name: str) -> None:
    at = ALL_TYPES.index((width, name))
    block = "b64" if name == "af4" else BLOCKS[at % len(BLOCKS)]
    dtype = ("float16", "bfloat16")[at % 2]
    check(interpreted, f"{name}-{block}", ptx=False, dtype=dtype, n=24, k=288)


@pytest.mark.parametrize("name", ["fp5", "fp6e2", "fp7", "fp8e4"])
def test_small_floats_in_bf16(interpreted: Run, name: str) -> None:
    # their smallest magnitudes pass through subnormal bit patterns
    check(interpreted, f"{name}-b64", ptx=False, dtype="bfloat16", n=16, k=256)


@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("int4-b64", "one-warp"),
        ("uint3-row", "two-bands"),
        ("nf5-b32-out0.05", "sixteen-rows-split"),
        ("int3-b64", "shared-x"),
    ],
)
def test_what_follows_a_product(interpreted: Run, spec: str, path: str, gate: str) -> None:
    m, config = PATHS[path]
    shape = {"n": 48, "k": 352, "m": m, "dtype": "float16", "config": config}
    answer = interpreted(spec=spec, ptx=False, gate=gate, **shape)
    assert answer["gate"] <= 1.0, answer
    assert answer["onto"] <= 1.0, answer


@pytest.mark.parametrize(("width", "name"), DECODED_APART)
def test_ptx(interpreted: Run, width: int, name: str) -> None:
    at = DECODED_APART.index((width, name))
    dtype = ("bfloat16", "float16")[at % 2]  # test_decode has every code in both
    block = BLOCKS[(at + 2) % len(BLOCKS)]
    check(interpreted, f"{name}-{block}", ptx=True, dtype=dtype, n=16, k=256)


@pytest.mark.parametrize("block", ALL_BLOCKS)
@pytest.mark.parametrize("name", ["int8", "uint3"])
def test_blocks_and_ragged_ends(interpreted: Run, name: str, block: str) -> None:
    k = 1056 if block == "b1024" else 544
    check(interpreted, f"{name}-{block}", ptx=False, n=17, k=k, m=1, config=[8, 1, 2, 1, 1])


@pytest.mark.parametrize(("path", "spec"), PATH_CASES)
def test_paths(interpreted: Run, path: str, spec: str) -> None:
    m, config = PATHS[path]
    calls = 2 if "split" in path else 1  # the second finds the counters that the first left
    check(interpreted, spec, ptx=path == "split", m=m, config=config, n=40, k=544, calls=calls)


@pytest.mark.parametrize(
    "spec",
    [
        "int4-b64-center",
        "nf3-row-center",
        "fp5-b64-center",
        "fp3-row-center",
        "int3-b64-out0.02",
        "uint5-b32-dq",
        "lloyd4-b64-bf16-dq-center-out0.05",
        "int6-b128-fp32",
        "fp6e4-row-bf16",
        "fp8e5-b64",
        "fp5e1-b64",
    ],
)
def test_options(interpreted: Run, spec: str) -> None:
    check(interpreted, spec, ptx=True, n=24, k=288)


@pytest.mark.parametrize(("n", "k"), [(1, 32), (16, 256), (15, 224), (33, 512), (7, 100)])
def test_shapes(interpreted: Run, n: int, k: int) -> None:
    check(interpreted, "int5-b64", ptx=False, n=n, k=k, config=[8, 1, 2, 2, 2])


@pytest.mark.parametrize("spec", ["int8-b64", "uint8-row"])
def test_offsets_beyond_32_bits(interpreted: Run, spec: str) -> None:
    answer = interpreted(far=True, spec=spec, n=(1 << 24) + 9, m=131)
    assert all(elements > 1 << 31 for elements in answer["elements"]), answer
    assert answer["linear"] < 1e-3, answer
    assert answer["dequantize"] < 4e-3, answer


@pytest.mark.slow
@pytest.mark.parametrize("ptx", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("width", "name"), ALL_TYPES)
def test_every_path(interpreted: Run, width: int, name: str, path: str, ptx: bool) -> None:
    m, config = PATHS[path]
    at = ALL_TYPES.index((width, name)) + list(PATHS).index(path)
    block = "b64" if name == "af4" else ALL_BLOCKS[at % len(ALL_BLOCKS)]
    dtype = ("float16", "bfloat16")[at // 2 % 2]
    check(interpreted, f"{name}-{block}", ptx=ptx, dtype=dtype, m=m, config=config, n=40, k=544)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("ptx", [False, True])
@pytest.mark.parametrize("block", ALL_BLOCKS)
@pytest.mark.parametrize(("width", "name"), ALL_TYPES)
def test_every_block(
    interpreted: Run, width: int, name: str, block: str, ptx: bool, dtype: str
) -> None:
    if name == "af4" and block != "b64":
        pytest.skip("af4 is defined for block 64")
    config = [8, 1, 1, 1, 2]
    check(interpreted, f"{name}-{block}", ptx=ptx, dtype=dtype, config=config, n=24, k=288)


def test_cases_are_complete() -> None:
    assert {name for _, name in ALL_TYPES} >= {
        f"{name}{k}"
        for name, k in itertools.product(("int", "uint", "fp", "nf", "dynamic", "lloyd"), WIDTHS)
    }
