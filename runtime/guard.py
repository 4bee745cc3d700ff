"""What an open estimator depends on and may lose: the process that it was made in, and its bundle's files.

A fork copies a process without its threads: whatever waits for one, or for a lock that one held, waits for ever. So
what was made before a fork is refused in the child; and nothing of it is taken down there, because libraries wait for
their threads even then.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from densegeo.errors import BackendError, BundleError


class Process:
    """The process that something was made in."""

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_here(self) -> bool:
        return os.getpid() == self._id

    def require(self) -> None:
        """Raise BackendError in any other process."""
        if not self.is_here:
            raise BackendError(
                "This estimator was made before a fork, and its threads and its libraries' locks stayed in the parent. "
                "Make it in the child (with a DataLoader: at the first use in a worker), or start processes by "
                '"spawn" (multiprocessing_context="spawn"), which opens it anew by itself.'
            )


class Original:
    """A bundle as it was when it was opened, known by its manifest, which holds every file's digest."""

    def __init__(self, manifest: Path) -> None:
        """A manifest that is not there is for who reads it to refuse."""
        self._manifest, self._content = manifest, b""
        self._file_status: tuple[int, ...] = ()
        with suppress(OSError):
            self._file_status, self._content = _file_status(manifest), manifest.read_bytes()

    def require(self, *, needed: bool = False) -> None:
        """Raise BundleError when another bundle has taken its place.

        needed: also when it is gone, or is being replaced: its files are needed. Else what is in memory will do.
        """
        try:
            status = _file_status(self._manifest)
            if status == self._file_status:
                return
            unchanged = self._manifest.read_bytes() == self._content
        except OSError as error:
            if needed:
                raise BundleError(
                    f"{self._manifest.parent} is no bundle any more ({error}): make a new Estimator."
                ) from error
            return
        if not unchanged:
            raise BundleError(
                f"{self._manifest.parent} was replaced by another bundle after this estimator opened it: make a new "
                "Estimator. (To change bundles under a running one, give each a directory of its own.)"
            )
        self._file_status = status  # copied again, or touched


_NATIVE: WeakSet[Any] = WeakSet()


def keep_in_children(native: object) -> None:
    """Never take `native` down in forked children: its libraries would wait for threads that are not there."""
    _NATIVE.add(native)


def _in_child() -> None:
    """No work at a child's end: neither Python's, for what is open, nor that of C++ libraries, whose static objects
    wait for threads too (ONNX Runtime's do so for ever).
    """
    if not _NATIVE:
        return
    for native in list(_NATIVE):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))  # for ever
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # glibc's; what is registered last runs first, and gets the exit status
        libc.on_exit(libc._exit, None)
        libc.on_exit(libc.fcloseall, None)  # before it: C's own buffers are written


if hasattr(os, "register_at_fork"):  # systems that fork
    os.register_at_fork(after_in_child=_in_child)


def _file_status(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
