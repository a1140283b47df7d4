"""Machine code for real chips, compiled here and judged by what is in it.

By default some configurations of every chip; all of them, for all types, behind the marker `slow`
(and in `benchmarks/static_gpu.py`, which prints the table).
"""

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from kbit_kernels import QuantSpec
from kbit_kernels.triton import compiled, configs
from kbit_kernels.triton.configs import Config
from kbit_kernels.triton.layout import scheme_of

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

WIDTHS = range(2, 9)
# lane-instructions a weight in the main loop, sm_90, M = 1; codebooks may take 1.0 more
GOALS = {2: 2.0, 3: 3.0, 4: 2.5, 5: 3.0, 6: 3.0, 7: 3.0, 8: 2.5}

# the default set: every chip, width and kind of decoding at least once
SOME = [
    ("sm_80", "int4-b64", 1),
    ("sm_80", "nf8-b64", 13),
    ("sm_86", "uint3-b64", 1),
    ("sm_89", "int7-b64", 1),
    ("sm_90", "int2-b64", 1),
    ("sm_90", "int8-b64", 1),
    ("sm_90", "nf4-b64", 1),
    ("sm_90", "nf7-b64", 1),
    ("sm_90", "int4-b64", 27),
    ("sm_90", "int4-b64", 64),
    ("sm_90", "nf4-b64", 128),
    ("sm_90", "uint3-b32", 64),
    ("sm_90", "uint3-b32", 1),
    ("sm_100", "fp6e3-b32", 1),
    ("sm_100", "int4-row", 27),
    ("sm_120", "int5-b128", 1),
    ("gfx942", "int4-b64", 1),
    ("gfx942", "nf3-b64", 50),
]
ALL_SPECS = [f"{name}{k}-b64" for k in WIDTHS for name in ("int", "uint", "fp", "nf")]


def config_of(chip: str, spec: str, rows: int) -> Config:
    return configs.heuristic(
        QuantSpec.parse(spec), rows, 8192, 8192, chip, configs.SHIPPED_CLASSES[chip]
    )


def check(chip: str, text: str, config: Config, half: str = "fp16") -> compiled.Binary:
    spec = QuantSpec.parse(text)
    binary = compiled.compile_linear(spec, chip, config, half)
    assert binary.spill_bytes == 0, binary
    assert binary.tensor_core > 0, binary
    wide = spec.bits * config.bands if chip in compiled.NVIDIA else 1
    assert binary.wide_loads >= wide, binary
    assert binary.narrow_loads == 0, binary
    # Triton asks for more than 48 KB only if its own part is more; 1 KB is the system's
    own = binary.launch_bytes - binary.shared_bytes
    assert own > 48 << 10 or binary.launch_bytes <= 49 << 10, binary
    return binary


def check_loop(chip: str, text: str, binary: compiled.Binary, config: Config) -> None:
    """One warp's loop: tensor-core products only on weights that it loaded itself."""
    spec = QuantSpec.parse(text)
    if config.stages:
        assert binary.loop["HGMMA"] == 16, binary
        # what is decoded goes from registers into the product
        assert not {"STS", "STSM", "SHFL", "HMMA"} & set(binary.loop), binary
        return
    assert binary.loop["HMMA"] == 16 * config.bands * (config.rows_x // 8), binary
    scheme = scheme_of(spec)
    lookups = 128 // scheme.unit * config.bands if scheme.kind == "table" else 0
    assert binary.exchanges == lookups, binary


@pytest.mark.parametrize(("chip", "spec", "rows"), SOME)
def test_some_configurations(chip: str, spec: str, rows: int) -> None:
    config = config_of(chip, spec, rows)
    binary = check(chip, spec, config)
    if chip in compiled.NVIDIA:
        check_loop(chip, spec, binary, config)
    if chip == "sm_90" and rows == 1:
        goal = GOALS[QuantSpec.parse(spec).bits] + (0.0 if spec.startswith("int") else 1.0)
        assert compiled.instructions_per_weight(binary, config) <= goal


@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_dequantize(chip: str) -> None:
    binary = compiled.compile_dequantize(QuantSpec.parse("int3-b64"), chip)
    assert binary.spill_bytes == 0
    assert binary.narrow_loads == 0


@pytest.mark.slow
@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("spec", ALL_SPECS)
@pytest.mark.parametrize("chip", compiled.CHIPS)
def test_every_shipped_configuration(chip: str, spec: str, half: str) -> None:
    shipped = configs.shipped_configs(chip, QuantSpec.parse(spec))
    # whether a launch may overlap is not compiled
    for config in sorted({replace(c, overlap=False) for c in shipped}, key=str):
        binary = check(chip, spec, config, half)
        if chip in compiled.NVIDIA:
            check_loop(chip, spec, binary, config)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ALL_SPECS)
def test_goals(spec: str) -> None:
    config = config_of("sm_90", spec, 1)
    binary = check("sm_90", spec, config)
    goal = GOALS[QuantSpec.parse(spec).bits] + (0.0 if spec.startswith("int") else 1.0)
    assert compiled.instructions_per_weight(binary, config) <= goal
