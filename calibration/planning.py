"""A plan of what becomes 8-bit: ranges, the error of each layer quantized alone, and what a budget allows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import track
from torch import nn

from densegeo.calibration.histogram import METHODS
from densegeo.calibration.layer_inputs import PARTS
from densegeo.calibration.plan import (
    Budget,
    Error,
    Judge,
    QuantizationPlan,
    Sensitivity,
    in_two_products,
    input_ranges,
    within_budget,
)
from densegeo.calibration.resume import SensitivityFile
from densegeo.calibration.statistics import Statistics
from densegeo.calibration.work import multiply_adds
from densegeo.errors import ConfigError
from densegeo.models.layers import Attention
from densegeo.models.quantized import AttentionPlan, convolution_fits
from densegeo.models.rewrites import Pipeline
from densegeo.precision import CALIBRATED, PRECISIONS
from densegeo.runtime.bundle import Manifest
from densegeo.size import Size

JUDGED = 4  # images on which each layer's error alone is measured
JUDGED_TOGETHER = 16  # and that of all together, of which four views of fe2e-tiny told half (benchmarks/LOG.md)
WITH_ATTENTION = " and ".join(row.name for row in PRECISIONS.values() if row.attention)
EVENLY_SPACED = " and ".join(row.name for row in PRECISIONS.values() if row.calibrated and row.integer)


class PlanOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan is to hold, as `densegeo calibrate`'s options say.

    format: fp8 or int8. method: how ranges are chosen. base: what the rest will be built in. attention, convolutions:
    whether those are planned too. twice: convolutions beyond the budget in two products. weight_bits: 8, or 7 of int8.
    everything: and first, last and thin layers.
    """

    format: str
    method: str
    budget: Budget
    base: str
    attention: bool = False
    convolutions: bool = False
    twice: bool = False
    weight_bits: int = 8
    everything: bool = False

    def validated(self) -> PlanOptions:
        """Itself. Raises ConfigError for what no plan can hold."""
        kind = self.format
        if kind not in CALIBRATED:
            raise ConfigError(f"there is no format {kind!r}; there are {', '.join(CALIBRATED)}")
        if self.method not in METHODS:
            raise ConfigError(f"there is no method {self.method!r}; there are {', '.join(METHODS)}")
        if self.attention and not PRECISIONS[kind].attention:
            raise ConfigError(
                f"--attention is for {WITH_ATTENTION}: {kind} would round most of attention's probabilities to zero"
            )
        if self.weight_bits != PRECISIONS[kind].bits and not PRECISIONS[kind].integer:
            raise ConfigError(f"--weight-bits is for int8: {kind} has one number of bits")
        if self.base not in PRECISIONS[kind].bases:
            raise ConfigError(f"--base {self.base} is none of {', '.join(PRECISIONS[kind].bases)}")
        if any(allowance is not None and not allowance > 0 for allowance in (self.budget.depth, self.budget.normals)):
            raise ConfigError("--max-depth-error and --max-normal-error must be above 0")
        if self.twice:
            self._require_two_products()
        return self

    def _require_two_products(self) -> None:
        """Raises ConfigError where no convolution can be in two products."""
        if not PRECISIONS[self.format].integer:
            raise ConfigError(
                f"--twice is for {EVENLY_SPACED}: the steps of {self.format} are of many sizes, so its rests too"
            )
        if not self.convolutions or self.budget == Budget():
            raise ConfigError(
                "--twice is for --convolutions within a budget: give --max-depth-error or --max-normal-error too"
            )


def make_plan(pipeline: Pipeline, manifest: Manifest, statistics: Statistics, options: PlanOptions) -> QuantizationPlan:
    """Every layer that may become 8-bit, with its range. pipeline: float32, set to the first bucket's size."""
    size = manifest.buckets[0].size
    pipeline.denoiser.resize(size)
    linears = pipeline.layers(nn.Linear)
    convolutions = pipeline.layers(nn.Conv2d) if options.convolutions else {}
    attentions = [*pipeline.layers(Attention)] if options.attention else []
    plannable = {*linears, *convolutions, *(f"{name}.{part}" for name in attentions for part in PARTS)}

    def fits(name: str) -> bool:
        if name in convolutions:
            return options.everything or convolution_fits(name, convolutions[name])
        return options.everything or pipeline.denoiser.quantizable(name)

    ranges, excluded = input_ranges(statistics, plannable, options.format, options.method, fits)
    work = multiply_adds(pipeline, size)
    return QuantizationPlan(
        format=options.format,
        method=options.method,
        smooth=statistics.smooth,
        identity=statistics.identity,
        ranges={name: amax for name, amax in ranges.items() if name in linears},
        attentions={
            name: AttentionPlan(*(ranges[f"{name}.{part}"] for part in PARTS))
            for name in attentions
            if ranges.keys() >= {f"{name}.{part}" for part in PARTS}
        },
        left=excluded,
        budget=options.budget,
        error=None,
        sensitivity=[],
        parameters=sum(linears[name].weight.numel() for name in ranges if name in linears),
        linear_parameters=sum(layer.weight.numel() for layer in linears.values()),
        base=options.base,
        convolutions={name: amax for name, amax in ranges.items() if name in convolutions},
        weight_bits=options.weight_bits,
        operations={name: work[name] for name in convolutions},
    )


def judged(
    plan: QuantizationPlan,
    pipeline: Pipeline,
    statistics: Statistics,
    pictures: list[Any],
    options: PlanOptions,
    sensitivity_file: Path,
    console: Console,
) -> QuantizationPlan:
    """A plan with the error of each of its layers alone, and of it what the budget allows.

    pictures: inputs (1, 3, H, W) of the first bucket, to measure errors on. sensitivity_file: keeps errors as they are
    measured, for a run that goes on.
    """
    few, layers = pictures[:JUDGED], plan.layers(statistics)
    work, linears = multiply_adds(pipeline, Size(*pictures[0].shape[:1:-1])), pipeline.layers(nn.Linear)
    names = [*plan.ranges, *plan.attentions, *plan.convolutions]
    sizes = {name: linears[name].weight.numel() for name in plan.ranges}
    alone, measured = Judge(pipeline, few, plan.numbers, layers), SensitivityFile(sensitivity_file, plan, few)
    sensitivity = [
        measured.rows.get(name) or measured.keep(Sensitivity(name, work[name], alone.error([name]), sizes.get(name, 0)))
        for name in track(names, description="one layer at a time", console=console)
    ]
    doubled = in_two_products(plan.convolutions, statistics) if options.twice else {}
    together = Judge(pipeline, pictures, plan.numbers, layers, doubled)
    base_error = together.base_error(options.base)
    error = together.error(names) + base_error
    plan = msgspec.structs.replace(plan, sensitivity=sensitivity, error=error, base_error=base_error)
    return plan if options.budget.share(error) <= 1 else _fit_to_budget(plan, together, doubled, base_error)


def _fit_to_budget(
    plan: QuantizationPlan, judge: Judge, doubled: Collection[str], base_error: Error
) -> QuantizationPlan:
    """What of a plan its budget allows.

    doubled: the convolutions that are in two products where they do not fit. base_error: the base's own error.
    """

    def in_two(names: Sequence[str]) -> list[str]:
        return [name for name in doubled if name not in names]

    def joint(names: Sequence[str]) -> Error:
        return judge.error(names, in_two(names)) + base_error

    planned, error = within_budget(plan.sensitivity, plan.budget, joint)
    if not planned:
        error = joint([]) if doubled else base_error
    fits = plan.budget.share(error) <= 1
    return msgspec.structs.replace(
        plan.keep(planned, in_two(planned) if fits else ()), error=error if fits else base_error
    )
