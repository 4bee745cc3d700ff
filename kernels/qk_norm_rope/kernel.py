"""`qk_norm_rope` in one pass: a program makes a run of one head's queries and keys."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import Axis, Pointer
from densegeo.kernels.launch import kind_of, launch, require_small
from densegeo.kernels.quantize.kernel import QMAX_OF_KIND, rounded
from densegeo.kernels.quantize.reference import QMAX_OF
from densegeo.kernels.table import Variant
from densegeo.precision import FLOATS

BLOCK_T = 16  # tokens a program
GRID = (Axis("tokens", BLOCK_T), Axis("heads"), Axis("batch"))


@triton.jit
def _normed_pairs(value, scale, feature, mask, size, eps, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """(BLOCK_T, BLOCK_S) -> first and second of each pair, normed and scaled."""
    gain = tl.load(scale + feature, mask=feature < size, other=0.0)
    mean = tl.sum(value * value, axis=1) / size
    normed = tl.where(mask, value / tl.sqrt(mean + eps)[:, None] * gain[None, :], 0.0)
    return tl.split(tl.reshape(normed, (BLOCK_T, BLOCK_S // 2, 2)))


@triton.jit
def qk_norm_rope_kernel(
    qkv,  # (batch, tokens, at least 2 * heads * size)
    query_scale,  # (size,) float32, as key_scale
    key_scale,
    cos,  # (tokens, size / 2) float32, contiguous, as sin
    sin,
    query,  # (batch, heads, tokens, size), a head's tokens adjacent, as key
    key,
    tokens,
    heads,
    size,
    batch_stride,
    token_stride,
    out_batch,  # strides of query and key
    out_head,
    eps,
    query_inverse_scale,  # not read without QMAX, as key_inverse_scale
    key_inverse_scale,
    QMAX: tl.constexpr,  # largest magnitude of a quantized result, 0 for others
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,  # size, rounded up to a power of two
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    picture = tl.program_id(2)
    feature = tl.arange(0, BLOCK_S)
    pair = tl.arange(0, BLOCK_S // 2)
    mask = (token < tokens)[:, None] & (feature < size)[None, :]
    turn = token[:, None] * (size // 2) + pair[None, :]
    turns = (token < tokens)[:, None] & (pair < size // 2)[None, :]
    c = tl.load(cos + turn, mask=turns, other=0.0)
    s = tl.load(sin + turn, mask=turns, other=0.0)
    source = qkv + picture * batch_stride + token[:, None] * token_stride + head * size + feature[None, :]
    target = picture * out_batch + head * out_head + token[:, None] * size + feature[None, :]

    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    x0, x1 = _normed_pairs(value, query_scale, feature, mask, size, eps, BLOCK_T, BLOCK_S)
    turned = tl.reshape(tl.join(c * x0 - s * x1, s * x0 + c * x1), (BLOCK_T, BLOCK_S))
    turned = rounded(turned, query_inverse_scale, QMAX)
    tl.store(query + target, turned.to(query.dtype.element_ty), mask=mask)

    value = tl.load(source + heads * size, mask=mask, other=0.0).to(tl.float32)
    x0, x1 = _normed_pairs(value, key_scale, feature, mask, size, eps, BLOCK_T, BLOCK_S)
    turned = tl.reshape(tl.join(c * x0 - s * x1, s * x0 + c * x1), (BLOCK_T, BLOCK_S))
    turned = rounded(turned, key_inverse_scale, QMAX)
    tl.store(key + target, turned.to(key.dtype.element_ty), mask=mask)


class Arguments(NamedTuple):
    """Of `qk_norm_rope_kernel`."""

    qkv: Pointer
    query_scale: Pointer
    key_scale: Pointer
    cos: Pointer
    sin: Pointer
    query: Pointer
    key: Pointer
    tokens: int
    heads: int
    size: int
    batch_stride: int
    token_stride: int
    out_batch: int
    out_head: int
    eps: float
    query_inverse_scale: float
    key_inverse_scale: float


@cache
def variant(kind: str, target: str, size: int) -> Variant:
    """target: of queries and keys. size: features of a head, rounded up to a power of two."""
    return Variant(
        name=f"qk_norm_rope.{kind}" + (f"_{target}" if target != kind else ""),
        kernel=qk_norm_rope_kernel,
        arguments=Arguments,
        pointers={
            "qkv": kind,
            **dict.fromkeys(("query_scale", "key_scale", "cos", "sin"), "fp32"),
            **dict.fromkeys(("query", "key"), target),
        },
        constants={"QMAX": QMAX_OF_KIND.get(target, 0), "BLOCK_T": BLOCK_T, "BLOCK_S": size},
        grid=GRID,
        aligned=("query", "key"),
    )


VARIANTS = (
    *(variant(kind, kind, 128) for kind in FLOATS),
    *(variant(kind, "fp8e4nv", 128) for kind in ("bf16", "fp16")),  # for fp8 attention
)


def qk_norm_rope(
    qkv: torch.Tensor,
    query_scale: torch.Tensor,
    key_scale: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float,
    dtype: torch.dtype | None = None,
    inverse_scales: tuple[float, float] = (1.0, 1.0),
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `densegeo.kernels.qk_norm_rope.qk_norm_rope`."""
    batch, tokens, features = qkv.shape
    size = len(query_scale)
    assert size % 2 == 0
    assert features >= 2 * heads * size
    assert qkv.stride(2) == 1
    assert cos.shape == sin.shape == (tokens, size // 2)
    for table in (query_scale, key_scale, cos, sin):
        assert table.dtype == torch.float32
        assert table.is_contiguous()
    assert dtype in QMAX_OF or inverse_scales == (1, 1)
    query, key = out or _results(qkv, (batch, heads, tokens, size), dtype)
    for result in (query, key):
        assert result.shape == (batch, heads, tokens, size)
        assert result.dtype == (dtype or qkv.dtype)
        assert result.stride() == (*query.stride()[:2], size, 1)
    require_small(qkv, query)
    tensors = qkv, query_scale, key_scale, cos, sin, query, key
    strides = qkv.stride(0), qkv.stride(1), query.stride(0), query.stride(1)
    row = variant(kind_of(qkv.dtype), kind_of(query.dtype), triton.next_power_of_2(size))
    launch(row, Arguments(*tensors, tokens, heads, size, *strides, eps, *inverse_scales), batch)
    return query, key


def _results(qkv: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    query = torch.empty(shape, dtype=dtype or qkv.dtype, device=qkv.device)
    return query, torch.empty_like(query)
