"""The frozen split stays what it was when scores were published."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from densegeo.benchmarks import heldout
from densegeo.errors import DatasetError


def test_the_generator_has_not_changed() -> None:
    """If it had to: run `python benchmarks/heldout.py`, and publish no score from before beside one from after."""
    frozen = json.loads(heldout.STATISTICS.read_text())
    assert len(frozen) == heldout.FROZEN_VIEWS
    for actual, expected in zip(heldout.statistics(), frozen, strict=True):
        assert actual["kind"] == expected["kind"]
        for name in ("valid", "log_depth", "normal"):
            np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=1e-4)
        assert actual["rgb"] == pytest.approx(expected["rgb"], abs=0.05)  # levels of 255


def test_samples_are_what_the_generator_renders() -> None:
    split = heldout.synthetic_split(1)
    assert (split.count, split.depth_range) == (1, (0.1, 100.0))
    assert heldout.synthetic_split().note == ""
    (sample,) = split.samples()
    assert sample.rgb.shape == (192, 256, 3)
    assert sample.depth is not None
    assert sample.depth_valid is not None
    assert sample.normals is not None
    assert ((sample.depth > 0.1) & (sample.depth < 100))[sample.depth_valid].all()
    np.testing.assert_allclose(np.linalg.norm(sample.normals[sample.normals_valid], axis=-1), 1, atol=1e-3)
    assert (sample.normals[sample.normals_valid][:, 2] < 0.9).all()  # none points away


def test_outside_a_checkout_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "densegeo.training.render", None)  # as when the package is not installed
    with pytest.raises(DatasetError, match="only a checkout"):
        heldout.synthetic_split(1)
