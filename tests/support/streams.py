"""What torch's documentation says of streams, without a GPU: which work is ordered after which.

Work is a name that is launched on the current stream. An event stands for all that its stream was given, a stream that
waits for it is ordered after that, and so is all that the host launches once it has waited. Entering a stream makes its
device the current one. Nothing else orders anything: streams know nothing of each other, the default ones included.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


class Event:
    def __init__(self, cuda: Cuda, after: set[str]) -> None:
        self._cuda, self.after = cuda, after

    def synchronize(self) -> None:
        self._cuda.host |= self.after


class Stream:
    """A stream of one device: what was launched on it, and what that is ordered after."""

    def __init__(self, cuda: Cuda, device: Any = None, handle: int = 0, priority: int = 0) -> None:
        self.priority = priority
        self._cuda, self.device, self.after = cuda, cuda.index(device), set[str]()
        self.cuda_stream = handle or 0x1000 + 8 * len(cuda.streams)
        cuda.streams.append(self)

    def record_event(self) -> Event:
        return Event(self._cuda, set(self.after))

    def wait_event(self, event: Event) -> None:
        self.after |= event.after

    def wait_stream(self, other: Stream) -> None:
        self.after |= other.after


class Cuda:
    """In `torch.cuda`'s place; device 0 is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.before = set[str](), dict[str, set[str]]()
        self.streams: list[Stream] = []
        self._device = 0
        self._default: dict[int, Stream] = {index: Stream(self, index, 1) for index in range(2)}
        self._current = dict(self._default)
        self._external: dict[int, Stream] = {}
        for name in ("stream", "current_stream", "default_stream", "synchronize", "ExternalStream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self._stream_class())

    def _stream_class(self) -> Any:
        """`torch.cuda.Stream`."""

        def make(device: Any = None, priority: int = 0) -> Stream:
            return Stream(self, device, priority=priority)

        make.priority_range = lambda: (0, -5)  # type: ignore[attr-defined]
        return make

    def index(self, device: Any) -> int:
        if device is None or isinstance(device, int):
            return self._device if device is None else device
        return int(torch.device(device).index)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """`torch.cuda.stream`: the current stream of its device, and that device the current one."""
        before = self._device, self._current[stream.device]
        self._device, self._current[stream.device] = stream.device, stream
        try:
            yield
        finally:
            self._device, self._current[stream.device] = before

    def current_stream(self, device: Any = None) -> Stream:
        return self._current[self.index(device)]

    def default_stream(self, device: Any = None) -> Stream:
        return self._default[self.index(device)]

    def ExternalStream(self, handle: int, device: Any = None) -> Stream:
        assert handle != 1, "torch's own streams have odd numbers"
        return next(stream for stream in self.streams if stream.cuda_stream == handle)

    def synchronize(self, device: Any = None) -> None:
        index = self.index(device)
        for stream in self.streams:
            if stream.device == index:
                self.host |= stream.after

    def launch(self, name: str) -> None:
        """Work on the current stream of the current device."""
        stream = self.current_stream()
        self.before[name] = stream.after | self.host
        stream.after |= self.host | {name}

    def ordered(self, *names: str) -> bool:
        """Whether each is after the one before it."""
        return all(first in self.before[second] for first, second in itertools.pairwise(names))


class OnDevice(Tensor):
    """A tensor that says it lies on cuda:1; `read_on` are the streams that its memory waits for."""

    lies = "cuda:1"
    read_on: set[int]
    cuda: Cuda

    @classmethod
    def create(cls, cuda: Cuda, lies: str = "cuda:1") -> OnDevice:
        tensor = torch.zeros(8, 8, 3, dtype=torch.uint8).as_subclass(cls)
        tensor.cuda, tensor.lies, tensor.read_on = cuda, lies, set()
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(self.lies)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def to(self, device: Any, copy: bool = False) -> OnDevice:  # type: ignore[override]
        assert torch.device(device) == self.device
        return self.clone() if copy else self

    def clone(self, memory_format: Any = None) -> OnDevice:  # type: ignore[override]
        self.cuda.launch("copy")
        return OnDevice.create(self.cuda, self.lies)

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.read_on.add(id(stream))
