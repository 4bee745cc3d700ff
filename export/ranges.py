"""Would fp16 overflow? The largest magnitudes that a float32 run meets where an fp16 model would hold fp16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from densegeo.errors import ExportError

FP16_MAX = 65504.0
HEADROOM = 2.0  # other images may reach further than the seeded one
_WATCHED = {F.linear, F.conv2d, F.group_norm, Tensor.add, Tensor.__add__, torch.add, torch.conv2d}


class RangeRecorder(TorchFunctionMode):
    """Records the largest magnitude a layer: outputs of linears, convolutions, norms, residual sums and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, float] = {}
        self._stack: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            q, k = args[0], args[1]
            # |q . k| <= |q| |k| (Cauchy-Schwarz): a bound on the logits that needs no tokens x tokens matrix
            self._note((q.norm(dim=-1).amax() * k.norm(dim=-1).amax() / q.shape[-1] ** 0.5)[None], " attention logits")
        elif func in _WATCHED and isinstance(out, Tensor) and out.is_floating_point():
            self._note(out, "")
        return out

    def _note(self, value: Tensor, suffix: str) -> None:
        name = (self._stack[-1] if self._stack else "") + suffix
        self.largest[name] = max(self.largest.get(name, 0.0), float(value.abs().amax()))

    @contextmanager
    def watch(self, root: nn.Module, prefix: str) -> Iterator[None]:
        """Record while `root` runs, naming layers `prefix.<module path>`."""
        handles = []
        for name, module in root.named_modules():
            full = f"{prefix}.{name}" if name else prefix
            handles.append(module.register_forward_pre_hook(lambda *_, full=full: self._stack.append(full)))
            handles.append(module.register_forward_hook(lambda *_: self._stack.pop() and None))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def check_fp16(self) -> None:
        """Raise ExportError naming the layers whose magnitudes come within HEADROOM of fp16's largest number."""
        over = {name: value for name, value in self.largest.items() if not value <= FP16_MAX / HEADROOM}
        if over:
            worst = sorted(over.items(), key=lambda item: -item[1])
            shown = "; ".join(f"{name}: {value:.3g}" for name, value in worst[:5])
            raise ExportError(
                f"fp16 would overflow (its largest number is {FP16_MAX:.0f}, wanted headroom {HEADROOM:g}x) in "
                f"{len(over)} layers, worst first: {shown}. Build with --precision bf16 or fp32."
            )
