"""Images in object storage: paths such as s3://bucket/photos, by fsspec, which is imported where one is used."""

from __future__ import annotations

from typing import Any

from densegeo.errors import ImageError
from densegeo.extras import install_hint

# Addresses of cameras and films; every other scheme is storage.
_STREAMS = frozenset({"http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp"})


def is_remote(path: str) -> bool:
    """Whether a path is a URL of storage, and neither a file of this machine nor a stream."""
    scheme, mark, _ = path.partition("://")
    return bool(mark) and scheme.lower() not in _STREAMS and "/" not in scheme


def read(url: str) -> bytes:
    """All of an object. Raises OSError, ImageError."""
    system, path = _opened(url)
    content: bytes = system.cat_file(path)
    return content


def find(url: str) -> list[str]:
    """The URLs of the objects under a prefix, in order, or the one that the URL names. Raises OSError, ImageError."""
    system, path = _opened(url)
    return sorted(system.unstrip_protocol(name) for name in system.find(path))


def file_status(url: str) -> dict[str, Any]:
    """bytes, and version: the storage's name of an object's content (ETag), or its time of change. Raises OSError."""
    system, path = _opened(url)
    info = system.info(path)
    version = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(key)), "")
    return {"bytes": int(info["size"]), "version": str(version)}


def _opened(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise ImageError(f"{url} is in storage, which needs fsspec: {install_hint('ray')}.") from error
    try:
        opened: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the library of this kind of storage
        raise ImageError(f"{url} cannot be opened: {error}.") from error
    return opened
