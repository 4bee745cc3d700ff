"""Which layers become 8-bit, and what that costs: sensitivity one by one, then the most that a budget allows.

Errors are those that a user sees: of the depth prediction, which is log-depth scaled to the image's own range (its root
mean square difference, so 0.01 is one percent of the range), and of the normals (mean angle in degrees).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densegeo.calibration.histogram import Rounded, choose
from densegeo.calibration.statistics import Identity, Statistics
from densegeo.errors import QuantizationError
from densegeo.models import chain
from densegeo.models.precision import cast
from densegeo.models.quantized import FORMATS, AttentionPlan, LinearPlan, Plans, quantize, quantize_block
from densegeo.models.rewrites import Pipeline
from densegeo.outputs import Maps
from densegeo.precision import PRECISIONS
from densegeo.runtime.bundle import amount_quantized
from densegeo.size import Size

Float32 = NDArray[np.float32]


class Error(msgspec.Struct, frozen=True):
    """depth: root mean square difference of predictions; normals: mean angle in degrees; None of what there is not."""

    depth: float | None
    normals: float | None

    @property
    def words(self) -> str:
        """ "depth 0.00120, normals 0.310°"."""
        parts = [] if self.depth is None else [f"depth {self.depth:.5f}"]
        return ", ".join(parts + ([] if self.normals is None else [f"normals {self.normals:.3f}°"]))

    def __add__(self, other: Error) -> Error:
        """What both can do together at most: distances add up at most to their sum."""
        pairs = ((self.depth, other.depth), (self.normals, other.normals))
        return Error(*(None if one is None or two is None else one + two for one, two in pairs))

    @property
    def first(self) -> float:
        """Of the first kind that there is: what layers are ordered by."""
        return next((value for value in (self.depth, self.normals) if value is not None), 0.0)


class Budget(msgspec.Struct, frozen=True):
    """The largest error of each kind that is accepted; None for no limit."""

    depth: float | None = None
    normals: float | None = None

    def share(self, error: Error) -> float:
        """The larger share of the budget that an error takes; at most 1 if it fits."""
        pairs = ((error.depth, self.depth), (error.normals, self.normals))
        return max((found / limit for found, limit in pairs if limit is not None and found is not None), default=0.0)


class Sensitivity(msgspec.Struct, frozen=True):
    """What quantizing one linear or attention alone does.

    work: multiply-adds a token that become 8-bit; a linear's are its parameters.
    """

    layer: str
    work: int
    error: Error


class QuantizationPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The layers to quantize and the ranges of their inputs. left: layers that stay as they are, and why."""

    format: str
    method: str
    smooth: float
    identity: Identity
    ranges: dict[str, float]  # of linears
    attentions: dict[str, AttentionPlan]
    left: dict[str, str]
    budget: Budget
    error: Error | None  # at most, of the plan and its base together against float32; None when nothing was measured
    sensitivity: list[Sensitivity]
    parameters: int  # in the planned linears
    linear_parameters: int  # in all linears of the denoiser
    base: str = ""  # what the rest is built in
    base_error: Error | None = None  # of that alone

    @property
    def empty(self) -> bool:
        """Whether no layer becomes 8-bit."""
        return not self.ranges and not self.attentions

    def layers(self, statistics: Statistics) -> Plans:
        """By full name, as `models.quantized` takes them."""
        factors = {name: torch.from_numpy(array) for name, array in statistics.factors.items()}
        return {name: LinearPlan(limit, factors.get(name)) for name, limit in self.ranges.items()} | self.attentions

    @property
    def amount(self) -> str:
        """What is planned, in words."""
        return amount_quantized(self.parameters / self.linear_parameters, len(self.attentions))

    def takes(self, layer: str) -> bool:
        """Whether a layer is planned."""
        return layer in self.ranges or layer in self.attentions

    def keep(self, chosen: Iterable[str]) -> QuantizationPlan:
        """With these layers alone."""
        names = set(chosen)
        others = sorted({*self.ranges, *self.attentions} - names)
        return msgspec.structs.replace(
            self,
            ranges={name: limit for name, limit in self.ranges.items() if name in names},
            attentions={name: limits for name, limits in self.attentions.items() if name in names},
            left=self.left | dict.fromkeys(others, "its error does not fit into the budget"),
            parameters=sum(row.work for row in self.sensitivity if row.layer in names and row.layer in self.ranges),
        )


def nothing_planned(plan: QuantizationPlan) -> str:
    """What to do with a plan in which no layer is 8-bit."""
    base = plan.base or "bf16"
    own = plan.base_error
    if own is not None and plan.budget.share(own) > 1:
        return f"{base} alone is off by {own.words}, beyond it: give a larger budget, or another --base."
    return f"Build with --precision {base}, or give a larger budget."


def plan_file(folder: Path, kind: str) -> Path:
    """Where a format's plan lies."""
    return folder / f"plan-{kind}.json"


def load_plan(folder: Path, kind: str) -> QuantizationPlan:
    """Raises QuantizationError when there is none."""
    path = plan_file(folder, kind)
    try:
        return msgspec.json.decode(path.read_bytes(), type=QuantizationPlan)
    except FileNotFoundError:
        raise QuantizationError(
            f"{path} is not there: make it with `densegeo calibrate BUNDLE --images DIR --format {kind} "
            f"--output {folder}`"
        ) from None
    except (OSError, msgspec.MsgspecError) as error:
        raise QuantizationError(f"{path} is no plan of `densegeo calibrate`: {error}") from error


def input_ranges(
    statistics: Statistics, wanted: Collection[str], kind: str, method: str, allowed: Callable[[str], bool]
) -> tuple[dict[str, float], dict[str, str]]:
    """(input -> range, input -> why it gets none), of those that are wanted. allowed: whether one may become 8-bit.

    Raises QuantizationError when none gets a range.
    """
    dtype, largest = FORMATS[kind]

    def rounded(values: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
        scale = torch.tensor(limit / largest)
        given: NDArray[np.float64] = (quantize(torch.from_numpy(values), scale, dtype).double() * scale).numpy()
        return given

    ranges, left = {}, {}
    check: Rounded = rounded
    for name, histogram in sorted(statistics.histograms.items()):
        if name not in wanted:
            continue
        if not allowed(name):
            left[name] = "first, last and thin layers keep their precision"
            continue
        try:
            ranges[name] = choose(method, histogram, check)
        except QuantizationError as error:
            left[name] = str(error)
    if not ranges:
        raise QuantizationError("no linear has an input with a range: were all images the same?")
    return ranges, left


class Judge:
    """Errors of quantized variants of a float32 pipeline on some images.

    pipeline: rewritten, float32; left as it is. pictures: inputs (1, 3, H, W) of one size.
    """

    def __init__(self, pipeline: Pipeline, pictures: Sequence[Float32], kind: str, layers: Plans) -> None:
        self._pipeline, self._format, self._layers = pipeline, FORMATS[kind], layers
        self._device = pipeline.denoiser.prompt_embeds.device
        self._pictures = pictures
        self._latents = [chain.encode(pipeline, torch.from_numpy(rgb).to(self._device)) for rgb in pictures]
        self._wanted = [self._outputs(latent, pipeline) for latent in self._latents]

    def base_error(self, base: str) -> Error:
        """With all layers in a floating-point precision, autoencoder too, and none in 8 bits."""
        if PRECISIONS[base].exact:
            zero = self._compare(self._wanted[0], self._wanted[0])
            return Error(*(None if value is None else 0.0 for value in zero))
        low = cast(copy.deepcopy(self._pipeline), base)
        found = []
        for rgb, wanted in zip(self._pictures, self._wanted, strict=True):
            latent = chain.encode(low, torch.from_numpy(rgb).to(self._device))
            found.append(self._compare(self._outputs(latent, low), wanted))
        return _mean(found)

    def error(self, names: Sequence[str]) -> Error:
        """With these layers quantized; the others stay float32. The mean over the images."""
        plans = {name: self._layers[name] for name in names}
        original = self._pipeline.denoiser
        changed = {  # smoothing writes to a block's tensors
            id(part)
            for prefix, block in original.blocks()
            for part in (*block.parameters(), *block.buffers())
            if any(name.startswith(f"{prefix}.") for name in plans)
        }
        tensors = (*original.parameters(), *original.buffers())
        variant = copy.deepcopy(original, {id(part): part for part in tensors if id(part) not in changed})
        for prefix, block in variant.parts():
            quantize_block(block, prefix, plans, self._format, torch.float32)
        self._pipeline.denoiser = variant
        try:
            errors = [
                self._compare(self._outputs(latent, self._pipeline), wanted)
                for latent, wanted in zip(self._latents, self._wanted, strict=True)
            ]
        finally:
            self._pipeline.denoiser = original
        return _mean(errors)

    def _outputs(self, latent: Tensor, pipeline: Pipeline) -> Maps[Tensor]:
        size = Size(8 * latent.shape[3], 8 * latent.shape[2])
        output = chain.denoise(pipeline, latent)
        decoded = chain.decode(pipeline, chain.split(pipeline.decode, output, size))
        return chain.assemble(pipeline.decode, decoded, size)

    def _compare(self, found: Maps[Tensor], wanted: Maps[Tensor]) -> tuple[float | None, float | None]:
        """Depth's and normals' error."""
        depth: float | None = None
        normals: float | None = None
        if found.prediction is not None and wanted.prediction is not None:
            depth = float((found.prediction - wanted.prediction).square().mean().sqrt())
        if found.normals is not None and wanted.normals is not None:
            cosine = (found.normals * wanted.normals).sum(-1).clamp(-1, 1)
            normals = float(cosine.acos().rad2deg().mean())
        return depth, normals


def _mean(errors: Sequence[tuple[float | None, float | None]]) -> Error:
    """Over images, of each kind that there is."""
    return Error(
        *(None if None in values else float(np.mean([*map(float, values)])) for values in zip(*errors, strict=True))
    )


def within_budget(
    sensitivity: Sequence[Sensitivity], budget: Budget, measure: Callable[[Sequence[str]], Error]
) -> tuple[list[str], Error]:
    """As many layers as the budget allows, the least harmful for their work first; and their joint error.

    The joint error is measured, not summed up; the longest run of the order that keeps to the budget is found by
    bisection, on the ground that more quantized layers do more harm.
    """
    order = sorted(sensitivity, key=lambda row: budget.share(row.error) / row.work)
    low, high = 0, len(order)  # `low` keeps to the budget
    best = sensitivity[0].error if sensitivity else Error(0.0, 0.0)  # of no layer: of the same kinds, and zero
    best = Error(best.depth and 0.0, best.normals and 0.0)
    while low < high:
        middle = (low + high + 1) // 2
        found = measure([row.layer for row in order[:middle]])
        if budget.share(found) <= 1:
            low, best = middle, found
        else:
            high = middle - 1
    return [row.layer for row in order[:low]], best
