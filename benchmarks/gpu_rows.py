"""What each change of the hot path saves, on and off on one GPU: milliseconds of an image of FE2E, and of its floor.

A row times the work of one image that the change touches, as it was and as it is, at full size. Rows that are off by
more than their bound get no time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densegeo.benchmarks.gpu_kernels import median_seconds
from densegeo.kernels.attention import attention, attention_fp8
from densegeo.kernels.attention.strategies import STRATEGIES
from densegeo.kernels.group_norm_silu import group_norm_silu
from densegeo.kernels.interleave import interleave
from densegeo.kernels.qk_norm_rope import qk_norm_rope
from densegeo.models.layers import heads_first
from densegeo.models.quantized import FORMATS, QuantizedLinear
from densegeo.models.vae import PhaseUpsample
from densegeo.runtime.backends.torch_capture import settings
from densegeo.runtime.backends.torch_linear import FusedLinear
from densegeo.runtime.backends.torch_pictures import WIDE

FLOOR_MS = 75.0  # of FE2E in bf16 at 864x576 on an H100, of what the rewrites leave (DESIGN section 6)
ERROR_FACTOR = 2.0  # of the way before, both against a wider type (DESIGN section 10)


@dataclass(frozen=True)
class Sizes:
    """FE2E at one image size. text: tokens that merging leaves, the first of them a padding token."""

    width: int = 864
    height: int = 576
    hidden: int = 3072
    heads: int = 24
    text: int = 16
    padding: int = 625
    channels: tuple[int, ...] = (128, 256, 512, 512)  # of the autoencoder, by level
    doubles: int = 19
    singles: int = 38

    @property
    def image(self) -> int:
        return 2 * (self.width // 16) * (self.height // 16)

    @property
    def tokens(self) -> int:
        return self.text + self.image


FULL = Sizes()
SMALL = Sizes(64, 48, 64, 2, 4, 5, (32, 32, 64, 64), 1, 2)


class Row(NamedTuple):
    """A change. times: how often an image has this work. before, after: it; exact: of `after`'s result, wider."""

    name: str
    times: int
    before: Callable[[], Any]
    after: Callable[[], Any]
    exact: Callable[[], Tensor] | None = None


def rows(sizes: Sizes, device: str, dtype: torch.dtype) -> Iterator[Row]:
    """Every row, made when it is asked for: all together would not fit."""
    yield from _linears(sizes, device)
    yield from _attention(sizes, device, dtype)
    yield from _pictures(sizes, device, dtype)
    yield _joined(sizes, device, dtype)


def _linears(sizes: Sizes, device: str) -> Iterator[Row]:
    """The three kinds of change to 8-bit products, over an image's largest: into and out of the single blocks."""
    hidden = sizes.hidden
    for inside, outside in ((hidden, 7 * hidden), (5 * hidden, hidden)):
        x, plain = torch.randn(sizes.tokens, inside, device=device), nn.Linear(inside, outside, device=device)
        for kind in ("int8", "fp8"):
            linear = QuantizedLinear.prepare(plain, float(x.abs().max()), FORMATS[kind], torch.bfloat16)
            steps = x / linear.input_scale.float()
            eight = (steps.round() if kind == "int8" else steps).to(linear.weight.dtype)
            fused, fast = FusedLinear(linear), FusedLinear(linear)
            fast.fast, once = True, functools.partial(fused, eight)
            exact = functools.partial(F.linear, x, plain.weight, plain.bias)
            change = "weights in 8 bits" if kind == "int8" else "scales made once"
            name = f"{kind} {inside} to {outside}"
            yield Row(f"{name}: {change}", sizes.singles, functools.partial(linear, eight), once, exact)
            if kind == "fp8":
                yield Row(f"{name}: fast sums", sizes.singles, once, functools.partial(fast, eight), exact)


def _attention(sizes: Sizes, device: str, dtype: torch.dtype) -> Iterator[Row]:
    shape = (1, sizes.heads, sizes.tokens, sizes.hidden // sizes.heads)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    counts, blocks = [*[1] * (sizes.text - 1), sizes.padding], sizes.doubles + sizes.singles
    few = functools.partial(_few, q, k, v, counts)
    for name in STRATEGIES:
        if name != "merge":
            yield Row(
                f"merged padding: {name}",
                blocks,
                lambda: attention(q, k, v, counts, "merge"),
                lambda name=name: attention(q, k, v, counts, name)[:, :1, :64],  # type: ignore[misc]
                few,
            )
    if device != "cpu" and torch.cuda.get_device_capability(device) < (8, 9):
        return
    eight = [(x * 50).to(torch.float8_e4m3fn) for x in (q, k, v)]

    def fp8(fusion: bool) -> Tensor:
        with _fusion(device, fusion):
            return attention_fp8(eight[0], eight[1], eight[2], (0.02, 0.02, 0.02), dtype, counts)

    yield Row("fp8 attention: fused multiply-add", blocks, lambda: fp8(fusion=False), lambda: fp8(fusion=True))


def _few(q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
    """The first head's first queries, in float64."""
    bias = torch.tensor([*counts, *[1] * (k.shape[2] - len(counts))], device=q.device).double().log()
    return F.scaled_dot_product_attention(q[:, :1, :64].double(), k[:, :1].double(), v[:, :1].double(), bias[None])


@contextmanager
def _fusion(device: str, fusion: bool) -> Iterator[None]:
    """The attention kernel with or without fused multiply-add; references have neither."""
    if device == "cpu":
        yield
        return
    from densegeo.kernels.attention import kernel

    original = kernel.biased
    kernel.biased = lambda *arguments: replace(original(*arguments), fp_fusion=fusion)  # type: ignore[assignment]
    try:
        yield
    finally:
        kernel.biased = original


def _picture(channels: int, width: int, height: int, device: str, dtype: torch.dtype, count: int = 2) -> Tensor:
    picture = torch.randn(count, channels, height, width, device=device, dtype=dtype)
    return picture.contiguous(memory_format=torch.channels_last)


def _pictures(sizes: Sizes, device: str, dtype: torch.dtype) -> Iterator[Row]:
    """The autoencoder's decoder for two pictures."""
    width, height, channels = sizes.width, sizes.height, sizes.channels
    for level in (1, 2, 3):
        wide = channels[level]
        phases = _picture(4 * wide, (width >> level) + 1, (height >> level) + 1, device, dtype)
        yield Row(
            f"upsampling to level {level - 1}: one pass, channels last",
            1,
            functools.partial(_as_it_was, phases),
            functools.partial(interleave, phases),
        )
    pixels = (width // 8) * (height // 8)
    q, k, v = (torch.randn(2, 1, pixels, channels[-1], device=device, dtype=dtype) for _ in range(3))
    exact = functools.partial(F.scaled_dot_product_attention, q.float(), k.float(), v.float())
    yield Row(
        "wide attention: two products", 1, lambda: WIDE["library"](q, k, v), lambda: WIDE["products"](q, k, v), exact
    )
    x = _picture(channels[0], width, height, device, dtype)
    gain, offset = (torch.randn(channels[0], device=device) for _ in range(2))
    yield Row(
        "decoder's tail: read in 16 bits",
        1,
        lambda: group_norm_silu(x.float(), gain, offset),
        lambda: group_norm_silu(x, gain, offset, dtype=torch.float32),
    )
    if device != "cpu":
        yield Row(
            "group norms: statistics in 256 programs",
            2 * 6,
            lambda: _with_runs(128, x, gain, offset),
            lambda: _with_runs(256, x, gain, offset),
        )
    convolution = nn.Conv2d(channels[0], channels[0], 3, padding=1, device=device, dtype=dtype)
    convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def convolved(benchmark: bool) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False):
            result: Tensor = convolution(x)
            return result

    yield Row("cudnn.benchmark", 6, lambda: convolved(benchmark=False), lambda: convolved(benchmark=True))


def _as_it_was(phases: Tensor) -> Tensor:
    return PhaseUpsample.interleaved(phases).contiguous(memory_format=torch.channels_last)


def _with_runs(runs: int, x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    from densegeo.kernels.group_norm_silu import kernel

    before, kernel.RUNS = kernel.RUNS, runs
    try:
        return group_norm_silu(x, gain, offset)
    finally:
        kernel.RUNS = before


def _joined(sizes: Sizes, device: str, dtype: torch.dtype) -> Row:
    """Queries, keys and values of both streams of a double block."""
    hidden, heads, text, tokens = sizes.hidden, sizes.heads, sizes.text, sizes.tokens
    size = hidden // heads
    joint = torch.randn(1, tokens, 3 * hidden, device=device, dtype=dtype)
    parts = [(slice(0, text), joint[:, :text].clone()), (slice(text, None), joint[:, text:].clone())]
    gains = [torch.randn(size, device=device) for _ in range(2)]
    cos, sin = (torch.randn(tokens, size // 2, device=device) for _ in range(2))
    q, k = (torch.empty(1, heads, tokens, size, device=device, dtype=dtype) for _ in range(2))

    def before() -> Tensor:
        triples = []
        for places, rows_ in parts:
            two = qk_norm_rope(rows_, gains[0], gains[1], cos[places], sin[places], heads)
            triples.append((*two, heads_first(rows_[..., 2 * hidden :], heads)))
        return torch.cat([torch.cat(pair, dim=2) for pair in zip(*triples, strict=True)])

    def after() -> Tensor:
        for places, _ in parts:
            out = (q[:, :, places], k[:, :, places])
            qk_norm_rope(joint[:, places], gains[0], gains[1], cos[places], sin[places], heads, out=out)
        return q

    return Row("joint attention: no concatenation", sizes.doubles, before, after)


@torch.inference_mode()
def measure(device: str, *, small: bool, runs: int) -> dict[str, Any]:
    """Milliseconds of an image before and after, and what is saved as a share of the floor; by row."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    timings: dict[str, Any] = {}
    with settings():
        for row in rows(SMALL if small else FULL, device, dtype):
            try:
                timings[row.name] = _timed(row, device, runs)
            except RuntimeError as error:  # a library that has no such kernel here
                timings[row.name] = {"refused": str(error).partition("\n")[0][:200]}
    return timings


def _timed(row: Row, device: str, runs: int) -> dict[str, Any]:
    if row.exact is not None:
        exact = row.exact().double()
        ours, plain = row.after().double(), row.before().double()
        if plain.shape != exact.shape:  # of which a part is compared
            plain = plain[:, :1, :64]
        off, bound = ((result - exact).norm() / exact.norm() for result in (ours, plain))
        if not off <= max(ERROR_FACTOR * bound, 1e-5):
            return {"failed": f"off by {float(off):.1e}; {float(bound):.1e} before"}
    before, after = (1e3 * row.times * median_seconds(way, device, runs) for way in (row.before, row.after))
    return {"before_ms": before, "after_ms": after, "saved_of_floor": (before - after) / FLOOR_MS}


def table(timings: dict[str, Any], title: str = "an image of FE2E at 864x576", floor: float = FLOOR_MS) -> str:
    """The rows as text, the most saved first; those without a time last, with the reason. floor: ms."""
    timed = {name: row for name, row in timings.items() if "before_ms" in row}
    order = sorted(timed, key=lambda name: timed[name]["after_ms"] - timed[name]["before_ms"])
    width = max(map(len, (title, *timings)))
    lines = [f"{title:<{width}}  before ms  after ms  saved of the floor ({floor:.3g} ms)"]
    for name in order:
        row = timed[name]
        lines.append(f"{name:<{width}}  {row['before_ms']:9.2f} {row['after_ms']:9.2f}  {row['saved_of_floor']:+8.1%}")
    for name, row in timings.items():
        if name not in timed:
            lines.append(f"{name:<{width}}  {row.get('failed') or row.get('refused')}")
    return "\n".join(lines)
