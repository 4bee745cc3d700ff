"""What `densegeo verify` found on this machine, by bundle and backend: a small file each among the user's state."""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path

import msgspec

from densegeo.files import atomic_write, read_record
from densegeo.findings import Finding
from densegeo.runtime import state
from densegeo.runtime.bundle import MANIFEST


def is_verified(bundle: Path, backend: str) -> bool:
    """Whether this very bundle passed with this backend on this machine."""
    finding = _finding(bundle, backend)
    return finding is not None and finding.good


def has_failed(bundle: Path, backend: str) -> bool:
    """Whether this very bundle was verified with this backend on this machine, and did not pass."""
    finding = _finding(bundle, backend)
    return finding is not None and not finding.good


def remember(bundle: Path, backend: str, device: str, wrong: str = "") -> None:
    """Keep what was found, in place of what was found before. wrong: empty where the bundle passed.

    A state directory that cannot be written is no error: then nothing is remembered.
    """
    marker = _marker(bundle, backend)
    when = datetime.now().isoformat(" ", "minutes")
    finding = Finding(str(bundle.resolve()), backend, device, not wrong, wrong, when)
    try:
        if marker is not None:
            marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_write(marker) as partial:
                partial.write_bytes(msgspec.json.encode(finding))
    except OSError:
        pass


def forget(bundle: Path, backend: str) -> None:
    """Nothing is known of a bundle until it is verified again."""
    marker = _marker(bundle, backend)
    try:
        if marker is not None:
            marker.unlink(missing_ok=True)
    except OSError:
        pass


def findings() -> list[Finding]:
    """Of bundles that are still the same ones, on this machine."""
    stored = ((marker, read_record(marker, Finding)) for marker in state.folder("verified").glob("*"))
    current = [
        finding for marker, finding in stored if finding and _marker(Path(finding.bundle), finding.backend) == marker
    ]
    return sorted(current, key=lambda finding: (finding.bundle, finding.backend))


def _finding(bundle: Path, backend: str) -> Finding | None:
    """What was found of this very bundle with this backend on this machine, if anything."""
    marker = _marker(bundle, backend)
    return None if marker is None else read_record(marker, Finding)


def _marker(bundle: Path, backend: str) -> Path | None:
    """The file for a bundle's manifest (which holds every file's digest), a backend, this machine and its driver."""
    try:
        manifest = (bundle / MANIFEST).read_bytes()
    except OSError:
        return None
    key = hashlib.sha256(manifest)
    key.update(f"{backend}|{state.machine()}".encode())
    return state.folder("verified") / key.hexdigest()
