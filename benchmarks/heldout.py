"""The frozen held-out split: synthetic views that training never sees, with exact depth and normals.

`python benchmarks/heldout.py` rewrites `heldout.json`, the statistics by which a test notices that the generator of the
scenes has changed: scores from before and after such a change do not compare.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densegeo.benchmarks.environment import write_json
from densegeo.benchmarks.layouts import Sample, Split
from densegeo.errors import DatasetError
from densegeo.size import Size

if TYPE_CHECKING:
    from densegeo.training.render import View

SEED, SPLIT = 0, "test"
VIEWS = 100
SIZE = Size(256, 192)
DEPTH_RANGE = (0.1, 100.0)  # metres
FROZEN_VIEWS = 8
STATISTICS = Path(__file__).resolve().with_name("heldout.json")


def synthetic_split(views: int = VIEWS) -> Split:
    """The first `views` views. Raises DatasetError outside a checkout, where the generator is missing."""
    view = _generator()
    note = "" if views == VIEWS else f"{views} views; the frozen split has {VIEWS}"
    return Split("synthetic", DEPTH_RANGE, views, lambda: _samples(view, views), note)


def statistics() -> list[dict[str, Any]]:
    """Of the first views: kind, mean ln(metres) and mean normal where valid, and the share of valid pixels."""
    view = _generator()
    rows = []
    for index in range(FROZEN_VIEWS):
        sample = view(SEED, SPLIT, index, *SIZE)
        normals = sample.normals[sample.valid].astype(np.float64)
        rows.append(
            {
                "kind": sample.kind,
                "valid": float(sample.valid.mean()),
                "log_depth": float(np.log(sample.depth[sample.valid].astype(np.float64)).mean()),
                "normal": normals.mean(axis=0).tolist(),
                "rgb": float(sample.rgb.mean()),
            }
        )
    return rows


def _generator() -> Callable[..., View]:
    try:
        from densegeo.training.render import view
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("densegeo.training"):
            raise
        raise DatasetError(
            "The synthetic split is rendered by densegeo.training, which only a checkout of the repository has. "
            "Run from one, or name another dataset."
        ) from error
    return view


def _samples(view: Callable[..., View], views: int) -> Iterator[Sample]:
    low, high = DEPTH_RANGE
    for index in range(views):
        sample = view(SEED, SPLIT, index, *SIZE)
        in_range = sample.valid & (sample.depth > low) & (sample.depth < high)
        yield Sample(f"{SPLIT} {index}", sample.rgb, sample.depth, in_range, sample.normals, sample.valid)


if __name__ == "__main__":
    write_json(STATISTICS, statistics())
    print(json.dumps(json.loads(STATISTICS.read_text())))
