"""`python export/build_engine.py --model fe2e ...`: the same command as `densegeo build`."""

from __future__ import annotations

import typer

from densegeo.cli import guarded
from densegeo.export.command import build

if __name__ == "__main__":
    guarded(lambda: typer.run(build))
