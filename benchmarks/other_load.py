"""How much of the machine other processes took while something was timed."""

from __future__ import annotations

import os


class OtherLoad:
    """Around a block: the share of all processors' time that processes other than this one used meanwhile.

    `share` stays None where the system does not tell (no /proc/stat).
    """

    share: float | None = None

    def __enter__(self) -> OtherLoad:
        self._before = _now()
        return self

    def __exit__(self, *_: object) -> None:
        after = _now()
        if self._before is None or after is None:
            return
        busy, every, own = (b - a for a, b in zip(self._before, after, strict=True))
        if every > 0:
            self.share = max(0.0, busy - own) / every


def _now() -> tuple[float, float, float] | None:
    """Seconds that all processors were busy, that passed on all of them, and that this process used."""
    try:
        with open("/proc/stat") as file:
            fields = [int(field) for field in file.readline().split()[1:]]
        user, nice, system, idle, waiting, *rest = fields[:8]  # rest: interrupts and what a hypervisor took
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    busy = user + nice + system + sum(rest)
    used = os.times()
    return busy / ticks, (busy + idle + waiting) / ticks, used.user + used.system
