"""int8 layers of the torch backend beside bf16 ones and their emulation: `python benchmarks/int8_layers.py`, on a CPU.

Convolutions as the autoencoder has them at 512x512, one of a U-Net, and FE2E's linears; interleaved, after two runs of
each. What enters and leaves is bf16, pixels with their channels adjacent; int8 includes rounding what enters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from densegeo.benchmarks.environment import environment, write_json
from densegeo.cli import guarded
from densegeo.errors import BackendError
from densegeo.models.quantized import FORMATS, QuantizedConvolution, QuantizedLayer, QuantizedLinear
from densegeo.runtime.backends.torch_int8 import Int8Convolution, Int8Linear, can_multiply
from densegeo.runtime.verify import relative_error

CONVOLUTIONS = ((32, 384), (128, 512), (256, 512), (256, 256), (512, 128), (512, 64), (320, 64))  # channels, side
LINEARS = ((1540, 3072, 9216), (1540, 12288, 3072), (4096, 320, 1280))  # rows, features in and out
RANGE = 4.0  # of what enters: normal numbers
KIND, DTYPE = FORMATS["int8"], torch.bfloat16
BOUND = 1e-2  # between int8 and its emulation: both round their result to bf16 once, 2**-9
Layer = Callable[[Tensor], Tensor]


def convolution(channels: int, side: int) -> tuple[str, Tensor, float, dict[str, Layer]]:
    """What it is, what enters, multiply-adds, and its forms."""
    plain = nn.Conv2d(channels, channels, 3, padding=1)
    eight = QuantizedConvolution.prepare(plain, RANGE, KIND, DTYPE)
    x = torch.randn(1, channels, side, side).to(DTYPE).contiguous(memory_format=torch.channels_last)
    forms = forms_of(plain.to(DTYPE, memory_format=torch.channels_last), eight, Int8Convolution)  # type: ignore[call-overload]
    return f"3x3, {channels} channels, {side}x{side}", x, 9.0 * channels * x.numel(), forms


def linear(rows: int, features: int, results: int) -> tuple[str, Tensor, float, dict[str, Layer]]:
    """The same of a linear."""
    plain = nn.Linear(features, results)
    eight = QuantizedLinear.prepare(plain, RANGE, KIND, DTYPE)
    x = torch.randn(1, rows, features).to(DTYPE)
    return (
        f"{rows} x {features} -> {results}",
        x,
        1.0 * x.numel() * results,
        forms_of(plain.to(DTYPE), eight, Int8Linear),
    )


def forms_of(plain: nn.Module, eight: QuantizedLayer, kind: Any) -> dict[str, Layer]:
    """The contenders. Raises BackendError where the processor has no int8 products that add up."""
    if not can_multiply(eight):
        raise BackendError("this processor adds products of int8 in 16 bits: torch emulates them here")
    return {"bf16": plain, "emulation": eight, "int8": kind(eight)}


def race(x: Tensor, forms: dict[str, Layer], rounds: int) -> dict[str, float]:
    """Median milliseconds of each. Raises BackendError where int8 is not what its emulation is."""
    ours, emulated = (forms[name](x).float().numpy() for name in ("int8", "emulation"))
    if (error := relative_error(ours, emulated)) > BOUND:
        raise BackendError(f"int8 is {error:.1e} off its emulation, more than {BOUND:.1e}: no times")
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 2):
        for name, form in forms.items():
            started = time.perf_counter()
            form(x)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


@torch.inference_mode()
def run(rounds: int, json_file: Path | None) -> None:
    machine, rows = environment(("torch",)), []
    table = Table("", "bf16 ms", "emulation ms", "int8 ms", "times bf16", "int8 TFLOP/s")
    layers = [lambda shape=shape: convolution(*shape) for shape in CONVOLUTIONS]
    layers += [lambda shape=shape: linear(*shape) for shape in LINEARS]
    for make in layers:
        title, x, multiply_adds, forms = make()
        times = race(x, forms, rounds)
        rows.append({"what": title, "milliseconds": times, "flops": 2 * multiply_adds})
        speed = 2 * multiply_adds / times["int8"] / 1e9
        table.add_row(
            title, *(f"{ms:.2f}" for ms in times.values()), f"{times['bf16'] / times['int8']:.2f}", f"{speed:.2f}"
        )
    Console(width=120).print(table)
    if json_file is not None:
        write_json(json_file, {**machine, "threads": torch.get_num_threads(), "rounds": rounds, "layers": rows})


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Time int8 layers of the torch backend on this CPU beside bf16 ones and their emulation."""
    guarded(lambda: run(rounds, json_file))


if __name__ == "__main__":
    typer.run(main)
