"""What is imported is declared: in densegeo's own dependencies, or in the extra that a folder goes with."""

from __future__ import annotations

import ast
import re
import sys
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from densegeo.doctor import EXTRAS
from densegeo.errors import ConfigError
from tests.resolution import normal, project
from tests.support.project import ROOT, imported

# Folder -> the extras that people install to use it; a backend's library is imported by its backend alone.
BACKENDS = ("cpu", "gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch", "metrics", "exr", "heic", "camera")
FOLDERS = {
    "densegeo": ("cpu", "video", "ray"),
    "densegeo/fleet": ("ray", "serve"),
    "densegeo/ros": ("bags",),
    "runtime": BACKENDS,
    "serving": ("serve",),
    "models": ("torch",),
    "kernels": ("torch", "kernels"),
    "calibration": ("export", "cpu"),
    "export": ("export", "cpu", "text-encoder", "tensorrt-rtx"),
    "benchmarks": ("dev",),
    "training": ("dev",),
    "tests": ("dev",),
}
# Imported name -> distribution, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "mcap_ros2": "mcap-ros2-support",
    "pillow_heif": "pillow-heif",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "yaml": "pyyaml",
}
# These run in environments of their own.
NODE_TESTS = ROOT / "tests" / "ros2"
TRITON_TESTS = [ROOT / "tests" / "fleet" / name for name in ("triton_cases.py", "tritonserver.py")]
ELSEWHERE = [*NODE_TESTS.glob("*.py"), *TRITON_TESTS]
CUDA = {"core": "cuda-core", "bindings": "cuda-bindings"}
# A machine's own; opentelemetry and pynvml are asked for and done without.
FOREIGN = {"tensorrt", "pynvml", "opentelemetry", "triton_python_backend_utils"}


def declared(extras: tuple[str, ...]) -> set[str]:
    """Distributions that densegeo with these extras asks for by name."""
    lists = project()
    actual, expected = {normal(Requirement(text).name) for text in lists["dependencies"]}, list(extras)
    while expected:
        for row in map(Requirement, lists["optional-dependencies"][expected.pop()]):
            if row.name == "densegeo":
                expected += row.extras
            else:
                actual.add(normal(row.name))
    return actual


def distribution(module: str) -> str:
    first, _, rest = module.partition(".")
    if first == "cuda":
        return CUDA[rest.partition(".")[0]]
    return normal(DISTRIBUTIONS.get(first, first))


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_are_declared(folder: str) -> None:
    allowed = declared(FOLDERS[folder])
    nested = [path for path in (ROOT / folder).rglob("*.py") if path not in ELSEWHERE]
    paths = [path for path in nested if folder != "densegeo" or path.parent == ROOT / folder]
    assert paths
    for path in paths:
        for module in imported(ast.parse(path.read_text())):
            first = module.partition(".")[0]
            if first not in {"densegeo", "tests", *FOREIGN, *sys.stdlib_module_names}:
                assert distribution(module) in allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_the_node_declares_what_it_imports() -> None:
    """Those of ROS in package.xml, densegeo's own apart."""
    node = ROOT / "ros2" / "densegeo_ros"
    listed = {tag.text for tag in ElementTree.parse(node / "package.xml").iter("exec_depend")}
    actual = {
        module.partition(".")[0] for path in node.rglob("*.py") for module in imported(ast.parse(path.read_text()))
    }
    own = {"densegeo", "densegeo_ros", "numpy", "setuptools", *sys.stdlib_module_names}
    assert actual - own == listed


def test_the_nodes_tests_declare_what_they_import() -> None:
    expected = (ROOT / "ros2" / "test-requirements.in").read_text().splitlines()
    names = {line for line in expected if line and not line.startswith("#")}
    of_rclpy = {"rcl_interfaces"}  # what rclpy itself needs
    for path in NODE_TESTS.glob("*.py"):
        for module in imported(ast.parse(path.read_text())):
            first = module.partition(".")[0]
            known = {distribution(module), f"ros-kilted-{normal(first)}"} & names
            if path.name in ("test_node.py", "environment.py", "soak.py"):  # they start that environment
                continue
            own = {"densegeo", "densegeo_ros", "tests", *of_rclpy, *sys.stdlib_module_names}
            assert known or first in own, f"{path.name} imports {module}"


def test_the_tests_on_tritonserver_declare_what_they_import() -> None:
    expected = (ROOT / "tests" / "fleet" / "triton-requirements.in").read_text().splitlines()
    names = {normal(Requirement(line).name) for line in expected if line and not line.startswith("#")}
    for path in TRITON_TESTS:
        for module in imported(ast.parse(path.read_text())):
            first = module.partition(".")[0]
            own = {"densegeo", "tests", *sys.stdlib_module_names}
            assert first in own or distribution(module) in names, f"{path.name} imports {module}"


def test_onnxruntime_is_imported_in_one_place() -> None:
    """Which keeps it from reporting what it runs."""
    files = [path for folder in FOLDERS if folder != "tests" for path in (ROOT / folder).glob("**/*.py")]
    assert [path.name for path in files if re.search(r"import onnxruntime\b(?!_)", path.read_text())] == []
    places = [path.name for path in files if 'import_module("onnxruntime")' in path.read_text()]
    assert set(places) == {"onnx_runtime.py"}


def test_doctor_knows_every_extra() -> None:
    """`dev` and `docs` apart, which are for work on densegeo itself."""
    own = ("dev", "docs")
    extras = {extra.name: {normal(name) for name in extra.distributions} for extra in EXTRAS}
    base = declared(())
    assert extras == {name: declared((name,)) - base for name in project()["optional-dependencies"] if name not in own}


def test_a_build_takes_whichever_onnxruntime_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    from densegeo.export.keys import versions

    real = metadata.version

    def only_gpu(name: str) -> str:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", only_gpu)
    assert versions()["onnxruntime"] == onnxruntime.__version__


def test_a_build_without_onnxruntime_says_so_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from densegeo.export.build import build_bundle
    from densegeo.export.build_options import BuildOptions

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    options = BuildOptions(model="fe2e", output=tmp_path / "bundle")
    with pytest.raises(ConfigError, match=r"\[cpu\].*the extra gpu"):
        build_bundle(options)


def test_the_export_extra_leaves_the_choice_of_onnxruntime() -> None:
    """The CPU's distribution would overwrite the files of the GPU's."""
    for extra in ("export", "text-encoder", "torch", "openvino", "tensorrt", "tensorrt-rtx", "kernels"):
        assert not {name for name in declared((extra,)) if name.startswith("onnxruntime")}, extra
