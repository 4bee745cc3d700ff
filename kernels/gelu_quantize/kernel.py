"""`gelu_quantize`: the kernel of `quantize` with the GELU in front."""

import torch

from densegeo.kernels.quantize.kernel import QMAX_OF_KIND, run, variant
from densegeo.precision import FLOATS

VARIANTS = tuple(
    variant(source, target, gelu=True)
    for source in FLOATS
    for target in (source, *(QMAX_OF_KIND if source != "fp32" else ()))
)


def gelu_quantize(x: torch.Tensor, dtype: torch.dtype, inverse_scale: float, out: torch.Tensor | None) -> torch.Tensor:
    """See `densegeo.kernels.gelu_quantize.gelu_quantize`."""
    return run(x, dtype, inverse_scale, out, gelu=True)
