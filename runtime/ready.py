"""The bundles that come with the package, found by name: `Estimator("fe2e-tiny")` needs no build."""

from __future__ import annotations

import os
from pathlib import Path

from densegeo.argument_checks import shown
from densegeo.errors import BundleError

FOLDER = Path(__file__).parent / "bundles"  # made by `make ready-bundle`


def names() -> list[str]:
    """Of the bundles that come with this installation."""
    return sorted(path.name for path in FOLDER.iterdir()) if FOLDER.is_dir() else []


def find_bundle(name_or_path: str | os.PathLike[str]) -> Path:
    """The directory that is meant: the given one, or, if nothing is there, the ready bundle of that name.

    Raises BundleError for what is no path.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or "\0" in os.fsdecode(name_or_path):
        raise BundleError(
            "A bundle is given by its directory's path, as text or as a pathlib.Path, or by the name of one that comes "
            f"with densegeo ({', '.join(names())}), not by {shown(name_or_path)}."
        )
    path = Path(os.fsdecode(name_or_path))
    return FOLDER / path if not os.path.exists(path) and os.fspath(name_or_path) in names() else path


def beside(bundle: Path, ending: str) -> Path:
    """Where what belongs to a bundle goes by default: beside it, or for a ready one into the working directory."""
    name = f"{bundle.name}.{ending}"
    return Path(name) if bundle.parent == FOLDER else bundle.with_name(name)
