"""What a calibration makes of a build: which layers become 8-bit and with which ranges; is it of this model at all?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
from torch import nn

from densegeo.backends import backend_row, without_convolutions
from densegeo.calibration.collect import check_identity
from densegeo.calibration.plan import QuantizationPlan, load_plan, nothing_planned, plan_file
from densegeo.calibration.statistics import FILE, Identity, Statistics
from densegeo.errors import ConfigError, QuantizationError
from densegeo.models.casting import DTYPES
from densegeo.models.layer_plans import LayerPlan, Plans, quantize_block
from densegeo.models.rewrites import Pipeline, Rewrite
from densegeo.precision import CALIBRATED, PRECISIONS, QUANTIZED
from densegeo.runtime.bundle import Quantization, Source


def checked_base(precision: str, base: str, calibration: Path | None) -> str:
    """The floating-point type of a build. Raises ConfigError for contradictions."""
    row = PRECISIONS[precision]
    if row.calibrated and calibration is None:
        raise ConfigError(
            f"--precision {precision} needs --calibration DIR: `densegeo calibrate BUNDLE --images DIR "
            f"--format {precision}` makes it"
        )
    if not row.quantized and (calibration is not None or base not in ("", precision)):
        raise ConfigError(f"--calibration and --base are for {' and '.join(QUANTIZED)}, not for {precision}")
    if calibration is not None and not row.calibrated:
        raise ConfigError(f"--calibration is for {' and '.join(CALIBRATED)}: {precision} needs no ranges")
    if base and base not in row.bases:
        overflows = base in PRECISIONS and PRECISIONS[base].overflows
        why = f" (products of {row.bits}-bit numbers overflow {base} before they are scaled)" if overflows else ""
        raise ConfigError(f"--base {base} is none of {', '.join(row.bases)}{why}")
    return base or row.base


def plans_convolutions(calibration: Path | None) -> bool:
    """Whether a calibration has a plan with convolutions. Raises QuantizationError for one that cannot be read."""
    if calibration is None:
        return False
    planned = [kind for kind in CALIBRATED if plan_file(calibration, kind).is_file()]
    return any(load_plan(calibration, kind).convolutions for kind in planned)


class Quantizer:
    """Quantizes parts of a pipeline by a plan; does nothing without one.

    Called with a float32 part and its name, see `Pipeline.parts`.
    """

    def __init__(self, base: str, plan: QuantizationPlan | None, layers: Plans, plan_path: Path) -> None:
        self.base, self.plan, self.layers, self._plan_path = base, plan, layers, plan_path

    @classmethod
    def load(cls, precision: str, base: str, calibration: Path | None) -> Quantizer:
        """Raises QuantizationError for missing or damaged files."""
        if calibration is None:
            return cls(base, None, {}, Path())
        plan = load_plan(calibration, precision)
        if plan.empty:
            raise QuantizationError(
                f"{plan_file(calibration, precision)} leaves every layer as it is: none fits into its budget. "
                f"{nothing_planned(plan)}"
            )
        return cls(base, plan, plan.layers(Statistics.load(calibration / FILE)), plan_file(calibration, precision))

    def check(self, inputs: Iterable[Source], applied: Iterable[Rewrite]) -> None:
        """Raises QuantizationError when the plan is of other files or other rewrites."""
        if self.plan is not None:
            planned = self.plan.identity
            sources = {source.role: source.sha256 for source in inputs}
            actual = Identity(planned.graph, planned.weights, [rewrite.name for rewrite in applied], sources)
            check_identity(planned, actual, self._plan_path)

    def __call__(self, block: nn.Module, name: str) -> None:
        if self.plan is not None:
            quantize_block(block, name, self.layers, self.plan.numbers, DTYPES[self.base])

    def apply(self, pipeline: Pipeline) -> None:
        """Quantize all networks, whole."""
        for name, part in pipeline.parts():
            self(part, name)

    def require_backend(self, name: str) -> None:
        """Raises ConfigError for a backend to build for that has no kernels for what is planned."""
        if self.plan is not None and self.plan.convolutions and (why := without_convolutions(backend_row(name))):
            raise ConfigError(f"{self._plan_path} plans 8-bit convolutions. {why}, or plan without --convolutions.")

    @property
    def saved(self) -> int:
        """Bytes that the planned linears take less than in the base."""
        if self.plan is None:
            return 0
        count = self.plan.parameters
        return PRECISIONS[self.base].bytes_of(count) - PRECISIONS[self.plan.format].bytes_of(count)

    @property
    def digest(self) -> str:
        """Of the plan and its smoothing factors; empty without one."""
        if self.plan is None:
            return ""
        digest = hashlib.sha256(msgspec.json.encode(self.plan))
        for name, layer in sorted(self.layers.items()):
            if isinstance(layer, LayerPlan) and layer.smooth is not None:
                digest.update(name.encode() + layer.smooth.numpy().tobytes())
        return digest.hexdigest()

    @property
    def record(self) -> Quantization | None:
        """What the manifest says."""
        if self.plan is None:
            return None
        plan = self.plan
        return Quantization(
            format=plan.format,
            method=plan.method,
            smooth=plan.smooth,
            linears=sorted(plan.ranges),
            attentions=sorted(plan.attentions),
            share=plan.parameters / plan.linear_parameters,
            depth_error=None if plan.error is None else plan.error.depth,
            normal_error=None if plan.error is None else plan.error.normals,
            convolutions=sorted(plan.convolutions),
            convolution_share=plan.convolution_share,
            weight_bits=plan.weight_bits,
            twice=sorted(plan.twice),
            twice_share=plan.share_of(plan.twice),
        )
