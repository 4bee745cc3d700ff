"""A GPU that others use too: how urgent our work is, how much memory we may take, and what a bundle would take.

What a bundle takes is reckoned from its manifest, before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from densegeo.argument_checks import integer_of, shown
from densegeo.errors import BackendError, ConfigError
from densegeo.runtime.bundle import STAGES, Bucket, Engine, Manifest, Stage

FLOAT = 4  # bytes
IN_FLIGHT = 2  # calls whose images and maps are on the device at once


class Sharing(NamedTuple):
    """priority: of the streams, as CUDA counts: 0 is the last, negative ones go before. memory_limit: bytes."""

    priority: int = 0
    memory_limit: int | None = None


ALONE = Sharing()


class Need(NamedTuple):
    """What a bundle takes of a device's memory, in bytes. shared: whatever is opened. workspace: once, the largest."""

    shared: int
    buckets: dict[str, int]
    workspaces: dict[str, int]

    def of(self, names: list[str]) -> int:
        """With these buckets alone."""
        return self.shared + sum(self.buckets[name] for name in names) + max(self.workspaces[name] for name in names)


def check_sharing(sharing: Sharing) -> Sharing:
    """In Python's own integers. Raises ConfigError for what no device could do."""
    priority = integer_of(sharing.priority)
    if priority is None:
        raise ConfigError(
            f"priority must be an integer, 0 or below as CUDA's streams have it, not {shown(sharing.priority)}."
        )
    if sharing.memory_limit is None:
        return Sharing(priority)
    limit = integer_of(sharing.memory_limit)
    if limit is None or limit < 1:
        raise ConfigError(f"memory_limit must be a number of bytes above 0, not {shown(sharing.memory_limit)}.")
    return Sharing(priority, limit)


def require_priority(priority: int, first: int, last: int, device: str) -> None:
    """Raises ConfigError for one that a device's streams do not have: CUDA would take the nearest, and say nothing."""
    if not first <= priority <= last:
        raise ConfigError(f"priority must be from {first} (before others) to {last} on {device}, not {priority}.")


def require_room(directory: Path, need: Need, limit: int | None, device: str) -> None:
    """Raises BackendError, which says what would fit, where a bundle takes more than the limit."""
    names = list(need.buckets)
    if limit is None or need.of(names) <= limit:
        return
    fitting = [name for name in names if need.of([name]) <= limit]
    together: list[str] = []
    for name in names:
        if need.of([*together, name]) <= limit:
            together.append(name)
    if together:
        also = ", ".join(f"{name} alone {_size(need.of([name]))}" for name in fitting if name not in together)
        fits = (
            f"{' with '.join(together)} would fit ({_size(need.of(together))}{'; ' + also if also else ''}): build a "
        )
        fits += "bundle of these alone"
    else:
        least = min(names, key=lambda name: need.of([name]))
        fits = f"Not even {least} alone fits ({_size(need.of([least]))}): build a smaller size or fewer bits"
    raise BackendError(
        f"{directory} takes {_size(need.of(names))} of {device} for {', '.join(names)}, {_size(need.shared)} of that "
        f"whatever is opened, and memory_limit is {_size(limit)}. {fits}, or raise memory_limit to {need.of(names)}."
    )


def engines_need(manifest: Manifest, engines: Mapping[str, Mapping[Stage, Engine]], alignment: int) -> Need:
    """Of the tensorrt backend with these engines, by bucket and stage. alignment: of each tensor, bytes.

    Weights that are inputs are there once, those in engines in each; buffers between engines; images and maps of the
    buckets' own sizes for the calls in flight.
    """
    chosen = [(bucket, engines[bucket.name]) for bucket in manifest.buckets if bucket.name in engines]
    bound = {stage for _, stages in chosen for stage, engine in stages.items() if engine.weight_inputs}
    shared = sum(manifest.files[f"{stage}.safetensors"].bytes + alignment for stage in sorted(bound))
    tensors = sum(len(next(iter(engines.values()))[stage].weight_inputs) for stage in bound)
    in_flight = max((_images(bucket, manifest, alignment) for bucket, _ in chosen), default=0)
    return Need(
        shared + tensors * alignment + IN_FLIGHT * in_flight,
        {
            bucket.name: sum(engine.weight_bytes for engine in stages.values()) + _buffers(bucket, manifest)
            for bucket, stages in chosen
        },
        {bucket.name: max(engine.activation_bytes for engine in stages.values()) for bucket, stages in chosen},
    )


def networks_need(manifest: Manifest) -> Need:
    """Of other backends: at least their weights and the buffers of one size; what layers need besides is theirs."""
    weights = sum(manifest.files[name].bytes for stage in STAGES if (name := f"{stage}.safetensors") in manifest.files)
    buckets = {bucket.name: _buffers(bucket, manifest) for bucket in manifest.buckets if bucket.batch == 1}
    return Need(weights, buckets, dict.fromkeys(buckets, 0))


def _buffers(bucket: Bucket, manifest: Manifest) -> int:
    """Between the networks, float32."""
    pictures = len(manifest.decode.outputs) * bucket.batch
    shapes = [bucket.encoder.inputs[0].shape, bucket.denoiser.inputs[0].shape, bucket.denoiser.outputs[0].shape]
    shapes += [[pictures, *spec.shape[1:]] for spec in (bucket.decoder.inputs[0], bucket.decoder.outputs[0])]
    if manifest.decode.packing == "latent":
        del shapes[3]  # the decoder takes the denoiser's output as it is
    return FLOAT * sum(int(np.prod(shape)) for shape in shapes)


def _images(bucket: Bucket, manifest: Manifest, alignment: int) -> int:
    """A batch of images and its maps."""
    planes = sum(1 if row.frame is None else 3 for row in manifest.decode.outputs)
    each = (3 + FLOAT * planes) * bucket.size.pixels + (1 + len(manifest.decode.outputs)) * alignment
    return bucket.batch * each


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
