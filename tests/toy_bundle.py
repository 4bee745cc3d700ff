"""A bundle of three one-line graphs, made without torch and in milliseconds, for tests of the runtime's outside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from densegeo.runtime.bundle import (
    CAPTURE,
    SCHEMA_VERSION,
    Bucket,
    Check,
    Decode,
    FileDigest,
    Graph,
    Manifest,
    Source,
    TensorSpec,
    Verification,
    sha256_file,
    write_manifest,
)
from densegeo.runtime.estimator import Estimator

WIDTH, HEIGHT, CHANNELS = 64, 48, 4
ROWS, COLUMNS = HEIGHT // 16, WIDTH // 16


def write_toy_bundle(directory: Path, reference_factor: float = 1.0) -> Path:
    """Write the bundle; its stored references are its own outputs times `reference_factor`."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    latent = (1, CHANNELS, HEIGHT // 8, WIDTH // 8)
    weight = {
        "encoder": 0.2 * rng.standard_normal((CHANNELS, 3, 8, 8)),
        "decoder": 0.2 * rng.standard_normal((CHANNELS, 3, 8, 8)),
    }
    bucket = Bucket(
        width=WIDTH,
        height=HEIGHT,
        encoder=_graph(
            directory,
            "encoder",
            ("rgb", (1, 3, HEIGHT, WIDTH)),
            ("latent", latent),
            [helper.make_node("Conv", ["rgb", "w"], ["latent"], strides=[8, 8])],
            {"w": weight["encoder"].astype(np.float32)},
        ),
        denoiser=_graph(
            directory,
            "denoiser",
            ("latent", latent),
            ("velocity", (1, 2 * ROWS * COLUMNS, 4 * CHANNELS)),
            [
                helper.make_node("Reshape", ["latent", "split"], ["a"]),
                helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 4, 1, 3, 5]),
                helper.make_node("Reshape", ["b", "flat"], ["half"]),
                helper.make_node("Concat", ["half", "half"], ["velocity"], axis=1),
            ],
            {
                "split": np.array([1, CHANNELS, ROWS, 2, COLUMNS, 2]),
                "flat": np.array([1, ROWS * COLUMNS, 4 * CHANNELS]),
            },
        ),
        decoder=_graph(
            directory,
            "decoder",
            ("z", (2, *latent[1:])),
            ("decoded", (2, 3, HEIGHT, WIDTH)),
            [helper.make_node("ConvTranspose", ["z", "w"], ["decoded"], strides=[8, 8])],
            {"w": weight["decoder"].astype(np.float32)},
        ),
    )
    name = f"{WIDTH}x{HEIGHT}"
    checks = [Check(bucket=name, output="encoder", reference="itself", error=1e-7, bound=1e-5)]
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model="toy",
        precision="fp32",
        base="fp32",
        quantization=None,
        weights_note="random weights",
        buckets=[bucket],
        decode=Decode(depth_kind="log_affine", latent_scale=0.3611, latent_shift=0.1159, depth_sign=-1, normal_sign=1),
        networks=None,
        rewrites=["guidance"],
        files={},
        sources=[Source(role="dit", path="toy.safetensors", bytes=1, sha256="0" * 64)],
        build_key="0" * 64,
        versions={"densegeo": "0"},
        target_architectures=[],
        kernels=[],
        engines=[],
        capture=CAPTURE,
        verification=Verification(inputs="verification.safetensors", replay_bound=1e-4, checks=checks),
    )
    write_manifest(directory, manifest)
    rgb = rng.uniform(-1, 1, (1, 3, HEIGHT, WIDTH)).astype(np.float32)
    with Estimator(directory, device="cpu") as estimator:
        outputs = estimator.replay(rgb)
    tensors = {
        f"{name}.0.{key}": np.ascontiguousarray(value * np.float32(reference_factor)) for key, value in outputs.items()
    }
    save_file({f"{name}.0.rgb": rgb} | tensors, directory / "verification.safetensors")
    files = {
        path.name: FileDigest(bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in directory.iterdir()
        if path.name != "manifest.json"
    }
    write_manifest(directory, _with_files(manifest, files))
    return directory


def _with_files(manifest: Manifest, files: dict[str, FileDigest]) -> Manifest:
    fields = {field: getattr(manifest, field) for field in manifest.__struct_fields__}
    return Manifest(**(fields | {"files": files}))


def _graph(
    directory: Path,
    stage: str,
    source: tuple[str, tuple[int, ...]],
    target: tuple[str, tuple[int, ...]],
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
) -> Graph:
    """Write one float32 ONNX graph and describe it."""
    graph = helper.make_graph(
        nodes,
        stage,
        [helper.make_tensor_value_info(source[0], TensorProto.FLOAT, source[1])],
        [helper.make_tensor_value_info(target[0], TensorProto.FLOAT, target[1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, directory / f"{stage}.onnx")
    return Graph(
        file=f"{stage}.onnx",
        inputs=[TensorSpec(source[0], "float32", list(source[1]))],
        outputs=[TensorSpec(target[0], "float32", list(target[1]))],
        nodes=len(nodes),
        parameters=sum(value.size for value in constants.values()),
        flops=1_000_000,
    )
