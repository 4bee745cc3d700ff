"""A `Geometry` in words, as `print` shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegeo.size import Size

if TYPE_CHECKING:
    from densegeo.runtime.geometry import Geometry


def describe(geometry: Geometry) -> str:
    """Three lines: what it is of, its depth, its normals."""
    height, width = geometry.valid.shape
    source = "" if geometry.source_size == (width, height) else f" of an image of {Size(*geometry.source_size)}"
    title = f"Geometry {width}x{height}{source}" + (f" by {geometry.model}" if geometry.model else "")
    normals = "none" if geometry.normals is None else "unit vectors, opencv frame (x right, y down, z forward)"
    return f"{title}\n  depth:   {_describe_depth(geometry)}\n  normals: {normals}"


def _describe_depth(geometry: Geometry) -> str:
    if geometry.prediction is None:
        return "none"
    values = (geometry.depth if geometry.has_depth else geometry.prediction)[geometry.valid]
    share = f"{100 * values.size / max(1, geometry.valid.size):.4g} % valid"
    span = f"{values.min():.4g} to {values.max():.4g}" if values.size else "nothing"
    if geometry.depth_kind == "metric":
        return f"metric, {span} m, {share}"
    if geometry.depth_kind == "up_to_scale":
        return f"up to scale, {span}, unit unknown, {share}; to_metric(...) makes metres"
    return f"{geometry.depth_kind}, prediction {span}, {share}; to_metric(...) makes metres"
