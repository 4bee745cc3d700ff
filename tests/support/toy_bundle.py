"""The toy bundle: three ONNX graphs of the right interface, made in milliseconds without torch, run by any backend.

encoder: 8x8 average pooling, a fourth channel of zeros. denoiser: packs tokens; left half = latent, right half =
latent / 2. decoder: drops the fourth channel, repeats pixels 8 times.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from densegeo.outputs import Decode, Output
from densegeo.runtime.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Bucket,
    Check,
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
from densegeo.runtime.images import Frame
from densegeo.runtime.resample import place, prepare
from densegeo.runtime.verify import IMAGE, PICTURES

DECODE = Decode(
    packing="tokens",
    outputs=(
        Output(kind="depth", clamp="before_mean", factor=-1, space="log_affine"),
        Output(kind="normals", clamp="before_mean", frame="dsine"),
    ),
    latent_scale=0.5,
    latent_shift=0.1,
)
CHANNELS = 4
SERVED = DECODE.names


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
    return Graph(file=path.name, inputs=specs[0], outputs=specs[1], nodes=len(nodes), parameters=0, flops=1_000_000)


def write_encoder(path: Path, rgb: list[int], latent: list[int]) -> Graph:
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Pad", ["pooled", "pads"], ["output"]),
    ]
    return write_graph(path, nodes, {"pads": np.array([0, 0, 0, 0, 0, 1, 0, 0])}, (rgb, latent))


def write_denoiser(path: Path, latent: list[int]) -> Graph:
    rows, columns = latent[2] // 2, latent[3] // 2
    nodes = [
        helper.make_node("Reshape", ["input", "grid"], ["split"]),
        helper.make_node("Transpose", ["split"], ["moved"], perm=[1, 3, 0, 2, 4]),
        helper.make_node("Reshape", ["moved", "flat"], ["tokens"]),
        helper.make_node("Mul", ["tokens", "half"], ["halved"]),
        helper.make_node("Concat", ["tokens", "halved"], ["output"], axis=1),
    ]
    constants = {
        "grid": np.array([CHANNELS, rows, 2, columns, 2]),
        "flat": np.array([1, rows * columns, 4 * CHANNELS]),
        "half": np.array(0.5, dtype=np.float32),
    }
    return write_graph(path, nodes, constants, (latent, [1, 2 * rows * columns, 4 * CHANNELS]))


def write_decoder(path: Path, latents: list[int], decoded: list[int]) -> Graph:
    nearest = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    nodes = [
        helper.make_node("Slice", ["input", "start", "end", "axis"], ["three"]),
        helper.make_node("Resize", ["three", "", "scales"], ["output"], **nearest),
    ]
    constants = {name: np.array([value]) for name, value in (("start", 0), ("end", 3), ("axis", 1))}
    constants["scales"] = np.array([1, 1, 8, 8], dtype=np.float32)
    return write_graph(path, nodes, constants, (latents, decoded))


def make_bucket(directory: Path, width: int, height: int, decoder_batch: int) -> Bucket:
    file = f"{{}}_{width}x{height}.onnx"
    latent = [CHANNELS, height // 8, width // 8]
    return Bucket(
        width=width,
        height=height,
        encoder=write_encoder(directory / file.format("encoder"), [1, 3, height, width], [1, *latent]),
        denoiser=write_denoiser(directory / file.format("denoiser"), [1, *latent]),
        decoder=write_decoder(
            directory / file.format("decoder"), [decoder_batch, *latent], [decoder_batch, 3, height, width]
        ),
    )


def toy_manifest(buckets: list[Bucket], precision: str) -> Manifest:
    """A manifest that names no files yet."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model="toy",
        precision=precision,
        base=precision,
        quantization=None,
        weights_note="random weights",
        buckets=buckets,
        decode=DECODE,
        networks=None,
        rewrites=["guidance"],
        files={},
        sources=[Source(role="dit", path="toy.safetensors", bytes=1, sha256="0" * 64)],
        build_key="0" * 64,
        versions={"densegeo": "0"},
        target_architectures=[],
        kernels=[],
        engines=[],
        options={"--model": ["toy"]},
        verification=Verification(inputs="", bounds=dict.fromkeys(SERVED, 1e-4), replay_bound=1e-4, checks=[]),
    )


def with_references(directory: Path, manifest: Manifest, factor: float) -> Manifest:
    """Store a picture for every size and, as what it should give, the bundle's own outputs times `factor`."""
    tensors: dict[str, np.ndarray] = {}
    checks = []
    for bucket in manifest.buckets:
        for index in range(PICTURES):
            shape = bucket.height * (9 - index) // 8 | 1, bucket.width * (9 - index) // 8 | 1, 3
            image = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
            frame = Frame(image, encoded=False)
            rgb = prepare(frame, bucket.size, place(bucket.size, frame.size, "stretch"))
            with Estimator(directory, device="cpu", check_digests=False) as estimator:
                outputs, geometry = estimator.replay(rgb), estimator(image)
            outputs |= {f"{IMAGE}{name}": getattr(geometry, name) for name in SERVED}
            key = f"{bucket.name}.{index}"
            tensors |= {f"{key}.rgb": rgb, f"{key}.image": image}
            for name, value in outputs.items():
                tensors[f"{key}.{name}"] = np.ascontiguousarray(value * np.float32(factor))
        checks.append(Check(bucket=bucket.name, output="encoder", reference="itself", error=1e-7, bound=1e-5))
    save_file(tensors, directory / "verification.safetensors")
    verification = msgspec.structs.replace(manifest.verification, inputs="verification.safetensors", checks=checks)
    return msgspec.structs.replace(manifest, verification=verification)


def make_toy_bundle(
    directory: Path,
    sizes: tuple[tuple[int, int], ...] = ((64, 48),),
    decoder_batch: int = 2,
    precision: str = "fp32",
    references: float | None = None,
) -> Path:
    """Write the bundle. references: store what `densegeo verify` compares with, times this factor."""
    directory.mkdir(parents=True)
    buckets = [make_bucket(directory, width, height, decoder_batch) for width, height in sizes]
    manifest = toy_manifest(buckets, precision)
    if references is not None:
        write_manifest(directory, manifest)
        manifest = with_references(directory, manifest, references)
    paths = [path for path in directory.iterdir() if path.name != MANIFEST]
    files = {path.name: FileDigest(bytes=path.stat().st_size, sha256=sha256_file(path)) for path in paths}
    write_manifest(directory, msgspec.structs.replace(manifest, files=files))
    return directory
