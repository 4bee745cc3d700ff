"""A size in pixels: one type from the command line to the manifest."""

from __future__ import annotations

import re
from typing import NamedTuple

from densegeo.errors import ConfigError


class Size(NamedTuple):
    """Of a picture or a bucket, in pixels. Written "1024x768"."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Raises ConfigError for anything but "1024x768"."""
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text.strip().lower())
        if match is None:
            raise ConfigError(f"the size {text!r} is not WIDTHxHEIGHT in pixels, such as 1024x768")
        return cls(int(match[1]), int(match[2]))

    @property
    def pixels(self) -> int:
        """How many there are."""
        return self.width * self.height
