"""What the tensorrt backend costs and takes, by the driver's own counts, one a function (`case.py`)."""

from __future__ import annotations

import gc
import re
from typing import Any
from unittest.mock import patch

import pytest

from densegeo.errors import BackendError, ConfigError
from densegeo.runtime.backends import tensorrt_engines
from densegeo.runtime.backends.cuda_memory import check
from densegeo.runtime.backends.tensorrt_network import Network
from tests.cuda.case import case, close_to, foreign, opened
from tests.cuda.exercise import Setup
from tests.cuda.foreign import Reading


@case
def a_frame_in_the_steady_state_allocates_nothing_and_waits_once(setup: Setup) -> None:
    """By the driver's counts: no memory allocated, one synchronisation, one copy there and one back."""
    with opened(setup) as estimator:
        for image in 2 * setup.images:  # an odd number: each of both slots sees all
            estimator(image)
        for index, image in enumerate(setup.images):
            before = setup.driver.statistics()
            geometry = estimator(image)
            spent = {name: count - before[name] for name, count in setup.driver.statistics().items()}
            close_to(setup, index, geometry.prediction)
            assert spent["allocations"] + spent["reuses"] + spent["pinned allocations"] == 0, spent
            assert spent["synchronisations"] <= 1, spent
            assert (spent["copies"], spent["graph launches"]) == (2, 1), spent


@case
def images_together_are_copied_and_waited_for_once(setup: Setup) -> None:
    """Three images in one launch: one copy there, one back, one synchronisation, no memory."""
    with opened(setup) as estimator:
        for _ in range(2):
            estimator.batch(setup.images[:3])
        before = setup.driver.statistics()
        for index, geometry in enumerate(estimator.batch(setup.images[:3])):
            close_to(setup, index, geometry.prediction)
        spent = {name: count - before[name] for name, count in setup.driver.statistics().items()}
        assert spent["allocations"] + spent["reuses"] + spent["pinned allocations"] == 0, spent
        assert (spent["synchronisations"], spent["copies"], spent["graph launches"]) == (1, 2, 1), spent


@case
def closing_releases_everything(setup: Setup) -> None:
    """Device and pinned memory, streams and recordings, although the estimator is still held."""
    gc.collect()
    before = setup.driver.living()
    with opened(setup) as estimator:
        estimator.batch(setup.images)
        during = setup.driver.living()
    assert all(during[name] > before[name] for name in before), (before, during)
    assert setup.driver.living() == before
    with pytest.raises(BackendError, match="closed"):
        estimator(setup.images[0])
    estimator.close()


@case
def results_that_are_held_are_all_that_stays(setup: Setup) -> None:
    other = foreign()
    gc.collect()
    before = setup.driver.living()
    with opened(setup) as estimator:
        held = estimator.tensors(setup.images[0])
    kept = setup.driver.living()
    assert kept["device blocks"] == before["device blocks"] + 2
    assert (kept["pinned blocks"], kept["graphs"]) == (before["pinned blocks"], before["graphs"])
    close_to(setup, 0, Reading(other, held[0]).wait())
    del held
    gc.collect()
    assert setup.driver.living()["device blocks"] == before["device blocks"]
    assert setup.driver.living()["streams"] == before["streams"]


@case
def opening_that_fails_releases_everything(setup: Setup) -> None:
    gc.collect()
    before = setup.driver.living()
    setup.library.refusing.add(("launch", "engines/decoder_64x48.standin.engine"))
    try:
        with pytest.raises(BackendError, match="could not launch"), opened(setup):
            pass
    finally:
        setup.library.refusing.clear()
    gc.collect()
    assert setup.driver.living() == before


@case
def streams_have_the_priority(setup: Setup) -> None:
    """All three, and the one that recordings are made on."""
    actual: list[int] = []
    enqueue = Network._enqueue

    def noted(self: Network, stream: Any) -> None:
        handle = int(stream.__cuda_stream__()[1])
        actual.append(check(self._memory._driver.cuStreamGetPriority(handle)))
        enqueue(self, stream)

    with patch.object(Network, "_enqueue", noted), opened(setup, priority=-3) as estimator:
        memory = estimator._backend._memory
        for stream in (memory.copying_in, memory.copying_out):
            assert check(memory._driver.cuStreamGetPriority(stream.handle)) == -3
    assert set(actual) == {-3}
    assert len(actual) == 3 * 3  # twice eager, once recorded, for each bucket
    for wrong in (1, -6):
        says = re.escape(f"from -5 (before others) to 0 on cuda:1, not {wrong}")
        with pytest.raises(ConfigError, match=says), opened(setup, priority=wrong):
            pass


@case
def a_limit_says_what_would_fit_before_anything_is_allocated(setup: Setup) -> None:
    gc.collect()
    before = setup.driver.living()["device bytes"]
    needs = []
    require = tensorrt_engines.require_room

    def noted(directory: Any, need: Any, limit: int | None, device: str) -> None:
        needs.append(need)
        require(directory, need, limit, device)

    with patch.object(tensorrt_engines, "require_room", noted):
        with opened(setup, memory_limit=1 << 40):
            taken = setup.driver.living()["device bytes"] - before
        need = needs[0]
        names = list(need.buckets)
        assert taken <= need.of(names) <= 1.1 * taken, (taken, need)
        statistics = setup.driver.statistics()
        first = need.of(names[:1])
        for limit, says in (
            (need.of(names) - 1, f"{names[0]} with {names[1]} would fit"),
            (first, f"{names[0]} would fit"),
            (first - 1, f"Not even {names[0]} alone fits"),
        ):
            with pytest.raises(BackendError, match=says) as caught, opened(setup, memory_limit=limit):
                pass
            assert f"raise memory_limit to {need.of(names)}." in str(caught.value)
        assert setup.driver.statistics() == statistics
        with opened(setup, memory_limit=need.of(names)) as estimator:
            close_to(setup, 0, estimator(setup.images[0]).prediction)
