"""What backends share that load each graph of a bundle: the first bucket's at once, others' when first used."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError, BundleError
from densegeo.runtime.bundle import MANIFEST, STAGES, Bucket, Graph, Manifest, Stage
from densegeo.runtime.guard import Original


class GraphBackend(ABC):
    """Loaded graphs of one bundle on one device, by bucket and stage. A subclass calls `_start` when it is ready."""

    name: str
    device: str

    def run(self, bucket: Bucket, stage: Stage, array: NDArray[Any]) -> NDArray[np.float32]:
        """Run one graph; `array` is cast to what it takes, the output to float32.

        Raises BackendError, and BundleError where the graph must be loaded and is not there, or another bundle's.
        """
        graph: Graph = getattr(bucket, stage)
        spec = graph.inputs[0]
        if list(array.shape) != spec.shape:
            raise BackendError(f"{graph.file} takes {spec.name} of shape {spec.shape}, not {list(array.shape)}.")
        return self._infer(self._loaded(bucket, stage), graph, array)

    def close(self) -> None:
        """Drop all graphs."""
        with self._lock:
            self._closed = True
            self._graphs.clear()

    def _start(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._original = directory, Original(directory / MANIFEST)
        self._graphs: dict[str, Any] = {}  # by file
        self._lock = threading.Lock()
        self._closed = False
        for stage in STAGES:
            self._loaded(manifest.buckets[0], stage)

    def _loaded(self, bucket: Bucket, stage: Stage) -> Any:
        graph: Graph = getattr(bucket, stage)
        loaded = self._graphs.get(graph.file)
        if loaded is not None:
            return loaded
        with self._lock:
            if self._closed:
                raise BackendError("This estimator is closed. Make a new Estimator.")
            if graph.file not in self._graphs:
                path = self._directory / graph.file
                if not path.is_file():
                    raise BundleError(
                        f"{self._directory} lacks the graph {graph.file}. Copy it again or rebuild the bundle."
                    )
                loaded = self._load(path)
                self._original.require(needed=True)  # it may be another bundle's
                self._graphs[graph.file] = loaded
            return self._graphs[graph.file]

    @abstractmethod
    def _load(self, path: Path) -> Any:
        """Load a graph. Raises BackendError."""

    @abstractmethod
    def _infer(self, loaded: Any, graph: Graph, array: NDArray[Any]) -> NDArray[np.float32]:
        """Run a loaded graph on its only input; several threads may. Raises BackendError."""
