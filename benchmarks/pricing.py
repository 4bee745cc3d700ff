"""One row a rewrite: what its stage costs when it alone is switched off, and when all up to it are applied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from densegeo.benchmarks.comparisons import EXACT, Wrong
from densegeo.benchmarks.timing import flops, interleaved, summary
from densegeo.models import fe2e, precision, reference, rewrites
from densegeo.models.fe2e import NAMES
from densegeo.models.rewrites import Pipeline

STAGES = {name: "decoder" if name in ("decoder", "upsample") else "transformer" for name in NAMES}


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
    fastest_decoder: list[str]  # the decoder's rewrites that pay on this machine


def _stored(module: nn.Module) -> tuple[int, int]:
    tensors = list(module.state_dict().values())
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def _variants(stage: str) -> dict[str, frozenset[str]]:
    """The sets of rewrites to measure, by a name."""
    names = [name for name in NAMES if STAGES[name] == stage]
    out = {"none": frozenset[str]()}
    for index, name in enumerate(names):
        out[f"up to {name}"] = frozenset(names[: index + 1])
        out[f"without {name}"] = frozenset(
            r.name for r in rewrites.select(fe2e.REWRITES, without=[name]) if STAGES[r.name] == stage
        )
    return out


def price(plain: Pipeline, latent: Tensor, low: str, runs: int, say: Callable[[str], None]) -> Prices:
    """Check every variant in float32, then time all variants of a stage side by side in precision `low`.

    `latent` is (1, C, H/8, W/8). Raises Wrong when a variant's numbers differ from those without any rewrite.
    """
    costs: dict[str, dict[str, Cost]] = {}
    other = precision.cast(copy.deepcopy(plain), low)  # stands in for the network a stage does not use
    for stage in ("transformer", "decoder"):
        variants = _variants(stage)
        distinct = list(dict.fromkeys(variants.values()))
        say(f"checking and timing {len(distinct)} variants of the {stage}")
        sizes: dict[frozenset[str], tuple[int, int, int, float]] = {}
        calls: dict[str, Callable[[], object]] = {}
        wanted: Tensor | None = None
        for names in distinct:
            pipeline = _copy(plain, stage)
            rewrites.apply(pipeline, [rewrite for rewrite in fe2e.REWRITES if rewrite.name in names])
            module = pipeline.denoiser if stage == "transformer" else pipeline.vae.decoder
            outputs: list[Tensor] = []
            run = _runner(pipeline, stage, latent)
            count = flops(lambda run=run, outputs=outputs: outputs.append(run()))  # type: ignore[misc]
            wanted = outputs[0] if wanted is None else wanted
            error = reference.relative(outputs[0], wanted)
            if not error <= EXACT:
                raise Wrong(
                    f"the {stage} with {sorted(names)} differs by {error:.1e} in float32, {EXACT:.0e} is allowed"
                )
            if stage == "decoder":
                pipeline.denoiser = other.denoiser
            else:
                pipeline.vae = other.vae
            precision.cast(pipeline, low)
            pipeline.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            sizes[names] = (*_stored(module), count, error)
            calls[str(sorted(names))] = _runner(pipeline, stage, latent)
        times = interleaved(calls, runs, warm_up=1)
        costs[stage] = {
            name: Cost(*sizes[names], summary(times[str(sorted(names))])) for name, names in variants.items()
        }
        if stage == "decoder":
            fastest = min(
                distinct, key=lambda names: costs["decoder"][_name(variants, names)].milliseconds["median_ms"]
            )
    rows = [
        Row(name, stage, costs[stage][f"without {name}"], costs[stage][f"up to {name}"])
        for name, stage in STAGES.items()
    ]
    last = {stage: [row for row in rows if row.stage == stage][-1].up_to_here for stage in costs}
    return Prices({stage: costs[stage]["none"] for stage in costs}, last, rows, sorted(fastest))


def _name(variants: dict[str, frozenset[str]], names: frozenset[str]) -> str:
    return next(name for name, others in variants.items() if others == names)


def _copy(plain: Pipeline, stage: str) -> Pipeline:
    """A copy of the stage's network; the other one is shared, as it is not touched."""
    if stage == "decoder":
        return Pipeline(plain.denoiser, copy.deepcopy(plain.vae), plain.prompt)
    return Pipeline(copy.deepcopy(plain.denoiser), plain.vae, plain.prompt)


def _runner(pipeline: Pipeline, stage: str, latent: Tensor) -> Callable[[], Tensor]:
    if stage == "transformer":
        return lambda: reference.transform(pipeline, latent)
    pair = torch.cat([latent, -latent])
    return lambda: reference.decode(pipeline, pair)


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
