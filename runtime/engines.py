"""What must hold before an engine is given to TensorRT: it is from this bundle, for this library and GPU, and trusted.

An engine file is code for the GPU (and may hold code for the host), so all checks come before deserialisation.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from pathlib import Path

import msgspec

from densegeo.architectures import AMPERE, RTX_TARGETS, names
from densegeo.backends import ENGINE_LIBRARIES, ENGINES
from densegeo.errors import EngineError
from densegeo.files import writable_by_others
from densegeo.runtime.bundle import Bucket, Engine, Manifest, Stage, rebuild_command, sha256_file
from densegeo.runtime.ready import FOLDER as READY

FOLDER = "engines"
# What an engine depends on; the rest of its record says where it lies and how its build went.
FINGERPRINTED = (
    "stage",
    "bucket",
    "graph_sha256",
    "weights_sha256",
    "precision",
    "library",
    "version",
    "architectures",
    "weights",
    "options",
)


def fingerprint(engine: Engine) -> str:
    """SHA-256 of all that the engine depends on."""
    fields = {name: getattr(engine, name) for name in FINGERPRINTED}
    return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()


def renew_command(
    manifest: Manifest, directory: Path, *, library: str | None = None, architecture: int | None = None
) -> str:
    """What to type to get current engines into this bundle; architecture: of the GPU, default the one that is there.

    One that comes with the package is built anew outside of it.
    """
    if directory.parent == READY:
        number = {} if architecture is None else {"--gpu-arch": [str(architecture)]}
        return rebuild_command(manifest.options | {"--backend": [ENGINES.name]} | number, directory)
    words = ["densegeo", "engines", str(directory)]
    words += [] if architecture is None else ["--gpu-arch", str(architecture)]
    return shlex.join(words + ([] if library is None else ["--builder", library]))


def select_engine(
    directory: Path, manifest: Manifest, stage: Stage, bucket: Bucket, *, library: str, version: str, architecture: int
) -> Engine:
    """The bundle's engine of a graph for this library and GPU architecture (89 is sm_89); see `check_engine`.

    Raises EngineError that names every engine of the graph and why it does not fit.
    """
    candidates = [engine for engine in manifest.engines if (engine.stage, engine.bucket) == (stage, bucket.name)]
    if not candidates:
        raise EngineError(
            f"{directory} has no TensorRT engine of the {stage} at {bucket.name}. "
            f"Build one: {renew_command(manifest, directory, library=library, architecture=architecture)}"
        )
    reasons = []
    for engine in candidates:
        try:
            check_engine(directory, manifest, engine, library=library, version=version, architecture=architecture)
            return engine
        except EngineError as error:
            reasons.append(str(error))
    raise EngineError("\n".join(reasons))


def check_engine(
    directory: Path, manifest: Manifest, engine: Engine, *, library: str, version: str, architecture: int | None
) -> None:
    """Raise EngineError, naming the mismatch and the command that rebuilds, unless the engine is this bundle's.

    architecture: of the GPU that is to run it; None where there is none and only the bundle is looked at.
    """
    renew = renew_command(manifest, directory, library=library, architecture=architecture)
    bucket = next((bucket for bucket in manifest.buckets if bucket.name == engine.bucket), None)
    if bucket is None:
        _refuse(directory, engine, "size", engine.bucket, "none of the bundle's", renew)
    graph = getattr(bucket, engine.stage).file
    pairs = {
        "graph": (engine.graph_sha256[:16], _digest(manifest, graph)[:16]),
        "weights": (engine.weights_sha256[:16], _digest(manifest, f"{engine.stage}.safetensors")[:16]),
        "precision": (engine.precision, manifest.precision),
        "library": (engine.library, library),
        f"{library} version": (engine.version, version),
        "fingerprint": (engine.fingerprint[:16], fingerprint(engine)[:16]),
    }
    for property_name, (built, current) in pairs.items():
        if built != current:
            _refuse(directory, engine, property_name, built, current, renew)
    if architecture is not None and not runs_on(engine, architecture):
        built_for = ", ".join(engine.architectures) or _ampere_on(engine.library)
        _refuse(directory, engine, "GPU architecture", built_for, f"sm_{architecture}", renew)


def runs_on(engine: Engine, architecture: int) -> bool:
    """Whether the engine was built for this architecture; one without targets is for Ampere and later, as far as its
    library goes.
    """
    if engine.architectures:
        return f"sm_{architecture}" in engine.architectures
    return architecture >= AMPERE and ENGINE_LIBRARIES[engine.library].knows(architecture)


def _ampere_on(library: str) -> str:
    """What an engine without targets is for, in words."""
    if not ENGINE_LIBRARIES[library].named_targets:
        return f"sm_{AMPERE} and later"
    return names(number for number in RTX_TARGETS if number >= AMPERE)


def _digest(manifest: Manifest, name: str) -> str:
    return manifest.files[name].sha256 if name in manifest.files else ""


def _refuse(directory: Path, engine: Engine, property_name: str, built: str, current: str, renew: str) -> None:
    raise EngineError(
        f"{directory / engine.file} does not fit: its {property_name} is {built}, here it is {current or 'nothing'}. "
        f"Rebuild it: {renew}"
    )


def read_engine(directory: Path, manifest: Manifest, engine: Engine, *, trust: bool = False) -> bytes:
    """The engine's bytes, checked against the manifest's digest as they are read.

    trust: accept files that other users could have written. Raises EngineError.
    """
    path = directory / engine.file
    if not trust:
        for checked in (path, path.parent, directory):
            check_owner(checked)
    listed = manifest.files.get(engine.file)
    if listed is None:
        raise EngineError(f"the manifest of {directory} lists no digest of {engine.file}, so it is not loaded")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != listed.sha256:
        raise EngineError(
            f"{path} is corrupted or was replaced: its SHA-256 is {digest[:16]}…, the manifest says "
            f"{listed.sha256[:16]}…. Rebuild it: {renew_command(manifest, directory, library=engine.library)}"
        )
    return data


def check_owner(path: Path) -> None:
    """Raise EngineError when others than this user and root could have written the file or directory."""
    try:
        reason = writable_by_others(path)
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error}") from error
    if reason is not None:
        raise EngineError(
            f"{path} {reason}, or set DENSEGEO_TRUST_ENGINES=1 if you know it is good: an engine runs as code"
        )


def trusted() -> bool:
    """Whether the user said that engine files are good whoever could have written them."""
    return os.environ.get("DENSEGEO_TRUST_ENGINES") == "1"


def reusable(directory: Path, manifest: Manifest, expected: str) -> Engine | None:
    """The engine of an older bundle with this fingerprint whose file is still what was built, or None."""
    for engine in manifest.engines:
        if engine.fingerprint == expected and fingerprint(engine) == expected:
            names = (engine.file, engine.log)
            if all(name in manifest.files and (directory / name).is_file() for name in names) and all(
                sha256_file(directory / name) == manifest.files[name].sha256 for name in names
            ):
                return engine
    return None
