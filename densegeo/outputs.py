"""What a model predicts, as rows, and the conventions of it: axes, clamps, signs, floors.

Everything between a checkpoint and a `Geometry` asks these rows. Imports neither numpy nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import msgspec

Array = TypeVar("Array")
Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]

Space = Literal["log_affine", "affine", "disparity_affine"]  # in which a prediction is a line of depth, see `metric`
DepthKind = Literal["metric", "up_to_scale", "log_affine", "affine", "disparity_affine"]  # a `Space`, or done with
SPACES: tuple[Space, ...] = ("log_affine", "affine", "disparity_affine")
Frame = Literal["opencv", "ros_optical", "opengl", "marigold", "dsine", "ros_body"]
Clamp = Literal["before_mean", "after_mean"]

# Rows are the frame's axes in OpenCV camera coordinates (x right, y down, z forward).
_OPENGL: Matrix = ((1, 0, 0), (0, -1, 0), (0, 0, -1))  # right, up, towards the viewer
_IDENTITY: Matrix = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
FRAMES: Mapping[Frame, Matrix] = {
    "opencv": _IDENTITY,
    "ros_optical": _IDENTITY,  # REP 103, suffix _optical
    "opengl": _OPENGL,
    "marigold": _OPENGL,
    "dsine": ((-1, 0, 0), (0, -1, 0), (0, 0, -1)),  # left, up, back
    "ros_body": ((0, 0, 1), (-1, 0, 0), (0, -1, 0)),  # REP 103: forward, left, up
}
NORMAL_FLOOR = 1e-9  # smallest length a normal is divided by, as in FE2E's released evaluation


def into_opencv(frame: Frame) -> Matrix:
    """The matrix that takes a vector in `frame` to the OpenCV camera frame: the transpose of the frame's axes."""
    (a, b, c), (d, e, f), (g, h, i) = FRAMES[frame]
    return (a, d, g), (b, e, h), (c, f, i)


class Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One picture that is decoded for an image, and how it is read.

    depth: the mean x of its channels gives the prediction (x + 1) / 2; `space` says how that leads to metres. normals:
    its three channels are a vector in `frame`, made unit after resizing.
    clamp: to [-1, 1], of every channel ("before_mean", as normals are) or of the channels' mean ("after_mean").
    factor: what the denoiser's output is multiplied by to be this picture's latent, its sign included.
    """

    kind: Literal["depth", "normals"]
    clamp: Clamp
    factor: float = 1.0
    space: Space | None = None
    frame: Frame | None = None

    def __post_init__(self) -> None:
        if (self.kind == "depth") != (self.space is not None) or (self.kind == "normals") != (self.frame is not None):
            raise ValueError("depth has a space, normals have a frame, and neither has the other")
        if self.kind == "normals" and self.clamp != "before_mean":
            raise ValueError("normals have no mean over channels that could be clamped")

    @property
    def name(self) -> str:
        """As `Geometry` calls it."""
        return "prediction" if self.kind == "depth" else "normals"


class Decode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the denoiser's output becomes geometry (DESIGN sections 3 and 5).

    outputs: one or two rows, each kind at most once, in the order in which they are decoded.
    packing "tokens", FE2E: velocity (B, 2L, 4C) for L = (H/16)(W/16) tokens, the first half the first output's, the
    second half the second's; the decoder takes factor * velocity / latent_scale + latent_shift.
    packing "latent", FiffDepth: the only output's latent (B, C, h, w), which the decoder takes as it is.
    """

    packing: Literal["tokens", "latent"]
    outputs: tuple[Output, ...]
    latent_scale: float = 1.0
    latent_shift: float = 0.0

    def __post_init__(self) -> None:
        kinds = [output.kind for output in self.outputs]
        if not self.latent_scale > 0:
            raise ValueError(f"latent_scale must be above 0, not {self.latent_scale}")
        if not kinds or len(set(kinds)) != len(kinds):
            raise ValueError("a model has depth, or normals, or one of each")
        if self.packing == "tokens" and len(kinds) != 2:
            raise ValueError('packing "tokens" has two outputs, side by side')
        as_it_is = (self.latent_scale, self.latent_shift, self.outputs[0].factor) == (1, 0, 1)
        if self.packing == "latent" and not (len(kinds) == 1 and as_it_is):
            raise ValueError('packing "latent" has one output, whose latent is taken as it is')

    @property
    def names(self) -> tuple[str, ...]:
        """What an image gives, in order: "prediction", "normals"."""
        return tuple(output.name for output in self.outputs)

    @property
    def depth_kind(self) -> Space | None:
        """Of the prediction; None without one."""
        return next((output.space for output in self.outputs if output.kind == "depth"), None)

    def has(self, kind: Literal["depth", "normals"]) -> bool:
        """Whether there is an output of this kind."""
        return any(output.kind == kind for output in self.outputs)


@dataclass(frozen=True, eq=False)
class Maps(Generic[Array]):
    """What an image gives, on the host or on a device: at least one of the two.

    prediction: (h, w) float32, see `Output`. normals: (h, w, 3) float32, unit, OpenCV frame.
    """

    prediction: Array | None = None
    normals: Array | None = None

    def named(self) -> dict[str, Array]:
        """Those that are there, by name."""
        pairs = {"prediction": self.prediction, "normals": self.normals}
        return {name: array for name, array in pairs.items() if array is not None}
