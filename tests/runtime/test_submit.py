"""`Estimator.submit`: what the queue gives, refuses and ends with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from densegeo.errors import (
    BackendTimeoutError,
    ConfigError,
    DeadlineError,
    ImageError,
    QueueFullError,
    ShutdownError,
)
from densegeo.runtime import Estimator
from densegeo.runtime.request_metrics import COUNTERS
from tests.support.batchers import T
from tests.support.doubles import Gate, constant_image, fake_estimator, level_of

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 0},
        {"max_batch": 1.5},
        {"max_queue": 0},
        {"max_wait_ms": -1},
        {"max_wait_ms": float("nan")},
        {"timeout_s": 0},
        {"timeout_s": float("inf")},
    ],
)
def test_bad_options(bundle: Path, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Estimator(bundle, device="cpu", **options)


def test_submit_gives_what_a_call_gives(
    bundle: Path, picture: np.ndarray, started_threads: Callable[[], set[str]]
) -> None:
    before = started_threads()
    with Estimator(bundle, device="cpu", timeout_s=60) as estimator:
        expected = estimator(picture)
        assert started_threads() == before, "a thread without a submit"
        image = picture[..., ::-1].copy()
        future = estimator.submit(image, "bgr", deadline_ms=60_000)
        image[:] = 0  # the image was read by `submit`
        result = future.result(T)
        assert started_threads() == before | {"densegeo-batcher-0", "densegeo-watchdog"}
        with pytest.raises(ImageError):
            estimator.submit("nowhere.png")
        for wrong in (0, -1, float("nan")):
            with pytest.raises(ConfigError, match="deadline_ms"):
                estimator.submit(picture, deadline_ms=wrong)
    assert started_threads() == before
    np.testing.assert_array_equal(result.prediction, expected.prediction)
    np.testing.assert_array_equal(result.normals, expected.normals)
    assert set(result.timings) == {*expected.timings, "queue"}
    with pytest.raises(ShutdownError, match="closed"):
        estimator.submit(picture)
    counters = estimator.metrics.snapshot().counters
    assert counters == dict.fromkeys(COUNTERS, 0) | {"accepted": 2, "completed": 2, "rejected": 1}


def test_submit_rejects_and_does_not_wait(bundle: Path, gate: Gate) -> None:
    with fake_estimator(bundle, lambda bucket, stage, value: gate(value), max_queue=1) as estimator:
        futures = [estimator.submit(constant_image(0.5))]
        gate.wait_until_entered()
        futures.append(estimator.submit(constant_image(0.6)))
        for image in (constant_image(0.7), "nowhere.png"):  # the image is not even read
            with pytest.raises(QueueFullError):
                estimator.submit(image)
        gate.open()
    assert [level_of(future.result(0).prediction) for future in futures] == pytest.approx([0.5, 0.6], abs=1e-6)
    assert estimator.metrics.snapshot().counters["rejected"] == 2


def test_leaving_the_block_drains(bundle: Path) -> None:
    levels = [0.5 + 0.01 * i for i in range(20)]
    with fake_estimator(bundle, lambda *_: time.sleep(0.001)) as estimator:
        futures = [estimator.submit(constant_image(level)) for level in levels]
    assert [level_of(future.result(0).prediction) for future in futures] == pytest.approx(levels, abs=1e-6)
    assert estimator._backend.closed


def test_a_deadline_starts_with_the_call(bundle: Path, gate: Gate) -> None:
    with fake_estimator(bundle, lambda bucket, stage, value: stage != "encoder" or gate(value)) as estimator:
        estimator.submit(constant_image(0.5))
        gate.wait_until_entered()
        future = estimator.submit(constant_image(0.6), deadline_ms=1e-3)  # over before the image is resized
        gate.open()
        with pytest.raises(DeadlineError):
            future.result(T)
    assert len(gate.calls) == 1


def test_an_estimator_with_a_hanging_backend_closes(bundle: Path, gate: Gate) -> None:
    estimator = fake_estimator(bundle, lambda bucket, stage, value: gate(value), timeout_s=0.1)
    with estimator:
        futures = [estimator.submit(constant_image(0.5)) for _ in range(3)]
        for future in futures:
            assert isinstance(future.exception(T), BackendTimeoutError)
        with pytest.raises(BackendTimeoutError):
            estimator.submit(constant_image(0.5))
    assert not estimator._backend.closed, "it is still being used by the stuck thread"
    gate.open()
    for thread in estimator._service._batcher._threads:
        thread.join(T)
