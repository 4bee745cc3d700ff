"""What TensorRT-RTX compiles for a GPU when an engine first runs, kept in the user's cache for the next process."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from densegeo.errors import EngineError
from densegeo.files import cache_directory
from densegeo.runtime import state
from densegeo.runtime.engines import check_owner

log = logging.getLogger("densegeo")
FOLDER = "tensorrt-rtx"


class CompiledKernels:
    """The runtime cache of one engine on one GPU. Without a cache folder, every process compiles anew."""

    def __init__(self, config: Any, engine: str, gpu: str) -> None:
        """config: the IRuntimeConfig that gets the cache. engine: SHA-256 of its file. Raises EngineError."""
        self._path = place(engine, gpu)
        self._cache = config.create_runtime_cache()
        stored = _read(self._path)
        # TensorRT checks that it was made by this version for this GPU and driver (IRuntimeCache.deserialize)
        self._stored = stored is not None and bool(self._cache.deserialize(stored))
        if not config.set_runtime_cache(self._cache):
            raise EngineError("TensorRT-RTX refused a runtime cache; its log says why")

    def keep(self) -> None:
        """Write it, unless it came from there: call it after the engine has run."""
        if self._stored or self._path is None:
            return
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            part.write_bytes(bytes(self._cache.serialize()))
            part.replace(self._path)
        except OSError as error:
            log.info("compiled kernels are not kept: %s", error)


def place(engine: str, gpu: str) -> Path | None:
    """The file for an engine on this GPU, with this machine's driver; None where there can be no cache."""
    try:
        folder = cache_directory() / FOLDER
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    return folder / hashlib.sha256(f"{engine}|{gpu}|{state.machine()}".encode()).hexdigest()


def _read(path: Path | None) -> bytes | None:
    """It runs as code, so only this user's is read."""
    if path is None or not path.is_file():
        return None
    try:
        check_owner(path)
        return path.read_bytes()
    except (EngineError, OSError):
        return None
