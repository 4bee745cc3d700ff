"""Power, clocks, temperature and throttling of a GPU while something runs on it: NVML, through nvidia-ml-py."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import msgspec

from densegeo.extras import install_hint

EVERY_S = 0.05  # between samples; NVML's own averages are over 25 to 1000 ms
# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h, nvmlClocksEventReasons), and what they say to people.
SLOWED = {0x08: "slowed by the hardware", 0x20: "hot", 0x40: "hot, by the hardware", 0x80: "power brake"}
POWER_LIMIT = 0x04  # not throttling: large products run there on every data-centre GPU


class Reading(msgspec.Struct, frozen=True):
    """One quantity over all samples."""

    least: float
    mean: float
    most: float


class GpuReadings(msgspec.Struct, frozen=True, kw_only=True):
    """What NVML told; None for what this GPU or driver does not tell.

    throttled: why clocks were lowered for heat or by the hardware. power_limited: share of the samples at the limit.
    """

    samples: int
    watts: Reading | None = None
    sm_mhz: Reading | None = None
    memory_mhz: Reading | None = None
    celsius: Reading | None = None
    memory_bytes: int | None = None  # the most in use, by all processes
    throttled: list[str] | None = None
    power_limited: float | None = None


class GpuMonitor:
    """Samples a device while its block runs. `readings` stays None where NVML cannot be asked, and `note` says why."""

    def __init__(self, device: str) -> None:
        """device: "cpu", "cuda:0"."""
        self.readings: GpuReadings | None = None
        self.note = ""
        self._samples: list[dict[str, float | None]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if device.startswith("cuda"):
            self._open(int(device.partition(":")[2] or 0))

    def _open(self, index: int) -> None:
        try:
            nvml: Any = import_module("pynvml")
        except ImportError:
            self.note = f"power, clocks and throttling are not known: {install_hint('nvml')}"
            return
        try:
            nvml.nvmlInit()
            bus = _bus_id(index)
            handle = nvml.nvmlDeviceGetHandleByIndex(index) if bus is None else nvml.nvmlDeviceGetHandleByPciBusId(bus)
        except nvml.NVMLError as error:
            self.note = f"power, clocks and throttling are not known: {error}"
            return
        self._nvml, self._handle = nvml, handle
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> GpuMonitor:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self.readings = _summary(self._samples)
        self._nvml.nvmlShutdown()

    def _run(self) -> None:
        nvml, handle = self._nvml, self._handle
        queries: dict[str, Callable[[], float]] = {
            "watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "reasons": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        }
        while True:
            sample: dict[str, float | None] = {}
            for name, ask in queries.items():
                try:
                    sample[name] = float(ask())
                except nvml.NVMLError:  # most often "Not Supported": a Jetson, a MIG slice, an older driver
                    sample[name] = None
            self._samples.append(sample)
            if self._stop.wait(EVERY_S):
                return


def _summary(samples: list[dict[str, float | None]]) -> GpuReadings:
    values_of = {name: [value for sample in samples if (value := sample[name]) is not None] for name in samples[0]}
    reasons = [int(value) for value in values_of["reasons"]]
    memory = values_of["memory_bytes"]
    return GpuReadings(
        samples=len(samples),
        watts=_reading(values_of["watts"]),
        sm_mhz=_reading(values_of["sm_mhz"]),
        memory_mhz=_reading(values_of["memory_mhz"]),
        celsius=_reading(values_of["celsius"]),
        memory_bytes=int(max(memory)) if memory else None,
        throttled=[word for bit, word in SLOWED.items() if any(r & bit for r in reasons)] if reasons else None,
        power_limited=sum(bool(reason & POWER_LIMIT) for reason in reasons) / len(reasons) if reasons else None,
    )


def _reading(values: list[float]) -> Reading | None:
    return Reading(min(values), sum(values) / len(values), max(values)) if values else None


def _bus_id(index: int) -> bytes | None:
    """The PCI bus id of a CUDA device, whose number NVML may count otherwise; None without a driver that tells."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(32)
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), index),
        lambda: driver.cuDeviceGetPCIBusId(name, len(name), device),
    )
    return None if any(call() != 0 for call in calls) else name.value
