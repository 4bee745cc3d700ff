"""What this machine's processor is and can, and its memory."""

from __future__ import annotations

import os
import platform

# Flags (as Linux names them) that decide how fast low precision is.
_FEATURES = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "bf16", "sve"),
)
_INT8_SUMS = ("avx_vnni", "avx512_vnni", "amx_int8")  # instructions that add products of int8 in 32 bits


def cpu() -> tuple[str, list[str]]:
    """Model name and the features that matter, from /proc/cpuinfo where there is one."""
    fields = _colon_fields("/proc/cpuinfo")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, [feature for feature in _FEATURES if feature in flags]


def whole_cpu() -> str:
    """What tells this processor from others whose timings are remembered: model name, features, how many."""
    name, features = cpu()
    return f"{name}, {' '.join(features)}, {os.cpu_count()} processors"


def memory() -> tuple[int | None, int | None]:
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


def is_x86() -> bool:
    """Whether it is a 64-bit x86."""
    return platform.machine().lower() in ("x86_64", "amd64")


def saturates_int8() -> bool:
    """Whether this processor adds products of 8-bit numbers in 16 bits, as x86 without VNNI does: two of 255 * 127 are
    cut off there. Where the system names no features, an x86 is taken for such a one.
    """
    return is_x86() and {*_INT8_SUMS}.isdisjoint(cpu()[1])
