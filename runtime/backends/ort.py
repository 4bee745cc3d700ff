"""ONNX Runtime backend: one session per graph, made for the first bucket at once and for others when first used."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from densegeo.backends import BACKENDS, BackendRow, backend_row, without_convolutions
from densegeo.errors import BackendError
from densegeo.extras import install_hint
from densegeo.onnx_runtime import import_onnxruntime, session_options
from densegeo.precision import FLOATS, PRECISIONS, QUANTIZED, precision_row
from densegeo.runtime.backends import has_cuda_driver, parse_device
from densegeo.runtime.backends.graphs import GraphBackend
from densegeo.runtime.backends.sharing import ALONE, Sharing, networks_need, require_room
from densegeo.runtime.bundle import STAGES, Graph, Manifest
from densegeo.runtime.kept import kept_at

if TYPE_CHECKING:
    from densegeo.runtime.backends.cuda_frames import CudaFrames

log = logging.getLogger("densegeo")

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
AS_THEY_ARE = ("session.disable_quant_qdq", "1")  # optimizers would move fp8 into operators that have none of it
ALL_OR_NONE = ("session.disable_cpu_ep_fallback", "1")  # a graph that the provider does not take whole is an error
CACHE = "onnxruntime-tensorrt"  # among the user's cache
_ROW = backend_row("onnxruntime")


class Provider(NamedTuple):
    """An execution provider of ONNX Runtime. options: (index of the GPU, manifest) -> its options.

    prepare: loads libraries that it needs and would not find. alone: whether it takes whole graphs or none. needs: what
    is often missing where it does not start. limit: its option for the bytes that a session may take.
    """

    title: str
    options: Callable[[str, Manifest], dict[str, str]]
    prepare: Callable[[Any], None] = lambda ort: None
    alone: bool = False
    needs: str = ""
    limit: str = ""


def open_backend(
    directory: Path, manifest: Manifest, device: str, sharing: Sharing = ALONE, threads: int | None = None
) -> OrtBackend | CudaFrames:
    """The backend of `densegeo.backends`' table. Raises BackendError, ConfigError, BundleError.

    On a GPU, with a bundle that has kernels for it, images go there as they are and stay there between the networks.
    """
    backend = OrtBackend(directory, manifest, device, threads=threads, sharing=sharing, load=False)
    if backend.device != "cpu":
        try:
            from densegeo.runtime.backends.ort_frames import OrtFrames

            return OrtFrames(directory, manifest, backend, sharing)
        except BackendError as error:
            if sharing.priority:  # streams that are ONNX Runtime's own have none
                raise
            log.warning("%s: images are prepared on the CPU: %s", directory, error)
    backend.load()
    return backend


def open_tensorrt(directory: Path, manifest: Manifest, device: str, sharing: Sharing = ALONE) -> OrtBackend:
    """The same on TensorRT, which builds its engines when a graph is first loaded and keeps them in the user's cache.

    Raises BackendError, ConfigError, BundleError.
    """
    return OrtBackend(directory, manifest, device, backend_row("onnxruntime-tensorrt"), sharing=sharing)


class OrtBackend(GraphBackend):
    """Sessions over a bundle's graphs on one execution provider."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        device: str,
        row: BackendRow = _ROW,
        threads: int | None = None,
        *,
        sharing: Sharing = ALONE,
        load: bool = True,
    ) -> None:
        """row: of the table, whose providers are tried. threads: of each session's pool. load: the first bucket's
        graphs, at once.

        A memory limit is held by every session of the CUDA provider for its own: its weights, and an equal part of what
        is left.
        """
        self._threads = threads
        self.name = row.name
        try:
            self._ort = import_onnxruntime()
        except Exception as error:  # a broken installation raises more than ImportError
            raise BackendError(f"onnxruntime cannot be imported ({error}). Reinstall it: {row.install}.") from error
        require_precision(row, manifest)
        self._provider, self.device = choose_provider(row, device, self._ort.get_available_providers())
        self._row = PROVIDERS[self._provider]
        kind = precision_row(manifest.precision)
        self._as_they_are = kind.quantized and not kind.integer
        self._options = self._row.options(self.device.partition(":")[2], manifest)
        self._limits = dict[str, int]()  # of a session's memory, by the graph's file
        if self.device != "cpu" and sharing.memory_limit is not None:
            require_room(directory, networks_need(manifest), sharing.memory_limit, self.device)
            self._limits = session_limits(manifest, sharing.memory_limit)
        self._row.prepare(self._ort)
        self._directory, self._manifest = directory, manifest
        if load:
            self.load()

    def load(self) -> None:
        """Load the first bucket's graphs. Raises BackendError, BundleError."""
        self._start(self._directory, self._manifest)

    def _infer(self, loaded: Any, graph: Graph, array: NDArray[Any]) -> NDArray[np.float32]:
        spec = graph.inputs[0]
        feed = {spec.name: np.ascontiguousarray(array, dtype=np.dtype(spec.dtype))}
        try:
            (output,) = loaded.run([graph.outputs[0].name], feed)
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            raise BackendError(f"ONNX Runtime failed in {graph.file} on {self.device}: {error}") from error
        return np.asarray(output).astype(np.float32, copy=False)

    def session(self, graph: Graph, options: Mapping[str, str]) -> Any:
        """A session of its own for a graph, with these options of the provider besides. Raises BackendError."""
        return self._session(self._directory / graph.file, self._options | dict(options))

    @property
    def library(self) -> Any:
        """The module onnxruntime."""
        return self._ort

    def _load(self, path: Path) -> Any:
        return self._session(path, self._options)

    def _session(self, path: Path, provider_options: Mapping[str, str]) -> Any:
        if self._row.limit and path.name in self._limits:
            provider_options = {**provider_options, self._row.limit: str(self._limits[path.name])}
        options = session_options(self._ort)
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if self._as_they_are:
            options.add_session_config_entry(*AS_THEY_ARE)
        if self._row.alone:
            options.add_session_config_entry(*ALL_OR_NONE)
        try:
            session = self._ort.InferenceSession(
                str(path),
                options,
                providers=[self._provider],
                provider_options=[dict(provider_options)],
                enable_fallback=int(not self._row.alone),
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {path} on {self.device}: {error}") from error
        if session.get_providers()[0] != self._provider:
            instead = "another backend" if self._row.alone else 'device="cpu"'
            raise BackendError(
                f"ONNX Runtime could not start {self._provider} (its log says why; often {self._row.needs}). Use "
                f"{instead}, or repair the installation."
            )
        return session


def require_precision(row: BackendRow, manifest: Manifest) -> None:
    """Raises BackendError for a bundle of a type that the backend's kernels do not have."""
    plan, lacking = manifest.quantization, row.lacking(manifest.precision, manifest.base)
    if plan is not None and plan.convolutions and (why := without_convolutions(row)):
        raise BackendError(f"This bundle has 8-bit convolutions. {why}, or build it from a plan without them.")
    if lacking is None:
        return
    able = [other for other in BACKENDS if other.lacking(manifest.precision, manifest.base) is None]
    first, *others = sorted(able, key=lambda other: bool(_condition(other)))
    also = ", ".join(f'"{other.name}"{_condition(other)}' for other in others)
    floats = [name for name in FLOATS if name in row.precisions]
    remedy = f"`--precision {floats[0]}` or {' or '.join(floats[1:])}"
    if kinds := [name for name in QUANTIZED if name in row.precisions]:
        remedy += f" ({' and '.join(kinds)}: with `--base {floats[0]}`)"
    raise BackendError(
        f"This bundle is {lacking}, and {row.title} has no {lacking} for its operators"
        f"{'' if row.gpu_only else ', neither on CPUs nor on GPUs'}. Use "
        f'backend="{first.name}" (or {also}), or build it with {remedy}.'
    )


def _condition(row: BackendRow) -> str:
    """What else a bundle needs to run with a backend, in words."""
    if row.runs == "engines":
        return " with engines"
    return "" if len(row.devices) > 1 else " on a GPU" if row.gpu_only else " on a CPU"


def choose_provider(row: BackendRow, device: str, available: Sequence[str]) -> tuple[str, str]:
    """(execution provider, device name) for "auto", "cpu", "cuda" or "cuda:N". available: of the installed library.

    Raises BackendError where the library or the machine lacks what the row's only device needs.
    """
    kind, index = parse_device(device)
    if kind == "cpu" and row.gpu_only:
        raise BackendError(
            f'The {row.name} backend runs on NVIDIA GPUs only. Use backend="onnxruntime" for device="cpu".'
        )
    provider = row.providers["cuda"]
    needs_cuda = kind == "cuda" or row.gpu_only
    if needs_cuda and provider not in available:
        other = "" if row.gpu_only else ', or use device="cpu"'
        raise BackendError(
            f"This ONNX Runtime has no {PROVIDERS[provider].title} provider. Install it, in place of the extra cpu: "
            f"{install_hint('gpu')}{other}."
        )
    if row.gpu_only and not has_cuda_driver():
        raise BackendError(
            f"{row.title} needs a GPU, and there is no NVIDIA driver here (libcuda.so.1 cannot be loaded)."
        )
    if needs_cuda or (provider in available and has_cuda_driver()):
        return provider, f"cuda:{index or 0}"
    return row.providers["cpu"], "cpu"


def _load_libraries(ort: Any) -> None:
    """CUDA's and cuDNN's libraries from the packages that the extra gpu brings: the system does not look there.

    ONNX Runtime before 1.21 has the system's alone.
    """
    if not hasattr(ort, "preload_dlls"):
        return
    with redirect_stdout(io.StringIO()) as printed:  # it prints what it does not find; the system may still have that
        ort.preload_dlls()
    if printed.getvalue():
        log.info("onnxruntime.preload_dlls: %s", printed.getvalue().strip())


def _cuda_options(index: str, manifest: Manifest) -> dict[str, str]:
    """Of onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, for shapes that never change.

    use_tf32, on by default, would round float32 operands to 11 bits, beyond the bounds of float32 bundles. Convolutions
    are measured once a shape, with as much workspace as they want; memory grows by what is asked for, and not to the
    next power of two.
    """
    searched = {"cudnn_conv_algo_search": "EXHAUSTIVE", "cudnn_conv_use_max_workspace": "1"}
    return {"device_id": index, "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested", **searched}


def session_limits(manifest: Manifest, limit: int) -> dict[str, int]:
    """Bytes for the session of every graph, by its file: its weights, and an equal part of what weights leave."""
    graphs = [(stage, getattr(bucket, stage).file) for bucket in manifest.buckets for stage in STAGES]
    weights = {stage: manifest.files[f"{stage}.safetensors"].bytes for stage in STAGES}
    spare = limit - sum(weights[stage] for stage, _ in graphs)
    if spare <= 0:
        raise BackendError(
            f"ONNX Runtime keeps a copy of the weights for each of {len(manifest.buckets)} sizes and batches, and "
            f"memory_limit is {-spare} bytes below that: raise it, or build a bundle of fewer sizes."
        )
    return {file: weights[stage] + spare // len(graphs) for stage, file in graphs}


def _tensorrt_options(index: str, manifest: Manifest) -> dict[str, str]:
    """Of onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html; none of them is about TF32.

    The provider knows a graph in its cache by names and not by weights, so every bundle has a folder of its own.
    """
    low = (name for name in FLOATS if not PRECISIONS[name].exact)
    options = {"device_id": index} | {f"trt_{name}_enable": str(manifest.base == name) for name in low}
    if (folder := engine_cache(manifest, index)) is not None:
        for kind in ("engine", "timing"):
            options |= {f"trt_{kind}_cache_enable": "True", f"trt_{kind}_cache_path": str(folder)}
    return options


def engine_cache(manifest: Manifest, index: str) -> Path | None:
    """The folder of a bundle's engines for a GPU of this machine, by its index; None where there can be no cache."""
    files = (f"{name} {file.sha256}" for name, file in sorted(manifest.files.items()))
    folder = kept_at(CACHE, manifest.build_key, index, *files)
    try:
        if folder is not None:
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    return folder


def _load_tensorrt(ort: Any) -> None:
    """TensorRT's libraries, which its Python package loads from where it lies. Raises BackendError."""
    _load_libraries(ort)
    try:
        import_module("tensorrt")
    except Exception as error:  # a broken installation raises more than ImportError
        raise BackendError(f"tensorrt cannot be imported ({error}). Reinstall it: pip install tensorrt.") from error


PROVIDERS = {
    CPU: Provider("CPU", lambda index, manifest: {}),
    CUDA: Provider(
        "CUDA",
        _cuda_options,
        prepare=_load_libraries,
        needs="the CUDA or cuDNN libraries are missing, which the extra gpu brings",
        limit="gpu_mem_limit",
    ),
    TENSORRT: Provider(
        "TensorRT",
        _tensorrt_options,
        prepare=_load_tensorrt,
        alone=True,
        needs="TensorRT is missing or of another version than this ONNX Runtime was built for",
    ),
}
