"""The folder that a build works in, and the processes that it starts: what is not its own is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from densegeo.errors import ResourceError
from densegeo.export.build import build_bundle
from densegeo.export.staging import LOCK, locked
from tests.support.checkpoints import options

STAGING = ".bundle.building"


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    for _ in range(2):
        with locked(output) as folder:
            assert folder == tmp_path / STAGING
            assert folder.stat().st_mode & 0o777 == 0o700
            with pytest.raises(ResourceError, match="another build"), locked(output):
                pass
            assert folder.is_dir()
        assert list(tmp_path.iterdir()) == []


def photographs(folder: Path) -> None:
    folder.mkdir()
    (folder / "holiday.txt").write_text("mine")


def somebodys(folder: Path) -> None:
    photographs(folder)
    (folder / LOCK).touch()
    if os.geteuid() != 0:
        pytest.skip("only root can give folders away")
    os.chown(folder, 12345, -1)


def elsewhere(folder: Path) -> None:
    photographs(folder.with_name("photographs"))
    (folder.with_name("photographs") / LOCK).touch()
    folder.symlink_to("photographs")


@pytest.mark.parametrize("make", [photographs, somebodys, elsewhere])
def test_a_folder_that_is_not_ours_is_left_alone(
    make: Callable[[Path], None], small_checkpoint: Path, tmp_path: Path
) -> None:
    make(tmp_path / STAGING)
    with pytest.raises(ResourceError, match="left alone"):
        build_bundle(options(small_checkpoint, tmp_path / "bundle"))
    assert (tmp_path / STAGING / "holiday.txt").read_text() == "mine"


def test_an_engines_builder_ends_with_its_build() -> None:
    """Killed builds cannot stop it, and what it wrote later would lie among the files of the next one."""
    code = "from densegeo.export.engine_worker import end_with_parent; print('waits', flush=True); end_with_parent()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "waits\n"
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=1)
        worker.stdin.close()
        assert worker.wait(timeout=30) == 1
