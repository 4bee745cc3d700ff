"""A bundle is built in a hidden folder beside it and put in place by renaming: whole, or not there. Where no folder can
be renamed over the output (a link's target, a mount point), it is built in a hidden folder inside, and its files are
moved, the manifest last: until then the output is no bundle.

The folder (`.NAME.building`, or `.building` inside) has a fixed name, so that an interrupted build is found again (see
`export.build_state`). A lock keeps a second build of the same output out of it. It holds `bundle/`, what is put in
place, and the stages' records.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from densegeo.errors import BundleError, ResourceError
from densegeo.files import existing_parent, put_folder
from densegeo.runtime.bundle import MANIFEST, read_manifest, stays_inside

LOCK = ".densegeo-build"  # by this file the folder is known as ours
BUNDLE = "bundle"
RECORDS = "*.json"


def staging_folder(output: Path) -> Path:
    """Where `output` is built."""
    output = output.absolute()
    if fills_in_place(output):
        return output.resolve() / ".building"
    return output.with_name(f".{output.name}.building")


def fills_in_place(output: Path) -> bool:
    """Whether nothing can be renamed over `output`: a link, whose target it is, a mount point, the working directory,
    or a folder in one that cannot be written. Then files are moved into it one by one.
    """
    if output.is_symlink():
        return True
    if not output.is_dir():
        return False
    return _is_mount(output) or output.resolve() == Path.cwd() or not os.access(output.absolute().parent, os.W_OK)


def _is_mount(folder: Path) -> bool:
    """Bind mounts of the same file system are known by the system's list alone."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    points = (re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split()[4]) for line in lines)
    return str(folder.resolve()) in points


def check_output(output: Path) -> None:
    """Raises ResourceError where something else than a bundle is in the place of `output`."""
    if output.exists() and not (output.is_dir() and _may_be_filled(output, staging_folder(output))):
        raise ResourceError(f"{output} exists and is no bundle: it is left alone. Choose another --output.")


@contextmanager
def locked(output: Path) -> Iterator[Path]:
    """The staging folder of `output`, for this process alone; it is made when it is not there.

    It is removed when the block ends, unless it holds the record of a finished stage. Raises ResourceError when
    another build has it, or something else is in its place or in that of `output`.
    """
    folder = staging_folder(output)
    check_output(output)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _open_locked(folder, output)
    except OSError as error:
        raise ResourceError(f"cannot write to {existing_parent(output)}: {error}") from error
    try:
        yield folder
    finally:
        _release(folder, lock)


def _may_be_filled(output: Path, folder: Path) -> bool:
    """Whether a folder is a bundle, empty, or one that a build of ours was killed in."""
    if (output / MANIFEST).is_file() or (folder.parent == output.resolve() and (folder / LOCK).is_file()):
        return True
    return all(entry.name == "lost+found" for entry in output.iterdir())


def remove_published(output: Path) -> None:
    """Remove what a build left that was killed after its bundle was in place; an interrupted build is kept."""
    folder = staging_folder(output)
    if folder.is_dir() and not (folder / BUNDLE).exists():
        with suppress(ResourceError), locked(output):
            for record in folder.glob(RECORDS):
                record.unlink()


def finish_publishing(output: Path) -> None:
    """Go on where a build was killed while it moved its files into place. Raises ResourceError."""
    folder = staging_folder(output)
    if fills_in_place(output) and (folder / BUNDLE / MANIFEST).is_file():
        with locked(output):
            publish(folder, output)


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
    """Put the finished bundle in place, by renaming where that can be; an older one there is replaced."""
    bundle = staging / BUNDLE
    bundle.chmod(0o755)
    for path in bundle.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if fills_in_place(output):
        try:
            _fill(bundle, output.resolve(), staging / "replaced.json")
        except OSError as error:
            raise ResourceError(f"cannot move the bundle's files into {output}: {error}") from error
        return
    put_folder(bundle, output, aside=staging / "replaced")


def _fill(bundle: Path, output: Path, old: Path) -> None:
    """Move a bundle's files into a folder: its old manifest away first, the new one in at last.

    In between it is no bundle, and what is not moved yet lies in `bundle`, from where `finish_publishing` goes on.
    old: where the old manifest waits.
    """
    if (output / MANIFEST).is_file():
        os.replace(output / MANIFEST, old)
    new = sorted(path.relative_to(bundle) for path in bundle.rglob("*") if path.is_file())
    for name in new:
        if name.as_posix() != MANIFEST:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(bundle / name, output / name)
    current_files = set(read_manifest(bundle).files)
    with suppress(OSError, BundleError, ValueError):  # one that cannot be read names nothing to remove
        for stale in set(json.loads(old.read_bytes())["files"]) - current_files:
            if stays_inside(stale):
                (output / stale).unlink(missing_ok=True)
                with suppress(OSError):  # of folders that hold more
                    (output / stale).parent.rmdir()
    os.replace(bundle / MANIFEST, output / MANIFEST)
    old.unlink(missing_ok=True)
    shutil.rmtree(bundle)


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
            if _is_still_at(file, folder / LOCK):
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


def _is_still_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one at `path`, and was not removed before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
