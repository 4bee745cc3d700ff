"""A bundle that changes under an open estimator: noticed, and never are new files run under the old manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densegeo.errors import BundleError
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import MANIFEST
from tests.support.toy_bundle import make_toy_bundle

IMAGE = np.random.default_rng(5).integers(0, 256, (48, 64, 3), dtype=np.uint8)
TALL = np.random.default_rng(6).integers(0, 256, (80, 48, 3), dtype=np.uint8)
SIZES = ((64, 48), (48, 80))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "bundle", SIZES)


def by_rename(bundle: Path) -> None:
    other = make_toy_bundle(bundle.with_name("other"), (*SIZES, (64, 64)))
    bundle.rename(bundle.with_name("old"))
    other.rename(bundle)


def in_place(bundle: Path) -> None:
    other = make_toy_bundle(bundle.with_name("other"), (*SIZES, (64, 64)))
    (bundle / MANIFEST).unlink()
    for path in sorted(other.iterdir(), key=lambda path: path.name == MANIFEST):  # the manifest last
        os.replace(path, bundle / path.name)


CALLS: dict[str, Callable[[Estimator], Any]] = {
    "call": lambda estimator: estimator(IMAGE),
    "submit": lambda estimator: estimator.submit(IMAGE),
    "stream": lambda estimator: estimator.stream(),
    "batch": lambda estimator: estimator.batch([IMAGE]),
    "tensors": lambda estimator: estimator.tensors(IMAGE),
    "replay": lambda estimator: estimator.replay(np.zeros((1, 3, 48, 64), np.float32)),
}


@pytest.mark.parametrize("replace", [by_rename, in_place])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_next_call_says_so(replace: Callable[[Path], None], call: Callable[[Any], Any], bundle: Path) -> None:
    with Estimator(bundle, "onnxruntime") as estimator:
        estimator(IMAGE)
        replace(bundle)
        with pytest.raises(BundleError, match="bundle was replaced by another bundle after this estimator opened it"):
            call(estimator)
    with Estimator(bundle, "onnxruntime") as estimator:
        assert len(estimator.manifest.buckets) == 3


def test_a_stream_that_is_open(bundle: Path) -> None:
    with Estimator(bundle, "onnxruntime") as estimator, estimator.stream() as stream:
        stream.put(IMAGE)
        assert next(stream).error is None
        by_rename(bundle)
        stream.put(IMAGE)
        assert isinstance(next(stream).error, BundleError)


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: os.utime(bundle / MANIFEST),
        lambda bundle: (shutil.copytree(bundle, bundle.with_name("copy")), shutil.rmtree(bundle),
                        bundle.with_name("copy").rename(bundle)),
    ],
)  # fmt: skip
def test_the_same_bundle_again_is_no_other(change: Callable[[Path], None], bundle: Path) -> None:
    with Estimator(bundle, "onnxruntime") as estimator:
        before = estimator(IMAGE).prediction
        change(bundle)
        assert np.array_equal(estimator(IMAGE).prediction, before)
        assert estimator(TALL).prediction.shape == (80, 48)


def test_a_size_that_is_loaded_later_is_of_the_same_bundle(bundle: Path) -> None:
    """While files are being replaced there is no manifest; what is in memory goes on, and nothing else is loaded."""
    with Estimator(bundle, "onnxruntime") as estimator:
        before = estimator(IMAGE).prediction
        kept = (bundle / MANIFEST).read_bytes()
        (bundle / MANIFEST).unlink()
        shutil.copy(bundle / "decoder_64x48.onnx", bundle / "decoder_48x80.onnx")
        assert np.array_equal(estimator(IMAGE).prediction, before)
        for _ in range(2):
            with pytest.raises(BundleError, match="is no bundle any more"):
                estimator(TALL)
        (bundle / MANIFEST).write_bytes(kept + b"\n")
        with pytest.raises(BundleError, match="was replaced"):
            estimator(IMAGE)


def test_a_bundle_that_is_replaced_while_it_is_opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from densegeo.runtime import estimator as module

    def opening(*arguments: Any) -> Any:
        opened = genuine(*arguments)
        by_rename(bundle)
        return opened

    genuine = module.open_backend
    monkeypatch.setattr(module, "open_backend", opening)
    with pytest.raises(BundleError, match="was replaced"):
        Estimator(bundle, "onnxruntime")
