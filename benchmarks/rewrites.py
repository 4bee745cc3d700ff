"""What each exact rewrite saves, and how fast the result is against pipelines built from diffusers modules.

FE2E: a mid-size configuration with random weights: the Flux autoencoder at full width, a transformer of hidden size 768
with 4 + 8 blocks, and a connector scaled down like it (896 -> 1024; the published one, 3584 -> 4096, would outweigh
such a transformer and flatter its folding). `--model fiffdepth`: Stable Diffusion 2's shapes at 512x512, prices alone
(`fiffdepth.py speed` has the comparison). Numbers are checked before anything is timed: where they are wrong, no speed
is printed and the exit status is 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from densegeo.benchmarks import comparisons
from densegeo.benchmarks.comparisons import Comparison, Wrong
from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.pricing import Prices, price, table
from densegeo.benchmarks.setups import MID, SD2_UNET, SD2_VAE, SMALL_UNET, SMALL_VAE, SMOKE, Setup
from densegeo.benchmarks.synthetic import random_fiffdepth, random_image
from densegeo.benchmarks.timing import ceiling
from densegeo.errors import ConfigError
from densegeo.models import fe2e, fiffdepth
from densegeo.models.rewrites import Pipeline, Rewrite

LOW = "bf16"
SIDE, SMOKE_SIDE = 512, 64  # pixels of FiffDepth's image


@dataclass(frozen=True)
class Subject:
    """A model with random weights. make: (toy size?) -> float32 pipeline without rewrites, and rgb (1, 3, H, W).

    setup: where pipelines of diffusers' modules are made from it, for the comparisons.
    """

    rewrites: tuple[Rewrite, ...]
    make: Callable[[bool], tuple[Pipeline, Tensor]]
    setup: Callable[[bool], Setup] | None = None


def _setup(smoke: bool) -> Setup:
    return SMOKE if smoke else MID


def _fe2e(smoke: bool) -> tuple[Pipeline, Tensor]:
    return _setup(smoke).pipeline(), _setup(smoke).image()


def _fiffdepth(smoke: bool) -> tuple[Pipeline, Tensor]:
    side = SMOKE_SIDE if smoke else SIDE
    configs = (SMALL_UNET, SMALL_VAE) if smoke else (SD2_UNET, SD2_VAE)
    return random_fiffdepth(*configs, side), random_image(side, side, seed=2)


SUBJECTS = {
    "fe2e": Subject(fe2e.REWRITES, _fe2e, _setup),
    "fiffdepth": Subject(fiffdepth.REWRITES, _fiffdepth),
}


def _compiler(smoke: bool) -> comparisons.Compile:
    """torch.compile with weights frozen into the graph (prepacked); the toy run only traces."""
    if smoke:
        return lambda module: torch.compile(module, backend="eager")
    torch._inductor.config.freezing = True
    return torch.compile


def comparison_table(comparisons: list[Comparison], limits: dict[str, float]) -> Table:
    """Speed, and the fraction of the measured ceiling that our side reaches."""
    out = Table(title="against diffusers, side by side", show_edge=False)
    out.add_column("comparison")
    for column in ("baseline ms", "ours ms", "times faster", "rounds", "target", "GFLOP", "GFLOP/s", "of the ceiling"):
        out.add_column(column, justify="right")
    for row in comparisons:
        slow, fast = (row.times[name]["median_ms"] for name in ("baseline", "ours"))
        rate = row.flops["ours"] / fast * 1e3
        limit = limits["fp32" if "fp32" in row.name else LOW]
        out.add_row(
            row.name,
            f"{slow:,.0f}",
            f"{fast:,.0f}",
            f"{row.speedup['median']:.2f}",
            f"{row.speedup['round_min']:.2f}-{row.speedup['round_max']:.2f}",
            f"{row.target:g} {'reached' if row.reached else 'MISSED'}",
            f"{row.flops['baseline'] / 1e9:,.0f} -> {row.flops['ours'] / 1e9:,.0f}",
            f"{rate / 1e9:,.0f}",
            f"{rate / limit:.0%}",
        )
    return out


def measure(model: str, smoke: bool, runs: int, console: Console, *, whole_only: bool = False) -> dict[str, Any]:
    """Run everything. Raises Wrong when numbers are off, ConfigError for what there is not."""

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    if model not in SUBJECTS:
        raise ConfigError(f"there is no model {model!r} here; there are {', '.join(SUBJECTS)}")
    subject = SUBJECTS[model]
    if whole_only and subject.setup is None:
        raise ConfigError(f"{model} is compared with diffusers by `python benchmarks/{model}.py speed`")
    torch.manual_seed(0)
    where = environment(("torch", "diffusers", "numpy"))
    say("measuring what this machine can do")
    dtypes = {"fp32": torch.float32, LOW: torch.bfloat16}
    size = _setup(smoke).ceiling_size
    limits = {name: ceiling(dtype, size=size, runs=3) for name, dtype in dtypes.items()}
    for name, limit in limits.items():
        say(f"  {name}: {limit / 1e9:,.0f} GFLOP/s in a large linear or convolution")
    say("building the model")
    plain, rgb = subject.make(smoke)
    prices = None if whole_only else price(plain, rgb, subject.rewrites, LOW, runs, say)
    compared = _compare(subject, subject.setup(smoke), plain, rgb, prices, smoke, runs, say) if subject.setup else []
    # Again, since the machine may have been busier at first.
    limits = {name: max(limits[name], ceiling(dtypes[name], size=size, runs=3)) for name in limits}
    if prices:
        console.print(table(prices, LOW))
    if compared:
        console.print(comparison_table(compared, limits))
    for row in compared:
        errors = ", ".join(f"{name} {value:.2e}" for name, value in row.errors.items())
        console.print(f"{row.name}: {row.fast} against {row.slow}. Errors against float32: {errors}", soft_wrap=True)
    return {
        "benchmark": "rewrites",
        **where,
        "model": model,
        "threads": torch.get_num_threads(),
        "smoke": smoke,
        "runs": runs,
        "setup": {
            "denoiser": msgspec.to_builtins(plain.denoiser.config),
            "vae": msgspec.to_builtins(plain.vae.config),
            "size": [rgb.shape[3], rgb.shape[2]],
            "text_tokens": len(plain.prompt.mask),
            "valid_text_tokens": plain.prompt.valid,
        },
        "ceiling_gflops": {name: limit / 1e9 for name, limit in limits.items()},
        "rewrites": asdict(prices) if prices else None,
        "comparisons": [asdict(row) | {"reached": row.reached} for row in compared],
    }


def _compare(
    subject: Subject,
    setup: Setup,
    plain: Pipeline,
    rgb: Tensor,
    prices: Prices | None,
    smoke: bool,
    runs: int,
    say: Callable[[str], None],
) -> list[Comparison]:
    """Against pipelines of diffusers' modules; without prices, whole pipelines alone."""
    paying = prices.fastest["decoder"] if prices else ()  # none of the decoder's, as every priced run on a CPU found
    slower = [row.name for row in subject.rewrites if row.scope.stage == "decoder" and row.name not in paying]
    say(f"decoder rewrites that do not pay here, off in the {LOW} pipeline below: {', '.join(slower) or 'none'}")
    say("building the pipelines and the float32 answers")
    rivals = comparisons.contenders(plain, setup.vae, rgb, LOW, slower)
    compile_ = _compiler(smoke)
    rows: list[Comparison] = []
    if prices:
        say("comparing transformers")
        rows += comparisons.transformers(rivals, LOW, runs)
        say("comparing compiled transformers")
        rows.append(comparisons.hard(rivals, LOW, compile_, runs))
    say("comparing whole pipelines")
    rows.append(comparisons.whole(rivals, LOW, compile_, runs))
    return rows


def main(
    model: Annotated[str, typer.Option(help=f"whose rewrites: {', '.join(SUBJECTS)}")] = "fe2e",
    smoke: Annotated[bool, typer.Option("--smoke", help="a toy size: does it run at all?")] = False,
    runs: Annotated[int, typer.Option(min=1, help="timed rounds, after warm-up")] = 5,
    whole_only: Annotated[bool, typer.Option("--whole-only", help="only the comparison of whole pipelines")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the JSON line to this file")] = None,
) -> None:
    """Price every rewrite and compare with diffusers; the last line is JSON."""
    console = Console(width=160)
    try:
        result = measure(model, smoke, runs, console, whole_only=whole_only)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    except Wrong as error:
        console.print(f"No speed is reported, because the numbers are wrong: {error}", style="red", soft_wrap=True)
        raise typer.Exit(1) from error
    if json_file is not None:
        write_json(json_file, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
