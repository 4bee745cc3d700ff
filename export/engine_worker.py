"""Builds one TensorRT engine, in a process of its own: `python -m densegeo.export.engine_worker SPEC.json`.

A builder can crash or take all memory; this process has a limit, writes its log line by line, and reports on standard
output in JSON lines: {"phase", "done", "total"} on the way, and at the end a Result or {"error"}. It ends when standard
input does: a build that was killed must not go on in the files of the next one.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from densegeo.files import atomic_write


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What to build. Paths are absolute."""

    library: str  # "tensorrt" or "tensorrt_rtx"
    graph: str
    engine: str
    log: str
    timing_cache: str
    targets: list[str]  # compute capabilities by the library's names; empty: its default
    options: dict[str, int]  # see `engine_builder.EngineOptions.settings`
    memory_bytes: int  # limit of this process's own data; 0: none


class Result(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float
    peak_bytes: int
    engine_bytes: int


def main(spec: Spec) -> None:
    """Build, and exit 0, or report an error and exit 1."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    limit_memory(spec.memory_bytes)
    trt = import_module(spec.library)
    started = time.monotonic()
    with open(spec.log, "w", buffering=1) as log:
        logger = _logger(trt, log)
        builder = trt.Builder(logger)
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # 11 knows no other
        network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(spec.graph):
            errors = (parser.get_error(index) for index in range(parser.num_errors))
            listed = [f"{error.desc()} (node {error.node_name()}, {error.node_operator()})" for error in errors]
            fail("; ".join(listed) or "it cannot be parsed")
        config = builder.create_builder_config()
        _configure(trt, config, spec)
        cache = _load_cache(config, Path(spec.timing_cache))
        config.progress_monitor = _monitor(trt)
        data = builder.build_serialized_network(network, config)
        if data is None:
            fail(logger.last_error or "the builder gave no engine and no reason")
        for path, content in ((spec.engine, data), (spec.timing_cache, cache.serialize())):
            with atomic_write(Path(path)) as partial:
                partial.write_bytes(memoryview(content))
        result = Result(seconds=time.monotonic() - started, peak_bytes=_peak(), engine_bytes=data.nbytes)
    report(msgspec.to_builtins(result))


def end_with_parent() -> None:
    """Wait until whoever started this process has closed the other end of standard input, or died; then stop."""
    while os.read(0, 1):
        pass
    os._exit(1)


def limit_memory(count: int) -> None:
    """Cap anonymous memory; mapped files (weights) do not count. Systems without the limit go without."""
    if not count:
        return
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (count, count))
    except (ImportError, ValueError, OSError):
        print("the memory of the builder cannot be limited here", file=sys.stderr)


def _configure(trt: Any, config: Any, spec: Spec) -> None:
    options = spec.options
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: 11 bits are too few for what a graph has in float32
    if "optimization_level" in options:
        config.builder_optimization_level = options["optimization_level"]
    if "workspace_bytes" in options:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_bytes"])
    if options.get("weight_streaming"):
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.get("version_compatible"):
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # it would be host code inside the engine
    if spec.targets:
        config.num_compute_capabilities = len(spec.targets)
        for index, target in enumerate(spec.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), index)


def _load_cache(config: Any, path: Path) -> Any:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return config.get_timing_cache()


def _logger(trt: Any, file: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            file.write(f"{severity.name} {message}\n")
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last_error = message

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            report({"phase": phase_name, "done": step + 1, "total": self.totals.get(phase_name, 0)})
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

    return Monitor()


def _peak() -> int:
    """Most resident bytes of this process so far; rusage would count what its parent held when it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(fields: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")
    sys.stdout.flush()


def fail(message: str) -> None:
    report({"error": message})
    sys.exit(1)


if __name__ == "__main__":
    main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Spec))
