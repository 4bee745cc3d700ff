"""`densegeo infer --ray` over a cluster on this machine, whose nodes are Ray's own processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet
import pytest
from PIL import Image

from densegeo.fleet.ray_inference import TRIES
from tests.support.project import ROOT
from tests.support.ray_nodes import Cluster, environment, running
from tests.support.toy_bundle import make_toy_bundle

FORMATS = "npz"
GROWTH = 64 * 2**20  # bytes that a process may grow by


def photographs(folder: Path, count: int) -> Path:
    """Images of noise in two folders, every one another."""
    for index in range(count):
        path = folder / f"scene{index % 2}" / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(path)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running(2) as nodes:  # two actors
        yield nodes


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("ray") / "toy")


def infer(*arguments: str | Path, **more: str) -> tuple[int, dict[str, Any], str]:
    """The exit code, the summary, and what was said."""
    command = [sys.executable, "-m", "densegeo", "infer", *map(str, arguments), "--format", FORMATS, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=280)
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else {}, done.stderr


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as actual:
        return dict(actual)


def require_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys() > {"prediction", "normals"}
    for key, array in theirs.items():
        if array.dtype.kind != "U":  # the record, which has times
            np.testing.assert_array_equal(ours[key], array)


@pytest.mark.slow
def test_a_tree_as_without_ray(cluster: Cluster, toy: Path, tmp_path: Path) -> None:
    """The same files with the same numbers; a bad image is a failure; run again, only what is missing is done."""
    photos = photographs(tmp_path / "photos", 70)
    (photos / "broken.png").write_bytes(b"no picture")
    plain, fleet = tmp_path / "plain", tmp_path / "fleet"
    assert infer(toy, photos, "-o", plain)[0] == 1
    code, summary, said = infer(toy, photos, "-o", fleet, "--ray", cluster.address)
    assert code == 1, said
    assert summary["done"] == 70
    assert [Path(failure["source"]).name for failure in summary["failed"]] == ["broken.png"]
    assert summary["warnings"] == []
    assert tree(fleet) == tree(plain)
    for name in sorted(tree(plain)):
        if name.endswith(".npz"):
            ours, theirs = arrays(fleet / name), arrays(plain / name)
            require_equal(ours, theirs)
    records = [json.loads(line) for line in (fleet / "results.jsonl").read_text().splitlines()]
    assert sorted(record["status"] for record in records) == ["done"] * 70 + ["failed"]
    (photos / "broken.png").unlink()
    (fleet / "scene1" / "00001_geometry.json").unlink()
    photographs(photos, 72)
    code, summary, said = infer(toy, photos, "-o", fleet, "--ray", cluster.address, "--skip-existing")
    assert code == 0, said
    assert (summary["done"], summary["skipped"]) == (3, {"done before": 69})


@pytest.mark.slow
@pytest.mark.parametrize("into", ["parquet", "webdataset"])
def test_shards(cluster: Cluster, toy: Path, tmp_path: Path, into: str) -> None:
    """Every image once, the arrays of a tree; run again, only new ones; other options are refused."""
    photos, out = photographs(tmp_path / "photos", 40), tmp_path / "out"
    arguments = (toy, photos, "-o", out, "--ray", cluster.address, "--into", into)
    code, summary, said = infer(*arguments)
    assert (code, summary["done"]) == (0, 40), said
    photographs(photos, 41)
    code, summary, said = infer(*arguments, "--skip-existing")
    assert (code, summary["done"], summary["skipped"]) == (0, 1, {"done before": 40}), said
    actual = shard_rows(out, into)
    assert sorted(actual) == sorted(f"scene{index % 2}/{index:05}" for index in range(41))
    infer(toy, photos, "-o", tmp_path / "plain")
    name = sorted(actual)[7]
    (tmp_path / "one.npz").write_bytes(actual[name])
    ours, theirs = arrays(tmp_path / "one.npz"), arrays(tmp_path / "plain" / f"{name}_geometry.npz")
    require_equal(ours, theirs)
    code, _, said = infer(*arguments, "--skip-existing", "--near", "1", "--far", "9")
    assert code == 2
    assert "with other options" in " ".join(said.split())


@pytest.mark.slow
def test_terminated_and_gone_on_with(cluster: Cluster, toy: Path, tmp_path: Path) -> None:
    """SIGTERM ends it with 143; run again it does what is left, and nothing is there twice."""
    photos, out = photographs(tmp_path / "photos", 400), tmp_path / "out"
    arguments = [str(toy), str(photos), "-o", str(out), "--ray", cluster.address]
    command = [sys.executable, "-m", "densegeo", "infer", *arguments, "--json", "--format", FORMATS]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    journal = out / "results.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or len(journal.read_text().splitlines()) < 40:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 143
    first = json.loads(text)
    assert first["stopped_by"] == "SIGTERM"
    assert 40 <= first["done"] < 400
    code, second, said = infer(*arguments, "--skip-existing")
    assert code == 0, said
    assert second["skipped"]["done before"] >= first["done"]
    assert second["done"] + second["skipped"]["done before"] == 400
    assert sum(name.endswith("_geometry.npz") for name in tree(out)) == 400


@pytest.mark.slow
def test_a_picture_that_kills_processes_fails_alone(toy: Path, tmp_path: Path) -> None:
    """All others are done, also those of its block."""
    photos, log = photographs(tmp_path / "photos", 64), tmp_path / "killed"
    (photos / "scene0" / "00010.png").rename(photos / "scene0" / "poison.png")
    faulty = os.pathsep.join([str(Path(__file__).with_name("poison")), str(ROOT)])
    arguments = (toy, photos, "-o", tmp_path / "out", "--ray", "local", "--actors", "2")
    code, summary, said = infer(*arguments, PYTHONPATH=faulty, DENSEGEO_KILLED=str(log))
    assert code == 1, said
    assert summary["done"] == 63
    assert [Path(failure["source"]).name for failure in summary["failed"]] == ["poison.png"]
    assert "died" in summary["failed"][0]["error"]
    assert len(set(log.read_text().split())) == 2 * TRIES


@pytest.mark.slow
def test_a_bundle_that_goes_ends_the_run(cluster: Cluster, toy: Path, tmp_path: Path) -> None:
    """Actors that are started again and cannot open it are an error, and what was done stays."""
    bundle, photos, out = tmp_path / "toy", photographs(tmp_path / "photos", 1500), tmp_path / "out"
    shutil.copytree(toy, bundle)
    command = [sys.executable, "-m", "densegeo", "infer", bundle, photos, "-o", out, "--format", FORMATS]
    run = subprocess.Popen([*command, "--ray", cluster.address], env=environment(), stderr=subprocess.PIPE, text=True)
    journal = out / "results.jsonl"
    while not journal.exists() or len(journal.read_text().splitlines()) < 50:
        time.sleep(0.1)
        assert run.poll() is None
    bundle.rename(tmp_path / "elsewhere")
    for actor in actors():
        actor.kill()
    _, said = run.communicate(timeout=240)
    assert run.returncode == 1, said
    assert f"The actors of Ray cannot run {bundle}" in said
    assert len(journal.read_text().splitlines()) < 1500


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_actors_and_a_node_go(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand images over four actors: two are killed, a node leaves, and every result is there once;
    no process grows with the images.
    """
    count = 2000
    photos, out = photographs(tmp_path / "photos", count), tmp_path / "out"
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(0, 2, 1, 1)
    try:
        command = [sys.executable, "-m", "densegeo", "infer", str(toy), str(photos), "-o", str(out), "--json"]
        command += ["--format", FORMATS, "--ray", cluster.address, "--actors", "4"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        driver, sizes, killed = psutil.Process(run.pid), [], []
        events = {count // 4: "kill", count // 2: "kill", 5 * count // 8: "leave"}
        while run.poll() is None:
            journal = out / "results.jsonl"
            done = len(journal.read_text().splitlines()) if journal.exists() else 0
            with contextlib.suppress(psutil.Error):
                largest = max((process.memory_info().rss for process in actors()), default=0)
                sizes.append((done, driver.memory_info().rss, largest))
            if events and done >= min(events):
                if events.pop(min(events)) == "kill":
                    killed.append(kill_an_actor())
                else:
                    cluster.nodes.remove_node(cluster.workers[-1], allow_graceful=False)
            time.sleep(0.3)
        text, said = run.communicate()
    finally:
        cluster.close()
    assert run.returncode == 0, said
    assert not events, "it was done before everything had happened"
    assert len(set(killed)) == 2
    summary = json.loads(text)
    assert (summary["done"], summary["failed"]) == (count, [])
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == sorted(f"scene{index % 2}/{index:05}" for index in range(count))
    assert sum(name.endswith("_geometry.npz") for name in tree(out)) == count
    plain = {1: plainly(toy, photos, tmp_path, 1), 2: plainly(toy, photos, tmp_path, 2)}
    print(
        f"{summary['seconds']:.1f} s, {rate(out):.1f} images a second from the first result to the last; without Ray:"
    )
    print(
        *(f"{many} at once {seconds:.1f} s, {per_second:.1f}" for many, (seconds, per_second) in plain.items()),
        sep="; ",
    )
    for name, column in (("driver", 1), ("largest actor", 2)):
        early = max(row[column] for row in sizes if count // 8 <= row[0] <= count // 4)
        late = max(row[column] for row in sizes if row[0] >= 7 * count // 8)
        print(f"{name}: {early / 2**20:.0f} MiB early, {late / 2**20:.0f} late")
        assert late - early < GROWTH


def rate(*outputs: Path) -> float:
    """Results a second, from the first that lies on disk to the last."""
    times = sorted(path.stat().st_mtime for out in outputs for path in out.rglob("*_geometry.json"))
    return (len(times) - 1) / (times[-1] - times[0])


def plainly(toy: Path, photos: Path, folder: Path, many: int) -> tuple[float, float]:
    """The same images by so many processes of `infer` at once, a thread each as actors have: seconds, and `rate`."""
    paths, outputs = sorted(photos.rglob("*.png")), [folder / f"plain{many}{part}" for part in range(many)]
    lists = [folder / f"list{many}{part}" for part in range(many)]
    for part, listed in enumerate(lists):
        listed.write_text("".join(f"{path}\n" for path in paths[part::many]))
    command = [sys.executable, "-m", "densegeo", "infer", str(toy), "--format", FORMATS, "--threads", "1", "--quiet"]
    started = time.monotonic()
    pairs = zip(lists, outputs, strict=True)
    runs = [
        subprocess.Popen([*command, "--list", str(listed), "-o", str(output)], env=environment())
        for listed, output in pairs
    ]
    assert [run.wait() for run in runs] == [0] * many
    return time.monotonic() - started, rate(*outputs)


def kill_an_actor() -> int:
    """The first; its process."""
    killed = actors()[0]
    killed.kill()
    return int(killed.pid)


def actors() -> list[psutil.Process]:
    """Ray names their processes after what they run."""
    actual = psutil.process_iter(["cmdline"])
    return [process for process in actual if "MapWorker" in " ".join(process.info["cmdline"] or ())]


def shard_rows(folder: Path, into: str) -> dict[str, bytes]:
    """geometry.npz by name, of all shards; no name twice."""
    rows: list[tuple[str, bytes]] = []
    if into == "parquet":
        for path in folder.glob("*.parquet"):
            table = pyarrow.parquet.read_table(path)
            assert set(table.column_names) == {"name", "source", "geometry.json", "geometry.npz"}
            rows += [(row["name"], row["geometry.npz"]) for row in table.to_pylist()]
    else:
        for path in folder.glob("*.tar"):
            with tarfile.open(path) as archive:
                for member in archive:
                    key, _, ending = member.name.partition(".")
                    stream = archive.extractfile(member)
                    assert stream is not None
                    if ending == "geometry.npz":
                        rows.append((key, stream.read()))
    assert len({name for name, _ in rows}) == len(rows)
    return dict(rows)


@pytest.mark.slow
def test_images_in_storage(cluster: Cluster, toy: Path, tmp_path: Path) -> None:
    """By a URL, which fsspec opens; here that of files."""
    photos, out = photographs(tmp_path / "photos", 6), tmp_path / "out"
    (photos / "notes.txt").write_text("no image")
    arguments = (toy, f"file://{photos}", "-o", out, "--ray", cluster.address)
    code, summary, said = infer(*arguments)
    assert (code, summary["done"]) == (0, 6), said
    assert {name for name in tree(out) if name.endswith(".npz")} == {
        f"scene{index % 2}/{index:05}_geometry.npz" for index in range(6)
    }
    code, summary, said = infer(*arguments, "--skip-existing")
    assert (code, summary["done"], summary["skipped"]["done before"]) == (0, 0, 6), said
