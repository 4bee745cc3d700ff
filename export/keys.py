"""What a build and its stages depend on, as digests: what has an equal key need not be made again."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec

import densegeo
from densegeo.errors import ConfigError
from densegeo.export.options import BuildOptions
from densegeo.runtime.bundle import SCHEMA_VERSION, Source

LIBRARIES = ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of the builder and of the libraries that shape its output."""
    return {
        "densegeo": densegeo.__version__,
        "python": platform.python_version(),
        "onnxruntime": onnxruntime_version(),
        **{library: metadata.version(library) for library in LIBRARIES},
    }


def onnxruntime_version() -> str:
    """ONNX Runtime's version, whichever of its distributions brought it. Raises ConfigError without one."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"A build runs its graphs in ONNX Runtime, which cannot be imported ({error}): "
            'pip install "densegeo[cpu]", or "densegeo[gpu]" (one of the two: they overwrite each other).'
        ) from error
    return str(onnxruntime.__version__)


def code_digest(folders: Iterable[str]) -> str:
    """SHA-256 of the Python files in these folders of the package."""
    code = hashlib.sha256()
    root = Path(densegeo.__file__).parent
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            code.update(path.read_bytes())
    return code.hexdigest()


def digest(facts: object) -> str:
    """SHA-256 of anything that can be written as JSON."""
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


@dataclass(frozen=True)
class StageKeys:
    """One a stage of a build; each covers the one before. Single engines are known by their fingerprints."""

    weights: str
    graphs: str
    kernels: str
    engines: str  # empty: none are wanted


def stage_keys(options: BuildOptions, inputs: Sequence[Source], calibration: str) -> StageKeys:
    """calibration: the digest of what becomes 8-bit."""
    weights = digest(
        {
            "schema": SCHEMA_VERSION,
            "model": options.model,
            "sizes": options.sizes,
            "pictures": bool(options.batches),  # more of them are verified
            "precision": [options.precision, options.base, calibration],
            "without": sorted(options.without),
            "allow_unexpected": options.allow_unexpected,
            "inputs": [(source.role, source.bytes, source.sha256) for source in inputs],
            "versions": versions(),
            "code": code_digest(("models", "export")),
        }
    )
    graphs = digest([weights, options.batches])
    compiler = [code_digest(("kernels",)), _version("triton")] if options.architectures else []
    kernels = digest([graphs, options.architectures, compiler])
    return StageKeys(weights, graphs, kernels, graphs if options.backend == "tensorrt" else "")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
