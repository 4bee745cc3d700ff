"""What NVML tells during a run, through the real nvidia-ml-py: without a driver, and with a library of one GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from densegeo.benchmarks.gpu_monitor import GpuMonitor, GpuReadings
from densegeo.benchmarks.latency_report import gpu_in_words
from densegeo.benchmarks.other_load import OtherLoad
from densegeo.extras import install_hint
from tests.support.project import ROOT

pynvml = pytest.importorskip("pynvml")

WATCH = """
import sys, time, msgspec
from densegeo.benchmarks.gpu_monitor import GpuMonitor
with GpuMonitor("cuda:0") as monitor:
    time.sleep(0.3)
assert not monitor.note, monitor.note
print(msgspec.json.encode(monitor.readings).decode())
"""


def has_driver() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="there is a driver")
def test_without_a_driver_the_librarys_error_is_said() -> None:
    with GpuMonitor("cuda:0") as monitor:
        pass
    assert monitor.readings is None
    assert monitor.note == "power, clocks and throttling are not known: NVML Shared Library Not Found"


def test_without_the_library_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuMonitor("cuda") as monitor:
        pass
    assert monitor.readings is None
    assert install_hint("nvml") in monitor.note


def test_a_cpu_has_no_nvml_and_needs_no_note() -> None:
    with GpuMonitor("cpu") as monitor:
        pass
    assert (monitor.readings, monitor.note) == (None, "")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("nvml.c")
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(folder / "libnvidia-ml.so.1"), str(source)]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="builds a shared library")
@pytest.mark.parametrize(
    ("reasons", "throttled", "limited"),
    [(0, [], 0.0), (0x04, [], 1.0), (0x20, ["hot"], 0.0), (0x88, ["slowed by the hardware", "power brake"], 0.0)],
)
def test_readings_are_taken_while_it_runs(library: Path, reasons: int, throttled: list[str], limited: float) -> None:
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(library),
        "NVML_REASONS": str(reasons),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", WATCH], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    actual = msgspec.json.decode(done.stdout, type=GpuReadings)
    assert actual.samples >= 2
    assert actual.watts is not None
    assert (actual.watts.least, actual.watts.most) == (300, 301 if actual.samples == 2 else 302)
    assert actual.sm_mhz is not None
    assert actual.memory_mhz is not None
    assert (actual.sm_mhz.mean, actual.memory_mhz.mean) == (1755, 2619)
    assert actual.celsius is None  # not supported
    assert actual.memory_bytes == 5 << 30
    assert actual.throttled == throttled
    assert actual.power_limited == limited
    words = gpu_in_words(actual)
    assert "301 W" in words or "300 W" in words
    assert "temperature unknown" in words
    assert ("THROTTLED" in words) == bool(throttled)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_work_of_others_counts_and_our_own_does_not() -> None:
    burn = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"
    with OtherLoad() as own:
        sum(index for index in range(2_000_000))
    with subprocess.Popen([sys.executable, "-c", burn]) as process, OtherLoad() as others:
        process.wait()
    assert own.share is not None
    assert others.share is not None
    assert 0 <= own.share <= 1
    processors = os.cpu_count() or 1
    assert others.share > 0.3 / processors
