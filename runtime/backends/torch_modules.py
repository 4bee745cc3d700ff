"""torch backend: the project's own modules, rebuilt from a bundle's manifest and weight files; runs bf16 on a CPU too.

This and what it imports is the only part of the runtime that needs torch.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densegeo.backends import NETWORKS
from densegeo.colors import Color
from densegeo.errors import BackendError, CheckpointError
from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.models import rewrites
from densegeo.models.casting import DTYPES
from densegeo.models.config import VAEConfig
from densegeo.models.denoiser import AnyDenoiser, Denoiser
from densegeo.models.families import FAMILIES
from densegeo.models.layer_plans import LayerPlan, Plans, quantize_block
from densegeo.models.loading import load_rewritten
from densegeo.models.prompt import load_prompt
from densegeo.models.quantized import FORMATS, AttentionPlan
from densegeo.models.rewrites import Pipeline
from densegeo.models.vae import transpose_upsampling
from densegeo.outputs import Maps
from densegeo.precision import QUANTIZED, precision_row
from densegeo.runtime.backends import parse_device
from densegeo.runtime.backends.sharing import ALONE, Sharing, networks_need, require_room
from densegeo.runtime.backends.torch_capture import CudaRecorder, HostRecorder, Recorder, settings
from densegeo.runtime.backends.torch_device import MOST, DeviceNetwork
from densegeo.runtime.backends.torch_fused import fuse
from densegeo.runtime.backends.torch_int8 import use_int8_products
from densegeo.runtime.backends.torch_pictures import faster_transposed, fuse_pictures
from densegeo.runtime.backends.torch_transfer import Ring
from densegeo.runtime.bundle import STAGES, Bucket, Graph, Manifest, Quantization, Stage
from densegeo.runtime.resample import Placement
from densegeo.size import Size

log = logging.getLogger("densegeo")


def open_backend(
    directory: Path, manifest: Manifest, device: str, sharing: Sharing = ALONE, threads: int | None = None
) -> TorchBackend:
    """The backend of `densegeo.backends`' table. threads: of torch in this whole process.

    Raises BackendError, ConfigError.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchBackend(directory, manifest, device, sharing=sharing)


class TorchBackend:
    """One set of weights on one device; each bucket has its own tables."""

    name = NETWORKS.name

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        device: str,
        *,
        sharing: Sharing = ALONE,
        frames_on_cpu: bool = False,
    ) -> None:
        """frames_on_cpu: take images as on a GPU, which tests do.

        A memory limit holds for all that torch allocates in this process on the device.
        """
        self.device = choose_device(device)
        if self.device != "cpu":
            limit_memory(directory, manifest, self.device, sharing.memory_limit)
        require_precision(manifest, self.device)
        first = manifest.buckets[0]
        self._buckets = {bucket.size: bucket for bucket in manifest.buckets}  # the batch is its own
        self._pipeline: Pipeline | None = load_networks(directory, manifest, first.size, self.device)
        self._denoisers: dict[Size, AnyDenoiser] = {first.size: self._pipeline.denoiser}
        self._lock = threading.RLock()
        self.takes_frames = frames_on_cpu or self.device != "cpu"  # numpy and Pillow are a CPU's faster way in and out
        self._recorder: Recorder | None = None
        if self.takes_frames:
            self._recorder = HostRecorder() if self.device == "cpu" else CudaRecorder(self.device, sharing.priority)
        self.records = self._recorder is not None
        self._ring = Ring(self.device, sharing.priority)
        self._networks: dict[Size, DeviceNetwork] = {}
        self._failed: dict[Size, BackendError] = {}  # why a size is not there
        if not self.takes_frames:
            for network in (self._pipeline.denoiser, self._pipeline.vae):
                use_int8_products(network)
        self._fused_vae = fuse_pictures(self._pipeline.vae)
        # Of fp16 CPUs have convolutions and no transposed ones, which then take 40 times as long.
        if self.device == "cpu" and manifest.base != "fp16":
            for upsample in transpose_upsampling(self._pipeline.vae.decoder, faster_transposed):
                upsample.make_ready()
        self.frames_at_once = MOST if self._pipeline.denoiser.guidance is None else 1
        if self.takes_frames:
            self._network(first)

    def warm_up(self, largest_group: int) -> None:
        """See `FrameBackend`. The first size must work; another one that does not is left out, with a line in the log.

        Raises BackendError.
        """
        together = []
        for size, bucket in self._buckets.items():
            try:
                together.append(self._prepared(bucket, largest_group))
            except BackendError as error:
                if not together:
                    raise
                self._networks.pop(size, None)
                self._failed[size] = error
                log.warning("%s is left out: %s", size, error)
        self.frames_at_once = max(together)

    def run(self, bucket: Bucket, stage: Stage, array: NDArray[Any]) -> NDArray[np.float32]:
        """Run one stage; `array` enters as float32, the output leaves as float32. Raises BackendError."""
        graph: Graph = getattr(bucket, stage)
        spec = graph.inputs[0]
        if list(array.shape) != spec.shape:
            raise BackendError(f"The {stage} takes {spec.name} of shape {spec.shape}, not {list(array.shape)}.")
        module = self._module(bucket, stage)
        try:
            with torch.inference_mode(), settings():
                tensor = torch.tensor(np.asarray(array, dtype=np.float32), device=self.device)
                result: NDArray[np.float32] = module(tensor).float().cpu().contiguous().numpy()
        except (RuntimeError, torch.OutOfMemoryError) as error:
            raise BackendError(f"torch failed in the {stage} on {self.device}: {error}") from error
        return result

    def estimate(
        self,
        bucket: Bucket,
        pixels: Sequence[NDArray[np.uint8]],
        placements: Sequence[Placement],
        color: Color = "rgb",
    ) -> list[Maps[NDArray[np.float32]]]:
        """Pixels (h, w, 3) or YCbCr -> the maps of each, see `DeviceNetwork`.

        Threads may call together: the copies of one group of images then overlap the networks of another. Raises
        BackendError.
        """
        network = self._network(bucket)
        try:
            return self._ring.run(pixels, lambda frames: network(frames, placements, color))
        except (RuntimeError, torch.OutOfMemoryError) as error:
            raise BackendError(f"torch failed on {self.device}: {error}") from error

    def keep(
        self, bucket: Bucket, image: Any, placement: Placement, color: Color, metres: Metres | None = None
    ) -> Maps[Tensor]:
        """`estimate` on an array that may lie on the device; the results stay there. Raises BackendError."""
        network = self._network(bucket)
        try:
            return self._ring.keep(image, lambda frame: network([frame], [placement], color, metres)[0])
        except (RuntimeError, BufferError) as error:
            raise BackendError(f"torch failed on {self.device}: {error}") from error

    def close(self) -> None:
        """Drop the weights."""
        with self._lock:
            self._pipeline = None
            self._denoisers.clear()
            self._networks.clear()

    def _prepared(self, bucket: Bucket, largest_group: int) -> int:
        """Everything of one size, recorded; how many of its images fit at once. Raises BackendError."""
        network = self._network(bucket)
        try:
            with self._ring.computing():
                return network.warm_up(largest_group)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            raise self._failure(bucket, error) from error

    def _network(self, bucket: Bucket) -> DeviceNetwork:
        size = bucket.size
        with self._lock:
            denoiser = self._module(bucket, "denoiser")
            if size in self._failed:
                raise self._failed[size]
            if size not in self._networks:
                assert isinstance(denoiser, Denoiser)
                assert self._pipeline is not None
                try:
                    with self._ring.computing(), torch.inference_mode():
                        fused = replace(self._pipeline, denoiser=fuse(denoiser), vae=self._fused_vae)
                        self._networks[size] = DeviceNetwork(fused, bucket, self.device, self._recorder)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    raise self._failure(bucket, error) from error
            return self._networks[size]

    def _failure(self, bucket: Bucket, error: Exception) -> BackendError:
        return BackendError(f"torch failed on {self.device} at {bucket.size}, its first run: {error}")

    def _module(self, bucket: Bucket, stage: Stage) -> Callable[[Tensor], Tensor]:
        with self._lock:
            if self._pipeline is None:
                raise BackendError("This estimator is closed. Make a new Estimator.")
            if stage == "encoder":
                return self._pipeline.vae.encoder
            if stage == "decoder":
                return self._pipeline.vae.decoder
            if bucket.size not in self._denoisers:
                self._denoisers[bucket.size] = resized(self._pipeline.denoiser, bucket.size)
            return self._denoisers[bucket.size]


def resized(denoiser: AnyDenoiser, size: Size) -> AnyDenoiser:
    """A denoiser for another image size that shares every weight with the given one."""
    shared = {id(tensor): tensor for tensor in denoiser.state_dict(keep_vars=True).values()}
    twin = copy.deepcopy(denoiser, shared)
    twin.resize(size)
    return twin.to(denoiser.prompt_embeds.device)  # tables that were made anew


def load_networks(directory: Path, manifest: Manifest, size: Size, device: str, *, streamed: bool = False) -> Pipeline:
    """A bundle's networks for one image size, as they are stored. Raises BackendError.

    streamed: the denoiser's blocks stay in their file, are read when they run, and then are float32.
    """
    if manifest.networks is None:
        raise BackendError(
            f"{directory} holds graphs alone, and the torch backend needs the networks' description. "
            'Use backend="onnxruntime", or rebuild the bundle.'
        )
    try:
        family = FAMILIES[manifest.networks.family]
        configs = (
            msgspec.convert(manifest.networks.denoiser, family.config),
            msgspec.convert(manifest.networks.vae, VAEConfig),
        )
        prompt = load_prompt(directory / manifest.networks.prompt)
        applied = rewrites.select(family.rewrites, set(family.rewrite_names) - set(manifest.rewrites))
        eight_bit = None if manifest.quantization is None else _eight_bit(manifest.quantization, manifest.base)
        files: dict[str, Path] = {stage: directory / f"{stage}.safetensors" for stage in STAGES}
        pipeline = load_rewritten(family, configs, prompt, applied, files, size, device, eight_bit, streamed=streamed)
    except (CheckpointError, KeyError, msgspec.ValidationError) as error:
        raise BackendError(f"The networks in {directory} cannot be rebuilt: {error}") from error
    except torch.OutOfMemoryError as error:
        raise BackendError(f"{device} has too little memory for this bundle's weights: {error}") from error
    return pipeline


def _eight_bit(quantization: Quantization, base: str) -> Callable[[torch.nn.Module, str], None]:
    """Gives blocks without values the layers that were stored."""
    even = torch.ones(()) if quantization.smooth else None  # a placeholder: its values are stored
    plans: Plans = {
        **dict.fromkeys(quantization.linears, LayerPlan(0.0)),
        **dict.fromkeys(quantization.convolutions, LayerPlan(0.0, even)),
        **dict.fromkeys(quantization.twice, LayerPlan(0.0, twice=True)),
        **dict.fromkeys(quantization.attentions, AttentionPlan(0.0, 0.0, 0.0)),
    }
    return lambda block, name: quantize_block(block, name, plans, FORMATS[quantization.format], DTYPES[base])


def require_precision(manifest: Manifest, device: str) -> None:
    """Raises BackendError for a bundle that no kernel can be compiled for on this GPU."""
    if device == "cpu":
        return
    major, minor = torch.cuda.get_device_capability(device)
    base = precision_row(manifest.base)
    if 10 * major + minor < base.first_architecture:
        raise BackendError(
            f"This bundle is {base.name}, and {device} is sm_{major}{minor}: there is no {base.name} before "
            f"sm_{base.first_architecture}. Build it with `--precision fp16` ({' and '.join(QUANTIZED)}: with "
            '`--base fp32`), or use device="cpu".'
        )


def limit_memory(directory: Path, manifest: Manifest, device: str, limit: int | None) -> None:
    """torch's allocator gives no more than this on the device. Raises BackendError where weights alone take more."""
    if limit is None:
        return
    require_room(directory, networks_need(manifest), limit, device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), torch.device(device))


def choose_device(device: str) -> str:
    """ "auto", "cpu", "cuda" or "cuda:N" -> "cpu" or "cuda:N"; raises ConfigError, BackendError."""
    kind, index = parse_device(device)
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if int(index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f'This torch sees {torch.cuda.device_count()} CUDA devices, so there is no {device}. Use device="cpu", or '
            "install a CUDA build of torch and NVIDIA's driver."
        )
    return f"cuda:{index or 0}"
