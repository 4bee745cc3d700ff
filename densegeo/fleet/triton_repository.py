"""A model repository of Triton Inference Server, written: the configuration, and a version that holds the bundle.

    REPOSITORY/NAME/config.pbtxt
    REPOSITORY/NAME/1/model.py       the class of `densegeo.fleet.triton_model`
    REPOSITORY/NAME/1/bundle/        the bundle's files, hard links where the file system has them

A version appears whole or not at all. Written after Triton's documentation of model repositories and configurations.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from densegeo.errors import ConfigError, ResourceError
from densegeo.files import atomic_folder, atomic_write
from densegeo.fleet.triton_model import BUNDLE, OPTIONS, InstanceOptions, configured_outputs
from densegeo.runtime.bundle import MANIFEST, Manifest, check_files, read_manifest
from densegeo.serving.v2 import INPUT

CONFIG = "config.pbtxt"
_MODEL = '''"""Made by `densegeo export-triton`; the bundle lies beside this file. Needs densegeo and a backend."""

from densegeo.fleet.triton_model import TritonPythonModel  # noqa: F401
'''
_SHAPES = {"prediction": "[ -1, -1 ]", "normals": "[ -1, -1, 3 ]", "depth": "[ -1, -1 ]"}
# Triton lets a request shorten its model's limit and never lengthen it, so that without one it would have no deadline.
QUEUE_TIMEOUT_US = 3_600_000_000


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How Triton is to run a model. Raises ConfigError.

    devices: "auto" (all GPUs that Triton sees, else the CPU), "cpu", "cuda" (all GPUs), or single ones, "cuda:0".
    instances: processes a device, each with the bundle in its memory. max_batch: images that Triton hands over
    together; max_wait_ms: how long the first of them waits for others; max_queue: requests that may wait. keep: newest
    versions that are served.
    """

    devices: Sequence[str] = ("auto",)
    instances: int = 1
    max_batch: int = 8
    max_wait_ms: float = 0.0
    max_queue: int = 64
    keep: int = 1
    options: InstanceOptions = field(default_factory=InstanceOptions)

    def __post_init__(self) -> None:
        if not self.devices or (len(self.devices) > 1 and not all(map(_gpu_number, self.devices))):
            raise ConfigError("Name one device, auto, cpu or cuda, or several GPUs: cuda:0 and cuda:1.")
        if len(set(self.devices)) < len(self.devices):
            raise ConfigError("A device is named twice; --instances says how many processes each has.")


@dataclass(frozen=True)
class Exported:
    """path: the version's folder. fresh: whether it was made now, or was there with the same bundle.

    configured: whether config.pbtxt was written.
    """

    path: Path
    version: int
    fresh: bool
    configured: bool


def export(
    bundle: Path,
    repository: Path,
    name: str,
    deployment: Deployment,
    *,
    version: int | None = None,
    replace_config: bool = False,
    advance: Callable[[], object] = lambda: None,
) -> Exported:
    """Put a bundle into a repository as a model's newest version; nothing is made where that holds this bundle already.

    version: its number; by default the next. replace_config: take the place of a configuration that says something
    else. advance: called for every file that is there. Raises BundleError, ConfigError, ResourceError.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, digests=True)
    model = repository / name
    text = configuration(name, manifest, deployment)
    try:
        _check_config(model / CONFIG, text, replace=replace_config)
        existing = versions(model)
        newest = model / str(existing[-1]) if existing else None
        if newest is not None and version in (None, existing[-1]) and _holds(newest / BUNDLE, bundle):
            return Exported(newest, existing[-1], fresh=False, configured=_write_config(model / CONFIG, text))
        number = existing[-1] + 1 if version is None and existing else version or 1
        if number in existing:
            raise ConfigError(f"{model / str(number)} is there already, with another bundle. Choose another --version.")
        if number < max(existing, default=0):
            raise ConfigError(
                f"Version {number} is older than {existing[-1]}, and a server takes the newest: "
                "choose a larger --version."
            )
        with atomic_folder(model / str(number)) as partial:
            _place(bundle, manifest, partial / BUNDLE, advance)
            (partial / "model.py").write_text(_MODEL, encoding="utf-8")
            configured = _write_config(model / CONFIG, text)
    except OSError as error:
        raise ResourceError(f"Cannot write {error.filename or repository}: {error.strerror or error}.") from error
    return Exported(model / str(number), number, fresh=True, configured=configured)


def versions(model: Path) -> list[int]:
    """Those that a model's folder has, ascending; as in Triton, a number does not begin with 0."""
    names = os.listdir(model) if model.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch("[1-9][0-9]*", name))


def configuration(name: str, manifest: Manifest, deployment: Deployment) -> str:
    """The model's configuration, Triton's `ModelConfig` as protobuf text."""
    outputs = ",\n".join(
        f"  {{ name: {_text(output)} data_type: TYPE_FP32 dims: {_SHAPES[output]} }}"
        for output in configured_outputs(manifest.decode)
    )
    sizes = dict.fromkeys(bucket.size for bucket in manifest.buckets)
    warm = "\n".join(
        f"model_warmup [ {{ name: {_text(str(size))} batch_size: 1 inputs {{ key: {_text(INPUT)} value: {{ "
        f"data_type: TYPE_UINT8 dims: [ {size.height}, {size.width}, 3 ] random_data: true }} }} }} ]"
        for size in sizes
    )
    strings = {
        OPTIONS: msgspec.json.encode(deployment.options).decode(),
        "depth_kind": manifest.decode.depth_kind or "",
    }
    parameters = "\n".join(
        f"parameters {{ key: {_text(key)} value: {{ string_value: {_text(value)} }} }}"
        for key, value in strings.items()
    )
    return f"""# Written by `densegeo export-triton`, which says so before it would replace a changed one.
name: {_text(name)}
backend: "python"
max_batch_size: {deployment.max_batch}
# Images of different sizes may be handed over together: each is resized to a size of the bundle anyway.
input [ {{ name: {_text(INPUT)} data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] allow_ragged_batch: true }} ]
output [
{outputs}
]
dynamic_batching {{
  max_queue_delay_microseconds: {round(1e3 * deployment.max_wait_ms)}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {QUEUE_TIMEOUT_US}
    allow_timeout_override: true
    max_queue_size: {deployment.max_queue}
  }}
}}
instance_group [ {{ {_instances(deployment)} }} ]
version_policy {{ latest {{ num_versions: {deployment.keep} }} }}
{warm}
{parameters}
"""


def _instances(deployment: Deployment) -> str:
    kinds = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}
    group = f"count: {deployment.instances} kind: {kinds.get(deployment.devices[0], 'KIND_GPU')}"
    numbers = [number for device in deployment.devices if (number := _gpu_number(device)) is not None]
    return group + (f" gpus: [ {', '.join(numbers)} ]" if numbers else "")


def _gpu_number(device: str) -> str | None:
    kind, _, number = device.partition(":")
    return number if kind == "cuda" and number else None


def _text(value: str) -> str:
    """A string of protobuf's text format: JSON's escapes of ASCII are among its own."""
    return json.dumps(value)


def _check_config(path: Path, text: str, *, replace: bool) -> None:
    """Raises ConfigError for one that says something else."""
    if not replace and path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{path} says something else than these options: it was changed, or written with others or for another "
            "model. Say --replace-config to write it anew, or choose another --name."
        )


def _write_config(path: Path, text: str) -> bool:
    """Whether it was written: one that says the same stays, so that a server that polls need not look again."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return True


def _holds(version_bundle: Path, bundle: Path) -> bool:
    """Whether a version holds this bundle, whole: the manifest has the digests of all its files."""
    try:
        return (version_bundle / MANIFEST).read_bytes() == (bundle / MANIFEST).read_bytes()
    except OSError:
        return False


def _place(bundle: Path, manifest: Manifest, folder: Path, advance: Callable[[], object]) -> None:
    for name in (*manifest.files, MANIFEST):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(bundle / name, target)
        except OSError:  # another file system, one without hard links, and files of others
            shutil.copyfile(bundle / name, target)
        advance()
