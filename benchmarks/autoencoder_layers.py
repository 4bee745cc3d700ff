"""Where the autoencoder's time goes on a CPU in float32, layer by layer, and which form of it is the fastest.

`layers` times every convolution of encoder and decoder in the network, by the libraries' own counters, and the same
convolution alone, in the same library, layout and run. `forms` races decoders that compute the same in other ways, and
`pictures` one run on two latents against two on one; `threads` OpenVINO's settings. `count` runs nothing: operations
and bytes of each form at FE2E's size, and what a GPU's peaks make of them. Random weights at the published width.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from densegeo.backends import Norms
from densegeo.benchmarks.autoencoder_count import counted
from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.layer_times import (
    CONVOLUTION,
    KINDS,
    TIMERS,
    Convolution,
    OpenVinoTimer,
    OrtTimer,
    Timed,
    Timer,
    convolutions,
    graph_of,
)
from densegeo.benchmarks.setups import FULL, MID, SMOKE
from densegeo.benchmarks.synthetic import fill, random_image
from densegeo.benchmarks.timing import ceiling, speedup, summary
from densegeo.cli import guarded
from densegeo.errors import ConfigError, DensegeoError
from densegeo.models.vae import VAE, Decoder, Level, PhaseUpsample, transpose_upsampling
from densegeo.runtime.verify import relative_error

app = typer.Typer(help="Where the autoencoder's time goes, layer by layer.", add_completion=False)
LIBRARIES = ("torch", "onnx", "onnxruntime", "openvino")
EXACT = 1e-5  # relative L2, DESIGN section 10
# What a backend's bundles have: the decoder's upsampling
UPSAMPLING = {"onnxruntime": "phases", "openvino": "transposed", "torch": "transposed"}
Backend = Annotated[str, typer.Option(help=", ".join(TIMERS))]
Size = Annotated[int, typer.Option(help="Side of the picture, a multiple of 8.")]
Runs = Annotated[int, typer.Option(min=1, help="Rounds, after one to warm up.")]
Folder = Annotated[Path, typer.Option(help="Where graphs lie; those that are there are used again.")]
Json = Annotated[Path | None, typer.Option("--json", help="Put the result into this file, in place of an older one.")]
FOLDER = Path("out/autoencoder_layers")
CORES = os.cpu_count() or 1
# What OpenVINO is told; the first is what our backend tells it.
THREADS: dict[str, dict[str, Any]] = {
    "one stream": {},
    "one stream, held to processors": {"ENABLE_CPU_PINNING": True},
    "one stream, not held": {"ENABLE_CPU_PINNING": False},
    f"one stream, {CORES} threads": {"INFERENCE_NUM_THREADS": CORES},
    "one stream, one thread": {"INFERENCE_NUM_THREADS": 1},
}


def autoencoder(smoke: bool) -> VAE:
    with torch.device("meta"):
        vae = VAE((SMOKE if smoke else MID).vae)
    fill(vae, seed=1)
    return vae


def with_upsampling(decoder: Decoder, form: str) -> Decoder:
    """A copy that shares every other weight. form: plain (nearest, then 3x3), phases or transposed."""
    copied = copy.deepcopy(decoder, {id(tensor): tensor for tensor in decoder.state_dict(keep_vars=True).values()})
    for level in copied.up:
        assert isinstance(level, Level)
        if level.resample == "up" and form != "plain":
            level.upsample = PhaseUpsample(level.upsample)  # type: ignore[arg-type]
    if form == "transposed":
        transpose_upsampling(copied)
    return copied


def latents(size: int, channels: int, count: int = 1) -> Tensor:
    return torch.randn(count, channels, size // 8, size // 8, generator=torch.Generator().manual_seed(3))


def stages(vae: VAE, backend: str, size: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Encoder and decoder as a backend runs them, and what enters."""
    decoder = with_upsampling(vae.decoder, UPSAMPLING[backend])
    return {
        "encoder": (vae.encoder, random_image(size, size, seed=2)),
        "decoder": (decoder, latents(size, vae.config.z_channels)),
    }


def measured_layers(backend: str, size: int, runs: int, folder: Path, smoke: bool) -> dict[str, Any]:
    """One round is both networks and every convolution alone, so that a busy moment hits all alike."""
    vae, place = autoencoder(smoke), folder / f"{backend}-{size}{'-smoke' * smoke}"
    every: dict[str, list[Convolution]] = {}
    timers: dict[Any, Timer] = {}
    for stage, (network, example) in stages(vae, backend, size).items():
        every[stage] = convolutions(network, example.to("meta"))
        for convolution in every[stage]:
            name = f"alone-{stage}-{convolution.name}"
            if convolution.shape not in timers:
                picture = torch.randn(convolution.inputs, generator=torch.Generator().manual_seed(4))
                timers[convolution.shape] = TIMERS[backend](copy.deepcopy(convolution.module), picture, place / name)
        timers[stage] = TIMERS[backend](copy.deepcopy(network), example, place / stage)
    walls: dict[Any, list[float]] = {key: [] for key in timers}
    for _ in range(runs + 1):
        for key, timer in timers.items():
            walls[key].append(timer.run())
    layers = {key: timer.layers() for key, timer in timers.items()}
    alone = {key: _convolved(rows)[0] for key, rows in layers.items() if key not in every}
    return {
        "what": "layers",
        "backend": backend,
        "size": [size, size],
        "rounds": runs,
        "ceiling_gflops": ceiling(torch.float32, size=256 if smoke else 2048, runs=3) / 1e9,
        "stages": {
            stage: {
                **summary(walls[stage][1:]),
                "kinds_ms": {
                    kind: 1e3 * sum(statistics.median(row.seconds) for row in layers[stage] if row.kind == kind)
                    for kind in KINDS
                },
                "convolutions": [
                    _row(convolution, inside, alone[convolution.shape])
                    for convolution, inside in zip(every[stage], _convolved(layers[stage]), strict=True)
                ],
            }
            for stage in every
        },
    }


def _convolved(rows: list[Timed]) -> list[float]:
    """Seconds of every convolution, in the order in which they run."""
    seconds = {row.index: statistics.median(row.seconds) for row in rows if row.kind == CONVOLUTION}
    return [seconds[index] for index in range(len(seconds))]


def _row(convolution: Convolution, inside: float, alone: float) -> dict[str, Any]:
    return {
        "name": convolution.name,
        "inputs": convolution.inputs,
        "outputs": convolution.outputs,
        "kernel": convolution.kernel,
        "gflop": convolution.flops / 1e9,
        "ms": 1e3 * inside,
        "alone_ms": 1e3 * alone,
    }


def raced(calls: dict[str, Timer], exact: Callable[[], Any], runs: int) -> dict[str, dict[str, Any]]:
    """Whole runs, interleaved; wrong numbers get no time. The first call is what the others are compared with."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    reference, errors = exact(), dict[str, float]()
    for turn in range(runs + 1):
        for name, timer in calls.items():
            seconds = timer.run()
            if turn:
                times[name].append(seconds)
                continue
            errors[name] = relative_error(timer.output, reference)  # type: ignore[attr-defined]
            if not errors[name] <= EXACT:
                raise DensegeoError(f"{name} differs by {errors[name]:.1e}; the bound is {EXACT:.0e}")
    first = times[next(iter(times))]
    return {
        name: {**summary(seconds), "error": errors[name], "speedup": speedup(first, seconds)}
        for name, seconds in times.items()
    }


def decoders(backend: str, vae: VAE, example: Tensor, folder: Path) -> dict[str, Callable[[], Timer]]:
    """Name of a form -> what makes its timer on these latents (N, z, h, w)."""
    timers: dict[str, Callable[[], Timer]] = {}
    for form in ("plain", "phases", "transposed"):
        network = with_upsampling(vae.decoder, form)
        if backend == "torch":
            timers[form] = partial(TIMERS[backend], network, example, folder)
            continue
        kind: Any = OrtTimer if backend == "onnxruntime" else OpenVinoTimer
        for norms in get_args(Norms):
            name = form + ", norms by channel" * (norms == "channels")
            place = folder / "-".join([*name.replace(",", "").split(), *map(str, example.shape)])
            timers[name] = partial(_on_graph, kind, network, example, place, norms)
    return timers


def _on_graph(kind: Any, network: nn.Module, example: Tensor, place: Path, norms: Norms) -> Timer:
    timer: Timer = kind(graph_of(network, example, place, norms), example)
    return timer


class Twice:
    """Two runs of a timer on one latent each, which are halves of what is compared."""

    def __init__(self, timers: list[Timer]) -> None:
        self._timers = timers

    def run(self) -> float:
        seconds = sum(timer.run() for timer in self._timers)
        self.output = np.concatenate([timer.output for timer in self._timers])  # type: ignore[attr-defined]
        return seconds

    def layers(self) -> list[Timed]:
        raise NotImplementedError("whole runs alone are compared")


def own_form(backend: str) -> str:
    """The name in `decoders` of what a backend's bundles have."""
    return UPSAMPLING[backend] + ", norms by channel" * (backend == "openvino")


def _checked(backend: str, size: int) -> None:
    if backend not in TIMERS:
        raise ConfigError(f"there is no backend {backend!r} here; there are {', '.join(TIMERS)}")
    if size % 8 or size < 32:
        raise ConfigError(f"a picture of {size} pixels cannot be decoded: its side is a multiple of 8, at least 32")


def _finish(result: dict[str, Any], json_file: Path | None, *tables: Table) -> None:
    """Print, and put the result into its file in place of an older one of the same measurement."""
    for table in tables:
        Console(width=140).print(table)
    if json_file is None:
        return
    same = result["what"], result.get("backend")
    older = json.loads(json_file.read_text())["runs"] if json_file.is_file() else []
    others = [run for run in older if (run["what"], run.get("backend")) != same]
    runs = [*others, {**result, **environment(LIBRARIES)}]
    write_json(json_file, {"benchmark": "the autoencoder's layers", "runs": runs})


@app.command("layers")
def layers_command(
    backend: Backend = "onnxruntime",
    size: Size = 256,
    runs: Runs = 3,
    folder: Folder = FOLDER,
    smoke: Annotated[bool, typer.Option("--smoke", help="A toy: does it run at all?")] = False,
    json_file: Json = None,
) -> None:
    """Every convolution in the networks, and alone; what the rest takes."""

    def run() -> None:
        _checked(backend, size)
        result = measured_layers(backend, size, runs, folder, smoke)
        _finish(result, json_file, *(layer_table(result, stage) for stage in result["stages"]))

    guarded(run)


def layer_table(result: dict[str, Any], stage: str) -> Table:
    """One line a convolution, one a kind of the rest."""
    rows = result["stages"][stage]
    total = sum(rows["kinds_ms"].values())
    title = (
        f"{stage} on {result['backend']}, {rows['median_ms']:.0f} ms; ceiling {result['ceiling_gflops']:.0f} GFLOP/s"
    )
    table = Table("", "from", "to", "kernel", "GFLOP", "ms", "share", "GFLOP/s", "alone", title=title)
    for row in rows["convolutions"]:
        places = ("x".join(map(str, row[key])) for key in ("inputs", "outputs", "kernel"))
        speeds = (f"{1e3 * row['gflop'] / row[key]:.0f}" for key in ("ms", "alone_ms"))
        amounts = f"{row['gflop']:.2f}", f"{row['ms']:.1f}", f"{row['ms'] / total:.1%}"
        table.add_row(row["name"], *places, *amounts, *speeds)
    for kind, milliseconds in rows["kinds_ms"].items():
        table.add_row(kind, "", "", "", "", f"{milliseconds:.1f}", f"{milliseconds / total:.1%}", "", "", style="bold")
    return table


def race_table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table("", "median", "fastest", f"times as fast as {next(iter(rows))}", "rounds", "error", title=title)
    for name, row in rows.items():
        ratios = row["speedup"]
        spread = f"{ratios['round_min']:.2f} to {ratios['round_max']:.2f}"
        times = f"{row['median_ms']:.0f} ms", f"{row['min_ms']:.0f} ms", f"{ratios['median']:.2f}"
        table.add_row(name, *times, spread, f"{row['error']:.1e}")
    return table


def _race(benchmark: str, backend: str, size: int, runs: int, json_file: Path | None, calls: Any, exact: Any) -> None:
    rows = raced(calls, exact, runs)
    result = {"what": benchmark, "backend": backend, "size": [size, size], "rounds": runs, "rows": rows}
    _finish(result, json_file, race_table(f"decoder on {backend}, {size}x{size}", rows))


def _exact(vae: VAE, example: Tensor) -> Any:
    with torch.no_grad():
        return vae.decoder(example).numpy()


@app.command("forms")
def forms_command(
    backend: Backend = "onnxruntime",
    size: Size = 256,
    runs: Runs = 3,
    folder: Folder = FOLDER,
    smoke: Annotated[bool, typer.Option("--smoke", help="A toy: does it run at all?")] = False,
    json_file: Json = None,
) -> None:
    """Decoders that compute the same: nearest and 3x3, phases, transposed convolutions; norms in rows, by channel."""

    def run() -> None:
        _checked(backend, size)
        vae = autoencoder(smoke)
        example, place = latents(size, vae.config.z_channels), folder / f"forms{'-smoke' * smoke}"
        calls = {name: make() for name, make in decoders(backend, vae, example, place).items()}
        _race("forms", backend, size, runs, json_file, calls, partial(_exact, vae, example))

    guarded(run)


@app.command("pictures")
def pictures_command(
    backend: Backend = "onnxruntime",
    size: Size = 256,
    runs: Runs = 3,
    folder: Folder = FOLDER,
    smoke: Annotated[bool, typer.Option("--smoke", help="A toy: does it run at all?")] = False,
    json_file: Json = None,
) -> None:
    """Two latents one after the other, and as one batch (the rewrite `decoder`), each in the backend's own form."""

    def run() -> None:
        _checked(backend, size)
        vae, form = autoencoder(smoke), own_form(backend)
        place = folder / f"forms{'-smoke' * smoke}"
        pair = latents(size, vae.config.z_channels, 2)
        one, other, both = (decoders(backend, vae, part, place)[form]() for part in (*pair.split(1), pair))
        calls = {"one after the other": Twice([one, other]), "one batch": both}
        exact = partial(_exact, vae, pair)
        _race("pictures", backend, size, runs, json_file, calls, exact)

    guarded(run)


@app.command("threads")
def threads_command(
    size: Size = 256,
    runs: Runs = 3,
    folder: Folder = FOLDER,
    smoke: Annotated[bool, typer.Option("--smoke", help="A toy: does it run at all?")] = False,
    json_file: Json = None,
) -> None:
    """OpenVINO's decoder with all threads and with one, held to processors or not."""

    def run() -> None:
        _checked("openvino", size)
        vae = autoencoder(smoke)
        example = latents(size, vae.config.z_channels)
        network = with_upsampling(vae.decoder, UPSAMPLING["openvino"])
        path = graph_of(network, example, folder / f"threads-{size}{'-smoke' * smoke}", "channels")
        calls = {name: OpenVinoTimer(path, example, **options) for name, options in THREADS.items()}
        _race("threads", "openvino", size, runs, json_file, calls, partial(_exact, vae, example))

    guarded(run)


@app.command("count")
def count_command(json_file: Json = None) -> None:
    """Operations and bytes of FE2E's autoencoder at 1024x768 in bf16, form by form; nothing is run."""

    def run() -> None:
        result = {"what": "count", **counted(FULL.vae, *FULL.size)}
        _finish(result, json_file, count_table(result))

    guarded(run)


def count_table(result: dict[str, Any]) -> Table:
    title = f"bf16, {result['size'][0]}x{result['size'][1]}; floor: at {result['gpu']}'s peaks, layer by layer"
    table = Table("", "form", "TFLOP", "GB", "floor", title=title)
    for row in result["rows"]:
        table.add_row(row["part"], row["form"], f"{row['tflop']:.3f}", f"{row['gb']:.2f}", f"{row['floor_ms']:.2f} ms")
    return table


if __name__ == "__main__":
    app()
