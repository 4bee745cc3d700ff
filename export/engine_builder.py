"""ONNX graphs -> TensorRT engines in a bundle, each built in a child process; works without a GPU with TensorRT-RTX.

Networks are strongly typed: the graph says the precision. One engine serves several architectures where that costs no
speed; fp8 engines are built one an architecture (together they lose the merged QKV product: DESIGN section 7).
"""

from __future__ import annotations

import gzip
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from densegeo.architectures import OLDEST, RTX_TARGETS, names
from densegeo.backends import ENGINE_LIBRARIES, NETWORKS, installed_version
from densegeo.errors import ConfigError, EngineError, ResourceError
from densegeo.export.engine_worker import Result, Spec
from densegeo.export.graph_inputs import with_weight_inputs
from densegeo.export.machine import GIB, available_memory
from densegeo.extras import install_hint
from densegeo.files import cache_directory
from densegeo.precision import PRECISIONS
from densegeo.runtime.bundle import STAGES, Bucket, Engine, FileDigest, Manifest
from densegeo.runtime.engine_log import parse_log
from densegeo.runtime.engines import FOLDER, fingerprint, reusable

# Anonymous memory of a build with constant weights, in sizes of the weights: the builder's copy, and the growing plan
# while it is written. 8.6 GB of fp8 weights did not fit into 19.8 GiB.
BUILD_FACTOR = 2.6
BUILD_BASE = GIB  # and what any build needs
Progress = Callable[[str], object]


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How engines are built. None leaves a setting to the library."""

    library: str = "auto"  # auto, tensorrt or tensorrt_rtx
    weights: Literal["auto", "constant", "input"] = "auto"
    workspace_mib: int | None = None
    optimization_level: int | None = None  # 0 to 5
    weight_streaming: bool = False
    version_compatible: bool = False
    timeout_s: int = 7200  # of one engine
    memory_gib: float | None = None  # limit of the builder; default: what is available

    def validated(self) -> EngineOptions:
        """Raises ConfigError for an impossible setting; the library is chosen."""
        if self.library not in ("auto", *ENGINE_LIBRARIES):
            raise ConfigError(f"there is no builder {self.library!r}; there are auto, {', '.join(ENGINE_LIBRARIES)}")
        if self.weights not in ("auto", "constant", "input"):
            raise ConfigError(f"--weights {self.weights!r} is none of auto, constant, input")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ConfigError(f"--optimization-level {self.optimization_level} is not between 0 and 5")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ConfigError(f"--workspace-mib {self.workspace_mib} is not positive")
        return msgspec.structs.replace(self, library=find_library(self.library))

    def settings(self) -> dict[str, int]:
        """The settings that shape an engine, as the worker takes them."""
        settings = {
            "tf32": 0,  # no choice: it tells these engines from older ones, which had it
            "optimization_level": self.optimization_level,
            "workspace_bytes": None if self.workspace_mib is None else self.workspace_mib << 20,
            "weight_streaming": int(self.weight_streaming) or None,
            "version_compatible": int(self.version_compatible) or None,
        }
        return {name: value for name, value in settings.items() if value is not None}


def find_library(name: str) -> str:
    """The builder to use: the named one, or with "auto" the first installed. Raises EngineError when there is none."""
    candidates = tuple(ENGINE_LIBRARIES) if name == "auto" else (name,)
    for library in candidates:
        if find_spec(library) is not None:
            return library
    raise EngineError(
        f"{' or '.join(candidates)} is not installed: pip install tensorrt (data-centre GPUs, Jetson), or "
        f"{install_hint('tensorrt-rtx')} (Ampere and later; builds without a GPU too)"
    )


def library_version(library: str) -> str:
    """The installed version, read from its distribution without importing it. Raises EngineError."""
    for distribution in ENGINE_LIBRARIES[library].distributions:
        if (version := installed_version(distribution)) is not None:
            return version
    raise EngineError(f"{library} can be imported, but no distribution of it is installed: reinstall it with pip")


def target_groups(library: str, precision: str, architectures: Sequence[int]) -> list[tuple[int, ...]]:
    """Which architectures share an engine: one group for all, or one an architecture where the precision's row says so.

    Raises ConfigError for an architecture that has no such precision or that the library cannot build for here.
    """
    row, builder = PRECISIONS[precision], ENGINE_LIBRARIES[library]
    first = max(row.first_architecture, OLDEST)
    if early := [number for number in architectures if number < first]:
        raise ConfigError(
            f"there is no {precision} before sm_{first}, so no engine for {names(early)}: "
            "leave those out, or build them with another --precision (fp16; int8 where a model has it)"
        )
    if unknown := [number for number in architectures if not builder.knows(number)]:
        other = next(library.name for library in ENGINE_LIBRARIES.values() if not library.named_targets)
        raise ConfigError(
            f"{builder.title} has no target for {names(unknown)}; it has {names(RTX_TARGETS)}. Use --builder {other} "
            f"on a machine with that GPU, or --backend {NETWORKS.name}."
        )
    if not architectures:
        return [()]
    return [(number,) for number in architectures] if row.engine_each else [tuple(sorted(architectures))]


def choose_weights(options: EngineOptions, weight_bytes: int) -> Literal["constant", "input"]:
    """Whether weights go into the engine or are bound at run time: constants where the build fits into memory.

    Raises ResourceError when constants were asked for and do not fit.
    """
    if options.weights == "input":
        return "input"
    limit = memory_limit(options)
    needed = constant_memory(weight_bytes)
    if limit is None or needed <= limit:
        return "constant"
    if options.weights == "auto":
        return "input"
    raise ResourceError(
        f"building with constant weights needs about {needed / GIB:.1f} GiB of memory, {limit / GIB:.1f} GiB can be "
        "had: say --weights input (the engine takes them from the bundle's weight file), or use a larger machine"
    )


def constant_memory(weight_bytes: int) -> int:
    """Bytes that a build with the weights inside the engine needs."""
    return int(BUILD_FACTOR * weight_bytes) + BUILD_BASE


def memory_limit(options: EngineOptions) -> int | None:
    """Bytes that the builder may take; None where the system does not tell and nothing was asked."""
    available = available_memory()
    if options.memory_gib is None:
        return None if available is None else int(0.9 * available)
    return int(options.memory_gib * GIB)


class PlannedEngine(NamedTuple):
    """An engine before it is built: its record, which says what it depends on and where it will lie; of which graph."""

    engine: Engine
    graph: str  # file in the bundle
    group: tuple[int, ...]  # of architectures that share it


def planned_engines(
    buckets: Sequence[Bucket],
    precision: str,
    architectures: Sequence[int],
    options: EngineOptions,
    files: Mapping[str, FileDigest],
) -> list[PlannedEngine]:
    """One of every graph for every group of architectures. files: of the bundle, graphs and weights among them.

    Raises ConfigError, EngineError and ResourceError, before anything is built.
    """
    groups, version = target_groups(options.library, precision, architectures), library_version(options.library)
    planned = []
    for bucket in buckets:
        for stage in STAGES:
            graph, weights = getattr(bucket, stage).file, files[f"{stage}.safetensors"]
            for group in groups:
                record = Engine(
                    stage=stage,
                    bucket=bucket.name,
                    graph_sha256=files[graph].sha256,
                    weights_sha256=weights.sha256,
                    precision=precision,
                    library=options.library,
                    version=version,
                    architectures=[f"sm_{number}" for number in group],
                    weights=choose_weights(options, weights.bytes),
                    options=options.settings(),
                    fingerprint="",
                    file="",
                    log="",
                    weight_inputs=[],
                    seconds=0.0,
                    peak_bytes=0,
                    activation_bytes=0,
                    weight_bytes=0,
                )
                planned.append(PlannedEngine(_named(record), graph, group))
    return planned


def _named(record: Engine) -> Engine:
    """With its fingerprint and files; what differs in anything has other names, so that none overwrites another."""
    digest = fingerprint(record)
    targets = "+".join(name.replace("_", "") for name in record.architectures) or "ampere"
    stem = f"{FOLDER}/{record.stage}_{record.bucket}.{targets}.{digest[:8]}"
    return msgspec.structs.replace(record, fingerprint=digest, file=f"{stem}.engine", log=f"{stem}.log.gz")


def build_engines(
    directory: Path,
    planned: Iterable[PlannedEngine],
    options: EngineOptions,
    *,
    old: tuple[Path, Manifest] | None,
    progress: Progress,
    finished: Sequence[Engine] = (),
) -> Iterator[Engine]:
    """Build what is wanted into `directory`/engines, and give each record when it is done.

    directory: holds the graphs and weights. old: a bundle whose engines are taken over where their fingerprints agree.
    finished: engines that are there already, whole. Raises EngineError; nothing is left in `directory` but finished
    engines.
    """
    by_fingerprint = {engine.fingerprint: engine for engine in finished}
    (directory / FOLDER).mkdir(exist_ok=True)
    for engine, graph, group in planned:
        if engine.fingerprint in by_fingerprint:
            yield by_fingerprint[engine.fingerprint]
            continue
        progress(engine.file)
        older = reusable(*old, engine.fingerprint) if old else None
        if old and older:
            for name, source in ((engine.file, older.file), (engine.log, older.log)):
                shutil.copyfile(old[0] / source, directory / name)
            yield msgspec.structs.replace(older, file=engine.file, log=engine.log)
        else:
            yield build_engine(directory, directory / graph, engine, options, group, progress)


def build_engine(
    directory: Path, graph: Path, engine: Engine, options: EngineOptions, group: Sequence[int], progress: Progress
) -> Engine:
    """Build one engine in a child process. Raises EngineError that names the graph and the last layer seen."""
    log = directory / (engine.log + ".text")
    inputs: list[str] = []
    with tempfile.TemporaryDirectory(prefix=".engine-", dir=directory) as scratch:
        source = graph
        if engine.weights == "input":
            source = graph.with_name(f".{graph.stem}.inputs.onnx")  # beside the weight file that it refers to
            inputs = with_weight_inputs(graph, source)
        targets = [RTX_TARGETS[number] for number in group] if ENGINE_LIBRARIES[engine.library].named_targets else []
        spec = Spec(
            library=engine.library,
            graph=str(source.absolute()),
            engine=str((directory / engine.file).absolute()),
            log=str(log.absolute()),
            timing_cache=str(timing_cache(engine.library, engine.version, targets)),
            targets=targets,
            options=engine.options,
            memory_bytes=memory_limit(options) or 0,
        )
        file = Path(scratch) / "spec.json"
        file.write_bytes(msgspec.json.encode(spec))
        try:
            result = _run(file, log, graph.name, options.timeout_s, progress)
        finally:
            if source != graph:
                source.unlink(missing_ok=True)
    text = log.read_text(errors="replace")
    with gzip.open(directory / engine.log, "wt") as packed:
        packed.write(text)
    log.unlink()
    built = parse_log(text)
    return msgspec.structs.replace(
        engine,
        weight_inputs=inputs,
        seconds=round(result.seconds, 2),
        peak_bytes=result.peak_bytes,
        activation_bytes=built.activation_bytes,
        weight_bytes=built.weight_bytes,
    )


def _run(spec: Path, log: Path, graph: str, timeout_s: int, progress: Progress) -> Result:
    """Run the worker to its end, passing its phases to `progress`. Raises EngineError."""
    command = [sys.executable, "-m", "densegeo.export.engine_worker", str(spec)]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    expired = threading.Event()

    def stop() -> None:
        expired.set()
        worker.kill()

    timer = threading.Timer(timeout_s, stop)
    errors: deque[str] = deque(maxlen=50)
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stderr is not None
    drain = threading.Thread(target=errors.extend, args=(worker.stderr,), daemon=True)
    last: dict[str, object] = {}
    timer.start()
    drain.start()
    try:
        for line in worker.stdout:
            try:
                last = msgspec.json.decode(line)
            except msgspec.DecodeError:
                errors.append(line)  # something else was printed
                continue
            if "phase" in last:
                progress(f"{graph}: {last['phase']} {last['done']}/{last['total']}")
        code = worker.wait()
    finally:
        timer.cancel()
        worker.kill()  # nothing goes on when this process is interrupted
        worker.wait()
        worker.stdin.close()  # never written to: see the worker's `end_with_parent`
        drain.join(timeout=5)
    if code == 0 and "engine_bytes" in last:
        return msgspec.convert(last, Result)
    raise EngineError(_failure(graph, code, last, "".join(errors), log, timeout_s if expired.is_set() else None))


def _failure(graph: str, code: int, last: dict[str, object], errors: str, log: Path, timeout_s: int | None) -> str:
    """One paragraph on why a build failed: the graph, what happened, where, and the log, which is kept."""
    kept_log = _keep_log(log, graph)
    layer = last_layer(log)
    if timeout_s is not None:
        event = f"took longer than {timeout_s} s and was stopped (--engine-timeout)"
    elif "error" in last:
        event = f"failed: {last['error']}"
    elif code < 0:
        name = signal.Signals(-code).name
        event = f"crashed ({name}" + ("; most likely the system ran out of memory)" if name == "SIGKILL" else ")")
    else:
        lines = [line for line in errors.strip().splitlines() if line.strip()]
        event = f"failed: {lines[-1] if lines else f'exit {code}'}"
        if "MemoryError" in errors or "bad_alloc" in errors:
            event += " (out of memory: try --weights input or --memory-gib)"
    place = f", at {layer}" if layer else ""
    return f"building the engine of {graph} {event}{place}. The builder's log: {kept_log}"


def last_layer(log: Path) -> str:
    """The last layer or node that a builder's log names."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    pattern = r"(?:Parsing node: |Registering layer: |\[ONNX Layer: |Compiling kernel for )([^\s\]]+)"
    layers: list[str] = re.findall(pattern, text)
    return layers[-1] if layers else ""


def timing_cache(library: str, version: str, targets: Sequence[str]) -> Path:
    """The timing cache of one builder version and device; without targets the device is this machine's."""
    folder = cache_directory() / "timing"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder / f"{library}-{version}-{'+'.join(targets) or 'here'}.cache"


def _keep_log(log: Path, graph: str) -> Path | str:
    if not log.is_file():
        return "none was written"
    folder = cache_directory() / "failed"
    folder.mkdir(exist_ok=True, mode=0o700)
    target = folder / f"{Path(graph).stem}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    shutil.copyfile(log, target)
    return target
