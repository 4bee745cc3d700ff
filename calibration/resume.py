"""Sensitivities as they are measured, so that an interrupted `densegeo calibrate` goes on with the next layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from densegeo.calibration.plan import Float32, QuantizationPlan, Sensitivity
from densegeo.files import atomic_write, read_record


class _File(msgspec.Struct, frozen=True):
    key: str
    rows: list[Sensitivity]


class SensitivityFile:
    """Rows that were measured for one plan on these pictures; those of others in the file count for nothing."""

    def __init__(self, path: Path, plan: QuantizationPlan, pictures: Sequence[Float32]) -> None:
        """plan: with all its layers; pictures: what errors are measured on."""
        layers = [plan.ranges, plan.attentions, plan.convolutions]
        settings = [plan.identity, plan.format, plan.weight_bits, plan.method, plan.smooth, layers]
        digest = hashlib.sha256(msgspec.json.encode(settings))
        for picture in pictures:
            digest.update(picture.tobytes())
        self._path, self._key = path, digest.hexdigest()
        self.rows = {row.layer: row for row in self._read()}

    def keep(self, row: Sensitivity) -> Sensitivity:
        """Remember a row from now on."""
        self.rows[row.layer] = row
        with atomic_write(self._path) as partial:
            partial.write_bytes(msgspec.json.encode(_File(self._key, list(self.rows.values()))))
        return row

    def _read(self) -> list[Sensitivity]:
        stored = read_record(self._path, _File)
        return stored.rows if stored is not None and stored.key == self._key else []
