"""Results of many images in one file: parquet, or WebDataset's tar. Each holds the files that a tree would.

parquet: a row an image, with columns `name`, `source` (its path) and one a file (`geometry.json`, `geometry.npz` ...),
null where a result has none. webdataset: members KEY.FILE, the key being the name, in whose last part dots are written
as %2E (and % as %25), because a key ends at the first dot.

A shard is named after the images that it was made for, so that whoever makes it again replaces it, and it appears whole
or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from densegeo.errors import ResourceError
from densegeo.files import atomic_write
from densegeo.formats import RESULTS, SIDECAR
from densegeo.inputs import Input
from densegeo.records import Results, State

Sample = Mapping[str, bytes]  # file name, as of a tree without the stem -> content


@dataclass(frozen=True)
class Container:
    """write: samples and sources' paths, by name, to a file. read: (name, geometry.json, names of files) of each."""

    name: str
    suffix: str
    write: Callable[[Path, Mapping[str, Sample], Mapping[str, str]], None]
    read: Callable[[Path], Iterator[tuple[str, bytes, frozenset[str]]]]


def _write_parquet(path: Path, samples: Mapping[str, Sample], sources: Mapping[str, str]) -> None:
    import pyarrow
    import pyarrow.parquet

    files = dict.fromkeys(file for sample in samples.values() for file in sample)
    columns: dict[str, Any] = {"name": [*samples], "source": [sources[name] for name in samples]}
    columns |= {file: [sample.get(file) for sample in samples.values()] for file in files}
    types = {"name": pyarrow.string(), "source": pyarrow.string(), SIDECAR: pyarrow.string()}
    arrays = {name: pyarrow.array(values, types.get(name, pyarrow.binary())) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), path, compression="none")  # images and npz are packed already


def _read_parquet(path: Path) -> Iterator[tuple[str, bytes, frozenset[str]]]:
    import pyarrow.parquet

    names = frozenset(pyarrow.parquet.read_schema(path).names) - {"name", "source"}
    rows = pyarrow.parquet.read_table(path, columns=["name", SIDECAR]).to_pylist()
    for row in rows:
        yield row["name"], row[SIDECAR].encode(), names


def _write_tar(path: Path, samples: Mapping[str, Sample], sources: Mapping[str, str]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, sample in samples.items():
            for file, content in sample.items():
                member = tarfile.TarInfo(f"{key_of(name)}.{file}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _read_tar(path: Path) -> Iterator[tuple[str, bytes, frozenset[str]]]:
    files: dict[str, set[str]] = {}
    sidecars: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            folder, mark, last = member.name.rpartition("/")
            stem, _, file = last.partition(".")
            name = folder + mark + unquote(stem)
            files.setdefault(name, set()).add(file)
            if file == SIDECAR and (stream := archive.extractfile(member)) is not None:
                sidecars[name] = stream.read()
    for name, content in sidecars.items():
        yield name, content, frozenset(files[name])


def key_of(name: str) -> str:
    """A result's name as the key of a WebDataset."""
    folder, mark, last = name.rpartition("/")
    return folder + mark + last.replace("%", "%25").replace(".", "%2E")


CONTAINERS = {
    row.name: row
    for row in (
        Container("parquet", "parquet", _write_parquet, _read_parquet),
        Container("webdataset", "tar", _write_tar, _read_tar),
    )
}


class Shards(Results):
    """The output folder with shards in it: which results they hold."""

    def __init__(self, folder: Path, maker: Mapping[str, Any], container: Container) -> None:
        super().__init__(folder, maker)
        self._container = container
        # name -> shard, geometry.json, files
        self._shard_entries: dict[str, tuple[str, bytes, frozenset[str]]] | None = None

    def shard(self, items: Sequence[Input]) -> Path:
        """Where the results of these images go together."""
        digest = hashlib.sha256("\0".join(item.name for item in items).encode()).hexdigest()[:16]
        return self.folder / f"{digest}.{self._container.suffix}"

    def write(self, items: Sequence[Input], samples: Mapping[str, Sample]) -> str:
        """One shard with the results of those of the images that have one; its name. Raises OSError."""
        path = self.shard(items)
        with atomic_write(path) as partial:
            self._container.write(partial, samples, {item.name: item.path for item in items})
        return path.name

    def state(self, item: Input) -> State:
        """As of a tree; what is stale cannot be replaced in a shard, so that it is another's."""
        state = super().state(item)
        return "foreign" if state == "stale" else state

    def existing(self, item: Input) -> list[str]:
        entry = self._entries().get(item.name)
        return [] if entry is None else [entry[0]]

    def _sidecar(self, item: Input) -> Any:
        entry = self._entries().get(item.name)
        return None if entry is None else json.loads(entry[1])

    def _complete(self, item: Input) -> bool:
        _, _, files = self._entries()[item.name]
        return all(any(file in files for file in RESULTS[name].files) for name in self.maker["formats"])

    def _entries(self) -> dict[str, tuple[str, bytes, frozenset[str]]]:
        """What lay in the folder when it was first asked about. Raises ResourceError for a damaged shard."""
        if self._shard_entries is None:
            self._shard_entries = {}
            for path in sorted(self.folder.glob(f"[!.]*.{self._container.suffix}")):
                try:
                    for name, sidecar, files in self._container.read(path):
                        self._shard_entries[name] = path.name, sidecar, files
                except (OSError, ValueError, KeyError, tarfile.TarError) as error:
                    raise ResourceError(f"{path} is no shard of results, or damaged: {error}. Remove it.") from error
        return self._shard_entries
