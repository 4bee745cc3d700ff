"""One TensorRT engine with its execution context: what TensorRT refuses is an error with a name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from densegeo.errors import EngineError
from densegeo.runtime.backends.cuda_weights import ALIGNMENT
from densegeo.runtime.backends.tensorrt_cache import CompiledKernels


class Stepper:
    """Runs one engine on one stream; weights that are inputs are bound once. Raises EngineError."""

    def __init__(
        self, path: Path, engine: Any, context: Any, weights: Mapping[str, int], compiled: CompiledKernels | None = None
    ) -> None:
        self._path, self._engine, self._context, self._compiled = path, engine, context, compiled
        self.workspace = int(engine.device_memory_size_v2)  # bytes
        for name, address in weights.items():
            self._bind(name, address)

    def use(self, workspace: Any) -> None:
        """Take the shared workspace: what another engine of the same stream left there is lost."""
        self._context.set_device_memory(int(workspace.handle), workspace.size)

    def launch(self, stream: Any, addresses: Mapping[str, int]) -> None:
        """Enqueue one run on these addresses, on a stream or in the recording that it belongs to."""
        for name, address in addresses.items():
            self._bind(name, address)
        if not self._context.execute_async_v3(int(stream.__cuda_stream__()[1])):
            raise EngineError(f"TensorRT could not launch {self._path.name}; its log says why")

    def keep_compiled(self) -> None:
        """For the next process: what running it compiled."""
        if self._compiled is not None:
            self._compiled.keep()

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            why = f"; it must be a multiple of {ALIGNMENT}" if address % ALIGNMENT else ""
            raise EngineError(f"TensorRT refused address {address:#x} for {name} of {self._path.name}{why}")


def stream_weights(engine: Any, path: Path) -> None:
    """Let as many weights stay on the device as TensorRT thinks there is room for; the rest come from the host at each
    run. Before a context is made: an engine built for streaming keeps all of them on the device otherwise.

    Raises EngineError.
    """
    budget = int(engine.get_weight_streaming_automatic_budget())
    engine.weight_streaming_budget_v2 = budget
    if int(engine.weight_streaming_budget_v2) != budget:
        raise EngineError(f"TensorRT refused {budget / 1e9:.2f} GB as the weight streaming budget of {path.name}")


def make_context(trt: Any, engine: Any, path: Path, digest: str, gpu: str) -> tuple[Any, CompiledKernels | None]:
    """A context whose workspace is given to it later, and what TensorRT-RTX compiles for it. Raises EngineError.

    digest: SHA-256 of the engine's file. TensorRT itself compiles nothing at run time: it has no runtime config before
    10.11, and no cache in it since (docs/tensorrt.md).
    """
    strategy, compiled = trt.ExecutionContextAllocationStrategy.USER_MANAGED, None
    if hasattr(engine, "create_runtime_config"):
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(config, "create_runtime_cache"):
            compiled = CompiledKernels(config, digest, gpu)
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context(strategy)
    if context is None:
        raise EngineError(
            f"TensorRT made no execution context for {path.name}: most often the device has no memory left for it; "
            "its log says why"
        )
    return context, compiled
