"""A TensorRT library whose engines are ONNX Runtime. Its contexts refuse what TensorRT refuses.

Sources are NvInferRuntime.h and the docstrings of tensorrt_rtx 1.7; the function is named where a rule is applied.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from densegeo.runtime.bundle import Engine, Graph, Manifest, Stage
from densegeo.runtime.tensorfile import tensor_offsets
from tests.cuda.standin import Driver

ALIGNMENT = 256
WORKSPACE = 5000  # bytes an image
USER_MANAGED = "user managed"


class StandInTensorRT:
    """The module that `load_library` finds. graphs: the folder of the float32 graphs that stand for the engines.

    misaligned: addresses that were refused for their alignment. refusing: what fails on purpose: "engine", "context",
    "launch" or "budget", and the engine's file.
    """

    def __init__(self, driver: Driver, bundle: Path, manifest: Manifest, graphs: Path) -> None:
        self.driver, self.bundle, self.manifest, self.graphs = driver, bundle, manifest, graphs
        self.misaligned: list[str] = []
        self.refusing: set[tuple[str, str]] = set()
        self.workspaces: set[int] = set()  # addresses
        self.compiled: list[str] = []  # engines whose kernels were not in a cache
        self.budgets: dict[str, int] = {}  # of weights kept on the device, by the engine's file
        self.__version__ = manifest.engines[0].version
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=USER_MANAGED)
        self._records = {manifest.files[engine.file].sha256: engine for engine in manifest.engines}
        self._sessions: dict[str, Any] = {}
        self._results: dict[tuple[str, bytes], Any] = {}

    class Logger:
        WARNING = 1

        def __init__(self, level: int) -> None: ...

    def Runtime(self, logger: Logger) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def compute(self, graph: Graph, array: Any) -> Any:
        """What a graph makes of its input. An engine is a function: what was computed once is not computed again."""
        import onnxruntime

        if graph.file not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._sessions[graph.file] = onnxruntime.InferenceSession(str(self.graphs / graph.file), options)
        key = graph.file, hashlib.sha256(array).digest()
        if key not in self._results:
            self._results[key] = self._sessions[graph.file].run(None, {graph.inputs[0].name: array})[0]
        return self._results[key]

    def _deserialize(self, data: bytes) -> StandInEngine | None:
        record = self._records[hashlib.sha256(data).hexdigest()]
        return None if ("engine", record.file) in self.refusing else StandInEngine(self, record)


class StandInEngine:
    """ICudaEngine."""

    def __init__(self, library: StandInTensorRT, record: Engine) -> None:
        bucket = next(bucket for bucket in library.manifest.buckets if bucket.name == record.bucket)
        self.library, self.record, self.device = library, record, library.driver.device()
        self.graph: Graph = getattr(bucket, record.stage)
        self.names = {self.graph.inputs[0].name, self.graph.outputs[0].name, *record.weight_inputs}
        self.device_memory_size_v2 = WORKSPACE * bucket.batch
        self.weights = weights_of(library.bundle, record)
        self._contexts = 0

    def create_runtime_config(self) -> StandInConfig:
        return StandInConfig(self)

    def create_execution_context(self, config: StandInConfig) -> StandInContext | None:
        """nullptr on failure (createExecutionContext)."""
        assert config.strategy == USER_MANAGED
        if config.cache is not None and config.cache.content != self.record.file.encode():
            self.library.compiled.append(self.record.file)
            config.cache.content = self.record.file.encode()
        self._contexts += 1
        return None if ("context", self.record.file) in self.library.refusing else StandInContext(self)

    def get_weight_streaming_automatic_budget(self) -> int:
        return 1000

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self.library.budgets.get(self.record.file, 0)

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        """Fails while contexts are live (setWeightStreamingBudgetV2); the Python property says nothing then."""
        if not self._contexts and ("budget", self.record.file) not in self.library.refusing:
            self.library.budgets[self.record.file] = budget


class StandInConfig:
    """IRuntimeConfig of TensorRT-RTX."""

    def __init__(self, engine: StandInEngine) -> None:
        self.strategy, self.cache = "", None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> StandInCache:
        return StandInCache()

    def set_runtime_cache(self, cache: StandInCache) -> bool:
        self.cache: StandInCache | None = cache
        return True


class StandInCache:
    """IRuntimeCache: what was compiled, here the engine's name."""

    content = b""

    def deserialize(self, blob: bytes) -> bool:
        """False, and unchanged, for a blob of another environment (IRuntimeCache.deserialize)."""
        if not blob.startswith(b"engines/"):
            return False
        self.content = blob
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.content)


class StandInContext:
    """IExecutionContext."""

    def __init__(self, engine: StandInEngine) -> None:
        self._engine, self._driver = engine, engine.library.driver
        self._addresses: dict[str, int] = {}
        self._workspace: tuple[int, int] | None = None

    def set_tensor_address(self, name: str, address: int) -> bool:
        """False for a name that the engine has not; addresses must be multiples of 256 (setTensorAddress)."""
        if name not in self._engine.names:
            return False
        if address % ALIGNMENT:
            self._engine.library.misaligned.append(f"{self._engine.record.file} {name} {address % ALIGNMENT}")
            return False
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """False for a shape outside the profile's range, here the one static shape (setInputShape)."""
        given = self._engine.graph.inputs[0]
        return name == given.name and list(shape) == given.shape

    def set_device_memory(self, memory: int, size: int) -> None:
        """Aligned to 256, and as large as the engine says (setDeviceMemoryV2)."""
        assert memory % ALIGNMENT == 0
        assert size >= self._engine.device_memory_size_v2
        self._engine.library.workspaces.add(memory)
        self._workspace = memory, size

    def execute_async_v3(self, stream: int) -> bool:
        """False unless every input and output has an address, and the context memory (enqueueV3)."""
        engine, addresses = self._engine, dict(self._addresses)
        missing = sorted(name for name in engine.names if not addresses.get(name))
        if missing or self._workspace is None or ("launch", engine.record.file) in engine.library.refusing:
            return False
        return self._driver.enqueue(stream, lambda: self._run(addresses))

    def _run(self, addresses: dict[str, int]) -> None:
        """The stream has come here: all memory must be live now, as large as the tensors, and the engine's device's."""
        engine, graph = self._engine, self._engine.graph
        assert self._workspace is not None
        address, size = self._workspace
        self._view(address, (size,), np.uint8)
        ctypes.memset(address, 0xAB, engine.device_memory_size_v2)  # it is scratch memory
        for name, expected in engine.weights.items():
            actual = self._view(addresses[name], expected.shape, np.uint8)
            assert np.array_equal(actual, expected), f"{name} of {engine.record.file} is not the file's"
        given, made = graph.inputs[0], graph.outputs[0]
        array = self._view(addresses[given.name], given.shape)
        self._view(addresses[made.name], made.shape)[:] = engine.library.compute(graph, array)

    def _view(self, address: int, shape: Any, dtype: Any = np.float32) -> Any:
        return self._driver.view(address, shape, dtype, what=self._engine.record.file, device=self._engine.device)


def weights_of(bundle: Path, record: Engine) -> dict[str, Any]:
    """An engine's weight inputs as the bundle's file has them, in bytes."""
    if not record.weight_inputs:
        return {}
    path = bundle / f"{record.stage}.safetensors"
    start, offsets = tensor_offsets(path)
    data = np.fromfile(path, np.uint8)[start:]
    ends = [*sorted(offsets.values())[1:], data.size]
    sizes = dict(zip(sorted(offsets.values()), ends, strict=True))
    return {name: data[offsets[name] : sizes[offsets[name]]] for name in record.weight_inputs}


def engine_file(stage: Stage, bucket: str) -> str:
    """Where a stand-in's engine lies in a bundle."""
    return f"engines/{stage}_{bucket}.standin.engine"
