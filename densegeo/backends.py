"""What can run a bundle: one row a backend. Lists, hints, `--help`, `doctor` and `auto` follow from the rows.

Imports no heavy library, and no backend's module: `runtime.backends.open_backend` imports the one that is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from typing import Literal, get_args

from densegeo.architectures import RTX_TARGETS
from densegeo.extras import install_command, install_hint
from densegeo.precision import FLOATS, PRECISIONS


@dataclass(frozen=True)
class EngineLibrary:
    """A library that builds engines and runs them. name: its Python module; distributions: any of them brings it.

    named_targets: whether it builds for the architectures that it has names for, and runs on no other; else engines are
    for the GPU on which they are built.
    """

    name: str
    title: str
    distributions: tuple[str, ...]
    named_targets: bool

    def knows(self, architecture: int) -> bool:
        """Whether engines for this GPU architecture (89 is sm_89) can be built."""
        return not self.named_targets or architecture in RTX_TARGETS


ENGINE_LIBRARIES = {
    row.name: row
    for row in (
        EngineLibrary("tensorrt", "TensorRT", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), named_targets=False),
        EngineLibrary("tensorrt_rtx", "TensorRT-RTX", ("tensorrt-rtx-cu13",), named_targets=True),
    )
}


Norms = Literal["rows", "channels"]


@dataclass(frozen=True)
class Form:
    """How graphs are written whose numbers are the same: docs/rewrites.md, "The form of a backend".

    upsampling: of the decoder's rewritten one, four 2x2 convolutions whose results are interleaved, or a transposed one
    of 4x4. norms: group norms as sums of rows of a group, or of channels, which keeps the layout of convolutions that
    have a pixel's channels adjacent.
    """

    upsampling: Literal["phases", "transposed"] = "phases"
    norms: Norms = "rows"

    def __str__(self) -> str:
        upsampling = "in phases" if self.upsampling == "phases" else "by transposed convolutions"
        return f"upsampling {upsampling}, norms by {self.norms}"


FORMS = tuple(Form(upsampling, norms) for upsampling in ("phases", "transposed") for norms in get_args(Norms))


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """One backend.

    opens: "module:function" of what makes it, (directory, manifest, device, sharing, threads=None) -> Backend, with
    calls_at_once=1 too where shares_threads. runs: what it takes.
    modules: Python modules that must be there. distributions: those that bring them, the first of each group that is
    installed counts; install: what to type when they are missing. devices: the kinds it can run on, the best first.
    providers: of ONNX Runtime, by kind of device. precisions: what its kernels have. convolutions: whether 8-bit ones
    are worth running. verified_only: "auto" takes it only for a bundle that `densegeo verify` passed on this machine.
    form: of graphs for it, the fastest on the machines where it was measured; `densegeo build --tune` measures it.
    shows_layers: whether calibration can see what enters the layers. shares_threads: whether it can be told how many
    calls share the CPU's threads. untried: what `doctor` says before anything was run, and without_gpu where no GPU is.
    """

    name: str
    title: str
    opens: str
    runs: Literal["graphs", "engines", "networks"]
    modules: tuple[str, ...]
    distributions: tuple[tuple[str, ...], ...]
    install: str
    devices: tuple[str, ...] = ("cuda", "cpu")
    providers: Mapping[str, str] = field(default_factory=dict)
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    convolutions: bool = True
    verified_only: bool = False
    form: Form = Form()
    shows_layers: bool = False
    shares_threads: bool = False
    untried: str = "not tried here"
    without_gpu: str = "no GPU was found"

    def missing(self) -> list[str]:
        """The modules that are not installed (looked up, not imported)."""
        return [module for module in self.modules if not installed(module)]

    def available(self) -> bool:
        """Whether all that it needs is installed."""
        return not self.missing()

    def lacking(self, precision: str, base: str) -> str | None:
        """The one of a bundle's two types that its kernels do not have, or None."""
        return next((name for name in (base, precision) if name not in self.precisions), None)

    @property
    def gpu_only(self) -> bool:
        return self.devices == ("cuda",)


def installed(module: str) -> bool:
    """Whether a Python module is there (looked up, not imported)."""
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # of a parent package; a module that was put in its place has no spec
        return False


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


_ORT = ("onnxruntime", "onnxruntime-gpu")
BACKENDS = (
    BackendRow(
        name="tensorrt",
        title="TensorRT",
        opens="densegeo.runtime.backends.tensorrt_engines:open_backend",
        runs="engines",
        modules=("cuda.core",),
        distributions=tuple(row.distributions for row in ENGINE_LIBRARIES.values()),
        install=f"{install_hint('tensorrt-rtx')} (or {install_command('gpu', beside='tensorrt')})",
        devices=("cuda",),
        verified_only=True,
        untried="densegeo's engines were never executed",
        without_gpu="engines can be built here, but no GPU was found to run them",
    ),
    BackendRow(
        name="onnxruntime-tensorrt",
        title="ONNX Runtime's TensorRT provider",
        opens="densegeo.runtime.backends.ort:open_tensorrt",
        runs="graphs",
        modules=("onnxruntime", "tensorrt"),
        distributions=(_ORT, ENGINE_LIBRARIES["tensorrt"].distributions),
        install=f"{install_hint('gpu', beside='tensorrt')} (in place of the extra cpu)",
        devices=("cuda",),
        providers={"cuda": "TensorrtExecutionProvider"},
        precisions=FLOATS,
        verified_only=True,
        untried="provider and GPU are there, but densegeo never ran a bundle on it",
    ),
    BackendRow(
        name="onnxruntime",
        title="ONNX Runtime",
        opens="densegeo.runtime.backends.ort:open_backend",
        runs="graphs",
        modules=("onnxruntime",),
        distributions=(_ORT,),
        install=f"{install_hint('cpu')} (or the extra gpu for CUDA; never both)",
        providers={"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"},
        # The CPU provider has no bf16, and the CUDA one lacks it in operators of our graphs (InstanceNormalization,
        # QuantizeLinear: docs/OperatorKernels.md of ONNX Runtime).
        precisions=tuple(name for name in PRECISIONS if name != "bf16"),
        # Its CPU provider runs them slower than float32 ones; the CUDA one has no kernel of any.
        convolutions=False,
        shows_layers=True,
        untried="provider and GPU are there, but densegeo was never run on a GPU",
    ),
    BackendRow(
        name="openvino",
        title="OpenVINO",
        opens="densegeo.runtime.backends.openvino_cpu:open_backend",
        runs="graphs",
        modules=("openvino",),
        distributions=(("openvino",),),
        install=install_hint("openvino"),
        devices=("cpu",),
        # benchmarks/autoencoder_layers.py: a tenth of the autoencoder's time in float32, 7 % of the decoder's in bf16
        form=Form("transposed", "channels"),
        shares_threads=True,
    ),
    BackendRow(
        name="torch",
        title="torch",
        opens="densegeo.runtime.backends.torch_modules:open_backend",
        runs="networks",
        modules=("torch",),
        distributions=(("torch",),),
        install=install_hint("torch"),
        shows_layers=True,
    ),
)
NAMES = tuple(row.name for row in BACKENDS)
ENGINES = next(row for row in BACKENDS if row.runs == "engines")
NETWORKS = next(row for row in BACKENDS if row.runs == "networks")


def without_convolutions(row: BackendRow) -> str:
    """Why a backend takes no 8-bit convolutions and what to do, as a sentence without its stop; empty where it does."""
    if row.convolutions:
        return ""
    able = " or ".join(other.name for other in BACKENDS if other.convolutions and not other.providers)
    return f"{row.title} would run them slower than float32 ones: use the backend {able}"


def backend_row(name: str) -> BackendRow:
    """Look a backend up that is known to exist: KeyError for another."""
    return {row.name: row for row in BACKENDS}[name]
