import pytest
from hypothesis import given

from kbit_kernels import KbitError, QuantSpec
from tests.kernels.strategies import specs


@given(specs())
def test_the_string_form_parses_back(spec: QuantSpec) -> None:
    assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("nf4-b64", QuantSpec("nf", 4, 64)),
        ("int3-b32", QuantSpec("int", 3, 32)),
        ("fp4e2-b64", QuantSpec("fp", 4, 64, 2)),
        ("fp4-b64", QuantSpec("fp", 4, 64, 2)),
        ("uint8-b128", QuantSpec("uint", 8, 128)),
        ("af4-b64", QuantSpec("af4", 4, 64)),
        ("int4", QuantSpec("int", 4, 64)),
        ("int4-row-bf16-dq-center-out0.02", QuantSpec("int", 4, 0, None, "bf16", True, True, 0.02)),
    ],
)
def test_known_strings(text: str, spec: QuantSpec) -> None:
    assert QuantSpec.parse(text) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no spec"),
        ("four", "is no spec"),
        ("nf9-b64", "whole number from 2 to 8"),
        ("nf1-b64", "whole number from 2 to 8"),
        ("xx4-b64", "unknown data type 'xx'"),
        ("nf4-b65", "power of two"),
        ("nf4-b2048", "power of two"),
        ("nf4-bsixty", "'bsixty' is none of"),
        ("nf4-b64-b32", "a second time"),
        ("nf4e2-b64", "no exponent bits"),
        ("fp4e4-b64", "1 to 3 exponent bits"),
        ("bnb5-b64", "defined for bits 4"),
        ("af4-b32", "block 64 only"),
        ("uint4-b64-center", "cannot be centered"),
        ("int4-b64-out1", "fraction"),
    ],
)
def test_bad_strings_say_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(KbitError, match=says):
        QuantSpec.parse(text)


def test_values_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(KbitError, match=r"bits is 4\.0"):
        QuantSpec("int", 4.0)  # type: ignore[arg-type]
    with pytest.raises(KbitError, match="block is '64'"):
        QuantSpec("int", 4, "64")  # type: ignore[arg-type]
