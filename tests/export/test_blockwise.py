"""Running a graph in pieces gives what running it whole gives."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from densegeo.export.blockwise import run_blockwise
from densegeo.export.graph_stats import describe
from densegeo.runtime.bundle import read_manifest


@pytest.mark.parametrize(
    "limit", [*(pytest.param(limit, marks=pytest.mark.thorough) for limit in (1, 50_000)), 1 << 30]
)
def test_pieces_equal_the_whole(golden_bundle, limit):
    bundle = golden_bundle()
    graph = read_manifest(bundle).buckets[0].denoiser
    latent = np.random.default_rng(0).standard_normal(graph.inputs[0].shape).astype(np.float32)
    (whole,) = ort.InferenceSession(bundle / graph.file).run(None, {"latent": latent})
    (pieces,) = run_blockwise(bundle / graph.file, {"latent": latent}, limit=limit)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.thorough
def test_widening_keeps_the_rounded_weights(golden_bundle):
    """The float32 twin of the bf16 graph differs from the float32 graph by bf16's rounding, no less and no more."""
    low, full = golden_bundle(precision="bf16"), golden_bundle()
    graph = read_manifest(low).buckets[0].encoder
    rgb = np.random.default_rng(0).uniform(-1, 1, graph.inputs[0].shape).astype(np.float32)
    (twin,) = run_blockwise(low / graph.file, {"rgb": rgb}, widen=True)
    (reference,) = run_blockwise(full / graph.file, {"rgb": rgb})
    error = np.linalg.norm(twin - reference) / np.linalg.norm(reference)
    assert 2**-12 < error < 2**-5


def test_statistics_of_a_hand_made_graph(tmp_path):
    helper = onnx.helper
    weight = onnx.numpy_helper.from_array(np.ones((6, 4), np.float32), "w")
    kernel = onnx.numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "k")
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
        helper.make_node("Conv", ["p", "k"], ["c"]),
    ]
    inputs = [info("x", 1, [5, 4]), info("p", 1, [1, 3, 8, 8])]
    outputs = [info("y", 1, [5, 6]), info("c", 1, [1, 2, 6, 6])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight, kernel])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "g.onnx")
    stats = describe(tmp_path / "g.onnx")
    assert (stats.nodes, stats.parameters) == (2, 6 * 4 + 2 * 27)
    assert stats.flops == 2 * 5 * 6 * 4 + 2 * (2 * 6 * 6) * 27
