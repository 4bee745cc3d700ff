"""ONNX Runtime between our kernels: its sessions over the driver's memory (`case.py`).

That is host memory, so that the CPU provider takes the CUDA one's place and nothing else differs. Streams do their work
at once, because the CPU provider has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from densegeo.errors import BackendError
from densegeo.runtime import Estimator
from densegeo.runtime.backends import ort_frames
from densegeo.runtime.backends.ort import OrtBackend
from densegeo.runtime.backends.ort_frames import NO_WAIT, OrtFrames, Session
from densegeo.runtime.bundle import read_manifest
from tests.cuda.case import case, close_to, foreign
from tests.cuda.exercise import DEVICE, Setup
from tests.cuda.foreign import Image, Reading


class OnHost(Session):
    """Its buffers are the host's."""

    def __init__(self, ort: Any, session: Any, graph: Any, device: str) -> None:
        assert device == f"cuda:{DEVICE}"
        super().__init__(ort, session, graph, "cpu")


@contextmanager
def frames(setup: Setup) -> Iterator[tuple[Estimator, list[dict[str, str]]]]:
    """An estimator over sessions of the bundle's float32 graphs, and the options that they were asked for."""
    asked: list[dict[str, str]] = []
    manifest = read_manifest(setup.bundle)
    sessions = OrtBackend(setup.library.graphs, read_manifest(setup.library.graphs), "cpu", load=False)
    make = sessions.session

    def session(graph: Any, options: Any) -> Any:
        asked.append(dict(options))
        return make(graph, {})

    setup.driver.schedule("eager")
    with patch.object(sessions, "device", f"cuda:{DEVICE}"), patch.object(sessions, "session", session):
        with patch.object(ort_frames, "Session", OnHost):
            backend = OrtFrames(setup.bundle, manifest, sessions)
        with Estimator.from_backend(backend, manifest) as estimator:
            yield estimator, asked


@case
def sessions_give_what_they_give_on_the_host(setup: Setup) -> None:
    """One by one, together, and left on the device; they run on the backend's own stream."""
    other = foreign()
    with frames(setup) as (estimator, asked):
        assert estimator.frames is not None
        stream = int(estimator.frames._memory.stream.handle)  # type: ignore[attr-defined]
        assert asked == [{"user_compute_stream": str(stream)}] * 9
        for index, image in enumerate(setup.images):
            close_to(setup, index, estimator(image).prediction)
        for index, geometry in enumerate(estimator.batch(setup.images)):
            close_to(setup, index, geometry.prediction)
        result, _ = estimator.tensors(Image(other, setup.images[1]))
        close_to(setup, 1, Reading(other, result).wait())
        del result, _


@case
def a_frame_through_sessions_is_copied_twice_and_waited_for_once(setup: Setup) -> None:
    """Nothing goes to the host between the networks: one copy there, one back, the same three bindings."""
    with frames(setup) as (estimator, _):
        steps = list(estimator._backend._networks["64x48"]._steppers.values())  # type: ignore[attr-defined]
        for image in 2 * setup.images:
            estimator(image)
        before = setup.driver.statistics()
        with patch.object(Session, "_bound", autospec=True, side_effect=Session._bound) as bound:
            close_to(setup, 0, estimator(setup.images[0]).prediction)
        spent = {name: count - before[name] for name, count in setup.driver.statistics().items()}
        assert spent["allocations"] + spent["reuses"] + spent["pinned allocations"] == 0, spent
        assert (spent["copies"], spent["synchronisations"], spent["graph launches"]) == (2, 1, 0), spent
        assert [call.args[0] for call in bound.call_args_list] == steps
        assert [len(step._bindings) for step in steps] == [1, 1, 1]
        assert {step._options.get_run_config_entry(NO_WAIT[0]) for step in steps} == {NO_WAIT[1]}


@case
def a_session_that_fails_is_an_error(setup: Setup) -> None:
    with frames(setup) as (estimator, _):
        step = estimator._backend._networks["64x48"]._steppers["decoder"]  # type: ignore[attr-defined]
        wrong = patch.object(step._graph.outputs[0].__class__, "shape", [1])
        says = pytest.raises(BackendError, match="ONNX Runtime failed in decoder")
        with patch.object(step, "_bindings", {}), wrong, says:
            estimator(setup.images[0])
        close_to(setup, 0, estimator(setup.images[0]).prediction)
