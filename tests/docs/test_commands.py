"""Every command on the pages is one that exists, with these options; those that can be run here are run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import typer
from PIL import Image

from densegeo import cli
from tests.resolution import project
from tests.support.documentation import PAGES, Command, commands
from tests.support.project import ROOT

ALL = [command for page in PAGES for command in commands(page)]
BUNDLES = ("BUNDLE", "A", "B")
# Runs that are shown and not run here, by how they begin, and why.
NOT_RUN = {
    "pip install": "changes the environment: its extras are checked",
    "uv pip install": "the same",
    "git clone": "needs the network",
    "make": "its target is checked; CI runs `make test-thorough`, people the others",
    "densegeo fetch": "needs the network; tests/export/test_downloads.py runs it on a server of its own",
    "densegeo build --model fe2e ": "needs weights; tests/full_size.py runs it on random ones",
    "densegeo build --model fiffdepth": "needs weights; tests/export/test_fiffdepth.py runs it on small ones",
    "densegeo build --model unet-normals": "tests/export/test_normals_alone.py runs it",
    "densegeo verify out/unet-normals": "the same",
    "densegeo serve out/fe2e out/fiffdepth": "needs weights; tests/serving/test_safety.py runs its options",
    "densegeo infer BUNDLE rtsp:": "needs a camera; tests/test_infer_camera.py runs it on a server of its own",
    "densegeo export-triton": "needs weights; tests/fleet/test_triton_repository.py runs it on others",
    "tritonserver": "tests/fleet/test_triton.py runs one",
    "densegeo serve out/fe2e --ray": "needs weights and a cluster; tests/fleet/test_ray_serving.py runs it on one",
    "densegeo infer out/fe2e": "needs weights and a cluster; tests/fleet/test_ray.py runs it on one machine",
    "densegeo engines BUNDLE": "needs a GPU; tests/export/test_renewal.py runs it for a named one",
    "densegeo verify BUNDLE --backend tensorrt": "needs a GPU",
    "densegeo verify out/fe2e-tiny-trt": "needs a GPU",
    "python benchmarks/gpu_check.py": "needs a GPU; tests/benchmarks/test_gpu_check.py runs it at toy size",
    "python benchmarks/serving.py": "a minute of load",
    "python docs/tools/pages.py": "test_pages.py holds what it makes",
    "densegeo demo": "tests/test_demo.py runs it",
}


def as_typed(command: Command) -> str:
    return " ".join(command.last) + " "


def reason(command: Command) -> str | None:
    """Why it is not run here, or None."""
    return next((why for begins, why in NOT_RUN.items() if as_typed(command).startswith(begins)), None)


def starting(*begins: str) -> list[Command]:
    return [command for command in ALL if as_typed(command).startswith(begins)]


def test_there_are_commands() -> None:
    assert len(ALL) > 40
    for begins in NOT_RUN:
        assert starting(begins) or begins == "densegeo demo", f"no page says {begins!r} any more"


@pytest.mark.parametrize("command", starting("densegeo "), ids=lambda command: command.line[:60])
def test_the_command_line_takes_it(command: Command) -> None:
    """Its name, options and number of arguments are right; names of bundles stand for the one that comes along."""
    if command.last[1] in ("build", "calibrate", "fetch"):
        pytest.importorskip("torch")
    known = [*BUNDLES, *(word for other in ALL for word in other.words if word.startswith("out/"))]
    words = ["fe2e-tiny" if word in known else word for word in command.last[1:]]
    group = typer.main.get_command(cli.app)
    parent = group.make_context("densegeo", ["doctor"])
    name, actual, rest = group.resolve_command(parent, words)  # type: ignore[attr-defined]
    actual.make_context(name, rest, parent=parent)


def test_a_wrong_option_would_be_noticed() -> None:
    wrong = Command("page", "", ("densegeo", "infer", "fe2e-tiny", "photos", "-o", "out", "--no-such-option"))
    with pytest.raises(Exception, match="No such option: --no-such-option"):
        test_the_command_line_takes_it(wrong)


@pytest.mark.parametrize("command", starting("make ", "pip ", "uv ", "python "), ids=lambda command: command.line[:60])
def test_targets_extras_and_scripts_exist(command: Command) -> None:
    words = command.last
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        extras = {extra for actual in re.findall(r"\[([\w,-]+)\]", command.line) for extra in actual.split(",")}
        assert extras <= set(project()["optional-dependencies"])


@pytest.mark.integration
@pytest.mark.thorough
@pytest.mark.parametrize("command", starting("python benchmarks/"), ids=lambda command: command.line[:60])
def test_scripts_take_these_options(command: Command) -> None:
    _, script, *options = command.last
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    for option in (word for word in options if word.startswith("--")):
        assert option in done.stdout


def shell(folder: Path, *lines: str, timeout: int = 280) -> str:
    """Run lines as they are typed, with this checkout's `densegeo` and fe2e-tiny as BUNDLE; returns what they print."""
    bin_ = folder / "bin"
    bin_.mkdir(exist_ok=True)
    starter = bin_ / "densegeo"
    starter.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m densegeo "$@"\n')
    starter.chmod(0o755)
    text = "\n".join(re.sub(r"\b(BUNDLE|A|B)\b", "fe2e-tiny", line) for line in lines)
    script = f'set -eo pipefail\nPATH="{bin_}:$PATH"\n{text}\n'
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(*begins: str) -> list[str]:
    """The lines that begin so, of all pages, each once; those that are not run left out."""
    actual = dict.fromkeys(command.line for command in starting(*begins) if reason(command) is None)
    assert actual
    return list(actual)


RUN = {
    "photographs": ("densegeo infer BUNDLE photos/", "densegeo infer BUNDLE - ", "densegeo infer BUNDLE --list"),
    "films": ("densegeo infer BUNDLE walk",),
    "machine": ("densegeo doctor", "densegeo inspect fe2e", "densegeo verify fe2e-tiny"),
    "timings": ("densegeo bench", "densegeo compare"),
    "bags": ("densegeo bag",),
    "server": ("densegeo serve fe2e-tiny", "curl"),
    "builds": (
        "densegeo build --model fe2e-tiny",
        "densegeo calibrate out/fe2e-tiny",
        "densegeo inspect out/fe2e-tiny-trt",
    ),
}


def test_every_command_is_run_or_has_a_reason() -> None:
    begins = tuple(begin for group in RUN.values() for begin in group)
    left = [command.line for command in ALL if reason(command) is None and not as_typed(command).startswith(begins)]
    assert left == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    with files("densegeo").joinpath("photographs/hall.jpg").open("rb") as stream:
        photograph = Image.open(stream).resize((256, 192))
    for name in ("photo.jpg", "photos/hall.jpg"):
        photograph.save(tmp_path / name)
    (tmp_path / "list.txt").write_text("photo.jpg\n")
    return tmp_path


@pytest.mark.integration
@pytest.mark.thorough
def test_photographs(folder: Path) -> None:
    for line in lines(*RUN["photographs"]):
        if "--skip-existing" not in line:
            shutil.rmtree(folder / "out", ignore_errors=True)  # each line begins anew, but that one
        shell(folder, line)
        assert list((folder / "out").rglob("*_geometry.json")), line


@pytest.mark.integration
@pytest.mark.thorough
def test_films(folder: Path) -> None:
    pytest.importorskip("av")
    from tests.support.film_files import pictures, write_film

    write_film(folder / "walk.mp4", pictures(3), [0, 0.1, 0.2])
    for line in lines(*RUN["films"]):
        shutil.rmtree(folder / "out", ignore_errors=True)
        shell(folder, line)
        assert (folder / "out" / "walk_side_by_side.mp4").is_file()


@pytest.mark.integration
@pytest.mark.thorough
def test_the_machine(folder: Path) -> None:
    pytest.importorskip("openvino")
    assert "verified: with openvino" in shell(folder, *lines(*RUN["machine"]))


@pytest.mark.slow
def test_timings(folder: Path) -> None:
    typed = [line.replace("densegeo bench", "densegeo bench --runs 2") for line in lines(*RUN["timings"])]
    shell(folder, "mkdir -p out", *typed, timeout=3000)
    assert (folder / "out" / "runs.png").stat().st_size > 1000


@pytest.mark.integration
@pytest.mark.thorough
def test_bags(folder: Path) -> None:
    pytest.importorskip("rosbags")
    from tests.support.bags import room

    bag = room(folder / "recording")
    (file,) = bag.glob("*.mcap")
    shutil.copy(file, folder / "recording.mcap")
    for line in lines(*RUN["bags"]):
        (folder / "out.mcap").unlink(missing_ok=True)
        shell(folder, line)
        assert (folder / "out.mcap").stat().st_size > 0


@pytest.mark.integration
@pytest.mark.thorough
def test_the_server(folder: Path) -> None:
    pytest.importorskip("starlette")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    from tests.support.serving import started

    with started("fe2e-tiny", "--threads", "1") as server:
        (line,) = lines("curl")
        assert "localhost:8000" in line
        shell(folder, line.replace("localhost:8000", server.url.removeprefix("http://")))
    assert (folder / "photo.npz").read_bytes()[:2] == b"PK"


@pytest.mark.slow
def test_builds(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    photograph = Image.open(folder / "photo.jpg")
    for number in range(8):  # the fewest that it takes
        photograph.rotate(9 * number).save(folder / "photos" / f"{number}.jpg")
    said = shell(folder, *(line.replace(" DIR ", " photos ") for line in lines(*RUN["builds"])), timeout=3000)
    assert "matmul" in said
    assert (folder / "out" / "two-rewrites-less" / "manifest.json").is_file()
