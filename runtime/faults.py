"""Faults put into one stage of the way that images go, so that a verification can show that it would notice them.

Each is one that a real defect makes: colours in the wrong order, a stale recording, a sign. A way is the host's
(numpy), the torch backend's on its device, or the tensorrt backend's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from densegeo.errors import ConfigError

if TYPE_CHECKING:
    from densegeo.runtime.estimator import Estimator


class NoSuchStageError(ConfigError):
    """The way that images go has no such stage."""


STAGES = ("preprocess", "split", "resize", "normals", "graph", "fused")
Change = Callable[[Any], Any]  # what is there -> what takes its place


def _after(spoil: Callable[[Any], Any]) -> Change:
    """The same function, and then its result spoilt."""
    return lambda real: lambda *arguments, **named: spoil(real(*arguments, **named))


def _launching(kernel: str, spoil: Callable[[Any], Any]) -> Change:
    """`Kernels.launch` with the arguments of one kernel spoilt."""

    def change(real: Any) -> Any:
        def launch(self: Any, name: str, stream: Any, arguments: NamedTuple, batch: int = 1) -> None:
            real(self, name, stream, spoil(arguments) if name.startswith(f"{kernel}.") else arguments, batch)

        return launch

    return change


def _stale(real: Any) -> Any:
    """A recording whose inputs are those of its first replay for ever."""

    def replay(self: Any, *arguments: Any) -> Any:
        first = self.__dict__.setdefault("first_arguments", tuple(tensor.clone() for tensor in arguments))
        return real(self, *first)

    return replay


def _once(real: Any) -> Any:
    """A recording that is launched for the first images alone."""

    def launch(self: Any) -> None:
        if not self.__dict__.setdefault("was_launched", False):
            self.was_launched = True
            real(self)

    return launch


def _louder(real: Any) -> Any:
    """A fused denoiser whose output is half as large again."""

    def fuse(denoiser: Any) -> Any:
        fused = real(denoiser)
        fused.register_forward_hook(lambda module, arguments, output: 1.5 * output)
        return fused

    return fuse


def _half_as_wide(arguments: Any) -> Any:
    return arguments._replace(box_width=arguments.box_width // 2)


_RUNTIME = "densegeo.runtime"
_TORCH, _CHAIN = f"{_RUNTIME}.backends.torch_device", "densegeo.models.chain"
_LAUNCH = (f"{_RUNTIME}.backends.cuda_kernels", "Kernels.launch")

# way -> stage -> where: (module, name in it), and what takes its place
FAULTS: dict[str, dict[str, tuple[tuple[str, str], Change]]] = {
    "host": {
        "preprocess": ((f"{_RUNTIME}.ways", "prepare"), _after(lambda rgb: rgb[:, ::-1].copy())),
        "split": ((f"{_RUNTIME}.host_chain", "latents_of"), _after(lambda latents: -latents)),
        "resize": ((f"{_RUNTIME}.host_chain", "restore"), _after(lambda plane: plane[:, ::-1])),
        "normals": ((f"{_RUNTIME}.host_chain", "turned"), _after(lambda normals: -normals)),
    },
    "torch": {
        "preprocess": ((_TORCH, "preprocess"), _after(lambda rgb: rgb.flip(1))),
        "split": ((_CHAIN, "split_tokens"), _after(lambda latents: -latents)),
        "resize": ((_CHAIN, "resize_depth"), _after(lambda prediction: prediction.flip(-1))),
        "normals": ((_CHAIN, "normals"), _after(lambda result: (-result[0], *result[1:]))),
        "graph": ((f"{_RUNTIME}.backends.torch_capture", "Replay.__call__"), _stale),
        "fused": ((f"{_RUNTIME}.backends.torch_modules", "fuse"), _louder),
    },
    "tensorrt": {
        "preprocess": (_LAUNCH, _launching("preprocess", lambda args: args._replace(red=2 - args.red))),
        "split": (
            _LAUNCH,
            _launching("split", lambda args: args._replace(first_factor=-args.first_factor)),
        ),
        "resize": (_LAUNCH, _launching("resize_depth", _half_as_wide)),
        "normals": (_LAUNCH, _launching("normals", _half_as_wide)),
        "graph": ((f"{_RUNTIME}.backends.tensorrt_network", "Network.launch"), _once),
    },
}


def stages(estimator: Estimator) -> dict[str, tuple[tuple[str, str], Change]]:
    """What can be broken on an estimator's way."""
    backend, decode = estimator.frames, estimator.manifest.decode
    faults = dict(FAULTS["host" if backend is None else backend.name])
    lacking = {
        "split": decode.packing != "tokens",
        "normals": not decode.has("normals"),
        "resize": backend is not None and not decode.has("depth"),  # normals are resized by their own kernel
        "graph": backend is not None and not backend.records,
    }
    return {stage: fault for stage, fault in faults.items() if not lacking.get(stage, False)}


@contextmanager
def breaking(stage: str, estimator: Estimator) -> Iterator[None]:
    """Meanwhile estimators that go the same way have this stage broken. Raises NoSuchStageError."""
    if stage not in STAGES:
        raise NoSuchStageError(f"there is no stage {stage!r} to break; there are {', '.join(STAGES)}")
    able = stages(estimator)
    if stage not in able:
        raise NoSuchStageError(
            f"with {estimator.backend} on {estimator.device} images pass no {stage} stage; they pass {', '.join(able)}"
        )
    (module, name), change = able[stage]
    owner: Any = import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, last)
    setattr(owner, last, change(real))
    try:
        yield
    finally:
        setattr(owner, last, real)
