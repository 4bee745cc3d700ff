"""What to build: the options of a build, checked before anything is read."""

from __future__ import annotations

from pathlib import Path

import msgspec

from densegeo.backends import ENGINES, NAMES, NETWORKS, Form, backend_row
from densegeo.errors import ConfigError
from densegeo.export import quantizer, sources
from densegeo.export.cubins import check_architectures
from densegeo.export.engine_builder import EngineOptions, target_groups
from densegeo.models import rewrites
from densegeo.models.presets import PRESETS, preset
from densegeo.precision import precision_row
from densegeo.runtime.backends import has_cuda_driver
from densegeo.runtime.bundle import Choice
from densegeo.size import Size

SMALLEST = 32  # pixels of a bucket's side
MOST = 64  # images in a batch


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to build. batches: images that the graphs of each size also take at once."""

    model: str
    output: Path
    source: sources.SourceOptions = sources.SourceOptions()
    sizes: tuple[Size, ...] = ()  # empty: the model's default
    batches: tuple[int, ...] = ()  # besides 1
    precision: str = "fp32"
    base: str = ""  # what a quantized precision leaves in floating point; empty: its row's first
    any_size: bool = False  # take sides that are no multiples of the model's unit, if the model can
    calibration: Path | None = None  # the directory of `densegeo calibrate`, for precisions that need it
    backend: str = "onnxruntime"
    without: tuple[str, ...] = ()  # rewrites to leave out
    allow_unexpected: bool = False
    architectures: tuple[int, ...] = ()  # GPU architectures to build kernels and engines for: 89 is sm_89
    engines: EngineOptions = EngineOptions()  # where the backend runs engines
    choice: Choice | None = None  # what the command chose, for the manifest
    tune: bool | None = None  # race the forms of graphs where it was not done yet; False: the backend's own
    form: Form | None = None  # of the graphs, as a race chose it; None: the backend's own

    def validated(self) -> BuildOptions:
        """The options with defaults filled in; raises ConfigError for an invalid one."""
        row = preset(self.model)
        if row.weights is not None and (named := sources.named(self.source, row.family)):
            others = [name for name, other in PRESETS.items() if other.family is row.family and other.weights is None]
            raise ConfigError(
                f"{', '.join(f'--{name}' for name in named)}: {self.model} has weights that come with densegeo. "
                f"To build others of its architecture, say --model {' or '.join(others)}"
            )
        precision_row(self.precision)
        base = quantizer.checked_base(self.precision, self.base, self.calibration)
        if self.backend not in NAMES:
            raise ConfigError(f"there is no backend {self.backend!r} to build for; there are {', '.join(NAMES)}")
        if self.tune and (reason := self.not_tunable()):
            raise ConfigError(f"--tune races graphs with floating-point convolutions on a CPU, and {reason}")
        rewrites.select(row.family.rewrites, self.without)
        check_architectures(self.architectures)
        engines = self.engines
        if self.with_engines:
            engines = engines.validated()
            target_groups(engines.library, self.precision, self.architectures)
        sizes = tuple(dict.fromkeys(Size(*size) for size in self.sizes or row.sizes))
        for size in sizes:
            _check_size(size, 1 if self.any_size and row.family.any_size else row.family.multiple)
        batches = tuple(sorted({*self.batches} - {1}))
        if any(not 1 <= batch <= MOST for batch in batches):
            raise ConfigError(f"--batch must be 1 to {MOST} images, not {', '.join(map(str, batches))}")
        odd = [str(size) for size in sizes if size.width % 8 or size.height % 8]
        if batches and odd:
            raise ConfigError(f"--batch needs sides that are multiples of 8, unlike {', '.join(odd)}")
        if batches and "guidance" in self.without:
            raise ConfigError("--batch needs the rewrite guidance, whose two prompts fill the batch otherwise")
        return msgspec.structs.replace(self, sizes=sizes, batches=batches, engines=engines, base=base)

    @property
    def with_engines(self) -> bool:
        """Whether engines are built, besides the graphs."""
        return self.backend == ENGINES.name

    @property
    def graph_form(self) -> Form:
        """The form in which graphs are written."""
        return self.form or backend_row(self.backend).form

    def not_tunable(self) -> str:
        """Why there is no form of graphs to race, and what to do; empty where there is."""
        backend, remedy = backend_row(self.backend), "leave it out"
        if backend is NETWORKS:
            return f"{backend.title} runs none: it times its own ways when it opens a bundle, so {remedy}"
        if backend.runs != "graphs" or "cpu" not in backend.devices:
            return f"{backend.title} runs none there: {remedy}"
        if backend.missing():
            return f"{backend.title} is not installed: {backend.install}"
        if "cuda" in backend.devices and has_cuda_driver():
            return f"a GPU would run these: {remedy}"
        if rewrites.UPSAMPLE.name in self.without:
            return f"these need the rewrite {rewrites.UPSAMPLE.name}: {remedy}"
        return f"this plan has 8-bit ones: {remedy}" if quantizer.plans_convolutions(self.calibration) else ""

    @property
    def groups(self) -> int:
        """How many groups of architectures get engines of their own."""
        if not self.with_engines:
            return 0
        return len(target_groups(self.engines.library, self.precision, self.architectures))

    @property
    def carried_weights(self) -> Path | None:
        """The directory of the weights that come with the code, for a model whose weights do."""
        return preset(self.model).weights


def _check_size(size: Size, multiple: int) -> None:
    if size.width % multiple or size.height % multiple or min(size) < SMALLEST:
        nearest = Size(*(max(SMALLEST, round(side / multiple) * multiple) for side in size))
        raise ConfigError(
            f"a size of {size} cannot be built: both sides must be multiples of {multiple}, at least {SMALLEST} "
            f"(nearest: {nearest})"
        )
