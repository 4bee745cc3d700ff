"""The node over a backend that hangs at its first image after warming up."""

from __future__ import annotations

import sys
import threading
from unittest.mock import patch

from densegeo_ros.node import main

from densegeo.runtime import estimator
from tests.support.doubles import FakeBackend

SEEN: list[str] = []


def hang(bucket: object, stage: str, value: float) -> None:
    SEEN.append(stage)
    if SEEN.count("encoder") > 1:
        threading.Event().wait()


if __name__ == "__main__":
    with patch.object(estimator, "open_backend", lambda *given: FakeBackend(hang)):
        sys.exit(main())
