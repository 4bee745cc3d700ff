"""The source archive and the wheel from it: what they hold, and that they work away from the checkout."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.project import ROOT, imported

FOLDERS = ("models", "calibration", "export", "runtime", "serving", "kernels", "training", "benchmarks")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build", "out"
)
MIB = 2**20
USER = """
from pathlib import Path
import numpy as np
from numpy.typing import NDArray
from densegeo import Estimator, Geometry

def depth(bundle: Path, photo: Path, near: float, far: float) -> NDArray[np.float32]:
    with Estimator(bundle) as estimator:
        geometry: Geometry = estimator(photo)
        estimator(photo).no_such_thing  # type: ignore[attr-defined]
    return geometry.to_metric(near=near, far=far).depth
"""


class Built(NamedTuple):
    sdist: Path
    source: Path  # the archive's content
    wheel: Path
    names: set[str]  # the wheel's files
    metadata: Message


def backend(folder: Path, call: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """What a front end does: call setuptools' build backend in a folder of sources."""
    code = f"import setuptools.build_meta as backend; backend.{call}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The source archive of this checkout, and the wheel from the archive."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=LEFT_OUT)
    backend(folder / "checkout", f"build_sdist({str(folder)!r})")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source")
    (source,) = (folder / "source").iterdir()
    backend(source, f"build_wheel({str(folder)!r})")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        return Built(sdist, source, wheel, names, message_from_bytes(archive.read(metadata)))


@pytest.fixture(scope="module")
def elsewhere(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel, and this environment's other packages but not this checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths) if os.name != "nt" else folder / "Lib" / "site-packages")
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(site)
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not followed
    return folder / "bin" / "python"


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited, capture_output=True, text=True, check=False
    )


@pytest.mark.thorough
def test_wheel_holds_what_commands_need(built: Built) -> None:
    version = metadata.version("densegeo")
    assert built.wheel.name == f"densegeo-{version}-py3-none-any.whl"
    assert {name.partition("/")[0] for name in built.names} == {"densegeo", f"densegeo-{version}.dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    inner = ROOT / "densegeo"
    for folder in ("ros", "fleet"):
        sources |= {path.relative_to(inner).as_posix() for path in (inner / folder).rglob("*.py")}
    shipped = {name.removeprefix("densegeo/") for name in built.names if name.count("/") > 1 and name.endswith(".py")}
    left_out = sources - shipped
    assert shipped <= sources
    assert {name.partition("/")[0] for name in left_out} == {"training", "benchmarks"}
    assert {name for name in shipped if name.startswith(("training", "benchmarks"))} == {
        f"benchmarks/{name}.py"
        for name in ("__init__", "compare", "environment", "gpu_monitor", "latency", "latency_report", "other_load")
    }
    weights = "densegeo/models/weights/fe2e-tiny"
    assert {f"{weights}/{name}" for name in ("step1x-edit-i1258.safetensors", "vae.safetensors")} <= built.names
    assert "densegeo/py.typed" in built.names
    page = {f"densegeo/serving/page/{path.name}" for path in (ROOT / "serving" / "page").iterdir()}
    assert "densegeo/serving/page/index.html" in page
    assert page <= built.names
    assert built.wheel.stat().st_size < 40 * MIB


@pytest.mark.thorough
def test_what_the_wheel_imports_is_in_it(built: Built) -> None:
    """Every `densegeo` module that a shipped module imports, at its top or inside a function, is shipped."""
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in built.names}
    with zipfile.ZipFile(built.wheel) as archive:
        for name in sorted(name for name in built.names if name.endswith(".py")):
            for module in imported(ast.parse(archive.read(name))):
                if module.partition(".")[0] == "densegeo":
                    assert module in modules, f"{name} imports {module}"


@pytest.mark.thorough
def test_metadata_has_full_addresses(built: Built) -> None:
    page = str(built.metadata.get_payload())
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    home = "https://github.com/densegeo/densegeo"
    picture = f"({home}/raw/v{metadata.version('densegeo')}/models/weights/fe2e-tiny/demo.jpg)"
    assert picture in page
    for view, path in re.findall(rf"\({home}/(blob|raw)/v[^/]+/([^)#]+)[^)]*\)", page):
        assert (ROOT / path).exists(), f"README.md's {view} of {path}"
    urls = dict(text.split(", ", 1) for text in built.metadata.get_all("Project-URL") or [])
    assert urls["Source"] == home
    assert built.metadata["Description-Content-Type"] == "text/markdown"
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= set(built.metadata.get_all("Classifier") or [])


@pytest.mark.thorough
def test_sdist_is_the_checkout(built: Built) -> None:
    """Files once, links as links: the wheel above was built from it, and tests find what they read."""
    for folder in FOLDERS:
        assert (built.source / "densegeo" / folder).readlink() == Path("..") / folder
    for path in ("tests/conftest.py", "Makefile", "constraints.txt", "setup.py", ".ci/run", "benchmarks/LOG.md"):
        assert (built.source / path).is_file(), path
    assert not list(built.source.rglob("*.pyc"))
    assert built.sdist.stat().st_size < 40 * MIB
    if (ROOT / ".git").exists():
        tracked = run("git", "ls-files", cwd=ROOT).stdout.splitlines()
        assert tracked
        assert [path for path in tracked if not os.path.lexists(built.source / path)] == []


@pytest.mark.thorough
def test_the_wheel_works_elsewhere(elsewhere: Path, tmp_path: Path) -> None:
    code = "from densegeo import Estimator, cli; from densegeo.benchmarks import compare, latency; print(cli.__file__)"
    done = run(elsewhere, "-c", code, cwd=tmp_path)
    assert done.stdout.startswith(str(elsewhere.parent.parent)), done.stderr
    assert run(elsewhere, "-m", "densegeo", "doctor", "--json", cwd=tmp_path).returncode == 0


@pytest.mark.thorough
def test_types_reach_users(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    # as where these are not installed: reading their thousands of modules takes minutes
    unread = ",".join(f"{package}.*" for package in ("torch", "transformers", "diffusers", "onnxruntime", "openvino"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{unread}]\nfollow_imports = skip\n")
    mypy = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path / 'cache'}"]
    done = run(*mypy, "--python-executable", elsewhere, "user.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "Success: no issues found in 1 source file\n"), done.stdout


@pytest.mark.thorough
def test_a_checkout_without_links_does_not_build(built: Built, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(built.source, source, symlinks=True, ignore=shutil.ignore_patterns("weights", "tests"))
    for folder in ("runtime", "models"):  # as Git writes them where it may not make links
        link = source / "densegeo" / folder
        target = link.readlink()
        link.unlink()
        link.write_text(target.as_posix())
    for call in ("build_wheel", "build_sdist", "build_editable"):
        done = backend(source, f"{call}({str(tmp_path)!r})", check=False)
        assert done.returncode == 1
        (sentence,) = done.stderr.splitlines()
        assert "densegeo/models, densegeo/runtime should be symbolic links" in sentence
        assert "git clone -c core.symlinks=true" in sentence
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.thorough
def test_doctor_says_when_the_installation_is_broken(elsewhere: Path, tmp_path: Path) -> None:
    (site,) = (elsewhere.parent.parent / "lib").glob("python*/site-packages")
    broken = tmp_path / "site"
    shutil.copytree(site / "densegeo", broken / "densegeo", ignore=shutil.ignore_patterns("weights"))
    command = (elsewhere, "-c", "import sys; sys.path.insert(0, '.'); from densegeo.cli import main; main(['doctor'])")
    assert run(*command, cwd=broken).returncode == 0
    (broken / "densegeo" / "runtime" / "estimator.py").unlink()
    done = run(*command, cwd=broken)
    assert done.returncode == 1
    assert "No module named 'densegeo.runtime.estimator'" in done.stdout
    shutil.rmtree(broken / "densegeo" / "runtime")
    (broken / "densegeo" / "runtime").write_text("../runtime")
    done = run(*command, cwd=broken)
    assert done.returncode == 1
    assert "lacks densegeo.runtime" in done.stdout


@pytest.mark.slow
def test_pip_installs_the_archive_and_its_tests_pass(built: Built, tmp_path: Path) -> None:
    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site")
    done = run(sys.executable, *install, built.sdist, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "site" / "bin").iterdir()} == {"densegeo"}
    done = run(sys.executable, "-c", "import densegeo; print(densegeo.__file__)", cwd=built.source)
    assert done.stdout.startswith(str(built.source)), done.stderr
    files = ("tests/test_contracts.py", "tests/test_files.py", "-k", "not quickly")  # no timings inside another test
    done = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files, cwd=built.source)
    assert done.returncode == 0, done.stdout
