"""The PTX of every scheme on every code, and the layout of the words, without triton."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kbit_kernels import QuantSpec  # noqa: E402
from kbit_kernels.errors import KbitError  # noqa: E402
from kbit_kernels.formats import codebook_of  # noqa: E402
from kbit_kernels.packing import pack  # noqa: E402
from kbit_kernels.triton import decode, layout  # noqa: E402
from tests.kernels.triton import ptx  # noqa: E402


def specs() -> list[QuantSpec]:
    found = []
    for bits in range(2, 9):
        found += [QuantSpec(name, bits) for name in ("int", "uint", "nf", "dynamic")]
        found += [QuantSpec("fp", bits, exponent=exponent) for exponent in range(1, bits)]
    return found


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("spec", specs(), ids=str)
def test_ptx_gives_the_codebook(spec: QuantSpec, half: str) -> None:
    check_ptx(spec, half, 64)


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("block", [0, 16, 32, 128, 256, 512])
@pytest.mark.parametrize("bits", range(2, 9))
def test_ptx_subtracts_zero_points(bits: int, block: int, half: str) -> None:
    check_ptx(QuantSpec("uint", bits, block), half, block)


def check_ptx(spec: QuantSpec, half: str, block: int) -> None:
    rng = np.random.default_rng(spec.bits)
    codes = rng.integers(0, 1 << spec.bits, (16, 256), dtype=np.uint8)
    codes.reshape(-1)[: 1 << spec.bits] = np.arange(1 << spec.bits)
    scheme = layout.scheme_of(spec)
    packed = torch.from_numpy(pack(codes, spec.bits))
    words = layout.rearrange(packed, (16, 256), spec, "cpu").numpy()
    chunks = words.reshape(scheme.subtiles, scheme.chunks, 256)

    values = codebook_of(spec)
    assert values is not None
    if scheme.kind in ("int", "uint"):
        values = np.arange(1 << spec.bits, dtype=np.float64)
        values -= 0.0 if scheme.kind == "uint" else 1 << (spec.bits - 1)
    elif spec.dtype == "fp":
        assert spec.exponent is not None
        values = values * np.float32(2.0 - 2.0 ** -(spec.bits - 1 - spec.exponent))
    expected_of_code = values.astype(decode.HALF_DTYPES[half]).astype(np.float64)
    if scheme.kind == "fp":
        assert np.abs(expected_of_code - values).max() < 1e-6  # exact but for fp32's own rounding

    text, constraints = decode.decode_ptx(scheme, half, block)
    expected = expected_of_code[codes]
    # a zero point for each block, of this tile or of a larger part of the row
    groups = 256 // block if 0 < block < 256 else 1
    zeros = rng.integers(0, 1 << spec.bits, (16, groups), dtype=np.uint8)
    if scheme.kind == "uint":
        expected -= zeros.repeat(256 // groups, 1)
    found = np.empty((16, 256))
    shared = None
    for subtile in range(scheme.subtiles):
        inputs = [np.ascontiguousarray(chunk).view(np.uint32) for chunk in chunks[subtile]]
        if scheme.kind == "table":  # each lane has its own copy
            shared = decode.table_words(values, scheme, half).view(np.uint32).repeat(32)
            inputs += [np.arange(128, dtype=np.uint32) // 4 * 4] * 2
        elif scheme.kind == "uint":
            columns = 256 // scheme.subtiles
            of_subtile = zeros[:, subtile * columns * groups // 256 :]
            for register in range(layout.zero_registers(columns, block)):
                four = np.full((16, 4), 255, np.uint8)  # what lies beyond must not matter
                some = of_subtile[:, 4 * register : 4 * register + 4]
                four[:, : some.shape[1]] = some
                of_row = four.view(np.uint32)[:, 0]
                of_pair = np.repeat(of_row.reshape(2, 8).T, 2, axis=1)  # g, words: r, pair
                inputs += [of_pair[:, None].repeat(4, 1).reshape(-1)] * 2
        assert constraints.count("r") == scheme.outputs + len(inputs)
        for output, result in enumerate(ptx.run(text, inputs, scheme.outputs, shared)):
            halves = result.view(np.uint16).view(decode.HALF_DTYPES[half]).astype(np.float64)
            lanes = halves.reshape(8, 4, 2, 4)  # g, t, r, i, as the module docstring has it
            for t in range(4):
                for i in range(4):
                    column = subtile * (256 // scheme.subtiles)
                    if scheme.span == 2:
                        column += 32 * (output // 2) + 8 * t + 4 * (output % 2) + i
                    else:
                        column += 16 * output + 4 * t + i
                    found[:8, column] = lanes[:, t, 0, i]
                    found[8:, column] = lanes[:, t, 1, i]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("threads", [32, 128, 256, 512])
def test_every_lane_has_the_whole_table(threads: int) -> None:
    entries = np.arange(1, 257, dtype=np.uint32)
    found = ptx.fill(decode.SHARED_TABLE_PTX, threads, entries)
    np.testing.assert_array_equal(found, entries.repeat(32))


def test_columns_of_blocks_of_16() -> None:
    spec = QuantSpec("int", 8, 16)
    codes = np.arange(256, dtype=np.uint8)[None].repeat(16, 0)
    words = layout.rearrange(torch.from_numpy(pack(codes, 8)), (16, 256), spec, "cpu").numpy()
    for lane_t in range(4):  # one sub-tile is 32 columns: two outputs, low and high bytes
        word = words.reshape(8, 8, 4, 2, 4)[0, 0, lane_t, 0]
        assert list(word & 0xFF) == [4 * lane_t + i for i in range(4)]
        assert list(word >> 8 & 0xFF) == [16 + 4 * lane_t + i for i in range(4)]


@pytest.mark.parametrize("kind", ["int", "table"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_fields_fill_every_bit_once(bits: int, kind: layout.Kind) -> None:
    scheme = layout.Scheme(bits, kind)
    used = np.zeros((scheme.chunks, 16 * scheme.unit), dtype=int)
    for fields in scheme.fields:
        of_unit = [bit for f in fields for bit in range(f.offset, f.offset + f.width)]
        assert sorted(of_unit) == list(range(scheme.unit * bits))
        for field in fields:
            used[field.chunk, field.bit : field.bit + field.width] += 1
    assert (used == 1).all()


@pytest.mark.parametrize("block", [0, 16, 64, 256, 1024])
def test_block_values_are_where_lanes_look(block: int) -> None:
    rows, columns = 21, 1300
    groups = 1 if block == 0 else -(-columns // block)
    values = torch.arange(1, rows * groups + 1, dtype=torch.float32).reshape(rows, groups)
    found = layout.tile_blocks(values, (rows, columns), block)
    width = max(block, layout.COLUMNS)
    for row in range(rows):
        for group in range(groups):
            tile, within = divmod(group * block, width)
            place = (row // 16, tile, row % 8, row % 16 // 8, within // max(block, 1))
            assert found[place] == values[row, group]
    assert found.count_nonzero() == values.numel()


def test_ptx_reads_no_more_than_it_is_given() -> None:
    scheme = layout.Scheme(3, "table")
    text, constraints = decode.decode_ptx(scheme, "fp16")
    assert constraints == ",".join(["=r"] * 16 + ["r"] * (3 + 2))
    assert "$21" not in text
    assert decode.decode_ptx(replace(scheme, kind="int"), "fp16")[0] != text


def test_activations_of_another_type_are_refused() -> None:
    pytest.importorskip("triton")
    from kbit_kernels import quantize
    from kbit_kernels.triton import prepare

    tensor = quantize(np.eye(32, dtype=np.float32), QuantSpec(), backend="reference")
    with pytest.raises(KbitError, match="float16 or bfloat16"):
        prepare(tensor, "cpu", torch.float32)
