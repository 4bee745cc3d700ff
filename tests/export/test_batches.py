"""Graphs that take several images at once: every image gets what it gets alone, whatever its neighbours are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from densegeo.benchmarks.latency import run
from densegeo.errors import ConfigError
from densegeo.export.build_options import BuildOptions
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import Bucket, Stage, read_manifest
from densegeo.runtime.tensorfile import read_tensors
from densegeo.runtime.verify import alternating, relative_error, run_stages, verify, within
from tests.support.shared import Build

BOUND = 1e-5  # relative L2 norm


def recorded(estimator: Estimator) -> list[tuple[str, Stage]]:
    """What the backend is asked to run from now on: (bucket, stage)."""
    seen: list[tuple[str, Stage]] = []
    backend = estimator._backend
    run = backend.run

    def noting(bucket: Bucket, stage: Stage, array: NDArray[Any]) -> NDArray[np.float32]:
        seen.append((bucket.name, stage))
        return run(bucket, stage, array)

    backend.run = noting  # type: ignore[method-assign]
    return seen


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "precision", "without"),
    [
        ("fe2e", "fp32", ()),
        pytest.param("fe2e", "fp32", ("decoder",), marks=pytest.mark.slow),  # a decoder run for each picture
        pytest.param("fe2e", "bf16", ("decoder",), marks=pytest.mark.slow),  # minutes where a CPU has no bf16
        ("fiffdepth", "fp32", ()),
    ],
)
def test_images_of_a_batch_get_what_they_get_alone(
    model: str, precision: str, without: tuple[str, ...], batched_bundle: Build
) -> None:
    bundle = batched_bundle(model, precision=precision, without=without)
    manifest = read_manifest(bundle)
    names = ["64x48", "64x48_b2", "64x48_b3"]
    assert [bucket.name for bucket in manifest.buckets] == names
    assert {check.bucket for check in manifest.verification.checks} == set(names)
    backends = ("torch", "openvino") if manifest.precision == "bf16" else ("onnxruntime", "torch")
    bound = manifest.verification.replay_bound if manifest.precision == "bf16" else BOUND
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (40 + index, 60, 3), dtype=np.uint8) for index in range(6)]
    for backend in backends:
        assert verify(bundle, backend, "cpu").wrong == []
        with Estimator(bundle, backend, "cpu") as estimator:
            inputs = bundle / manifest.verification.inputs
            checks = run_stages(estimator, read_tensors(inputs), inputs)
            assert [check for check in checks if not within(check)] == []
            assert {check.bucket for check in checks} == set(names)
            alone = [estimator(image) for image in images]
            seen = recorded(estimator)
            together = estimator.batch(images)
            assert [bucket for bucket, stage in seen if stage == "encoder"] == ["64x48_b3", "64x48_b3"]
            seen.clear()
            five = estimator.batch(images[:5])
            assert [bucket for bucket, stage in seen if stage == "denoiser"] == ["64x48_b3", "64x48_b2"]
        for single, batched in [*zip(alone, together, strict=True), *zip(alone, five, strict=False)]:
            assert batched.prediction.shape == single.prediction.shape
            assert relative_error(batched.prediction, single.prediction) <= bound
            assert (single.normals is None) == (model == "fiffdepth")
            if single.normals is not None and batched.normals is not None:
                # short normals magnify rounding when they are made unit length: most must agree closely
                assert np.median(np.abs(batched.normals - single.normals)) <= bound


@pytest.mark.thorough
def test_submitted_images_share_a_batch(batched_bundle: Build) -> None:
    bundle = batched_bundle("fe2e")
    images = [np.full((48, 64, 3), 40 * index, np.uint8) for index in range(4)]
    with Estimator(bundle, "onnxruntime", "cpu", max_batch=2, max_wait_ms=10_000) as estimator:
        alone = [estimator(image) for image in images]
        seen = recorded(estimator)
        futures = [estimator.submit(image) for image in images]
        for future, single in zip(futures, alone, strict=True):
            assert relative_error(future.result(60).prediction, single.prediction) <= BOUND
    assert [bucket for bucket, stage in seen if stage == "encoder"] == ["64x48_b2", "64x48_b2"]  # not b3: max_batch


@pytest.mark.thorough
def test_bench_reports_batches(batched_bundle: Build, tmp_path: Path) -> None:
    result, _ = run(batched_bundle("fe2e"), image=None, runs=3, backend="onnxruntime", device="cpu")
    assert sorted(result.batched_per_second) == ["2", "3"]
    assert min(result.batched_per_second.values()) > 0
    work = result.stages["total"].gflops * result.stages["total"].p50
    (single, *_) = read_manifest(batched_bundle("fe2e")).buckets
    flops = sum(graph.flops for graph in (single.encoder, single.denoiser, single.decoder))
    assert work * 1e6 == pytest.approx(flops)  # one picture is decoded, once


@pytest.mark.thorough
def test_a_batch_of_mixed_up_images_fails_verification(batched_bundle: Build) -> None:
    """The check can fail: the stored pictures differ, and so does a batch of them from its mirror image."""
    bundle = batched_bundle("fe2e")
    manifest = read_manifest(bundle)
    tensors = read_tensors(bundle / manifest.verification.inputs)
    stored = [
        {name: tensors[f"64x48.{index}.{name}"] for name in ("rgb", "encoder", "denoiser", "decoder", "prediction")}
        for index in range(2)
    ]
    expected, mirrored = alternating(stored, 2), alternating(stored[::-1], 2)
    assert expected["decoder"].shape == (4, 3, 48, 64)
    np.testing.assert_array_equal(expected["decoder"][:2], np.stack([one["decoder"][0] for one in stored]))
    for name in expected:
        assert relative_error(mirrored[name], expected[name]) > 100 * BOUND, name


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"batches": (0,)}, "--batch must be 1 to 64 images, not 0"),
        ({"batches": (65,)}, "--batch must be 1 to 64 images, not 65"),
        ({"batches": (2,), "without": ("guidance",)}, "--batch needs the rewrite guidance"),
        (
            {"model": "fiffdepth", "batches": (2,), "sizes": ((70, 45),), "any_size": True},
            "--batch needs sides that are multiples of 8, unlike 70x45",
        ),
    ],
)
def test_impossible_batches_are_refused(others: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildOptions(**{"model": "fe2e", "output": tmp_path} | others).validated()


def test_one_image_a_batch_is_the_default(tmp_path: Path) -> None:
    assert BuildOptions(model="fe2e", output=tmp_path, batches=(4, 1, 2, 4)).validated().batches == (2, 4)
