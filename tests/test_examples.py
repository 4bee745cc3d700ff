"""The examples run as they are, on made-up data; examples/node.py runs with the node's tests."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from densegeo.ros.ranges import Transform
from densegeo.runtime import Estimator
from tests.support.project import ROOT

pytestmark = pytest.mark.integration


def example(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.thorough
def test_a_camera_and_a_lidar(tmp_path: Path) -> None:
    """The lidar sees a slanted wall, 3 to 5 m away."""
    photograph = files("densegeo").joinpath("photographs/hall.jpg").read_bytes()
    into = Transform.of([0.0, -0.2, 0.0, 0.5, -0.5, 0.5, 0.5]).inverse()
    u, v = np.meshgrid(np.arange(20, 500, 40), np.arange(20, 380, 40))
    depth = 3 + u / 256
    wall = np.stack([(u - 255.5) / 300 * depth, (v - 191.5) / 300 * depth, depth], axis=-1).reshape(-1, 3)
    for number in range(3):
        (tmp_path / f"{number:03}.jpg").write_bytes(photograph)
        np.save(tmp_path / f"{number:03}.npy", into(wall))
    said = example("camera_and_lidar.py", tmp_path).splitlines()
    assert said[-1].startswith("002.jpg: "), said  # the newest is never dropped
    assert " m, " in said[-1] or "anchors" in said[-1]


@pytest.mark.thorough
def test_a_bag_replayed(tmp_path: Path) -> None:
    pytest.importorskip("rosbags")
    from tests.support.bags import camera_messages, write_bag

    source = write_bag(tmp_path / "in", camera_messages(count=3))
    said = example("bag_replay.py", source, "/camera/image_raw").splitlines()
    assert said[-1].startswith(("3 of 3 images; 0 were", "2 of 3 images; 1 were"))
    assert said[0].startswith("1.000: ")


@pytest.mark.thorough
def test_a_client_of_the_server(tmp_path: Path) -> None:
    """The numbers are those of the estimator, over the network."""
    pytest.importorskip("tritonclient")
    from tests.support.serving import started

    photograph = tmp_path / "hall.jpg"
    photograph.write_bytes(files("densegeo").joinpath("photographs/hall.jpg").read_bytes())
    with started("fe2e-tiny", "--threads", "1") as server:
        url = server.url.removeprefix("http://")
        said = example("serve_client.py", photograph, "--url", url, "--near", 0.8, "--far", 25).splitlines()
    with Estimator("fe2e-tiny", device="cpu", threads=1) as estimator:
        metric = estimator(photograph).to_metric(near=0.8, far=25.0)
    depth = metric.depth
    assert said[0] == f"512x384: {np.nanmin(depth):.2f} to {np.nanmax(depth):.2f} m"
    assert said[1] == f"in the middle: {depth[192, 256]:.2f} m"
    assert metric.normals is not None
    assert said[2] == f"its normal: {np.round(metric.normals[192, 256], 2).tolist()}"
