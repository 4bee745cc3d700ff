"""Films and cameras: times, rotation, one range of colours, frames' results, damage, cameras that break off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from densegeo.errors import ImageError
from densegeo.extras import install_hint
from densegeo.films import FilmFrame, FilmWriter, in_order, newest, opened, sampled, span_of
from densegeo.records import JOURNAL
from densegeo.runtime import Estimator
from tests.support.command_line import run
from tests.support.film_files import http_camera, pictures, write_film
from tests.support.rtsp import rtsp_camera

pytest.importorskip("av")
pytestmark = pytest.mark.integration
TIMES = [0.0, 0.1, 0.15, 0.4, 0.5, 1.0]  # uneven, as telephones record


def read(path: Path) -> list[FilmFrame]:
    with opened(str(path)) as frames:
        return list(frames)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return write_film(tmp_path / "walk.mp4", pictures(6), TIMES)


def test_a_film_in_a_film_out(toy_bundle: Path, film: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("infer", toy_bundle, film, "-o", out, "--frames", "-f", "png", "-q") == 0
    made, source = read(out / "walk_side_by_side.mp4"), read(film)
    assert [round(frame.seconds, 3) for frame in made] == TIMES
    with Estimator(toy_bundle) as estimator:
        results = [estimator(frame.pixels) for frame in source]
        span = span_of([estimator(pixels) for pixels in sampled(str(film))])
        for frame, result, original in zip(made, results, source, strict=True):
            expected = np.asarray(result.visualize(original.pixels, span=span))
            assert frame.pixels.shape == expected.shape == (64, 3 * 96, 3)
            error = np.abs(frame.pixels.astype(int) - expected)
            assert error.mean() < 12  # what H.264 with half as many colour samples leaves of noise-like normals
            assert error[:, :96].mean() < 6
    assert sorted(path.name for path in (out / "walk").glob("*_normals.png")) == [
        f"{i:06d}_normals.png" for i in range(6)
    ]
    record = json.loads((out / "walk" / "000003_geometry.json").read_text())["source"]
    assert (record["path"], record["frame"], record["seconds"]) == (str(film), 3, 0.4)
    sidecar = json.loads((out / "walk_geometry.json").read_text())
    assert sidecar["frames"] == 6
    assert sidecar["span"] == list(span)
    (line,) = map(json.loads, (out / JOURNAL).read_text().splitlines())
    assert (line["name"], line["status"], line["frames"]) == ("walk", "done", 6)
    assert run("infer", toy_bundle, film, "-o", out, "-q") == 2
    assert run("infer", toy_bundle, film, "-o", out, "-f", "png", "--skip-existing", "-q") == 0
    assert (out / JOURNAL).read_text().count("\n") == 1


def test_turned_films_are_upright(tmp_path: Path) -> None:
    straight, turned = (
        write_film(tmp_path / f"{turn}.mp4", pictures(2), TIMES[:2], turned=turn) for turn in (False, True)
    )
    for before, after in zip(read(straight), read(turned), strict=True):
        np.testing.assert_array_equal(after.pixels, np.rot90(before.pixels, -1))  # to the right
        assert tuple(after.pixels[4, -4] > 128) == (True, False, False)  # the red corner, now at the right


def test_one_range_of_colours_for_all_frames(toy_bundle: Path, tmp_path: Path) -> None:
    """A frame of one depth has its own place in the film's range, and not the middle of its own."""
    frames = [np.full((64, 96, 3), level, np.uint8) for level in (60, 128, 200)]
    film = write_film(tmp_path / "levels.mp4", frames, TIMES[:3])
    assert run("infer", toy_bundle, film, "-o", tmp_path / "out", "-q") == 0
    colours = [
        frame.pixels[:, 96:192].reshape(-1, 3).mean(axis=0)
        for frame in read(tmp_path / "out" / "levels_side_by_side.mp4")
    ]
    assert np.linalg.norm(colours[0] - colours[1]) > 60
    assert np.linalg.norm(colours[1] - colours[2]) > 60


def test_odd_sizes_and_equal_times(tmp_path: Path) -> None:
    with FilmWriter(tmp_path / "odd.mp4") as film:
        for seconds in (0.0, 0.0, 0.5):
            film.add(np.full((33, 51, 3), 200, np.uint8), seconds)
    frames = read(tmp_path / "odd.mp4")
    assert [frame.pixels.shape for frame in frames] == [(32, 50, 3)] * 3

    def fail() -> None:
        with FilmWriter(tmp_path / "broken.mp4") as film:
            film.add(np.zeros((32, 50, 3), np.uint8), 0.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["odd.mp4"]


def test_what_is_no_film(toy_bundle: Path, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.mp4").write_text("no film at all")
    (tmp_path / "half.mp4").write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    for name in ("text", "half"):
        assert run("infer", toy_bundle, tmp_path / f"{name}.mp4", "-o", tmp_path / name, "--json") == 1
        captured = capsys.readouterr()
        assert "cannot be opened" in json.loads(captured.out)["failed"][0]["error"]
        assert not list((tmp_path / name).glob("*.mp4"))
    assert run("infer", toy_bundle, "rtsp://127.0.0.1:9/none", "-o", tmp_path / "rtsp", "--json") == 1
    assert "Connection refused" in json.loads(capsys.readouterr().out)["failed"][0]["error"]


def test_films_without_the_extra(
    toy_bundle: Path, film: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("densegeo.infer_options.installed", lambda module: module != "av")
    assert run("infer", toy_bundle, film, "-o", film.parent / "out") == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert install_hint("video") in error


def test_a_camera_that_breaks_off_keeps_what_it_gave(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with http_camera(pictures(5)) as address:
        assert run("infer", toy_bundle, address, "-o", tmp_path / "out", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert "broke off after 5 frames" in said["failed"][0]["error"]
    made = read(tmp_path / "out" / "camera_1_side_by_side.mp4")
    assert 1 <= len(made) <= 5  # the newest only
    np.testing.assert_allclose(made[-1].pixels[4, 4], (255, 0, 0), atol=40)


def test_a_frame_that_is_refused_does_not_end_its_film(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scale of a flat frame cannot be told; of such samples the range of colours is not made either."""
    frames = pictures(6)
    frames[0][:] = frames[3][:] = 128
    film, out = write_film(tmp_path / "walk.mp4", frames, TIMES), tmp_path / "out"
    options = ("-f", "png16", "--near", 1, "--far", 9, "--frames", "--json")
    assert run("infer", toy_bundle, film, "-o", out, *options) == 1
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert [(row["source"], row["frame"]) for row in said["failed"]] == [(str(film), 0), (str(film), 3)]
    assert (said["done"], said["not_reached"]) == (1, 0)
    assert f"failed {film}, frame 3: The prediction is flat" in captured.err
    assert [round(frame.seconds, 2) for frame in read(out / "walk_side_by_side.mp4")] == [0.0, 0.05, 0.4, 0.9]
    kept = {f"{index:06d}_{file}" for index in (1, 2, 4, 5) for file in ("depth_mm.png", "geometry.json")}
    assert {path.name for path in (out / "walk").iterdir()} == kept
    lines = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    assert [(line["name"], line["status"], line.get("frame")) for line in lines] == [
        ("walk/000000", "failed", 0),
        ("walk/000003", "failed", 3),
        ("walk", "done", None),
    ]
    sidecar = json.loads((out / "walk_geometry.json").read_text())
    assert (sidecar["frames"], sidecar["refused"]) == (4, 2)
    assert run("infer", toy_bundle, film, "-o", out, *options, "--skip-existing") == 0  # they would be refused again
    captured = capsys.readouterr()
    assert "1 done before, 2 frames that were refused when" in captured.err
    assert json.loads(captured.out)["skipped"]["frames that were refused when their films were done"] == 2


def test_a_film_of_refused_frames_leaves_nothing(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = write_film(tmp_path / "fog.mp4", [np.full((64, 96, 3), 90, np.uint8)] * 3, TIMES[:3])
    out = tmp_path / "out"
    options = ("--near", 1, "--far", 9, "--frames", "--json")
    assert run("infer", toy_bundle, film, "-o", out, *options) == 1
    said = json.loads(capsys.readouterr().out)
    assert "None of its 3 frames gave a result. The first: The prediction is flat" in said["failed"][-1]["error"]
    assert (said["done"], said["not_reached"]) == (0, 0)
    assert [path.name for path in out.iterdir()] == [JOURNAL]


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))  # writes beyond fail, as on a full disk
from densegeo.cli import main
main(sys.argv[1:])
"""


def test_a_disk_too_full_for_the_film(toy_bundle: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), dtype=np.uint8)
    film = write_film(tmp_path / "noise.mp4", list(noise), [index / 10 for index in range(20)])
    arguments = ["infer", str(toy_bundle), str(film), "-o", str(tmp_path / "out"), "--frames", "-f", "json"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [JOURNAL]  # frames' results neither


def test_a_camera_over_rtsp(toy_bundle: Path, tmp_path: Path) -> None:
    """A server of the protocol, with packets that FFmpeg's own sender made."""
    with rtsp_camera(pictures(120)) as address:
        assert run("infer", toy_bundle, address, "-o", tmp_path / "out", "--max-frames", 4, "-q") == 0
    made = read(tmp_path / "out" / "camera_1_side_by_side.mp4")
    assert len(made) == 4
    assert made[-1].seconds > 0.1  # times are the camera's
    np.testing.assert_allclose(made[-1].pixels[4, 4], (255, 0, 0), atol=40)


def test_a_camera_that_hangs_up_is_told_of(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rtsp_camera(pictures(12)) as address:
        assert run("infer", toy_bundle, address, "-o", tmp_path / "out", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)["warnings"]
    assert "ended by itself" in told["warning"]
    assert len(read(tmp_path / "out" / "camera_1_side_by_side.mp4")) >= 1


def test_a_camera_s_frames_can_be_counted_out(toy_bundle: Path, tmp_path: Path) -> None:
    with http_camera(pictures(400)) as address:
        assert run("infer", toy_bundle, address, "-o", tmp_path / "out", "--max-frames", 2, "-q") == 0
    assert len(read(tmp_path / "out" / "camera_1_side_by_side.mp4")) == 2


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_film_leaves_nothing_half_written(
    name: str, code: int, toy_bundle: Path, tmp_path: Path
) -> None:
    film = write_film(tmp_path / "long.mp4", pictures(500), [index / 30 for index in range(500)])
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "densegeo",
        "infer",
        str(toy_bundle),
        str(film),
        "-o",
        str(out),
        "--frames",
        "-f",
        "json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while len(list(out.rglob("*_geometry.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert [path.name for path in out.iterdir()] == [JOURNAL]


def test_frames_keep_their_order_and_few_are_read_ahead() -> None:
    taken: list[int] = []

    def frames():
        for index in range(20):
            taken.append(index)
            yield FilmFrame(np.zeros((1, 1, 3), np.uint8), index / 10, index)

    seen = []
    for frame, made in in_order(frames(), lambda frame: frame.index**2, 3):
        assert made == frame.index**2
        assert len(taken) - len(seen) <= 5
        seen.append(frame.index)
    assert seen == list(range(20))


def test_newest_drops_what_came_meanwhile_and_carries_errors() -> None:
    def frames():
        for index in range(50):
            time.sleep(0.002)
            yield index
        raise ImageError("gone")

    seen: list[int] = []

    def look() -> None:
        for frame in newest(frames()):
            seen.append(frame)
            time.sleep(0.02)

    with pytest.raises(ImageError, match="gone"):
        look()
    assert seen == sorted(set(seen))
    assert len(seen) < 40
    assert seen[-1] == 49
