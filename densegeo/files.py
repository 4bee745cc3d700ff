"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

Record = TypeVar("Record")


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """What JSON of our own holds; None where it is not there, damaged, or of another kind."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`, of the same suffix, to write to; it takes the place of `path` when the block ends.

    When the block raises, the partial file is removed and `path` stays as it was. Folders are made as needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(6)}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to fill; it becomes `path` when the block ends, which must not be there then.

    When the block raises, the folder is removed, and the parent with it where that was made. Raises OSError.
    """
    parent_is_new = not path.parent.exists()
    partial = path.with_name(f".{secrets.token_hex(6)}.{path.name}")
    partial.mkdir(parents=True)
    try:
        yield partial
        put_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if parent_is_new:
            shutil.rmtree(path.parent, ignore_errors=True)
        raise


def put_folder(folder: Path, path: Path, aside: Path | None = None) -> None:
    """Rename a folder to `path`. aside: where one that is there already waits until the new one is in place, and is
    removed then; it comes back when that fails. Raises OSError, also for one that is there where nothing is said.
    """
    if aside is None or not path.exists():
        folder.rename(path)
        return
    path.rename(aside)
    try:
        folder.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside)


def require_writable(path: Path) -> None:
    """A file of this name can be written with `atomic_write`, as far as can be told before. Raises OSError."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = path.parent.resolve()
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def existing_parent(path: Path) -> Path:
    """The nearest ancestor that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path if path.is_dir() else path.parent


def cache_directory() -> Path:
    """densegeo's folder in the user's cache (XDG_CACHE_HOME), mode 0700. Raises OSError where it cannot be made."""
    root = os.environ.get("XDG_CACHE_HOME")
    path = (Path(root) if root else Path.home() / ".cache") / "densegeo"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def readable_by_others(path: Path) -> str | None:
    """Why others than this user and root can read a file that is secret, and what to do; None where they cannot.

    A group that may read counts as others unless it is the user's own primary group. Raises OSError.
    """
    if not hasattr(os, "geteuid"):
        return None
    status = path.stat()
    if status.st_mode & stat.S_IROTH or (status.st_mode & stat.S_IRGRP and status.st_gid != os.getegid()):
        return f"can be read by others (mode {stat.S_IMODE(status.st_mode):o}): say `chmod 600 {path}`"
    return None


def writable_by_others(path: Path) -> str | None:
    """Why others than this user and root can write a file or directory, and what to do; None where they cannot.

    A group that may write counts as others unless it is the user's own primary group. Raises OSError.
    """
    if not hasattr(os, "geteuid"):
        return None  # no such owners on this system
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (uid {status.st_uid}): copy the bundle"
    if status.st_mode & stat.S_IWOTH:
        return f"can be written by everybody: say `chmod -R o-w {path}`"
    if status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid():
        return f"can be written by a group (gid {status.st_gid}): say `chmod -R g-w {path}`"
    return None
