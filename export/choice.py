"""What `densegeo build` makes where nothing was asked for: backend, precision, architectures that fit the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from densegeo.architectures import OLDEST, names
from densegeo.backends import BACKENDS, ENGINE_LIBRARIES, ENGINES, NAMES, NETWORKS, BackendRow, backend_row
from densegeo.errors import ConfigError
from densegeo.export.machine import GIB, Machine
from densegeo.extras import install_hint
from densegeo.precision import CALIBRATED, FLOATS, PRECISIONS
from densegeo.runtime.bundle import Choice

if TYPE_CHECKING:
    from densegeo.models.presets import Preset

AUTO = "auto"
EXACT = next(row.name for row in PRECISIONS.values() if row.exact)
LOW = PRECISIONS["bf16"]  # what GPUs and some CPUs run fastest without a plan
_ON_CPU = tuple(row for row in BACKENDS if row.runs == "graphs" and "cpu" in row.devices)


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for; AUTO and empty leave it open. convolutions: whether the plan has 8-bit ones."""

    backend: str = AUTO
    precision: str = AUTO
    base: str = ""
    architectures: tuple[int, ...] = ()
    calibration: Path | None = None
    convolutions: bool = False
    weight_streaming: bool = False


def choose(request: BuildRequest, machine: Machine, row: Preset) -> Choice:
    """Raises ConfigError for what cannot work, before anything is read."""
    if request.backend not in (AUTO, *NAMES):
        backends = ", ".join((AUTO, *NAMES))
        raise ConfigError(f"there is no backend {request.backend!r} to build for; there are {backends}")
    if request.precision not in (AUTO, *PRECISIONS):
        raise ConfigError(f"there is no precision {request.precision!r}; there are {', '.join((AUTO, *PRECISIONS))}")
    backend, why = _backend(request, machine)
    architectures = request.architectures
    if backend is ENGINES and not architectures and machine.gpu is not None:
        architectures = (machine.gpu.architecture,)
    precision, because = request.precision, "you asked for it"
    if precision == AUTO:
        precision, because = _precision(backend, architectures, request.calibration, machine)
    _refuse(request, backend, precision, architectures, machine, row)
    return Choice(
        backend=backend.name,
        precision=precision,
        architectures=list(architectures),
        what=_in_words(backend, precision, architectures, machine),
        why=f"backend: {why}; precision: {because}",
        instead=_instead(backend, precision, machine, convolutions=request.convolutions),
    )


def suggested(machine: Machine) -> tuple[str, str, str]:
    """(backend, precision, why) of a build for this machine where nothing is asked for. Imports nothing heavy."""
    backend, why = _backend(BuildRequest(), machine)
    architectures = (machine.gpu.architecture,) if backend is ENGINES and machine.gpu is not None else ()
    precision, because = _precision(backend, architectures, None, machine)
    return backend.name, precision, f"backend: {why}; precision: {because}"


def _backend(request: BuildRequest, machine: Machine) -> tuple[BackendRow, str]:
    """The backend, and why it."""
    if request.backend != AUTO:
        return backend_row(request.backend), "you asked for it"
    builders = [row for row in ENGINE_LIBRARIES.values() if row.name in machine.libraries]
    if request.architectures:
        if not builders:
            raise ConfigError(
                f"engines for {names(request.architectures)} need TensorRT: {install_hint('tensorrt-rtx')} (or "
                "tensorrt on a machine with that GPU); --backend onnxruntime puts our kernels for it beside the graphs "
                "alone"
            )
        return ENGINES, f"--gpu-arch means engines for {names(request.architectures)}"
    if machine.gpu is None:
        return _on_cpu(request.precision, machine, convolutions=request.convolutions)
    arch = machine.gpu.architecture
    if any(builder.knows(arch) for builder in builders):
        return ENGINES, f"{machine.gpu.name} (sm_{arch}) and TensorRT are here"
    lacks = f"{builders[0].title} has no target for sm_{arch}" if builders else "no TensorRT is installed"
    if machine.torch_cuda:
        return NETWORKS, f"{lacks}, and this torch runs our kernels on {machine.gpu.name}"
    graphs = (row for row in BACKENDS if row.runs == "graphs" and "cuda" in row.devices and not row.verified_only)
    graphs = (row for row in graphs if row.convolutions or not request.convolutions)  # ONNX Runtime's CUDA has none
    if (installed_row := next((row for row in graphs if _installed(row, machine)), None)) is not None:
        return installed_row, f"{lacks}, and torch here is no CUDA build"
    return NETWORKS, f"{lacks}, and nothing else is installed"


def _on_cpu(precision: str, machine: Machine, *, convolutions: bool) -> tuple[BackendRow, str]:
    """The fastest backend on the CPU that can run this precision, which may be open, and perhaps 8-bit convolutions."""
    low = precision != AUTO and PRECISIONS[precision].base == LOW.name
    cpu = f"no GPU was found, the CPU has {'' if machine.cpu_bf16 else 'no '}{LOW.name} units"
    reasons_against: list[str] = []
    # With units, or where it must be: those that have it first; else those that do without it.
    for row in sorted(_ON_CPU, key=lambda row: (LOW.name in row.precisions) != (machine.cpu_bf16 or low)):
        if not _installed(row, machine):
            reasons_against.append(f"{row.title} is not installed")
        elif convolutions and not row.convolutions:
            reasons_against.append(f"{row.title} would run 8-bit convolutions slower than float32 ones")
        elif LOW.name in row.precisions or not low:
            return row, ", and ".join([cpu, *(reasons_against or [f"{row.title} is installed"])])
    titles = " nor ".join(sorted((row.title for row in _ON_CPU), reverse=True))
    return NETWORKS, f"no GPU was found, and neither {titles} can run {LOW.name if low else 'it'} here"


def _installed(row: BackendRow, machine: Machine) -> bool:
    return machine.libraries.issuperset(row.modules)


def _on_gpu(row: BackendRow, machine: Machine) -> bool:
    """Whether what is built for this backend runs on this machine's GPU, and nowhere else."""
    return machine.gpu is not None and (row.gpu_only or (row is NETWORKS and machine.torch_cuda))


def _precision(
    backend: BackendRow, architectures: Sequence[int], calibration: Path | None, machine: Machine
) -> tuple[str, str]:
    """The precision where none was asked for, and why it."""
    if calibration is not None:
        from densegeo.calibration.plan import plan_file  # it needs torch, and `doctor` does not

        planned = [name for name in CALIBRATED if plan_file(calibration, name).is_file()]
        able = [name for name in planned if all(n >= PRECISIONS[name].first_architecture for n in architectures)]
        if not planned:
            raise ConfigError(f"{calibration} holds no plan: `densegeo calibrate` makes one")
        if not able:
            raise ConfigError(
                f"{calibration} holds a plan for {', '.join(planned)}, which {names(architectures)} lacks"
            )
        return able[0], f"{calibration} holds a plan for it"
    if backend.gpu_only or _on_gpu(backend, machine):
        architecture = LOW.first_architecture if machine.gpu is None else machine.gpu.architecture
        if min(architectures, default=architecture) >= LOW.first_architecture:
            return LOW.name, "GPUs have it from Ampere on, and fp8 needs a plan (densegeo calibrate)"
        return "fp16", f"there is no {LOW.name} before sm_{LOW.first_architecture}"
    if LOW.name not in backend.precisions:
        return EXACT, f"{backend.title} has no {LOW.name} kernels"
    if machine.cpu_bf16:
        return LOW.name, "the CPU has units for it"
    return EXACT, f"the CPU has no units for {LOW.name}"


def _refuse(
    request: BuildRequest,
    backend: BackendRow,
    precision: str,
    architectures: Sequence[int],
    machine: Machine,
    row: Preset,
) -> None:
    """Raises ConfigError for what cannot work."""
    if early := [number for number in architectures if number < OLDEST]:
        raise ConfigError(f"nothing can be built for {names(early)}: sm_{OLDEST} is the oldest architecture")
    base = request.base or PRECISIONS[precision].base
    _refuse_types(backend, precision, base, architectures, machine)
    _refuse_kernels(backend, precision, base)
    gpu = machine.gpu
    if gpu is None or not _on_gpu(backend, machine) or tuple(architectures) not in ((), (gpu.architecture,)):
        return
    needed = _needed(row, precision)
    if needed > gpu.memory and not request.weight_streaming:
        smaller = [name for name in PRECISIONS if _needed(row, name) <= gpu.memory]
        remedy = f"say --precision {' or '.join(smaller)}" if smaller else "no precision does; --weight-streaming might"
        raise ConfigError(
            f"{row.name} in {precision} needs {needed / GIB:.1f} GiB for its weights, and {gpu.name} has "
            f"{gpu.memory / GIB:.1f}: {remedy}"
        )


def _needed(row: Preset, precision: str) -> int:
    """Bytes on a GPU, at least."""
    from densegeo.export.engine_plan import CONTEXT

    return PRECISIONS[precision].bytes_of(row.bundle_parameters) + CONTEXT


def _refuse_types(
    backend: BackendRow, precision: str, base: str, architectures: Sequence[int], machine: Machine
) -> None:
    """Raises ConfigError for a type that the GPUs lack. Where torch has no 8-bit product it multiplies in the base."""
    kinds: tuple[str, ...] = (precision, base)
    if backend is not ENGINES:
        if machine.gpu is None or not _on_gpu(backend, machine):
            return
        kinds, architectures = (base,), (machine.gpu.architecture,)
    for first, kind in ((PRECISIONS[kind].first_architecture, kind) for kind in kinds if kind in PRECISIONS):
        if early := [number for number in architectures if number < first]:
            raise ConfigError(
                f"there is no {kind} before sm_{first}, so none for {names(early)}: say --precision fp16, or leave "
                "--precision out"
            )


def _refuse_kernels(backend: BackendRow, precision: str, base: str) -> None:
    """Raises ConfigError for a type that the backend has no kernels for."""
    lacking = backend.lacking(precision, base)
    if lacking is None or lacking not in PRECISIONS:  # a base that is no type is refused with its own words
        return
    able = [row.name for row in BACKENDS if row.runs != "engines" and not row.verified_only]
    able = [name for name in able if backend_row(name).lacking(precision, base) is None]
    bases = [name for name in PRECISIONS[precision].bases if name in backend.precisions]
    floats = [name for name in FLOATS if name in backend.precisions]
    by_base = PRECISIONS[precision].quantized and precision in backend.precisions and bases
    other = f"--base {bases[0]}" if by_base else f"--precision {floats[0]}"
    raise ConfigError(
        f"{backend.title} has no {lacking} kernels, so it cannot run {precision}: say --backend {' or '.join(able)}, "
        f"or {other}"
    )


def on_this_gpu(choice: Choice, machine: Machine) -> bool:
    """Whether what was chosen runs on the GPU of this machine."""
    row = backend_row(choice.backend)
    if machine.gpu is None or not _on_gpu(row, machine):
        return False
    return row is not ENGINES or choice.architectures == [machine.gpu.architecture]


def _in_words(backend: BackendRow, precision: str, architectures: Sequence[int], machine: Machine) -> str:
    """One phrase for people."""
    if backend is ENGINES:
        return f"{backend.title} engines in {precision} for {names(architectures) or 'Ampere GPUs and later'}"
    processor = "the GPU or the CPU"
    if machine.gpu is not None and _on_gpu(backend, machine):
        processor = machine.gpu.name
    elif backend.gpu_only:
        processor = "a GPU"
    elif machine.gpu is None or backend.runs == "networks" or "cuda" not in backend.devices:
        processor = "the CPU"
    return f"graphs in {precision} for {backend.title} on {processor}"


def _instead(backend: BackendRow, precision: str, machine: Machine, *, convolutions: bool) -> str:
    """What to type for another choice. convolutions: whether 8-bit ones are planned."""
    rows = [row for row in BACKENDS if row.runs != "engines" and not row.verified_only]
    rows = [row for row in rows if row.convolutions or not convolutions]
    alternatives = [row.name for row in rows if row is not backend and _installed(row, machine)]
    precisions = [name for name in FLOATS if name != precision]
    engines = "" if backend is ENGINES else f", or --gpu-arch 89 for {ENGINES.title} engines"
    return f"--backend {' or '.join(alternatives)}, --precision {' or '.join(precisions)}{engines} (--help lists all)"
