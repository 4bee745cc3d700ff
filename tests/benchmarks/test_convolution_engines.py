"""What a builder's log says of 8-bit convolutions and of the conversions beside them."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from densegeo.benchmarks.convolution_engines import conversions, surrounded
from densegeo.runtime.engine_log import BuildLog, Layer, Tensor


def layer(name: str, kind: str, taken: str, dtype: str, written: str, written_dtype: str) -> Layer:
    inputs, outputs = Tensor(taken, (1, 8, 4, 4), dtype), Tensor(written, (1, 8, 4, 4), written_dtype)
    return Layer(name, kind, (inputs,), (), (outputs,), ())


ROUNDING = layer("reformat before", "reformat", "picture", "BFloat16", "rounded", "Int8")
CONVOLUTION = layer("conv", "correlation", "rounded", "Int8", "sums", "Float")
SCALING = layer("reformat after", "reformat", "sums", "Float", "out", "BFloat16")


@pytest.mark.parametrize(
    ("layers", "count", "names"),
    [
        ((CONVOLUTION,), 0, []),
        ((ROUNDING, CONVOLUTION), 1, []),
        ((CONVOLUTION, SCALING), 1, []),
        ((ROUNDING, CONVOLUTION, SCALING), 2, ["conv"]),
    ],
)
def test_surrounded_is_a_conversion_on_both_sides(layers: tuple[Layer, ...], count: int, names: list[str]) -> None:
    log = BuildLog(layers, 0, 0)
    assert len(conversions(log)) == count
    assert surrounded(log) == names
