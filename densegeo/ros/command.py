"""The command `densegeo bag`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from densegeo.arguments import Backend, Bundle, Device, Number
from densegeo.errors import ConfigError
from densegeo.infer_options import choice, depth_range
from densegeo.ros import outputs
from densegeo.ros.bag import Options, check, run
from densegeo.ros.bag_scene import Sensors
from densegeo.ros.metric import MetresOptions


def bag(
    bundle: Bundle,
    source: Annotated[Path, typer.Argument(metavar="IN", help="A ROS 2 bag: a folder, a .mcap or a .db3 file.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The new bag, a .mcap file.")],
    image_topic: Annotated[
        list[str], typer.Option(help="An image topic; again for more. Default: all that have a camera_info.")
    ] = [],  # noqa: B006  typer copies it
    anchors_topic: Annotated[
        str, typer.Option(help="Measured ranges that make depth metric: PointCloud2, LaserScan or Range.")
    ] = "",
    anchors_transform: Annotated[
        str, typer.Option(help='"x y z qx qy qz qw" of their frame in the camera\'s. Default: from /tf_static.')
    ] = "",
    anchors_max_age: Annotated[float, typer.Option(help="Seconds between an image and its ranges at most.")] = 0.2,
    camera_height: Annotated[
        float, typer.Option(help="Metres of the camera over the floor; makes depth metric where a floor is seen.")
    ] = 0.0,
    imu_topic: Annotated[str, typer.Option(help="Imu messages: which way is up, for --camera-height.")] = "",
    imu_transform: Annotated[
        str, typer.Option(help='"x y z qx qy qz qw" of its frame in the camera\'s. Default: from /tf_static.')
    ] = "",
    near: Annotated[Number, typer.Option(help="Depth in metres of the nearest point; goes with --far.")] = None,
    far: Annotated[Number, typer.Option(help="Depth in metres of the farthest point.")] = None,
    depth_encoding: Annotated[str, typer.Option(help="Metres: 32FC1, or millimetres in 16 bits: 16UC1.")] = "32FC1",
    points_stride: Annotated[int, typer.Option(min=1, help="Every n-th pixel along both sides becomes a point.")] = 4,
    ycbcr: Annotated[str, typer.Option(help="How nv12, yuyv, uyvy become RGB: bt709, full, bt709-full.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    backend: Backend = "auto",
    device: Device = "auto",
) -> None:
    """The images of a ROS 2 bag -> another bag with depth, normals, points and camera_info, no ROS needed.

    Results lie beside each image topic under TOPIC/densegeo/, with the images' stamps and frames: depth (metres), or
    relative_depth (the prediction) and with a camera_info depth_up_to_scale (true shape, unit unknown); normals, points
    (with metres and a camera_info), camera_info. An interrupted run goes on when the same command is given again.
    """
    options = Options(
        bundle=bundle,
        source=source,
        output=output,
        image_topics=tuple(image_topic),
        sensors=Sensors(
            anchors_topic=anchors_topic,
            anchors_transform=_numbers("--anchors-transform", anchors_transform),
            anchors_max_age=anchors_max_age,
            imu_topic=imu_topic,
            imu_transform=_numbers("--imu-transform", imu_transform),
        ),
        metres=MetresOptions(*(depth_range(near, far) or (0.0, 0.0)), camera_height),
        ycbcr=ycbcr,
        results=outputs.Options(_encoding(depth_encoding), points_stride),
        overwrite=overwrite,
        backend=backend,
        device=device,
    )
    try:
        check(options)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if run(options):
        raise typer.Exit(1)


def _encoding(text: str) -> outputs.DepthEncoding:
    return cast(outputs.DepthEncoding, choice("--depth-encoding", text, outputs.DEPTH_ENCODINGS))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        hint = f"is seven numbers, x y z qx qy qz qw, not {text!r}."
        raise typer.BadParameter(hint, param_hint=option) from None
