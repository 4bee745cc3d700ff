"""The table of what was verified, from docs/verification.toml.

Figures in it are read from benchmarks/results/: `{quantization_cpu_zen4.changes.fp8.abs_rel:.2%}`. What a row names
must be there: test files, `make` targets, records.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import reduce
from pathlib import Path
from typing import Any

from tables import RESULTS, ROOT, record, table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIGURE = re.compile(r"\{(\w+)\.([\w.\- ]+)(?::([^}]+))?\}")
FIELDS = {"claim", "cpu", "gpu", "tests"}
LATER = {"thorough", "slow", "ros", "fleet", "gpu"}  # marks of what `make test` leaves out


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
    held = [ROOT / "tests" / path for path in row.get("tests", []) if path.endswith(".py")]
    if held and "`make test`" in row.get("cpu", "") and not any(map(in_default_tier, held)):
        raise SystemExit(f"docs/verification.toml: `make test` runs no test that holds {row['claim']!r}")
    if not row.get("tests") and "make " not in said and "benchmarks/" not in said and "not " not in said:
        raise SystemExit(f"docs/verification.toml: nothing holds {row['claim']!r}")


def in_default_tier(path: Path) -> bool:
    """Whether `make test` runs any test of this file; one that holds none itself may be used by others."""
    tree = ast.parse(path.read_text())
    marks = [node.value for node in tree.body if isinstance(node, ast.Assign) and _names(node) == {"pytestmark"}]
    if any(map(_later, marks)):
        return False
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return not tests or any(not any(map(_later, test.decorator_list)) for test in tests)


def _names(node: ast.Assign) -> set[str]:
    return {target.id for target in node.targets if isinstance(target, ast.Name)}


def _later(mark: ast.expr) -> bool:
    """Whether this is a later tier's mark, or a list with one. (A parameter's own mark is none of its test's.)"""
    marks = mark.elts if isinstance(mark, ast.List) else [mark]
    return any(isinstance(one, ast.Attribute) and one.attr in LATER for one in marks)


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
