"""What `densegeo bench` measured on this machine, and what follows from it for a build: which precision is fastest.

Only what was timed here, on the same work and after its numbers were verified, is recommended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

from densegeo.files import atomic_write
from densegeo.precision import QUANTIZED, precision_row
from densegeo.runtime import state
from densegeo.runtime.bundle import STAGES, Bucket, Manifest


class Measured(msgspec.Struct, frozen=True):
    """Latency of one variant of a model at one size. what: its precision, and what more is 8-bit; device: its name."""

    model: str
    what: str
    bucket: str
    flops: int  # of an image's three graphs: other rewrites, or another architecture, are other work
    backend: str
    device: str
    machine: str
    p50: float  # ms, end to end
    p90: float

    @property
    def eight_bit(self) -> bool:
        return self.what.startswith(QUANTIZED)

    @property
    def place(self) -> tuple[str, str]:
        return self.backend, self.device


def measured(manifest: Manifest, bucket: Bucket, backend: str, device: str, p50: float, p90: float) -> Measured:
    """A record of a run that was verified. device: its name, as "NVIDIA H100"."""
    attention = manifest.quantization is not None and bool(manifest.quantization.attentions)
    row = precision_row(manifest.precision)
    rest = "" if manifest.base == row.base else f", the rest {manifest.base}"
    return Measured(
        model=manifest.model,
        what=f"{manifest.precision}{' with attention' if attention else ''}{rest}",
        bucket=bucket.name,
        flops=_flops(bucket),
        backend=backend,
        device=device,
        machine=state.machine(),
        p50=p50,
        p90=p90,
    )


def remember(record: Measured) -> None:
    """Keep it in place of an older one of the same variant. A state that cannot be written is no error."""
    same = msgspec.structs.replace(record, p50=0.0, p90=0.0)
    name = hashlib.sha256(msgspec.json.encode(same)).hexdigest()
    try:
        with atomic_write(state.folder("measured") / f"{name}.json") as partial:
            partial.write_bytes(msgspec.json.encode(record))
    except OSError:
        pass


def advice(manifest: Manifest) -> list[str]:
    """For each size and place where floats and 8 bits were both measured: which precision is recommended, and why."""
    lines, records = [], list(_records())
    for bucket in manifest.buckets:
        alike = [
            record
            for record in records
            if (record.model, record.bucket, record.flops) == (manifest.model, bucket.name, _flops(bucket))
        ]
        for place in sorted({record.place for record in alike}):
            here = sorted((record for record in alike if record.place == place), key=lambda record: record.p50)
            eight = next((record for record in here if record.eight_bit), None)
            floating = next((record for record in here if not record.eight_bit), None)
            if eight is not None and floating is not None:
                lines.append(_advise(bucket.name, eight, floating))
    return lines


def _advise(size: str, eight: Measured, floating: Measured) -> str:
    faster = eight.p50 < floating.p50 and eight.p90 < floating.p90
    best = eight if faster else floating
    times = f"{eight.what} took {eight.p50:.3g} ms, {floating.what} {floating.p50:.3g} ms"
    return f"{best.what} is recommended at {size} on {best.device} ({best.backend}): {times}, both verified there"


def _flops(bucket: Bucket) -> int:
    return sum(getattr(bucket, stage).flops for stage in STAGES)


def _records() -> Iterator[Measured]:
    """This machine's; what cannot be read is left out."""
    machine = state.machine()
    for path in sorted(state.folder("measured").glob("*.json")):
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Measured)
        except (OSError, msgspec.MsgspecError):
            continue
        if record.machine == machine:
            yield record
