"""Whose work the torch backend waits for, and on which device: by the rules of torch's streams, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from densegeo.errors import BackendError  # noqa: E402
from densegeo.outputs import Maps  # noqa: E402
from densegeo.runtime.backends import torch_transfer  # noqa: E402
from densegeo.runtime.backends.torch_transfer import Ring  # noqa: E402
from tests.support.streams import Cuda, OnDevice, Stream  # noqa: E402


class Slots:
    """`Slot` that launches its copies and makes nothing."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def upload(self, pixels: Any) -> list[OnDevice]:
        self.cuda.launch("upload")
        return [OnDevice.create(self.cuda)]

    def download(self, results: Any) -> list[dict[str, torch.Tensor]]:
        self.cuda.launch("download")
        return [{"prediction": torch.zeros(1)}]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


@pytest.fixture
def ring(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Ring:
    """On cuda:1, while cuda:0 is the current device."""
    monkeypatch.setattr(torch_transfer, "Slot", lambda device: Slots(cuda))
    return Ring("cuda:1")


class Network:
    """What is computed: it notes its stream, its input and its result."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def __call__(self, frame: OnDevice) -> Maps[OnDevice]:
        self.cuda.launch("compute")
        self.stream, self.frame, self.result = self.cuda.current_stream(), frame, OnDevice.create(self.cuda)
        return Maps(self.result)


def made_on(cuda: Cuda, stream: Stream) -> None:
    with cuda.stream(stream):
        cuda.launch("make")


def test_a_kept_tensor_is_read_after_the_callers_work_and_before_what_follows(cuda: Cuda, ring: Ring) -> None:
    callers, network, image = Stream(cuda, 1), Network(cuda), OnDevice.create(cuda)
    made_on(cuda, callers)
    with cuda.stream(callers):
        cuda._device = 0  # the caller's current device is another one; its stream on cuda:1 is `callers`
        ring.keep(image, network)
        cuda._device = 1
        cuda.launch("use")
    assert cuda.ordered("make", "compute", "use")
    assert "copy" not in cuda.before
    assert not cuda.host, "nothing waits on the host"
    assert network.frame is image
    assert network.stream not in (callers, cuda.default_stream(1))
    assert image.read_on == {id(network.stream)}
    assert network.result.read_on == {id(callers)}


class Foreign:
    """An array of another library with DLPack, made on a stream of its own."""

    def __init__(self, cuda: Cuda, stream: Stream, device: int = 1) -> None:
        self.cuda, self.stream, self.index = cuda, stream, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.index

    def __dlpack__(self, stream: int) -> OnDevice:
        next(one for one in self.cuda.streams if one.cuda_stream == stream).wait_stream(self.stream)
        return OnDevice.create(self.cuda)


def from_dlpack(image: Foreign) -> OnDevice:
    """As torch does: it names its current stream on the array's device."""
    _, index = image.__dlpack_device__()
    return image.__dlpack__(stream=torch.cuda.current_stream(index).cuda_stream)


def described(stream: dict[str, int | None], pointer: int = 64) -> Any:
    shape = {"shape": (8, 8, 3), "typestr": "|u1", "data": (pointer, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=shape | stream)


@pytest.mark.parametrize("how", ["dlpack", "named", "default", "unnamed", "none"])
def test_anothers_array_is_read_after_its_work_and_copied_before_keep_returns(
    cuda: Cuda, ring: Ring, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = cuda.default_stream(1) if how == "default" else Stream(cuda, 1)
    made_on(cuda, theirs)
    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", from_dlpack)
    lying = OnDevice.create(cuda)
    monkeypatch.setattr(torch, "as_tensor", lambda image, device: lying)
    stream = {"named": {"stream": theirs.cuda_stream}, "default": {"stream": 1}, "none": {"stream": None}}.get(how, {})
    image = Foreign(cuda, theirs) if how == "dlpack" else described(stream, lying.data_ptr())
    network = Network(cuda)
    ring.keep(image, network)
    assert cuda.ordered("make", "copy", "compute")
    assert "copy" in cuda.host, "whoever owns it may overwrite or free it now"
    assert network.frame.read_on == {id(network.stream)}


def test_an_image_on_another_device_is_refused(cuda: Cuda, ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "as_tensor", lambda image, device: OnDevice.create(cuda))  # a copy: it lies elsewhere
    for image in (OnDevice.create(cuda, "cuda:0"), Foreign(cuda, Stream(cuda, 0), 0), described({"stream": 1})):
        with pytest.raises(BackendError, match=r"lie(s|) on cuda:\d.*move"):
            ring.keep(image, Network(cuda))


def test_channels_are_adjacent_in_what_the_kernels_get() -> None:
    """Pictures of torch are often (3, h, w), seen as (h, w, 3)."""
    planes = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    for image in (planes.permute(1, 2, 0), planes.numpy().transpose(1, 2, 0), planes.numpy()[:, ::-1].T.swapaxes(0, 1)):
        frame = Ring("cpu").keep(image, Maps).prediction
        assert frame is not None
        assert frame.stride(2) == 1
        np.testing.assert_array_equal(frame.numpy(), np.asarray(image))


def test_groups_of_images_stay_in_order_on_the_rings_device(cuda: Cuda, ring: Ring) -> None:
    network = Network(cuda)
    ring.run([np.zeros((8, 8, 3), np.uint8)], lambda frames: [network(frames[0])])
    assert cuda.ordered("upload", "compute", "download")
    assert "download" in cuda.host

    def fail(frames: list[Any]) -> Any:
        cuda.launch("half")
        raise RuntimeError("launch failed")

    with pytest.raises(RuntimeError, match="launch failed"):
        ring.run([np.zeros((8, 8, 3), np.uint8)], fail)
    assert "half" in cuda.host, "the slot is given back when the device is done with it"
