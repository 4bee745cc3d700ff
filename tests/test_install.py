"""The wheel holds every folder, and installs and runs without the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_wheel_holds_the_folders_and_runs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)  # pip writes into the source tree
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("densegeo-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for module in ("cli", "runtime/estimator", "runtime/backends/ort", "models/transformer", "benchmarks/latency"):
        assert f"densegeo/{module}.py" in names
    for file in ("step1x-edit-i1258.safetensors", "vae.safetensors", "no_info.npz"):
        assert f"densegeo/models/weights/fe2e-tiny/{file}" in names
    assert not {name.partition("/")[0] for name in names} - {"densegeo", f"{wheel.stem.rsplit('-', 3)[0]}.dist-info"}
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    code = "import densegeo.runtime; from densegeo.cli import app; print(densegeo.__file__)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {code}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.startswith(str(target))
