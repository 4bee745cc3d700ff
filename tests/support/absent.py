"""The command in a process that lacks some libraries, and whose children lack them too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.project import ROOT

# As sitecustomize: the named modules cannot be imported, as on a board that has none of them.
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
RUN = """
import sys
from densegeo import cli
try:
    cli.main(sys.argv[1:])
finally:
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""
BUILD_SIDE = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors", "diffusers", "transformers")


def start_without(folder: Path, names: tuple[str, ...], *arguments: object) -> subprocess.Popen[str]:
    """The command in a process that cannot import these modules, and whose children cannot either."""
    site = folder / f"without-{len(names)}"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(ABSENT.format(names=repr(set(names))))
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "PYTHONPATH": path})


def run_without(folder: Path, names: tuple[str, ...], *arguments: object) -> tuple[int, str, str]:
    with start_without(folder, names, *arguments) as process:
        out, err = process.communicate(timeout=280)
    return process.returncode, out, err
