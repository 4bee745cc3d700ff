"""`Geometry` -> files and bytes in memory, both through the encoders of `runtime.encoders`.

Files are first written under temporary names and renamed together at the end: a failure leaves none of them.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from densegeo.argument_checks import items_of, shown
from densegeo.errors import ConfigError, ResourceError
from densegeo.formats import SIDECAR
from densegeo.runtime.encoders import Extras, Part, parts
from densegeo.runtime.geometry import Geometry

# What helps against an error of the system's.
_ADVICE = {
    errno.ENAMETOOLONG: "give the image, or stem, a shorter name",
    errno.ENOSPC: "free space or choose another folder",
    errno.EDQUOT: "free space or choose another folder",
}


def encode(geometry: Geometry, name: str, file: str, extras: Extras) -> bytes:
    """One format's bytes; see `Geometry.encode`."""
    if not isinstance(file, str):
        raise ConfigError(f'file must be a file\'s name, such as "normals.png", not {shown(file)}.')
    files = parts(geometry, name, extras)
    if not file and len(files) > 1:
        raise ConfigError(f"{name} is several files here: name one of them, file={' or '.join(map(repr, files))}.")
    if file and file not in files:
        raise ConfigError(f"There is no {file!r} in {name} of this result; there is {', '.join(files)}.")
    stream = io.BytesIO()
    (files[file] if file else next(iter(files.values())))(stream)
    return stream.getvalue()


def save(geometry: Geometry, directory: Path, formats: Sequence[str], stem: str, extras: Extras) -> list[Path]:
    """Write all formats or nothing; the paths written, in order. See `Geometry.save`."""
    names = [formats] if isinstance(formats, str) else items_of(formats)
    if names is None:
        raise ConfigError(f'formats must be names of formats, such as ("npz", "png"), not {shown(formats)}.')
    if not isinstance(stem, str) or os.path.basename(stem) != stem or "\0" in stem:
        raise ConfigError(f"stem must be a plain name without folders, not {shown(stem)}.")
    planned: dict[Path, Part] = {}
    for name in names:
        for file, part in parts(geometry, name, extras).items():
            planned[directory / (f"{stem}_{file}" if stem else file)] = part
    require_short_names(directory, (path.name for path in planned))
    _write_together(directory, planned)
    return [*planned]


def require_short_names(directory: Path, names: Iterable[str]) -> None:
    """Raises ResourceError, before anything is computed, for a name that is longer than the directory's file system
    takes. The directory may be missing.
    """
    existing = next(folder for folder in (directory, *directory.absolute().parents) if os.path.isdir(folder))
    try:
        limit = os.pathconf(existing, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # a system, or a file system, that does not say
        return
    for name in names:
        if (length := len(os.fsencode(name))) > limit:
            raise ResourceError(
                f"The results cannot be written to {directory}: the name {shown(name)} is too long, {length} bytes of "
                f"{limit} that it may have; {_ADVICE[errno.ENAMETOOLONG]}."
            )


def _sidecar_last(names: Iterable[Path]) -> list[Path]:
    """Where the sidecar is, the result is whole."""
    return sorted(names, key=lambda path: path.name.endswith(SIDECAR))


def _write_together(directory: Path, planned: dict[Path, Part]) -> None:
    staged: list[tuple[Path, Path]] = []
    placed: list[tuple[Path, Path | None]] = []  # a final name, and where the file lies that it had before
    new_folders = [folder for folder in (directory, *directory.parents) if not os.path.exists(folder)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for final in _sidecar_last(planned):
            # shorter than the final name, which may be as long as names can be
            staged.append((_hidden(final), final))
            with open(staged[-1][0], "wb") as stream:
                planned[final](stream)
        for temporary, final in staged:
            placed.append((final, _backup(final)))
            os.replace(temporary, final)
    except BaseException as error:  # Ctrl-C too must leave nothing behind
        for final, before in placed:
            _quietly(partial(os.replace, before, final) if before else final.unlink)
        for temporary, _ in staged:
            _quietly(temporary.unlink)
        for folder in new_folders:
            _quietly(folder.rmdir)
        if isinstance(error, OSError):
            raise ResourceError(
                f"The results cannot be written to {directory}: {error.strerror or error}. "
                f"Nothing of them was left there; {_ADVICE.get(error.errno or 0, 'choose another folder')}."
            ) from error
        raise
    for _, before in placed:
        if before:
            _quietly(before.unlink)


def _hidden(final: Path) -> Path:
    return final.with_name(f".{secrets.token_hex(6)}")


def _backup(final: Path) -> Path | None:
    """A second name of the file that is about to be replaced; None where there is none. Raises OSError."""
    if not os.path.lexists(final):
        return None
    if final.is_dir() and not final.is_symlink():
        raise IsADirectoryError(errno.EISDIR, f"{final.name} is a folder")
    backup = _hidden(final)
    try:
        os.link(final, backup, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without links
        os.replace(final, backup)
    return backup


def _quietly(action: Callable[[], object]) -> None:
    try:
        action()
    except OSError:
        return
