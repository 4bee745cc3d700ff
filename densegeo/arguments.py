"""Arguments and options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Optional

import typer

from densegeo.backends import NAMES
from densegeo.errors import DensegeoError
from densegeo.files import require_writable


def find_bundle(name_or_path: str) -> Path:
    """As `runtime.ready.find_bundle`, for a bundle that is there: BadParameter for anything else."""
    from densegeo.errors import BundleError
    from densegeo.runtime.bundle import require_bundle
    from densegeo.runtime.ready import find_bundle as find

    path = find(name_or_path)
    try:
        require_bundle(path)
    except BundleError as error:
        raise typer.BadParameter(str(error)) from error
    return path


def known_backend(name: str) -> str:
    """`auto` or a backend's name: BadParameter for anything else."""
    if name not in ("auto", *NAMES):
        raise typer.BadParameter(f"There is no {name!r}; choose auto, {', '.join(NAMES)}.")
    return name


def known_backends(names: list[str]) -> list[str]:
    """Each as `known_backend`."""
    return [known_backend(name) for name in names]


def writable_file(path: Path | None) -> Path | None:
    """A file that can be written, found out before any work. BadParameter for anything else."""
    if path is None:
        return None
    try:
        require_writable(path)
    except OSError as error:
        raise typer.BadParameter(f"Cannot write {path}: {error.strerror}.") from error
    return path


def known_device(device: str) -> str:
    """auto, cpu, cuda or cuda:N: BadParameter for anything else."""
    from densegeo.runtime.backends import parse_device

    try:
        parse_device(device)
    except DensegeoError as error:
        raise typer.BadParameter(str(error)) from error
    return device


def above_zero(value: float) -> float:
    """BadParameter for 0, less, and what is not finite."""
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"must be above 0, not {value:g}.")
    return value


def not_negative(value: float) -> float:
    """BadParameter for less than 0 and what is not finite."""
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"must be 0 or more, not {value:g}.")
    return value


Bundle = Annotated[
    Path,
    typer.Argument(
        parser=find_bundle,
        metavar="BUNDLE",
        help="The bundle's directory, or the name of one that comes with densegeo: fe2e-tiny.",
        show_default=False,
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        callback=known_backend,
        help=f"What runs the bundle: {', '.join(NAMES)}; `auto` takes the first of them that can, on a CPU the "
        "fastest that `bench` measured.",
    ),
]
Ray = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="ADDRESS", help="On a Ray cluster: local, auto, or its address (docs/fleet.md)."),
]
Device = Annotated[str, typer.Option(callback=known_device, help="auto, cpu, cuda or cuda:N.")]
# `Optional` and not `| None`: typer evaluates these at run time, also on Python 3.10.
Number = Optional[float]  # noqa: UP045
Whole = Optional[int]  # noqa: UP045
