"""`densegeo doctor`: what this machine has, what is missing, and how to install it. Imports no heavy library."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Literal, NamedTuple

import msgspec

_FOLDERS = ("benchmarks", "calibration", "export", "kernels", "models", "runtime")
# CPU flags (as Linux names them) that decide how fast low precision is.
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")


class Extra(NamedTuple):
    """An optional part of densegeo: distributions that make it up, and what it is for."""

    name: str
    distributions: tuple[str, ...]
    purpose: str


_CUDA = ("cuda-bindings", "cuda-core")
_TORCH = ("safetensors", "torch", "typing_extensions")
EXTRAS = (
    Extra("cpu", ("onnxruntime",), "run bundles on a CPU"),
    Extra("gpu", ("onnxruntime-gpu", *_CUDA), "run bundles on an NVIDIA GPU"),
    Extra("openvino", ("openvino",), "run bundles on a CPU, bf16 ones too"),
    Extra("tensorrt", _CUDA, "run engines with the TensorRT that is already here"),
    Extra("tensorrt-rtx", ("tensorrt-rtx-cu13", *_CUDA), "build TensorRT engines, run them on a GPU"),
    Extra("torch", _TORCH, "run bundles with torch, bf16 ones too"),
    Extra("export", (*_TORCH, "huggingface_hub", "ml_dtypes", "onnx", "onnx-ir", "onnxscript"), "build bundles"),
    Extra("text-encoder", ("transformers",), "embed the empty prompt while building"),
    Extra("exr", ("OpenEXR",), "save EXR files"),
    Extra("kernels", ("triton",), "compile the GPU kernels"),
    Extra("metrics", ("prometheus-client",), "export metrics to Prometheus"),
)


class Backend(msgspec.Struct, frozen=True):
    name: str
    version: str | None  # None: not installed
    usable: Literal["yes", "no", "untried"]
    detail: str


class Report(msgspec.Struct, frozen=True):
    densegeo: str
    broken: str  # what is wrong with densegeo's own installation; empty: nothing
    python: str
    platform: str
    cpu: str
    cpu_features: list[str]
    cpu_count: int  # that this process may use
    memory_bytes: int | None
    memory_available_bytes: int | None
    backends: list[Backend]
    gpus: list[str]
    gpu_note: str
    missing: dict[str, str]  # extra -> the command that installs it
    warnings: list[str]


def examine() -> Report:
    """Look at this machine; starts nothing on a GPU."""
    from densegeo import __version__

    gpus, gpu_note = _gpus()
    processor, features = cpu()
    total, available = _memory()
    return Report(
        densegeo=__version__,
        broken=broken(),
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpu=processor,
        cpu_features=features,
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=total,
        memory_available_bytes=available,
        backends=[
            *_onnxruntime(bool(gpus)),
            _looked_up("openvino cpu", "openvino"),
            _tensorrt(bool(gpus)),
            _looked_up("torch", "torch"),
        ],
        gpus=gpus,
        gpu_note=gpu_note,
        missing=_missing(),
        warnings=_warnings(),
    )


def broken() -> str:
    """What keeps densegeo itself from working, tried by importing its runtime and looking for its parts; or ""."""
    remedy = "Install densegeo again, from a wheel or from a checkout with symbolic links."
    try:
        lost = [name for name in _FOLDERS if find_spec(f"densegeo.{name}") is None]
        if lost:
            return f"This installation lacks densegeo.{', densegeo.'.join(lost)}. {remedy}"
        import_module("densegeo.runtime")
    except Exception as error:  # whatever an import can raise is a finding
        return f"densegeo.runtime cannot be imported: {error}. {remedy}"
    return ""


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _onnxruntime(has_gpu: bool) -> list[Backend]:
    """What ONNX Runtime can run a bundle on: each ONNX Runtime provider is asked of the library itself, not assumed."""
    installed = version("onnxruntime") or version("onnxruntime-gpu")
    if installed is None or find_spec("onnxruntime") is None:
        detail = 'not installed: pip install "densegeo[cpu]", or "densegeo[gpu]"'
        return [Backend("onnxruntime", None, "no", detail)]
    try:
        import onnxruntime  # it loads in a fraction of a second

        providers = list(onnxruntime.get_available_providers())
    except Exception as error:  # a broken installation is a finding, not a failure
        return [Backend("onnxruntime", installed, "no", f"installed, but cannot be imported: {error}")]
    cpu: Literal["yes", "no"] = "yes" if "CPUExecutionProvider" in providers else "no"
    backends = [Backend("onnxruntime cpu", installed, cpu, "CPU provider")]
    if "CUDAExecutionProvider" not in providers:
        backends.append(Backend("onnxruntime cuda", None, "no", "this ONNX Runtime has no CUDA provider"))
    elif not has_gpu:
        backends.append(Backend("onnxruntime cuda", installed, "no", "CUDA provider there, but no GPU was found"))
    else:
        detail = "provider and GPU are there, but densegeo was never run on a GPU: `densegeo verify BUNDLE` tells"
        backends.append(Backend("onnxruntime cuda", installed, "untried", detail))
    return backends


def _looked_up(name: str, distribution: str) -> Backend:
    """A backend that is not imported here: torch is slow to import, and importing OpenVINO sends a usage report."""
    installed = version(distribution)
    if installed is None or find_spec(distribution) is None:
        return Backend(name, None, "no", f'not installed: pip install "densegeo[{distribution}]"')
    detail = f"not tried here: `densegeo verify BUNDLE --backend {distribution}` tells"
    return Backend(name, installed, "untried", detail)


def _tensorrt(has_gpu: bool) -> Backend:
    """What builds engines here; running them was never tried on any GPU."""
    found = {name: version(name) for name in ("tensorrt", "tensorrt-rtx-cu13")}
    installed = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    if not installed:
        return Backend("tensorrt", None, "no", 'not installed: pip install "densegeo[tensorrt-rtx]", or tensorrt')
    if not has_gpu:
        return Backend("tensorrt", installed, "no", "engines can be built here, but no GPU was found to run them")
    detail = "densegeo's engines were never executed: `densegeo verify BUNDLE --backend tensorrt` tells"
    return Backend("tensorrt", installed, "untried", detail)


def _gpus() -> tuple[list[str], str]:
    """NVIDIA GPUs by name, and a sentence on how that is known. A missing driver is an answer, not an error."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
        try:
            result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            return [], f"nvidia-smi is there but failed ({error})."
        found = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        return found, "Listed by nvidia-smi; no computation was run on them."
    count = _driver_device_count()
    if count is None:
        return [], "No NVIDIA driver (libcuda.so.1 cannot be loaded, nvidia-smi not found)."
    if count == 0:
        return [], "An NVIDIA driver library is there, but it reports no device."
    return [f"CUDA device {i}" for i in range(count)], "Counted by libcuda; no computation was run on them."


def _driver_device_count() -> int | None:
    """Devices the CUDA driver sees; None without a driver library. Jetson boards lack a full nvidia-smi."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cpu() -> tuple[str, list[str]]:
    """Model name and the features that matter, from /proc/cpuinfo where there is one."""
    fields = _colon_fields("/proc/cpuinfo")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, [feature for feature in _CPU_FEATURES if feature in flags]


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes of memory, where /proc/meminfo tells."""
    fields = _colon_fields("/proc/meminfo")
    amounts = [fields.get(key, "").split() for key in ("MemTotal", "MemAvailable")]
    total, available = (int(amount[0]) * 1024 if amount else None for amount in amounts)
    return total, available


def _colon_fields(path: str) -> dict[str, str]:
    """`key : value` lines of a /proc file, the first of each key; empty where the file is not there."""
    fields: dict[str, str] = {}
    try:
        with open(path) as file:
            for line in file:
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return fields


def _missing() -> dict[str, str]:
    """Extras that are not fully installed -> the command for each. `cpu` and `gpu` are alternatives."""
    missing = {}
    for extra in EXTRAS:
        if extra.name == "cpu" and version("onnxruntime-gpu") is not None:
            continue
        absent = [name for name in extra.distributions if version(name) is None]
        if absent:
            command = f'pip install "densegeo[{extra.name}]"'
            if extra.name == "gpu" and version("onnxruntime") is not None:
                command = f"pip uninstall -y onnxruntime && {command}"
            missing[extra.name] = command
    return missing


def _warnings() -> list[str]:
    if version("onnxruntime") is not None and version("onnxruntime-gpu") is not None:
        return [
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "uninstall both, then install exactly one."
        ]
    return []


def purpose(extra_name: str) -> str:
    """What an extra is for, in a few words."""
    return next(extra.purpose for extra in EXTRAS if extra.name == extra_name)


def print_report(report: Report) -> None:
    """The report as tables for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    machine = Table("machine", "", show_edge=False)
    memory = "unknown"
    if report.memory_bytes is not None and report.memory_available_bytes is not None:
        memory = f"{report.memory_bytes / 2**30:.1f} GiB, {report.memory_available_bytes / 2**30:.1f} GiB available"
    for key, value in (
        ("densegeo", report.densegeo),
        ("python", report.python),
        ("platform", report.platform),
        ("cpu", f"{report.cpu}, {report.cpu_count} usable"),
        ("cpu features", " ".join(report.cpu_features) or "unknown"),
        ("memory", memory),
        ("gpus", "\n".join(report.gpus) or "none found"),
        ("", report.gpu_note),
    ):
        machine.add_row(key, escape(value))
    backends = Table("backend", "version", "usable", "", show_edge=False)
    for backend in report.backends:
        colour = "green" if backend.usable == "yes" else "yellow"
        mark = f"[{colour}]{backend.usable}[/]"
        backends.add_row(backend.name, backend.version or "-", mark, escape(backend.detail))
    if report.broken:
        console.print(f"[bold red]broken[/] {escape(report.broken)}\n", soft_wrap=True)
    console.print(machine, "", backends, sep="\n")
    if report.missing:
        extras = Table("missing extra", "for", "install with", show_edge=False)
        for name, command in report.missing.items():
            extras.add_row(name, purpose(name), escape(command))
        console.print("", extras, sep="\n")
    for warning in report.warnings:
        console.print(f"[bold yellow]warning[/] {escape(warning)}")
    console.print("\n`densegeo verify BUNDLE` shows whether a bundle's numbers come out right on this machine.")
