"""NVIDIA's GPU architectures that densegeo builds for, one row each, by number: 89 is sm_89.

Imports no heavy library.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from densegeo.precision import PRECISIONS


@dataclass(frozen=True)
class Architecture:
    """One row. shared_kib: the most shared memory of one block. cuda: the first CUDA toolkit that compiles for it.

    rtx_target: what TensorRT for RTX calls it, which builds for and runs on these alone; empty where it has none.
    """

    number: int
    shared_kib: int  # KiB; CUDA programming guide, compute capabilities
    cuda: str  # NVIDIA's release notes of the toolkits
    rtx_target: str = ""

    @property
    def types(self) -> tuple[str, ...]:
        """The precisions that it has."""
        return tuple(row.name for row in PRECISIONS.values() if row.first_architecture <= self.number)


ARCHITECTURES = {
    row.number: row
    for row in (
        Architecture(75, 64, "10.0", "SM75"),
        Architecture(80, 163, "11.0", "SM80"),
        Architecture(86, 99, "11.1", "SM86"),
        Architecture(87, 163, "11.4"),
        Architecture(89, 99, "11.8", "SM89"),
        Architecture(90, 227, "11.8"),
        Architecture(100, 227, "12.8"),
        Architecture(110, 227, "13.0"),
        Architecture(120, 99, "12.8", "SM120"),
        Architecture(121, 99, "12.9", "SM121"),
    )
}
OLDEST = min(ARCHITECTURES)
AMPERE = 80  # what an engine without targets is built for, and later ones
RTX_TARGETS = {row.number: row.rtx_target for row in ARCHITECTURES.values() if row.rtx_target}


def names(numbers: Iterable[int]) -> str:
    """For people: "sm_86, sm_89"."""
    return ", ".join(f"sm_{number}" for number in numbers)
