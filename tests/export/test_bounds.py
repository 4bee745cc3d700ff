"""Where the error bounds of low precision come from: plain modules, on every picture that is served."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from densegeo.export import checks  # noqa: E402
from densegeo.size import Size  # noqa: E402
from tests.support.fused_networks import HEIGHT, WIDTH, pipeline, write_checkpoint_files  # noqa: E402


@torch.no_grad()
def test_bounds_of_served_images_hold_for_every_picture(tmp_path: Path) -> None:
    exact, size = pipeline(write_checkpoint_files(tmp_path), ()), Size(WIDTH, HEIGHT)
    (sizes,) = checks.picture_sizes([size]).values()
    pictures = [
        checks.reference_outputs(exact, checks.seeded_picture(picture, seed), size)
        for seed, picture in enumerate(sizes)
    ]
    low = checks.cast_copy(exact, "bf16")
    first, second = (checks.bounds(low, [picture]) for picture in pictures)
    both = checks.bounds(low, pictures)
    served = {"image_prediction", "image_normals"}
    assert served < both.keys()
    assert all(first[name] != second[name] for name in served)
    for name, bound in both.items():
        assert bound == (max(first[name], second[name]) if name in served else first[name]), name
