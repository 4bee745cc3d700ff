"""The checkout as a project: its root, and what its files import."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def imported(tree: ast.AST) -> set[str]:
    """Modules imported anywhere in a file, also by name through `import_module`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            names |= {str(part.value) for part in node.args[:1] if isinstance(part, ast.Constant)}
    return names
