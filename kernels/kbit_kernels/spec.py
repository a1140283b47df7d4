"""QuantSpec: how one matrix is stored, and its string form."""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from kbit_kernels.errors import KbitError

ScaleDtype = Literal["fp16", "bf16", "fp32"]
MIN_BLOCK, MAX_BLOCK = 16, 1024


@dataclass(frozen=True)
class QuantSpec:
    """The storage of one weight matrix `[N, K]`; `str(spec)` and `QuantSpec.parse` are inverse.

    Attributes:
        dtype: name of a data type, a row of `kbit_kernels.formats.DATA_TYPES`.
        bits: width k of a code, 2 to 8.
        block: consecutive weights of a row that share a scale: a power of two from 16 to 1024,
            or 0 for the whole row (written `row`).
        exponent: exponent bits of the k-bit floats `fp` and `fpb`; None takes the type's default.
        scale_dtype: storage of the scales (and of the means, if centered).
        double_quant: scales are themselves stored in 8 bits (QLoRA, arXiv 2305.14314, section 3).
        center: subtract each block's mean before quantizing (arXiv 2212.09720, appendix B).
        outliers: fraction of input columns kept at 16 bits (the paper's proxy quantization).

    Raises:
        KbitError: a value out of its range, or a combination the data type does not have.
    """

    dtype: str = "int"
    bits: int = 4
    block: int = 64
    exponent: int | None = None
    scale_dtype: ScaleDtype = "fp16"
    double_quant: bool = False
    center: bool = False
    outliers: float = 0.0

    def __post_init__(self) -> None:
        from kbit_kernels.formats import DATA_TYPES  # formats builds its tables from a QuantSpec

        if self.dtype not in DATA_TYPES:
            known = ", ".join(DATA_TYPES)
            raise KbitError(f"unknown data type {self.dtype!r}; known are {known}")
        data_type = DATA_TYPES[self.dtype]
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise KbitError(f"bits is {self.bits!r}; choose a whole number from 2 to 8")
        if self.bits not in data_type.widths:
            widths = ", ".join(map(str, data_type.widths))
            raise KbitError(f"data type {self.dtype} is defined for bits {widths}, not {self.bits}")
        if type(self.block) is not int or (
            self.block != 0
            and not (MIN_BLOCK <= self.block <= MAX_BLOCK and self.block.bit_count() == 1)
        ):
            raise KbitError(
                f"block is {self.block!r}; choose a power of two from {MIN_BLOCK} to {MAX_BLOCK},"
                " or 'row' (0 in Python)"
            )
        if data_type.blocks is not None and self.block not in data_type.blocks:
            blocks = ", ".join(map(str, data_type.blocks))
            raise KbitError(f"data type {self.dtype} is defined for block {blocks} only")
        if self.scale_dtype not in get_args(ScaleDtype):
            raise KbitError(f"scale dtype is {self.scale_dtype!r}; choose fp16, bf16 or fp32")
        if not 0.0 <= self.outliers < 1.0:
            raise KbitError(f"outliers is {self.outliers!r}; choose a fraction from 0 to below 1")
        if data_type.default_exponent is None:
            if self.exponent is not None:
                raise KbitError(f"data type {self.dtype} has no exponent bits; leave exponent out")
        else:
            if self.exponent is None:
                object.__setattr__(self, "exponent", data_type.default_exponent[self.bits])
            if type(self.exponent) is not int or not 1 <= self.exponent <= self.bits - 1:
                raise KbitError(
                    f"{self.dtype}{self.bits} has room for 1 to {self.bits - 1} exponent bits,"
                    f" not {self.exponent}"
                )
        if self.center and data_type.zero_point:
            raise KbitError(f"data type {self.dtype} has a zero point and cannot be centered too")

    def __str__(self) -> str:
        name = self.dtype if self.dtype[-1].isdigit() else f"{self.dtype}{self.bits}"
        parts = [
            name if self.exponent is None else f"{name}e{self.exponent}",
            f"b{self.block}" if self.block else "row",
        ]
        if self.scale_dtype != "fp16":
            parts.append(self.scale_dtype)
        if self.double_quant:
            parts.append("dq")
        if self.center:
            parts.append("center")
        if self.outliers:
            parts.append("out" + np.format_float_positional(self.outliers, trim="-"))
        return "-".join(parts)

    @classmethod
    def parse(cls, text: str) -> "QuantSpec":
        """The spec that `text` names, such as `nf4-b64`, `int3-row-bf16-dq` or `fp4e2-b128`.

        Raises:
            KbitError: `text` names no spec; the sentence says which part is not understood.
        """
        from kbit_kernels.formats import DATA_TYPES

        head, *options = text.strip().split("-")
        fields: dict[str, Any] = {}
        match = re.fullmatch(r"([a-z]+)(\d+)(?:e(\d+))?", head)
        if match is None:
            raise KbitError(f"{text!r} is no spec: it starts like nf4, int3, uint8 or fp4e2")
        fields["dtype"] = head if head in DATA_TYPES else match[1]
        fields["bits"] = int(match[2])
        if match[3] is not None:
            fields["exponent"] = int(match[3])
        for option in options:
            if option == "row":
                key, value = "block", 0
            elif re.fullmatch(r"b[1-9]\d*", option):
                key, value = "block", int(option[1:])
            elif option in get_args(ScaleDtype):
                key, value = "scale_dtype", option  # type: ignore[assignment]
            elif option == "dq":
                key, value = "double_quant", True
            elif option == "center":
                key, value = "center", True
            elif re.fullmatch(r"out\d*\.?\d+", option):
                key, value = "outliers", float(option[3:])  # type: ignore[assignment]
            else:
                raise KbitError(
                    f"{text!r} is no spec: {option!r} is none of b16..b1024, row, fp16, bf16, fp32,"
                    " dq, center, out0.02"
                )
            if key in fields:
                raise KbitError(f"{text!r} is no spec: {option!r} sets {key} a second time")
            fields[key] = value
        return cls(**fields)
