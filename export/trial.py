"""A first run of what was just built, on the GPU that it was built for."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
from rich.console import Console

from densegeo.runtime import Estimator
from densegeo.runtime.verify import verify

WARM_UP, TIMED = 3, 10  # images


def try_out(bundle: Path, backend: str, console: Console) -> None:
    """Verify a bundle here, and say how long an image takes. Raises BackendError."""
    verify(bundle, backend).require_good(bundle)
    with Estimator(bundle, backend, check_digests=False) as estimator:
        bucket = estimator.manifest.buckets[0]
        image = np.random.default_rng(0).integers(0, 256, (bucket.height, bucket.width, 3), dtype=np.uint8)
        totals = [estimator(image).timings["total"] for _ in range(WARM_UP + TIMED)][WARM_UP:]
        console.print(
            f"verified on {estimator.device}; an image of {bucket.size} takes {statistics.median(totals):.1f} ms "
            f"(median of {TIMED}; `densegeo bench {bundle}` says more)",
            soft_wrap=True,
        )
