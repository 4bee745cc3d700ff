"""Bandwidth of the memory-bound kernels at the sizes of a 1024x768 image, against a copy on the same device."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densegeo.kernels.gelu_quantize import gelu_quantize
from densegeo.kernels.group_norm_silu import group_norm_silu
from densegeo.kernels.layer_norm import layer_norm
from densegeo.kernels.normals import normals
from densegeo.kernels.preprocess import preprocess
from densegeo.kernels.qk_norm_rope import qk_norm_rope
from densegeo.kernels.residual_layer_norm import residual_layer_norm
from densegeo.kernels.resize_depth import resize_depth
from densegeo.kernels.split import split

SETS_BYTES = 300e6  # inputs are taken in turn from sets of this size together, so that no cache holds them


@dataclass(frozen=True)
class Sizes:
    """A picture and the network around it."""

    width: int
    height: int
    hidden: int
    heads: int
    mlp: int
    channels: int  # of the decoder at full resolution

    @property
    def tokens(self) -> int:
        return 2 * (self.width // 16) * (self.height // 16)


FULL = Sizes(1024, 768, hidden=3072, heads=24, mlp=12288, channels=128)
SMALL = Sizes(64, 48, hidden=64, heads=2, mlp=128, channels=32)


@dataclass(frozen=True)
class Case:
    """make: device -> the kernel's input tensors; run: those tensors -> its outputs."""

    name: str
    make: Callable[[str], tuple[Tensor, ...]]
    run: Callable[..., Any]


def cases(sizes: Sizes, dtype: torch.dtype) -> tuple[Case, ...]:
    """One row a kernel. Bytes are counted from the tensors: inputs read once, outputs written once."""
    width, height, tokens, hidden = sizes.width, sizes.height, sizes.tokens, sizes.hidden
    box, size, head = (0, 0, width, height), (width, height), hidden // sizes.heads

    def noise(*shape: int, kind: torch.dtype = dtype) -> Callable[[str], Tensor]:
        return lambda device: torch.randn(shape, device=device).to(kind)

    def inputs(*makers: Callable[[str], Tensor]) -> Callable[[str], tuple[Tensor, ...]]:
        return lambda device: tuple(maker(device) for maker in makers)

    def picture(channels: int) -> Callable[[str], Tensor]:
        maker = noise(2, channels, height, width)
        return lambda device: maker(device).contiguous(memory_format=torch.channels_last)

    f32 = torch.float32
    vector, stream = noise(hidden, kind=f32), noise(1, tokens, hidden)
    decoded, table = noise(1, 3, height, width, kind=f32), noise(tokens, head // 2, kind=f32)
    frame = inputs(lambda device: torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, device=device))
    norm = (noise(sizes.channels, kind=f32), noise(sizes.channels, kind=f32))
    return (
        Case("split", inputs(noise(1, tokens, 64)), lambda x: split(x, height, width)),
        Case("resize_depth", inputs(decoded), lambda x: resize_depth(x, box, size)),
        Case("normals", inputs(decoded), lambda x: normals(x, box, size)),
        Case("preprocess", frame, lambda x: preprocess(x, size)),
        Case("layer_norm", inputs(stream, vector, vector), layer_norm),
        Case("residual_layer_norm", inputs(stream, stream, vector, vector), residual_layer_norm),
        Case(
            "qk_norm_rope",
            inputs(noise(1, tokens, 2 * hidden), noise(head, kind=f32), noise(head, kind=f32), table, table),
            lambda qk, query, key, cos, sin: qk_norm_rope(qk, query, key, cos, sin, sizes.heads),
        ),
        Case("gelu", inputs(noise(1, tokens, sizes.mlp)), gelu_quantize),
        Case("group_norm_silu", inputs(picture(sizes.channels), *norm), group_norm_silu),
        Case("copy", inputs(noise(1, tokens, sizes.mlp)), lambda x: x.clone()),
    )


def measure(case: Case, device: str, runs: int) -> dict[str, float]:
    """Microseconds of one run in a graph and when launched from Python, bytes and GB/s of the former.

    Medians of `runs` passes over all input sets.
    """
    first = case.make(device)
    size = sum(tensor.nbytes for tensor in first)
    count = max(1, min(64, round(SETS_BYTES / size))) if device != "cpu" else 1
    sets = [first, *(case.make(device) for _ in range(count - 1))]
    outputs = case.run(*first)
    written = sum(tensor.nbytes for tensor in _tensors(outputs))

    def once() -> None:
        for tensors in sets:
            case.run(*tensors)

    alone = median_seconds(once, device, runs) / count
    seconds = alone if device == "cpu" else median_seconds(_recorded(once), device, runs) / count
    moved_bytes = size + written
    return {
        "us": 1e6 * seconds,
        "us_launched": 1e6 * alone,
        "bytes": moved_bytes,
        "gb_per_s": moved_bytes / seconds / 1e9,
    }


def _recorded(work: Callable[[], object]) -> Callable[[], object]:
    """The same launches from a CUDA graph: without Python's and the launcher's time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def seconds_of(work: Callable[[], object], device: str, runs: int, warm_up: int = 2) -> list[float]:
    """Seconds of each of `runs` runs, timed by events on a GPU; a single run is not warmed up."""
    out = []
    warm_up = warm_up if runs > 1 else 0
    for turn in range(warm_up + runs):
        if device == "cpu":
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        if turn >= warm_up:
            out.append(seconds)
    return out


def median_seconds(work: Callable[[], object], device: str, runs: int) -> float:
    """The median of `seconds_of`."""
    return statistics.median(seconds_of(work, device, runs))


def _tensors(outputs: object) -> list[Tensor]:
    nested = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [tensor for tensor in itertools.chain(nested) if isinstance(tensor, Tensor)]


@torch.inference_mode()
def bandwidths(device: str, *, small: bool, runs: int) -> dict[str, Any]:
    """Every kernel's figures, with its share of the fastest copy seen."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = {case.name: measure(case, device, runs) for case in cases(SMALL if small else FULL, dtype)}
    ceiling = rows["copy"]["gb_per_s"]
    return {"copy_gb_per_s": ceiling, "kernels": {k: v | {"of_copy": v["gb_per_s"] / ceiling} for k, v in rows.items()}}
