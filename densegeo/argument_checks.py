"""What callers give to public functions: checked where it comes in, by errors that say what came and what is wanted."""

from __future__ import annotations

import operator
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
        if isinstance(path, str) and "\0" not in path:
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


def whole_of(name: str, value: object, *, none: bool = False) -> int:
    """Raises ConfigError for anything but a whole number above 0. none: the error says that None is taken too."""
    number = integer_of(value)
    if number is not None and number > 0:
        return number
    raise ConfigError(f"{name} must be a whole number above 0{', or None' if none else ''}, not {shown(value)}.")


def require_flags(**flags: object) -> None:
    """Raises ConfigError for anything but True and False."""
    for name, value in flags.items():
        if not (isinstance(value, int) or _is_flag(value)):
            raise ConfigError(f"{name} must be True or False, not {shown(value)}.")


def integer_of(value: object) -> int | None:
    """Python's and numpy's integers, arrays without axes among them; None for anything else. Flags are no numbers."""
    try:
        return None if _is_flag(value) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def number_of(value: object) -> float | None:
    """Python's and numpy's real numbers, arrays without axes among them, infinities and NaN too; None for anything
    else. Flags and text are no numbers.
    """
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    if isinstance(value, (str, bytes, bytearray)) or _is_flag(value) or kind not in "uifO":
        return None
    if tuple(getattr(value, "shape", ())):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def items_of(value: object) -> list[Any] | None:
    """What it holds, in order; None for text and for what cannot be iterated over."""
    if isinstance(value, (str, bytes, bytearray)):
        return None
    try:
        return list(value)  # type: ignore[call-overload, no-any-return]
    except TypeError:  # an array without axes among them, which looks as if it could
        return None


def size_of(name: str, value: object) -> Size:
    """(width, height), whole numbers above 0. Raises ConfigError for anything else."""
    try:
        sides = tuple(map(number_of, value))  # type: ignore[call-overload]
        size = Size(*(int(side) for side in sides))
        if tuple(size) == sides and min(size) > 0:
            return size
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{name} must be (width, height) in pixels, such as (1920, 1080), not {shown(value)}.")


def _is_flag(value: object) -> bool:
    """Python's, and those of arrays' libraries."""
    plain = not tuple(getattr(value, "shape", ()))
    return isinstance(value, bool) or (plain and str(getattr(value, "dtype", "")).endswith("bool"))


def _kind(value: object) -> str:
    return type(value).__name__
