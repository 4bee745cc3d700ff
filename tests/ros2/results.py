"""Cases of what goes in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from densegeo.runtime import Camera, Geometry
from densegeo.runtime.ready import find_bundle
from densegeo.runtime.tracker import ScaleTracker
from tests.ros2.common import HEIGHT, INFO, RANGE, WIDTH, case, picture, wanted
from tests.ros2.robot import (
    ACTIVATE,
    BEST_EFFORT,
    CLEANUP,
    CONFIGURE,
    DEACTIVATE,
    RELIABLE,
    RESULTS,
    Client,
    robot,
    until,
)
from tests.support.project import ROOT
from tests.support.ros import STORE, T, camera_info, cloud, header, image, imu, reading


def expected(topic: str, geometry: Geometry, rgb: np.ndarray, stride: int = 4, at: float = 1.5) -> Any:
    """A result's message, made here and by rosbags' types."""
    if topic == "camera_info":
        return camera_info(WIDTH, HEIGHT, at=at)
    if topic == "points":
        return expected_points(geometry, rgb, stride, at)
    array = {"depth": "depth", "relative_depth": "prediction", "normals": "normals"}[topic]
    return image(getattr(geometry, array), "32FC3" if topic == "normals" else "32FC1", at=at)


def expected_points(geometry: Geometry, rgb: np.ndarray, stride: int, at: float) -> Any:
    rows = []
    points = geometry.points(Camera.of(INFO))
    for y in range(stride // 2, HEIGHT, stride):
        for x in range(stride // 2, WIDTH, stride):
            red, green, blue = (int(value) for value in rgb[y, x])
            color = np.array([red << 16 | green << 8 | blue], "<u4").view("<f4")[0]
            rows.append([*points[y, x], color, *geometry.normals[y, x]])  # type: ignore[index]
    packed = np.array(rows, "<f4")
    names = ("x", "y", "z", "rgb", "normal_x", "normal_y", "normal_z")
    field = T["sensor_msgs/msg/PointField"]
    return T["sensor_msgs/msg/PointCloud2"](
        header=header(at),
        height=1,
        width=len(packed),
        fields=[field(name=name, offset=4 * place, datatype=7, count=1) for place, name in enumerate(names)],
        is_bigendian=False,
        point_step=28,
        row_step=28 * len(packed),
        data=packed.view(np.uint8).reshape(-1),
        is_dense=True,
    )


def floats(message: Any) -> np.ndarray:
    return message.data.view("<f4").reshape(message.height, message.width, -1)


def same_cdr(sent: bytes, made: bytes) -> bool:
    """On the wire a payload is padded to a multiple of 4 bytes (DDSI-RTPS 2.5, section 9.4.2.12)."""
    return sent == made + bytes(-len(made) % 4)


@case
def results_are_the_estimators_and_rosbags_bytes(bundle: Path) -> None:
    """Numbers, stamps, frames and encodings: every byte of every message."""
    pixels = picture(1)
    geometry = wanted(bundle, pixels, **RANGE)
    topics = ("depth", "normals", "points", "camera_info")
    with robot({"bundle": bundle, **RANGE}) as (client, _):
        client.listen(*RESULTS)
        client.publishes("image", image(pixels, "rgb8"))
        client.publishes("camera_info", INFO)
        client.met()
        for count in range(3):
            client.send("camera_info", INFO)
            client.took("camera_info", count + 1)
            client.send("image", image(pixels, "rgb8"))
            for topic in topics:
                client.results(topic, count + 1)
        assert not client.raw["relative_depth"], "metres are not relative"
        for topic in topics:
            message = expected(topic, geometry, pixels)
            data = bytes(STORE.serialize_cdr(message, message.__msgtype__))
            for raw in client.raw[topic]:
                assert same_cdr(raw, data), f"{topic}: {len(raw)} bytes that are not the {len(data)} of rosbags"
        until(lambda: client.values().get("images published") == "3", "3 published")
        said = client.values()
        assert said["depth"].startswith("metric"), said
        assert client.diagnostics[-1].hardware_id.endswith("on cpu")


@case
def relative_depth_is_called_so(bundle: Path) -> None:
    pixels = picture(2)
    with robot({"bundle": bundle}) as (client, _):
        client.listen(*RESULTS)
        client.publishes("image", image(pixels, "bgr8"))
        client.publishes("camera_info", INFO)
        client.met()
        client.send("camera_info", INFO)
        client.took("camera_info", 1)
        client.send("image", image(pixels, "bgr8"))
        (relative,) = client.results("relative_depth", 1)
        np.testing.assert_array_equal(floats(relative)[..., 0], wanted(bundle, pixels, "bgr").prediction)
        client.results("normals", 1)
        assert not client.raw["depth"]
        assert not client.raw["points"]
        until(lambda: client.values().get("images published") == "1", "published")
        assert client.values()["depth"].startswith("relative (log_affine): "), client.values()


@case
def every_encoding(bundle: Path) -> None:
    """One node, images of many kinds after each other: normals are those of the estimator on the same bytes."""
    from densegeo.ros.images import ENCODINGS, read_image

    with robot({"bundle": bundle, "ycbcr": "bt709-full"}) as (client, _):
        client.listen("normals")
        client.publishes("image", image(picture(0), "rgb8"))
        client.met()
        for number, (name, encoding) in enumerate(ENCODINGS.items()):
            shape = (HEIGHT, WIDTH, encoding.channels) if encoding.channels > 1 else (HEIGHT, WIDTH)
            shape = (HEIGHT * 3 // 2, WIDTH) if name == "nv12" else shape
            big = number % 2 == 1
            array = picture(number, shape) if encoding.bits == 8 else picture(number, shape).astype(np.uint16) * 257
            sent = image(array, name, padding=8, big=big)
            client.send("image", sent)
            actual = client.results("normals", number + 1)[-1]
            read = read_image(sent, "bt709-full")
            geometry = wanted(bundle, read.image, read.color)
            np.testing.assert_array_equal(floats(actual), geometry.normals, err_msg=name)


@case
def parameters_are_described_checked_and_obeyed(bundle: Path) -> None:
    from densegeo_ros.parameters import ROWS

    pixels = picture(3)
    with robot({"bundle": bundle, **RANGE}) as (client, _):
        for row, described in zip(ROWS, client.describe(*(row.name for row in ROWS)), strict=True):
            assert described.description
            if row.between is not None:
                (actual,) = [*described.integer_range, *described.floating_point_range]
                assert (actual.from_value, actual.to_value) == row.between
                too_much = type(row.default)(row.between[1] + 1)
                assert not client.set(**{row.name: too_much})[0].successful
            if row.choices:
                assert repr(row.choices[0]) in described.additional_constraints
                assert not client.set(**{row.name: "no such choice"})[0].successful
        refused = client.set(near=0.7)[0]
        assert not refused.successful
        assert "clean it up first" in refused.reason
        client.listen("depth", "points")
        client.publishes("image", image(pixels, "rgb8"))
        client.publishes("camera_info", INFO)
        client.met()
        client.send("camera_info", INFO)
        client.took("camera_info", 1)
        assert all(one.successful for one in client.set(depth_encoding="16UC1", points_stride=8))
        client.send("image", image(pixels, "rgb8"))
        (depth,), (points,) = client.results("depth", 1), client.results("points", 1)
        metric = wanted(bundle, pixels, **RANGE).depth
        assert (depth.encoding, depth.step) == ("16UC1", 2 * WIDTH)
        np.testing.assert_array_equal(depth.data.view("<u2").reshape(HEIGHT, WIDTH), np.rint(metric * 1000))
        assert points.width == (HEIGHT // 8) * (WIDTH // 8)
        client.set(max_rate=0.001)
        for _ in range(3):
            client.send("image", image(pixels, "rgb8"))
        until(lambda: client.values().get("images skipped") == "3", "three are skipped")
        assert client.change(DEACTIVATE)
        assert client.change(CLEANUP)
        assert client.set(near=0.7, backend="openvino")[0].successful
        assert not client.set(anchors_transform=[1.0, 2.0])[0].successful
        client.set(near=20.0)
        assert not client.change(CONFIGURE)  # no openvino here, and near > far
        assert client.state == "unconfigured"
        until(lambda: "near and far belong together" in client.diagnostics[-1].message, "it says why")


@case
def compressed_images(bundle: Path) -> None:
    import io

    pixels = picture(4)
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    message = T["sensor_msgs/msg/CompressedImage"](
        header=header(), format="rgb8; png compressed bgr8", data=np.frombuffer(file.getvalue(), np.uint8)
    )
    with robot({"bundle": bundle, "image_transport": "compressed"}) as (client, _):
        client.listen("normals")
        client.publishes("image/compressed", message)
        client.met()
        message.data = message.data[:60]
        client.send("image/compressed", message)
        until(lambda: client.values().get("images failed") == "1", "a broken one is counted")
        message.data = np.frombuffer(file.getvalue(), np.uint8)
        client.send("image/compressed", message)
        (normals,) = client.results("normals", 1)
        np.testing.assert_array_equal(floats(normals), wanted(bundle, pixels).normals)


@case
def anchors_make_metres(bundle: Path) -> None:
    """A lidar 0.2 m above the camera, whose points lie where the network's depth would be with s = 2, t = 0.5."""
    pixels = picture(5)
    true = wanted(bundle, pixels, scale=2.0, shift=0.5)
    points = true.points(Camera.of(INFO))[8::8, 8::8].reshape(-1, 3)
    lidar = np.stack([points[:, 2], -points[:, 0], -points[:, 1] - 0.2], axis=1)
    mounted = "[0.0, -0.2, 0.0, 0.5, -0.5, 0.5, 0.5]"
    parameters = {"bundle": bundle, "anchors": "PointCloud2", "anchors_transform": mounted}
    with robot(parameters) as (client, _):
        client.listen("depth", "relative_depth")
        client.publishes("image", image(pixels, "rgb8"))
        client.publishes("anchors", cloud(lidar))
        client.publishes("camera_info", INFO)
        client.met()
        client.send("camera_info", INFO)
        client.send("anchors", cloud(lidar, at=1.45))
        client.took("camera_info", 1)
        client.took("anchors", 1)
        client.send("image", image(pixels, "rgb8"))
        (depth,) = client.results("depth", 1)
        np.testing.assert_allclose(floats(depth)[..., 0], true.depth, rtol=1e-3)
        client.send("image", image(pixels, "rgb8", at=2.5))  # a second after the last ranges
        client.results("depth", 2)  # the frame before knew
        assert not client.raw["relative_depth"]
        until(lambda: "no ranges lie within 0.2 s of the image" in client.values()["depth"], "and that is said")


@case
def one_fact_makes_metres(_: Path) -> None:
    """A camera's height and an IMU; nothing; one reading of a range finder, which later frames remember. The numbers
    are those of the estimator and a tracker.
    """
    hall = np.asarray(Pillow.open(ROOT / "densegeo" / "photographs" / "hall.jpg").convert("RGB").resize((192, 144)))
    geometry, camera = wanted(find_bundle("fe2e-tiny"), hall), Camera.of(camera_info(192, 144, focal=166.0))
    ahead = "[0.0, 0.0, 0.0, 0.5, -0.5, 0.5, 0.5]"  # x forward, y left, z up, at the camera
    up = np.array([0.1, -0.97, -0.15]) / np.linalg.norm([0.1, -0.97, -0.15])
    measured = [9.8 * up[2], -9.8 * up[0], -9.8 * up[1]]  # in that frame
    asked = {"bundle": "fe2e-tiny", "camera_height": 1.6, "imu": True, "imu_transform": ahead}

    def see(client: Client, at: float, *topics: str) -> list[Any]:
        before = [len(client.raw[topic]) for topic in topics]
        infos = int(client.values()["messages of /camera_info"])
        client.send("camera_info", camera_info(192, 144, focal=166.0, at=at))
        client.took("camera_info", infos + 1)
        client.send("image", image(hall, "rgb8", at=at))
        return [floats(client.results(t, n + 1)[-1])[..., 0] for t, n in zip(topics, before, strict=True)]

    def depth(**observations: Any) -> np.ndarray:
        return ScaleTracker().update(geometry, camera, **observations).depth

    with robot(asked) as (client, _):
        client.listen("depth", "depth_up_to_scale", "relative_depth")
        client.publishes("image", image(hall, "rgb8"))
        client.publishes("camera_info", INFO)
        client.publishes("imu", imu(measured))
        client.met()
        for number in range(3):
            client.send("imu", imu(measured, at=1.3 + number / 10))
        client.took("imu", 3)
        (actual,) = see(client, 1.5, "depth")
        np.testing.assert_allclose(actual, depth(camera_height=1.6, up=up), rtol=1e-4)
        until(
            lambda: client.values()["depth"].startswith("metric, from normals and the camera's height, "), "it says why"
        )
        assert 0 < float(client.values()["depth uncertainty percent"]) < 60
        assert client.change(DEACTIVATE)
        assert client.change(CLEANUP)
        assert all(one.successful for one in client.set(camera_height=0.0, imu=False, anchors="Range"))
        assert client.set(anchors_transform=[0.0, 0.0, 0.0, 0.5, -0.5, 0.5, 0.5])[0].successful
        assert client.change(CONFIGURE)
        assert client.change(ACTIVATE)
        client.forget_publishers("imu")
        client.publishes("anchors", reading(3.0))
        client.met()
        shape, relative = see(client, 2.5, "depth_up_to_scale", "relative_depth")
        np.testing.assert_allclose(shape, depth(), rtol=1e-4)
        np.testing.assert_array_equal(relative, geometry.prediction)
        until(lambda: "its unit unknown" in client.values()["depth"], "it says what is missing")
        assert client.values()["depth"].endswith("no ranges have come"), client.values()
        assert len(client.raw["depth"]) == 1, "without metres there is no depth"
        client.send("anchors", reading(3.0, at=3.5))
        client.took("anchors", 1)
        (metric,) = see(client, 3.5, "depth")
        u, v = np.rint(camera.project([[0.0, 0.0, 1.0]])[0]).astype(int)
        np.testing.assert_allclose(metric[v, u], 3.0, rtol=0.05)
        (later,) = see(client, 9.0, "depth")  # long after the reading
        np.testing.assert_allclose(later, metric, rtol=0.02)


@case
def a_lidar_whose_place_is_unknown_is_refused(bundle: Path) -> None:
    with robot({"bundle": bundle, "anchors": "LaserScan"}, active=False) as (client, _):
        assert not client.change(CONFIGURE)
        until(lambda: any("anchors_transform must say" in d.message for d in client.diagnostics), "it says why")


@case
def incompatible_qualities_of_service_are_reported(bundle: Path) -> None:
    from rclpy.qos import DurabilityPolicy, QoSProfile

    asked = {"qos_overrides./image.subscription.reliability": "reliable"}
    pixels = picture(6)
    with robot({"bundle": bundle, **asked}) as (client, process):
        client.listen("normals")
        client.node.create_subscription(
            RESULTS["normals"],
            "/geometry/normals",
            lambda message: None,
            QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL),
        )
        message = image(pixels, "rgb8")
        client.send("image", message, BEST_EFFORT)
        until(lambda: "problem: publisher" in client.values(), "the publisher is reported")
        until(lambda: "problem: subscriber" in client.values(), "the subscriber is reported")
        said = client.values()["problem: publisher"]
        assert "publisher of /image is incompatible: its reliability" in said, said
        assert "qos_overrides./image.subscription.reliability" in said
        assert "asks for more durability" in client.values()["problem: subscriber"]
        assert "/image is incompatible" in process.said
        client.forget_publishers()
        client.publishes("image", message, RELIABLE)
        client.met()
        client.send("image", message)
        client.results("normals", 1)


@case
def nothing_is_computed_for_nobody(bundle: Path) -> None:
    pixels = picture(7)
    with robot({"bundle": bundle}) as (client, _):
        client.publishes("image", image(pixels, "rgb8"))
        client.met()
        for _ in range(4):
            client.send("image", image(pixels, "rgb8"))
        until(lambda: client.values().get("images idle") == "4", "four are idle")
        assert client.values()["images published"] == "0"
        heard = client.listen("normals")
        client.met()
        client.send("image", image(pixels, "rgb8"))
        client.results("normals", 1)
        client.deafen(heard)
        client.met()
        client.send("image", image(pixels, "rgb8"))
        until(lambda: client.values().get("images idle") == "5", "and again")


@case
def bad_images_are_reported_and_the_next_is_used(bundle: Path) -> None:
    pixels = picture(8)
    broken = image(pixels, "rgb8")
    broken.data = broken.data[:100]
    with robot({"bundle": bundle}) as (client, _):
        client.listen("normals")
        client.publishes("image", broken)
        client.met()
        client.send("image", broken)
        until(lambda: any("100 bytes" in d.message for d in client.diagnostics), "it is in the diagnostics")
        client.send("image", image(pixels[..., 0].view(np.uint8), "32SC1"))
        client.send("image", image(pixels, "rgb8"))
        client.results("normals", 1)
        assert client.values()["state"] == "active"
