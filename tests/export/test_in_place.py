"""Outputs that nothing can be renamed over (links, mount points, the working directory), and builds that are ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from densegeo.errors import ResourceError
from densegeo.export.staging import (
    BUNDLE,
    LOCK,
    fills_in_place,
    finish_publishing,
    locked,
    publish,
    remove_published,
    staging_folder,
)
from densegeo.runtime.bundle import MANIFEST, check_files, read_manifest
from tests.support.toy_bundle import make_toy_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two bundles that share some files' names."""
    folder = tmp_path_factory.mktemp("made")
    return {
        "small": make_toy_bundle(folder / "small", ((64, 48),)),
        "other": make_toy_bundle(folder / "other", ((64, 48), (48, 80))),
    }


def put(bundle: Path, output: Path) -> None:
    """As a build does: into the staging folder, and from there into place."""
    finish_publishing(output)
    with locked(output) as folder:
        shutil.copytree(bundle, folder / BUNDLE)
        publish(folder, output)


def require(bundle: Path, output: Path) -> None:
    """The output is this bundle and nothing else."""
    assert read_manifest(output) == read_manifest(bundle)
    check_files(output, read_manifest(output))
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in bundle.iterdir())


@pytest.fixture(params=["link", "link to a link", "dangling link", "working directory"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """(what is named) of a folder in which files are put one by one."""
    disk, path = tmp_path / "disk" / "bundles", tmp_path / "out"
    disk.parent.mkdir()
    if request.param != "dangling link":
        disk.mkdir()
    if request.param == "working directory":
        monkeypatch.chdir(disk)
        yield Path()
        return
    path.symlink_to("disk/bundles")
    if request.param == "link to a link":
        (tmp_path / "again").symlink_to(path)
        path = tmp_path / "again"
    yield path
    assert path.is_symlink()


def test_the_folder_itself_is_filled(output: Path, made: dict[str, Path], tmp_path: Path) -> None:
    assert fills_in_place(output)
    before = output.stat().st_ino if output.exists() else None
    for name in ("other", "small", "other"):
        put(made[name], output)
        require(made[name], tmp_path / "disk" / "bundles")
        require(made[name], output)
    assert before in (None, output.stat().st_ino)


@pytest.mark.parametrize("moves", range(8))
def test_a_build_that_is_killed_while_it_fills(
    moves: int, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of moves it is the old bundle or none; the next build goes on, whatever it is of."""
    (tmp_path / "disk").mkdir()
    output = tmp_path / "out"
    output.symlink_to("disk")
    put(made["small"], output)
    replace, count = os.replace, iter(range(100))

    def killed(source: Path, target: Path) -> None:
        if next(count) == moves:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with suppress(KeyboardInterrupt), locked(output) as folder:
        (folder / "references.json").write_text("{}")  # a finished stage, so that the folder stays
        shutil.copytree(made["other"], folder / BUNDLE)
        publish(folder, output)
    assert next(count) == moves + 1
    monkeypatch.setattr(os, "replace", replace)
    if (output / MANIFEST).exists():
        assert moves == 0
        check_files(output, read_manifest(made["small"]))
    finish_publishing(output)
    remove_published(output)
    require(made["other"], output)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "holiday.jpg").write_bytes(b"mine")
    (tmp_path / "out").symlink_to("disk")
    with pytest.raises(ResourceError, match="exists and is no bundle: it is left alone"), locked(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["holiday.jpg"]


MOUNTED = """
import sys
from pathlib import Path
from densegeo.export.staging import fills_in_place, staging_folder
from tests.export.test_in_place import put, require
bundles, output = [Path(name) for name in sys.argv[1:3]], Path(sys.argv[3])
assert fills_in_place(output)
assert staging_folder(output).parent == output.resolve()
for bundle in (*bundles, *bundles):
    put(bundle, output)
    require(bundle, output)
print("done")
"""


@pytest.mark.parametrize("mount", ["mount --bind disk 'out put'", "mount -t tmpfs none 'out put'"])
def test_a_mount_point_is_filled(mount: str, made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out put").mkdir()
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user and mount namespaces here")
    words = " ".join(f"'{path}'" for path in (*made.values(), tmp_path / "out put"))
    script = f"cd '{tmp_path}' && {mount} && cd '{ROOT}' && '{sys.executable}' -c '{MOUNTED}' {words}"
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
    assert (tmp_path / "disk" / MANIFEST).is_file() == ("bind" in mount)


TERMINATED = """
import sys, time, typer
from pathlib import Path
from densegeo.cli import guarded
from densegeo.export.staging import locked
def build():
    with locked(Path(sys.argv[1])) as folder:
        (folder / "bundle").mkdir()
        (folder / "bundle" / "denoiser.safetensors").write_bytes(bytes(1000))
        print("building", flush=True)
        time.sleep(600)
app = typer.Typer()
app.command()(build)
guarded(lambda: app(args=[]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_build_that_is_terminated_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    command = [sys.executable, "-c", TERMINATED, str(output)]

    def heeding() -> None:
        """Tests that run under nohup ignore SIGHUP, and so would what they start."""
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heeding) as build:
        assert build.stdout is not None
        assert build.stdout.readline() == "building\n"
        assert (staging_folder(output) / LOCK).is_file()
        build.send_signal(number)
        assert build.wait(timeout=60) == 128 + number
    assert list(tmp_path.iterdir()) == []
