"""Verification of a build: float32 references from PyTorch, and the exported graphs measured against them.

Bounds are fixed beforehand (DESIGN section 10): float32 graphs within 1e-5; low-precision graphs within twice the error
of plain eager low precision, rewrites off. Errors are relative L2 norms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from densegeo.errors import ExportError
from densegeo.export.blockwise import run_blockwise
from densegeo.models import chain
from densegeo.models.casting import cast
from densegeo.models.rewrites import Pipeline
from densegeo.outputs import Decode
from densegeo.precision import PRECISIONS
from densegeo.runtime.bundle import STAGES, Bucket, Check, Graph, Stage
from densegeo.runtime.host_chain import Chain, assemble_whole
from densegeo.runtime.images import Frame
from densegeo.runtime.resample import nearest, place, prepare
from densegeo.runtime.verify import IMAGE, relative_error, within
from densegeo.size import Size

FLOAT32_BOUND = 1e-5
LOW_PRECISION_FACTOR = 2.0
INPUTS_FILE = "verification.safetensors"
LARGER, OTHER = (1.125, 1.25, 1.5), (0.875, 0.75, 0.5, 1.25, 1.5)  # scales of pictures
Float = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Outputs = dict[str, NDArray[Any]]  # by the names of `bundle.Verification.inputs`


def picture_sizes(sizes: Sequence[Size]) -> dict[Size, list[Size]]:
    """Of each size the odd sizes of the two pictures with which it is verified; each is served by it.

    One is larger than the bucket. The other is smaller, where a smaller one is served by it: a portrait for the size
    that serves portraits best.
    """
    sizes_of = {size: [_served_by(sizes, size, LARGER)] for size in sizes}
    short, long = min(sizes[0]), max(sizes[0])
    portrait = Size(short * 5 // 8 | 1, long * 7 // 8 | 1)
    sizes_of[nearest(sizes, portrait)].append(portrait)
    for size, pictures in sizes_of.items():
        if len(pictures) == 1:
            pictures.append(_served_by(sizes, size, OTHER))
    return sizes_of


def _served_by(sizes: Sequence[Size], size: Size, scales: Sequence[float]) -> Size:
    """An odd size by the first scale with which `size` is the nearest of all; its own where none is."""
    for scale in scales:
        picture = Size(int(size.width * scale) | 1, int(size.height * scale) | 1)
        if nearest(sizes, picture) == size:
            return picture
    return size


def seeded_picture(size: Size, seed: int = 0) -> Pixels:
    """A seeded picture, uint8 (H, W, 3)."""
    rgb = seeded_rgb(size, seed)[0].transpose(1, 2, 0)
    return np.round((rgb + 1) * 127.5).astype(np.uint8)


def seeded_rgb(size: Size, seed: int = 0) -> Float:
    """A seeded picture (1, 3, H, W) in [-1, 1]: smooth colour, rectangles with sharp edges, a little noise."""
    width, height = size
    random = np.random.default_rng((seed, width, height))
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    phase = random.uniform(0, 2 * np.pi, (3, 1, 1))
    frequency = random.uniform(2, 9, (3, 2, 1, 1))
    picture = 0.5 * np.sin(frequency[:, 0] * x + frequency[:, 1] * y + phase)
    for _ in range(12):
        top, left = random.integers(0, height), random.integers(0, width)
        bottom, right = top + random.integers(4, height // 2), left + random.integers(4, width // 2)
        picture[:, top:bottom, left:right] = random.uniform(-1, 1, (3, 1, 1))
    picture += random.normal(0, 0.03, picture.shape)
    return np.clip(picture, -1, 1).astype(np.float32)[None]


@torch.no_grad()
def reference_outputs(
    pipeline: Pipeline, image: Pixels, size: Size, stage_inputs: Outputs | None = None, *, mean: bool = False
) -> Outputs:
    """Every verified output of the PyTorch pipeline for one picture, uint8 (h, w, 3), in a bucket of `size`; float32.

    With `stage_inputs`, encoder, denoiser and decoder start from those outputs of the stage before: each stage's own
    error, not their sum; what comes after them is then left out. mean: take that of the decoder's channels.
    """
    frame = Frame(image, encoded=False)
    rgb = prepare(frame, size, place(size, frame.size, "stretch"))
    latent = chain.encode(pipeline, torch.from_numpy(rgb))
    output = chain.denoise(pipeline, torch.from_numpy(stage_inputs["encoder"]) if stage_inputs else latent)
    joined = torch.from_numpy(stage_inputs["denoiser"]) if stage_inputs else output
    decoded = chain.decode(pipeline, chain.split(pipeline.decode, joined, size))
    pictures = decoded.mean(1, keepdim=True) if mean else decoded
    outputs = {"rgb": rgb, "encoder": latent.numpy(), "denoiser": output.numpy(), "decoder": pictures.numpy()}
    if stage_inputs is None:
        outputs["image"] = image
        for name, plane in chain.assemble(pipeline.decode, decoded, size).named().items():
            outputs[name] = plane[None].numpy()
        for name, plane in chain.assemble(pipeline.decode, decoded, frame.size).named().items():
            outputs[f"{IMAGE}{name}"] = plane.numpy()
    return outputs


class _WideConv2d(nn.Conv2d):
    """Half-precision numbers multiplied and summed in float32, as GPUs do; CPUs' own fp16 takes minutes."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.conv2d(x.float(), self.weight.float(), bias, self.stride, self.padding).to(x.dtype)


class _WideLinear(nn.Linear):
    """The same of a linear."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float()).to(x.dtype)


_WIDE: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: _WideConv2d, nn.Linear: _WideLinear}


def cast_copy(pipeline: Pipeline, precision: str) -> Pipeline:
    """The float32 pipeline in plain low precision, rewrites off."""
    low = cast(copy.deepcopy(pipeline), precision)
    if PRECISIONS[precision].overflows:
        for module in (*low.denoiser.modules(), *low.vae.modules()):
            if type(module) in _WIDE:
                module.__class__ = _WIDE[type(module)]
    return low


# Where error bounds come from, and why they are not plain numbers. A low-precision graph is off by what its arithmetic
# costs on this network at this size, and that differs by orders of magnitude between models and weights: a constant
# would be either too wide to find a fault or too narrow to build anything. So the yardstick is measured, but on
# something else than what is judged: the plain modules in eager low precision, with all rewrites off, on the same
# seeded pictures against the same float32 references. The graph, which has its rewrites, fusions and another library's
# kernels, may be off by twice that: its roundings fall elsewhere, so equality cannot be asked for, while a wrong
# rewrite, scale or layout is off by far more. The factor and the floor of 1e-5, what float32 sums in another order
# cost, were fixed beforehand (DESIGN section 10); no bound is read off the graph's own result. Each stage is compared
# twice. Alone, from the reference's input, so that an error is found in the stage that makes it and cannot hide behind
# another one's; and in a chain from the picture on ("replay"), because errors add up on the way, in the eager pipeline
# too. Norms are relative L2 over a whole tensor: single pixels at an edge may differ.
def bounds(low: Pipeline, pictures: Sequence[Outputs]) -> dict[str, float]:
    """What a graph's outputs may be off: twice the error that this eager pipeline has, and 1e-5 in any case.

    pictures: what belongs to each picture of a size. Stages are compared on the first one, and "replay" is the same for
    the outputs of a whole run, in which a stage gets what the one before made of it; a served image's outputs on all,
    as `verify` does, because their errors differ between pictures. Infinite where the eager pipeline overflows.
    """
    references = pictures[0]
    mean = references["decoder"].shape[1] == 1
    size = size_of(references)
    stages = reference_outputs(low, references["image"], size, stage_inputs=references, mean=mean)
    runs = [reference_outputs(low, picture["image"], size, mean=mean) for picture in pictures]
    outputs = runs[0] | {str(stage): stages[stage] for stage in STAGES}
    errors = {name: relative_error(outputs[name], references[name]) for name in _computed(references)}
    errors["replay"] = max(relative_error(runs[0][name], references[name]) for name in errors)
    for name in (name for name in errors if name.startswith(IMAGE)):
        pairs = zip(runs, pictures, strict=True)
        errors[name] = max(relative_error(run[name], picture[name]) for run, picture in pairs)
    return {name: max(FLOAT32_BOUND, LOW_PRECISION_FACTOR * error) for name, error in errors.items()}


def size_of(outputs: Outputs) -> Size:
    """Of the bucket that they belong to."""
    return Size(outputs["rgb"].shape[3], outputs["rgb"].shape[2])


def float32_bounds(references: Outputs) -> dict[str, float]:
    """`bounds` of a float32 graph: eager float32 is the reference itself."""
    return dict.fromkeys((*_computed(references), "replay"), FLOAT32_BOUND)


def served_bounds(bounds: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The largest of all sizes' bounds of a served image's outputs."""
    largest: dict[str, float] = {}
    for by_output in bounds:
        for name, bound in by_output.items():
            if name.startswith(IMAGE):
                output = name.removeprefix(IMAGE)
                largest[output] = max(bound, largest.get(output, 0.0))
    return largest


def _computed(outputs: Iterable[str]) -> list[str]:
    """What is computed, and not given."""
    return [name for name in outputs if name not in ("rgb", "image")]


def require_finite(bounds: dict[str, float], size: str) -> None:
    """Raise ExportError when the eager pipeline overflowed, so that there is nothing to hold errors to."""
    if unbounded := [name for name, bound in bounds.items() if not np.isfinite(bound)]:
        raise ExportError(
            f"without rewrites this precision overflows, so that errors at {size} have no bound "
            f"({', '.join(unbounded)}). Nothing was written. Build with --precision bf16 or fp32."
        )


@dataclass(frozen=True)
class Blockwise:
    """A bundle's graphs, run a few nodes at a time. widen: bf16 as float32, see `blockwise`."""

    directory: Path
    widen: bool

    def run(self, bucket: Bucket, stage: Stage, array: NDArray[Any]) -> Float:
        """One graph on its only input; float32."""
        graph: Graph = getattr(bucket, stage)
        feeds = {graph.inputs[0].name: array}
        return run_blockwise(self.directory / graph.file, feeds, widen=self.widen)[0].astype(np.float32)


def graph_outputs(directory: Path, bucket: Bucket, decode: Decode, references: Outputs, *, widen: bool) -> Outputs:
    """The same outputs from the exported graphs: each stage from the reference before it, then the whole chain.

    wanted: those of the bucket's whole batch, see `runtime.verify.alternating`.
    """
    graphs = Chain(Blockwise(directory, widen), decode, bucket)
    latent = graphs.run("encoder", references["rgb"])
    outputs = {
        "encoder": latent,
        "denoiser": graphs.run("denoiser", references["encoder"]),
        "decoder": graphs.pictures(references["denoiser"]),
    }
    chained = graphs.pictures(graphs.run("denoiser", latent))
    return outputs | assemble_whole(chained, bucket, decode)


def check_bucket(
    bucket: Bucket, outputs: Outputs, references: Outputs, bounds: dict[str, float], reference: str
) -> list[Check]:
    """Compare outputs with references; raises ExportError naming every output beyond its bound."""
    checks = [
        Check(bucket.name, output, reference, relative_error(outputs[output], references[output]), bounds[output])
        for output in references
        if output != "rgb"
    ]
    if failed := [check for check in checks if not within(check)]:
        listed = "; ".join(f"{c.output}: {c.error:.2e} > {c.bound:.2e}" for c in failed)
        raise ExportError(
            f"the exported graphs at {bucket.name} miss their bound against {reference} (relative L2): {listed}. "
            "Nothing was written. Build with --precision fp32, or report this with the command line."
        )
    return checks


def write_inputs(directory: Path, references: Mapping[Size, Sequence[Outputs]]) -> None:
    """Store inputs and references of every size for `densegeo verify`."""
    tensors = {
        f"{size}.{index}.{name}": np.ascontiguousarray(array)  # else safetensors stores another order
        for size, pictures in references.items()
        for index, outputs in enumerate(pictures)
        for name, array in outputs.items()
    }
    save_file(tensors, directory / INPUTS_FILE)


def read_inputs(directory: Path) -> dict[Size, list[Outputs]]:
    """What `write_inputs` stored: of every size its pictures."""
    references: dict[Size, dict[int, Outputs]] = {}
    for key, array in load_file(directory / INPUTS_FILE).items():
        size, index, name = key.split(".")
        references.setdefault(Size.parse(size), {}).setdefault(int(index), {})[name] = array
    return {size: [_ordered(pictures[index]) for index in sorted(pictures)] for size, pictures in references.items()}


def _ordered(outputs: Outputs) -> Outputs:
    """The outputs in the order in which they are made, in which errors are listed too."""
    maps = ("prediction", "normals")
    names = ("rgb", *STAGES, *maps, IMAGE.rstrip("_"), *(f"{IMAGE}{name}" for name in maps))
    return {name: outputs[name] for name in names if name in outputs}
