"""A version's model.py for tests: the class as it is exported, over a backend that a file tells what to do.

`DENSEGEO_FAULT` names the file: "slow 0.2" takes so many seconds more an image, "fail" raises, "hang" never returns.
What each `execute` was handed is noted beside it, a line each: images of its requests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from densegeo.errors import BackendError
from densegeo.fleet import triton_model

FAULT = Path(os.environ["DENSEGEO_FAULT"])


class TritonPythonModel(triton_model.TritonPythonModel):
    """As exported, with faults."""

    def initialize(self, args: Mapping[str, str]) -> None:
        super().initialize(args)
        backend: Any = self._estimator._backend
        run = backend.run

        def faulty(bucket: Any, stage: Any, array: Any) -> Any:
            kind, _, seconds = (FAULT.read_text() if stage == "encoder" else "").partition(" ")
            if kind == "slow":
                time.sleep(float(seconds))
            elif kind == "fail":
                raise BackendError("the GPU fell off the bus")
            elif kind == "hang":
                time.sleep(3600)
            return run(bucket, stage, array)

        backend.run = faulty

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        counts = [self._triton.get_input_tensor_by_name(request, "image").as_numpy().shape[0] for request in requests]
        with FAULT.with_suffix(".executed").open("a") as stream:
            stream.write(f"{' '.join(map(str, counts))}\n")
        return super().execute(requests)
