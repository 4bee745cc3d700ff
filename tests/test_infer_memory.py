"""`densegeo infer` over many images: memory stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from densegeo.inference import Making, Tally, run_images
from densegeo.inputs import find_inputs
from densegeo.records import Results
from densegeo.runtime import Estimator
from tests.support.infer import put

pytestmark = pytest.mark.integration


def memory_growth(bundle: Path, folder: Path, count: int) -> float:
    """Megabytes that the process grows by between the first quarter of `count` images and the last."""
    first = put(folder / "in" / "0.png")
    for number in range(1, count):
        os.link(first, first.with_name(f"{number}.png"))
    actual = find_inputs([str(folder / "in")], folder / "out")
    results = Results(folder / "out", {"bundle": {"sha256": ""}, "options": {}, "formats": ["npz"]})
    results.open_journal()
    sizes: list[int] = []

    def look() -> None:
        if len(sizes) % 50 == 0 or len(sizes) + 1 == count:
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        else:
            sizes.append(sizes[-1])

    tally = Tally()
    with Estimator(bundle) as estimator:
        run_images(estimator, actual.inputs, Making(("npz",)), results, tally, 3, look)
    results.close()
    assert tally.done == count
    return (sizes[-1] - sizes[count // 4]) / 1e6


GROWTH_MB = 16  # an image's arrays are 0.06 MB: a leak of one in forty of them would show in 10,000


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells its memory there")
def test_memory_stays(toy_bundle: Path, tmp_path: Path) -> None:
    assert memory_growth(toy_bundle, tmp_path, 600) < GROWTH_MB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells its memory there")
def test_memory_stays_over_ten_thousand_images(toy_bundle: Path, tmp_path: Path) -> None:
    assert memory_growth(toy_bundle, tmp_path, 10_000) < GROWTH_MB
