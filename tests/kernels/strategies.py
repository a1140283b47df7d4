"""hypothesis strategies and the list of specs that every suite runs over."""

from hypothesis import strategies as st

from kbit_kernels import KbitError, QuantSpec
from kbit_kernels.formats import DATA_TYPES


def exponents(dtype: str, bits: int) -> list[int | None]:
    """The exponent bits a data type can have at a width; [None] where it has none."""
    return [None] if DATA_TYPES[dtype].default_exponent is None else list(range(1, bits))


ALL_TYPES = [
    (dtype, bits, exponent)
    for dtype, row in DATA_TYPES.items()
    for bits in row.widths
    for exponent in exponents(dtype, bits)
]


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """Every spec that can be built."""
    dtype, bits, exponent = draw(st.sampled_from(ALL_TYPES))
    block = draw(st.sampled_from(DATA_TYPES[dtype].blocks or (0, 16, 32, 64, 128, 256, 512, 1024)))
    try:
        return QuantSpec(
            dtype,
            bits,
            block,
            exponent,
            draw(st.sampled_from(["fp16", "bf16", "fp32"])),
            draw(st.booleans()),
            draw(st.booleans()) and not DATA_TYPES[dtype].zero_point,
            draw(st.sampled_from([0.0, 0.0, 0.02, 0.3, 1e-5])),
        )
    except KbitError as error:
        raise AssertionError("the strategy drew a spec that is refused") from error
