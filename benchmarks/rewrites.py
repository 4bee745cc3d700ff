"""What each exact rewrite saves, and how fast the result is against pipelines built from diffusers modules.

A mid-size configuration with random weights: the Flux autoencoder at full width, a transformer of hidden size 768 with
4 + 8 blocks, and a connector scaled down like it (896 -> 1024; the published one, 3584 -> 4096, would outweigh such a
transformer and flatter its folding). Numbers are checked before anything is timed: where they are wrong, no speed is
printed and the exit status is 1.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from densegeo.benchmarks import comparisons
from densegeo.benchmarks.comparisons import Comparison, Wrong
from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.pricing import STAGES, price, table
from densegeo.benchmarks.setups import MID, SMOKE
from densegeo.benchmarks.timing import ceiling
from densegeo.models import reference

LOW = "bf16"


def _compiler(smoke: bool) -> comparisons.Compile:
    """torch.compile with weights frozen into the graph (prepacked); the toy run only traces."""
    if smoke:
        return lambda module: torch.compile(module, backend="eager")
    torch._inductor.config.freezing = True
    return torch.compile


def comparison_table(found: list[Comparison], limits: dict[str, float]) -> Table:
    """Speed, and the fraction of the measured ceiling that our side reaches."""
    out = Table(title="against diffusers, side by side", show_edge=False)
    out.add_column("comparison")
    for column in ("baseline ms", "ours ms", "times faster", "rounds", "target", "GFLOP", "GFLOP/s", "of the ceiling"):
        out.add_column(column, justify="right")
    for row in found:
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


def measure(smoke: bool, runs: int, console: Console, *, whole_only: bool = False) -> dict[str, Any]:
    """Run everything. Raises Wrong when numbers are off."""

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    torch.manual_seed(0)
    setup = SMOKE if smoke else MID
    where = environment(("torch", "diffusers", "numpy"))
    say("measuring what this machine can do")
    dtypes = {"fp32": torch.float32, LOW: torch.bfloat16}
    limits = {name: ceiling(dtype, size=setup.ceiling_size, runs=3) for name, dtype in dtypes.items()}
    for name, limit in limits.items():
        say(f"  {name}: {limit / 1e9:,.0f} GFLOP/s in a large linear or convolution")
    say("building the model")
    plain, rgb = setup.pipeline(), setup.image()
    prices = None if whole_only else price(plain, reference.encode(plain, rgb), LOW, runs, say)
    paying = prices.fastest_decoder if prices else ()  # none of the decoder's, as every priced run on a CPU found
    slower = [name for name, stage in STAGES.items() if stage == "decoder" and name not in paying]
    say(f"decoder rewrites that do not pay here, off in the {LOW} pipeline below: {', '.join(slower) or 'none'}")
    say("building the pipelines and the float32 answers")
    rivals = comparisons.contenders(plain, setup.vae, rgb, LOW, slower)
    compile_ = _compiler(smoke)
    found: list[Comparison] = []
    if not whole_only:
        say("comparing transformers")
        found += comparisons.transformers(rivals, LOW, runs)
        say("comparing compiled transformers")
        found.append(comparisons.hard(rivals, LOW, compile_, runs))
    say("comparing whole pipelines")
    found.append(comparisons.whole(rivals, LOW, compile_, runs))
    # Again, since the machine may have been busier at first.
    limits = {name: max(limits[name], ceiling(dtypes[name], size=setup.ceiling_size, runs=3)) for name in limits}
    if prices:
        console.print(table(prices, LOW))
    console.print(comparison_table(found, limits))
    for row in found:
        errors = ", ".join(f"{name} {value:.2e}" for name, value in row.errors.items())
        console.print(f"{row.name}: {row.fast} against {row.slow}. Errors against float32: {errors}", soft_wrap=True)
    return {
        "benchmark": "rewrites",
        **where,
        "threads": torch.get_num_threads(),
        "smoke": smoke,
        "runs": runs,
        "setup": {
            "transformer": {name: getattr(setup.transformer, name) for name in setup.transformer.__struct_fields__},
            "vae": {name: getattr(setup.vae, name) for name in setup.vae.__struct_fields__},
            "size": [setup.width, setup.height],
            "text_tokens": setup.tokens,
            "valid_text_tokens": setup.valid,
        },
        "ceiling_gflops": {name: limit / 1e9 for name, limit in limits.items()},
        "rewrites": asdict(prices) if prices else None,
        "comparisons": [asdict(row) | {"reached": row.reached} for row in found],
    }


def main(
    smoke: Annotated[bool, typer.Option("--smoke", help="a toy size: does it run at all?")] = False,
    runs: Annotated[int, typer.Option(min=1, help="timed rounds, after warm-up")] = 5,
    whole_only: Annotated[bool, typer.Option("--whole-only", help="only the comparison of whole pipelines")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the JSON line to this file")] = None,
) -> None:
    """Price every rewrite and compare with diffusers; the last line is JSON."""
    console = Console(width=160)
    try:
        result = measure(smoke, runs, console, whole_only=whole_only)
    except Wrong as error:
        console.print(f"No speed is reported, because the numbers are wrong: {error}", style="red", soft_wrap=True)
        raise typer.Exit(1) from error
    if json_file is not None:
        write_json(json_file, result)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
