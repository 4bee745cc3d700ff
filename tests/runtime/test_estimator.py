"""Image to Geometry through a real (tiny) bundle on ONNX Runtime, and every way a bundle can be bad."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densegeo.backends import BACKENDS, backend_row
from densegeo.errors import (
    BackendError,
    BundleError,
    ConfigError,
    DigestError,
    ImageError,
    SchemaVersionError,
)
from densegeo.extras import install_hint
from densegeo.runtime import Estimator
from densegeo.runtime.backends import open_backend
from densegeo.runtime.backends import ort as ort_module
from densegeo.runtime.backends.ort import choose_provider
from densegeo.runtime.bundle import read_manifest
from densegeo.runtime.resample import resize_plain

pytest.importorskip("onnxruntime")

ORT = backend_row("onnxruntime")


def expected_of(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the toy bundle must give for a 64x48 uint8 image, computed apart from the code under test."""
    rgb = pixels.astype(np.float64) / 255 * 2 - 1
    pooled = rgb.reshape(6, 8, 8, 8, 3).mean(axis=(1, 3))
    depth, normals = (np.clip(sign * pooled / 0.5 + 0.1, -1, 1).repeat(8, 0).repeat(8, 1) for sign in (-1, 0.5))
    return depth.mean(-1) / 2 + 0.5, -normals / np.linalg.norm(normals, axis=-1, keepdims=True)


@pytest.fixture
def small() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("decoder_batch", [1, 2])
def test_one_image(new_bundle: Callable[..., Path], small: np.ndarray, decoder_batch: int) -> None:
    with Estimator(new_bundle(decoder_batch=decoder_batch)) as estimator:
        result = estimator(small)
    prediction, normals = expected_of(small)
    assert result.depth_kind == "log_affine"
    assert result.prediction.dtype == np.float32
    assert result.normals.dtype == np.float32
    np.testing.assert_allclose(result.prediction, prediction, atol=1e-5)
    np.testing.assert_allclose(result.normals, normals, atol=1e-4)
    assert result.valid.all()
    assert (result.source_size, result.model) == ((64, 48), "toy")
    spans = dict(result.timings)
    assert list(spans) == ["load", "prepare", "encoder", "denoiser", "split", "decoder", "finish", "total"]
    assert all(span > 0 for span in spans.values())
    assert spans.pop("total") == pytest.approx(sum(spans.values()))


def test_outputs_have_the_sources_size(bundle: Path, picture: np.ndarray) -> None:
    estimator = Estimator(bundle)
    for fit in ("stretch", "pad"):
        result = Estimator(bundle, fit=fit)(picture[:33, :51])
        assert result.prediction.shape == (33, 51)
        assert result.normals.shape == (33, 51, 3)
        np.testing.assert_allclose(np.linalg.norm(result.normals, axis=-1), 1, atol=1e-5)
    # enlarging: the prediction itself is resized, plain bilinear
    enlarged = np.asarray(Image.fromarray(picture).resize((200, 150), Image.Resampling.BICUBIC))
    result = estimator(enlarged)
    rgb = Image.fromarray(enlarged)
    assert result.source_size == rgb.size
    (inner,) = estimator.replay(_input(enlarged))["prediction"]
    np.testing.assert_allclose(result.prediction, resize_plain(inner, 200, 150), atol=1e-6)


def _input(pixels: np.ndarray) -> np.ndarray:
    planes = [
        Image.fromarray(pixels[..., c].astype(np.float32) / 255).resize((64, 48), Image.Resampling.BILINEAR)
        for c in range(3)
    ]
    return (np.stack([np.asarray(plane) for plane in planes])[None] * 2 - 1).astype(np.float32)


def test_pad_leaves_the_aspect_alone(bundle: Path) -> None:
    wide = np.zeros((24, 64, 3), np.uint8)
    wide[:, 32:] = 255  # the step must stay in the middle, and rows equal, after padding is cropped
    result = Estimator(bundle, fit="pad")(wide)
    np.testing.assert_allclose(result.prediction, np.tile(result.prediction[0], (24, 1)), atol=1e-5)
    np.testing.assert_allclose(result.prediction[0] + result.prediction[0, ::-1], result.prediction[0, [0, -1]].sum())


def test_bgr_and_files_agree_with_arrays(bundle: Path, small: np.ndarray, tmp_path: Path) -> None:
    estimator = Estimator(bundle)
    Image.fromarray(small).save(tmp_path / "a.png")
    expected = estimator(small)
    for result in (estimator(small[..., ::-1], "bgr"), estimator(tmp_path / "a.png")):
        np.testing.assert_array_equal(result.prediction, expected.prediction)
        np.testing.assert_array_equal(result.normals, expected.normals)
    assert not np.array_equal(estimator(small[..., ::-1]).normals, expected.normals)


def test_batch_keeps_order_and_sizes(bundle: Path, small: np.ndarray, picture: np.ndarray) -> None:
    estimator = Estimator(bundle)
    results = estimator.batch([small, picture, small])
    assert [r.source_size for r in results] == [(64, 48), (96, 72), (64, 48)]
    np.testing.assert_array_equal(results[2].prediction, estimator(small).prediction)
    assert estimator.batch([]) == []
    with pytest.raises(ImageError):
        estimator.batch([small, None])


def test_the_bucket_follows_the_aspect_ratio(new_bundle: Callable[..., Path], picture: np.ndarray) -> None:
    estimator = Estimator(new_bundle(sizes=((64, 48), (48, 64))))
    shapes = []
    original = estimator._backend.run

    def spy(bucket: object, stage: object, array: np.ndarray) -> np.ndarray:
        shapes.append(array.shape)
        return original(bucket, stage, array)

    estimator._backend.run = spy
    estimator(picture)
    estimator(picture.transpose(1, 0, 2))
    assert [shape[2:] for shape in shapes[::3]] == [(48, 64), (64, 48)]


def test_replay_gives_every_stage(bundle: Path, small: np.ndarray) -> None:
    outputs = Estimator(bundle).replay(_input(small))
    assert {name: array.shape for name, array in outputs.items()} == {
        "encoder": (1, 4, 6, 8),
        "denoiser": (1, 24, 16),
        "decoder": (2, 3, 48, 64),
        "prediction": (1, 48, 64),
        "normals": (1, 48, 64, 3),
    }
    np.testing.assert_allclose(outputs["prediction"][0], expected_of(small)[0], atol=1e-5)
    with pytest.raises(ConfigError, match="bucket"):
        Estimator(bundle).replay(np.zeros((1, 3, 48, 48), np.float32))


def test_threads_agree_with_serial_calls(
    new_bundle: Callable[..., Path], run_in_threads: Callable[..., list[object]]
) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (40 + 9 * i, 70 - 9 * i, 3), dtype=np.uint8) for i in range(4)]
    directory = new_bundle(sizes=((64, 48), (48, 64)))  # the second bucket is loaded by whichever thread needs it
    serial = Estimator(directory).batch(images)
    shared = Estimator(directory)
    runs = run_in_threads(lambda index: [shared(images[(index + i) % 4]) for i in range(8)], 4)
    for index, results in enumerate(runs):
        assert isinstance(results, list), results
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result.prediction, serial[(index + i) % 4].prediction)
            np.testing.assert_array_equal(result.normals, serial[(index + i) % 4].normals)


def test_threads_may_share_a_lazy_pillow_image(
    bundle: Path, small: np.ndarray, tmp_path: Path, run_in_threads: Callable[..., list[object]]
) -> None:
    large = np.tile(small, (30, 30, 1))  # decoding takes long enough for the threads to meet
    Image.fromarray(large).save(tmp_path / "a.png")
    estimator = Estimator(bundle)
    expected = estimator(large).prediction
    with Image.open(tmp_path / "a.png") as image:
        for result in run_in_threads(lambda _: estimator(image).prediction, 4):
            assert isinstance(result, np.ndarray), result
            np.testing.assert_array_equal(result, expected)


def test_authors_preprocessing_names_the_missing_size(bundle: Path, small: np.ndarray) -> None:
    estimator = Estimator(bundle, preprocessing="authors")
    with pytest.raises(BundleError, match="--size 1024x768"):
        estimator(small)


def test_max_pixels(bundle: Path, small: np.ndarray) -> None:
    with pytest.raises(ImageError, match="million"):
        Estimator(bundle, max_pixels=3000)(small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "crop"}, "fit"),
        ({"preprocessing": "mine"}, "preprocessing"),
        ({"preprocessing": "authors", "fit": "pad"}, "stretch"),
        ({"backend": "tpu"}, "onnxruntime"),
        ({"device": "tpu"}, "device"),
        ({"device": "cpu:1"}, "device"),
    ],
)
def test_bad_options(bundle: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Estimator(bundle, **options)


def test_no_bundle(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError, match="not a densegeo bundle"):
            Estimator(directory)


def edit_manifest(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unknown_schema_version(new_bundle: Callable[..., Path]) -> None:
    directory = new_bundle()
    edit_manifest(directory, schema_version=99, something_new=True)
    with pytest.raises(SchemaVersionError, match="99"):
        Estimator(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 2}', '{"schema_version": "1"}', "\xff\x00"])
def test_malformed_manifest(new_bundle: Callable[..., Path], text: str) -> None:
    directory = new_bundle()
    (directory / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match="manifest"):
        Estimator(directory)


def test_no_buckets(new_bundle: Callable[..., Path]) -> None:
    directory = new_bundle()
    edit_manifest(directory, buckets=[])
    with pytest.raises(BundleError, match="--size"):
        Estimator(directory)


def test_corrupted_file(new_bundle: Callable[..., Path]) -> None:
    directory = new_bundle()
    path = directory / "decoder_64x48.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestError, match="decoder_64x48"):
        Estimator(directory)


def test_truncated_file_is_seen_without_digests(new_bundle: Callable[..., Path]) -> None:
    directory = new_bundle()
    path = directory / "decoder_64x48.onnx"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DigestError, match="truncated"):
        Estimator(directory, check_digests=False)


def test_missing_graph(new_bundle: Callable[..., Path]) -> None:
    directory = new_bundle()
    (directory / "encoder_64x48.onnx").unlink()
    with pytest.raises(BundleError, match="encoder_64x48"):
        Estimator(directory)
    files = json.loads((directory / "manifest.json").read_text())["files"]
    files.pop("encoder_64x48.onnx")
    edit_manifest(directory, files=files)  # not listed either
    with pytest.raises(BundleError, match="encoder_64x48"):
        Estimator(directory)


def test_a_graph_onnxruntime_cannot_load(new_bundle: Callable[..., Path]) -> None:
    directory = new_bundle()
    path = directory / "encoder_64x48.onnx"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(BackendError, match="cannot load"):
        Estimator(directory, check_digests=False)


def test_a_graph_that_differs_from_the_manifest(new_bundle: Callable[..., Path], small: np.ndarray) -> None:
    directory = new_bundle()
    buckets = json.loads((directory / "manifest.json").read_text())["buckets"]
    buckets[0]["encoder"]["inputs"][0]["name"] = "other"
    edit_manifest(directory, buckets=buckets)
    with pytest.raises(BackendError, match="encoder_64x48"):
        Estimator(directory)(small)
    buckets[0]["encoder"]["inputs"][0]["shape"] = [1, 3, 8, 8]
    edit_manifest(directory, buckets=buckets)
    with pytest.raises(BackendError, match="shape"):
        Estimator(directory)(small)


def test_bf16_on_the_cpu_provider(new_bundle: Callable[..., Path]) -> None:
    with pytest.raises(BackendError, match=r"no bf16.*--precision fp32"):
        Estimator(new_bundle(precision="bf16"), backend="onnxruntime", device="cpu")


def test_cuda_without_its_provider() -> None:
    with pytest.raises(BackendError, match=re.escape(install_hint("gpu"))):
        choose_provider(ORT, "cuda", ["CPUExecutionProvider"])


def test_provider_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert choose_provider(ORT, "cuda:1", both) == ("CUDAExecutionProvider", "cuda:1")
    assert choose_provider(ORT, "cpu", both) == ("CPUExecutionProvider", "cpu")
    monkeypatch.setattr(ort_module, "has_cuda_driver", lambda: False)
    assert choose_provider(ORT, "auto", both)[1] == "cpu"
    monkeypatch.setattr(ort_module, "has_cuda_driver", lambda: True)
    assert choose_provider(ORT, "auto", both)[1] == "cuda:0"


def test_a_cpu_beside_a_gpu_is_warned_of(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_manifest(bundle)
    row = next(row for row in BACKENDS if row.name == "onnxruntime")
    monkeypatch.setattr("densegeo.runtime.backends.BACKENDS", (row,))
    open_backend("auto", bundle, manifest, "auto").close()
    assert not caplog.records
    monkeypatch.setattr("densegeo.runtime.backends.has_cuda_driver", lambda: True)
    open_backend("auto", bundle, manifest, "cpu").close()
    assert not caplog.records
    open_backend("auto", bundle, manifest, "auto").close()
    (record,) = caplog.records
    assert "runs on the CPU with onnxruntime, although an NVIDIA driver is here" in record.getMessage()


def test_no_backend_installed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = next(row for row in BACKENDS if row.name == "onnxruntime")
    row = dataclasses.replace(known, modules=("a_library_nobody_has",))
    monkeypatch.setattr("densegeo.runtime.backends.BACKENDS", (row,))
    with pytest.raises(BackendError, match=re.escape(install_hint("cpu"))):
        open_backend("auto", bundle, read_manifest(bundle), "auto")


def test_closed(bundle: Path, small: np.ndarray) -> None:
    with Estimator(bundle) as estimator:
        assert estimator.device == "cpu" or estimator.device.startswith("cuda")
        estimator(small)
    with pytest.raises(BackendError, match="closed"):
        estimator(small)
    estimator.close()
