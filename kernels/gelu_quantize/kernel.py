"""`gelu_quantize`: the kernel of `quantize` with the GELU in front."""

import torch

from densegeo.kernels.quantize.kernel import launch


def gelu_quantize(x: torch.Tensor, dtype: torch.dtype, inverse_scale: float, out: torch.Tensor | None) -> torch.Tensor:
    """See `densegeo.kernels.gelu_quantize.gelu_quantize`."""
    return launch(x, dtype, inverse_scale, out, gelu=True)
