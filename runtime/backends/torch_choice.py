"""Which of several ways to compute the same is taken on a device: timed when a bundle is opened, logged, remembered.

A way that is off is not taken, however fast: its error may be at most twice the plain way's, both against float64
(DESIGN section 10).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from densegeo.kernels.attention import fastest
from densegeo.processor import whole_cpu
from densegeo.runtime.kept import keep, kept_at, read_kept

FOLDER = "torch-choices"  # among the user's cache
FACTOR = 2.0

log = logging.getLogger("densegeo")
Ways = Mapping[str, Callable[[], Tensor]]


def decide(work: str, ways: Ways, exact: Callable[[], Tensor], device: torch.device, part: slice = slice(None)) -> str:
    """The name of the fastest way among those whose results are good. The first one is the plain one.

    work: names the work, shapes and types included; with the device's name and the libraries' versions it is what the
    choice is remembered by. exact: the result in float64, or its `part` along the first axis.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else whole_cpu()
    path = kept_at(FOLDER, work, *ways, name, torch.__version__)
    if (remembered := (read_kept(path) or b"").decode(errors="replace")) in ways:
        log.info("%s: %s, as timed before on this device", work, remembered)
        return remembered
    accurate = _accurate(work, ways, exact(), part)
    chosen = fastest(accurate, device) if len(accurate) > 1 else next(iter(accurate))
    log.info("%s: %s, of %s", work, chosen, ", ".join(accurate))
    keep(path, chosen.encode())
    return chosen


def _accurate(work: str, ways: Ways, exact: Tensor, part: slice) -> dict[str, Callable[[], Tensor]]:
    """The ways that run here and whose error is in bounds."""
    accurate: dict[str, Callable[[], Tensor]] = {}
    bound = 0.0
    for name, way in ways.items():
        try:
            error = float((way()[part].double() - exact).norm() / exact.norm())
        except RuntimeError as reason:  # a library that has no such kernel here says so in its own words
            if not accurate:
                raise  # the plain way
            log.info("%s: %s does not run here: %s", work, name, str(reason).partition("\n")[0])
            continue
        bound = bound if accurate else FACTOR * error
        if accurate and not error <= bound:
            log.warning("%s: %s is off by %.1e, and the bound is %.1e: not taken", work, name, error, bound)
            continue
        accurate[name] = way
    return accurate
