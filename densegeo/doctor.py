"""`densegeo doctor`: what this machine has, what is missing, and how to install it. Imports no heavy library."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, NamedTuple

import msgspec

from densegeo.architectures import ARCHITECTURES
from densegeo.backends import BACKENDS, ENGINES, BackendRow, installed_version
from densegeo.extras import install_command
from densegeo.findings import Finding
from densegeo.onnx_runtime import import_onnxruntime
from densegeo.processor import cpu, memory

_FOLDERS = ("benchmarks", "calibration", "export", "kernels", "models", "runtime", "serving")


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
    Extra("heic", ("pillow-heif",), "read HEIC photographs"),
    Extra("video", ("av",), "films and cameras"),
    Extra("kernels", ("triton",), "compile the GPU kernels"),
    Extra("bags", ("mcap", "rosbags"), "ROS 2 bags, without ROS"),
    Extra("metrics", ("prometheus-client",), "export metrics to Prometheus"),
    Extra("camera", ("pyyaml",), "read a camera's calibration from ROS' YAML"),
    Extra("serve", ("prometheus-client", "python-multipart", "starlette", "uvicorn"), "answer over HTTP, with a page"),
    Extra(
        "ray",
        ("fsspec", "pyarrow", "ray"),
        "many images on many machines, with Ray; images in object storage",
    ),
    Extra("nvml", ("nvidia-ml-py",), "power, clocks and throttling while `densegeo bench` runs"),
)


class Backend(msgspec.Struct, frozen=True):
    name: str
    version: str | None  # None: not installed
    usable: Literal["yes", "no", "untried"]
    detail: str


class Offered(msgspec.Struct, frozen=True):
    """An extra as it stands here. have: its distributions that are installed, with their versions."""

    name: str
    purpose: str
    have: dict[str, str]
    lacks: list[str]
    install: str  # the command; empty where nothing is to be installed


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
    extras: list[Offered]
    warnings: list[str]
    verified: list[Finding]  # all that `densegeo verify` found here, failures too
    suits: str  # what `densegeo build` would make for this machine, and why


def examine() -> Report:
    """Look at this machine; starts nothing on a GPU."""
    from densegeo import __version__

    gpus, gpu_note = _gpus()
    processor, features = cpu()
    total, available = memory()
    verified = _verified()
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
        backends=[line for row in BACKENDS for line in _examined(row, bool(gpus), verified)],
        gpus=gpus,
        gpu_note=gpu_note,
        extras=_extras(),
        warnings=_warnings(),
        verified=verified,
        suits=_suits(),
    )


def _verified() -> list[Finding]:
    try:
        from densegeo.runtime.verified import findings

        return findings()
    except Exception:  # a broken installation is told elsewhere
        return []


def _suits() -> str:
    """Of backends and precisions those that a build would choose here."""
    try:
        from densegeo.export.choice import suggested
        from densegeo.export.machine import this_machine

        backend, precision, why = suggested(this_machine())
    except Exception as error:  # a broken installation is told elsewhere
        return f"unknown ({error})"
    return f"--backend {backend} --precision {precision} ({why})"


def broken() -> str:
    """What keeps densegeo itself from working, tried by importing its runtime and looking for its parts; or ""."""
    remedy = "Install densegeo again, from a wheel or from a checkout with symbolic links."
    try:
        missing_folders = [name for name in _FOLDERS if find_spec(f"densegeo.{name}") is None]
        if missing_folders:
            return f"This installation lacks densegeo.{', densegeo.'.join(missing_folders)}. {remedy}"
        import_module("densegeo.runtime")
    except Exception as error:  # whatever an import can raise is a finding
        return f"densegeo.runtime cannot be imported: {error}. {remedy}"
    return ""


def _installed(row: BackendRow) -> str:
    """Versions of the distributions that a backend is made of, of each group the first that is here; or ""."""
    groups = [[(name, number) for name in group if (number := installed_version(name))] for group in row.distributions]
    present = [group[0] for group in groups if group]
    return present[0][1] if len(groups) == 1 and present else ", ".join(f"{name} {number}" for name, number in present)


def _examined(row: BackendRow, has_gpu: bool, verified: Sequence[Finding]) -> list[Backend]:
    """What a backend can run a bundle on, one line a kind of device. verified: what `densegeo verify` found here."""
    installed = _installed(row)
    if not installed or (row is not ENGINES and not row.available()):
        return [Backend(_label(row, row.devices), None, "no", f"not installed: {row.install}")]
    if row.providers:
        return _providers(row, installed, has_gpu, verified)
    if row.gpu_only and not has_gpu:
        return [Backend(_label(row, row.devices), installed, "no", row.without_gpu)]
    # Not imported here: torch is slow to import, and importing OpenVINO sends a usage report.
    return [_tried(row, row.devices, installed, verified)]


def _tried(row: BackendRow, devices: Sequence[str], installed: str, verified: Sequence[Finding]) -> Backend:
    """A backend that is not run here, on some kinds of device: as `densegeo verify` last found it, if it did."""
    label = _label(row, devices)
    on_these_devices = [
        finding for finding in verified if finding.backend == row.name and finding.device.partition(":")[0] in devices
    ]
    if passing := [finding for finding in on_these_devices if finding.good]:
        latest = max(passing, key=lambda finding: finding.when)
        return Backend(label, installed, "yes", f"verified on {latest.device}, {latest.when}")
    if on_these_devices:
        return Backend(label, installed, "no", "no bundle that was verified with it passed: see above")
    tells = f"`densegeo verify BUNDLE --backend {row.name}` tells"
    return Backend(label, installed, "untried", f"{row.untried}: {tells}")


def _label(row: BackendRow, devices: Sequence[str]) -> str:
    """The backend's name, with the device where it has one of several, or the CPU alone."""
    return f"{row.name} {devices[0]}" if len(devices) == 1 and not row.gpu_only else row.name


def _providers(row: BackendRow, installed: str, has_gpu: bool, verified: Sequence[Finding]) -> list[Backend]:
    """Each of ONNX Runtime's providers is asked of the library itself, not assumed."""
    try:
        from densegeo.runtime.backends.ort import PROVIDERS

        available = list(import_onnxruntime().get_available_providers())  # it loads in a fraction of a second
    except Exception as error:  # a broken installation is a finding, not a failure
        return [Backend(row.name, installed, "no", f"installed, but cannot be imported: {error}")]
    rows = []
    for kind, provider in row.providers.items():
        name, title = _label(row, (kind,)), PROVIDERS[provider].title
        if provider not in available:
            rows.append(Backend(name, None, "no", f"this ONNX Runtime has no {title} provider"))
        elif kind == "cpu":
            rows.append(Backend(name, installed, "yes", f"{title} provider"))
        elif not has_gpu:
            rows.append(Backend(name, installed, "no", f"{title} provider there, but {row.without_gpu}"))
        else:
            rows.append(_tried(row, (kind,), installed, verified))
    return rows


def _gpus() -> tuple[list[str], str]:
    """NVIDIA GPUs by name, and a sentence on how that is known. A missing driver is an answer, not an error."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
        try:
            result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            return [], f"nvidia-smi is there but failed ({error})."
        cards = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        return cards, f"Listed by nvidia-smi; no computation was run on them.{_toolkits(cards)}"
    count = _driver_device_count()
    if count is None:
        return [], "No NVIDIA driver (libcuda.so.1 cannot be loaded, nvidia-smi not found)."
    if count == 0:
        return [], "An NVIDIA driver library is there, but it reports no device."
    return [f"CUDA device {i}" for i in range(count)], "Counted by libcuda; no computation was run on them."


def _toolkits(listed: Sequence[str]) -> str:
    """The CUDA that libraries must be made with for these GPUs. listed: lines that end in a compute capability."""
    ends = [line.rpartition(",")[2].strip().replace(".", "") for line in listed]
    rows = [ARCHITECTURES[int(end)] for end in sorted(set(ends)) if end.isdigit() and int(end) in ARCHITECTURES]
    return "".join(f" sm_{row.number} needs libraries of CUDA {row.cuda} or later." for row in rows)


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


def _extras() -> list[Offered]:
    """Every extra. `cpu` and `gpu` are alternatives: with one of them here, the other need not be installed."""
    offers = []
    for extra in EXTRAS:
        have = {name: number for name in extra.distributions if (number := installed_version(name)) is not None}
        lacks = [name for name in extra.distributions if name not in have]
        install = install_command(extra.name) if lacks else ""
        if extra.name == "cpu" and installed_version("onnxruntime-gpu") is not None:
            install = ""
        if extra.name == "gpu" and lacks and installed_version("onnxruntime") is not None:
            install = f"pip uninstall -y onnxruntime && {install}"
        offers.append(Offered(extra.name, extra.purpose, have, lacks, install))
    return offers


def _warnings() -> list[str]:
    if installed_version("onnxruntime") is not None and installed_version("onnxruntime-gpu") is not None:
        return [
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "uninstall both, then install exactly one."
        ]
    return []


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
        ("suits it", report.suits),
        ("verified here", "\n".join(map(_in_words, report.verified)) or "nothing yet: densegeo verify BUNDLE"),
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
    extras = Table("extra", "for", "here", "install with, in densegeo's checkout", show_edge=False)
    for extra in report.extras:
        part = f"[yellow]without {', '.join(extra.lacks)}[/]" if extra.have else "no"
        state = part if extra.lacks else "[green]yes[/]"
        extras.add_row(extra.name, extra.purpose, state, escape(extra.install))
    console.print("", extras, sep="\n")
    for warning in report.warnings:
        console.print(f"[bold yellow]warning[/] {escape(warning)}")
    console.print("\n`densegeo verify BUNDLE` shows whether a bundle's numbers come out right on this machine.")


def _in_words(finding: Finding) -> str:
    with_what = f"{finding.bundle} with {finding.backend} on {finding.device}, {finding.when}"
    return f"{with_what}: {'passed' if finding.good else f'failed, {finding.said}'}"
