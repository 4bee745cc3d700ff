"""What callers give to public functions: checked where it comes in, by errors that say what came and what is wanted."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from densegeo.errors import ConfigError
from densegeo.size import Size


def shown(value: object) -> str:
    """A value as an error shows it: short, on one line, with its type where that is not plain."""
    text = " ".join(reprlib.repr(value).split())
    return text if value is None or isinstance(value, (str, bytes, bool, int, float)) else f"{text} ({_kind(value)})"


def path_of(name: str, value: object) -> Path:
    """Raises ConfigError for anything but text and path objects."""
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        if isinstance(path, str):
            return Path(path)
    raise ConfigError(f"{name} must be a path, as text or as a pathlib.Path, not {shown(value)}.")


def one_of(name: str, value: object, among: Sequence[str]) -> None:
    """Raises ConfigError for anything but one of a few words."""
    if not isinstance(value, str) or value not in among:
        words = [f'"{word}"' for word in among]
        raise ConfigError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, not {shown(value)}.")


def require_text(name: str, value: object, such_as: str) -> None:
    """Raises ConfigError for anything but text."""
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text, such as {such_as}, not {shown(value)}.")


def require_whole(name: str, value: object, *, none: bool = False) -> None:
    """Raises ConfigError for anything but a whole number above 0; none: and None."""
    if (none and value is None) or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return
    raise ConfigError(f"{name} must be a whole number above 0{', or None' if none else ''}, not {shown(value)}.")


def require_flags(**flags: object) -> None:
    """Raises ConfigError for anything but True and False."""
    for name, value in flags.items():
        if not isinstance(value, (bool, int)):
            raise ConfigError(f"{name} must be True or False, not {shown(value)}.")


def is_number(value: object) -> bool:
    """Whether it can be compared with numbers; of numpy's, scalars alone."""
    try:
        return not isinstance(value, (str, bytes)) and float(value) == float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def size_of(name: str, value: object) -> Size:
    """(width, height), whole numbers above 0. Raises ConfigError for anything else."""
    try:
        sides: tuple[Any, ...] = tuple(value)  # type: ignore[arg-type]
        size = Size(*(int(side) for side in sides))
        if tuple(size) == sides and min(size) > 0:
            return size
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{name} must be (width, height) in pixels, such as (1920, 1080), not {shown(value)}.")


def _kind(value: object) -> str:
    return type(value).__name__
