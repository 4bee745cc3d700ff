"""Attention with a float32 bias on the leading keys, and further keys added to an attention that is done.

The first is FlashAttention-2's forward pass (Dao 2023): a program keeps a run of one head's queries and walks over
the keys with a running maximum and sum, in powers of two. The second is the merger of two partial softmaxes.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from densegeo.kernels.attention.strategies import Counts, logarithms_of
from densegeo.kernels.contract import Axis, Pointer
from densegeo.kernels.launch import kind_of, launch, require_small
from densegeo.kernels.quantize.reference import QMAX_OF
from densegeo.kernels.table import WARPS, Variant
from densegeo.precision import FLOATS, PRECISIONS

LOG2E = tl.constexpr(math.log2(math.e))
BLOCK_A = 32  # queries a program of `add_keys`
BYTES = {row.triton: row.bits // 8 for row in PRECISIONS.values() if row.attention or not row.quantized}
SCALED = {1: (QMAX_OF[torch.float8_e4m3fn], 32), 2: (1, 0), 4: (1, 0)}  # bytes of an element -> QMAX and SUMMED


@triton.jit
def attention_kernel(
    q,  # (batch, heads, queries, size)
    k,  # (batch, heads, keys, size), as v
    v,
    bias,  # (biased,) float32, of the leading keys' logits
    out,  # (batch, queries, heads, size), a token's features adjacent
    heads,  # of the grid alone
    queries,
    keys,
    biased,
    q_batch,  # strides
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_token,
    scale,  # of the logits, times log2(e)
    out_scale,
    SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,  # SIZE, rounded up to a power of two, at least 16, and 32 for fp8
    QMAX: tl.constexpr,  # what a weight of 1 is multiplied as; out_scale makes up for it
    SUMMED: tl.constexpr,  # keys after which partial sums are added in float32: Hopper's fp8 products lose bits; or 0
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = tl.program_id(1)
    picture = tl.program_id(2)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    feature = tl.arange(0, BLOCK_S)
    inside = feature < SIZE
    mask = (query < queries)[:, None] & inside[None, :]
    source = q + picture * q_batch + head * q_head
    rows = tl.load(source + query[:, None] * q_token + feature[None, :], mask=mask, other=0.0)
    key_source = k + picture * k_batch + head * k_head
    value_source = v + picture * v_batch + head * v_head

    peak = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_Q, BLOCK_S), dtype=tl.float32)
    for start in tl.range(0, keys, BLOCK_K, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_K)
        real = (key < keys)[:, None] & inside[None, :]
        columns = tl.load(key_source + key[:, None] * k_token + feature[None, :], mask=real, other=0.0)
        logits = tl.dot(rows, tl.trans(columns), input_precision="ieee") * scale
        logits += (tl.load(bias + key, mask=key < biased, other=0.0) * LOG2E)[None, :]
        logits = tl.where((key < keys)[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        shrink = tl.exp2(peak - higher)
        weight = tl.exp2(logits - higher[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        values = tl.load(value_source + key[:, None] * v_token + feature[None, :], mask=real, other=0.0)
        weight = (weight * QMAX).to(values.dtype)
        mixed = tl.dot(weight, values, mixed * shrink[:, None], input_precision="ieee", max_num_imprecise_acc=SUMMED)
        peak = higher

    mixed = mixed / total[:, None] * out_scale
    target = out + picture * out_batch + query[:, None] * out_token + head * SIZE + feature[None, :]
    tl.store(target, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_keys_kernel(
    q,  # (batch, heads, queries, size)
    k,  # (batch, heads, keys, size), as v
    v,
    out,  # (batch, heads, queries, size): attention to the keys so far
    logsum,  # (batch, heads, queries) float32, queries adjacent: its logits' log-sum-exp
    further,  # (further_count,) int32: keys to add
    bias,  # (further_count,) float32: what is added to their logits
    result,  # (batch, queries, heads, size), a token's features adjacent
    heads,  # of the grid alone
    queries,
    further_count,
    q_batch,  # strides
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    logsum_batch,
    logsum_head,
    result_batch,
    result_token,
    scale,  # of the logits
    SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,  # SIZE, rounded up to a power of two
    BLOCK_A: tl.constexpr,
):
    head = tl.program_id(1)
    picture = tl.program_id(2)
    query = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    feature = tl.arange(0, BLOCK_S)
    inside = feature < SIZE
    mask = (query < queries)[:, None] & inside[None, :]
    source = q + picture * q_batch + head * q_head
    rows = tl.load(source + query[:, None] * q_token + feature[None, :], mask=mask, other=0.0).to(tl.float32) * scale
    source = out + picture * out_batch + head * out_head
    mixed = tl.load(source + query[:, None] * out_token + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    peak = tl.load(logsum + picture * logsum_batch + head * logsum_head + query, mask=query < queries, other=0.0)
    total = tl.full((BLOCK_A,), 1.0, dtype=tl.float32)
    for index in range(further_count):
        key = tl.load(further + index)
        place = picture * k_batch + head * k_head + key * k_token
        column = tl.load(k + place + feature, mask=inside, other=0.0).to(tl.float32)
        logit = tl.sum(rows * column[None, :], axis=1) + tl.load(bias + index)
        higher = tl.maximum(peak, logit)
        shrink = tl.exp(peak - higher)
        weight = tl.exp(logit - higher)
        place = picture * v_batch + head * v_head + key * v_token
        value = tl.load(v + place + feature, mask=inside, other=0.0).to(tl.float32)
        mixed = mixed * shrink[:, None] + weight[:, None] * value[None, :]
        total = total * shrink + weight
        peak = higher

    mixed = mixed / total[:, None]
    target = result + picture * result_batch + query[:, None] * result_token + head * SIZE + feature[None, :]
    tl.store(target, mixed.to(result.dtype.element_ty), mask=mask)


class Arguments(NamedTuple):
    """Of `attention_kernel`."""

    q: Pointer
    k: Pointer
    v: Pointer
    bias: Pointer
    out: Pointer
    heads: int
    queries: int
    keys: int
    biased: int
    q_batch: int
    q_head: int
    q_token: int
    k_batch: int
    k_head: int
    k_token: int
    v_batch: int
    v_head: int
    v_token: int
    out_batch: int
    out_token: int
    scale: float
    out_scale: float


class AddArguments(NamedTuple):
    """Of `add_keys_kernel`."""

    q: Pointer
    k: Pointer
    v: Pointer
    out: Pointer
    logsum: Pointer
    further: Pointer
    bias: Pointer
    result: Pointer
    heads: int
    queries: int
    further_count: int
    q_batch: int
    q_head: int
    q_token: int
    k_batch: int
    k_head: int
    k_token: int
    v_batch: int
    v_head: int
    v_token: int
    out_batch: int
    out_head: int
    out_token: int
    logsum_batch: int
    logsum_head: int
    result_batch: int
    result_token: int
    scale: float


def blocks_of(element: int, size: int) -> dict[str, int | bool]:
    """Sizes of a program of `attention`, for bytes of an element and BLOCK_S features; so chosen that none spills."""
    queries, keys = (128, 64) if element <= 2 else (32, 32)
    if element == 1 and size == 64:  # 128 queries on 8 warps are as much to a thread, and spill on sm_120
        queries = 64
    return {"BLOCK_Q": queries, "BLOCK_K": keys, "STAGES": 2}  # STAGES: steps whose keys and values are in flight


@cache
def biased(kind: str, target: str, size: int) -> Variant:
    """Heads of `size` features; strides are multiples of 16. target: of the result."""
    element = BYTES[kind]
    qmax, summed = SCALED[element]
    padded = max(32 if element == 1 else 16, triton.next_power_of_2(size))
    blocks = blocks_of(element, padded)
    scalars = ("heads", "queries", "keys", "biased", "scale", "out_scale")
    return Variant(
        name=f"attention.bias{size}_{kind}" + (f"_{target}" if target != kind else ""),
        kernel=attention_kernel,
        arguments=Arguments,
        pointers={"q": kind, "k": kind, "v": kind, "bias": "fp32", "out": target},
        constants={"SIZE": size, "BLOCK_S": padded, "QMAX": qmax, "SUMMED": summed, **blocks},
        grid=(Axis("queries", int(blocks["BLOCK_Q"])), Axis("heads"), Axis("batch")),
        aligned=tuple(name for name in Arguments._fields if name not in scalars),
        warps=2 * WARPS if blocks["BLOCK_Q"] == 128 else WARPS,
        fp_fusion=True,
        since=(80, "no attention before sm_80, where its tiles spill"),
    )


@cache
def added(kind: str, size: int) -> Variant:
    """Heads of `size` features; strides are multiples of 16."""
    scalars = ("heads", "queries", "further_count", "logsum_batch", "logsum_head", "scale")
    return Variant(
        name=f"attention.add{size}_{kind}",
        kernel=add_keys_kernel,
        arguments=AddArguments,
        pointers={
            **dict.fromkeys(("q", "k", "v", "out", "result"), kind),
            **dict.fromkeys(("logsum", "bias"), "fp32"),
            "further": "i32",
        },
        constants={"SIZE": size, "BLOCK_S": triton.next_power_of_2(size), "BLOCK_A": BLOCK_A},
        grid=(Axis("queries", BLOCK_A), Axis("heads"), Axis("batch")),
        aligned=tuple(name for name in AddArguments._fields if name not in scalars),
        fp_fusion=True,
    )


VARIANTS = (
    *(row for kind in FLOATS for size in (32, 128) for row in (biased(kind, kind, size), added(kind, size))),
    *(biased("fp8e4nv", target, size) for target in ("bf16", "fp16") for size in (32, 64, 128)),
)  # heads of fe2e-tiny have 32 features, of FiffDepth 64, of fe2e 128


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`densegeo.kernels.attention.attention` with a bias (leading keys,), float32, on the logits.

    scales: what q, k and v are multiplied by. dtype: of the result, if not q's.
    """
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    _assert_layout(q, k, v)
    assert bias.dtype == torch.float32
    assert bias.is_contiguous()
    assert len(bias) <= keys
    out = _tokens_first(q, dtype, out)
    strides = *_strides(q), *_strides(k), *_strides(v), out.stride(0), out.stride(1)
    scale = math.log2(math.e) / math.sqrt(size) * scales[0] * scales[1]
    row = biased(kind_of(q.dtype), kind_of(out.dtype), size)
    out_scale = scales[2] / row.constants["QMAX"]
    launch(row, Arguments(q, k, v, bias, out, heads, queries, keys, len(bias), *strides, scale, out_scale), batch)
    return out.transpose(1, 2)


def attention_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scales: tuple[float, float, float],
    dtype: torch.dtype,
    counts: Counts,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `densegeo.kernels.attention.attention_fp8`."""
    return attention(q, k, v, logarithms_of(counts, q.device), scales, dtype, out)


def add_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsum: torch.Tensor,
    further: torch.Tensor,
    bias: torch.Tensor,
    result: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention `out` (B, H, Tq, S), with its log-sum-exp (B, H, Tq), and the keys `further` with a bias besides."""
    batch, heads, queries, size = q.shape
    _assert_layout(q, k, v, out)
    assert out.shape == q.shape
    assert logsum.shape == q.shape[:3]
    assert further.shape == bias.shape
    assert logsum.dtype == bias.dtype == torch.float32
    assert further.dtype == torch.int32
    assert logsum.stride(2) == further.stride(0) == bias.stride(0) == 1
    result = _tokens_first(q, None, result)
    tensors = q, k, v, out, logsum, further, bias, result
    strides = (
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(out),
        logsum.stride(0),
        logsum.stride(1),
        result.stride(0),
        result.stride(1),
    )
    row = added(kind_of(q.dtype), size)
    launch(row, AddArguments(*tensors, heads, queries, len(further), *strides, size**-0.5), batch)
    return result.transpose(1, 2)


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of pictures, heads and tokens."""
    return x.stride(0), x.stride(1), x.stride(2)


def _assert_layout(q: torch.Tensor, *others: torch.Tensor) -> None:
    for tensor in (q, *others):
        assert tensor.shape[:2] == q.shape[:2]
        assert tensor.shape[3] == q.shape[3]
        assert tensor.dtype == q.dtype
        assert tensor.stride(3) == 1
    assert others[0].shape == others[1].shape
    require_small(q, *others)


def _tokens_first(q: torch.Tensor, dtype: torch.dtype | None, out: torch.Tensor | None) -> torch.Tensor:
    """(B, Tq, H, S): joining the heads of a token then copies nothing. out: (B, Tq, H * S), features adjacent."""
    batch, heads, queries, size = q.shape
    if out is None:
        return torch.empty((batch, queries, heads, size), dtype=dtype or q.dtype, device=q.device)
    assert out.shape == (batch, queries, heads * size)
    assert out.dtype == (dtype or q.dtype)
    assert out.stride(2) == 1
    assert not any(stride % 16 for stride in out.stride()[:2])
    require_small(out)
    return out.unflatten(2, (heads, size))
