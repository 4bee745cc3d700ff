"""Rows of kernels: a binary's kernel, arguments, constants and grid, for Triton's launcher and for compilation alike.

An operation's rows stand in `VARIANTS` of its own `kernel.py` and are found there: nothing else lists them.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, get_type_hints

import densegeo.kernels
from densegeo.errors import KernelError
from densegeo.kernels.contract import Axis
from densegeo.precision import PRECISIONS

WARPS = 4
NEEDS = {  # a pointer's type -> first architecture with it, and what to say of earlier ones; 8-bit integers all have
    f"*{row.triton}": (row.first_architecture, f"no {row.name} before sm_{row.first_architecture}")
    for row in (PRECISIONS["bf16"], PRECISIONS["fp8"])
}
_SCALARS = {int: "i32", float: "fp32"}


@dataclass(frozen=True)
class Variant:
    """One kernel with its argument types and constants.

    name: unique among what is compiled, operation.types. kernel: the Triton function. arguments: a launch's, in its
    order; int is i32, float is fp32, `Pointer` is what `pointers` says: argument -> Triton type of an element.
    aligned: pointers whose address is a multiple of 16 bytes, as every CUDA allocation is, and integers (strides,
    lengths) that are multiples of 16, so that memory is read in whole vectors.
    since: the first architecture, where it is not the types that decide, and what to say of earlier ones.
    fp_fusion: products and sums in one rounding. The interpreter has none, so that without it the arithmetic that is
    tested is the arithmetic that runs: only where products are most of the work, and their bound has room.
    bundled: a runtime without torch launches it, so bundles carry it.

    Raises KernelError unless arguments and constants are the kernel's parameters, in their order, and the grid is made
    from arguments and "batch".
    """

    name: str
    kernel: Any
    arguments: type[NamedTuple]
    pointers: Mapping[str, str]
    constants: Mapping[str, int | bool]
    grid: tuple[Axis, ...]
    aligned: tuple[str, ...]
    warps: int = WARPS
    since: tuple[int, str] = (0, "")
    fp_fusion: bool = False
    bundled: bool = False

    def __post_init__(self) -> None:
        takes, names = list(self.kernel.arg_names), [*self.arguments._fields, *self.constants]
        if takes != names:
            raise KernelError(f"The row {self.name} has {', '.join(names)}; its kernel takes {', '.join(takes)}.")
        pointers = [name for name, kind in _hints(self.arguments).items() if kind not in _SCALARS]
        if set(pointers) != set(self.pointers):
            raise KernelError(f"The row {self.name} needs the types of {', '.join(pointers)}.")
        if unknown := {axis.extent for axis in self.grid} - {*self.arguments._fields, "batch"}:
            raise KernelError(f"The grid of the row {self.name} needs {', '.join(unknown)}, which is no argument.")

    @property
    def types(self) -> dict[str, str]:
        """Argument -> Triton type ("*bf16", "i32"), in launch order."""
        hints = _hints(self.arguments)
        return {
            name: f"*{self.pointers[name]}" if name in self.pointers else _SCALARS[hints[name]]
            for name in self.arguments._fields
        }

    def unsupported(self, architecture: int) -> str | None:
        """Why this architecture cannot run the variant, or None."""
        needs = [self.since, *(NEEDS[kind] for kind in self.types.values() if kind in NEEDS)]
        return next((reason for first, reason in needs if architecture < first), None)


@cache
def _hints(arguments: type[NamedTuple]) -> dict[str, Any]:
    return get_type_hints(arguments)


def operations() -> tuple[str, ...]:
    """The packages of this one; all but `sampling`, which others use, are operations."""
    return tuple(module.name for module in pkgutil.iter_modules(densegeo.kernels.__path__) if module.ispkg)


def variants(*, bundled: bool = False) -> tuple[Variant, ...]:
    """Every row that is compiled ahead of time, or those alone that bundles carry: they need Triton, the others torch
    too. What a runtime without torch launches has its arguments in `arguments.py`.
    """
    names = [name for name in operations() if not bundled or find_spec(f"densegeo.kernels.{name}.arguments")]
    modules = (import_module(f"densegeo.kernels.{name}.kernel") for name in names)
    rows = (row for module in modules for row in getattr(module, "VARIANTS", ()))
    return tuple(row for row in rows if row.bundled or not bundled)
