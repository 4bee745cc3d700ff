"""The static transforms of a bag, /tf_static: from one frame to another along the tree."""

from __future__ import annotations

from typing import Any

from densegeo.errors import BagError
from densegeo.ros.ranges import IDENTITY, Transform


class StaticTransforms:
    """child frame -> (parent frame, from the child into the parent)."""

    def __init__(self) -> None:
        self._parents: dict[str, tuple[str, Transform]] = {}

    def add(self, message: Any) -> None:
        """A tf2_msgs/TFMessage."""
        for stamped in message.transforms:
            transform = Transform.of_message(stamped.transform)
            self._parents[stamped.child_frame_id.lstrip("/")] = stamped.header.frame_id.lstrip("/"), transform

    def between(self, source: str, target: str) -> Transform:
        """Raises BagError where the tree does not join them."""
        up, down = self._to_root(source.lstrip("/")), self._to_root(target.lstrip("/"))
        for frame, transform in up.items():
            if frame in down:
                return transform.then(down[frame].inverse())
        raise BagError(
            f"/tf_static does not say how {source!r} lies to {target!r} (it has {', '.join(self._parents) or 'none'})."
            " Give --anchors-transform: x y z qx qy qz qw of the range sensor in the camera's optical frame."
        )

    def _to_root(self, frame: str) -> dict[str, Transform]:
        """Every ancestor, the frame itself first -> from the frame into it."""
        ancestors, transform = {frame: IDENTITY}, IDENTITY
        while frame in self._parents:
            frame, step = self._parents[frame]
            if frame in ancestors:
                raise BagError(f"/tf_static goes in a circle through {frame!r}.")
            transform = transform.then(step)
            ancestors[frame] = transform
        return ancestors
