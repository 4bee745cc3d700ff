"""What is remembered of a verification: light, so that `densegeo doctor` reads it in a broken installation too."""

from __future__ import annotations

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """bundle: its path. good: whether its numbers came out right; said: if not, what was wrong. when: local time."""

    bundle: str
    backend: str
    device: str
    good: bool
    said: str
    when: str
