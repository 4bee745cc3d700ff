"""What TensorRT-RTX compiles for a GPU when an engine first runs, kept in the user's cache for the next process."""

from __future__ import annotations

from typing import Any

from densegeo.errors import EngineError
from densegeo.runtime.kept import keep, kept_at, read_kept

FOLDER = "tensorrt-rtx"


class CompiledKernels:
    """The runtime cache of one engine on one GPU. Without a cache folder, every process compiles anew."""

    def __init__(self, config: Any, engine: str, gpu: str) -> None:
        """config: the IRuntimeConfig that gets the cache. engine: SHA-256 of its file. Raises EngineError."""
        self._path = kept_at(FOLDER, engine, gpu)
        self._cache = config.create_runtime_cache()
        stored = read_kept(self._path)
        # TensorRT checks that it was made by this version for this GPU and driver (IRuntimeCache.deserialize)
        self._stored = stored is not None and bool(self._cache.deserialize(stored))
        if not config.set_runtime_cache(self._cache):
            raise EngineError("TensorRT-RTX refused a runtime cache; its log says why")

    def keep(self) -> None:
        """Write it, unless it came from there: call it after the engine has run."""
        if self._stored or self._path is None:
            return
        keep(self._path, bytes(self._cache.serialize()))
