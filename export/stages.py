"""What the stages of a build share, and the two that make what GPUs run: kernels and engines.

Each stage is a function of the job and of what lies in the bundle's folder; it changes neither the job's modules nor
anybody else's files, and returns a record; see `export.build_state`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from densegeo.backends import backend_row
from densegeo.export.build_options import BuildOptions
from densegeo.export.build_plan import Plan
from densegeo.export.build_state import Engines, Kernels, StageRecord, State
from densegeo.export.cubins import write_cubins
from densegeo.export.display import Display
from densegeo.export.engine_builder import build_engines, planned_engines
from densegeo.export.quantizer import Quantizer
from densegeo.models import rewrites
from densegeo.models.casting import cast_module
from densegeo.models.loading import Files
from densegeo.models.rewrites import Pipeline
from densegeo.outputs import Decode
from densegeo.runtime.backends.tensorrt_kernels import launched
from densegeo.runtime.bundle import KERNELS, STAGES, Engine, Manifest

PROMPT_FILE = "prompt.safetensors"
CHECKED_ON = backend_row("onnxruntime")
Made = TypeVar("Made", bound=StageRecord)


@dataclass(frozen=True)
class Job:
    """What all stages need to know."""

    options: BuildOptions
    files: Files
    quantizer: Quantizer
    plan: Plan
    display: Display

    @property
    def applied(self) -> tuple[rewrites.Rewrite, ...]:
        return rewrites.select(self.files.family.rewrites, self.options.without)

    @property
    def decode(self) -> Decode:
        return self.plan.template.decode

    def stored_template(self) -> Pipeline:
        """The networks as they are stored: rewritten, quantized and cast, without values."""
        template = copy.deepcopy(self.plan.template)
        self.quantizer.apply(template)
        cast_module(template.denoiser, self.options.base)
        cast_module(template.vae, self.options.base)
        return template


def run_stage(job: Job, state: State, finished: Made | None, make: Callable[[Job, State], Made]) -> Made:
    """A stage's record: that of an interrupted build, or a new one."""
    if finished is not None:
        job.display.say(f"{type(finished).__name__.lower()}: taken over from an interrupted build")
        return finished
    started = time.monotonic()
    record = make(job, state)
    seconds = time.monotonic() - started
    job.display.say(f"{type(record).__name__.lower()}: {seconds:.1f} s")
    return state.keep(msgspec.structs.replace(record, seconds=record.seconds + seconds))


def make_kernels(job: Job, state: State) -> Kernels:
    """Compile the kernels of all architectures. Raises KernelError."""
    assert state.graphs is not None
    with job.display.bar("compiling kernels", 1):
        names = launched(job.decode, state.graphs.buckets[0].decoder.outputs[0].shape[1])
        contracts = write_cubins(state.bundle, job.options.architectures, names)
    files = state.describe((state.bundle / KERNELS).iterdir())
    return Kernels(key=state.keys.kernels, seconds=0.0, files=files, contracts=contracts)


def make_engines(job: Job, state: State, old: tuple[Path, Manifest] | None) -> Engines:
    """Build the engines that are missing, and keep each when it is done. Raises EngineError; see `build_engines`.

    old: a bundle whose engines may still be current.
    """
    assert state.graphs is not None
    options, display = job.options, job.display
    record = state.engines or Engines(key=state.keys.engines, seconds=0.0, files={}, engines=[])
    finished, current = record.engines, []
    started, before = time.monotonic(), record.seconds
    if finished:
        display.say(f"engines: {len(finished)} taken over from an interrupted build, where they are still wanted")
    with display.bar("engines", len(state.graphs.buckets) * len(STAGES) * options.groups) as bar:
        needed = planned_engines(
            state.graphs.buckets, options.precision, options.architectures, options.engines, state.files
        )
        for engine in build_engines(
            state.bundle, needed, options.engines, old=old, finished=finished, progress=bar.describe
        ):
            current.append(engine)
            bar.advance()
            record = state.keep(_with_engine(state, record, engine, before + time.monotonic() - started))
    display.say(f"engines: {time.monotonic() - started:.1f} s")
    names = {name for engine in current for name in (engine.file, engine.log)}
    files = {name: file for name, file in record.files.items() if name in names}
    return state.keep(msgspec.structs.replace(record, engines=current, files=files))


def _with_engine(state: State, record: Engines, engine: Engine, seconds: float) -> Engines:
    """The record with one engine more, in place of the one whose file it took."""
    if engine in record.engines:
        return record
    others = [other for other in record.engines if other.file != engine.file]
    files = record.files | state.describe([state.bundle / engine.file, state.bundle / engine.log])
    return msgspec.structs.replace(record, engines=[*others, engine], files=files, seconds=seconds)
