"""Recordings of the torch backend: refusals, failures, and on a GPU the bits of a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from densegeo.errors import BackendError  # noqa: E402
from densegeo.runtime.backends.torch_capture import WARM_UP, CudaRecorder, Replay  # noqa: E402


class Tape:
    """A recorder for the CPU: replaying runs the work again and puts its result where the recording put it."""

    warm_up = WARM_UP

    def __init__(self, error: Exception | None = None, offset: float = 0.0) -> None:
        self.error, self.offset, self.replays = error, offset, 0

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        if self.error is not None:
            raise self.error
        result = work()

        def again() -> None:
            self.replays += 1
            result.copy_(work() + self.offset)

        return again, result


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_a_recording_is_replayed_on_its_own_buffers() -> None:
    calls: list[Tensor] = []

    def work(x: Tensor) -> Tensor:
        calls.append(x)
        return double(x)

    tape, example = Tape(), torch.zeros(2, 3)
    replay = Replay("doubling", work, (example,), tape)
    assert replay.captured
    assert len(calls) == WARM_UP + 2  # warm-up, recording, and the replay that was compared
    first = replay(torch.ones(2, 3))
    assert tape.replays == 2
    assert torch.equal(first, torch.full((2, 3), 2.0))
    second = replay(torch.full((2, 3), 5.0))
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, torch.full((2, 3), 10.0))
    assert all(x.data_ptr() == calls[0].data_ptr() for x in calls)
    assert example.data_ptr() != calls[0].data_ptr()


@pytest.mark.parametrize("recorder", [None, Tape()])
@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(2, 4), r"float32 \(2, 3\) on cpu and cannot take float32 \(2, 4\) on cpu"),
        (torch.zeros(2, 3, dtype=torch.float64), "cannot take float64"),
        (torch.zeros(2, 3, device="meta"), "on meta"),
    ],
)
def test_another_shape_or_type_is_refused(recorder: Tape | None, tensor: Tensor, match: str) -> None:
    replay = Replay("doubling", double, (torch.zeros(2, 3),), recorder)
    with pytest.raises(BackendError, match=match):
        replay(tensor)


@pytest.mark.parametrize(
    ("tape", "message"),
    [(Tape(RuntimeError("no capture here")), "no capture here"), (Tape(offset=1e-6), "other numbers")],
)
def test_a_recording_that_fails_is_logged_and_not_used(
    tape: Tape, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "densegeo"):
        replay = Replay("doubling", double, (torch.ones(3),), tape)
    assert not replay.captured
    assert "doubling runs eager" in caplog.text
    assert message in caplog.text
    assert torch.equal(replay(torch.full((3,), 4.0)), torch.full((3,), 8.0))


def test_a_recording_without_memory_is_no_failed_one() -> None:
    """Then a smaller one may do, while eager runs of this size would need the memory at every image."""

    def end_of_recording(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        try:
            raise torch.OutOfMemoryError("no memory")
        except torch.OutOfMemoryError:
            raise RuntimeError("the recording is void")  # noqa: B904 (what torch.cuda.graph's end does)

    hidden = Tape()
    hidden.record = end_of_recording  # type: ignore[method-assign]
    for tape in (Tape(torch.OutOfMemoryError("no memory")), hidden):
        with pytest.raises(torch.OutOfMemoryError, match="no memory to record"):
            Replay("doubling", double, (torch.ones(3),), tape)


@pytest.mark.gpu
def test_a_cuda_graph_gives_the_eager_bits() -> None:
    weight = torch.randn(64, 64, device="cuda:0")
    replay = Replay("product", lambda x: x @ weight, (torch.randn(8, 64, device="cuda:0"),), CudaRecorder("cuda:0"))
    assert replay.captured
    for seed in range(3):
        x = torch.randn(8, 64, device="cuda:0", generator=torch.Generator("cuda:0").manual_seed(seed))
        assert torch.equal(replay(x), x @ weight)
