"""Faults that the tensorrt backend once had, one a function (`case.py`)."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from densegeo.colors import COLORS
from densegeo.errors import BackendError, EngineError
from densegeo.runtime.backends.cuda_array import DeviceArray
from densegeo.runtime.backends.cuda_memory import Memory, check, host_view
from densegeo.runtime.backends.cuda_weights import ALIGNMENT
from densegeo.runtime.backends.tensorrt_network import Network
from densegeo.runtime.tensorfile import tensor_offsets
from densegeo.runtime.verify import relative_error
from densegeo.runtime.ycbcr import from_ycbcr
from tests.cuda.case import case, close_to, foreign, logged, opened, refusing
from tests.cuda.engine_double import WORKSPACE
from tests.cuda.exercise import BOUND, DEVICE, Setup
from tests.cuda.foreign import Image, InterfaceImage, Reading


@case
def cameras_bytes_are_read_as_they_lie(setup: Setup) -> None:
    """Three layouts, on the host and on the device, rows apart: what the same image gives as RGB in float32."""
    random = np.random.default_rng(1)
    for color, shape in (("nv12-bt709", (96, 86)), ("yuyv", (61, 90, 2)), ("uyvy-full", (60, 86, 2))):
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        ycbcr = COLORS[color].ycbcr
        assert ycbcr is not None
        with opened(setup) as estimator:
            expected = estimator(from_ycbcr(pixels, ycbcr)).prediction
            ways, other = [estimator(pixels, color).prediction], foreign()
            for image in (pixels, Image(other, pixels), InterfaceImage(Image(other, pixels), named=True)):
                ways.append(Reading(other, estimator.tensors(image, color)[0]).wait())
        for actual in ways:
            assert relative_error(actual, expected) <= BOUND


@case
def weights_are_aligned(setup: Setup) -> None:
    _, offsets = tensor_offsets(setup.bundle / "denoiser.safetensors")
    assert any(offset % ALIGNMENT for offset in offsets.values()), "this file shows nothing"
    with opened(setup) as estimator:
        _, addresses = estimator._backend._weights["denoiser"]
    assert set(addresses) == set(offsets)
    assert not any(address % ALIGNMENT for address in addresses.values())
    assert not setup.library.misaligned


@case
def refused_address_is_an_error(setup: Setup) -> None:
    with opened(setup) as estimator:
        stepper = estimator._backend._networks["64x48"]._steppers["encoder"]
        with pytest.raises(EngineError, match=re.escape("must be a multiple of 256")):
            stepper.launch(None, {"rgb": 4096 + 16})
        with pytest.raises(EngineError, match=re.escape("refused address 0x1000 for no such tensor")):
            stepper._bind("no such tensor", 4096)
    setup.library.misaligned.clear()


def opening_fails(setup: Setup, step: str, graph: str, says: str) -> None:
    """TensorRT refuses a step for this graph, so the bundle does not open."""
    with refusing(setup, step, graph), pytest.raises(EngineError, match=re.escape(says)), opened(setup):
        pass


@case
def refused_launch_is_an_error(setup: Setup) -> None:
    opening_fails(setup, "launch", "decoder_64x48", "could not launch decoder_64x48")


@case
def no_context_is_an_error(setup: Setup) -> None:
    opening_fails(setup, "context", "denoiser_64x48", "no execution context for denoiser_64x48")


@case
def engine_that_does_not_load_is_an_error(setup: Setup) -> None:
    opening_fails(setup, "engine", "encoder_64x48", "cannot be loaded on this GPU (sm_89)")


@case
def batch_without_room_is_left_out(setup: Setup) -> None:
    with refusing(setup, "context", "denoiser_64x48_b3"), logged() as lines, opened(setup) as estimator:
        assert lines[0].startswith("64x48_b3 is left out: TensorRT made no execution context")
        assert estimator.images_together == 2
        for index, geometry in enumerate(estimator.batch(setup.images)):
            close_to(setup, index, geometry.prediction)
        bucket = next(b for b in estimator.manifest.buckets if b.batch == 3)
        shape = bucket.encoder.inputs[0].shape
        with pytest.raises(EngineError, match=re.escape("no execution context")):
            estimator.replay(np.zeros(shape, np.float32))


@case
def workspace_without_room_leaves_the_largest_out(setup: Setup) -> None:
    allocate = Memory.device_buffer

    def small(self: Memory, size: int, *given: Any) -> Any:
        if size == 3 * WORKSPACE:
            raise BackendError("there is no room")
        return allocate(self, size, *given)

    with patch.object(Memory, "device_buffer", small), logged() as lines, opened(setup) as estimator:
        assert lines == ["64x48_b3 is left out: there is no room"]
        assert estimator.images_together == 2


@case
def weights_are_streamed_as_built(setup: Setup) -> None:
    setup.library.budgets.clear()
    with opened(setup):
        streamed = {engine.file for engine in setup.library.manifest.engines if engine.options}
        assert setup.library.budgets == dict.fromkeys(streamed, 1000)
    with refusing(setup, "budget", "encoder_64x48"):
        setup.library.budgets.clear()
        with pytest.raises(EngineError, match=re.escape("weight streaming budget of encoder_64x48")), opened(setup):
            pass


@case
def input_of_another_size_is_refused(setup: Setup) -> None:
    with opened(setup) as estimator:
        bucket = estimator.manifest.buckets[0]
        small = np.zeros((1, 3, 32, 48), np.float32)
        with pytest.raises(BackendError, match=re.escape("takes [1, 3, 48, 64]")):
            estimator._backend.run(bucket, "encoder", small)


@case
def one_workspace_for_all_buckets(setup: Setup) -> None:
    setup.library.workspaces.clear()
    with opened(setup) as estimator:
        assert len(estimator._backend._networks) == 3
        assert len(setup.library.workspaces) == 1


@case
def kernels_are_compiled_once(setup: Setup) -> None:
    """Until a file is damaged: then its engine's are, and kept again."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "densegeo/tensorrt-rtx"
    shutil.rmtree(folder, ignore_errors=True)
    compiled = setup.library.compiled
    for expected in (9, 0, 1, 0):
        compiled.clear()
        with opened(setup):
            pass
        assert len(compiled) == expected, compiled
        if expected == 0:
            next(folder.iterdir()).write_bytes(b"of another driver")
    assert len(list(folder.iterdir())) == 9


@case
def cache_that_others_can_write_is_not_read(setup: Setup) -> None:
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "densegeo/tensorrt-rtx"
    with opened(setup):
        pass
    next(folder.iterdir()).chmod(0o666)
    setup.library.compiled.clear()
    with opened(setup):
        pass
    assert len(setup.library.compiled) == 1


@case
def forked_process_is_told(setup: Setup) -> None:
    """The driver's threads are the parent's: a child neither waits for them nor takes anything down when it ends."""
    from tests.support.processes import forked

    with opened(setup) as estimator:
        estimator(setup.images[0])
        for answer in (forked(lambda: estimator(setup.images[0])), forked(lambda: estimator.tensors(setup.images[0]))):
            assert answer["said"].startswith("BackendError: This estimator was made before a fork"), answer
        for answer in (forked(estimator.close), forked(lambda: None, ctypes.CDLL(None).exit)):
            assert (answer["said"], answer["status"]) == ("returned", 7), answer
        close_to(setup, 0, estimator(setup.images[0]).prediction)


@case
def request_loads_and_records_nothing(setup: Setup) -> None:
    with opened(setup) as estimator:
        estimator.batch(setup.images)  # buffers are as large as they get
        before = setup.driver.statistics()
        with patch.object(setup.library, "_deserialize", None), patch.object(Memory, "graph", None):
            for index, geometry in enumerate(estimator.batch(setup.images)):
                close_to(setup, index, geometry.prediction)
        after = setup.driver.statistics()
        assert after["pinned allocations"] == before["pinned allocations"]
        assert after["graph launches"] - before["graph launches"] == 2  # three images and two


@case
def failed_recording_is_ended(setup: Setup) -> None:
    enqueue = Network._enqueue

    def failing(self: Network, stream: Any) -> None:
        enqueue(self, stream)
        if stream is not self._memory.stream:
            raise RuntimeError("in the middle of a recording")

    with patch.object(Network, "_enqueue", failing), logged() as lines, opened(setup) as estimator:
        assert len(lines) == 3, lines
        assert all(line.endswith("runs eager: recording failed: in the middle of a recording") for line in lines)
        assert setup.driver.captures == 0
        close_to(setup, 0, estimator(setup.images[0]).prediction)


@case
def array_may_be_dropped_while_something_is_recorded(setup: Setup) -> None:
    """By another thread, and by the one that records."""
    enqueue = Network._enqueue

    def dropping(self: Network, stream: Any) -> None:
        enqueue(self, stream)
        if stream is not self._memory.stream:
            thread = threading.Thread(target=held.pop)
            thread.start()
            thread.join()
            held.pop()

    with opened(setup) as estimator:
        held = [array for image in setup.images[:3] for array in estimator.tensors(image)]
        network = estimator._backend._networks["64x48"]
        with patch.object(Network, "_enqueue", dropping), logged() as lines, estimator._backend._slot() as slot:
            assert network._record(slot) is not None, lines
        assert len(held) == 4


@case
def memory_waits_for_a_reader_of_unknown_stream(setup: Setup) -> None:
    """`__cuda_array_interface__` names no reader: its memory is reused after the whole device."""
    other = foreign()
    with opened(setup) as estimator:
        result, _ = estimator.tensors(setup.images[0])
        described = result.__cuda_array_interface__
        assert described["shape"] == setup.wanted[0].prediction.shape  # type: ignore[union-attr]
        size = 4 * int(np.prod(described["shape"]))
        target = other.pinned_buffer(size)
        other.to_host(target, described["data"][0], size)
        del result, described
        estimator(setup.images[0])
        with other.current():
            other.stream.sync()
        close_to(setup, 0, host_view(target, size).view(np.float32).reshape(setup.wanted[0].prediction.shape))


@case
def memory_waits_until_its_reader_is_no_longer_recorded(setup: Setup) -> None:
    """To wait for a stream that is recorded would make this part of the recording."""
    other = foreign()
    with opened(setup) as estimator, other.current():
        result, _ = estimator.tensors(setup.images[0])
        Reading(other, result).wait()
        mode = other._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        check(other._driver.cuStreamBeginCapture(other.stream.handle, mode))
        del result
        estimator(setup.images[0])
        assert estimator._backend._memory._returned
        check(other._driver.cuStreamEndCapture(other.stream.handle))
        estimator(setup.images[0])
        readers = [readers for _, readers, _ in estimator._backend._memory._returned]
        assert not any(readers)


@case
def memory_outlives_a_stream_that_is_gone(setup: Setup) -> None:
    other = foreign()
    with opened(setup) as estimator:
        result, _ = estimator.tensors(setup.images[0])
        Reading(other, result).wait()
        other.stream.close()
        del result
        estimator(setup.images[0])
    problems = setup.driver.problems
    setup.driver.schedule("lazy")
    assert problems == ["cuEventRecord on a destroyed stream"], problems


@case
def result_outlives_its_estimator(setup: Setup) -> None:
    other = foreign()
    with opened(setup) as estimator:
        result, _ = estimator.tensors(setup.images[1])
    gc.collect()
    reading = Reading(other, result)
    del result, estimator
    close_to(setup, 1, reading.wait())


@case
def dlpack_follows_the_protocol(setup: Setup) -> None:
    with opened(setup) as estimator:
        result, _ = estimator.tensors(setup.images[0])
        assert isinstance(result, DeviceArray)
        assert result.__dlpack_device__() == (2, DEVICE)
        with pytest.raises(BufferError, match=re.escape("ambiguous")):
            result.__dlpack__(stream=0)
        with pytest.raises(BufferError, match=re.escape("neither moved nor copied")):
            result.__dlpack__(dl_device=(1, 0))
        with pytest.raises(BufferError, match=re.escape("neither moved nor copied")):
            result.__dlpack__(copy=True)
        for stream in (None, 1, 2, -1):
            capsule = result.__dlpack__(stream=stream, max_version=(1, 0), dl_device=(2, DEVICE))
            del capsule  # not taken: it frees what it holds
        del result, _
        memory = estimator._backend._memory
        memory.reclaim()
        assert not memory._returned


@case
def image_may_be_overwritten_after_tensors(setup: Setup) -> None:
    """Its producer's memory is free again when the call returns, whatever is still under way."""
    other = foreign()
    with opened(setup) as estimator:
        image = Image(other, setup.images[0])
        results = estimator.tensors(image)
        image.write(np.zeros_like(setup.images[0]))
        with other.current():
            other.stream.sync()
        close_to(setup, 0, Reading(other, results[0]).wait())
        del results  # before the stream that read them


@case
def image_of_another_device_is_refused(setup: Setup) -> None:
    with opened(setup, 0) as estimator:
        image = Image(foreign(), setup.images[0])
        for given in (image, InterfaceImage(image, named=True)):
            with pytest.raises(BackendError, match=re.escape("lies on cuda:1, and this estimator runs on cuda:0")):
                estimator.tensors(given)
