"""The table of what was verified, from docs/verification.toml.

Figures in it are read from benchmarks/results/: `{quantization_cpu_zen4.changes.fp8.abs_rel:.2%}`. What a row names
must be there: test files, `make` targets, records.
"""

from __future__ import annotations

import re
import sys
from functools import reduce
from typing import Any

from tables import RESULTS, ROOT, record, table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIGURE = re.compile(r"\{(\w+)\.([\w.\- ]+)(?::([^}]+))?\}")
FIELDS = {"claim", "cpu", "gpu", "tests"}


def table_rows() -> dict[str, list[dict[str, Any]]]:
    """Heading -> rows, checked."""
    found: dict[str, list[dict[str, Any]]] = tomllib.loads((ROOT / "docs" / "verification.toml").read_text())
    for row in (row for rows in found.values() for row in rows):
        if unknown := set(row) - FIELDS:
            raise SystemExit(f"docs/verification.toml: unknown {sorted(unknown)} in {row['claim']!r}")
        require(row)
    return found


def require(row: dict[str, Any]) -> None:
    """Exits for a row that names what is not there."""
    makefile = (ROOT / "Makefile").read_text()
    said = " ".join(row.get(field, "") for field in ("cpu", "gpu"))
    missing = [path for path in row.get("tests", []) if not (ROOT / "tests" / path).exists()]
    missing += [f"make {name}" for name in re.findall(r"`make ([\w-]+)", said) if f"\n{name}:" not in makefile]
    missing += [path for path in re.findall(r"benchmarks/\w+\.py", said) if not (ROOT / path).is_file()]
    missing += [name for name, _, _ in FIGURE.findall(row["claim"] + said) if not (RESULTS / f"{name}.json").is_file()]
    if missing:
        raise SystemExit(f"docs/verification.toml: there is no {', '.join(missing)}, which {row['claim']!r} names")
    if not row.get("tests") and "make " not in said and "benchmarks/" not in said and "not " not in said:
        raise SystemExit(f"docs/verification.toml: nothing holds {row['claim']!r}")


def filled(text: str) -> str:
    """Figures in their places."""

    def figure(match: re.Match[str]) -> str:
        value: Any = reduce(_entry, match[2].split("."), record(match[1]))
        return re.sub(r"e([+-])0*", r"e\1", format(value, match[3] or "")).replace("%", " %")

    return FIGURE.sub(figure, text)


def _entry(found: Any, key: str) -> Any:
    return found[int(key)] if isinstance(found, list) else found[key]


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        links = ", ".join(f"[{path.rpartition('/')[2]}](../tests/{path})" for path in row.get("tests", []))
        cells = [filled(row["claim"]), "<br>".join(filter(None, (filled(row.get("cpu", "")), links)))]
        lines.append([*cells, filled(row.get("gpu", ""))])
    return table(["claim", "CPU, and the tests that hold it", "GPU"], lines)


def every() -> list[str]:
    said: list[str] = []
    for heading, rows in table_rows().items():
        said += [f"## {heading}", "", *table_of(rows), ""]
    return said
