"""`densegeo infer` on folders: which images, which names, what is there already, what fails, and how it ends."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densegeo.inference import Making
from densegeo.progress import progress
from densegeo.records import JOURNAL
from densegeo.runtime import Estimator
from tests.support.command_line import run
from tests.support.infer import journal, put, put_photos, snapshot, summary
from tests.support.toy_bundle import make_toy_bundle

pytestmark = pytest.mark.integration


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return put_photos(tmp_path / "photos")


def test_results_mirror_the_tree_and_name_their_sources(
    toy_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = photos / "out"  # inside, where the next run must not look
    arguments = ("infer", toy_bundle, photos, "-o", out, "--format", "npy,png", "--json")
    assert run(*arguments) == 0
    said = summary(capsys)
    assert said["done"] == 5
    assert said["skipped"] == {"hidden": 2, ".txt (no images)": 1}
    names = {
        "a": "a.png",
        "b": "b.jpg",
        "deep/a": "deep/a.png",
        "deep/c": "deep/c.webp",
        "other/deep/a": "other/deep/a.PNG",
    }
    for name, file in names.items():
        source = json.loads((out / f"{name}_geometry.json").read_text())["source"]
        assert source["path"] == str(photos / file)
        assert source["sha256"] == hashlib.sha256((photos / file).read_bytes()).hexdigest()
        assert source["bundle"]["path"] == str(toy_bundle)
        assert len(source["bundle"]["sha256"]) == 64
        with Estimator(toy_bundle) as estimator:
            np.testing.assert_array_equal(np.load(out / f"{name}_prediction.npy"), estimator(photos / file).prediction)
    lines = journal(out)
    assert {line["name"]: line["source"] for line in lines} == {
        name: str(photos / file) for name, file in names.items()
    }
    written = {file for line in lines for file in line["files"]} | {JOURNAL}
    assert written == set(snapshot(out))

    before = snapshot(out)
    assert run(*arguments) == 2  # before anything is run
    assert "5 of 5 results are in" in capsys.readouterr().err.replace("\n", " ").replace("│", "")
    assert run(*arguments, "--skip-existing") == 0
    said = summary(capsys)
    assert (said["done"], said["skipped"]["done before"], said["skipped"]["output folder"]) == (0, 5, 1)
    assert snapshot(out) == before
    assert run("infer", toy_bundle, photos, "-o", photos.parent / "elsewhere", "--json") == 0
    assert (
        summary(capsys)["skipped"]["earlier results"] >= 15
    )  # of the first run; another folder is no reason to take them


def test_what_fails_is_counted_and_the_rest_goes_on(
    toy_bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:50])
    (photos / "empty.jpg").write_bytes(b"")
    put(photos / f"{'y' * 250}.png")  # as long as names can be: its results' names would be longer
    put(photos / "blocked" / "d.png")
    out.mkdir()
    (out / "blocked").write_text("a file where a folder should be")
    assert run("infer", toy_bundle, photos, "-o", out, "--json") == 1
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["done"] == 5
    assert {Path(row["source"]).name for row in said["failed"]} == {
        "broken.png",
        "empty.jpg",
        f"{'y' * 250}.png",
        "d.png",
    }
    assert captured.err.count("failed") == 4
    assert {line["status"] for line in journal(out)} == {"done", "failed"}
    assert not list(out.rglob(".*"))
    put(photos / "broken.png")  # mended, and resumed
    assert run("infer", toy_bundle, photos, "-o", out, "--skip-existing", "--json") == 1
    assert summary(capsys)["done"] == 1


def test_formats_that_are_there_are_not_lost(
    toy_bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "infer", toy_bundle, photos, "-o", tmp_path / "out", "--format"
    assert run(*arguments, "npz") == 0
    before = snapshot(tmp_path / "out")
    assert run(*arguments, "png", "--skip-existing") == 2
    assert "in formats that would be lost now" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert snapshot(tmp_path / "out") == before
    assert run(*arguments, "png,npz", "--skip-existing") == 0
    after = snapshot(tmp_path / "out")
    assert before.keys() < after.keys()
    assert run(*arguments, "npz", "--skip-existing") == 0  # a part of what is there is enough
    assert snapshot(tmp_path / "out").keys() == after.keys()


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))  # writes beyond fail, as on a full disk
from densegeo.cli import main
main(sys.argv[1:])
"""


def test_a_disk_too_full_for_one_image(toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((300, 400, 3), np.uint8)).save(photos / "large.png")
    command = [sys.executable, "-c", FULL, "infer", str(toy_bundle), str(photos), "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert (said["done"], [Path(row["source"]).name for row in said["failed"]]) == (5, ["large.png"])
    assert not list((tmp_path / "out").glob("large*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-file-*.png"], "matches no image"),
        ([], "nothing to work on"),
        (["{photos}", "--near", "1"], "go together"),
        (["{photos}", "--near", "9", "--far", "1"], "0 < near < far"),
        (["{photos}", "--scale", "-1", "--shift", "0"], "above 0"),
        (["{photos}", "--fx", "1"], "go together"),
        (["{photos}", "--fx", "1", "--fy", "-1", "--cx", "0", "--cy", "0"], "focal lengths"),
        (["{photos}", "--near", "1", "--far", "2", "--scale", "1", "--shift", "0"], "not both"),
        (["{photos}", "--format", "gif"], "no format 'gif'"),
        (["{photos}", "--format", "EXR"], "Did you mean exr?"),
        (["{photos}", "--format", ","], "names no format"),
        (["{photos}", "--format", "png16"], "--near and --far"),
        (["{photos}", "--format", "glb", "--near", "1", "--far", "9"], "--fx, --fy, --cx and --cy"),
        (["{photos}", "--fit", "squash"], "stretch"),
        (["{photos}", "--fit", "pad", "--preprocessing", "authors"], "stretches"),
        (["{photos}", "--backend", "abacus"], "abacus"),
        (["{photos}", "--device", "toaster"], "toaster"),
        (["{photos}", "--workers", "0"], "workers"),
        (["{photos}", "--threads", "0"], "threads"),
        (["{photos}", "--skip-existing", "--overwrite"], "not both"),
        (["{photos}", "-o", "{photos}/a.png"], "is a file"),
    ],
)
def test_wrong_options_are_found_before_the_bundle_is_opened(
    arguments: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_toy_bundle(tmp_path / "broken")
    (bundle / "encoder_64x48.onnx").unlink()  # opening it would say so
    filled = [argument.replace("{photos}", str(photos)) for argument in arguments]
    out = [] if "-o" in arguments else ["-o", str(tmp_path / "out")]
    assert run("infer", bundle, *filled, *out) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error
    assert not (tmp_path / "out").exists()


def test_formats_that_the_model_has_nothing_for(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from densegeo.infer_options import require_outputs

    class Normals:
        decode = type("decode", (), {"depth_kind": None})
        model = "some-normals"

    with pytest.raises(Exception, match="normals alone"):
        require_outputs(Making(("grey8",)), Normals())  # type: ignore[arg-type]
    require_outputs(Making(("png", "npz")), Normals())  # type: ignore[arg-type]


def test_a_record_that_cannot_be_read_is_said_so(
    toy_bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("infer", toy_bundle, photos / "deep", "-o", out, "-f", "json") == 0
    (actual,) = out.glob("a_geometry.json")
    actual.write_bytes(actual.read_bytes()[:100])  # cut off
    capsys.readouterr()
    assert run("infer", toy_bundle, photos / "deep", "-o", out, "-f", "json", "--skip-existing") == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "results in" in said
    assert "a_geometry.json): it is damaged" in said


def test_another_source_is_not_taken_for_the_same(
    toy_bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs on two branches into one folder, as two scenes of a data set."""
    out = tmp_path / "out"
    assert run("infer", toy_bundle, photos / "deep", "-o", out) == 0
    before = snapshot(out)
    for option in ([], ["--skip-existing"]):
        assert run("infer", toy_bundle, photos / "other" / "deep", "-o", out, *option) == 2
    assert snapshot(out) == before
    assert run("infer", toy_bundle, photos / "other", "-o", out) == 0  # other names: deep/a
    assert before.items() - snapshot(out).items() <= {(JOURNAL, before[JOURNAL])}
    for changed in (["--fit", "pad"], ["--near", "1", "--far", "3"]):
        assert run("infer", toy_bundle, photos / "deep", "-o", out, "--skip-existing", *changed) == 2
    capsys.readouterr()
    put(photos / "deep" / "a.png", 99)  # the source changed
    assert run("infer", toy_bundle, photos / "deep", "-o", out, "--skip-existing", "--json") == 0
    assert summary(capsys)["done"] == 1
    os.utime(photos / "deep" / "a.png", (1, 1))  # its date alone did
    assert run("infer", toy_bundle, photos / "deep", "-o", out, "--skip-existing", "--json") == 0
    assert summary(capsys)["done"] == 0
    assert run("infer", toy_bundle, photos / "deep", "-o", out, "--overwrite", "-f", "npz", "--fit", "pad") == 0
    assert {path.name for path in out.iterdir()} == {
        *(f"{stem}_{file}" for stem in "ac" for file in ("geometry.npz", "geometry.json")),
        "deep",
        JOURNAL,
    }  # no file of the earlier result stays beside the new


def test_results_beside_the_images_never_take_their_place(
    toy_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(photos / "a_normals.png")
    before = snapshot(photos)
    assert run("infer", toy_bundle, photos, "-o", photos, "--overwrite") == 2
    assert "a_normals.png" in "".join(capsys.readouterr().err.replace("│", "").split())
    assert snapshot(photos) == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), pytest.param("SIGTERM", 143, marks=pytest.mark.thorough)])
def test_interrupted_and_resumed(name: str, code: int, toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    count, out = 160, tmp_path / "out"
    for number in range(count):
        os.link(photos / "b.jpg", photos / f"{number}.jpg")
    command = [sys.executable, "-m", "densegeo", "infer", str(toy_bundle), str(photos), "-o", str(out), "-f", "npy,png"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while len(list(out.glob("*_geometry.json"))) < 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "stopped by" in errors
    first = journal(out)
    assert 20 <= len(first) < count
    assert not list(out.rglob(".*"))
    assert len(list(out.rglob("*_geometry.json"))) == len(first)  # every result that is there is whole, and listed
    assert run(*command[3:], "--skip-existing", "-q") == 0
    times = Counter(line["name"] for line in journal(out))
    assert len(times) == count + 5
    assert set(times.values()) == {1}
    assert len(list(out.rglob("*_normals.png"))) == count + 5


def test_a_crash_between_result_and_journal_is_made_good(toy_bundle: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("infer", toy_bundle, photos, "-o", out, "-f", "json") == 0
    lines = (out / JOURNAL).read_text().splitlines()
    (out / JOURNAL).write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])
    assert run("infer", toy_bundle, photos, "-o", out, "-f", "json", "--skip-existing") == 0
    whole = [json.loads(line)["name"] for line in (out / JOURNAL).read_text().splitlines() if line.endswith("}")]
    assert sorted(whole) == sorted(json.loads(line)["name"] for line in lines)


def test_quiet_says_errors_alone(
    toy_bundle: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("infer", toy_bundle, photos, "-o", tmp_path / "out", "--quiet") == 0
    assert capfd.readouterr() == ("", "")


def test_progress_in_a_log_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    now = [100.0]
    monkeypatch.setattr("densegeo.progress.time.monotonic", lambda: now[0])
    log = io.StringIO()
    with progress("images", 40, Console(file=log, width=60)) as advance:
        for _ in range(40):
            now[0] += 1.0
            advance()
    lines = log.getvalue().splitlines()
    assert lines[0] == "10 of 40 images, 1 a second, about 30 s left"
    assert len(lines) == 4
