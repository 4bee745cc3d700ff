"""`Geometry` -> files and bytes in memory, both through the encoders of `runtime.encoders`.

Files are first written under temporary names and renamed together at the end: a failure leaves none of them.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from densegeo.errors import ConfigError, ResourceError
from densegeo.formats import SIDECAR
from densegeo.given import shown
from densegeo.runtime.encoders import Extras, Part, parts
from densegeo.runtime.geometry import Geometry


def encode(geometry: Geometry, name: str, file: str, extras: Extras) -> bytes:
    """One format's bytes; see `Geometry.encode`."""
    if not isinstance(file, str):
        raise ConfigError(f'file must be a file\'s name, such as "normals.png", not {shown(file)}.')
    found = parts(geometry, name, extras)
    if not file and len(found) > 1:
        raise ConfigError(f"{name} is several files here: name one of them, file={' or '.join(map(repr, found))}.")
    if file and file not in found:
        raise ConfigError(f"There is no {file!r} in {name} of this result; there is {', '.join(found)}.")
    stream = io.BytesIO()
    (found[file] if file else next(iter(found.values())))(stream)
    return stream.getvalue()


def save(geometry: Geometry, directory: Path, formats: Sequence[str], stem: str, extras: Extras) -> list[Path]:
    """Write all formats or nothing; the paths written, in order. See `Geometry.save`."""
    if isinstance(formats, str):
        formats = (formats,)
    if not isinstance(formats, Iterable):
        raise ConfigError(f'formats must be names of formats, such as ("npz", "png"), not {shown(formats)}.')
    if not isinstance(stem, str) or os.path.basename(stem) != stem:
        raise ConfigError(f"stem must be a plain name without folders, not {shown(stem)}.")
    planned: dict[Path, Part] = {}
    for name in formats:
        for file, part in parts(geometry, name, extras).items():
            planned[directory / (f"{stem}_{file}" if stem else file)] = part
    _write_together(directory, planned)
    return [*planned]


def _sidecar_last(names: Iterable[Path]) -> list[Path]:
    """Where the sidecar is, the result is whole."""
    return sorted(names, key=lambda path: path.name.endswith(SIDECAR))


def _write_together(directory: Path, planned: dict[Path, Part]) -> None:
    staged: list[tuple[Path, Path]] = []
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for final in _sidecar_last(planned):
            # shorter than the final name, which may be as long as names can be
            staged.append((final.with_name(f".{secrets.token_hex(6)}"), final))
            with open(staged[-1][0], "wb") as stream:
                planned[final](stream)
        for temporary, final in staged:
            os.replace(temporary, final)
    except BaseException as error:  # Ctrl-C too must leave nothing behind
        for temporary, _ in staged:
            _quietly(temporary.unlink)
        for folder in made:
            _quietly(folder.rmdir)
        if isinstance(error, OSError):
            raise ResourceError(
                f"The results cannot be written to {directory}: {error.strerror or error}. "
                "Nothing was left there; free space or choose another folder."
            ) from error
        raise


def _quietly(action: Callable[[], None]) -> None:
    try:
        action()
    except OSError:
        return
