"""What `densegeo build` makes where nothing was asked for: backend, precision, architectures that fit the machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from densegeo.calibration.plan import plan_file
from densegeo.errors import ConfigError
from densegeo.export.engine_plan import CONTEXT
from densegeo.export.engines import FIRST, OLDEST, RTX_TARGETS
from densegeo.export.machine import Facts
from densegeo.export.plan import GIB, ITEM_BYTES
from densegeo.models.precision import BASES
from densegeo.models.presets import Preset
from densegeo.models.quantized import FORMATS
from densegeo.runtime.bundle import Choice

AUTO = "auto"
GRAPHS = ("onnxruntime", "openvino", "torch")  # backends that run a bundle's graphs, or the networks behind them
BACKENDS = (*GRAPHS, "tensorrt")
NO_BF16 = "onnxruntime"  # it has no bf16 kernels, neither for CPUs nor for GPUs


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for; AUTO and empty leave it open."""

    backend: str = AUTO
    precision: str = AUTO
    base: str = ""
    architectures: tuple[int, ...] = ()
    calibration: Path | None = None
    weight_streaming: bool = False


def choose(asked: Asked, facts: Facts, row: Preset) -> Choice:
    """Raises ConfigError for what cannot work, before anything is read."""
    if asked.backend not in (AUTO, *BACKENDS):
        raise ConfigError(
            f"there is no backend {asked.backend!r} to build for; there are {', '.join((AUTO, *BACKENDS))}"
        )
    if asked.precision not in (AUTO, *BASES):
        raise ConfigError(f"there is no precision {asked.precision!r}; there are {', '.join((AUTO, *BASES))}")
    backend, why = (asked.backend, "you asked for it") if asked.backend != AUTO else _backend(asked, facts)
    architectures = asked.architectures
    if backend == "tensorrt" and not architectures and facts.gpu is not None:
        architectures = (facts.gpu.architecture,)
    precision, because = asked.precision, "you asked for it"
    if precision == AUTO:
        precision, because = _precision(backend, architectures, asked.calibration, facts)
    _refuse(asked, backend, precision, architectures, facts, row)
    return Choice(
        backend=backend,
        precision=precision,
        architectures=list(architectures),
        what=_what(backend, precision, architectures, facts),
        why=f"backend: {why}; precision: {because}",
        instead=_instead(backend, precision, facts),
    )


def _backend(asked: Asked, facts: Facts) -> tuple[str, str]:
    """The backend where none was asked for, and why it."""
    builders = facts.libraries & {"tensorrt", "tensorrt_rtx"}
    if asked.architectures:
        names = _names(asked.architectures)
        if not builders:
            raise ConfigError(
                f'engines for {names} need TensorRT: pip install "densegeo[tensorrt-rtx]" (or tensorrt on a machine '
                "with that GPU); --backend onnxruntime puts our kernels for it beside the graphs alone"
            )
        return "tensorrt", f"--gpu-arch means engines for {names}"
    if facts.gpu is None:
        return _on_cpu(asked.precision, facts)
    arch = facts.gpu.architecture
    if "tensorrt" in builders or ("tensorrt_rtx" in builders and arch in RTX_TARGETS):
        return "tensorrt", f"{facts.gpu.name} (sm_{arch}) and TensorRT are here"
    lacks = f"TensorRT-RTX has no target for sm_{arch}" if builders else "no TensorRT is installed"
    if facts.torch_cuda:
        return "torch", f"{lacks}, and this torch runs our kernels on {facts.gpu.name}"
    if "onnxruntime" in facts.libraries:
        return "onnxruntime", f"{lacks}, and torch here is no CUDA build"
    return "torch", f"{lacks}, and nothing else is installed"


def _on_cpu(precision: str, facts: Facts) -> tuple[str, str]:
    """The fastest backend on the CPU that can run this precision, which may be open."""
    low = precision != AUTO and BASES[precision] == "bf16"
    units = "has bf16 units" if facts.cpu_bf16 else "has no bf16 units"
    if "openvino" in facts.libraries and (facts.cpu_bf16 or low):
        return "openvino", f"no GPU was found, the CPU {units}, and OpenVINO is installed"
    if "onnxruntime" in facts.libraries and not low:
        return (
            "onnxruntime",
            f"no GPU was found, and {'OpenVINO is not installed' if facts.cpu_bf16 else f'the CPU {units}'}",
        )
    if "openvino" in facts.libraries:
        return "openvino", f"no GPU was found, the CPU {units}, and ONNX Runtime is not installed"
    return "torch", f"no GPU was found, and neither OpenVINO nor ONNX Runtime can run {'bf16' if low else 'it'} here"


def _precision(backend: str, architectures: Sequence[int], calibration: Path | None, facts: Facts) -> tuple[str, str]:
    """The precision where none was asked for, and why it."""
    if calibration is not None:
        planned = [name for name in FORMATS if plan_file(calibration, name).is_file()]
        able = [name for name in planned if all(number >= FIRST[name] for number in architectures)]
        if not planned:
            raise ConfigError(f"{calibration} holds no plan: `densegeo calibrate` makes one")
        if not able:
            raise ConfigError(
                f"{calibration} holds a plan for {', '.join(planned)}, which {_names(architectures)} lacks"
            )
        return able[0], f"{calibration} holds a plan for it"
    if backend == "tensorrt" or (backend == "torch" and facts.gpu is not None and facts.torch_cuda):
        first = min(architectures, default=facts.gpu.architecture if facts.gpu is not None else FIRST["bf16"])
        if first >= FIRST["bf16"]:
            return "bf16", "GPUs have it from Ampere on, and fp8 needs a plan (densegeo calibrate)"
        return "fp16", f"there is no bf16 before sm_{FIRST['bf16']}"
    if backend == NO_BF16:
        return "fp32", "ONNX Runtime has no bf16 kernels"
    return ("bf16", "the CPU has units for it") if facts.cpu_bf16 else ("fp32", "the CPU has no units for bf16")


def _refuse(
    asked: Asked, backend: str, precision: str, architectures: Sequence[int], facts: Facts, row: Preset
) -> None:
    """Raises ConfigError for what cannot work."""
    if early := [number for number in architectures if number < OLDEST]:
        raise ConfigError(f"nothing can be built for {_names(early)}: sm_{OLDEST} is the oldest architecture")
    base = asked.base or BASES[precision]
    _refuse_types(backend, precision, base, architectures, facts)
    if backend == NO_BF16 and base == "bf16":
        other = "--base fp32" if precision in FORMATS else "--precision fp32"
        raise ConfigError(
            f"ONNX Runtime has no bf16 kernels, so it cannot run {precision}: say --backend openvino or torch, or "
            f"{other}"
        )
    gpu = facts.gpu
    on_gpu = gpu is not None and backend in ("tensorrt", "torch") and tuple(architectures) in ((), (gpu.architecture,))
    needed = row.bundle_parameters * _bytes(precision) + CONTEXT
    if gpu is not None and on_gpu and needed > gpu.memory and not asked.weight_streaming:
        smaller = [name for name in BASES if row.bundle_parameters * _bytes(name) + CONTEXT <= gpu.memory]
        remedy = f"say --precision {' or '.join(smaller)}" if smaller else "no precision does; --weight-streaming might"
        raise ConfigError(
            f"{row.name} in {precision} needs {needed / GIB:.1f} GiB for its weights, and {gpu.name} has "
            f"{gpu.memory / GIB:.1f}: {remedy}"
        )


def _refuse_types(backend: str, precision: str, base: str, architectures: Sequence[int], facts: Facts) -> None:
    """Raises ConfigError for a type that the GPUs lack. Where torch has no 8-bit product it multiplies in the base."""
    kinds: tuple[str, ...] = (precision, base)
    if backend == "torch" and facts.gpu is not None and facts.torch_cuda:
        kinds, architectures = (base,), (facts.gpu.architecture,)
    elif backend != "tensorrt":
        return
    for kind in kinds:
        first = FIRST.get(kind, OLDEST)
        if early := [number for number in architectures if number < first]:
            raise ConfigError(
                f"there is no {kind} before sm_{first}, so none for {_names(early)}: say --precision fp16, or leave "
                "--precision out"
            )


def on_this_gpu(choice: Choice, facts: Facts) -> bool:
    """Whether what was chosen runs on the GPU of this machine."""
    if facts.gpu is None or choice.backend not in ("tensorrt", "torch"):
        return False
    return choice.architectures == [facts.gpu.architecture] if choice.backend == "tensorrt" else facts.torch_cuda


def _bytes(precision: str) -> int:
    return 1 if precision in FORMATS else ITEM_BYTES[precision]


def _what(backend: str, precision: str, architectures: Sequence[int], facts: Facts) -> str:
    """One phrase for people."""
    if backend == "tensorrt":
        return f"TensorRT engines in {precision} for {_names(architectures) or 'Ampere GPUs and later'}"
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "torch"}
    where = facts.gpu.name if facts.gpu is not None and backend == "torch" and facts.torch_cuda else "the CPU"
    if backend == "onnxruntime" and facts.gpu is not None:
        where = "the GPU or the CPU"
    return f"graphs in {precision} for {names[backend]} on {where}"


def _instead(backend: str, precision: str, facts: Facts) -> str:
    """What to type for another choice."""
    others = [name for name in GRAPHS if name != backend and name in facts.libraries]
    precisions = [name for name in BASES if name != precision and name not in FORMATS]
    engines = "" if backend == "tensorrt" else ", or --gpu-arch 89 for TensorRT engines"
    return f"--backend {' or '.join(others)}, --precision {' or '.join(precisions)}{engines} (--help lists all)"


def _names(architectures: Sequence[int]) -> str:
    return ", ".join(f"sm_{number}" for number in architectures)
