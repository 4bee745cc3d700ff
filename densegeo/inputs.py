"""Which images `densegeo infer` works on, what it leaves out and why, and under which names results are saved."""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from densegeo import remote
from densegeo.backends import installed
from densegeo.errors import ImageError
from densegeo.extras import install_hint
from densegeo.formats import FILM_SUFFIXES, IMAGE_SUFFIXES, RESULT_ENDINGS, SIDECAR

_HEADER = 4096  # bytes of a PNG file in which densegeo's own text stands


@dataclass(frozen=True)
class Input:
    """Something to work on. path: a file, or the address of a camera. name: of its results under the output folder,
    folders included, separated by "/".
    """

    path: str
    name: str
    film: bool = False


@dataclass
class FoundInputs:
    """What there is to do, and how much was left out, by reason."""

    inputs: list[Input] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def in_words(skipped: Counter[str]) -> str:
    """How much was left out, by reason."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "nothing"


def find_inputs(arguments: Sequence[str], output: Path, listed: Sequence[str] = ()) -> FoundInputs:
    """Files named, images in folders (recursively), matches of globs, addresses of cameras; each once, in order.

    In folders, hidden files and folders, the output folder, earlier results, films and what is no image are left out
    and counted; a file named outright is taken whatever it is called, unless it is an earlier result. Results are named
    by the place of their images under the folder that all arguments share.
    listed: more arguments, of a list that may be older than the files: what gives nothing is taken for a file, whose
    reading then fails by itself. Raises ImageError for any other argument that gives nothing.
    """
    result = FoundInputs()
    files: dict[str, str] = {}  # absolute path -> the folder that it was found under
    streams: list[str] = []
    stored: dict[str, str] = {}  # URL -> that of the folder that it was found under
    for position, argument in enumerate((*arguments, *listed)):
        if remote.is_remote(argument):
            _expand_remote(argument, stored, result.skipped, listed=position >= len(arguments))
            continue
        if is_stream(argument):
            streams.append(argument)
            continue
        files_before, skipped_before = len(files), result.skipped.total()
        for root, path in _expand(argument, output, result.skipped):
            files.setdefault(path, root)
        if len(files) == files_before and result.skipped.total() == skipped_before and not _is_listed(argument, files):
            if position >= len(arguments):
                path = os.path.abspath(argument)
                files[path] = os.path.dirname(path)
                continue
            raise ImageError(f"{argument} matches no image: it is neither a file, a folder with images, nor a glob.")
    if not files and not streams and not stored:
        raise ImageError(
            f"There is no image to work on in {', '.join(arguments)}; left out: {in_words(result.skipped)}."
        )
    root = os.path.commonpath([*files.values()]) if files else ""
    under = os.path.commonpath([*stored.values()]) if stored else ""
    pairs = [(os.path.relpath(path, root), path) for path in files]
    pairs += [(os.path.relpath(path, under), path) for path in stored]
    for (_, path), name in zip(pairs, unique_names(pairs), strict=True):
        result.inputs.append(Input(path, name, is_film(path)))
    result.inputs += [Input(stream, f"camera_{index}", film=True) for index, stream in enumerate(streams, start=1)]
    return result


def find_images(arguments: Sequence[str]) -> list[Path]:
    """The images of `find_inputs`, without films and cameras."""
    return [Path(item.path) for item in find_inputs(arguments, Path(os.devnull)).inputs if not item.film]


def read_list(name: str) -> list[str]:
    """The paths in a list file, or on standard input for "-": one a line, or separated by NUL as `find -print0` does.

    Raises ImageError where it cannot be read.
    """
    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ImageError(f"The list {name} cannot be read: {error.strerror or error}.") from error
    parts = text.split(b"\0") if b"\0" in text else text.splitlines()
    return [os.fsdecode(part) for part in (raw.strip(b"\r\n") for raw in parts) if part.strip()]


def is_stream(argument: str) -> bool:
    """Whether it is the address of a camera or of a stream (rtsp://, http://), or a video device."""
    if "://" in argument:
        return not remote.is_remote(argument)
    try:
        return stat.S_ISCHR(os.stat(argument).st_mode)
    except (OSError, ValueError):
        return False


def is_live(path: str) -> bool:
    """Whether it is a camera, whose frames come at their own pace; not a film at an address."""
    return is_stream(path) and not is_film(path.partition("?")[0])


def is_film(path: str) -> bool:
    """By its suffix."""
    return os.path.splitext(path)[1].lower() in FILM_SUFFIXES


def is_result(path: str) -> bool:
    """Whether a file is an earlier result: named like one, and beside its geometry.json or with our words in it."""
    name = os.path.basename(path)
    ending = next((end for end in RESULT_ENDINGS if name == end or name.endswith(f"_{end}")), None)
    if ending is None:
        return False
    if os.path.exists(f"{path.removesuffix(ending)}{SIDECAR}"):
        return True
    try:
        with open(path, "rb") as stream:
            return b"densegeo." in stream.read(_HEADER)
    except OSError:
        return False


def _expand(argument: str, output: Path, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    """(folder it was found under, absolute path) of each image."""
    if os.path.isdir(argument):
        root = os.path.abspath(argument)
        yield from ((root, path) for path in _walk(root, output, skipped))
        return
    # a name that exists is not taken for a glob
    matches = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
    for match in matches:
        path = os.path.abspath(match)
        if os.path.isdir(path):
            continue
        if is_result(path):
            skipped["earlier results"] += 1
        else:
            yield os.path.dirname(path), path


def _expand_remote(url: str, stored: dict[str, str], skipped: Counter[str], *, listed: bool) -> None:
    """The images under a URL of storage, or the one that it names; of a list, as they are. Raises ImageError."""
    if listed:
        stored.setdefault(url, os.path.dirname(url))
        return
    try:
        files = remote.find(url)
    except OSError as error:
        raise ImageError(f"{url} cannot be listed: {error.strerror or error}.") from error
    if not files:
        raise ImageError(f"{url} matches no image: there is nothing of that name.")
    for path in files:
        single = files == [path] and path.rstrip("/").endswith(url.partition("://")[2].strip("/"))
        reason = None if single and not is_film(path) else _against_name(path)
        if reason is None:
            stored.setdefault(path, os.path.dirname(path) if single else url.rstrip("/"))
        else:
            skipped[reason] += 1


def _walk(root: str, output: Path, skipped: Counter[str]) -> Iterator[str]:
    """The images below a folder, in order; links are followed, each folder once."""
    output_folder = os.path.realpath(output)
    visited: set[str] = set()

    def unreadable(error: OSError) -> None:
        skipped["folders that cannot be read"] += 1

    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in visited or (real == output_folder and folder != root):
            skipped["output folder" if real == output_folder else "folders seen before, through a link"] += 1
            folders.clear()
            continue
        visited.add(real)
        if hidden := sum(name.startswith(".") for name in (*folders, *names)):
            skipped["hidden"] += hidden
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            path = os.path.join(folder, name)
            reason = _against(path)
            if reason is None:
                yield path
            else:
                skipped[reason] += 1


def _against(path: str) -> str | None:
    """Why a file of a folder is no input, or None."""
    if is_result(path):
        return "earlier results"
    return _against_name(path) or (None if os.path.isfile(path) else "broken links and devices")


def _against_name(path: str) -> str | None:
    """The same, as far as its name tells."""
    suffix = os.path.splitext(path)[1].lower()
    row = IMAGE_SUFFIXES.get(suffix)
    if suffix in FILM_SUFFIXES:
        return "films (name them one by one)"
    if row is None:
        return f"{suffix or 'without suffix'} (no images)"
    if row.module and not installed(row.module):
        return f"{suffix} ({install_hint(row.extra)} to read them)"
    return None


def _is_listed(argument: str, files: dict[str, str]) -> bool:
    """Whether an argument gave only what another gave before."""
    path = os.path.abspath(argument)
    return path in files or any(root == path or root.startswith(path + os.sep) for root in files.values())


def unique_names(images: Sequence[tuple[str, str]]) -> list[str]:
    """(relative path, absolute path) -> the name of each one's results: the relative path without suffix.

    Where several would have one name (a.jpg beside a.png), they keep their suffixes, and at last get numbers. Compared
    without case, so that nothing is overwritten on file systems that ignore it.
    """
    plain = [os.path.splitext(relative)[0].replace(os.sep, "/") for relative, _ in images]
    counts = Counter(name.lower() for name in plain)
    used_names = {name for name, count in counts.items() if count == 1}
    names = []
    for (relative, _), name in zip(images, plain, strict=True):
        if counts[name.lower()] > 1:
            full = relative.replace(os.sep, "/")
            number, name = 1, full
            while name.lower() in used_names:
                number += 1
                name = f"{full}_{number}"
            used_names.add(name.lower())
        names.append(name)
    return names
