"""What `densegeo bench` measured on this machine, and what follows from it for a build: which precision is fastest.

Only what was timed here, on the same work, after its numbers were verified, often enough and while nothing else ran, is
recommended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import suppress

import msgspec

from densegeo.backends import backend_row
from densegeo.files import atomic_write, read_record
from densegeo.precision import QUANTIZED, precision_row
from densegeo.runtime import state
from densegeo.runtime.bundle import STAGES, Bucket, Manifest

ENOUGH = 20  # runs; with fewer, p90 is the slowest one or two
BUSY = 0.1  # of the processors' time that others may take
SPREAD = 0.2  # standard deviation / mean


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """How a latency was measured, as far as it decides whether to believe it.

    variation: standard deviation / mean. others: share of the machine's processor time that other processes took
    meanwhile, None where the system does not tell. throttled: why the GPU slowed its clocks, empty when it did not.
    """

    runs: int
    variation: float
    others: float | None = None
    throttled: list[str] = []

    @property
    def doubts(self) -> list[str]:
        """Why it is not to be believed, in words; empty when it is."""
        reasons = []
        if self.runs < ENOUGH:
            reasons.append(f"{self.runs} runs are few: with --runs {ENOUGH} it counts")
        if self.others is not None and self.others > BUSY:
            reasons.append(f"the machine is loaded: other processes took {100 * self.others:.0f} % of its processors")
        if self.variation > SPREAD:
            reasons.append(f"the times spread: standard deviation {100 * self.variation:.0f} % of the mean")
        if self.throttled:
            reasons.append(f"the GPU was throttled ({', '.join(self.throttled)})")
        return reasons


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Latency of one variant of a model at one size. precision: with what more is 8-bit; device: its name."""

    model: str
    precision: str = msgspec.field(name="what")  # as in records of earlier versions
    bucket: str
    work: str  # what the networks compute: other rewrites, or another architecture, are other work
    backend: str
    device: str
    machine: str
    p50: float  # ms, end to end
    p90: float
    conditions: Conditions
    engines: list[str] = []  # fingerprints of the bundle's engines, where the backend runs them

    @property
    def eight_bit(self) -> bool:
        return self.precision.startswith(QUANTIZED)

    @property
    def place(self) -> tuple[str, str]:
        return self.backend, self.device

    @property
    def variant(self) -> list[str]:
        """What there is one record of."""
        return [self.model, self.precision, self.bucket, self.work, self.backend, self.device, self.machine]


def measured(
    manifest: Manifest, bucket: Bucket, backend: str, device: str, p50: float, p90: float, conditions: Conditions
) -> Measured:
    """A record of a run that was verified. device: its name, as "NVIDIA H100"."""
    engines = [engine.fingerprint for engine in manifest.engines if engine.bucket == bucket.name]
    return Measured(
        model=manifest.model,
        precision=_precision_in_words(manifest),
        bucket=bucket.name,
        work=_work(manifest, bucket),
        backend=backend,
        device=device,
        machine=state.machine(),
        p50=p50,
        p90=p90,
        conditions=conditions,
        engines=engines if backend_row(backend).runs == "engines" else [],
    )


def _precision_in_words(manifest: Manifest) -> str:
    """ "int8 with convolutions, the rest fp32"."""
    plan, row = manifest.quantization, precision_row(manifest.precision)
    parts = {} if plan is None else {"attention": plan.attentions, "convolutions": plan.convolutions}
    additions = [name for name, planned in parts.items() if planned]
    additions += [] if plan is None or plan.weight_bits == 8 else [f"{plan.weight_bits}-bit weights"]
    remainder = "" if manifest.base == row.base else f", the rest {manifest.base}"
    return f"{manifest.precision}{' with ' * bool(additions)}{', '.join(additions)}{remainder}"


def fastest_first(manifest: Manifest) -> list[str]:
    """Backends that ran such a bundle at its first size on this machine, by their medians; those to be believed."""
    (bucket, *_), precision = manifest.buckets, _precision_in_words(manifest)
    same_work = manifest.model, precision, bucket.name, _work(manifest, bucket)
    alike = [
        record
        for record in _records()
        if (record.model, record.precision, record.bucket, record.work) == same_work and not record.conditions.doubts
    ]
    return list(dict.fromkeys(record.backend for record in sorted(alike, key=lambda record: record.p50)))


def remember(record: Measured) -> None:
    """Keep it in place of an older one of the same variant, unless that one can be believed and this one cannot.

    A state that cannot be written is no error.
    """
    path = state.folder("measured") / f"{hashlib.sha256(msgspec.json.encode(record.variant)).hexdigest()}.json"
    older = read_record(path, Measured)
    if record.conditions.doubts and older is not None and not older.conditions.doubts:
        return
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(msgspec.json.encode(record))
    except OSError:
        pass


def forget(fingerprints: Collection[str]) -> None:
    """Records of engines that are no more say nothing. A state that cannot be written is no error."""
    for path in sorted(state.folder("measured").glob("*.json")):
        record = read_record(path, Measured)
        if record is not None and not set(fingerprints).isdisjoint(record.engines):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def advice(manifest: Manifest, doubted: Collection[Measured] = ()) -> list[str]:
    """For each size and place where floats and 8 bits were both measured: which precision is recommended, and why.

    doubted: what was measured just now and cannot be believed. Nothing is recommended at its size and place: that would
    be an older record's numbers against those that people have before them.
    """
    lines, records = [], [record for record in _records() if not record.conditions.doubts]
    unsaid = {(record.model, record.bucket, *record.place) for record in doubted if record.conditions.doubts}
    for bucket in manifest.buckets:
        alike = [
            record
            for record in records
            if (record.model, record.bucket, record.work) == (manifest.model, bucket.name, _work(manifest, bucket))
        ]
        for place in sorted({record.place for record in alike}):
            if (manifest.model, bucket.name, *place) in unsaid:
                continue
            at_place = sorted((record for record in alike if record.place == place), key=lambda record: record.p50)
            eight = next((record for record in at_place if record.eight_bit), None)
            floating = next((record for record in at_place if not record.eight_bit), None)
            if eight is not None and floating is not None:
                lines.append(_advise(bucket.name, eight, floating))
    return lines


def _advise(size: str, eight: Measured, floating: Measured) -> str:
    """8 bits where median and tail are both shorter as they are printed, for they cost some accuracy; and why."""
    shorter = [_ms(getattr(eight, name)) < _ms(getattr(floating, name)) for name in ("p50", "p90")]
    best = eight if all(shorter) else floating
    times = ", ".join(
        f"{row.precision} took {_printed(row.p50)} ms (p90 {_printed(row.p90)})" for row in (eight, floating)
    )
    why = "both were verified there"
    if any(shorter) and not all(shorter):
        shorter_one, longer_one = ("median", "p90") if shorter[0] else ("p90", "median")
        why += f"; the {shorter_one} of {eight.precision} is shorter, its {longer_one} is not, and it is less accurate"
    elif not any(shorter):
        why += f"; {eight.precision} is no faster, and less accurate"
    return f"{best.precision} is recommended at {size} on {best.device} ({best.backend}): {times}; {why}"


def _ms(value: float) -> float:
    """As it is printed: three digits."""
    return float(f"{value:.3g}")


def _printed(value: float) -> str:
    return f"{_ms(value):g}"


def _work(manifest: Manifest, bucket: Bucket) -> str:
    """A digest. Precisions and backends write the same work as graphs of slightly different operations, which count
    where nothing else tells.
    """
    graphs = [getattr(bucket, stage).flops for stage in STAGES]
    return hashlib.sha256(msgspec.json.encode([manifest.networks or graphs, manifest.rewrites])).hexdigest()[:16]


def _records() -> Iterator[Measured]:
    """This machine's; what cannot be read is left out."""
    machine = state.machine()
    for path in sorted(state.folder("measured").glob("*.json")):
        record = read_record(path, Measured)
        if record is not None and record.machine == machine:
            yield record
