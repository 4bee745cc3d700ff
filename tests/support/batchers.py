"""What tests of the micro-batcher share."""

from __future__ import annotations

from densegeo.runtime.batcher import Batcher

T = 30  # seconds: far longer than anything in these tests takes


def counts(batcher: Batcher) -> dict[str, int]:
    """The counters that are not 0."""
    return {name: value for name, value in batcher._metrics.snapshot().counters.items() if value}
