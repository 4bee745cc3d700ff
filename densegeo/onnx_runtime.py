"""ONNX Runtime, imported so that it reports nothing to anybody; and what every session of ours is made with."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

RESTING = ("session.force_spinning_stop", "1")  # threads wait for each other in a run, and for nothing after it


def import_onnxruntime() -> Any:
    """The module onnxruntime. Raises whatever a broken installation raises.

    From 1.29 on its builds for Linux write an identifier of the device into the user's cache when they are imported,
    and send what sessions are made of over the network, unless this variable is set before
    (onnxruntime/core/platform/posix/telemetry_1ds.cc). One that the user has set stays as it is.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return import_module("onnxruntime")


def session_options(ort: Any) -> Any:
    """Options of a session that logs errors only and leaves the processors to others once it has run.

    Every session has threads of its own, which by default go on spinning for some 30 ms after a run. One image runs
    three sessions, and those of the next one would find their processors taken: its first layers took up to four times
    as long, a small model's images twice.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(*RESTING)
    return options
