"""What was compiled or measured on this machine, kept in the user's cache for the next process."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from densegeo.errors import EngineError
from densegeo.files import atomic_write, cache_directory
from densegeo.runtime import state
from densegeo.runtime.engines import check_owner

log = logging.getLogger("densegeo")
_DIGEST = hashlib.sha256().digest_size
_reported = set[Path]()  # folders of which was said that they are not trusted


def kept_at(kind: str, *key_parts: str) -> Path | None:
    """The path for what depends on these texts and this machine alone; None where there can be no cache.

    kind: the folder in the cache, which is made, for this user alone.
    """
    try:
        folder = cache_directory() / kind
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    return folder / hashlib.sha256("\n".join([*key_parts, state.machine()]).encode()).hexdigest()


def read_kept(path: Path | None) -> bytes | None:
    """What `keep` wrote, or None where it is damaged, or not this user's alone: what was compiled runs as code."""
    if path is None or not path.is_file():
        return None
    try:
        check_owner(path)
        stored = path.read_bytes()
    except EngineError as error:
        if path.parent not in _reported:
            _reported.add(path.parent)
            log.warning("what is kept from before is not used, and is made again: %s", error)
        return None
    except OSError as error:
        log.info("what is kept is not read: %s", error)
        return None
    digest, content = stored[:_DIGEST], stored[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        log.info("%s is damaged and is made again", path)
        return None
    return content


def keep(path: Path | None, content: bytes) -> None:
    """Write the file, whole or not at all, behind its SHA-256; a cache that cannot be written is no error."""
    if path is None:
        return
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(hashlib.sha256(content).digest() + content)
            partial.chmod(0o600)  # whatever the umask is, or it would not be read again
    except OSError as error:
        log.info("%s is not kept: %s", path, error)


def keep_within(folder: Path, capacity: int) -> None:
    """Remove the files that were used longest ago until the folder holds at most `capacity` bytes."""
    try:
        files = [(path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir()]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= capacity:
                return
            path.unlink(missing_ok=True)
            total -= size
    except OSError as error:
        log.info("%s is not tidied: %s", folder, error)
