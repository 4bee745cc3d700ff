"""What docs/api.md shows of a function names each of its parameters, and no other."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

import densegeo
from tests.support.project import ROOT

SHOWN = re.compile(r"^::: (densegeo[\w.]*)$((?:\n .*)*)", re.M)
MEMBERS = re.compile(r"members: \[(.*)\]")
SECTION = re.compile(r"^(Args|Attributes):\n((?:(?: {4}.*)?\n)*)", re.M)
ENTRY = re.compile(r"^ {4}(\w+): \S", re.M)
RESULT = re.compile(r"^Returns:\n {4}\S", re.M)


def documented() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions and classes of the reference, and the public methods of its classes: name, object."""
    for path, options in SHOWN.findall((ROOT / "docs" / "api.md").read_text()):
        module, _, name = path.rpartition(".")
        actual = getattr(import_module(module), name)
        if inspect.isclass(actual):
            yield name, actual
        chosen = MEMBERS.search(options)
        names = chosen[1].split(", ") if chosen else [key for key in vars(actual) if not key.startswith("_")]
        for member in names:
            value = inspect.getattr_static(actual, member)
            value = getattr(value, "__func__", value)  # a class method's function
            if inspect.isfunction(value) and value.__module__.startswith(path.removesuffix(f".{name}")):
                yield f"{name}.{member}", value


CASES = dict(documented())


def missing_and_unknown(function: Callable[..., Any], docstring: str) -> tuple[set[str], set[str]]:
    """Parameters that the docstring does not name, and names in it that are no parameters."""
    parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
    sections = dict(SECTION.findall(docstring + "\n"))
    section = sections.get("Args") or sections.get("Attributes", "")  # a dataclass' attributes are its parameters
    named = set(ENTRY.findall(section))
    return parameters - named, named - parameters


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_the_docstring(name: str) -> None:
    docstring = inspect.getdoc(CASES[name])
    assert docstring, f"{name} has no docstring"
    assert missing_and_unknown(CASES[name], docstring) == (set(), set())
    if inspect.isfunction(CASES[name]) and inspect.signature(CASES[name]).return_annotation not in ("None", "Self"):
        assert RESULT.search(docstring), f"{name} does not say what it returns"


def test_what_a_docstring_lacks_and_what_the_signature_lacks_is_found() -> None:
    def scale(width: int, height: int, *, factor: float = 1.0) -> None:
        """Sizes.

        Args:
            width: In pixels.
            factor: Of both;
                depth: is no parameter here.
            breadth: There is none.
        """

    assert missing_and_unknown(scale, inspect.getdoc(scale) or "") == ({"height"}, {"breadth"})


def test_the_reference_has_what_the_package_exports() -> None:
    shown = {path.rpartition(".")[2] for path, _ in SHOWN.findall((ROOT / "docs" / "api.md").read_text())}
    assert {name for name in densegeo.__all__ if not name.startswith("__")} <= shown
    assert len(CASES) > 40
