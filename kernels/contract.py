"""How a compiled kernel is launched: everything a torch-free runtime must know, as strict records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

Pointer = Any  # in a kernel's arguments: a tensor, or an address on the device


class Axis(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One grid dimension: ceil(times * extent / block) programs.

    extent: a launch argument's name, or "batch", the number of pictures in the tensors.
    """

    extent: str
    block: int = 1
    times: int = 1


class Argument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One launch argument: its Triton type ("*fp32" is a pointer, "i32", "fp32") and its promised alignment.

    alignment: what a pointer, in bytes, or an integer (a stride, a length) is a multiple of; 0 when nothing is assumed
    but the element's own size.
    """

    name: str
    type: str
    alignment: int = 0


class LaunchContract(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kernel binary for one architecture.

    arguments: in launch order; constants are compiled in and are no arguments. hidden: pointers that follow the
    arguments; all have size 0 here, so null is passed. threads per program: 32 * warps.
    shared: bytes of dynamic shared memory. digest: SHA-256 of the binary.
    """

    name: str  # of the table's row: "split.bf16_bf16"
    symbol: str  # entry point in the binary
    architecture: int  # 90 is sm_90
    arguments: list[Argument]
    constants: dict[str, int | bool]
    warps: int
    shared: int
    grid: list[Axis]
    hidden: list[str]
    fp_fusion: bool
    triton: str  # version that compiled it
    digest: str

    @property
    def file(self) -> str:
        """The binary's file name."""
        return f"{self.name}.sm_{self.architecture}.cubin"


def programs(axes: Sequence[Axis], **extents: Any) -> tuple[int, ...]:
    """The launch grid for these extents."""
    return tuple(-(-axis.times * extents[axis.extent] // axis.block) for axis in axes)
