"""Models that OpenVINO compiled for this CPU, kept for the next process where compiling takes long."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from densegeo.runtime.backends.openvino_graphs import RECIPE
from densegeo.runtime.bundle import STAGES, Manifest
from densegeo.runtime.kept import keep, keep_within, kept_at, read_kept

log = logging.getLogger("densegeo")
FOLDER = "openvino"  # in the user's cache
WORTH_S = 0.2  # what compiles faster is compiled each time
LARGEST = 1 << 30  # bytes of a bundle's weights: what is kept holds a copy of a stage's
CAPACITY = 4 << 30  # bytes of the folder


class CompiledModels:
    """Compiles a bundle's graphs, or takes what was compiled before from the same files in the same way."""

    def __init__(self, openvino: Any, core: Any, directory: Path, manifest: Manifest, options: dict[str, Any]) -> None:
        self._core, self._directory, self._options = core, directory, options
        self._files = manifest.files
        self._weights = [name for stage in STAGES if (name := f"{stage}.safetensors") in manifest.files]
        properties = ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
        self._environment = [openvino.__version__, *(str(core.get_property("CPU", name)) for name in properties)]
        self._environment += [f"recipe {RECIPE}", *(f"{name}={value}" for name, value in sorted(options.items()))]

    def load(self, graph: str, read: Callable[[], Any]) -> Any:
        """The compiled model of a graph file. read: makes the model that is compiled. Raises what OpenVINO raises."""
        path = self._place([graph, *self._weights])
        if (stored := read_kept(path)) is not None:
            try:
                model = self._core.import_model(stored, "CPU", self._options)
            except Exception as error:  # RuntimeError, or whatever the bindings let through
                log.info("%s: what was compiled before cannot be used: %s", graph, error)
            else:
                with contextlib.suppress(OSError):
                    os.utime(path)  # type: ignore[arg-type]  # the last ones to be used are the last to go
                return model
        began = time.perf_counter()
        model = self._core.compile_model(read(), "CPU", self._options)
        if path is not None and time.perf_counter() - began >= WORTH_S:
            keep(path, model.export_model().getvalue())
            keep_within(path.parent, CAPACITY)
        return model

    def _place(self, names: list[str]) -> Path | None:
        """Where the model of these files is kept; None where they are too large, or not in the manifest (yet)."""
        if not all(name in self._files for name in names) or sum(self._files[name].bytes for name in names) > LARGEST:
            return None
        return kept_at(FOLDER, *self._environment, *map(self._about, names))

    def _about(self, name: str) -> str:
        """A file of the bundle. Its time and size tell when it is not the manifest's any more."""
        status = (self._directory / name).stat()
        return f"{name} {self._files[name].sha256} {status.st_size} {status.st_mtime_ns}"
