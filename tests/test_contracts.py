"""Promises about imports and names, checked on the files and in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [
    name
    for name in ("models", "calibration", "export", "runtime", "serving", "kernels", "benchmarks")
    if (ROOT / name).is_dir()
]
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "scipy", "sklearn", "matplotlib", "pydantic")


def python(code: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_contracts_hold() -> None:
    pytest.importorskip("importlinter")
    # In a process of its own: it reconfigures logging.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    python(code, str(ROOT / "pyproject.toml"))


def test_no_module_in_export_hides_a_library() -> None:
    """`python export/build_engine.py` puts the folder first on `sys.path`: `export/onnx.py` would be `import onnx`."""
    own = {path.stem for path in (ROOT / "export").glob("*.py")} | {
        p.name for p in (ROOT / "export").iterdir() if p.is_dir()
    }
    own -= {"__init__", "__pycache__"}
    assert not own & set(sys.stdlib_module_names)
    assert not own & set(metadata.packages_distributions())


def test_errors_import_nothing() -> None:
    tree = ast.parse((ROOT / "densegeo" / "errors.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert all(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in imported)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_packages_through_relative_links(folder: str) -> None:
    link = ROOT / "densegeo" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert (ROOT / folder / "__init__.py").is_file()


@pytest.mark.parametrize("folder", FOLDERS)
def test_code_imports_itself_through_densegeo(folder: str) -> None:
    """A bare `import runtime` would load a second copy of everything, and only from the repository root."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & set(FOLDERS), path


def test_runtime_imports_nothing_heavy() -> None:
    loaded = python("import sys, densegeo.runtime; print(*sorted({n.partition('.')[0] for n in sys.modules}))").split()
    assert not set(loaded) & set(HEAVY)


def test_running_a_bundle_needs_no_torch(toy_bundle: Path) -> None:
    code = """
import sys, numpy
from densegeo.runtime import Estimator
Estimator(sys.argv[1])(numpy.zeros((48, 64, 3), dtype=numpy.uint8)).visualize()
print(*sorted({n.partition(".")[0] for n in sys.modules}))
"""
    loaded = set(python(code, str(toy_bundle)).split())
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "onnx", "safetensors"}


def test_runtime_imports_quickly() -> None:
    """Under 0.3 s of processor time, the best of twelve: other processes may be busy on this machine."""
    code = "import time; start = time.process_time(); import densegeo.runtime; print(time.process_time() - start)"
    assert min(float(python(code)) for _ in range(12)) < 0.3


def test_runtime_from_the_root_is_the_same_class() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import runtime, densegeo; "
    code += "print(runtime.Estimator is densegeo.Estimator)"
    assert python(code, str(ROOT)) == "True"


def test_runtime_requirements_are_light() -> None:
    requirements = [r for r in metadata.requires("densegeo") or [] if "extra ==" not in r]
    names = {requirement.split(">")[0].split(";")[0].strip().lower() for requirement in requirements}
    assert names == {"numpy", "pillow", "msgspec", "typer", "rich"}
