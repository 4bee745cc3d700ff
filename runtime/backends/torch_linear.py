"""Quantized linears as a device multiplies them: 8-bit operands, scales made ready once, at most one pass afterwards.

`models.quantized` has their plain form, which graphs are exported from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densegeo.kernels.quantize import quantize
from densegeo.models.quantized import QuantizedLinear, has_fp8, quantized_linear

MULTIPLE = {torch.float8_e4m3fn: 16, torch.int8: 8}  # of a weight's sizes, for the libraries' products
FEWEST = {torch.float8_e4m3fn: 1, torch.int8: 17}  # rows (ATen/native/cuda/Blas.cpp, _int_mm_out_cuda)


class FusedLinear(nn.Module):
    """x (..., K), 8 bits already or floating -> (..., N) of the bias' type. It shares the linear's weight and bias.

    fast: fp8 products add in fewer bits than float32's (cuBLASLt's CUBLASLT_MATMUL_DESC_FAST_ACCUM).
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.fast = False
        self.weight, self.bias = linear.weight, linear.bias
        self.input_scale = float(linear.input_scale)  # a number: a recording reads none from the device
        self._plain = (linear.weight_scale, linear.input_scale)
        self._rows = linear.weight_scale.float()[None].contiguous()  # (1, N)
        self._product = linear.weight_scale.float() * linear.input_scale.float()  # (N,)
        self._bias = linear.bias.float()
        self._unit_scale = torch.ones((), device=linear.weight.device)
        self._inputs: dict[int, Tensor] = {}  # the input's scale for so many rows, (M, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return self._multiplied(self._operand(rows), None).unflatten(0, x.shape[:-1])

    def into(self, x: Tensor, out: Tensor) -> None:
        """The same into (..., N) contiguous memory."""
        self._multiplied(self._operand(x.flatten(0, -2)), out.flatten(0, -2))

    def _operand(self, rows: Tensor) -> Tensor:
        if rows.dtype == self.weight.dtype:
            return rows
        return quantize(rows[None], self.weight.dtype, 1 / self.input_scale)[0]

    def _multiplied(self, rows: Tensor, out: Tensor | None) -> Tensor:
        """rows (M, K) 8 bits -> (M, N), in `out` if there is one."""
        if not can_multiply(rows, self.weight):
            plain = quantized_linear(rows, self.weight, *self._plain, self.bias)
            return plain if out is None else out.copy_(plain)
        dtype, columns = self.bias.dtype, self.weight.t()
        if self.weight.dtype == torch.int8:
            return self._scaled(torch._int_mm(rows, columns), out)
        if dtype == torch.bfloat16:  # the only type that a product with a scale a row has everywhere
            result = torch.empty(len(rows), columns.shape[1], dtype=dtype, device=rows.device) if out is None else out
            scales = self._of_rows(len(rows)), self._rows
            return torch._scaled_mm(
                rows, columns, *scales, bias=self.bias, out_dtype=dtype, use_fast_accum=self.fast, out=result
            )
        unit_scale = self._unit_scale
        product = torch._scaled_mm(
            rows, columns, unit_scale, unit_scale, out_dtype=torch.float32, use_fast_accum=self.fast
        )
        return self._scaled(product, out)

    def _scaled(self, product: Tensor, out: Tensor | None) -> Tensor:
        """product (M, N) int32 or float32, scaled and biased in float32, in one pass."""
        result = torch.empty(product.shape, dtype=self.bias.dtype, device=product.device) if out is None else out
        return torch.addcmul(self._bias, product, self._product, out=result)

    def _of_rows(self, count: int) -> Tensor:
        if count not in self._inputs:
            self._inputs[count] = torch.full((count, 1), self.input_scale, device=self.weight.device)
        return self._inputs[count]


def can_multiply(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies these 8-bit operands on their device: rows (M, K), weight (N, K)."""
    if any(size % MULTIPLE[weight.dtype] for size in weight.shape) or len(rows) < FEWEST[weight.dtype]:
        return False
    return weight.dtype == torch.int8 or has_fp8(weight.device)


def fuse_linears(network: nn.Module) -> list[FusedLinear]:
    """Put fused linears in the place of quantized ones, and return them."""
    fused: dict[int, FusedLinear] = {}
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(module, name, fused.setdefault(id(child), FusedLinear(child)))
    return list(fused.values())


def multiply_into(linear: nn.Module, x: Tensor, out: Tensor) -> None:
    """x (B, T, K) through a linear into (B, T, N), whose pictures may lie apart; without a copy where there is one."""
    if len(x) > 1:
        out.copy_(linear(x))
    elif isinstance(linear, FusedLinear):
        linear.into(x, out)
    else:
        assert isinstance(linear, nn.Linear)
        torch.addmm(linear.bias, x[0], linear.weight.t(), out=out[0])
