"""Streams: which frames are run, which are dropped, and whose result is whose."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from densegeo.errors import BackendError, BackendTimeoutError, ConfigError, DeadlineError, ImageError, ShutdownError
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import Bucket, Stage
from densegeo.runtime.stream import FrameResult, Stream
from tests.support.doubles import Gate, constant_image, fake_estimator, level_of

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
T = 30  # seconds


class Task:
    """A call in a thread of its own, and what it returned."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.result: object = None
        self.thread = threading.Thread(target=self._run, args=(call,))
        self.thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            self.result = call()
        except BaseException as error:
            self.result = error

    def done(self, timeout: float = T) -> bool:
        self.thread.join(timeout)
        return not self.thread.is_alive()


@pytest.fixture
def estimator(bundle: Path, gate: Gate) -> Iterator[Estimator]:
    """Every frame passes the gate on its way through the network."""

    def hook(bucket: Bucket, stage: Stage, value: float) -> None:
        if stage == "denoiser":
            gate(round((value + 1) / 2, 4))

    with fake_estimator(bundle, hook) as made:
        yield made
        gate.open()


def levels(stream: Stream) -> list[float]:
    return [round(level_of(result.geometry.prediction), 4) for result in stream]


def test_only_the_newest_frame_is_run(estimator: Estimator, gate: Gate) -> None:
    gate.open()
    with estimator.stream() as stream:
        for number in range(5):
            stream.put(constant_image(0.5 + number / 100), stamp=f"t{number}", frame_id=10 + number)
        assert stream.dropped == 4
        result = next(stream)
        assert (result.frame_id, result.stamp, result.error) == (14, "t4", None)
        assert level_of(result.geometry.prediction) == pytest.approx(0.54, abs=1e-6)
    assert gate.calls == [0.54]
    assert stream.dropped == 4
    counters = estimator.metrics.snapshot().counters
    assert (counters["dropped"], counters["completed"]) == (4, 1)


def test_frames_that_come_during_a_run_replace_each_other(estimator: Estimator, gate: Gate) -> None:
    stream = estimator.stream(latest=True)
    assert stream.put(constant_image(0.50)) == 0
    consumer = Task(lambda: levels(stream))
    gate.wait_until_entered()
    assert [stream.put(constant_image(0.5 + number / 100)) for number in (1, 2, 3)] == [1, 2, 3]
    assert stream.dropped == 2
    gate.open(1)
    gate.wait_until_entered()  # the newest one is run next
    stream.close()
    gate.open()
    assert consumer.done()
    assert consumer.result == [0.5, 0.53]
    assert stream.dropped == 2


def test_every_frame_is_run_in_order_with_back_pressure(estimator: Estimator, gate: Gate) -> None:
    stream = estimator.stream(latest=False, depth=2)
    put: list[object] = []
    camera = Task(lambda: [put.append(stream.put(constant_image(0.5 + n / 100), stamp=n)) for n in range(5)])
    gate.wait_until_entered()
    assert not camera.done(0.1)
    assert put == [0, 1], "two wait to be read"
    gate.open()
    first = next(stream)
    assert (first.frame_id, first.stamp) == (0, 0)
    rest = [next(stream) for _ in range(4)]
    assert camera.done()
    assert put == [0, 1, 2, 3, 4]
    stream.close()
    assert list(stream) == []
    assert [result.stamp for result in rest] == [1, 2, 3, 4]
    assert [round(level_of(result.geometry.prediction), 4) for result in rest] == [0.51, 0.52, 0.53, 0.54]
    assert stream.dropped == 0


def test_frames_are_run_while_the_consumer_is_busy(estimator: Estimator, gate: Gate) -> None:
    gate.open()
    with estimator.stream(latest=False) as stream:
        for number in range(3):
            stream.put(constant_image(0.5 + number / 100))
        for _ in range(3):
            gate.wait_until_entered()  # nobody asked for a result yet
        assert [next(stream).frame_id for _ in range(3)] == [0, 1, 2]


def test_back_pressure_instead_of_rejection(bundle: Path) -> None:
    """The estimator's queue is shorter than the stream: `put` waits for room there too."""
    with fake_estimator(bundle, max_queue=1) as estimator:
        stream = estimator.stream(latest=False, depth=50)
        for number in range(50):
            stream.put(constant_image(0.5 + number / 1000))
        stream.close()
        assert levels(stream) == [round(0.5 + number / 1000, 4) for number in range(50)]
        assert estimator.metrics.snapshot().counters["rejected"] == 0


@pytest.mark.parametrize("latest", [True, False])
def test_a_frame_that_fails_does_not_end_the_stream(bundle: Path, latest: bool) -> None:
    def hook(bucket: Bucket, stage: Stage, value: float) -> None:
        if value > 0.15:
            raise BackendError("too bright")

    with fake_estimator(bundle, hook) as estimator, estimator.stream(latest) as stream:
        outcomes = []
        for image in (constant_image(0.6), "nowhere.png", constant_image(0.55)):
            stream.put(image, stamp=image if isinstance(image, str) else None)
            outcomes.append(next(stream))
        assert [type(result.error) for result in outcomes] == [BackendError, ImageError, type(None)]
        assert [result.frame_id for result in outcomes] == [0, 1, 2]
        assert outcomes[1].stamp == "nowhere.png"
        with pytest.raises(BackendError, match="too bright"):
            _ = outcomes[0].geometry
        assert level_of(outcomes[2].geometry.prediction) == pytest.approx(0.55, abs=1e-6)


@pytest.mark.parametrize("latest", [True, False])
def test_closing_wakes_whoever_waits(estimator: Estimator, gate: Gate, latest: bool) -> None:
    stream = estimator.stream(latest, depth=1)
    consumer = Task(lambda: list(stream))
    assert not consumer.done(0.05)
    stream.close()
    stream.close()
    assert consumer.done()
    assert consumer.result == []
    with pytest.raises(ShutdownError, match="stream is closed"):
        stream.put(constant_image(0.5))


def test_closing_wakes_a_camera_that_waits_for_room(estimator: Estimator, gate: Gate) -> None:
    with estimator.stream(latest=False, depth=1) as stream:
        stream.put(constant_image(0.5))
        camera = Task(lambda: stream.put(constant_image(0.6)))
        assert not camera.done(0.05)
        gate.open()
    assert camera.done()
    assert isinstance(camera.result, ShutdownError)
    assert stream.dropped == 1  # run or cancelled: nobody read it
    assert list(stream) == []


def test_closing_the_estimator_ends_its_streams(bundle: Path) -> None:
    estimator = fake_estimator(bundle)
    latest, every = estimator.stream(), estimator.stream(latest=False)
    for stream in (latest, every):
        stream.put(constant_image(0.6))
    consumer = Task(lambda: list(estimator.stream()))
    estimator.close()
    assert consumer.done()
    (result,) = every  # was accepted, hence finished
    assert level_of(result.geometry.prediction) == pytest.approx(0.6, abs=1e-6)
    (result,) = latest  # had not been taken yet
    assert isinstance(result.error, ShutdownError)
    for stream in (latest, every):
        with pytest.raises(ShutdownError):
            stream.put(constant_image(0.6))
    with pytest.raises(ShutdownError):
        estimator.stream()


def test_closing_the_estimator_without_draining(estimator: Estimator, gate: Gate) -> None:
    stream = estimator.stream(latest=False, depth=3)
    for number in range(3):
        stream.put(constant_image(0.5 + number / 100))
    gate.wait_until_entered()
    closing = Task(lambda: estimator.close(drain=False))
    results = [next(stream) for _ in range(1)] if closing.done(0.05) else []
    gate.open()
    results += list(stream)
    assert closing.done()
    assert [type(result.error) for result in results] == [type(None), ShutdownError, ShutdownError]


@pytest.mark.parametrize("latest", [True, False])
def test_a_hang_ends_the_frames_typed(bundle: Path, gate: Gate, latest: bool) -> None:
    with fake_estimator(bundle, lambda *_: gate(0), timeout_s=0.1) as estimator:
        stream = estimator.stream(latest)
        stream.put(constant_image(0.5))
        assert isinstance(next(stream).error, BackendTimeoutError)
        if latest:
            stream.put(constant_image(0.5))
            assert isinstance(next(stream).error, BackendTimeoutError)
        else:
            with pytest.raises(BackendTimeoutError):
                stream.put(constant_image(0.5))
    gate.open()
    for thread in estimator._service._batcher._threads:
        thread.join(T)


def test_several_consumers_share_the_frames(bundle: Path) -> None:
    with fake_estimator(bundle) as estimator:
        stream = estimator.stream(latest=False)
        consumers = [Task(lambda: [result.frame_id for result in stream]) for _ in range(3)]
        for number in range(60):
            stream.put(constant_image(0.5 + number / 1000))
        stream.close()
        assert all(consumer.done() for consumer in consumers)
    assert sorted(frame_id for consumer in consumers for frame_id in consumer.result) == list(range(60))


def test_a_real_bundle(bundle: Path, picture: np.ndarray) -> None:
    with Estimator(bundle, device="cpu") as estimator, estimator.stream(color="bgr") as stream:
        stream.put(picture[..., ::-1])
        np.testing.assert_array_equal(next(stream).geometry.prediction, estimator(picture).prediction)


def test_bad_depth(bundle: Path) -> None:
    with Estimator(bundle, device="cpu") as estimator:
        for depth in (0, 1.5):
            with pytest.raises(ConfigError, match="depth"):
                estimator.stream(latest=False, depth=depth)


CAMERA = (50.0, 50.0, 23.5, 15.5)


def test_a_result_within_a_time(estimator: Estimator, gate: Gate) -> None:
    with estimator.stream() as stream:
        with pytest.raises(DeadlineError, match=r"0\.05 s"):
            stream.get(timeout=0.05)  # nothing was put
        stream.put(constant_image(0.5), stamp="a")
        with pytest.raises(DeadlineError):
            stream.get(timeout=0.2)  # the gate is shut: the frame is running
        gate.open()
        assert stream.get(timeout=T).stamp == "a"  # the same frame, and not lost
        stream.close()
        with pytest.raises(ShutdownError):
            stream.get(timeout=T)


def test_results_by_callback(estimator: Estimator, gate: Gate) -> None:
    gate.open()
    stamps: list[object] = []

    def callback(result: FrameResult) -> None:
        stamps.append(result.stamp)
        if result.stamp == 1:
            raise RuntimeError("a callback's own mistake")

    stream = estimator.stream(latest=False)
    thread = stream.subscribe(callback)
    for number in range(4):
        stream.put(constant_image(0.5), stamp=number)
    stream.close()
    thread.join(T)
    assert not thread.is_alive()
    assert stamps == [0, 1, 2, 3]


def test_results_by_async_iteration(estimator: Estimator, gate: Gate) -> None:
    gate.open()
    stream = estimator.stream(latest=False)

    async def consume() -> list[object]:
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.15)
        first.cancel()  # nothing was put: cancelling takes nothing away
        for number in range(3):
            stream.put(constant_image(0.5), stamp=number)
        stream.close()
        return [result.stamp async for result in stream]

    assert asyncio.run(asyncio.wait_for(consume(), T)) == [0, 1, 2]


def test_frames_come_in_metres(estimator: Estimator, gate: Gate) -> None:
    """A flat prediction without normals that tell: the refusal comes with the frame; nonsense is refused at once."""
    gate.open()
    with estimator.stream(latest=False) as stream:
        stream.put(constant_image(0.5), intrinsics=CAMERA)
        result = next(stream)
        assert result.error is None
        assert result.refusal is not None
        stream.put(constant_image(0.5))
        assert next(stream).refusal is not None  # the camera holds for later frames
        with pytest.raises(ConfigError, match="ntrinsics"):
            stream.put(constant_image(0.5), intrinsics=(1, 2))
        with pytest.raises(ConfigError, match="motion"):
            stream.put(constant_image(0.5), motion=np.eye(3))


@pytest.mark.parametrize("latest", [True, False])
def test_observations_of_another_type_are_refused_at_once(estimator: Estimator, latest: bool) -> None:
    """And the stream goes on without the frame."""
    wrong: list[dict[str, object]] = [
        {"camera_height": [1.0, 2.0]},
        {"camera_height": -1.0},
        {"up": "y"},
        {"up": (0.0, -1.0)},
        {"anchors": 5},
        {"anchors": ([[1, 2], [3, 4]], [1.0])},
        {"anchors": ([[1, 2]], ["far"])},
        {"intrinsics": "K"},
        {"motion": "still"},
    ]
    with estimator.stream(latest=latest) as stream:
        for observations in wrong:
            with pytest.raises(
                ConfigError, match=next(iter(observations)) if "intrinsics" not in observations else "ntrinsics"
            ):
                stream.put(constant_image(0.5), **observations)  # type: ignore[arg-type]
        assert stream.put(constant_image(0.5), anchors=(np.empty((0, 2)), np.empty(0)), up=np.float32([0, -1, 0])) == 0
