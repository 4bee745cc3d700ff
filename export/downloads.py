"""Published files on this machine: what is here, what has to be fetched, and fetching it into the Hub's own cache.

huggingface_hub finds, authorises and transfers. A download goes on where it broke off, also in another process, which
huggingface_hub 2 does not do by itself: the part that came is kept beside the blob that it will become.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from rich.console import Console
from rich.table import Table

from densegeo.errors import CheckpointError, ResourceError
from densegeo.export import digests
from densegeo.export.machine import GIB
from densegeo.files import atomic_write, cache_directory, existing_parent
from densegeo.models.published import Publication, Published
from densegeo.runtime.bundle import sha256_file

GITHUB = "DENSEGEO_GITHUB"  # environment variable: what stands in for https://raw.githubusercontent.com
TIMEOUT_S = 30


class Download(msgspec.Struct, frozen=True):
    """A published file. local: where it lies, or None; size: bytes to fetch, None where the server does not tell."""

    file: Published
    local: Path | None
    size: int | None = None


def look(publication: Publication, roles: Iterable[str], *, offline: bool = False) -> list[Download]:
    """Which of the published files for these roles are here, and how large the others are. Raises CheckpointError."""
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    rows = [_nearest(row, offline=offline) for row in publication.files if row.role in set(roles)]
    local = {row.role: cached(row) for row in rows}
    missing = [row for row in rows if local[row.role] is None]
    if offline and missing:
        raise CheckpointError(
            f"{len(missing)} of {publication.model}'s {len(rows)} files are not here, and fetching is off "
            f"(--offline or HF_HUB_OFFLINE): {by_hand(publication, missing)}."
        )
    sizes = {}
    for row in missing:
        with _explained(publication, row, missing):
            sizes[row.role] = _remote_size(row)
    return [Download(row, local[row.role], sizes.get(row.role)) for row in rows]


def show(downloads: Sequence[Download], console: Console) -> None:
    """What is downloaded from where, how much that is, and under which licence."""
    table = Table("file", "from", "size", "licence", title="published files", title_justify="left")
    for download in downloads:
        row = download.file
        size = "here" if download.local else "unknown" if download.size is None else _amount(download.size)
        table.add_row(
            row.path, f"{row.site}: {row.repository}", size, row.licence or "not recorded here: see the file's page"
        )
    console.print(table)
    missing = [download for download in downloads if download.local is None]
    if missing:
        total = _amount(sum(download.size or 0 for download in missing))
        console.print(
            f"to download: {len(missing)} of {len(downloads)} files, {total}, into {_cache()}", soft_wrap=True
        )


def fetch(
    publication: Publication, downloads: Sequence[Download], console: Console, *, any_digest: bool
) -> dict[str, tuple[Path, str]]:
    """Download what is not here, check it, and return role -> (file, origin).

    Raises ResourceError when the disk is too small; CheckpointError when a download fails (what came is kept, and the
    next call goes on from there), and for a file that is not the recorded one, unless any_digest.
    """
    missing = [download for download in downloads if download.local is None]
    _check_disk(sum(download.size or 0 for download in missing))
    files = {}
    for download in downloads:
        row, local = download.file, download.local
        if local is None:
            with _explained(publication, row, [row]):
                local = _from_github(row) if row.site == "github" else _from_hub(row)
            check(row, local, console, any_digest=any_digest)
        files[row.role] = (local, row.origin)
    return files


def check(row: Published, local: Path, console: Console, *, any_digest: bool) -> None:
    """Compare a file with the digest that is recorded; print the one that is not yet. Raises CheckpointError."""
    sha256 = sha256_file(local)
    digests.remember(local, sha256)
    expected, actual = (row.sha256, sha256) if row.sha256 else (row.git_blob, git_blob(local))
    if actual != expected:
        message = f"{row.path} of {row.repository} is not the recorded file: its digest is {actual}, not {expected}."
        if not any_digest:
            _remove(local)
            raise CheckpointError(
                f"{message} It was removed. Fetch it again, or, if it is another one on purpose (a mirror's, a newer "
                "one), say --any-digest."
            )
        console.print(f"[yellow]{message} It is taken, because of --any-digest.[/]", soft_wrap=True)
    if not row.sha256:
        console.print(f"{row.path}: SHA-256 {sha256}", soft_wrap=True)


def git_blob(path: Path) -> str:
    """The SHA-1 by which git names a file's content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def by_hand(publication: Publication, rows: Iterable[Published]) -> str:
    """One sentence for machines that cannot download: which files, from where, into which folder."""
    names = ", ".join(f"{Path(row.path).name} ({row.page})" for row in rows)
    folder = Path("checkpoints") / publication.model
    return f"put these files into a folder, {folder} for example, and say --checkpoint {folder}: {names}"


def cached(row: Published) -> Path | None:
    """Where a file lies, if it was fetched before."""
    from huggingface_hub import try_to_load_from_cache

    if row.site == "github":
        return _own_cache(row) if _own_cache(row).is_file() else None
    path = try_to_load_from_cache(row.repository, row.path, revision=row.revision)
    return Path(path) if isinstance(path, str) else None


def _nearest(row: Published, *, offline: bool) -> Published:
    """The row, or for a file of GitHub the mirror of the Hub (HF_ENDPOINT) that holds it too."""
    from huggingface_hub import constants

    if not row.mirrored_in or offline or urlsplit(constants.ENDPOINT).hostname == "huggingface.co":
        return row
    name = Path(row.path).name
    mirror = dataclasses.replace(row, site="hub", repository=row.mirrored_in, path=name)
    try:
        return mirror if cached(mirror) or _metadata(mirror) else row
    except Exception:  # the mirror has no such file, or cannot be reached: the row's own place will tell
        return row


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _own_cache(row: Published) -> Path:
    return cache_directory() / "published" / row.revision / Path(row.path).name


def _github_url(row: Published) -> str:
    base = os.environ.get(GITHUB, "https://raw.githubusercontent.com").rstrip("/")
    return f"{base}/{row.repository}/{row.revision}/{row.path}"


def _metadata(row: Published) -> object:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    return get_hf_file_metadata(hf_hub_url(row.repository, row.path, revision=row.revision))


def _remote_size(row: Published) -> int | None:
    if row.site == "github":
        request = urllib.request.Request(_github_url(row), method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            length = answer.headers.get("Content-Length")
        return None if length is None else int(length)
    size: int | None = _metadata(row).size  # type: ignore[attr-defined]
    return size


def _from_github(row: Published) -> Path:
    target = _own_cache(row)
    with urllib.request.urlopen(_github_url(row), timeout=TIMEOUT_S) as answer, atomic_write(target) as partial:
        with open(partial, "wb") as file:
            shutil.copyfileobj(answer, file)
        length = answer.headers.get("Content-Length")
        if length is not None and partial.stat().st_size != int(length):
            raise ConnectionError(f"{row.path} ended after {partial.stat().st_size} of {length} bytes")
    return target


def _from_hub(row: Published) -> Path:
    """Into the Hub's cache: its blob first, by ranges, then the library names it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

    metadata = _metadata(row)
    etag, location, size = metadata.etag, metadata.location, metadata.size  # type: ignore[attr-defined]
    blob = _cache() / repo_folder_name(repo_id=row.repository, repo_type="model") / "blobs" / etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{etag}.densegeo")  # kept when the download breaks off
    with WeakFileLock(blob.with_name(f"{etag}.densegeo.lock")):
        if not blob.exists():
            with open(partial, "ab") as file:
                if size is not None and file.tell() > size:  # another file's
                    file.truncate(0)
                headers = build_hf_headers() if _same_host(location) else {}  # no token for other hosts
                http_get(
                    location,
                    file,
                    resume_size=file.tell(),
                    headers=headers,
                    expected_size=size,
                    displayed_filename=row.path,
                )
            os.replace(partial, blob)
    return Path(hf_hub_download(row.repository, row.path, revision=row.revision))


def _same_host(location: str) -> bool:
    from huggingface_hub import constants

    return urlsplit(location).netloc == urlsplit(constants.ENDPOINT).netloc


def _remove(local: Path) -> None:
    """A file and what it links to."""
    target = local.resolve()
    local.unlink(missing_ok=True)
    target.unlink(missing_ok=True)


def _check_disk(needed: int) -> None:
    folder = existing_parent(_cache())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"the download needs {needed / GIB:.1f} GiB, {folder} has {free / GIB:.1f} GiB free: free some, or let "
            "HF_HOME name a folder on another disk"
        )


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


@contextmanager
def _explained(publication: Publication, row: Published, missing: Sequence[Published]) -> Iterator[None]:
    """One sentence on what went wrong with a file and what to do, for whatever the network and its libraries raise."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except (EntryNotFoundError, RepositoryNotFoundError, urllib.error.HTTPError) as error:
        if isinstance(error, GatedRepoError):
            problem = "needs permission there: accept its terms on its page and set HF_TOKEN"
        else:
            problem = "is not there any more, or needs a token (HF_TOKEN)"
        raise CheckpointError(
            f"{row.origin} {problem} ({_one_line(error)}). Or {by_hand(publication, missing)}."
        ) from error
    except Exception as error:  # libraries raise many kinds, of each version others
        raise CheckpointError(
            f"cannot download {publication.model}'s files ({_one_line(error)}): what came is kept, and the same "
            f"command goes on from there. Without a network, {by_hand(publication, missing)}."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
