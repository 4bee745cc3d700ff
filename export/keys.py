"""What a build and its stages depend on, as digests: what has an equal key need not be made again."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import msgspec

import densegeo
from densegeo.backends import Form, installed_version
from densegeo.errors import ConfigError
from densegeo.export.build_options import BuildOptions
from densegeo.export.engine_builder import library_version
from densegeo.extras import install_hint
from densegeo.onnx_runtime import import_onnxruntime
from densegeo.runtime.bundle import SCHEMA_VERSION, Source

# What our code makes of the same inputs, as numbers: raise one by hand when a stage's files come out otherwise.
# A test builds the ready bundle anew and compares.
RECIPES = {"references": 2, "weights": 2, "graphs": 3, "kernels": 3}
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
        onnxruntime = import_onnxruntime()
    except ImportError as error:
        raise ConfigError(
            f"A build runs its graphs in ONNX Runtime, which cannot be imported ({error}): "
            f"{install_hint('cpu')}, or the extra gpu (one of the two: they overwrite each other)."
        ) from error
    return str(onnxruntime.__version__)


def digest(content: object) -> str:
    """SHA-256 of anything that can be written as JSON."""
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


@dataclass(frozen=True)
class StageKeys:
    """One a stage of a build; each covers the one before. Single engines are known by their fingerprints."""

    references: str
    weights: str
    graphs: str
    kernels: str
    engines: str  # empty: none are wanted
    bundle: str  # of everything


def stage_keys(options: BuildOptions, inputs: Sequence[Source], calibration: str) -> StageKeys:
    """calibration: the digest of what becomes 8-bit."""
    references = digest(
        {
            "schema": SCHEMA_VERSION,
            "model": options.model,
            "sizes": options.sizes,
            "precision": options.precision,
            "allow_unexpected": options.allow_unexpected,
            "without": sorted(options.without),
            "inputs": [(source.role, source.bytes, source.sha256) for source in inputs],
            "versions": versions(),
            "recipe": RECIPES["references"],
        }
    )
    weights = digest([references, options.base, calibration, RECIPES["weights"]])
    form = [] if options.graph_form == Form() else [str(options.graph_form)]
    graphs = digest([weights, options.batches, RECIPES["graphs"], *form])
    compiler = [RECIPES["kernels"], installed_version("triton") or ""] if options.architectures else []
    kernels = digest([graphs, options.architectures, compiler])
    builder = [options.engines, library_version(options.engines.library)] if options.with_engines else []
    engines = graphs if options.with_engines else ""
    return StageKeys(references, weights, graphs, kernels, engines, digest([kernels, builder]))
