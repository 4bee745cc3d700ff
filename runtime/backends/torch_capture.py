"""Work on fixed buffers, recorded once and replayed: a CUDA graph where the device has them.

A graph replays addresses, not shapes: so inputs are copied into the buffers it was recorded with, one that differs in
shape or type is an error and never a silent recording, and a recording counts only after it gave the eager result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from densegeo.errors import BackendError

WARM_UP = 3  # eager runs before recording: libraries choose their algorithms and allocate workspaces

log = logging.getLogger("densegeo")

Work = Callable[..., Tensor]


@contextmanager
def settings() -> Iterator[None]:
    """How the networks run on a GPU: float32 products in full, and convolutions in the way that was measured fastest.

    TF32, which torch allows in convolutions, keeps 11 bits and misses the bounds of float32 bundles by far (DESIGN 10).
    """
    products = torch.backends.cuda.matmul
    allowed, products.allow_tf32 = products.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            yield
    finally:
        products.allow_tf32 = allowed


class Recorder(Protocol):
    """What can record device work, after `warm_up` eager runs."""

    warm_up: int

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Record what `work` launches: (launch it again, the result's fixed buffer). Raises RuntimeError."""
        ...


# Why recordings keep memory, and why all of one device share a pool. A CUDA graph replays the device addresses that its
# kernels had when it was recorded. torch therefore takes the tensors made meanwhile from a private pool, which gives
# nothing back to the rest of the process as long as one of its graphs lives: else a replay would write into somebody
# else's tensors. A pool for each graph would hold the activations of every size and batch side by side, although no two
# graphs ever run at once. In a common pool a later recording uses again what was free at the end of the earlier ones,
# so that it grows to the largest graph alone if that is recorded first (`DeviceNetwork.warm_up`). The price is a rule:
# replays of one pool must not overlap, and one may overwrite what another left in memory that was not held when it was
# recorded. The rule is kept here: every replay is launched on the one stream for work under the lock of
# `torch_transfer.Ring.computing`, and a result is read by kernels that are launched behind it in the same block.
# Recording has a stream of its own, because what is recorded is all that this stream is given meanwhile; and the mode
# "thread_local", because other threads may allocate and copy while it lasts, which "global" would make an error.
class CudaRecorder:
    """CUDA graphs of one device in one memory pool, recorded on a stream of their own.

    Graphs of one pool may use each other's memory: read a result before another graph is replayed.
    """

    warm_up = WARM_UP

    def __init__(self, device: str, priority: int = 0) -> None:
        """priority: of what is recorded, see `sharing.Sharing`."""
        self._device = torch.device(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device, priority=priority)

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """See `Recorder`."""
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            capturing = torch.cuda.graph(  # other threads may go on allocating
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            )
            with capturing:
                result = work()
        return graph.replay, result


class HostRecorder:
    """Recordings on a CPU, for tests of what is around them: replaying runs the work again, on the same buffers."""

    warm_up = 1

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """See `Recorder`."""
        result = work()
        return lambda: result.copy_(work()), result


class Replay:
    """`work` on copies of the given tensors: eager at first, and replayed if a recording gives the same bits.

    name: for messages. examples: one tensor an input; their shapes, types and device are what calls must have.
    Without a recorder, or when recording fails (which is logged), every call is eager, under the same rules. Raises
    what `work` raises, and torch.OutOfMemoryError where the recording has no memory: a smaller one may have.
    """

    def __init__(self, name: str, work: Work, examples: tuple[Tensor, ...], recorder: Recorder | None) -> None:
        self.name, self._work = name, work
        self._inputs = tuple(example.clone() for example in examples)
        self._again: Callable[[], object] | None = None
        self._result = torch.empty(0)
        with torch.inference_mode(), settings():
            for _ in range(recorder.warm_up if recorder is not None else 1):
                eager = work(*self._inputs)
            if recorder is not None:
                self._record(recorder, eager.clone())

    @property
    def captured(self) -> bool:
        """Whether calls replay a recording."""
        return self._again is not None

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The result's buffer, which the next call overwrites. Raises BackendError for other shapes or types."""
        for buffer, tensor in zip(self._inputs, tensors, strict=True):
            if (tensor.shape, tensor.dtype, tensor.device) != (buffer.shape, buffer.dtype, buffer.device):
                raise BackendError(
                    f"{self.name} was recorded for {_describe(buffer)} and cannot take {_describe(tensor)}."
                )
        with torch.inference_mode():
            for buffer, tensor in zip(self._inputs, tensors, strict=True):
                buffer.copy_(tensor)
            if self._again is not None:
                self._again()
                return self._result
            with settings():
                return self._work(*self._inputs)

    def _record(self, recorder: Recorder, eager: Tensor) -> None:
        try:
            again, result = recorder.record(lambda: self._work(*self._inputs))
            again()
        except RuntimeError as error:
            if _without_memory(error):
                raise torch.OutOfMemoryError(f"{self.name}: there is no memory to record it") from error
            log.warning("%s runs eager, because recording it failed: %s", self.name, error)
            return
        if not torch.equal(result, eager):
            log.warning("%s runs eager, because its recording gave other numbers than the eager run.", self.name)
            return
        self._again, self._result = again, result


def _without_memory(error: BaseException | None) -> bool:
    """Whether it is that, or hides that: to end a recording that failed is an error of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"
