"""Places that hold a checkpoint's files: a directory, the Hub's cache of a repository, or the repository itself."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from densegeo.errors import CheckpointError
from densegeo.models.containers import PICKLES
from densegeo.models.weight_file import is_index, parts, shard_names

REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?(?::(.+))?")  # organisation/name[@revision][:what]
_SHOWN = 12  # names in a message


class Place(Protocol):
    """Names are relative, with slashes."""

    def has(self, name: str) -> bool: ...

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder: names of files, and of folders with a slash at the end."""
        ...

    def get(self, name: str) -> Path:
        """The file on this machine; of an index also its shards. Raises CheckpointError."""
        ...

    def origin(self, name: str) -> str:
        """Where a file comes from, as manifests say it."""
        ...

    def to_fetch(self, name: str) -> int | None:
        """Bytes to download first, 0 where the server does not tell; None for what is here."""
        ...

    def inside(self, folder: str) -> Place:
        """A folder of it as a place of its own."""
        ...

    @property
    def title(self) -> str:
        """What messages call it."""
        ...


class Folder:
    """A directory. origin: what stands in place of its path where a file's origin is told."""

    def __init__(self, root: Path, origin: str = "") -> None:
        self.root, self._origin = root, origin

    @property
    def title(self) -> str:
        return str(self.root)

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def names(self, folder: str = "") -> list[str]:
        try:
            entries = sorted(os.scandir(self.root / folder), key=lambda entry: entry.name)
        except OSError:
            return []
        return [entry.name + ("/" if entry.is_dir() else "") for entry in entries]

    def get(self, name: str) -> Path:
        path = self.root / name
        parts(path)
        return path

    def origin(self, name: str) -> str:
        return self._origin + name if self._origin else str(self.root / name)

    def to_fetch(self, name: str) -> int | None:
        return None

    def inside(self, folder: str) -> Folder:
        return Folder(self.root / folder, f"{self._origin}{folder}/" if self._origin else "")


class Repository:
    """A repository of the Hub at the commit that its revision names now. inside: the folder that is meant."""

    def __init__(self, name: str, revision: str | None, inside: str = "") -> None:
        """Raises CheckpointError where it cannot be reached."""
        from huggingface_hub import HfApi

        self._name, self._inside = name, f"{inside.strip('/')}/" if inside else ""
        address = name + (f"@{revision}" if revision else "")
        with explained(address):
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        self._commit = str(info.sha)
        self._sizes = {
            sibling.rfilename.removeprefix(self._inside): sibling.size or 0
            for sibling in info.siblings or ()
            if sibling.rfilename.startswith(self._inside)
        }

    @property
    def title(self) -> str:
        return f"{self._name}@{self._commit}{':' + self._inside if self._inside else ''}"

    def has(self, name: str) -> bool:
        return name in self._sizes

    def names(self, folder: str = "") -> list[str]:
        start = f"{folder}/" if folder else ""
        below = [name.removeprefix(start) for name in self._sizes if name.startswith(start)]
        return sorted({name if "/" not in name else name.partition("/")[0] + "/" for name in below})

    def get(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with explained(self.origin(name)):
            path = Path(hf_hub_download(self._name, self._inside + name, revision=self._commit))
        if is_index(path):
            folder = name.rpartition("/")[0]
            for shard in shard_names(path):
                self.get(f"{folder}/{shard}" if folder else shard)
        return path

    def origin(self, name: str) -> str:
        return f"{self._name}@{self._commit}:{self._inside}{name}"

    def to_fetch(self, name: str) -> int | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self._name, self._inside + name, revision=self._commit)
        return None if isinstance(path, str) else self._sizes[name]

    def inside(self, folder: str) -> Repository:
        repository, start = copy.copy(self), f"{folder}/"
        repository._inside += start
        repository._sizes = {
            name.removeprefix(start): size for name, size in self._sizes.items() if name.startswith(start)
        }
        return repository


@contextmanager
def explained(file: str) -> Iterator[None]:
    """Whatever the network and its libraries raise meanwhile becomes one sentence with what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # libraries raise many kinds, of each version others
        message = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"cannot download {file}: {message}. Check the name and the network, set HF_TOKEN where the "
            "repository asks for permission, or download the files by hand and pass --checkpoint DIR"
        ) from error


def open_place(value: str, *, offline: bool = False) -> Place:
    """What `--checkpoint` names: a directory or `organisation/name[@revision][:folder]`. Raises CheckpointError."""
    path = Path(value).expanduser()
    if path.is_dir():
        return Folder(snapshot(path))
    if path.exists():
        raise CheckpointError(
            f"--checkpoint {value} is a file: give the directory that holds all files, or name this one by its own "
            "option (--dit, --vae ...)"
        )
    match = REPOSITORY.fullmatch(value)
    if not match:
        raise CheckpointError(
            f"--checkpoint {value} is neither a directory nor a repository id (organisation/name[@revision])"
        )
    return open_repository(*match.groups(), offline=offline)


def open_repository(name: str, revision: str | None, inside: str | None, *, offline: bool) -> Place:
    """A repository; without a network what was downloaded of it before. Raises CheckpointError."""
    from huggingface_hub import constants, snapshot_download

    if not (offline or constants.HF_HUB_OFFLINE):
        return Repository(name, revision, inside or "")
    try:
        root = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:
        raise CheckpointError(
            f"{name}{f'@{revision}' if revision else ''} is not on this machine, and fetching is off (--offline or "
            "HF_HUB_OFFLINE)"
        ) from error
    start = f"{inside.strip('/')}/" if inside else ""
    return Folder(root / start, f"{name}@{root.name}:{start}")


def snapshot(path: Path) -> Path:
    """The directory itself, or the newest snapshot in the Hub's cache of a repository (`models--name/snapshots/...`).

    Raises CheckpointError where it is not clear which one is meant.
    """
    folder = path.parent if path.name == "snapshots" and (path.parent / "blobs").is_dir() else path
    if not (folder / "snapshots").is_dir():
        return path
    snapshots = sorted(entry for entry in (folder / "snapshots").iterdir() if entry.is_dir())
    main = folder / "refs" / "main"
    if main.is_file() and (named := folder / "snapshots" / main.read_text().strip()) in snapshots:
        return named
    if len(snapshots) == 1:
        return snapshots[0]
    raise CheckpointError(
        f"{folder} is the Hub's cache of a repository with {len(snapshots)} snapshots, and none is its main one"
        + (f": give one of them, {' or '.join(map(str, snapshots[:4]))}" if snapshots else ": download it again")
    )


def describe(place: Place) -> list[str]:
    """What lies in a place where files are missing, in lines, with what that looks like."""
    names = place.names()
    if not names:
        return [f"{place.title} is empty"]
    shown = [name for name in names if not name.startswith(".git")]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    lines = [f"{place.title} holds {', '.join(shown[:_SHOWN])}{more}"]
    if place.has("model_index.json"):
        lines.append(f"  that is {_pipeline(place)}, a directory as diffusers writes it")
    if repositories := [_repository(name) for name in names if name.startswith("models--")]:
        lines.append(f"  that is the Hub's cache: name a repository in it, {' or '.join(repositories[:4])}")
    if isinstance(place, Folder) and (
        broken := [path for path in place.root.rglob("*") if path.is_symlink() and not path.exists()]
    ):
        lines.append(f"  {broken[0]} is a link to what is not there: download it again")
    if foreign := [name for name in names if name.endswith((".gguf", ".msgpack", ".h5", *PICKLES))]:
        lines.append(f"  {', '.join(foreign[:4])}: densegeo reads safetensors (and pickles with --convert-bin)")
    return lines


def subfolders(place: Place, deep: int = 2) -> list[str]:
    """Names of the folders in a place and in those, some dozens at most."""
    folders: list[str] = []
    level: Sequence[str] = [""]
    for _ in range(deep):
        level = [
            f"{above}{name}"
            for above in level[:_SHOWN]
            for name in place.names(above.rstrip("/"))
            if name.endswith("/") and not name.startswith(".")
        ]
        folders += level
    return [name.rstrip("/") for name in folders[: _SHOWN * _SHOWN]]


def _pipeline(place: Place) -> str:
    """The pipeline's class, as its model_index.json says; of a repository it is not fetched for that."""
    if not isinstance(place, Folder):
        return "a pipeline"
    try:
        kind = json.loads((place.root / "model_index.json").read_bytes()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        kind = None
    return f"a {kind}" if isinstance(kind, str) else "a pipeline"


def _repository(name: str) -> str:
    """models--organisation--name/ -> organisation/name."""
    return name.removeprefix("models--").rstrip("/").replace("--", "/", 1)
