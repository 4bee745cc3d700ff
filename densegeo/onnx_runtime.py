"""ONNX Runtime, imported so that it reports nothing to anybody."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any


def import_onnxruntime() -> Any:
    """The module onnxruntime. Raises whatever a broken installation raises.

    From 1.29 on its builds for Linux write an identifier of the device into the user's cache when they are imported,
    and send what sessions are made of over the network, unless this variable is set before
    (onnxruntime/core/platform/posix/telemetry_1ds.cc). One that the user has set stays as it is.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return import_module("onnxruntime")
