"""Which bundles passed `densegeo verify` on this machine, by backend: a small file each among the user's state."""

from __future__ import annotations

import hashlib
from pathlib import Path

from densegeo.runtime import state
from densegeo.runtime.bundle import MANIFEST


def is_verified(bundle: Path, backend: str) -> bool:
    """Whether this very bundle passed with this backend on this machine."""
    marker = _marker(bundle, backend)
    return marker is not None and marker.is_file()


def mark_verified(bundle: Path, backend: str) -> None:
    """Remember that it passed. A state directory that cannot be written is no error: nothing is remembered then."""
    marker = _marker(bundle, backend)
    try:
        if marker is not None:
            marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            marker.write_text(f"{bundle.resolve()} {backend}\n")
    except OSError:
        pass


def forget(bundle: Path, backend: str) -> None:
    """A bundle that failed is not verified any more."""
    marker = _marker(bundle, backend)
    try:
        if marker is not None:
            marker.unlink(missing_ok=True)
    except OSError:
        pass


def all_verified() -> list[tuple[Path, str]]:
    """(bundle, backend) of what passed on this machine and is still the same bundle."""
    found = set()
    for marker in state.folder("verified").glob("*"):
        try:
            path, _, backend = marker.read_text().strip().rpartition(" ")
        except (OSError, UnicodeDecodeError):
            continue
        if path and _marker(Path(path), backend) == marker:
            found.add((Path(path), backend))
    return sorted(found)


def _marker(bundle: Path, backend: str) -> Path | None:
    """The file for a bundle's manifest (which holds every file's digest), a backend, this machine and its driver."""
    try:
        manifest = (bundle / MANIFEST).read_bytes()
    except OSError:
        return None
    key = hashlib.sha256(manifest)
    key.update(f"{backend}|{state.machine()}".encode())
    return state.folder("verified") / key.hexdigest()
