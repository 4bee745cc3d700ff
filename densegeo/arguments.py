"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from densegeo.backends import NAMES


def find_bundle(given: str) -> Path:
    """As `runtime.ready.find_bundle`, for a bundle that is there: BadParameter for anything else."""
    from densegeo.errors import BundleError
    from densegeo.runtime.bundle import require_bundle
    from densegeo.runtime.ready import find_bundle as find

    path = find(given)
    try:
        require_bundle(path)
    except BundleError as error:
        raise typer.BadParameter(str(error)) from error
    return path


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
    str, typer.Option(help=f"What runs the bundle: {', '.join(NAMES)}; `auto` takes the first of them that can.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
# `Optional` and not `| None`: typer evaluates these at run time, also on Python 3.10.
Number = Optional[float]  # noqa: UP045
Whole = Optional[int]  # noqa: UP045
