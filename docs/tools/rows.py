"""Tables of the code's own rows: precisions, licences, the manifest's fields, and commands' options."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

import typer
from tables import ROOT, table

from densegeo import cli
from densegeo.backends import BACKENDS
from densegeo.models.published import PUBLICATIONS
from densegeo.precision import PRECISIONS

# Of the manifest's records, in the order of the page, and those of launch contracts.
RECORDS = (
    ("runtime/bundle.py", ("Manifest", "Bucket", "Graph", "TensorSpec", "FileDigest")),
    ("densegeo/outputs.py", ("Decode", "Output")),
    ("runtime/bundle.py", ("Verification", "Check", "Quantization", "Networks", "Source", "Choice", "Engine")),
    ("kernels/contract.py", ("LaunchContract", "Argument", "Axis")),
)


def precisions() -> list[str]:
    lines = []
    for row in PRECISIONS.values():
        beside = "" if not row.quantized else ", ".join(row.bases)
        first = f"sm_{row.first_architecture}" if row.first_architecture else "all"
        runs = ", ".join(backend.name for backend in BACKENDS if row.name in backend.precisions)
        lines.append([f"`{row.name}`", row.bits, beside, "yes" if row.calibrated else "", first, runs])
    head = ["", "bits", "beside it (the default first)", "needs calibration", "GPUs, in engines", "backends"]
    return table(head, lines)


def licences() -> list[str]:
    lines = []
    for publication in PUBLICATIONS.values():
        for file in publication.files:
            link = f"[{file.path.rpartition('/')[2]}]({file.page})"
            lines.append([f"`{publication.model}`", file.role, link, file.repository, file.licence])
        if not publication.files and not publication.carried:
            lines.append([f"`{publication.model}`", "all", "", "not published at a known place", ""])
    return table(["model", "role", "file", "repository", "licence, as far as is known"], lines)


def inspected() -> list[str]:
    """What `densegeo inspect fe2e-tiny` prints."""
    command = [sys.executable, "-m", "densegeo", "inspect", "fe2e-tiny"]
    environment = {**os.environ, "COLUMNS": "96"}
    folder = ROOT / "runtime" / "bundles"  # so that its path is its name
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return ["```text", *(line.rstrip() for line in done.stdout.strip("\n").splitlines()), "```"]


def records() -> list[str]:
    """A table a record: its fields, their types, and the comments beside them in the source."""
    lines = []
    for path, names in RECORDS:
        text = (ROOT / path).read_text()
        nodes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
        for name in names:
            lines += [f"### {name}", "", *_described(nodes[name]), *_fields(nodes[name], text.splitlines()), ""]
    return lines


def _described(node: ast.ClassDef) -> list[str]:
    said = ast.get_docstring(node)
    return [] if said is None else [*_plain(said).splitlines(), ""]


def _plain(text: str) -> str:
    """A docstring's paragraphs, lines apart that begin with a field's name."""
    return re.sub(r"\n(?=[a-z_0-9, ]+: |packing \"|Raises )", "\n\n", text.replace("<", "&lt;"))


def _fields(node: ast.ClassDef, source: list[str]) -> list[str]:
    lines = []
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            kind = re.sub(r"Annotated\[(\w+), .*\]$", r"\1", ast.unparse(field.annotation)).replace("|", "or")
            line = source[(field.end_lineno or field.lineno) - 1]
            comment = line.partition("  # ")[2].replace("|", "\\|")
            default = "" if field.value is None else f"`{ast.unparse(field.value)}`"
            if default.startswith("`field("):
                default = ""
            lines.append([f"`{field.target.id}`", f"`{kind}`", default, comment])
    return table(["field", "type", "default", "meaning"], lines)


def commands() -> list[str]:
    """Every command with its arguments and options, as `--help` has them."""
    group: Any = typer.main.get_command(cli.app)
    parent = group.make_context("densegeo", ["doctor"])
    lines = []
    for name in group.commands:
        _, command, _ = group.resolve_command(parent, [name])
        lines += [f"### densegeo {name}", "", *_told(command.help or ""), ""]
        lines += [*table(["argument or option", "what", "default"], _options(command)), ""]
    return lines


def _told(help_text: str) -> Iterator[str]:
    """A command's help without the parts that are for the terminal alone."""
    for line in help_text.split("\f")[0].splitlines():
        yield _cell(line)


def _options(command: Any) -> Iterator[list[str]]:
    for option in command.params:
        if getattr(option, "hidden", False):
            continue
        if option.param_type_name == "argument":
            name = option.metavar or f"{option.name.upper()}{'...' if option.nargs == -1 else ''}"
            yield [f"`{name}`", _cell(option.help or ""), ""]
            continue
        spelled = ", ".join(f"`{word}`" for word in chain(option.opts, option.secondary_opts))
        yield [spelled, _cell(option.help or ""), _default(option)]


def _default(option: Any) -> str:
    value = option.default
    if callable(value) or value is None or value is False or value == [] or value == () or not option.show_default:
        return ""
    if isinstance(value, (list, tuple)):
        value = " ".join(str(part) for part in value)
    return f"`{value}`" if str(value) else ""


def _cell(text: str) -> str:
    return re.sub(r"([|\[\]])", r"\\\1", re.sub(r"\s+", " ", text).replace("<", "&lt;")).strip()
