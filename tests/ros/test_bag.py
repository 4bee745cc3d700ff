"""`densegeo bag`: bags that rosbags writes go in, and what comes out is read by mcap-ros2-support."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rosbags")
pytest.importorskip("mcap_ros2")

from mcap.reader import make_reader
from mcap.writer import Writer as McapWriter
from mcap_ros2.decoder import DecoderFactory
from PIL import Image as Pillow
from rosbags.rosbag2 import StoragePlugin

from densegeo.cli import main
from densegeo.errors import BagError, BundleError, ConfigError
from densegeo.ros.bag import Options, run
from densegeo.ros.bag_input import Bag
from densegeo.ros.bag_scene import Sensors
from densegeo.ros.metric import MetresOptions
from densegeo.ros.ranges import Transform
from densegeo.runtime import Camera, Estimator
from densegeo.runtime.ready import find_bundle
from tests.support.bags import HEIGHT, WIDTH, camera_messages, pictures, write_bag
from tests.support.project import ROOT
from tests.support.ros import camera_info, cloud, image, reading, transform

MOUNTED = [0.0, -0.2, 0.0, 0.5, -0.5, 0.5, 0.5]  # a lidar above the camera: x forward, y left, z up


def read(path: Path) -> dict[str, list[Any]]:
    actual = defaultdict(list)
    for topic, _, message in read_in_order(path):
        actual[topic].append(message)
    return dict(actual)


def read_in_order(path: Path) -> list[tuple[str, int, Any]]:
    """(topic, nanoseconds, message) of all."""
    with path.open("rb") as stream:
        decoded = make_reader(stream, decoder_factories=[DecoderFactory()]).iter_decoded_messages()
        return [(channel.topic, message.log_time, ours) for _, channel, message, ours in decoded]


def array(message: Any) -> np.ndarray:
    return np.frombuffer(message.data, "<f4").reshape(message.height, message.width, -1)


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_every_image_with_its_stamp_and_frame(bundle: Path, tmp_path: Path, plugin: StoragePlugin) -> None:
    folder = write_bag(tmp_path / "in", camera_messages(), plugin)
    (file,) = (path for path in folder.iterdir() if path.suffix in (".mcap", ".db3"))
    with Estimator(bundle, device="cpu") as estimator:
        expected = [estimator(picture).to_metric(near=0.5, far=10.0) for picture in pictures(4)]
    for source in (folder, file):
        output = tmp_path / f"{source.name}.out.mcap"
        assert run(Options(bundle, source, output, metres=MetresOptions(0.5, 10.0))) == 0
        actual = read(output)
        base = "/camera/image_raw/densegeo"
        assert set(actual) == {f"{base}/{name}" for name in ("depth", "normals", "points", "camera_info")}
        for topic, messages in actual.items():
            assert [message.header.stamp.sec for message in messages] == [1, 2, 3, 4], topic
            assert {message.header.frame_id for message in messages} == {"camera_optical"}
        for number, geometry in enumerate(expected):
            np.testing.assert_array_equal(array(actual[f"{base}/depth"][number])[..., 0], geometry.depth)
            np.testing.assert_array_equal(array(actual[f"{base}/normals"][number]), geometry.normals)
            cloud_ = actual[f"{base}/points"][number]
            rows = np.frombuffer(cloud_.data, "<f4").reshape(-1, 7)
            points = geometry.points(Camera.of(camera_info(WIDTH, HEIGHT)))[2::4, 2::4].reshape(-1, 3)
            np.testing.assert_array_equal(rows[:, :3], points)
            np.testing.assert_array_equal(rows[:, 4:], geometry.normals[2::4, 2::4].reshape(-1, 3))  # type: ignore[index]
            np.testing.assert_array_equal(
                np.ascontiguousarray(rows[:, 3]).view("<u4"),
                (pictures(4)[number][2::4, 2::4].astype(np.uint32) @ [1 << 16, 1 << 8, 1]).ravel(),
            )
        assert actual[f"{base}/camera_info"][0].k[0] == 100.0


def test_metres_from_a_lidar_in_the_bag(bundle: Path, tmp_path: Path) -> None:
    """Its place from /tf_static, over a frame between, and from the command line."""
    messages = camera_messages(count=2)
    with Estimator(bundle, device="cpu") as estimator:
        true = [estimator(picture).to_metric(scale=2.0, shift=0.5) for picture in pictures(2)]
    into = Transform.of(MOUNTED).inverse()
    for number, geometry in enumerate(true):
        points = geometry.points(Camera.of(camera_info(WIDTH, HEIGHT)))[4::8, 4::8].reshape(-1, 3)
        at = 0.95 + number
        messages.append(("/lidar", at, cloud(into(points.astype(np.float64)).astype(np.float32), at=at)))
    lifted = transform([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], "base", "lidar")
    x, y, z = np.add(into.translation, [0.0, 0.0, 1.0]).tolist()  # the camera in the base's frame
    mount = transform([x, y, z, -0.5, 0.5, -0.5, 0.5], "base", "camera_optical")
    everything = [("/tf_static", 0.5, lifted), ("/tf_static", 0.6, mount), *messages]
    source = write_bag(tmp_path / "in", sorted(everything, key=lambda one: one[1]))
    for name, given in (("tf", ()), ("given", tuple(MOUNTED))):
        output = tmp_path / f"{name}.mcap"
        assert run(Options(bundle, source, output, sensors=Sensors("/lidar", given))) == 0
        depths = read(output)["/camera/image_raw/densegeo/depth"]
        for message, geometry in zip(depths, true, strict=True):
            np.testing.assert_allclose(array(message)[..., 0], geometry.depth, rtol=1e-3)
    bare = write_bag(tmp_path / "bare", sorted(messages, key=lambda one: one[1]))
    with pytest.raises(BagError, match=r"/tf_static does not say how 'lidar' lies to 'camera_optical'"):
        run(Options(bundle, bare, tmp_path / "none.mcap", sensors=Sensors("/lidar")))
    assert not (tmp_path / "none.mcap").exists()


def test_all_cameras_and_no_depth_images(bundle: Path, tmp_path: Path) -> None:
    depth = np.ones((HEIGHT, WIDTH), np.uint16)
    messages = [
        *camera_messages("/left/image_raw", 2),
        *camera_messages("/right/image_rect", 2),
        ("/depth/camera_info", 1.0, camera_info(WIDTH, HEIGHT)),
        ("/depth/image_raw", 1.0, image(depth, "16UC1")),
        ("/other/image", 1.0, image(pictures(1)[0], "rgb8")),  # without a camera_info
    ]
    messages[-2][2].encoding = "32FC1"
    source = write_bag(tmp_path / "in", sorted(messages, key=lambda one: one[1]))
    assert run(Options(bundle, source, tmp_path / "out.mcap")) == 0
    actual = read(tmp_path / "out.mcap")
    assert {topic.split("/densegeo")[0] for topic in actual} == {"/left/image_raw", "/right/image_rect"}
    assert run(Options(bundle, source, tmp_path / "one.mcap", image_topics=("/other/image",))) == 0
    assert set(read(tmp_path / "one.mcap")) == {f"/other/image/densegeo/{n}" for n in ("relative_depth", "normals")}


def test_a_bag_that_was_cut_off_gives_what_it_holds(bundle: Path, tmp_path: Path, capfd: Any) -> None:
    folder = write_bag(tmp_path / "in", camera_messages(count=6))
    (whole,) = folder.glob("*.mcap")
    cut = tmp_path / "cut.mcap"
    with whole.open("rb") as stream, cut.open("wb") as target:  # small chunks, as a long recording has many
        writer = McapWriter(target, chunk_size=20_000)
        writer.start(profile="ros2")
        channels: dict[str, int] = {}
        for schema, channel, message in make_reader(stream).iter_messages():
            if channel.topic not in channels:
                number = writer.register_schema(schema.name, schema.encoding, schema.data)  # type: ignore[union-attr]
                channels[channel.topic] = writer.register_channel(channel.topic, channel.message_encoding, number)
            writer.add_message(channels[channel.topic], message.log_time, message.data, message.publish_time)
        writer.finish()
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    opened = Bag.open(cut)
    assert opened.cut
    assert 0 < opened.counts["/camera/image_raw"] < 6
    assert run(Options(bundle, cut, tmp_path / "out.mcap")) == 1
    assert "it was cut off" in capfd.readouterr().err
    stamps = [one.header.stamp.sec for one in read(tmp_path / "out.mcap")["/camera/image_raw/densegeo/normals"]]
    assert stamps == [*range(1, 1 + opened.counts["/camera/image_raw"])]


def test_a_bag_of_broken_images_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    """No finished file without a result, and nothing half-written either."""
    messages = camera_messages(count=3)
    for _, _, message in messages[::2]:
        message.step = 3
    source = write_bag(tmp_path / "in", messages)
    with pytest.raises(BagError, match=r"None of 3 images could be used, so there is no .*out.mcap: .*3 bytes a row"):
        run(Options(bundle, source, tmp_path / "out.mcap"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.thorough
def test_depth_of_one_camera_is_steady(tmp_path: Path) -> None:
    """The same picture twice, a reading of a range finder beside the first alone: metres in both."""
    hall = np.asarray(Pillow.open(ROOT / "densegeo" / "photographs" / "hall.jpg").convert("RGB").resize((192, 144)))
    messages: list[tuple[str, float, Any]] = []
    for at in (1.0, 2.0):
        messages.append(("/c/image", at, image(hall, "rgb8", at=at)))
        messages.append(("/c/camera_info", at, camera_info(192, 144, focal=166.0, at=at)))
    messages.insert(0, ("/range", 0.95, reading(3.0, at=0.95)))
    source = write_bag(tmp_path / "in", messages)
    ahead = (0.0, 0.5, 0.0, 0.5, -0.5, 0.5, 0.5)  # half a metre under the camera
    output = tmp_path / "out.mcap"
    assert run(Options(find_bundle("fe2e-tiny"), source, output, sensors=Sensors("/range", ahead))) == 0
    first, second = (array(message)[..., 0] for message in read(tmp_path / "out.mcap")["/c/image/densegeo/depth"])
    np.testing.assert_allclose(first[99, 96], 3.0, rtol=0.05)
    np.testing.assert_allclose(second, first, rtol=0.02)


def test_a_message_that_is_broken_does_not_stop_the_others(bundle: Path, tmp_path: Path, capfd: Any) -> None:
    messages = camera_messages()
    messages[2][2].step = 3
    source = write_bag(tmp_path / "in", messages)
    assert run(Options(bundle, source, tmp_path / "out.mcap")) == 1
    said = capfd.readouterr().err
    assert "3 of 4 images done" in said
    assert "3 bytes a row" in said
    assert len(read(tmp_path / "out.mcap")["/camera/image_raw/densegeo/normals"]) == 3


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            {"image_topics": ("/camera/image",)},
            BagError,
            r"no topic /camera/image; it has /camera/camera_info, /camera",
        ),
        ({"image_topics": ("/camera/camera_info",)}, BagError, "is of type sensor_msgs/msg/CameraInfo, not"),
        ({"sensors": Sensors("/scan")}, BagError, "no topic /scan"),
        ({"sensors": Sensors("/camera/camera_info")}, BagError, "anchors are one of sensor_msgs/msg/PointCloud2"),
        ({"sensors": Sensors(imu_topic="/imu")}, ConfigError, "--camera-height alone needs"),
        ({"sensors": Sensors(imu_topic="/imu"), "metres": MetresOptions(camera_height=1.0)}, BagError, "no topic /imu"),
        ({"metres": MetresOptions(near=2.0)}, ConfigError, "belong together"),
        ({"metres": MetresOptions(math.nan, math.nan)}, ConfigError, "belong together"),
        ({"metres": MetresOptions(camera_height=-1.0)}, ConfigError, "metres above 0"),
        ({"ycbcr": "bt2020"}, ConfigError, "bt709-full"),
        ({"sensors": Sensors("/camera/camera_info", (1.0, 2.0))}, ConfigError, "--anchors-transform: A transform"),
        ({"sensors": Sensors(imu_transform=(0.0,) * 6 + (1.0,))}, ConfigError, "give --imu-topic too"),
        ({"sensors": Sensors("/scan", anchors_max_age=math.nan)}, ConfigError, "0 or more seconds, not nan"),
        ({"sensors": Sensors("/scan"), "metres": MetresOptions(1.0, 4.0)}, ConfigError, "or --anchors-topic, not both"),
        ({"bundle": Path("none"), "source": Path("none")}, BundleError, "none is not a densegeo bundle"),
        ({"output": Path("x.bag")}, ConfigError, r"name it x\.mcap"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    bundle: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    source = write_bag(tmp_path / "in", camera_messages(count=1))
    with pytest.raises(error, match=says):
        run(Options(**{"bundle": bundle, "source": source, "output": tmp_path / "out.mcap", **options}))  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_what_is_no_bag_is_refused(bundle: Path, tmp_path: Path) -> None:
    def refused(source: Path) -> str:
        with pytest.raises(BagError) as raised:
            run(Options(bundle, source, tmp_path / "out.mcap"))
        return str(raised.value)

    assert "does not exist" in refused(tmp_path / "none")
    (tmp_path / "text.mcap").write_text("no bag")
    assert "is no mcap file, or nothing of it can be read" in refused(tmp_path / "text.mcap")
    (tmp_path / "text.db3").write_text("no bag")
    assert "cannot be read as a ROS 2 bag" in refused(tmp_path / "text.db3")
    folder = write_bag(tmp_path / "in", camera_messages(count=1))
    (folder / "metadata.yaml").unlink()
    assert "no metadata.yaml, so it is no complete bag. It holds in.mcap" in refused(folder)
    assert "No image topic" in refused(write_bag(tmp_path / "bare", camera_messages(count=1, info=False)))
    info = [("/camera_info", 1.0, camera_info(8, 8))]
    assert "has no image topic; it has /camera_info" in refused(write_bag(tmp_path / "info", info))


def test_an_existing_output_stays(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    source, output = write_bag(tmp_path / "in", camera_messages(count=1)), tmp_path / "out.mcap"
    output.write_bytes(b"mine")
    with pytest.raises(SystemExit) as ended:
        main(["bag", str(bundle), str(source), str(output)])
    assert ended.value.code == 2
    assert "exists. Choose another name, or say --overwrite" in words(capsys)
    assert output.read_bytes() == b"mine"
    with pytest.raises(SystemExit) as ended:
        main(["bag", str(bundle), str(source), str(output), "--overwrite", "--points-stride", "8"])
    assert ended.value.code == 0
    assert read(output)


def words(capsys: Any) -> str:
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--near", "2", "--far", "1"], "0 < near < far"),
        (["--far", "1"], "give both or neither"),
        (["--depth-encoding", "mono16"], "There is no 'mono16'"),
        (["--points-stride", "-1"], "'--points-stride'"),
        (["--anchors-transform", "1 2 x"], "--anchors-transform: is seven num"),
        (["--imu-transform", "1 2 3"], "give --imu-topic too"),
        (["--camera-height", "-2"], "--camera-height is metres above 0"),
        (["--near", "1", "--far", "2", "--camera-height", "2"], "either --near and --far or --camera-height"),
        (["--backend", "tf"], "There is no 'tf'"),
        (["--device", "tpu"], "'--device'"),
    ],
)
def test_wrong_options_end_with_2(bundle: Path, tmp_path: Path, capsys: Any, options: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bag", str(bundle), str(tmp_path), str(tmp_path / "out.mcap"), *options])
    assert ended.value.code == 2
    assert says in words(capsys)


def test_an_encoding_that_is_not_read_is_named(bundle: Path, tmp_path: Path) -> None:
    messages = camera_messages(count=2)
    for _, _, message in messages[::2]:
        message.encoding = "jpeg2000"
    source = write_bag(tmp_path / "in", messages)
    with pytest.raises(BagError, match=r"that has a camera_info holds pictures.*image_raw: The encoding 'jpeg2000'"):
        run(Options(bundle, source, tmp_path / "out.mcap"))


def test_images_without_metres_are_counted(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    """One colour everywhere gives the toy one prediction everywhere."""
    flat = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    messages = camera_messages(count=3)
    messages[2] = (messages[2][0], messages[2][1], image(flat, "rgb8", at=messages[2][1]))
    asked = MetresOptions(1.0, 5.0)
    some = Options(bundle, write_bag(tmp_path / "some", messages), tmp_path / "some.mcap", metres=asked)
    assert run(some) == 0
    assert "no metres 1 of 3 images: The prediction is flat" in words(capsys)
    for number in (0, 4):
        messages[number] = (messages[number][0], messages[number][1], image(flat, "rgb8", at=messages[number][1]))
    none = Options(bundle, write_bag(tmp_path / "none", messages), tmp_path / "none.mcap", metres=asked)
    assert run(none) == 1
    assert "no metres 3 of 3 images" in words(capsys)
    assert run(dataclasses.replace(none, output=tmp_path / "relative.mcap", metres=MetresOptions())) == 0


@pytest.mark.parametrize("folder", [True, False])
def test_a_bag_never_takes_the_place_of_its_source(bundle: Path, tmp_path: Path, folder: bool) -> None:
    source = write_bag(tmp_path / "in", camera_messages(count=1))
    (storage,) = source.glob("*.mcap")
    link = tmp_path / "link.mcap"
    link.symlink_to(storage)
    before = storage.read_bytes()
    for output in (storage, link):
        with pytest.raises(ConfigError, match="is the bag that is read"):
            run(Options(bundle=bundle, source=source if folder else storage, output=output, overwrite=True))
    assert storage.read_bytes() == before


@pytest.mark.integration
@pytest.mark.parametrize(
    ("how", "asked"),
    [
        (signal.SIGKILL, MetresOptions(0.5, 10.0)),
        pytest.param(signal.SIGINT, MetresOptions(), marks=pytest.mark.thorough),
    ],
)
def test_an_interrupted_run_goes_on(bundle: Path, tmp_path: Path, how: int, asked: MetresOptions) -> None:
    """Killed at any moment, and started again, to the same file as a run that was not: with depth of each image by
    itself, and with depth that rests on the images before.
    """
    messages = camera_messages(count=40)
    messages[2][2].step = 3  # an image that fails before the interruption is not forgotten
    source = write_bag(tmp_path / "in", messages)
    code = """
import sys, time
from pathlib import Path
from densegeo.ros import bag, bag_output
bag_output.CHUNK = 200_000
finish = bag._Work._finish
bag._Work._finish = lambda *given: (finish(*given), time.sleep(0.02))
near, far = map(float, sys.argv[1:3])
print(bag.run(bag.Options(*map(Path, sys.argv[3:]), metres=bag.MetresOptions(near, far))), flush=True)
"""
    command = [sys.executable, "-c", code, str(asked.near), str(asked.far), str(bundle), str(source)]
    output = tmp_path / "out.mcap"
    partial = tmp_path / ".out.mcap.partial"
    process = subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not partial.exists() or partial.stat().st_size < 20_000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, how)
    assert process.wait(30) != 0
    assert not output.exists()
    before = partial.stat().st_size
    assert before
    done = subprocess.run([*command, str(output)], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr
    assert "39 of 40 images done" in done.stderr
    assert not partial.exists()
    assert run(Options(bundle, source, tmp_path / "whole.mcap", metres=asked)) == 1
    resumed, whole = read_in_order(output), read_in_order(tmp_path / "whole.mcap")
    assert [one[:2] for one in resumed] == [one[:2] for one in whole]
    for (topic, _, ours), (_, _, theirs) in zip(resumed, whole, strict=True):
        if not topic.endswith("camera_info"):
            assert bytes(ours.data) == bytes(theirs.data), topic
