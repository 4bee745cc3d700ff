"""What decides how to build on this machine: its GPU, the libraries that are installed, the CPU's bf16 units."""

from __future__ import annotations

import ctypes
import re
from importlib.util import find_spec
from pathlib import Path

import msgspec

from densegeo.backends import BACKENDS, ENGINE_LIBRARIES, ENGINES, installed
from densegeo.processor import cpu, memory

GIB = 1 << 30

LIBRARIES = frozenset(  # what decides: the backends' modules, and what builds engines
    {*ENGINE_LIBRARIES, *(module for row in BACKENDS if row is not ENGINES for module in row.modules)}
)
BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")  # CPU flags, the last one Arm's
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class Gpu(msgspec.Struct, frozen=True):
    name: str
    architecture: int  # 89 for compute capability 8.9
    memory: int  # bytes


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """libraries: those of LIBRARIES that are installed. torch_cuda: whether torch is a CUDA build."""

    gpu: Gpu | None = None
    libraries: frozenset[str] = frozenset()
    torch_cuda: bool = False
    cpu_bf16: bool = False


def this_machine() -> Machine:
    """Of this machine."""
    libraries = frozenset(name for name in LIBRARIES if installed(name))
    _, features = cpu()
    return Machine(
        gpu=first_gpu(), libraries=libraries, torch_cuda=_torch_cuda(), cpu_bf16=not {*BF16_UNITS}.isdisjoint(features)
    )


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not tell."""
    return memory()[1]


def first_gpu() -> Gpu | None:
    """The first GPU that the driver names; None without a driver or a GPU. Starts nothing on it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetName(name, len(name), device),
        lambda: driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    if any(call() != 0 for call in calls):
        return None
    return Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value, memory.value)


def _torch_cuda() -> bool:
    """What `torch.version.cuda` says, read without importing torch, which takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        source = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^cuda\b.*=\s*['\"]", source, re.MULTILINE) is not None
