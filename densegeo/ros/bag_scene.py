"""What a bag says of the scene beside its images: cameras, transforms, ranges and gravity, read as they come."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from densegeo.errors import ImageError
from densegeo.ros.bag_input import Bag, Item
from densegeo.ros.gravity import Gravity
from densegeo.ros.metric import ImageContext, rotated
from densegeo.ros.ranges import Transform, read_points
from densegeo.ros.static import StaticTransforms

STATIC = "/tf_static"


@dataclass(frozen=True)
class Sensors:
    """Topics of ranges and of an IMU, "" for none, and where they sit: seven numbers, () where /tf_static says it.

    anchors_max_age: seconds.
    """

    anchors_topic: str = ""
    anchors_transform: tuple[float, ...] = ()
    anchors_max_age: float = 0.2
    imu_topic: str = ""
    imu_transform: tuple[float, ...] = ()


class Source(NamedTuple):
    """An image topic. info: its camera_info's topic, or "" where there is none."""

    topic: str
    info: str

    @property
    def rectified(self) -> bool:
        """By ROS' convention on names (image_proc)."""
        return "image_rect" in self.topic

    def result(self, name: str) -> str:
        """The topic of a result."""
        return f"{base(self.topic)}/densegeo/{name}"


def base(topic: str) -> str:
    """Without the transport's suffix."""
    return topic.removesuffix("/compressed")


class Scene:
    """topics: those to `take`, message by message. Raises ConfigError for transforms that are none."""

    def __init__(self, bag: Bag, sources: Collection[Source], sensors: Sensors) -> None:
        self._bag, self._sensors = bag, sensors
        self._infos: dict[str, Any] = {}
        self._cameras: dict[tuple[str, bool], ImageContext] = {}
        self._ranges: Any = None
        self._gravity = Gravity()
        self._static = StaticTransforms()
        self._fixed_transforms = {
            topic: Transform.of(transform)
            for topic, transform in (
                (sensors.anchors_topic, sensors.anchors_transform),
                (sensors.imu_topic, sensors.imu_transform),
            )
            if topic and transform
        }
        infos = {source.info for source in sources if source.info}
        self._look_ahead(infos, {sensors.anchors_topic, sensors.imu_topic} - {""} - set(self._fixed_transforms))
        self.topics = infos | ({sensors.anchors_topic, sensors.imu_topic} - {""})

    def take(self, item: Item) -> None:
        """A message of one of `topics`."""
        message = self._bag.decode(item)
        if item.topic == self._sensors.anchors_topic:
            self._ranges = message
        elif item.topic == self._sensors.imu_topic:
            self._gravity.take(message)
        else:
            self._infos[item.topic] = message
            for rectified in (False, True):
                self._cameras.pop((item.topic, rectified), None)

    def info(self, source: Source) -> Any:
        """The newest camera_info, or None."""
        return self._infos.get(source.info)

    def context(self, source: Source, header: Any, size: tuple[int, int] | None) -> ImageContext:
        """Of an image, by what was taken until now. Raises BagError where a sensor's place is not known."""
        context = self._camera(source).at(size)
        for topic, add in ((self._sensors.anchors_topic, self._add_ranges), (self._sensors.imu_topic, self._add_up)):
            context = add(context, header) if topic else context
        return context

    def _add_ranges(self, context: ImageContext, header: Any) -> ImageContext:
        ranges, max_age = self._ranges, self._sensors.anchors_max_age
        if ranges is None or abs(_seconds(ranges.header) - _seconds(header)) > max_age:
            return context.without(f"no ranges lie within {max_age:g} s before the image")
        into = self._between(self._sensors.anchors_topic, ranges.header.frame_id, header.frame_id)
        try:
            return context._replace(points=into(read_points(ranges)))
        except ImageError as error:
            return context.without(str(error))

    def _add_up(self, context: ImageContext, header: Any) -> ImageContext:
        up = self._gravity.up(_seconds(header))
        if up is None:
            return context.without(self._gravity.problem)
        return context._replace(
            up=rotated(up, self._between(self._sensors.imu_topic, self._gravity.frame, header.frame_id))
        )

    def _between(self, topic: str, source: str, target: str) -> Transform:
        return self._fixed_transforms.get(topic) or self._static.between(source, target)

    def _camera(self, source: Source) -> ImageContext:
        key = (source.info, source.rectified)
        if key not in self._cameras:
            self._cameras[key] = ImageContext.of(self._infos.get(source.info), source.rectified)
        return self._cameras[key]

    def _look_ahead(self, infos: set[str], placed: set[str]) -> None:
        """Every topic's first camera_info, which may come after the first image, and all static transforms."""
        missing = set(infos)
        for item in self._bag.messages(missing):
            if item.topic in missing:
                self._infos[item.topic] = self._bag.decode(item)
                missing.discard(item.topic)
            if not missing:
                break
        for item in self._bag.messages([STATIC]) if placed else ():
            self._static.add(self._bag.decode(item))


def _seconds(header: Any) -> float:
    return float(header.stamp.sec + header.stamp.nanosec / 1e9)
