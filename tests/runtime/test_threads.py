"""`threads=` reaches each CPU backend's pool, and `resolution=` leaves results as the network made them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from densegeo.errors import ConfigError
from densegeo.runtime import Estimator


def test_onnxruntime_s_pool(toy_bundle: Path) -> None:
    pytest.importorskip("onnxruntime")
    with Estimator(toy_bundle, "onnxruntime", "cpu", threads=1) as estimator:
        sessions = list(estimator._backend._graphs.values())
        assert [session.get_session_options().intra_op_num_threads for session in sessions] == [1, 1, 1]
    with Estimator(toy_bundle, "onnxruntime", "cpu") as estimator:
        assert {s.get_session_options().intra_op_num_threads for s in estimator._backend._graphs.values()} == {0}


def test_onnxruntime_s_threads_rest_after_a_run(toy_bundle: Path) -> None:
    """Those of one session would otherwise take the processors from the next one's: one image runs three."""
    pytest.importorskip("onnxruntime")
    with Estimator(toy_bundle, "onnxruntime", "cpu", threads=4) as estimator:
        image, spent = np.zeros((32, 32, 3), np.uint8), []
        for _ in range(5):
            estimator(image)
            start = time.process_time()
            time.sleep(0.2)
            spent.append(time.process_time() - start)
    assert min(spent) < 0.005  # with ONNX Runtime's defaults: 0.03 s a thread


def test_openvino_s_pool(toy_bundle: Path) -> None:
    pytest.importorskip("openvino")
    with Estimator(toy_bundle, "openvino", threads=1) as estimator:
        models = list(estimator._backend._graphs.values())
        assert [loaded.model.get_property("INFERENCE_NUM_THREADS") for loaded in models] == [1, 1, 1]


@pytest.mark.integration
def test_torch_s_pool() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            Estimator("fe2e-tiny", "torch", "cpu", threads=threads, check_digests=False).close()
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 1.5}, {"resolution": "half"}])
def test_wrong_options(toy_bundle: Path, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Estimator(toy_bundle, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fit", "size"), [("stretch", (48, 64)), ("pad", (32, 64))])
def test_results_at_the_network_s_size(toy_bundle: Path, fit: str, size: tuple[int, int]) -> None:
    """What is resized up from them is what comes otherwise."""
    image = np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    with Estimator(toy_bundle, fit=fit, resolution="network") as own, Estimator(toy_bundle, fit=fit) as whole:
        small, large = own(image), whole(image)
    assert small.prediction.shape == size
    assert small.normals.shape == (*size, 3)
    assert small.source_size == large.source_size == (200, 100)
    assert small.visualize(image).size == (3 * size[1], size[0])
    assert "of an image of 200x100" in str(small)
    camera = (120.0, 120.0, 99.5, 49.5)
    points, reference = (result.to_metric(scale=1, shift=0).points(camera) for result in (small, large))
    rays, fine = points / points[..., 2:], reference / reference[..., 2:]
    np.testing.assert_allclose(rays.mean(axis=(0, 1)), fine.mean(axis=(0, 1)), atol=1e-3)  # the same field of view
    np.testing.assert_allclose(np.ptp(rays[..., 0]) / np.ptp(fine[..., 0]), 1, atol=0.03)
    from densegeo.runtime.resample import resize_plain

    np.testing.assert_array_equal(resize_plain(small.prediction, 200, 100), large.prediction)
