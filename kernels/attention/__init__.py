"""Softmax attention in which some leading keys stand for several equal tokens (DESIGN 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from densegeo.kernels.attention.strategies import Strategy


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: Sequence[int] | None = None,
    strategy: str = "auto",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q (B, H, Tq, S), k, v (B, H, Tk, S) -> (B, H, Tq, S): softmax(q k^T / sqrt(S) + ln(count)) v, of q's dtype.

    counts: how many equal tokens each of the leading keys stands for; the keys after them, and all without it, stand
    for themselves. strategy: a name in `strategies.STRATEGIES`, or "auto", the one that is good on q's device when
    few keys have a count above 1; `choose` measures instead. Strides are free where a head's features are adjacent.
    out: (B, Tq, H * S), features adjacent, of which the result is then a view: for example the left part of a single
    block's [attention | MLP]. Our own kernels write there, and of others the result is copied.

    Raises ValueError for an unknown strategy, a count below 1, and more counts than keys.
    """
    from densegeo.kernels.attention.strategies import run

    return run(q, k, v, counts, strategy, out)


def attention_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scales: tuple[float, float, float],
    dtype: torch.dtype,
    counts: Sequence[int] | None = None,
) -> torch.Tensor:
    """`attention` of q, k and v divided by their scales and rounded to torch.float8_e4m3fn -> (B, H, Tq, S) of `dtype`.

    Each key's weight, at most 1 when a query's largest is 1, is rounded to fp8 too, times 448. Its kernel needs sm_89.
    Raises ValueError for a count below 1, and more counts than keys.
    """
    from densegeo.kernels.attention.strategies import run_fp8

    return run_fp8(q, k, v, scales, dtype, counts)


def choose(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: Sequence[int] | None = None,
    runs: int = 5,
    strategies: Mapping[str, Strategy] | None = None,
) -> str:
    """The name of the strategy that is fastest for these tensors on their device, by the median of `runs` runs.

    strategies: default all of `strategies.STRATEGIES`. Meant for loading: a run before those compiles and allocates.
    """
    from densegeo.kernels.attention import strategies as table

    return table.choose(q, k, v, counts, runs, table.STRATEGIES if strategies is None else strategies)


def fastest(ways: Mapping[str, Callable[[], object]], device: torch.device, runs: int = 5) -> str:
    """The name of the call that is fastest on a device, by the median of `runs` runs after one that is not counted."""
    from densegeo.kernels.attention import strategies as table

    return table.fastest(ways, device, runs)
