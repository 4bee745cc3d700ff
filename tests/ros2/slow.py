"""The node over a backend whose network takes 50 ms and no processor."""

from __future__ import annotations

import sys
import time
from unittest.mock import patch

from densegeo_ros.node import main

from densegeo.runtime import estimator
from tests.support.doubles import FakeBackend


def wait(bucket: object, stage: str, value: float) -> None:
    if stage == "denoiser":
        time.sleep(0.05)


if __name__ == "__main__":
    with patch.object(estimator, "open_backend", lambda *given: FakeBackend(wait)):
        sys.exit(main())
