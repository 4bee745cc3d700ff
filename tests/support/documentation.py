"""The pages that people read: which there are, and the code and commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.support.project import ROOT

PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    ROOT / "tests" / "README.md",
    ROOT / "ros2" / "densegeo_ros" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """A line of a block of commands. words: without its comment; a pipe and redirections are words too."""

    page: str
    line: str
    words: tuple[str, ...]

    @property
    def last(self) -> list[str]:
        """The last command of a pipe, without redirections."""
        words = list(self.words)
        while "|" in words:
            words = words[words.index("|") + 1 :]
        return words[: words.index(">")] if ">" in words else words


def blocks(page: Path, *kinds: str) -> list[str]:
    """The fenced blocks of these languages."""
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind in kinds]


def commands(page: Path) -> list[Command]:
    """What its `sh` blocks say to type."""
    lines = [line for body in blocks(page, "sh") for line in body.splitlines() if line.strip()]
    name = page.relative_to(ROOT).as_posix()
    return [Command(name, line, tuple(shlex.split(line, comments=True))) for line in lines]


def prose(page: Path) -> str:
    """Its text without fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))
