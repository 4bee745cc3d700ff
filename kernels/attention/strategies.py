"""The ways to attend to keys that stand for several tokens: one table, and the measurement that picks a row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from densegeo.kernels.dispatch import implementation

Counts = tuple[int, ...]  # of the leading keys
FLASH_ARCHITECTURE = (8, 0)  # first compute capability of torch's flash kernel


@dataclass(frozen=True)
class Strategy:
    """run: (q, k, v, counts, out) -> (B, H, Tq, S), a view of `out` (B, Tq, H * S) if there is one. suits: when to
    take it.
    """

    run: Callable[[Tensor, Tensor, Tensor, Counts, Tensor | None], Tensor]
    suits: str


def bias(q: Tensor, k: Tensor, v: Tensor, counts: Counts, out: Tensor | None = None) -> Tensor:
    """ln(count) is added to the logits, in float32."""
    logarithms = logarithms_of(counts, q.device)
    if q.is_cuda:  # torch's CUDA kernels want a mask of q's dtype, and ln(count) in bf16 is off by up to 1 %
        from densegeo.kernels.attention.kernel import attention

        return attention(q, k, v, logarithms, out=out)
    mask = F.pad(logarithms, (0, k.shape[2] - len(counts))).to(torch.promote_types(q.dtype, torch.float32))
    return placed(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None, None]), out)


def merge(q: Tensor, k: Tensor, v: Tensor, counts: Counts, out: Tensor | None = None) -> Tensor:
    """Plain attention to every key once, then the count - 1 further copies of merged keys, by their log-sum-exps."""
    return _further_copies(q, k, v, counts, *_with_logsum(q, k, v), out)


def merge_cudnn(q: Tensor, k: Tensor, v: Tensor, counts: Counts, out: Tensor | None = None) -> Tensor:
    """The same over cuDNN's attention, the fastest plain one on Hopper. Raises RuntimeError where there is none."""
    if not q.is_cuda:
        return merge(q, k, v, counts, out)
    results = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    logsum = results[1].reshape(*q.shape[:2], -1)[..., : q.shape[2]]  # (B, H, Tq), or with a last axis of 1
    return _further_copies(q, k, v, counts, results[0], logsum, out)


def _further_copies(
    q: Tensor, k: Tensor, v: Tensor, counts: Counts, once: Tensor, logsum: Tensor, out: Tensor | None
) -> Tensor:
    """once: attention to every key once, and the logits' log-sum-exp, float32 (B, H, Tq)."""
    keys, logarithms = _further(counts, q.device)
    if q.is_cuda:
        from densegeo.kernels.attention.kernel import add_keys

        return add_keys(q, k, v, once, logsum, keys, logarithms, out)
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) * q.shape[-1] ** -0.5) @ k[:, :, keys].to(wide).mT + logarithms
    total = torch.logaddexp(logsum, logits.logsumexp(-1))[..., None]  # (B, H, Tq, 1)
    further = (logits - total).exp() @ v[:, :, keys].to(wide)
    return placed((once.to(wide) * (logsum[..., None] - total).exp() + further).to(q.dtype), out)


def expand(q: Tensor, k: Tensor, v: Tensor, counts: Counts, out: Tensor | None = None) -> Tensor:
    """Every key is repeated as often as it counts."""
    rows = _rows(counts, k.shape[2], q.device)
    return placed(F.scaled_dot_product_attention(q, k.index_select(2, rows), v.index_select(2, rows)), out)


def placed(result: Tensor, out: Tensor | None) -> Tensor:
    """A result (B, H, Tq, S), copied into (B, Tq, H * S) if there is such memory."""
    if out is None:
        return result
    view = out.unflatten(2, (result.shape[1], -1)).transpose(1, 2)
    return view.copy_(result)


STRATEGIES = {
    "merge": Strategy(merge, "few keys count more than once: the fast plain kernel does nearly all of the work"),
    "merge-cudnn": Strategy(merge_cudnn, "the same, where cuDNN's attention is faster than FlashAttention 2"),
    "bias": Strategy(bias, "many keys do, or the kernel takes a float32 bias, as on a CPU"),
    "expand": Strategy(expand, "the counts add up to few tokens, or the plain kernel is much faster than the others"),
}


def run(
    q: Tensor, k: Tensor, v: Tensor, counts: Sequence[int] | None, strategy: str, out: Tensor | None = None
) -> Tensor:
    """See `densegeo.kernels.attention.attention`."""
    merged = _checked(counts, k.shape[2])
    name = ("merge" if q.is_cuda else "bias") if strategy == "auto" else strategy
    if name not in STRATEGIES:
        raise ValueError(f"Unknown attention strategy {name!r}; choose from auto, {', '.join(STRATEGIES)}.")
    if not merged:
        return placed(F.scaled_dot_product_attention(q, k, v), out)
    return STRATEGIES[name].run(q, k, v, merged, out)


def choose(
    q: Tensor, k: Tensor, v: Tensor, counts: Sequence[int] | None, runs: int, strategies: Mapping[str, Strategy]
) -> str:
    """See `densegeo.kernels.attention.choose`."""
    merged = _checked(counts, k.shape[2])
    ways = {name: partial(strategy.run, q, k, v, merged, None) for name, strategy in strategies.items()}
    return fastest(ways, q.device, runs)


def fastest(ways: Mapping[str, Callable[[], object]], device: torch.device, runs: int) -> str:
    """See `densegeo.kernels.attention.fastest`."""
    return min(ways, key=lambda name: _seconds(ways[name], runs, device))


def run_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[float, float, float],
    dtype: torch.dtype,
    counts: Sequence[int] | None,
) -> Tensor:
    """See `densegeo.kernels.attention.attention_fp8`."""
    merged = _checked(counts, k.shape[2])
    return implementation(__package__, q).attention_fp8(q, k, v, scales, dtype, merged)


def _seconds(call: Callable[[], object], runs: int, device: torch.device) -> float:
    """Median of `runs` runs, after one that is not counted."""
    durations = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - started)
    return statistics.median(durations[1:])


def _checked(counts: Sequence[int] | None, keys: int) -> Counts:
    """Without trailing ones, so that nothing is left where nothing is merged."""
    merged = list(counts or ())
    if len(merged) > keys:
        raise ValueError(f"{len(merged)} counts for {keys} keys.")
    if any(count < 1 for count in merged):
        raise ValueError(f"A key stands for at least one token: {merged}.")
    while merged and merged[-1] == 1:
        merged.pop()
    return tuple(merged)


# Small constants on the device, made once: a copy from the host at every call would stall it.


@lru_cache(maxsize=64)
def logarithms_of(counts: Counts, device: torch.device) -> Tensor:
    """ln(count), float32 (counts,)."""
    return torch.tensor(counts, dtype=torch.float64).log().float().to(device)


@lru_cache(maxsize=64)
def _further(counts: Counts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the keys that count more than once: index, int32, and ln(count - 1), float32."""
    keys = [key for key, count in enumerate(counts) if count > 1]
    copies = torch.tensor([counts[key] - 1 for key in keys], dtype=torch.float64)
    return torch.tensor(keys, dtype=torch.int32, device=device), copies.log().float().to(device)


@lru_cache(maxsize=64)
def _rows(counts: Counts, keys: int, device: torch.device) -> Tensor:
    """Every key's index as often as it counts."""
    repeats = torch.tensor([*counts, *[1] * (keys - len(counts))])
    return torch.arange(keys).repeat_interleave(repeats).to(device)


def _with_logsum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Plain attention and the logits' log-sum-exp, float32 (B, H, Tq)."""
    aten = torch.ops.aten
    if not q.is_cuda:
        out, logsum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    elif q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= FLASH_ARCHITECTURE:
        out, logsum = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, logsum = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, logsum[..., : q.shape[2]]  # some kernels pad it
