"""One row a rewrite: what its stage costs when it alone is switched off, and when all up to it are applied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import Tensor, nn

from densegeo.benchmarks.comparisons import EXACT, Wrong
from densegeo.benchmarks.timing import flops, interleaved, summary
from densegeo.models import casting, chain, rewrites
from densegeo.models.rewrites import Pipeline, Rewrite


@dataclass(frozen=True)
class Cost:
    """What one stage needs with some of the rewrites."""

    parameters: int  # and folded constants
    bytes: int  # as stored in low precision
    flops: int
    error: float  # float32, relative L2 against no rewrite at all
    milliseconds: dict[str, float]  # in low precision, eager


@dataclass(frozen=True)
class Row:
    name: str
    stage: str
    alone_off: Cost  # all others on (those that require it are off too)
    up_to_here: Cost  # this and all earlier ones on


@dataclass(frozen=True)
class Prices:
    none: dict[str, Cost]  # by stage
    all: dict[str, Cost]
    rows: list[Row]
    fastest: dict[str, list[str]]  # by stage, the rewrites that pay on this machine


def _stored(module: nn.Module) -> tuple[int, int]:
    tensors = list(module.state_dict().values())
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def _variants(among: tuple[Rewrite, ...], stage: str) -> dict[str, frozenset[str]]:
    """The sets of a stage's rewrites to measure, by a name."""
    names = [rewrite.name for rewrite in among if rewrite.scope.stage == stage]
    out = {"none": frozenset[str]()}
    for index, name in enumerate(names):
        out[f"up to {name}"] = frozenset(names[: index + 1])
        out[f"without {name}"] = frozenset(
            rewrite.name for rewrite in rewrites.select(among, without=[name]) if rewrite.scope.stage == stage
        )
    return out


def price(
    plain: Pipeline, rgb: Tensor, among: tuple[Rewrite, ...], low: str, runs: int, say: Callable[[str], None]
) -> Prices:
    """Check every variant in float32, then time all variants of a stage side by side in precision `low`.

    rgb: (1, 3, H, W); among: the family's rewrites. Raises Wrong when a variant's numbers differ from those without any
    rewrite.
    """
    costs: dict[str, dict[str, Cost]] = {}
    fastest: dict[str, list[str]] = {}
    other = casting.cast(copy.deepcopy(plain), low)  # stands in for the network a stage does not use
    for stage in (name for name in plain.stages() if any(rewrite.scope.stage == name for rewrite in among)):
        variants = _variants(among, stage)
        distinct = list(dict.fromkeys(variants.values()))
        say(f"checking and timing {len(distinct)} variants of the {stage}")
        sizes: dict[frozenset[str], tuple[int, int, int, float]] = {}
        calls: dict[str, Callable[[], object]] = {}
        reference: Tensor | None = None
        stage_input = _input(plain, stage, rgb)
        for names in distinct:
            pipeline = _copy(plain, stage)
            rewrites.apply(pipeline, [rewrite for rewrite in among if rewrite.name in names])
            module = pipeline.stages()[stage]
            outputs: list[Tensor] = []
            run = _runner(pipeline, stage, stage_input)
            count = flops(lambda run=run, outputs=outputs: outputs.append(run()))  # type: ignore[misc]
            reference = outputs[0] if reference is None else reference
            mean = outputs[0].shape[1] != reference.shape[1]  # that of the channels, where a rewrite makes it
            error = chain.relative_error(outputs[0], reference.mean(1, keepdim=True) if mean else reference)
            if not error <= EXACT:
                raise Wrong(
                    f"the {stage} with {sorted(names)} differs by {error:.1e} in float32, {EXACT:.0e} is allowed"
                )
            if stage == "denoiser":
                pipeline.vae = other.vae
            else:
                pipeline.denoiser = other.denoiser
            casting.cast(pipeline, low)
            pipeline.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            sizes[names] = (*_stored(module), count, error)
            calls[str(sorted(names))] = _runner(pipeline, stage, stage_input)
        times = interleaved(calls, runs, warm_up=1)
        costs[stage] = {
            name: Cost(*sizes[names], summary(times[str(sorted(names))])) for name, names in variants.items()
        }
        medians = {names: costs[stage][name].milliseconds["median_ms"] for name, names in variants.items()}
        fastest[stage] = sorted(min(medians.items(), key=lambda item: item[1])[0])
    rows = []
    for rewrite in among:
        stage, name = rewrite.scope.stage, rewrite.name
        rows.append(Row(name, stage, costs[stage][f"without {name}"], costs[stage][f"up to {name}"]))
    last = {stage: [row for row in rows if row.stage == stage][-1].up_to_here for stage in costs}
    return Prices({stage: costs[stage]["none"] for stage in costs}, last, rows, fastest)


def _copy(plain: Pipeline, stage: str) -> Pipeline:
    """A copy of the stage's network; the other one is shared, as it is not touched."""
    if stage == "denoiser":
        return replace(plain, denoiser=copy.deepcopy(plain.denoiser))
    return replace(plain, vae=copy.deepcopy(plain.vae))


def _input(plain: Pipeline, stage: str, rgb: Tensor) -> Tensor:
    """What a stage takes; the decoder as many latents as the model has outputs."""
    if stage == "encoder":
        return rgb
    latent = chain.encode(plain, rgb)
    return torch.cat([latent, -latent][: len(plain.decode.outputs)]) if stage == "decoder" else latent


def _runner(pipeline: Pipeline, stage: str, stage_input: Tensor) -> Callable[[], Tensor]:
    run = {"encoder": chain.encode, "denoiser": chain.denoise, "decoder": chain.decode}[stage]
    return lambda: run(pipeline, stage_input)


def table(prices: Prices, low: str) -> Table:
    """Amounts per image; a saving is the stage's cost without the rewrite minus its cost with all."""
    out = Table(title=f"what each rewrite saves ({low}, eager)", show_edge=False)
    for column in ("rewrite", "stage"):
        out.add_column(column)
    for column in ("parameters M", "MB", "GFLOP", "ms", "saves ms", "up to here: M", "MB", "GFLOP", "ms"):
        out.add_column(column, justify="right")

    def cells(cost: Cost) -> list[str]:
        amounts = (cost.parameters / 1e6, cost.bytes / 1e6, cost.flops / 1e9, cost.milliseconds["median_ms"])
        return [f"{amount:,.1f}" for amount in amounts]

    for stage, cost in prices.none.items():
        out.add_row("(none on)", stage, "", "", "", "", "", *cells(cost))
    for row in prices.rows:
        saved = row.alone_off.milliseconds["median_ms"] - prices.all[row.stage].milliseconds["median_ms"]
        out.add_row(f"without {row.name}", row.stage, *cells(row.alone_off), f"{saved:,.1f}", *cells(row.up_to_here))
    for stage, cost in prices.all.items():
        out.add_row("(all on)", stage, *cells(cost), "", "", "", "", "")
    return out
