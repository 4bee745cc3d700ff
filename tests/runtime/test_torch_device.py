"""The ring of buffers and the device path of the torch backend; on a CPU all but CUDA's own part of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from densegeo.errors import BackendError, CalibrationError, ConfigError, ImageError, TensorSizeError  # noqa: E402
from densegeo.kernels.preprocess import preprocess  # noqa: E402
from densegeo.models import chain  # noqa: E402
from densegeo.outputs import Maps  # noqa: E402
from densegeo.runtime import Estimator  # noqa: E402
from densegeo.runtime.backends import torch_device  # noqa: E402
from densegeo.runtime.backends.torch_capture import Replay  # noqa: E402
from densegeo.runtime.backends.torch_device import DeviceNetwork  # noqa: E402
from densegeo.runtime.backends.torch_modules import TorchBackend, require_precision  # noqa: E402
from densegeo.runtime.backends.torch_transfer import RING, Ring  # noqa: E402
from densegeo.runtime.bundle import read_manifest  # noqa: E402
from densegeo.runtime.host_chain import Chain, assemble  # noqa: E402
from densegeo.runtime.resample import choose_bucket, place  # noqa: E402
from densegeo.size import Size  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_ring_pairs_images_with_results(device: str) -> None:
    ring = Ring(device)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (rng.integers(1, 90), rng.integers(1, 90), 3), dtype=np.uint8) for _ in range(60)]

    def compute(frame: Tensor) -> Maps[Tensor]:
        return Maps(frame[..., 0].float() / 2, frame.float())

    groups = [images[start : start + size] for start, size in zip(range(0, 60, 3), (1, 2, 3) * 7, strict=False)]
    with ThreadPoolExecutor(5) as pool:
        results = list(pool.map(lambda group: ring.run(group, lambda frames: [*map(compute, frames)]), groups))
    pairs = [pair for group, result in zip(groups, results, strict=True) for pair in zip(group, result, strict=True)]
    assert len(pairs) == 39
    for image, actual in pairs:
        np.testing.assert_array_equal(actual.normals, image)
        np.testing.assert_array_equal(actual.prediction, image[..., 0] / np.float32(2))


def test_a_failure_gives_its_slot_back() -> None:
    ring, image = Ring("cpu"), np.zeros((2, 2, 3), np.uint8)

    def fail(frames: list[Tensor]) -> list[Maps[Tensor]]:
        raise RuntimeError("launch failed")

    for _ in range(RING + 1):
        with pytest.raises(RuntimeError, match="launch failed"):
            ring.run([image], fail)
    (same,) = ring.run([image], lambda frames: [Maps(normals=frames[0].float())])
    assert same.named()["normals"].shape == image.shape


def test_no_more_than_the_ring_is_in_flight() -> None:
    ring, image = Ring("cpu"), np.zeros((2, 2, 3), np.uint8)
    entered, leave = threading.Semaphore(0), threading.Event()
    running = 0

    def upload_then_wait(frames: list[Tensor]) -> list[Maps[Tensor]]:
        entered.release()
        leave.wait(10)
        return [Maps(frame.float()) for frame in frames]

    with ThreadPoolExecutor(RING + 2) as pool:
        futures = [pool.submit(ring.run, [image], upload_then_wait) for _ in range(RING + 2)]
        assert entered.acquire(timeout=10)
        running = RING - ring._free.qsize()
        leave.set()
        assert all(len(future.result()) == 1 for future in futures)
    assert 1 <= running <= RING


def by_stages(estimator: Estimator, image: np.ndarray, fit: str) -> Maps[np.ndarray]:
    """The maps that numpy makes of what the device's networks return.

    Those are first compared with the backend's single stages. (A normal is a quotient, which magnifies the rounding of
    two networks where it is short, so normals are compared from one and the same network output.)
    """
    size = Size(image.shape[1], image.shape[0])
    bucket = choose_bucket(estimator.manifest.buckets, size)
    placement = place(bucket.size, size, fit)
    rgb = preprocess(torch.from_numpy(image), (bucket.width, bucket.height), box=placement.box)
    backend = estimator._backend
    decoded = backend._network(bucket).recorded(1)(rgb.to(backend.device)).cpu().numpy()
    expected = Chain(backend, estimator.manifest.decode, bucket)(rgb.numpy()).decoded
    bound = 1e-5 if backend.device == "cpu" else 1e-2  # a GPU's products may be TF32
    assert np.linalg.norm(decoded - expected) <= bound * np.linalg.norm(expected)
    return assemble(decoded, placement, estimator.manifest.decode)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fit", ["stretch", pytest.param("pad", marks=pytest.mark.thorough)])
def test_whole_images_give_what_the_stages_give(built: dict[str, Path], device: str, fit: str) -> None:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 90), (200, 120), (17, 16))]
    with Estimator(built["fp32"], "torch", device, fit=fit) as whole:  # type: ignore[arg-type]
        if device == "cpu":
            assert whole.frames is None
            assert "encoder" in whole(images[0]).timings
    with opened_as_on_a_gpu(built["fp32"], device=device, fit=fit) as whole:
        for image in images:
            got = whole(image)
            assert "device" in got.timings
            assert "encoder" not in got.timings
            assert got.source_size == (image.shape[1], image.shape[0])
            wanted = by_stages(whole, image, fit)
            for ours, theirs in ((got.prediction, wanted.prediction), (got.normals, wanted.normals)):
                assert ours.dtype == np.float32
                assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
        assert whole.metrics.snapshot().histograms["device"].count == len(images)
        expected, image = whole(images[0]), images[0].copy()
        future = whole.submit(image)
        image[:] = 0  # the caller may reuse the array at once
        np.testing.assert_array_equal(future.result().prediction, expected.prediction)


@pytest.mark.parametrize("device", DEVICES)
def test_results_may_stay_on_the_device(built: dict[str, Path], device: str) -> None:
    image = np.random.default_rng(2).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    with Estimator(built["fp32"], "torch", device) as estimator:
        expected = by_stages(estimator, image, "stretch")
        for given, color in (
            (torch.from_numpy(image).to(device), "rgb"),
            (torch.from_numpy(image).to(device).flip(2), "bgr"),
            (image, "rgb"),
        ):
            prediction, normals = estimator.tensors(given, color)  # type: ignore[arg-type]
            assert str(prediction.device) == str(normals.device) == device
            for ours, theirs in ((prediction, expected.prediction), (normals, expected.normals)):
                gap = torch.from_dlpack(ours).cpu().numpy() - theirs
                assert np.linalg.norm(gap) <= 1e-5 * np.linalg.norm(theirs)
        metres, _ = estimator.tensors(image, scale=3.4, shift=-0.2, near=0.5, far=20.0)
        depth = np.clip(np.exp(3.4 * expected.prediction - 0.2), 0.5, 20.0)  # type: ignore[operator]
        np.testing.assert_allclose(torch.from_dlpack(metres).cpu().numpy(), depth, rtol=1e-4)
        both = {"scale": 1.0, "shift": 0.0}
        bad_lines: tuple[dict[str, Any], ...] = ({"scale": 1.0}, {"near": 1.0, "far": 2.0}, both | {"scale": -1.0})
        for line in (*bad_lines, both | {"near": 3, "far": 2}, both | {"far": 1e300}, both | {"scale": "1"}):
            with pytest.raises(CalibrationError):
                estimator.tensors(image, **line)
        with pytest.raises(ConfigError, match="color"):
            estimator.tensors(image, "BGR")  # type: ignore[arg-type]
        for bad in (image[..., :2], image.astype(np.float32), image[:8], [1, 2, 3]):
            with pytest.raises(ImageError):
                estimator.tensors(bad)


def test_host_backends_say_that_they_return_host_arrays(built: dict[str, Path]) -> None:
    with Estimator(built["fp32"], "onnxruntime", "cpu") as estimator, pytest.raises(BackendError, match="host arrays"):
        estimator.tensors(np.zeros((60, 90, 3), np.uint8))


@pytest.mark.thorough
@pytest.mark.parametrize("device", DEVICES)
def test_images_run_together_give_what_they_give_alone(built: dict[str, Path], device: str) -> None:
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 90), (48, 64), (96, 128), (60, 80))]
    images += [image[::-1].copy() for image in images]
    images.append(np.full((60, 90, 3), 0.5, np.float32))  # not for the device's own way in
    with opened_as_on_a_gpu(built["fp32"], max_batch=7, device=device) as estimator:
        estimator._runner.together = 7
        alone = [estimator(image) for image in images]
        counts: list[int] = []
        network = estimator._backend._network(estimator.manifest.buckets[0])
        recorded = network.recorded
        network.recorded = lambda count: [counts.append(count), recorded(count)][1]
        together = estimator.batch(iter(images))
        assert sum(counts) == 8
        assert counts == [4, 2, 1, 1]
        futures = [estimator.submit(image) for image in images]
        for queued, grouped, single in zip(futures, together, alone, strict=True):
            for ours in (queued.result(30), grouped):
                assert ours.source_size == single.source_size
                for name in ("prediction", "normals"):
                    a, b = getattr(ours, name), getattr(single, name)
                    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)
        counters = estimator.metrics.snapshot().counters
        assert counters["accepted"] == counters["completed"] == 3 * len(images)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("too much"), "no memory for"),
        (TensorSizeError("too much"), "32-bit offsets do not reach"),
    ],
)
def test_a_group_without_memory_is_run_in_smaller_ones(
    built: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    why: str,
) -> None:
    image = np.random.default_rng(4).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    with Estimator(built["fp32"], "torch", "cpu") as estimator:
        backend = estimator._backend
        bucket = estimator.manifest.buckets[0]
        network, place_ = backend._network(bucket), place(bucket.size, Size(90, 60), "stretch")
        recorded, tried = network.recorded, []

        def recorded_if_small(count: int) -> Replay:
            tried.append(count)
            if count > 2:
                raise error
            return recorded(count)

        monkeypatch.setattr(network, "recorded", recorded_if_small)
        with caplog.at_level(logging.WARNING, "densegeo"):
            assert len(backend.estimate(bucket, [image] * 8, [place_] * 8)) == 8
            assert len(backend.estimate(bucket, [image] * 4, [place_] * 4)) == 4
        assert tried == [8, 4, 2, 2, 2, 2, 2, 2]  # the limit is remembered
        assert caplog.text.count(why) == 2
        monkeypatch.setattr(network, "recorded", lambda count: (_ for _ in ()).throw(type(error)("none")))
        with pytest.raises(BackendError, match="none"):
            backend.estimate(bucket, [image], [place_])


def test_pictures_without_memory_are_decoded_one_by_one(
    built: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = np.random.default_rng(5).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    with Estimator(built["fp32"], "torch", "cpu") as estimator:
        backend, bucket = estimator._backend, estimator.manifest.buckets[0]
        where = place(bucket.size, Size(90, 60), "stretch")
        (first,) = backend.estimate(bucket, [image], [where])
        network = backend._network(bucket)
        vae, sizes = network._pipeline.vae, []

        def small(latents: torch.Tensor) -> torch.Tensor:
            sizes.append(len(latents))
            if len(latents) > 1:
                raise torch.OutOfMemoryError("no memory")
            return vae.decoder(latents)

        network._replays.clear()
        monkeypatch.setattr(network._pipeline, "vae", SimpleNamespace(encoder=vae.encoder, decoder=small))
        with caplog.at_level(logging.WARNING, "densegeo"):
            (again,) = backend.estimate(bucket, [image], [where])
        assert sizes[0] == 2
        assert set(sizes[1:]) == {1}
        assert caplog.text.count("one by one from now on") == 1
        gaps = again.prediction - first.prediction, again.normals - first.normals
        assert np.linalg.norm(gaps[0]) <= 1e-5 * np.linalg.norm(first.prediction)
        assert np.linalg.norm(gaps[1]) <= 1e-4 * np.linalg.norm(first.normals)


def noting(notes: list[str], name: str, real: Callable[..., Any], *given: Any, **named: Any) -> Any:
    notes.append(name)
    return real(*given, **named)


def opened_as_on_a_gpu(bundle: Path, max_batch: int = 8, device: str = "cpu", fit: str = "stretch") -> Estimator:
    manifest = read_manifest(bundle)
    backend = TorchBackend(bundle, manifest, device, frames_on_cpu=True)
    return Estimator.from_backend(backend, manifest, fit=fit, max_batch=max_batch)  # type: ignore[arg-type]


def test_opening_pays_for_every_size_and_batch(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made, recorded or launched for the first time in a request."""
    image = np.random.default_rng(6).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    launched: list[str] = []
    for module, name in ((torch_device, "preprocess"), (chain, "resize_depth"), (chain, "normals")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, partial(noting, launched, name, real))
    with opened_as_on_a_gpu(built["fp32"], max_batch=3) as estimator:
        backend, buckets = estimator._backend, estimator.manifest.buckets
        assert len(buckets) > 1
        for bucket in buckets:
            assert set(backend._network(bucket)._replays) == {1, 2}
        assert launched == ["preprocess", "resize_depth", "normals"] * len(buckets)
        assert estimator.images_together == 2
        monkeypatch.setattr(torch_device, "Replay", lambda *given: pytest.fail("recorded in a request"))
        assert len(estimator.batch([image] * 3)) == 3


def test_what_does_not_fit_is_left_out_when_opening(
    built: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = DeviceNetwork.recorded
    first, second = read_manifest(built["fp32"]).buckets[:2]
    image = np.random.default_rng(7).integers(0, 256, (first.height, first.width, 3), dtype=np.uint8)

    def little_memory(network: DeviceNetwork, count: int) -> Replay:
        if count > 2 or network._size != first.size:
            raise torch.OutOfMemoryError("no memory")
        return recorded(network, count)

    monkeypatch.setattr(DeviceNetwork, "recorded", little_memory)
    with caplog.at_level(logging.WARNING, "densegeo"), opened_as_on_a_gpu(built["fp32"], max_batch=8) as estimator:
        assert f"{second.width}x{second.height} is left out" in caplog.text
        assert estimator.images_together == 2
        assert len(estimator.batch([image] * 3)) == 3
        with pytest.raises(BackendError, match="no memory"):
            estimator._backend.estimate(second, [image], [place(second.size, Size(9, 9), "stretch")])
    monkeypatch.setattr(DeviceNetwork, "recorded", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(BackendError, match="none"):
        opened_as_on_a_gpu(built["fp32"], max_batch=8)


def test_bf16_is_refused_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, fp16 = SimpleNamespace(base="bf16"), SimpleNamespace(base="fp16")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: {"cuda:0": (7, 5), "cuda:1": (8, 0)}[device]
    )
    for manifest, device in ((bf16, "cpu"), (bf16, "cuda:1"), (fp16, "cuda:0")):
        require_precision(manifest, device)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"cuda:0 is sm_75: .*--precision fp16"):
        require_precision(bf16, "cuda:0")  # type: ignore[arg-type]
