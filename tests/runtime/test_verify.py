"""Verification goes the way of images: it passes where that is right, and notices any stage of it that is broken."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from densegeo.cli import main
from densegeo.errors import BackendError, BundleError
from densegeo.runtime import Estimator, faults, verify
from densegeo.runtime.bundle import Bucket, read_manifest, write_manifest
from densegeo.runtime.tensorfile import read_tensors
from densegeo.runtime.verified import findings, is_verified
from densegeo.runtime.ways import HostWay, Job
from densegeo.size import Size

HOST = ("preprocess", "split", "resize", "normals")
NewBundle = Callable[..., Path]


def command(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """Exit code and lines of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return int(end.value.code or 0), (out + err).strip().splitlines()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_broken_stage_of_the_host_is_noticed(
    backend: str, toy_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(backend)
    line = ("verify", toy_bundle, "--backend", backend, "--device", "cpu")
    code, said = command(capfd, *line)
    assert (code, said[-1]) == (0, f"verified: with {backend} the numbers come out right on cpu")
    assert is_verified(toy_bundle, backend)
    for stage in HOST:
        code, said = command(capfd, *line, "--break", stage)
        assert code == 1
        assert stage in said[-1]
    assert is_verified(toy_bundle, backend)  # what was broken on purpose says nothing of it
    for stage in ("graph", "fused"):
        code, said = command(capfd, *line, "--break", stage)
        assert code == 2
        assert f"pass no {stage} stage" in re.sub(r"[│\s]+", " ", " ".join(said))  # the usage error is in a box


@pytest.mark.thorough
def test_a_broken_stage_of_torchs_way_on_a_device_is_noticed(
    small_bundle: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = small_bundle()
    line = ("verify", bundle, "--backend", "torch", "--frames-on-cpu")
    assert command(capfd, *line)[0] == 0
    assert not is_verified(bundle, "torch")  # nobody is served that way on a CPU
    for stage in faults.STAGES:
        code, said = command(capfd, *line, "--break", stage)
        assert code == 1
        assert stage in said[-1]


@pytest.mark.thorough
def test_a_model_without_normals_has_fewer_stages(fiffdepth_bundle: Callable[..., Path]) -> None:
    from tests.support.diffusers_checkpoint import CASES

    with Estimator(fiffdepth_bundle(CASES[0]), "onnxruntime", "cpu") as estimator:
        assert set(faults.stages(estimator)) == {"preprocess", "resize"}


def test_every_way_to_send_images_counts(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("submit", "batch", "__call__"):
        real = getattr(Estimator, name)

        def wrong(self: Estimator, given: object, real: Callable[..., object] = real) -> object:
            if isinstance(given, list):
                return real(self, [image[::-1] for image in given])
            return real(self, given[::-1])  # type: ignore[index]

        with monkeypatch.context() as patch:
            patch.setattr(Estimator, name, wrong)
            verdict = verify.verify(toy_bundle, "onnxruntime", "cpu")
        ways = {"__call__": ["estimator(image)"], "batch": ["batch of 1", "batch of 2"]}.get(name, [name])
        off = {check.reference for check in verdict.served if not verify.within(check)}
        assert off == {f"stored float32: {way}" for way in ways}
        assert not is_verified(toy_bundle, "onnxruntime")
        assert verdict.stages
        assert all(verify.within(check) for check in verdict.stages)  # it is not theirs
    assert verify.verify(toy_bundle, "onnxruntime", "cpu").good
    assert is_verified(toy_bundle, "onnxruntime")


def test_auto_is_noted_for_the_backend_that_ran(new_bundle: NewBundle) -> None:
    bundle = new_bundle(references=1.0)
    verdict = verify.verify(bundle)
    assert is_verified(bundle, verdict.backend)
    assert not is_verified(bundle, "auto")


def test_a_wrong_bundle_is_named_with_its_first_wrong_stage(new_bundle: NewBundle) -> None:
    bundle = new_bundle(references=1.1)
    verdict = verify.verify(bundle, "onnxruntime", "cpu")
    assert verdict.wrong[0].output == "encoder"
    (actual,) = [one for one in findings() if one.bundle == str(bundle)]  # as `densegeo doctor` tells
    assert (actual.backend, actual.good) == ("onnxruntime", False)
    assert "encoder at 64x48" in actual.said
    with pytest.raises(BackendError, match=r"No speed: .*encoder at 64x48 .* off by 9\.1e-02.*densegeo verify"):
        verdict.require_good(bundle, "No speed: ")


@pytest.mark.parametrize(
    ("lost", "said"),
    [(".image", "has 0 of the 2 pictures that 64x48 is verified with"), (".image_normals", "64x48.0.image_normals")],
)
def test_a_bundle_without_its_pictures_is_refused(lost: str, said: str, new_bundle: NewBundle) -> None:
    bundle = new_bundle(references=1.0)
    path = bundle / read_manifest(bundle).verification.inputs
    save_file({name: array for name, array in read_tensors(path).items() if not name.endswith(lost)}, path)
    manifest = read_manifest(bundle)
    record = msgspec.structs.replace(manifest.files[path.name], bytes=path.stat().st_size)
    write_manifest(bundle, msgspec.structs.replace(manifest, files=manifest.files | {path.name: record}))
    with pytest.raises(BundleError, match=said):
        verify.verify(bundle, "onnxruntime", "cpu")


def test_pictures_have_odd_sizes_that_their_size_serves() -> None:
    pytest.importorskip("torch")
    from densegeo.export.checks import picture_sizes, seeded_picture
    from densegeo.runtime.resample import nearest

    for sizes in (((1024, 768),), ((864, 576), (1024, 768), (768, 1024)), ((70, 45),), ((64, 32), (48, 32), (96, 64))):
        actual = picture_sizes([Size(*size) for size in sizes])
        assert list(actual) == list(sizes)
        for size, pictures in actual.items():
            assert len(pictures) == 2
            assert all(nearest([*actual], picture) == size for picture in pictures)
        larger = [pictures[0] for pictures in actual.values()]
        assert all(w > size[0] and h > size[1] for (w, h), size in zip(larger, sizes, strict=True))
        assert all(side % 2 for pictures in actual.values() for picture in pictures for side in picture)
        assert any(width < height for pictures in actual.values() for width, height in pictures)
    assert np.std(seeded_picture(Size(31, 57)).astype(float)) > 20


@pytest.mark.thorough
def test_every_size_of_a_batch_is_verified(batched_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """A wrong graph for two images beside right ones for one and three."""
    onnx = pytest.importorskip("onnx")
    bundle = shutil.copytree(batched_bundle("fe2e"), tmp_path / "bundle")
    manifest = read_manifest(bundle)
    assert [bucket.batch for bucket in manifest.buckets] == [1, 2, 3]
    path = bundle / manifest.buckets[1].denoiser.file
    model = onnx.load(path, load_external_data=False)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Neg", ["before"], [output]))
    onnx.save(model, path)
    record = msgspec.structs.replace(manifest.files[path.name], bytes=path.stat().st_size)
    write_manifest(bundle, msgspec.structs.replace(manifest, files=manifest.files | {path.name: record}))
    wrong = verify.verify(bundle, "onnxruntime", "cpu").wrong
    assert {check.reference for check in wrong if "batch" in check.reference} == {"stored float32: batch of 2"}


@pytest.mark.thorough
def test_images_changed_over_within_a_batch_are_noticed(
    batched_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = HostWay._at_once

    def third_is_the_first_again(self: HostWay, bucket: Bucket, jobs: list[Job]) -> object:
        actual = real(self, bucket, jobs)
        return [*actual[:2], *(actual[index - 2] for index in range(2, len(actual)))]

    monkeypatch.setattr(HostWay, "_at_once", third_is_the_first_again)
    wrong = verify.verify(batched_bundle("fe2e"), "onnxruntime", "cpu").wrong
    assert "stored float32: batch of 3" in {check.reference for check in wrong}


def test_a_manifest_without_a_bound_or_a_digest_is_refused(new_bundle: NewBundle) -> None:
    bundle = new_bundle(references=1.0)
    manifest = read_manifest(bundle)
    unbounded = msgspec.structs.replace(manifest.verification, bounds={"prediction": 1.0})
    for changed, said in (({"verification": unbounded}, "no bound for normals"), ({"files": {}}, "without its digest")):
        write_manifest(bundle, msgspec.structs.replace(manifest, **changed))
        with pytest.raises(BundleError, match=said):
            verify.verify(bundle, "onnxruntime", "cpu")
    none = msgspec.structs.replace(manifest.buckets[0], batch=0)
    write_manifest(bundle, msgspec.structs.replace(manifest, buckets=[none]))
    with pytest.raises(BundleError, match="not a valid manifest"):
        read_manifest(bundle)
