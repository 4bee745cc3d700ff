"""What a folder of results says about itself: each result's source in its geometry.json, and all in results.jsonl.

Where a geometry.json is, its result is whole: it is the last file that a result gets. In results.jsonl the last line of
a name counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from densegeo import remote
from densegeo.errors import ResourceError
from densegeo.formats import RESULT_ENDINGS, RESULTS, SIDE_BY_SIDE, SIDECAR
from densegeo.inputs import Input, is_stream
from densegeo.runtime.bundle import MANIFEST, Manifest, sha256_file

JOURNAL = "results.jsonl"
# Of an image's result: none; all formats, of this image by this bundle with these options; the same, but incomplete or
# of another content of the file; of another file, by another bundle or with other options.
# "unreadable": its geometry.json is damaged.
State = Literal["absent", "whole", "stale", "foreign", "unreadable"]


def bundle_record(directory: Path, manifest: Manifest) -> dict[str, str]:
    """Which bundle made a result. sha256: of its manifest, which has the digests of all its files."""
    digest = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    path = os.path.abspath(directory)
    return {"path": path, "model": manifest.model, "precision": manifest.precision, "sha256": digest}


def source_record(path: str, maker: Mapping[str, Any], content: bytes | None = None) -> dict[str, Any]:
    """What an image was when it was read, and what made its result: the bundle, options, formats. Raises OSError.

    content: of an image in storage.
    """
    if content is not None:
        return {"path": path, **remote.file_status(path), "sha256": hashlib.sha256(content).hexdigest(), **maker}
    if is_stream(path):
        return {"path": path, **maker}
    status = os.stat(path)
    digest = sha256_file(Path(path))
    return {"path": path, "bytes": status.st_size, "modified_ns": status.st_mtime_ns, "sha256": digest, **maker}


class Results:
    """The output folder: which results are there, and the journal of this run and of those before."""

    def __init__(self, folder: Path, maker: Mapping[str, Any]) -> None:
        """maker: "bundle", "options" and "formats" of this run, as they go into every result's `source`."""
        self.folder, self.maker = folder, maker
        self._listed: dict[Path, frozenset[str]] = {}
        self._journal: Any = None

    def where(self, item: Input) -> tuple[Path, str]:
        """The folder and the stem of an image's results."""
        *parents, stem = item.name.split("/")
        return self.folder.joinpath(*parents), stem

    def existing(self, item: Input) -> list[str]:
        """Names of those of an image's results, in this run's formats, that are there already."""
        folder, stem = self.where(item)
        possible = [file for files in self._expected_files(item) for file in files]
        existing = self._names(folder)
        return [file for file in dict.fromkeys(f"{stem}_{file}" for file in (*possible, SIDECAR)) if file in existing]

    def state(self, item: Input) -> State:
        """What is there of an image's result. An image of the size and time of change that were recorded is taken for
        the same; else its digest decides.
        """
        try:
            sidecar = self._sidecar(item)
        except (OSError, ValueError):
            return "unreadable"
        if sidecar is None:
            return "stale" if self.existing(item) else "absent"
        try:
            record = sidecar["source"]
            same_source = _is_of(record, item.path)
            same_maker = record["bundle"]["sha256"] == self.maker["bundle"]["sha256"]
            same_maker = same_maker and record["options"] == self.maker["options"]
            if not same_maker or not (same_source or record["path"] == item.path):
                return "foreign"
            asked, there = set(self.maker["formats"]), set(record["formats"])
            if same_source and not (asked <= there or there <= asked):
                return "foreign"  # done again, it would lose the formats that are not asked for now
            return "whole" if same_source and asked <= there and self._complete(item) else "stale"
        except (OSError, ValueError, KeyError, TypeError):  # not made by this command
            return "foreign"

    def done_meanwhile(self, item: Input) -> list[str]:
        """Names of a result's files if it is whole now, whatever was there before; else none."""
        folder, stem = self.where(item)
        if not (folder / f"{stem}_{SIDECAR}").exists():
            return []
        current = Results(self.folder, self.maker)
        return current.existing(item) if current.state(item) == "whole" else []

    def refused(self, item: Input) -> int:
        """Frames that were left out of a film that is whole."""
        folder, stem = self.where(item)
        return int(json.loads((folder / f"{stem}_{SIDECAR}").read_bytes()).get("refused", 0)) if item.film else 0

    def clear(self, item: Input, current: Iterable[Path]) -> None:
        """Remove what an earlier result had in other formats, so that all files of a name are of one result."""
        folder, stem = self.where(item)
        names = {f"{stem}_{file}" for file in RESULT_ENDINGS} & self._names(folder)
        for name in names - {path.name for path in current}:
            (folder / name).unlink(missing_ok=True)

    def open_journal(self) -> set[str]:
        """Begin to write; the names that earlier runs finished. Raises ResourceError."""
        path = self.folder / JOURNAL
        done: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            old = path.read_bytes() if path.exists() else b""
            for line in old.splitlines():
                try:
                    record = json.loads(line)
                    (done.add if record["status"] == "done" else done.discard)(record["name"])
                except (ValueError, KeyError, TypeError):  # cut off by a crash
                    continue
            self._journal = open(path, "ab")  # noqa: SIM115
            if old and not old.endswith(b"\n"):
                self._journal.write(b"\n")
        except OSError as error:
            raise ResourceError(f"Cannot write to {self.folder}: {error.strerror or error}.") from error
        return done

    def note(self, item: Input, status: str, **fields: Any) -> None:
        """One more line of the journal. Raises OSError."""
        line = json.dumps({"name": item.name, "status": status, "source": item.path, **fields})
        self._journal.write(line.encode() + b"\n")
        self._journal.flush()

    def close(self) -> None:
        """End the journal."""
        if self._journal is not None:
            self._journal.close()

    def _sidecar(self, item: Input) -> Any:
        """The result's geometry.json, or None where there is none. Raises OSError, ValueError."""
        folder, stem = self.where(item)
        name = f"{stem}_{SIDECAR}"
        return json.loads((folder / name).read_bytes()) if name in self._names(folder) else None

    def _complete(self, item: Input) -> bool:
        """Whether all formats of this run are there."""
        folder, stem = self.where(item)
        existing = self._names(folder)
        return all(any(f"{stem}_{file}" in existing for file in group) for group in self._expected_files(item))

    def _expected_files(self, item: Input) -> list[Sequence[str]]:
        """Groups of files, of each of which a whole result has some."""
        return [(SIDE_BY_SIDE,)] if item.film else [[*RESULTS[name].files] for name in self.maker["formats"]]

    def _names(self, folder: Path) -> frozenset[str]:
        """What lay in a folder when it was first asked about."""
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._listed[folder] = frozenset()
        return self._listed[folder]


def _is_of(record: Mapping[str, Any], path: str) -> bool:
    """Whether a result is of a file as it is now: of equal size and time of change, or else of equal content."""
    if remote.is_remote(path):
        current = {"path": path, **remote.file_status(path)}
        unchanged = all(record[name] == value for name, value in current.items())
        return unchanged or bool(record["sha256"] == hashlib.sha256(remote.read(path)).hexdigest())
    status = os.stat(path)
    current = {"path": path, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    unchanged = all(record[name] == value for name, value in current.items())
    return unchanged or bool(record["sha256"] == sha256_file(Path(path)))
