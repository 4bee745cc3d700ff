"""Bundles for the tensorrt backend that need no TensorRT: real graphs, weights and kernels, and engines in name."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from densegeo.errors import BundleError
from densegeo.kernels.contract import LaunchContract
from densegeo.runtime.bundle import (
    KERNELS,
    STAGES,
    Engine,
    FileDigest,
    Manifest,
    Stage,
    read_manifest,
    sha256_file,
    write_manifest,
)
from densegeo.runtime.engines import fingerprint
from densegeo.runtime.tensorfile import tensor_offsets
from tests.cuda.engine_double import WORKSPACE, engine_file

ARCHITECTURE = 89  # the stand-in driver's


def with_engines(bundle: Path, cubins: Path, contracts: list[LaunchContract], target: Path) -> Path:
    """A copy of a bundle in `target`, with these kernels and an engine a graph; the denoisers' weights are inputs."""
    shutil.copytree(bundle, target)
    shutil.copytree(cubins / KERNELS, target / KERNELS)
    manifest = read_manifest(bundle)
    engines = [engine_of(target, manifest, stage, bucket.name) for bucket in manifest.buckets for stage in STAGES]
    made = [engine.file for engine in engines] + [f"{KERNELS}/{contract.file}" for contract in contracts]
    files = {name: FileDigest((target / name).stat().st_size, sha256_file(target / name)) for name in made}
    changes = {"engines": engines, "kernels": contracts, "files": manifest.files | files}
    write_manifest(target, msgspec.structs.replace(manifest, **changes, target_architectures=[f"sm_{ARCHITECTURE}"]))
    return target


def engine_of(target: Path, manifest: Manifest, stage: Stage, bucket: str) -> Engine:
    """Write an engine's file, whose bytes are all that tells it from another, and return its record."""
    graph = next(getattr(actual, stage).file for actual in manifest.buckets if actual.name == bucket)
    weights = f"{stage}.safetensors"
    path = target / engine_file(stage, bucket)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{stage} {bucket}")
    record = Engine(
        stage=stage,
        bucket=bucket,
        graph_sha256=manifest.files[graph].sha256,
        weights_sha256=manifest.files[weights].sha256 if weights in manifest.files else "",
        precision=manifest.precision,
        library="tensorrt_rtx",
        version="1.7",
        architectures=[f"sm_{ARCHITECTURE}"],
        weights="input" if stage == "denoiser" else "constant",
        options={"weight_streaming": 1} if stage == "encoder" else {},
        fingerprint="",
        file=engine_file(stage, bucket),
        log="",
        weight_inputs=sorted(tensor_offsets(target / weights)[1]) if stage == "denoiser" else [],
        seconds=0.0,
        peak_bytes=0,
        activation_bytes=WORKSPACE * next(actual.batch for actual in manifest.buckets if actual.name == bucket),
        weight_bytes=0,
    )
    return msgspec.structs.replace(record, fingerprint=fingerprint(record))


def unusable(bundle: Path) -> str:
    """Why a bundle cannot be run over the stand-in driver, or nothing."""
    try:
        reason = _lacking(read_manifest(bundle))
    except BundleError as error:
        return str(error)
    return f"{bundle} cannot be run: {reason}" if reason else ""


def _lacking(manifest: Manifest) -> str:
    if not manifest.engines:
        return "it has no TensorRT engines: build it with --backend tensorrt --gpu-arch 89"
    if not any(contract.architecture == ARCHITECTURE for contract in manifest.kernels):
        return "it has no kernels for sm_89: build it with --gpu-arch 89"
    if manifest.precision in ("fp8", "int8"):
        return "its graphs are 8-bit: build it with --precision fp32 or bf16"
    return ""
