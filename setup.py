"""What pyproject.toml cannot say about the distributions: the folders behind links, and the readme's links."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
FOLDERS = ("models", "calibration", "export", "runtime", "serving", "kernels", "training", "benchmarks")
# Of the benchmarks, what `densegeo bench` and `densegeo compare` are made of; the rest is run from a checkout.
BENCHMARKS = ("__init__", "compare", "environment", "gpu_monitor", "latency", "latency_report", "other_load")


def check_links(root: Path) -> None:
    """Stop the build where densegeo/FOLDER leads nowhere: the wheel would install and could do nothing."""
    lost = [f"densegeo/{name}" for name in FOLDERS if not (root / "densegeo" / name / "__init__.py").is_file()]
    if lost:
        raise SystemExit(
            f"densegeo cannot be built here: {', '.join(lost)} should be symbolic links to the folders of these names, "
            "which a zip download and Git on Windows leave out. Clone the repository with "
            "`git clone -c core.symlinks=true` (on Windows with developer mode switched on), or install the wheel."
        )


def readme(root: Path) -> str:
    """README.md with the addresses of its files and pictures in full, for pages that do not lie beside them."""
    page = re.search(r'^Source = "(.+)"$', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    version = re.search(r'^__version__ = "(.+)"$', (root / "densegeo" / "__init__.py").read_text(), re.MULTILINE)
    assert page is not None
    assert version is not None

    def absolute(link: re.Match[str]) -> str:
        view = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({page[1]}/{view}/v{version[1]}/{link[3]})"

    text = (root / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)", absolute, text)


class BuildPy(build_py):
    """Leaves out the benchmarks that no command needs."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [row for row in modules if package != "densegeo.benchmarks" or row[1] in BENCHMARKS]


class Sdist(sdist):
    """Keeps the links as links: MANIFEST.in takes the folders themselves."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        for name in FOLDERS:
            (Path(base_dir) / "densegeo" / name).symlink_to(Path("..") / name, target_is_directory=True)


check_links(ROOT)
setup(
    cmdclass={"build_py": BuildPy, "sdist": Sdist},
    long_description=readme(ROOT),
    long_description_content_type="text/markdown",
)
