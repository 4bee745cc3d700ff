"""What is finished of a build, kept in its staging folder: an interrupted build goes on after its last whole stage.

Each stage leaves a record when its files are written, with their digests. A record of another key, a damaged one, and
one whose files are not what they were count for nothing, and neither does what was built on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from safetensors import SafetensorError

from densegeo.errors import DensegeoError, ResourceError
from densegeo.export.keys import StageKeys
from densegeo.export.staging import BUNDLE, RECORDS, clear
from densegeo.files import atomic_write
from densegeo.kernels.contract import LaunchContract
from densegeo.runtime.bundle import MANIFEST, Bucket, Check, Engine, FileDigest, Record, sha256_file

Progress = Callable[[int], object]
Bounds = dict[str, dict[str, float]]  # size, as "1024x768" -> output -> what a graph's may be off


class StageRecord(Record, frozen=True, kw_only=True):
    """What every stage keeps."""

    key: str
    seconds: float  # that it took, in all builds that worked on it
    files: dict[str, FileDigest]  # in the bundle


class References(StageRecord, frozen=True, kw_only=True):
    bounds: Bounds  # of plain low precision; none where weights are 8-bit


class Weights(StageRecord, frozen=True, kw_only=True):
    bounds: Bounds  # what the graphs are held to


class Graphs(StageRecord, frozen=True, kw_only=True):
    buckets: list[Bucket]
    checks: list[Check]


class Kernels(StageRecord, frozen=True, kw_only=True):
    contracts: list[LaunchContract]


class Engines(StageRecord, frozen=True, kw_only=True):
    """The only stage that is recorded piece by piece: engine by engine."""

    engines: list[Engine]


class Sealed(msgspec.Struct, frozen=True):
    """A record as it lies in its file; a damaged one is known."""

    sha256: str
    record: msgspec.Raw


AnyRecord = TypeVar("AnyRecord", bound=StageRecord)


class State:
    """The records in a staging folder."""

    def __init__(self, folder: Path, keys: StageKeys, progress: Progress = lambda count: None) -> None:
        """Take over what fits the keys, and remove everything else. `progress` gets the bytes of files checked."""
        self.folder, self.bundle, self.keys = folder, folder / BUNDLE, keys
        self.references = self._read(References, keys.references, progress)
        self.weights = self._read(Weights, keys.weights, progress) if self.references else None
        self.graphs = self._read(Graphs, keys.graphs, progress) if self.weights else None
        self.kernels = self._read(Kernels, keys.kernels, progress) if self.graphs else None
        self.engines = self._read(Engines, keys.engines, progress) if self.graphs else None
        self.prune()
        self.bundle.mkdir(exist_ok=True)

    @property
    def records(self) -> list[StageRecord]:
        """Of the finished stages."""
        stages = (self.references, self.weights, self.graphs, self.kernels, self.engines)
        return [record for record in stages if record is not None]

    @property
    def files(self) -> dict[str, FileDigest]:
        """Every file that a finished stage left in the bundle, by name."""
        files = {name: file for record in self.records for name, file in record.files.items()}
        return dict(sorted(files.items()))

    @property
    def finished(self) -> list[str]:
        """The stages' names."""
        return [_name(type(record)) for record in self.records]

    def describe(self, paths: Iterable[Path], progress: Progress = lambda count: None) -> dict[str, FileDigest]:
        """Sizes and digests of files in the bundle, by their names there. `progress` gets the bytes read."""
        return {
            path.relative_to(self.bundle).as_posix(): FileDigest(path.stat().st_size, sha256_file(path, progress))
            for path in sorted(paths)
        }

    def keep(self, record: AnyRecord) -> AnyRecord:
        """From now on the stage is finished; its files must be whole."""
        name = _name(type(record))
        with atomic_write(self.folder / f"{name}.json") as partial:
            encoded = msgspec.json.encode(record)
            partial.write_bytes(msgspec.json.encode(Sealed(_sha256(encoded), msgspec.Raw(encoded))))
        setattr(self, name, record)
        return record

    def prune(self) -> None:
        """Remove what belongs to no finished stage."""
        records = {self.folder / f"{name}.json" for name in self.finished}
        clear(self.folder, keep=records | {self.bundle / name for name in self.files})

    def forget(self) -> None:
        """Nothing is finished: the folder goes when its lock does."""
        for record in self.folder.glob(RECORDS):
            record.unlink()
        self.references = self.weights = self.graphs = self.kernels = self.engines = None

    @contextmanager
    def resumable(self, say: Callable[[str], object]) -> Iterator[None]:
        """Decide what stays when the block is left by an exception.

        An interruption leaves the finished stages, and so does an error after the graphs: other options for kernels and
        engines go on from there. Any other error leaves nothing.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            if not (self.bundle / MANIFEST).is_file():  # else it is whole: `staging.finish_publishing` goes on
                self.prune()
            if self.records:
                say(self._hint())
            raise
        except DensegeoError as error:
            if self.graphs is None:
                self.forget()
                raise
            self.prune()
            raise type(error)(f"{error}\n{self._hint()}") from error
        except (OSError, SafetensorError) as error:  # safetensors reports a failed write as its own error
            self.forget()
            raise ResourceError(f"cannot write the bundle: {error}. Nothing is left behind.") from error
        except BaseException:
            self.forget()
            raise

    def _hint(self) -> str:
        finished = ", ".join(map(_in_words, self.records))
        return f"Finished: {finished}. The same command goes on from there; to give up, delete {self.folder}."

    def _read(self, kind: type[AnyRecord], key: str, progress: Progress) -> AnyRecord | None:
        """A stage's record, if it has this key and its files are still what it says."""
        try:
            sealed = msgspec.json.decode((self.folder / f"{_name(kind)}.json").read_bytes(), type=Sealed)
            if _sha256(bytes(sealed.record)) != sealed.sha256:
                return None
            record = msgspec.json.decode(sealed.record, type=kind)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        if record.key != key:
            return None
        intact = {name: file for name, file in record.files.items() if self._is_whole(name, file, progress)}
        if isinstance(record, Engines):  # each for itself
            engines = [engine for engine in record.engines if {engine.file, engine.log} <= intact.keys()]
            names = {name for engine in engines for name in (engine.file, engine.log)}
            return msgspec.structs.replace(
                record, engines=engines, files={name: intact[name] for name in sorted(names)}
            )
        return record if len(intact) == len(record.files) else None

    def _is_whole(self, name: str, expected: FileDigest, progress: Progress) -> bool:
        path = self.bundle / name
        try:
            return path.stat().st_size == expected.bytes and sha256_file(path, progress) == expected.sha256
        except OSError:
            return False


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _in_words(record: StageRecord) -> str:
    """A stage's name; of engines, which count one by one, how many."""
    if not isinstance(record, Engines):
        return _name(type(record))
    return f"{len(record.engines)} engine" + ("s" if len(record.engines) != 1 else "")


def _name(kind: type[StageRecord]) -> str:
    return kind.__name__.lower()
