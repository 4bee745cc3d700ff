"""What a bundle's numbers are: one row a precision. Code asks the row what it needs to know, never the name.

Imports no heavy library: torch's, ONNX's and Triton's types stand here by name, and who needs one looks it up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from densegeo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One row. torch, onnx, triton, safetensors: what the libraries call the type that is stored.

    bases: the floating-point types that a quantized precision can leave beside it, its default first; a floating-point
    type has itself. first_architecture: of the GPUs that have it in engines, 89 for sm_89. granularity: what has one
    scale. qmax: the magnitude at which quantized numbers saturate.
    """

    name: str
    bits: int
    bases: tuple[str, ...]
    first_architecture: int
    torch: str
    onnx: str
    triton: str
    safetensors: str
    granularity: Literal["none", "row", "block"] = "none"
    weight_only: bool = False  # activations stay in the base, and need no ranges
    qmax: float = 0.0
    attention: bool = False  # fine enough for attention's probabilities too
    fast_convolutions: bool = False  # convolutions in it were measured to be faster than the base's, somewhere
    engine_each: bool = False  # an engine for several architectures is slower than one for each (DESIGN section 7)
    overflows: bool = False  # a network's sums can pass its largest number

    @property
    def base(self) -> str:
        """The floating-point type where none was asked for."""
        return self.bases[0]

    @property
    def quantized(self) -> bool:
        """Whether weights are stored with scales; the rest of the network is in a base."""
        return self.granularity != "none"

    @property
    def calibrated(self) -> bool:
        """Whether it needs the ranges of activations, which `densegeo calibrate` finds."""
        return self.quantized and not self.weight_only

    @property
    def integer(self) -> bool:
        """Whether its numbers are evenly spaced."""
        return "INT" in self.onnx

    @property
    def exact(self) -> bool:
        """Whether it is the reference's own type, so that errors are rounding alone."""
        return self.bits == 32

    def bytes_of(self, count: int) -> int:
        """Bytes of `count` numbers, without their scales."""
        return count * self.bits // 8


PRECISIONS = {
    row.name: row
    for row in (
        Precision(
            name="fp32",
            bits=32,
            bases=("fp32",),
            first_architecture=0,
            torch="float32",
            onnx="FLOAT",
            triton="fp32",
            safetensors="F32",
        ),
        Precision(
            name="bf16",
            bits=16,
            bases=("bf16",),
            first_architecture=80,
            torch="bfloat16",
            onnx="BFLOAT16",
            triton="bf16",
            safetensors="BF16",
        ),
        Precision(
            name="fp16",
            bits=16,
            bases=("fp16",),
            first_architecture=0,
            torch="float16",
            onnx="FLOAT16",
            triton="fp16",
            safetensors="F16",
            overflows=True,
        ),
        Precision(
            name="fp8",  # E4M3
            bits=8,
            bases=("bf16", "fp32"),
            first_architecture=89,
            torch="float8_e4m3fn",
            onnx="FLOAT8E4M3FN",
            triton="fp8e4nv",
            safetensors="F8_E4M3",
            granularity="row",
            qmax=448.0,
            attention=True,
            engine_each=True,
        ),
        Precision(
            name="int8",
            bits=8,
            bases=("bf16", "fp32"),
            first_architecture=80,  # where bf16 is beside it
            torch="int8",
            onnx="INT8",
            triton="i8",
            safetensors="I8",
            granularity="row",
            qmax=127.0,  # without -128: symmetric
            fast_convolutions=True,
        ),
    )
}
FLOATS = tuple(row.name for row in PRECISIONS.values() if not row.quantized)
QUANTIZED = tuple(row.name for row in PRECISIONS.values() if row.quantized)
CALIBRATED = tuple(row.name for row in PRECISIONS.values() if row.calibrated)


def precision_row(name: str) -> Precision:
    """Look a precision up; raises ConfigError that lists the names."""
    if name not in PRECISIONS:
        raise ConfigError(f"there is no precision {name!r}; there are {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
