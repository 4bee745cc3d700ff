"""Side-by-side timing on a shared CPU, operation counts, and what the machine can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def interleaved(calls: Mapping[str, Callable[[], object]], runs: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each call over `runs` rounds A B C A B C ..., so that a busy moment hits all alike.

    Compiling happens in the warm-up.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for turn in range(warm_up + runs):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if turn >= warm_up:
                    times[name].append(time.perf_counter() - start)
    return times


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, fastest and slowest."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
    }


def speedup(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How often `fast` fits into `slow`: of the medians, and the least and most of any one round."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {
        "median": statistics.median(slow) / statistics.median(fast),
        "of_fastest": min(slow) / min(fast),
        "round_min": min(ratios),
        "round_max": max(ratios),
    }


def _sdpa_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Q K^T and P V of shapes (batch, heads, tokens, size)."""
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[2] * (size + value[3])


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions in one call; a multiply-add is two."""
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return int(counter.get_total_flops())


def ceiling(dtype: torch.dtype, *, size: int, runs: int) -> float:
    """The most FLOP/s seen here in `dtype`: the best of linears and 3x3 convolutions of several shapes and layouts.

    size: 4096 for full-size operands; smaller ones scale every side down.
    """
    work: dict[str, int] = {}
    calls: dict[str, Callable[[], object]] = {}
    for rows, inputs, outputs in ((size, size, size), (size // 2, size // 4, size)):
        linear, x = nn.Linear(inputs, outputs).to(dtype), torch.randn(rows, inputs).to(dtype)
        work[f"linear {rows}"] = 2 * rows * inputs * outputs
        calls[f"linear {rows}"] = partial(linear, x)
    for channels, side in ((size // 8, size // 32), (size // 32, size // 8)):
        for layout in (torch.contiguous_format, torch.channels_last):
            conv = nn.Conv2d(channels, channels, 3, padding=1).to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
            image = torch.randn(1, channels, side, side).to(dtype).contiguous(memory_format=layout)
            work[f"conv {channels} {layout}"] = 2 * 9 * channels**2 * side**2
            calls[f"conv {channels} {layout}"] = partial(conv, image)
    times = interleaved(calls, runs)
    return max(work[name] / min(seconds) for name, seconds in times.items())
