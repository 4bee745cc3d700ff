"""What a file is that should hold tensors, told by its first bytes: what cannot be read is named, with what to do.

Imports nothing heavy.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

from densegeo.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # names that torch.save's files have
INDEX = ".safetensors.index.json"  # the end of the name of what lists a model's shards
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


class Container(NamedTuple):
    """A kind of file. starts: the bytes that it may begin with; remedy: what to do instead."""

    starts: tuple[bytes, ...]
    what: str
    remedy: str


CONTAINERS = (
    Container(
        (b"version https://git-lfs.github.com/",),
        "a Git LFS pointer and not the file that it stands for",
        "run `git lfs pull` in its folder, or download the file itself",
    ),
    Container(
        (b"/annex/objects/", b"../.git/annex/", b".git/annex/"),
        "a git-annex pointer and not the file that it stands for",
        "run `git annex get` in its folder",
    ),
    Container(
        (b"# xet version", b"version https://huggingface.co/xet"),
        "a Xet pointer and not the file that it stands for",
        "run `git xet checkout`, or download the file itself",
    ),
    Container(
        (b"GGUF",),
        "a GGUF file, weights quantized for llama.cpp and ComfyUI",
        "take the safetensors file that it was made from: densegeo makes its own 8-bit weights (--precision fp8, int8)",
    ),
    Container(
        (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML", b"<?xml"),
        "a web page that was saved in the file's place, often one that asks to log in",
        "download the file again, with a token (HF_TOKEN) where its repository asks for one",
    ),
    Container(
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd"), "a packed archive", "unpack it"
    ),
)
_PICKLE_STARTS = tuple(bytes([0x80, version]) for version in range(2, 6))


def require_readable(path: Path) -> None:
    """Raise CheckpointError for a file that is missing, empty, or known to be something else than it should be."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path} is a link to {path.readlink()}, which is not there: a download was interrupted, or its cache was "
            "cleaned. Download it again."
        )
    if not path.is_file():
        raise CheckpointError(f"the checkpoint {path} does not exist")
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is an empty file (0 bytes): download or copy it again")
    if _looks_like_safetensors(start):
        return
    if (container := next((row for row in CONTAINERS if start.startswith(row.starts)), None)) is not None:
        raise CheckpointError(f"{path} is {container.what} ({path.stat().st_size} bytes): {container.remedy}")


def _looks_like_safetensors(start: bytes) -> bool:
    """The header's length in 8 bytes, which other files may begin with too, and the header's own beginning."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LARGEST_HEADER


def is_pickle(path: Path) -> bool:
    """Whether a file is one that torch.save wrote, whatever its name is."""
    with open(path, "rb") as file:
        start = file.read(9)
    if _looks_like_safetensors(start):
        return False
    if start.startswith(_PICKLE_STARTS):
        return True
    if not start.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return path.suffix in PICKLES  # cut off


def unreadable_safetensors(path: Path, error: object) -> CheckpointError:
    """Why a file that should be safetensors is none, in words. error: what the library said."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LARGEST_HEADER)) if 2 <= length <= _LARGEST_HEADER else b""
    if not header.startswith(b"{"):
        return CheckpointError(f"{path} is not a readable safetensors file ({error}): it is damaged or another format")
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        complete_size = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete_size = 8 + length if len(header) < length else 0
    if complete_size <= size:
        return CheckpointError(f"{path} is not a readable safetensors file ({error}): it is damaged")
    return CheckpointError(
        f"{path} is truncated: it has {size:,} bytes and should have {'at least ' * (len(header) < length)}"
        f"{complete_size:,}. A download or copy broke off; do it again."
    )
