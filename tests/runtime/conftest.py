"""A tiny real bundle: three ONNX graphs of the right interface, so that tests run the true ONNX Runtime path.

encoder: 8x8 average pooling, a fourth channel of zeros. denoiser: packs tokens; left half = latent, right half =
latent / 2. decoder: drops the fourth channel, repeats pixels 8 times.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from densegeo.runtime.bundle import (
    CAPTURE,
    SCHEMA_VERSION,
    Bucket,
    Decode,
    FileDigest,
    Graph,
    Manifest,
    TensorSpec,
    Verification,
    sha256_file,
    write_manifest,
)

DECODE = Decode(depth_kind="log_affine", latent_scale=0.5, latent_shift=0.1, depth_sign=-1, normal_sign=1)
CHANNELS = 4
BundleMaker = Callable[..., Path]


def write_graph(
    path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], shapes: tuple[list[int], list[int]]
) -> Graph:
    """Save an ONNX graph "input" -> "output" and return its manifest record."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(("input", "output"), shapes, strict=True)
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, path.stem, values[:1], values[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    specs = [
        [TensorSpec(name=value.name, dtype="float32", shape=shape)] for value, shape in zip(values, shapes, strict=True)
    ]
    return Graph(file=path.name, inputs=specs[0], outputs=specs[1], nodes=len(nodes), parameters=0, flops=0)


def make_bucket(directory: Path, width: int, height: int, decoder_batch: int) -> Bucket:
    rows, columns = height // 8, width // 8
    tokens = rows * columns // 4
    tag = f"{width}x{height}"
    node = helper.make_node
    latent = [1, CHANNELS, rows, columns]
    encoder = write_graph(
        directory / f"encoder_{tag}.onnx",
        [
            node("AveragePool", ["input"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
            node("Pad", ["pooled", "pads"], ["output"]),
        ],
        {"pads": np.array([0, 0, 0, 0, 0, 1, 0, 0], dtype=np.int64)},
        ([1, 3, height, width], latent),
    )
    denoiser = write_graph(
        directory / f"denoiser_{tag}.onnx",
        [
            node("Reshape", ["input", "grid"], ["split"]),
            node("Transpose", ["split"], ["moved"], perm=[1, 3, 0, 2, 4]),
            node("Reshape", ["moved", "flat"], ["tokens"]),
            node("Mul", ["tokens", "half"], ["halved"]),
            node("Concat", ["tokens", "halved"], ["output"], axis=1),
        ],
        {
            "grid": np.array([CHANNELS, rows // 2, 2, columns // 2, 2], dtype=np.int64),
            "flat": np.array([1, tokens, 4 * CHANNELS], dtype=np.int64),
            "half": np.array(0.5, dtype=np.float32),
        },
        (latent, [1, 2 * tokens, 4 * CHANNELS]),
    )
    decoder = write_graph(
        directory / f"decoder_{tag}.onnx",
        [
            node("Slice", ["input", "start", "end", "axis"], ["three"]),
            node(
                "Resize",
                ["three", "", "scales"],
                ["output"],
                mode="nearest",
                nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            ),
        ],
        {
            "start": np.array([0], dtype=np.int64),
            "end": np.array([3], dtype=np.int64),
            "axis": np.array([1], dtype=np.int64),
            "scales": np.array([1, 1, 8, 8], dtype=np.float32),
        },
        ([decoder_batch, CHANNELS, rows, columns], [decoder_batch, 3, height, width]),
    )
    return Bucket(width=width, height=height, encoder=encoder, denoiser=denoiser, decoder=decoder)


def make_bundle(
    directory: Path, sizes: tuple[tuple[int, int], ...] = ((64, 48),), decoder_batch: int = 2, precision: str = "fp32"
) -> Path:
    directory.mkdir(parents=True)
    buckets = [make_bucket(directory, width, height, decoder_batch) for width, height in sizes]
    files = {path.name: FileDigest(bytes=path.stat().st_size, sha256=sha256_file(path)) for path in directory.iterdir()}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model="fake",
        precision=precision,
        base=precision,
        quantization=None,
        weights_note="",
        buckets=buckets,
        decode=DECODE,
        networks=None,
        rewrites=[],
        files=files,
        sources=[],
        build_key="",
        versions={},
        target_architectures=[],
        kernels=[],
        engines=[],
        capture=CAPTURE,
        verification=Verification(inputs="", replay_bound=1e-4, checks=[]),
    )
    write_manifest(directory, manifest)
    return directory


BUILT_SIZES = ((48, 32), (64, 32))


@pytest.fixture
def new_bundle(tmp_path: Path) -> BundleMaker:
    """Makes a fresh bundle that the test may damage; takes the keyword arguments of `make_bundle`."""
    return lambda **options: make_bundle(tmp_path / f"bundle{len(list(tmp_path.iterdir()))}", **options)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one 64x48 bucket, shared between tests: not to be changed."""
    return make_bundle(tmp_path_factory.mktemp("shared") / "bundle")


@pytest.fixture
def picture() -> np.ndarray:
    """A smooth uint8 test image, 96 wide and 72 high, different in every channel."""
    y, x = np.mgrid[0:72, 0:96]
    planes = [x / 95, y / 71, (x + y) / 166]
    return np.round(255 * np.stack(planes, axis=-1)).astype(np.uint8)


@pytest.fixture
def run_in_threads() -> Callable[[Callable[[int], object], int], list[object]]:
    """Calls a function once in each of n threads started together; its results in order."""

    def run(call: Callable[[int], object], threads: int) -> list[object]:
        barrier = threading.Barrier(threads)
        results: list[object] = [None] * threads

        def work(index: int) -> None:
            barrier.wait()
            try:
                results[index] = call(index)
            except BaseException as error:
                results[index] = error

        workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return results

    return run


@pytest.fixture(scope="session")
def built_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `built`."""
    pytest.importorskip("torch")
    from tests.export.test_build import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="session")
def built(built_checkpoint: Path) -> dict[str, Path]:
    """Bundles of the smallest real networks by precision, float32 at two sizes."""
    from densegeo.export.build import build_bundle
    from tests.export.test_build import options

    return {
        precision: build_bundle(
            options(built_checkpoint, built_checkpoint.parent / precision, precision=precision, sizes=sizes)
        )
        for precision, sizes in (("fp32", BUILT_SIZES), ("bf16", BUILT_SIZES[:1]))
    }
