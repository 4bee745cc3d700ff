"""What the makers of tables share: Markdown, and the stored records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def table(head: Iterable[str], lines: Iterable[Iterable[object]]) -> list[str]:
    """A Markdown table."""
    cells = [list(head), *([str(cell) for cell in line] for line in lines)]
    assert len({len(line) for line in cells}) == 1, cells
    cells.insert(1, ["---"] * len(cells[0]))
    return [f"| {' | '.join(line)} |" for line in cells]


@cache
def record(name: str) -> Any:
    """What a benchmark wrote: benchmarks/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def source(*names: str) -> str:
    """A line that says where a table's figures are from."""
    files = ", ".join(f"[{name}.json](../benchmarks/results/{name}.json)" for name in names)
    return f"*From {files}.*"
