"""Which layers become 8-bit, and what that costs: sensitivity one by one, then the most that a budget allows.

Errors are those that a user sees: of the depth prediction, which is log-depth scaled to the image's own range (its root
mean square difference, so 0.01 is one percent of the range), and of the normals (mean angle in degrees).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from densegeo.calibration.histogram import Rounded, choose
from densegeo.calibration.statistics import Identity, Statistics
from densegeo.errors import QuantizationError
from densegeo.models import chain
from densegeo.models.casting import cast
from densegeo.models.denoiser import AnyDenoiser
from densegeo.models.layer_plans import LayerPlan, Plans, quantize_block
from densegeo.models.quantized import FORMATS, AttentionPlan, Format, quantize, with_weight_bits
from densegeo.models.rewrites import Pipeline, stage_of
from densegeo.outputs import Maps
from densegeo.precision import PRECISIONS
from densegeo.runtime.bundle import STAGES, amount_quantized
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
        return Error(*(None if mine is None or theirs is None else mine + theirs for mine, theirs in pairs))

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
        return max(
            (actual / allowed for actual, allowed in pairs if allowed is not None and actual is not None), default=0.0
        )


class Sensitivity(msgspec.Struct, frozen=True):
    """What quantizing one linear, attention or convolution alone does.

    work: multiply-adds of an image that become 8-bit. parameters: of a linear's weight.
    """

    layer: str
    work: int
    error: Error
    parameters: int = 0


class QuantizationPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The layers to quantize and the ranges of their inputs, by the names of `Pipeline.layers`. left: layers that stay
    as they are, and why.
    """

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
    convolutions: dict[str, float] = {}  # the range of each one's input
    weight_bits: int = 8  # 7: of int8, so that sums of products fit into 16 bits
    twice: list[str] = []  # of the convolutions: in two products, which together are nearly exact
    operations: dict[str, int] = {}  # of every convolution, planned or not: multiply-adds of an image

    @property
    def numbers(self) -> Format:
        """What linears and convolutions become."""
        return with_weight_bits(FORMATS[self.format], self.weight_bits)

    @property
    def empty(self) -> bool:
        """Whether no layer becomes 8-bit."""
        return not (self.ranges or self.attentions or self.convolutions)

    @property
    def convolution_share(self) -> float:
        """Of the convolutions' operations, those that become 8-bit."""
        return self.share_of(self.convolutions)

    def share_of(self, convolutions: Iterable[str]) -> float:
        """Of the convolutions' operations, those of these."""
        return sum(self.operations[name] for name in convolutions) / max(1, sum(self.operations.values()))

    def layers(self, statistics: Statistics) -> Plans:
        """By full name, as `models.quantized` takes them."""
        factors = {name: torch.from_numpy(array) for name, array in statistics.factors.items()}
        ranges = {**self.ranges, **self.convolutions}
        in_one = {name: LayerPlan(amax, factors.get(name)) for name, amax in ranges.items()} | self.attentions
        return {**in_one, **in_two_products(self.twice, statistics)}

    @property
    def amount(self) -> str:
        """What is planned, in words."""
        linears = self.parameters / self.linear_parameters
        return amount_quantized(linears, len(self.attentions), self.convolution_share, self.share_of(self.twice))

    def becomes(self, layer: str) -> str:
        """What a layer becomes, in words."""
        return f"{self.format} twice" if layer in self.twice else self.format if self.takes(layer) else "-"

    def takes(self, layer: str) -> bool:
        """Whether a layer is planned."""
        return layer in self.ranges or layer in self.attentions or layer in self.convolutions

    def keep(self, planned: Iterable[str], twice: Iterable[str] = ()) -> QuantizationPlan:
        """With these layers alone, and these convolutions in two products."""
        names = {*planned, *twice}
        excluded = sorted({*self.ranges, *self.attentions, *self.convolutions} - names)
        return msgspec.structs.replace(
            self,
            ranges={name: amax for name, amax in self.ranges.items() if name in names},
            attentions={name: limits for name, limits in self.attentions.items() if name in names},
            left=self.left | dict.fromkeys(excluded, "its error does not fit into the budget"),
            convolutions={name: amax for name, amax in self.convolutions.items() if name in names},
            parameters=sum(row.parameters for row in self.sensitivity if row.layer in names),
            twice=sorted(twice),
        )


def in_two_products(convolutions: Iterable[str], statistics: Statistics) -> dict[str, LayerPlan]:
    """Over the whole range seen: the rest of each rounding has a range of its own."""
    return {name: LayerPlan(float(statistics.channels[name].max()), twice=True) for name in convolutions}


def nothing_planned(plan: QuantizationPlan) -> str:
    """What to do with a plan in which no layer is 8-bit."""
    base = plan.base or "bf16"
    base_error = plan.base_error
    if base_error is not None and plan.budget.share(base_error) > 1:
        return f"{base} alone is off by {base_error.words}, beyond it: give a larger budget, or another --base."
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
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise QuantizationError(f"{path} is no plan of `densegeo calibrate`: {error}") from error


def input_ranges(
    statistics: Statistics, plannable: Collection[str], kind: str, method: str, allowed: Callable[[str], bool]
) -> tuple[dict[str, float], dict[str, str]]:
    """(input -> range, input -> why it gets none), of the plannable ones. allowed: whether one may become 8-bit.

    Raises QuantizationError when none gets a range.
    """
    dtype, qmax, _ = FORMATS[kind]

    def rounded(magnitudes: NDArray[np.float64], amax: float) -> NDArray[np.float64]:
        scale = torch.tensor(amax / qmax)
        restored: NDArray[np.float64] = (quantize(torch.from_numpy(magnitudes), scale, dtype).double() * scale).numpy()
        return restored

    ranges, excluded = {}, {}
    check: Rounded = rounded
    for name, histogram in sorted(statistics.histograms.items()):
        if name not in plannable:
            continue
        if not allowed(name):
            excluded[name] = "first, last and thin layers and shortcuts keep their precision"
            continue
        try:
            ranges[name] = choose(method, histogram, check)
        except QuantizationError as error:
            excluded[name] = str(error)
    if not ranges:
        raise QuantizationError("no layer has an input with a range: were all images the same?")
    return ranges, excluded


class Judge:
    """Errors of quantized variants of a float32 pipeline on some images.

    pipeline: rewritten, float32; left as it is. pictures: inputs (1, 3, H, W) of one size.
    """

    def __init__(
        self, pipeline: Pipeline, pictures: Sequence[Float32], kind: Format, layers: Plans, twice: Plans | None = None
    ) -> None:
        """layers: what each would become; twice: what convolutions would in two products."""
        self._pipeline, self._format, self._layers, self._twice = pipeline, kind, layers, twice or {}
        device = pipeline.denoiser.prompt_embeds.device
        self._pictures = [torch.from_numpy(rgb).to(device) for rgb in pictures]
        self._latents = [chain.encode(pipeline, rgb) for rgb in self._pictures]
        self._outputs = [chain.denoise(pipeline, latent) for latent in self._latents]
        self._reference_maps = [
            self._decoded(pipeline, *pair) for pair in zip(self._pictures, self._outputs, strict=True)
        ]

    def base_error(self, base: str) -> Error:
        """With all layers in a floating-point precision, autoencoder too, and none in 8 bits."""
        if PRECISIONS[base].exact:
            zero = self._compare(self._reference_maps[0], self._reference_maps[0])
            return Error(*(None if value is None else 0.0 for value in zero))
        low = cast(copy.deepcopy(self._pipeline), base)
        return self._error_of(low, STAGES)

    def error(self, names: Sequence[str], twice: Sequence[str] = ()) -> Error:
        """With these layers quantized; the others stay float32. The mean over the images. twice: convolutions in two
        products.
        """
        plans = {name: self._layers[name] for name in names} | {name: self._twice[name] for name in twice}
        variant = replace(self._pipeline, denoiser=self._denoiser(plans), vae=_sharing(self._pipeline.vae))
        for prefix, part in variant.parts():
            quantize_block(part, prefix, plans, self._format, torch.float32)
        return self._error_of(variant, {stage_of(name) for name in plans})

    def _denoiser(self, plans: Plans) -> AnyDenoiser:
        """A copy whose blocks have tensors of their own where a plan is, because smoothing writes to them."""
        original = self._pipeline.denoiser
        unshared = {
            id(tensor)
            for prefix, block in original.blocks()
            for tensor in (*block.parameters(), *block.buffers())
            if any(name.startswith(f"{prefix}.") for name in plans)
        }
        return _sharing(original, unshared)

    def _error_of(self, variant: Pipeline, changed_stages: Collection[str]) -> Error:
        """The mean over the images. changed_stages: those that differ; what is before them is known."""
        errors = []
        for rgb, latent, output, reference in zip(
            self._pictures, self._latents, self._outputs, self._reference_maps, strict=True
        ):
            if "encoder" in changed_stages:
                latent = chain.encode(variant, rgb)
            if "encoder" in changed_stages or "denoiser" in changed_stages:
                output = chain.denoise(variant, latent)
            errors.append(self._compare(self._decoded(variant, rgb, output), reference))
        return _mean(errors)

    def _decoded(self, pipeline: Pipeline, rgb: Tensor, output: Tensor) -> Maps[Tensor]:
        size = Size(rgb.shape[3] // 8 * 8, rgb.shape[2] // 8 * 8)
        decoded = chain.decode(pipeline, chain.split(pipeline.decode, output, size))
        return chain.assemble(pipeline.decode, decoded, size)

    def _compare(self, maps: Maps[Tensor], reference: Maps[Tensor]) -> tuple[float | None, float | None]:
        """Depth's and normals' error."""
        depth: float | None = None
        normals: float | None = None
        if maps.prediction is not None and reference.prediction is not None:
            depth = float((maps.prediction - reference.prediction).square().mean().sqrt())
        if maps.normals is not None and reference.normals is not None:
            cosine = (maps.normals * reference.normals).sum(-1).clamp(-1, 1)
            normals = float(cosine.acos().rad2deg().mean())
        return depth, normals


Network = TypeVar("Network", bound=nn.Module)


def _sharing(network: Network, unshared: Collection[int] = ()) -> Network:
    """A copy that shares all tensors but those whose `id` is in `unshared`."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors if id(tensor) not in unshared})


def _mean(errors: Sequence[tuple[float | None, float | None]]) -> Error:
    """Over images, of each kind that there is."""
    return Error(*(None if None in kind else float(np.mean([*map(float, kind)])) for kind in zip(*errors, strict=True)))


def within_budget(
    sensitivity: Sequence[Sensitivity], budget: Budget, measure: Callable[[Sequence[str]], Error]
) -> tuple[list[str], Error]:
    """As many layers as the budget allows, the least harmful for their work first; and their joint error.

    The joint error is measured, not summed up; the longest run of the order that keeps to the budget is found by
    bisection, on the ground that more quantized layers do more harm. Errors of layers that know nothing of each other
    add up in squares, so squares are what the order weighs.
    """
    order = sorted(sensitivity, key=lambda row: budget.share(row.error) ** 2 / row.work)
    low, high = 0, len(order)  # `low` keeps to the budget
    best = sensitivity[0].error if sensitivity else Error(0.0, 0.0)  # of no layer: of the same kinds, and zero
    best = Error(best.depth and 0.0, best.normals and 0.0)
    while low < high:
        middle = (low + high + 1) // 2
        joint_error = measure([row.layer for row in order[:middle]])
        if budget.share(joint_error) <= 1:
            low, best = middle, joint_error
        else:
            high = middle - 1
    return [row.layer for row in order[:low]], best
