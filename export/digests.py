"""SHA-256 of input files, remembered: a checkpoint of 25 GB is read once to know it, and not for every build.

A file is known by its path, size, times, inode and device, as they were before and after it was read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from densegeo.files import atomic_write, cache_directory, read_record
from densegeo.runtime.bundle import Source, sha256_file

if TYPE_CHECKING:  # it needs torch, and fetching does not
    from densegeo.models.loading import Files

FILE = "digests.json"
MOST = 256  # files that are remembered; the oldest are forgotten
SETTLED_NS = 2_000_000_000  # file systems count time in steps of up to 2 s: a later change must show
Progress = Callable[[int], object]


class RecordedDigest(msgspec.Struct, frozen=True):
    """A file as it was found, and what was read."""

    facts: tuple[int, ...]  # see `_file_status`
    sha256: str


def inputs(files: Files, origins: Mapping[str, str], progress: Progress = lambda count: None) -> list[Source]:
    """Size and SHA-256 of every input file, of shards each. `progress` gets the number of bytes each time."""
    from densegeo.models.weight_file import parts

    sources = []
    for role, path in files.paths.items():
        for part in parts(path):
            origin = origins[role] if part == path else _beside(origins[role], path.name, part.name)
            name = role if part == path else f"{role} {part.name}"
            sources.append(Source(name, origin, part.stat().st_size, sha256(part, progress)))
    return sources


def _beside(origin: str, index: str, shard: str) -> str:
    """Where a shard came from, of an index that came from `origin`."""
    return origin.removesuffix(index) + shard if origin.endswith(index) else f"{origin}: {shard}"


def sha256(path: Path, progress: Progress = lambda count: None) -> str:
    """The file's SHA-256, read only when it is not known or has changed since."""
    path = path.resolve()
    before = path.stat()
    recorded = _load().get(str(path))
    if recorded is not None and recorded.facts == _file_status(before):
        progress(before.st_size)
        return recorded.sha256
    digest = sha256_file(path, progress)
    after = path.stat()
    age_ns = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns)
    if _file_status(before) == _file_status(after) and age_ns > SETTLED_NS:
        remember(path, digest)
    return digest


def remember(path: Path, digest: str) -> None:
    """Note the digest of a file as it is now. Nothing is noted where the cache cannot be written."""
    path = path.resolve()
    entries = _load()
    entries.pop(str(path), None)
    entries[str(path)] = RecordedDigest(_file_status(path.stat()), digest)  # the newest last
    newest = dict(list(entries.items())[-MOST:])
    try:
        with atomic_write(cache_directory() / FILE) as partial:
            partial.write_bytes(msgspec.json.encode(newest))
    except OSError:
        return


def _load() -> dict[str, RecordedDigest]:
    """What is remembered; nothing where the file is missing or damaged."""
    try:
        return read_record(cache_directory() / FILE, dict[str, RecordedDigest]) or {}
    except OSError:  # there can be no cache
        return {}


def _file_status(status: os.stat_result) -> tuple[int, ...]:
    """What changes with a file's content. The change time cannot be set back as the modification time can."""
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
