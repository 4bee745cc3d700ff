"""The TensorRT backend as far as a machine without a GPU shows it: what is refused, and how kernels are launched."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import msgspec
import numpy as np
import pytest

from densegeo.backends import BACKENDS
from densegeo.errors import BackendError
from densegeo.kernels.contract import Argument, Axis, LaunchContract
from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.outputs import SPACES, Decode, Output
from densegeo.runtime.backends import open_backend, tensorrt_engines
from densegeo.runtime.backends.cuda_input import Pixels
from densegeo.runtime.backends.cuda_kernels import Kernels, pack
from densegeo.runtime.backends.tensorrt_kernels import launched, resize_depth_name
from densegeo.runtime.backends.tensorrt_network import Network
from densegeo.runtime.bundle import STAGES, Bucket, Graph, TensorSpec, read_manifest
from densegeo.runtime.resample import Placement, whole
from densegeo.runtime.verified import forget, is_verified, remember
from densegeo.size import Size

CONTRACT = LaunchContract(
    name="split.test",
    symbol="split_kernel",
    architecture=89,
    arguments=[Argument("source", "*fp32", 16), Argument("rows", "i32"), Argument("scale", "fp32")],
    constants={},
    warps=4,
    shared=0,
    grid=[Axis("rows", 32)],
    hidden=["global_scratch", "profile_scratch"],
    fp_fusion=False,
    triton="3.9.0",
    digest="",
)


class Noted:
    """Kernels that are not run."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, Any]] = []

    def launch(self, name: str, stream: object, arguments: Any, batch: int = 1) -> None:
        self.launches.append((name, arguments))


class NoMemory:
    """A device's memory in name: buffers have addresses, and nothing can be recorded."""

    stream = None

    def __init__(self) -> None:
        self._end = 256

    def device_buffer(self, size: int) -> Namespace:
        self._end += -(-size // 256) * 256
        return Namespace(handle=self._end, size=size)

    def clear(self, target: int, size: int) -> None:
        pass

    def lend(self) -> None:
        pass

    def give_back(self, *given: object) -> None:
        pass

    def graph(self, enqueue: object) -> None:
        raise RuntimeError("nothing is recorded here")


class NoRing:
    """Slots in name: what they bring back is 0."""

    def __init__(self) -> None:
        self.memory = NoMemory()

    def reserve(self, images: object, maps: object) -> None:
        pass

    @contextmanager
    def slot(self) -> Iterator[Namespace]:
        yield Namespace(fetch=lambda source, shape: None, results=lambda: [np.zeros(1)])


ENGINES = {stage: Namespace(use=lambda workspace: None, launch=lambda *given: None) for stage in STAGES}


def toy_bucket(decode: Decode, channels: int) -> Bucket:
    """32x16 pixels."""
    pictures = len(decode.outputs)
    shapes = {
        "encoder": ([1, 3, 16, 32], [1, 16, 2, 4]),
        "denoiser": ([1, 16, 2, 4], [1, 4, 64] if decode.packing == "tokens" else [1, 16, 2, 4]),
        "decoder": ([pictures, 16, 2, 4], [pictures, channels, 16, 32]),
    }
    graphs = {
        stage: Graph("", *([TensorSpec("x", "float32", shape)] for shape in ends), nodes=0, parameters=0, flops=0)
        for stage, ends in shapes.items()
    }
    return Bucket(32, 16, **graphs)


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_arguments_are_packed_in_launch_order() -> None:
    packed = pack(CONTRACT, {"scale": 0.25, "source": 4096, "rows": 7})
    # cuda.core.launch takes addresses as int; it refuses c_void_p (seen with 0.6 to 1.2)
    assert [type(value) for value in packed] == [int, ctypes.c_int32, ctypes.c_float, int, int]
    assert [getattr(value, "value", value) for value in packed] == [4096, 7, 0.25, 0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": 4096, "rows": 7}, "wrong: scale"),
        ({"source": 4096, "rows": 7, "scale": 1.0, "rose": 1}, "wrong: rose"),
        ({"source": 4100, "rows": 7, "scale": 1.0}, "source must be a multiple of 16"),
        ({"source": 4096, "rows": 1 << 31, "scale": 1.0}, "rows is 2147483648, and has 32 bits"),
    ],
)
def test_a_launch_that_breaks_the_contract_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        pack(CONTRACT, values)


def test_a_bundle_without_kernels_for_this_gpu_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no kernels for sm_90: `densegeo engines .* --gpu-arch 90` makes them"):
        Kernels(tmp_path, [CONTRACT], 90)


FACING = Output(kind="normals", clamp="before_mean", frame="dsine")
# What bundles say, and the channels of their decoders: 1 where the mean is in the last convolution.
DECODES = [
    (Decode(packing="latent", outputs=(FACING,)), 3),
    *(
        (Decode(packing="tokens", outputs=(Output(kind="depth", clamp="before_mean", space=space), FACING)), 3)
        for space in SPACES
    ),
    *(
        (Decode(packing="latent", outputs=(Output(kind="depth", clamp="after_mean", space=space),)), channels)
        for space in SPACES
        for channels in (3, 1)
    ),
]


def test_every_bundled_kernel_is_launched_and_no_other() -> None:
    pytest.importorskip("triton")
    from densegeo.kernels.table import variants

    needed = {name for decode, channels in DECODES for name in launched(decode, channels)}
    assert needed == {row.name for row in variants() if row.bundled}


@pytest.mark.parametrize(("decode", "channels"), DECODES)
def test_launches_fit_the_compiled_rows(decode: Decode, channels: int) -> None:
    """All of an image's launches, in order, each with its row's own arguments and what their contract asks for."""
    pytest.importorskip("triton")
    from densegeo.kernels.compile import arguments_of
    from densegeo.kernels.table import variants

    rows = {row.name: row for row in variants()}
    kernels = Noted()
    network = Network(NoRing(), kernels, Namespace(decode=decode), toy_bucket(decode, channels), ENGINES, None)  # type: ignore[arg-type]
    kernels.launches.clear()
    network.prepare(0, Pixels(32, (93, 3), None), Placement((2, 0, 28, 16), (31, 29)), "bgr")
    network.prepare(0, Pixels(32, (40, 1), None), Placement((2, 0, 28, 16), (30, 28)), "nv12")
    network._enqueue(None)
    actual = network.outputs(0, Placement((2, 0, 28, 16), (31, 29))).named()
    assert tuple(actual) == decode.names
    shapes = {"prediction": (29, 31), "normals": (29, 31, 3)}
    assert {name: array.shape for name, array in actual.items()} == {name: shapes[name] for name in actual}
    if decode.depth_kind is not None:
        metres = Metres(decode.depth_kind, 2.0, 0.5, 1.0, 9.0)  # type: ignore[arg-type]
        network._map(decode.outputs[0], 0, whole(Size(32, 16)), 64, metres)
    assert sorted(name for name, _ in kernels.launches) == sorted(launched(decode, channels))
    for name, arguments in kernels.launches:
        assert type(arguments) is rows[name].arguments
        contract = msgspec.structs.replace(CONTRACT, name=name, arguments=arguments_of(rows[name]))
        packed = pack(contract, arguments._asdict())
        assert [getattr(value, "value", value) for value in packed[:-2]] == pytest.approx(list(arguments))
    placed = {name: arguments._asdict() for name, arguments in kernels.launches}
    assert placed["preprocess.u8_fp32"]["red"] == 2
    assert placed["preprocess.ycbcr_fp32"]["chroma"] == 28 * 40
    if decode.depth_kind is None:
        return
    depth = placed[resize_depth_name(decode.outputs[0], channels, metres=False)]
    line = placed[resize_depth_name(decode.outputs[0], channels, metres=True)]
    assert [line[name] for name in ("scale", "shift", "near", "far")] == [2.0, 0.5, 1.0, 9.0]
    named = ("box_width", "box_height", "width", "height", "channel_stride", "row_stride")
    assert [depth[name] for name in named] == [28, 16, 31, 29, 16 * 32, 32]


def test_a_bundle_without_engines_says_how_to_build_them(bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"no TensorRT engines\. Build some: densegeo engines"):
        open_backend("tensorrt", bundle, read_manifest(bundle), "auto")


@pytest.mark.skipif(has_driver(), reason="there is a driver")
def test_a_machine_without_a_driver_is_told_so() -> None:
    from densegeo.runtime.backends.cuda_memory import open_device

    with pytest.raises(BackendError, match="no NVIDIA driver"):
        open_device("auto")
    with pytest.raises(BackendError, match="NVIDIA GPUs only"):
        open_device("cpu")


def test_auto_takes_no_backend_that_was_not_verified_here(
    new_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    bundle = new_bundle()
    manifest = read_manifest(bundle)
    row = next(row for row in BACKENDS if row.name == "tensorrt")
    monkeypatch.setattr("densegeo.runtime.backends.BACKENDS", (row,))
    monkeypatch.setattr(type(row), "available", lambda self: True)
    with pytest.raises(BackendError, match=r"tensorrt: the bundle has no engines; `densegeo engines"):
        open_backend("auto", bundle, manifest, "auto")
    with_engines = msgspec.structs.replace(manifest, engines=(Namespace(),))
    with pytest.raises(BackendError, match=r"not verified on this machine; `densegeo verify .* --backend tensorrt`"):
        open_backend("auto", bundle, with_engines, "auto")
    remember(bundle, "tensorrt", "cuda:0")
    assert is_verified(bundle, "tensorrt")
    assert not is_verified(bundle, "onnxruntime")

    def refuse(device: str) -> None:
        raise BackendError("it was tried")

    monkeypatch.setattr(tensorrt_engines, "open_device", refuse)
    with pytest.raises(BackendError, match="it was tried"):
        open_backend("auto", bundle, with_engines, "auto")
    (bundle / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes() + b"\n")
    assert not is_verified(bundle, "tensorrt")  # another bundle by now
    remember(bundle, "tensorrt", "cuda:0")
    forget(bundle, "tensorrt")
    assert not is_verified(bundle, "tensorrt")
