"""A quantized matrix on the GPU, and the operations on it."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from kbit_kernels.activations import ACTIVATIONS
from kbit_kernels.errors import KbitError
from kbit_kernels.reference import dequantize as reference_dequantize
from kbit_kernels.spec import QuantSpec
from kbit_kernels.tensor import QuantizedTensor
from kbit_kernels.triton import gemm, kernels
from kbit_kernels.triton.blocks import LANES_FIRST
from kbit_kernels.triton.configs import LINEAR_ROWS, Config, choose, gpu_class
from kbit_kernels.triton.decode import (
    FENCE_PTX,
    HALF_DTYPES,
    PROGRAM_PTX,
    SCALE_PTX,
    SHARED_TABLE_PTX,
    decode_ptx,
    table_words,
)
from kbit_kernels.triton.layout import COLUMNS, rearrange, scheme_of, tile_blocks

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
DEQUANTIZE_WARPS = 4
ARRANGE_BLOCK = 2048
# Since 3.7 Triton has ptxas allocate registers in a way (regAllocOptLevel) that may leave a word or
# two without one. For these decodings, widths and rows of x (and warps, where a fourth number says
# so) it helps to read the program's indices anew after the loop; found by compiling. On the chips
# that are named, else on all; None: on none.
SHORT: dict[tuple[str | int, ...], tuple[str, ...] | None] = {
    ("int", 3, 8): ("sm_86", "sm_89"),
    ("int", 7, 8): (),
    ("uint", 5, 8): ("sm_100",),
    ("uint", 6, 8): (),
    ("table", 3, 16): ("sm_120",),
    ("int", 5, 16): ("sm_120",),
    ("table", 7, 16): ("sm_120",),
    ("fp", 8, 16): (),
    ("fp", 8, 16, 8): None,
    ("fp", 8, LINEAR_ROWS): (),
    **{
        (kind, k, m): ()
        for kind in ("int", "fp", "table")
        for k in (4, 6)
        for m in (16, LINEAR_ROWS)
    },
}

# Triton 3.6 hashes a function by what it calls that was hashed before: in the same order in every
# process, else a cache that one process has filled is of no use to another.
for _kernel in (kernels.linear_kernel, kernels.dequantize_kernel, gemm.gemm_kernel):
    getattr(_kernel, "cache_key", None)  # an interpreted kernel has none


@dataclass(frozen=True, eq=False)
class DeviceTensor:
    """A matrix `[N, K]` arranged for the kernels (see `layout`); made by `prepare`.

    Attributes:
        spec, shape: as in the checkpoint.
        dtype: of the activations, fp16 or bf16.
        words: int16 `[bands, tiles, 256k]`.
        scales: by `layout.tile_blocks`.
        zeros: `zeros_dtype`, likewise; None without a zero point.
        means: likewise; None if not centered.
        table: int32 `[256]` for the PTX path, or the codebook in `dtype` for the plain one.
        factor: what the decoded values are multiplied by, beside the scales.
        outlier_columns: int64 `[J]`; outliers, outlier_residual: `dtype [N, J]`, the weights of
            these columns and what they exceed the decoded codes by.
        use_ptx: decode by PTX; else in plain Triton (interpreter, other chips).
    """

    spec: QuantSpec
    shape: tuple[int, int]
    dtype: torch.dtype
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    means: torch.Tensor | None
    table: torch.Tensor | None
    factor: float
    outlier_columns: torch.Tensor | None
    outliers: torch.Tensor | None
    outlier_residual: torch.Tensor | None
    use_ptx: bool

    @property
    def device(self) -> torch.device:
        """Where the arrays lie."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        arrays = (getattr(self, name) for name in self.__dataclass_fields__)
        return sum(a.nbytes for a in arrays if isinstance(a, torch.Tensor))


def _from_numpy(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """A copy on `device`; the arrays of a checkpoint are read-only views of a file."""
    array = np.ascontiguousarray(array)
    if array.dtype == HALF_DTYPES["bf16"]:
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.tensor(array).to(device)


def prepare(
    tensor: QuantizedTensor,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.float16,
    *,
    use_ptx: bool | None = None,
) -> DeviceTensor:
    """Move a stored matrix to `device` and rearrange it; the work happens on the device.

    Args:
        tensor: as read from a checkpoint.
        device: a CUDA device, or "cpu" under Triton's interpreter.
        dtype: of the activations it will be multiplied with, fp16 or bf16.
        use_ptx: override the choice of the decoder; None: PTX on NVIDIA chips.

    Raises:
        KbitError: `dtype` is neither fp16 nor bf16.
    """
    if dtype not in DTYPE_NAMES:
        raise KbitError(f"activations are {dtype}; the GPU kernels take float16 or bfloat16")
    half = DTYPE_NAMES[dtype]
    if use_ptx is None:
        use_ptx = torch.device(device).type == "cuda" and torch.version.hip is None
    plain = tensor.with_plain_scales()
    spec, shape = kernel_spec(plain.spec), plain.shape
    scheme = scheme_of(spec)

    def blocks(values: np.ndarray) -> torch.Tensor:
        if spec.block != plain.spec.block:
            values = values.repeat(-(-shape[1] // spec.block), axis=1)
        return tile_blocks(_from_numpy(values, device), shape, spec.block)

    zeros = means = table = columns = outliers = residual = None
    if plain.zeros is not None:
        zeros = blocks(plain.zeros.astype(zeros_dtype(spec)))
    if plain.means is not None:
        means = blocks(plain.means)
    if scheme.kind == "table":
        table = make_table(plain.values(), spec, half, use_ptx, device)
    if plain.outlier_columns is not None:
        assert plain.outliers is not None
        columns = _from_numpy(plain.outlier_columns.astype(np.int64), device)
        outliers = _from_numpy(plain.outliers, device).to(dtype)
        residual = (_from_numpy(_outlier_residual(plain), device)).to(dtype)
    return DeviceTensor(
        spec=tensor.spec,
        shape=shape,
        dtype=dtype,
        words=rearrange(torch.from_numpy(plain.codes.copy()), shape, spec, device),
        scales=blocks(plain.scales),
        zeros=zeros,
        means=means,
        table=table,
        factor=factor_of(spec),
        outlier_columns=columns,
        outliers=outliers,
        outlier_residual=residual,
        use_ptx=use_ptx,
    )


def make_table(
    values: np.ndarray, spec: QuantSpec, half: str, use_ptx: bool, device: torch.device | str
) -> torch.Tensor:
    """The codebook fp32 `[2^k]` as the kernels read it."""
    values = values / np.float32(factor_of(spec))
    if use_ptx:
        return _from_numpy(table_words(values, scheme_of(spec), half), device)
    return _from_numpy(values.astype(HALF_DTYPES[half]), device)


def factor_of(spec: QuantSpec) -> float:
    """k-bit floats are decoded with the largest value 2 - 2^-m, exact in half precision; the
    codebook's is 1."""
    if spec.dtype != "fp":
        return 1.0
    assert spec.exponent is not None
    return 1.0 / (2.0 - 2.0 ** -(spec.bits - 1 - spec.exponent))


def zeros_dtype(spec: QuantSpec) -> type[np.integer[Any]]:
    """Of zero points. Where a lane has one a row it is loaded by itself, and Triton orders the
    columns of an operand that is made from loaded bytes differently."""
    return np.uint8 if 0 < spec.block < COLUMNS else np.int16


def _outlier_residual(tensor: QuantizedTensor) -> np.ndarray:
    """fp32 `[N, J]`: the outliers minus what their columns' codes stand for, so that the product
    over all columns plus this small one is right without masking any column."""
    assert tensor.outliers is not None
    codes_only = replace(
        tensor,
        spec=replace(tensor.spec, outliers=0.0),
        outlier_columns=None,
        outliers=None,
    )
    columns = tensor.outlier_columns
    residual = np.empty(tensor.outliers.shape, dtype=np.float32)
    step = max(1, (1 << 24) // tensor.shape[1])
    for row in range(0, tensor.shape[0], step):
        rows = slice(row, row + step)
        decoded = reference_dequantize(codes_only.rows(rows))[:, columns]
        residual[rows] = tensor.outliers[rows].astype(np.float32) - decoded
    return residual


@lru_cache(maxsize=512)
def kernel_spec(spec: QuantSpec) -> QuantSpec:
    """What of a spec the kernels depend on, so that specs that differ otherwise share them.

    Whole rows are scaled once, after the last product; that leaves no place for means, so whole
    rows with means are blocks of 1024 with equal values.
    """
    block = 1024 if spec.block == 0 and spec.center else spec.block
    return QuantSpec(spec.dtype, spec.bits, block, spec.exponent, center=spec.center)


@lru_cache(maxsize=512)
def decoder_constants(spec: QuantSpec, half: str, use_ptx: bool) -> dict[str, Any]:
    """The constexpr arguments that both kernels take for `spec`."""
    scheme = scheme_of(spec)
    ptx, constraints = decode_ptx(scheme, half, spec.block) if use_ptx else ("", "")
    fields = tuple(tuple((f.chunk, f.bit, f.width, f.offset) for f in o) for o in scheme.fields)
    return {
        "BITS": scheme.bits,
        "KIND": scheme.kind,
        "EXPONENT": scheme.exponent,
        "SPAN": scheme.span,
        "FIELDS": fields,
        "CHUNKS": scheme.chunks,
        "SUBTILES": scheme.subtiles,
        "BLOCK": spec.block,
        "HAS_MEANS": spec.center,
        "PTX": ptx,
        "CONSTRAINTS": constraints,
        "FILL": SHARED_TABLE_PTX if use_ptx else "",
    }


def linear_constants(
    spec: QuantSpec, half: str, use_ptx: bool, config: Config, columns: int, chip: str
) -> dict[str, Any]:
    """The constexpr arguments that follow from spec, K, config and the class of GPU, of
    `kernels.linear_kernel` or, with `config.stages`, of `gemm.gemm_kernel`."""
    tiles = -(-columns // COLUMNS)
    both = {
        **decoder_constants(spec, half, use_ptx),
        "EVEN_K": columns % COLUMNS == 0,
        "BM": config.rows_x,
        "SPLIT": config.split,
    }
    if config.stages:
        return {
            **both,
            "W": config.warps_n,
            "SCALING": SCALE_PTX if use_ptx else "",
            "ARRANGED": config.arranged,
            "AHEAD": config.ahead,
        }
    key = (scheme_of(spec).kind, spec.bits, config.rows_x)
    chips = SHORT.get((*key, config.warps_n * config.warps_k), SHORT.get(key))
    short = chips is not None and (not chips or chip in chips)
    again = use_ptx and short and not LANES_FIRST.value
    return {
        **both,
        "EVEN_TILES": tiles % (config.warps_k * config.split) == 0,
        "R": config.bands,
        "WN": config.warps_n,
        "WK": config.warps_k,
        # with more rows of x, or the lookups of 7 bits, registers are short
        "AHEAD": config.rows_x == 8 and not (spec.bits == 7 and scheme_of(spec).kind == "table"),
        "FENCE": FENCE_PTX if use_ptx else "",
        "PROGRAM": PROGRAM_PTX if again else (),
    }


def launch_warps(warps: int, amd: bool) -> int:
    """Triton's num_warps for `warps` groups of 32 lanes; AMD's have 64."""
    return max(1, warps // 2) if amd else warps


def launch_options(config: Config, amd: bool) -> dict[str, int]:
    """Triton's options for the kernel of `config`."""
    warps = launch_warps(config.warps_n * config.warps_k, amd)
    limit = {"maxnreg": config.registers} if config.registers else {}
    return {"num_warps": warps, "num_stages": max(1, config.stages), **limit}


def overlapping(device: torch.device, early: bool = False) -> dict[str, bool]:
    """Arguments of a launch that lets the next kernel begin while it runs, up to that one's
    `functions.after_others`; and which, if `early`, itself begins while those before it still run
    (programmatic dependent launch, from sm_90 on)."""
    chip, _ = gpu_class(device)
    able = chip.startswith("sm_") and int(chip[3:]) >= 90
    return {"OVERLAPS": able, **({"launch_pdl": True} if able and early else {})}


class Workspace:
    """Partial sums and arrival counters of split-K, one per device; counters stay at zero between
    calls, because the last program of each output sets its own back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.partial = torch.empty(0, dtype=torch.float32, device=device)
        self.counters = torch.zeros(0, dtype=torch.int32, device=device)
        self.retired: list[torch.Tensor] = []  # captured graphs may still point to them

    def fit(self, partial: int, counters: int) -> None:
        """Grow to at least so many elements."""
        if partial > self.partial.numel():
            self.retired.append(self.partial)
            self.partial = torch.empty(partial, dtype=torch.float32, device=self.device)
        if counters > self.counters.numel():
            self.retired.append(self.counters)
            self.counters = torch.zeros(counters, dtype=torch.int32, device=self.device)


_WORKSPACES: dict[torch.device, Workspace] = {}


def workspace(device: torch.device) -> Workspace:
    """The workspace of `device`."""
    if device not in _WORKSPACES:
        _WORKSPACES[device] = Workspace(device)
    return _WORKSPACES[device]


def arrange(x: torch.Tensor, weight: DeviceTensor, config: Config) -> torch.Tensor:
    """`x [M, K]` in the order in which gemm_kernel multiplies its columns with the weight's."""
    out = torch.empty_like(x)
    size = x.numel()
    gemm.arrange_kernel[(-(-size // ARRANGE_BLOCK),)](
        x,
        out,
        size,
        SPAN=scheme_of(kernel_spec(weight.spec)).span,
        BLOCK=ARRANGE_BLOCK,
        **overlapping(x.device, config.overlap),
        num_warps=launch_warps(4, torch.version.hip is not None),
    )
    return out


def fused_linear(
    x: torch.Tensor,
    weight: DeviceTensor,
    config: Config,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
    gate: str = "",
) -> torch.Tensor:
    """`x [M, K]` contiguous, in the weight's dtype -> `[M, N]`, through the fused kernel; added to
    `onto [M, N]`, contiguous, if given; or gated as in `linear`, `[M, N / 2]`."""
    M = x.shape[0]
    N, K = weight.shape
    tiles = -(-K // COLUMNS)
    rows = 16 * config.bands * config.warps_n
    grid = (-(-N // rows), -(-M // config.rows_x), config.split)
    if out is None:
        out = torch.empty((M, N // 2 if gate else N), dtype=x.dtype, device=x.device)
    extra = onto
    if weight.outlier_columns is not None:
        assert weight.outlier_residual is not None
        at, residual = x.index_select(1, weight.outlier_columns), weight.outlier_residual.t()
        extra = torch.mm(at, residual) if onto is None else torch.addmm(onto, at, residual)
    partial = counters = weight.scales  # placeholders where nothing is split
    if config.split > 1:
        space = workspace(x.device)
        space.fit(grid[0] * grid[1] * config.split * rows * config.rows_x, grid[0] * grid[1])
        partial, counters = space.partial, space.counters
    if config.arranged:
        x = arrange(x, weight, config)
    kernel = gemm.gemm_kernel if config.stages else kernels.linear_kernel
    kernel[grid](
        x,
        weight.words,
        weight.scales,
        weight.zeros if weight.zeros is not None else weight.words,
        weight.means if weight.means is not None else weight.scales,
        weight.table if weight.table is not None else weight.words,
        extra if extra is not None else x,
        bias if bias is not None else x,
        out,
        partial,
        counters,
        weight.factor,
        M,
        N,
        K,
        tiles,
        **overlapping(x.device, config.overlap),
        HAS_EXTRA=extra is not None,
        HAS_BIAS=bias is not None,
        GATE=gate,
        **launch_options(config, torch.version.hip is not None),
        **linear_constants(
            kernel_spec(weight.spec),
            DTYPE_NAMES[weight.dtype],
            weight.use_ptx,
            config,
            K,
            gpu_class(x.device)[0],
        ),
    )
    return out


def dequantize(weight: DeviceTensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weights `[N, K]` in `weight.dtype`, computed in fp32."""
    N, K = weight.shape
    if out is None:
        out = torch.empty((N, K), dtype=weight.dtype, device=weight.device)
    bands, tiles = weight.words.shape[:2]
    kernels.dequantize_kernel[(bands, -(-tiles // DEQUANTIZE_WARPS))](
        weight.words,
        weight.scales,
        weight.zeros if weight.zeros is not None else weight.words,
        weight.means if weight.means is not None else weight.scales,
        weight.table if weight.table is not None else weight.words,
        out,
        weight.factor,
        N,
        K,
        tiles,
        W=DEQUANTIZE_WARPS,
        num_warps=launch_warps(DEQUANTIZE_WARPS, torch.version.hip is not None),
        num_stages=1,
        **decoder_constants(kernel_spec(weight.spec), DTYPE_NAMES[weight.dtype], weight.use_ptx),
    )
    if weight.outlier_columns is not None:
        assert weight.outliers is not None
        out.index_copy_(1, weight.outlier_columns, weight.outliers)
    return out


def dequantized_linear(
    x: torch.Tensor, weight: DeviceTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x [M, K]` -> `[M, N]` by cuBLAS, from weights dequantized for the call."""
    return torch.nn.functional.linear(x, dequantize(weight), bias)


def linear(
    x: torch.Tensor,
    weight: DeviceTensor,
    bias: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
    gate: str = "",
) -> torch.Tensor:
    """`x [..., K] @ weights [N, K].T + bias [N] + onto [..., N]` -> `[..., N]` in x's dtype.

    Fused up to the cross-over of rows in the tuning table; above it the weights are dequantized
    into a buffer that lives for the call, and cuBLAS multiplies. The weight's device must be the
    current one, and calls (and replays of captured ones) must not overlap on two streams of it:
    products split over columns share one workspace.

    With `gate`, one of ACTIVATIONS, the weight is `gated` of two matrices, and the result, `[...,
    N / 2]`, is gate(product with the first) * product with the second.

    Raises:
        KbitError: x's last axis or dtype does not fit the weight.
    """
    N, K = weight.shape
    if x.shape[-1] != K or x.dtype != weight.dtype:
        raise KbitError(
            f"x is {x.dtype} {list(x.shape)}, but the weight was prepared for {weight.dtype} and"
            f" has shape {[N, K]}"
        )
    rows = x.reshape(-1, K)
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], N // 2 if gate else N))
    config = choose(weight.spec, rows.shape[0], N, K, weight.device)
    if config is None:
        result = dequantized_linear(rows, weight, bias)
        result = result if onto is None else onto.reshape(-1, N) + result
        if gate:
            first, second = result.view(-1, N // 16, 2, 8).float().unbind(2)
            result = (ACTIVATIONS[gate](first) * second).to(x.dtype).view(-1, N // 2)
    else:
        added = None if onto is None else onto.reshape(-1, N).contiguous()
        result = fused_linear(rows.contiguous(), weight, config, bias, onto=added, gate=gate)
    return result.reshape(*x.shape[:-1], result.shape[-1])
