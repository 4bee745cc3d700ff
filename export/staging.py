"""A bundle is built in a hidden folder beside it and put in place by renaming: whole, or not there.

The folder `.NAME.building` has a fixed name, so that an interrupted build is found again (see `export.state`). A lock
keeps a second build of the same output out of it. It holds `bundle/`, what will be renamed, and the stages' records.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from densegeo.errors import ResourceError
from densegeo.files import existing_parent
from densegeo.runtime.bundle import MANIFEST

LOCK = ".densegeo-build"  # by this file the folder is known as ours
BUNDLE = "bundle"
RECORDS = "*.json"


def staging_folder(output: Path) -> Path:
    """Where `output` is built."""
    output = output.absolute()
    return output.with_name(f".{output.name}.building")


@contextmanager
def locked(output: Path) -> Iterator[Path]:
    """The staging folder of `output`, for this process alone; it is made when it is not there.

    It is removed when the block ends, unless it holds the record of a finished stage. Raises ResourceError when
    another build has it, or something else is in its place or in that of `output`.
    """
    if output.exists() and not (output.is_dir() and ((output / MANIFEST).is_file() or not any(output.iterdir()))):
        raise ResourceError(f"{output} exists and is no bundle: it is left alone. Choose another --output.")
    folder = staging_folder(output)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _open_locked(folder, output)
    except OSError as error:
        raise ResourceError(f"cannot write to {existing_parent(output)}: {error}") from error
    try:
        yield folder
    finally:
        _release(folder, lock)


def remove_published(output: Path) -> None:
    """Remove what a build left that was killed after its bundle was in place; an interrupted build is kept."""
    folder = staging_folder(output)
    if folder.is_dir() and not (folder / BUNDLE).exists():
        with suppress(ResourceError), locked(output):
            for record in folder.glob(RECORDS):
                record.unlink()


def folder_bytes(folder: Path) -> int:
    """What the files in a folder take up."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def clear(folder: Path, keep: set[Path]) -> None:
    """Remove everything in the staging folder but its lock, the files in `keep` and the folders that hold those."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path in keep or path == folder / LOCK:
            continue
        with suppress(OSError):  # of folders that are not empty, and of files that vanished
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()


def publish(staging: Path, output: Path) -> None:
    """Put the finished bundle in place by renaming; an older one there is replaced."""
    bundle = staging / BUNDLE
    bundle.chmod(0o755)
    for path in bundle.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if not output.exists():
        bundle.rename(output)
        return
    old = staging / "replaced"
    output.rename(old)
    try:
        bundle.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old) if not old.is_symlink() else old.unlink()


def _open_locked(folder: Path, output: Path) -> BinaryIO:
    """The folder's open and locked lock file. Raises ResourceError and OSError."""
    while True:
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            _require_ours(folder)
        try:
            file = open(folder / LOCK, "ab")  # noqa: SIM115  (open while the lock is held)
        except FileNotFoundError:  # another build has just ended and removed the folder
            continue
        try:
            _lock(file)
            if _same(file, folder / LOCK):
                return file
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise ResourceError(
                f"another build of {output} is running (its files lie in {folder}): wait until it has ended, or "
                "choose another --output"
            ) from error
        except OSError:  # file systems without locks
            file.close()
            raise
        file.close()


def _release(folder: Path, lock: BinaryIO) -> None:
    """Remove the folder unless a stage is finished, the lock last: who waits for it must not find half a folder."""
    finished = any(folder.glob(RECORDS))
    if not finished:
        clear(folder, keep=set())
    if not finished and sys.platform != "win32":
        (folder / LOCK).unlink(missing_ok=True)
    lock.close()
    if not finished:
        with suppress(OSError):  # another build may have begun
            if sys.platform == "win32":  # open files cannot be removed there
                (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _require_ours(folder: Path) -> None:
    """Raise ResourceError for anything but a folder that a build of this user made."""
    try:
        status = folder.lstat()
        names = os.listdir(folder) if stat.S_ISDIR(status.st_mode) else None
    except FileNotFoundError:
        return
    foreign = hasattr(os, "geteuid") and status.st_uid != os.geteuid()
    if names is None or foreign or (names and LOCK not in names):
        raise ResourceError(
            f"{folder}, where this bundle would be built, exists and is not of a build of yours: it is left alone. "
            "Move it away or choose another --output."
        )


def _lock(file: BinaryIO) -> None:
    """Raises BlockingIOError or PermissionError when another process has it; the system frees it when that ends."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _same(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one at `path`, and was not removed before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
