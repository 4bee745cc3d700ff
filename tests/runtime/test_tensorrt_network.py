"""The tensorrt backend's bookkeeping without a GPU: buffers, offsets, order of launches and arguments are its own.

Host memory stands in for the device's, references for kernels, ONNX Runtime for engines.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from densegeo.export.cubins import write_cubins  # noqa: E402
from densegeo.kernels.contract import LaunchContract  # noqa: E402
from densegeo.kernels.log_dequantize import log_dequantize  # noqa: E402
from densegeo.kernels.normals import normals  # noqa: E402
from densegeo.kernels.preprocess import preprocess  # noqa: E402
from densegeo.kernels.split import split  # noqa: E402
from densegeo.runtime import Estimator  # noqa: E402
from densegeo.runtime.backends.cuda_kernels import pack  # noqa: E402
from densegeo.runtime.backends.tensorrt_engines import Network, TensorRTBackend  # noqa: E402
from densegeo.runtime.bundle import STAGES, Bucket, Manifest, Stage, read_manifest  # noqa: E402
from densegeo.runtime.resample import choose_bucket, place  # noqa: E402
from densegeo.runtime.verify import relative_error  # noqa: E402
from tests.support.shared import Build  # noqa: E402


def view(address: int, shape: Any, dtype: Any = np.float32) -> NDArray[Any]:
    """What lies at an address of this process."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), shape=(size,))
    return raw.view(dtype).reshape(shape)


class Buffer:
    """Memory as CUDA gives it: aligned to 256 bytes, filled with what a float reads as NaN.

    ordered: freed in the stream's order, as device memory is. Pinned memory is gone at once: it is then poisoned.
    """

    _kept: ClassVar[list[NDArray[np.uint8]]] = []  # addresses stay valid, whatever runs late

    def __init__(self, size: int, *, ordered: bool) -> None:
        self._memory = np.full(size + 256, 255, np.uint8)
        self._kept.append(self._memory)
        self._ordered = ordered
        self.size, self.handle = size, self._memory.ctypes.data + -self._memory.ctypes.data % 256

    def __del__(self) -> None:
        if not self._ordered:
            self._memory.fill(255)


class HostMemory:
    """`cuda_memory.Memory` on the host. Work is done when the stream is waited for: as late as CUDA may do it."""

    def __init__(self) -> None:
        self._late: list[Callable[[], None]] = []
        self.stream = SimpleNamespace(sync=self.run_late)

    def device_buffer(self, size: int) -> Buffer:
        return Buffer(max(size, 1), ordered=True)

    def pinned_buffer(self, size: int) -> Buffer:
        return Buffer(max(size, 1), ordered=False)

    def to_device(self, target: int, source: Buffer, size: int) -> None:
        self._late.append(lambda: ctypes.memmove(target, source.handle, size) and None)

    def to_host(self, target: Buffer, source: int, size: int) -> None:
        self._late.append(lambda: ctypes.memmove(target.handle, source, size) and None)

    def run_late(self) -> None:
        late, self._late = self._late, []
        for step in late:
            step()

    def enqueue(self, step: Callable[[], None]) -> None:
        self._late.append(step)


class ReferenceKernels:
    """`cuda_kernels.Kernels`: arguments are held to the compiled kernels' contracts, then the reference runs."""

    def __init__(self, memory: HostMemory, contracts: list[LaunchContract]) -> None:
        self._memory, self._contracts = memory, {contract.name: contract for contract in contracts}

    def launch(self, name: str, stream: Any, values: Mapping[str, float], **extents: int) -> None:
        pack(self._contracts[name], values)
        steps = {
            "preprocess": self._preprocess,
            "split": self._split,
            "normals": self._normals,
            "log_dequantize": partial(self._depth, first="clamp_mean" in name),
        }
        step = steps[name.partition(".")[0]]
        self._memory.enqueue(lambda: step(values))

    def _preprocess(self, v: Any) -> None:
        shape = (int(v["source_height"]), int(v["source_width"]), 3)
        assert (v["row_stride"], v["pixel_stride"]) == (3 * shape[1], 3)
        made = preprocess(
            torch.from_numpy(view(v["frame"], shape, np.uint8)),
            (v["width"], v["height"]),
            box=(v["left"], v["top"], v["box_width"], v["box_height"]),
            color="bgr" if v["red"] else "rgb",
        )
        view(v["rgb"], made.shape)[:] = made.numpy()

    def _split(self, v: Any) -> None:
        tokens = 2 * v["rows"] * v["columns"]
        velocity = torch.from_numpy(view(v["velocity"], (v["batch"], tokens, v["features"])))
        names = ("scale", "shift", "depth_sign", "normal_sign")
        made = split(velocity, 16 * v["rows"], 16 * v["columns"], **{name: v[name] for name in names})
        view(v["latents"], made.shape)[:] = made.numpy()

    def _decoded(self, v: Any) -> tuple[Any, tuple[int, ...], tuple[int, int]]:
        plane, columns = v["channel_stride"], v["row_stride"]
        shape = (1, v["batch_stride"] // plane, plane // columns, columns)
        box = tuple(v[name] for name in ("left", "top", "box_width", "box_height"))
        return torch.from_numpy(view(v["decoded"], shape)), box, (v["width"], v["height"])

    def _depth(self, v: Any, first: bool) -> None:
        decoded, box, size = self._decoded(v)
        _, _, made = log_dequantize(decoded, box, size, scale=1.0, shift=0.0, clamp_first=first, with_prediction=True)
        view(v["prediction"], made.shape)[:] = made.numpy()

    def _normals(self, v: Any) -> None:
        made = normals(*self._decoded(v))
        view(v["normals"], made.shape)[:] = made.numpy()


class GraphStepper:
    """`tensorrt_engines.Stepper`: a graph of the bundle on ONNX Runtime."""

    workspace = 64

    def __init__(self, memory: HostMemory, bundle: Path, bucket: Bucket, stage: Stage) -> None:
        import onnxruntime

        self._memory, self._graph = memory, getattr(bucket, stage)
        self._session = onnxruntime.InferenceSession(str(bundle / self._graph.file))

    def use(self, workspace: Buffer) -> None:
        assert workspace.size >= self.workspace

    def launch(self, stream: Any, addresses: dict[str, int]) -> None:
        given, made = self._graph.inputs[0], self._graph.outputs[0]

        def step() -> None:
            array = view(addresses[given.name], given.shape)
            view(addresses[made.name], made.shape)[:] = self._session.run(None, {given.name: array})[0]

        self._memory.enqueue(step)


def emulated(bundle: Path, manifest: Manifest, contracts: list[LaunchContract]) -> TensorRTBackend:
    """The backend with its networks over emulated devices; nothing of CUDA is opened."""
    memory = HostMemory()
    backend = TensorRTBackend.__new__(TensorRTBackend)
    backend._manifest, backend._memory, backend._lock = manifest, memory, Lock()
    backend._closed, backend._gpu = False, SimpleNamespace(set_current=lambda: None, sync=memory.run_late)
    backend._networks = {}
    for bucket in manifest.buckets:
        steppers = {stage: GraphStepper(memory, bundle, bucket, stage) for stage in STAGES}
        kernels = ReferenceKernels(memory, contracts)
        backend._networks[bucket.name] = Network(memory, kernels, manifest, bucket, steppers)  # type: ignore[arg-type]
    return backend


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory) -> list[LaunchContract]:
    """Those of the compiled kernels, as a bundle's manifest holds them."""
    return write_cubins(tmp_path_factory.mktemp("cubins"), (89,))


@pytest.mark.parametrize(("model", "without"), [("fe2e", ()), ("fe2e", ("decoder",)), ("fiffdepth", ())])
def test_frames_give_what_the_estimator_gives(
    model: str, without: tuple[str, ...], batched_bundle: Build, contracts: list[LaunchContract]
) -> None:
    """Six images of different sizes, three together, one alone and two together, against numpy's path."""
    bundle = batched_bundle(model, without=without)
    manifest = read_manifest(bundle)
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (40 + 3 * i, 60 - i, 3), dtype=np.uint8) for i in range(6)]
    bucket = choose_bucket(manifest.buckets, 64, 48)
    backend = emulated(bundle, manifest, contracts)
    placements = [place(bucket, (image.shape[1], image.shape[0]), "pad") for image in images]
    parts = slice(0, 4), slice(4, 6)
    results = [one for part in parts for one in backend.estimate(bucket, images[part], placements[part])]
    with Estimator(bundle, "onnxruntime", "cpu", fit="pad") as estimator:
        wanted = [estimator(image) for image in images]
    assert len(results) == 6
    for (prediction, found), geometry in zip(results, wanted, strict=True):
        assert relative_error(prediction, geometry.prediction) <= 1e-5
        assert (found is None) == (geometry.normals is None) == (model == "fiffdepth")
        if found is not None and geometry.normals is not None:
            assert np.median(np.abs(found - geometry.normals)) <= 1e-5


def test_stages_run_one_by_one(batched_bundle: Build, contracts: list[LaunchContract]) -> None:
    bundle = batched_bundle("fe2e", without=("decoder",))
    manifest = read_manifest(bundle)
    backend = emulated(bundle, manifest, contracts)
    for bucket in manifest.buckets:
        for stage in STAGES:
            graph = getattr(bucket, stage)
            array = np.random.default_rng(1).uniform(-1, 1, graph.inputs[0].shape).astype(np.float32)
            with Estimator(bundle, "onnxruntime", "cpu") as estimator:
                wanted = estimator._backend.run(bucket, stage, array)
            assert relative_error(backend.run(bucket, stage, array), wanted) <= 1e-6
