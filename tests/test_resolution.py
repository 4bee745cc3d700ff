"""constraints.txt pins everything once; the resolver's table says no when something is wrong."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement

from tests import resolution
from tests.resolution import CONSTRAINTS, PYTHONS, ROOT, Cell


def applies(row: Requirement, python: str) -> bool:
    """Whether a line counts on Linux with this Python."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.4",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "extra": "",
    }
    return row.marker is None or row.marker.evaluate(environment)


def pins(python: str) -> dict[str, list[str]]:
    """Name -> the versions that constraints.txt gives for one Python."""
    actual: dict[str, list[str]] = {}
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith("#"):
            continue
        row = Requirement(line)
        if applies(row, python):
            actual.setdefault(resolution.normal(row.name), []).append(str(row.specifier).removeprefix("=="))
    return actual


def requirements(python: str) -> list[Requirement]:
    """What densegeo and its extras ask for by name, on one Python."""
    project = resolution.project()
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    rows = [Requirement(text) for texts in lists for text in texts]
    return [row for row in rows if row.name != "densegeo" and applies(row, python)]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_pin_within_its_bounds(python: str) -> None:
    actual = pins(python)
    assert {name: versions for name, versions in actual.items() if len(versions) != 1} == {}
    for row in requirements(python):
        (version,) = actual[resolution.normal(row.name)]
        assert row.specifier.contains(version), f"{row}: {version}"


def test_constraints_name_the_command_that_makes_them() -> None:
    command = next(line[1:].strip() for line in CONSTRAINTS.read_text().splitlines() if line.startswith("#    "))
    recipe = " ".join((ROOT / "Makefile").read_text().replace("\\\n", " ").split())
    for part in ("$(BIN)/", "--quiet ", "$(UPGRADE) "):
        recipe = recipe.replace(part, "")
    assert command.startswith("uv --no-config pip compile")
    assert command.replace("--upgrade ", "") in recipe


def test_what_constraints_in_fixes_is_fixed() -> None:
    expected = [line.split("#")[0].strip() for line in (ROOT / "constraints.in").read_text().splitlines()]
    for row in (Requirement(line) for line in expected if line):
        assert all(pins(python)[row.name] == [str(row.specifier).removeprefix("==")] for python in PYTHONS)


def test_exceptions_name_what_exists() -> None:
    names = set(resolution.project()["optional-dependencies"])
    for row in resolution.EXCEPTIONS:
        assert set(row.extras) <= names
        assert set(row.pythons) <= set(PYTHONS)
        assert row.machine in resolution.PLATFORMS
        assert row.reason


class Index:
    """Stands for the package index: what resolves there, by extra."""

    def __init__(self, broken: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken = broken
        monkeypatch.setattr(resolution, "resolve", self.resolve)

    def resolve(self, wanted: list[str], python: str, machine: str) -> str | None:
        missing = self.broken & set(wanted)
        return f"no wheels: {sorted(missing)}" if missing else None


def test_a_column_without_surprises(monkeypatch: pytest.MonkeyPatch) -> None:
    Index({"gpu"}, monkeypatch)
    assert resolution.examine("3.10", "aarch64", ["cpu", "gpu"]) == {}
    text = resolution.table(["cpu", "gpu"], {})
    assert text.splitlines()[3].split() == ["gpu", "yes", "yes", "yes", "yes", "yes", "-", "yes", "yes", "yes", "yes"]


def test_an_extra_that_does_not_resolve_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Index({"cpu", "gpu"}, monkeypatch)
    cell = Cell("cpu", "3.10", "aarch64")
    wrong = resolution.examine("3.10", "aarch64", ["cpu", "gpu", "exr"])
    assert wrong == {cell: "no wheels: ['cpu']"}
    assert "WRONG" in resolution.table(["cpu", "gpu", "exr"], wrong)
    assert resolution.main() == 1
    assert "[cpu] on Python 3.10, aarch64: no wheels: ['cpu']" in capsys.readouterr().err


def test_an_exception_that_resolves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Index(set(), monkeypatch)
    wrong = resolution.examine("3.10", "aarch64", ["cpu", "gpu"])
    assert wrong == {Cell("gpu", "3.10", "aarch64"): "resolves: take it out of EXCEPTIONS"}
    assert resolution.examine("3.11", "aarch64", ["cpu", "gpu"]) == {}


def test_uv_asks_the_public_index_and_a_package_without_a_pin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def run(command: list[str], **options: object) -> object:
        seen.update(options, command=command)
        return type("Done", (), {"returncode": 0, "stdout": "numpy==2.4.6\nUnheard_Of==1\n", "stderr": ""})

    monkeypatch.setenv("UV_FIND_LINKS", "/somewhere")
    monkeypatch.setenv("PIP_FIND_LINKS", "/somewhere")
    monkeypatch.setattr(resolution.subprocess, "run", run)
    assert resolution.resolve(["cpu"], "3.12", "aarch64") == "not pinned in constraints.txt: unheard-of"
    assert not [key for key in seen["env"] if key.startswith(("UV_", "PIP_"))]  # type: ignore[attr-defined]
    assert "--no-config" in seen["command"]  # type: ignore[operator]
