"""`densegeo bag`: the images of a ROS 2 bag through an estimator, results as another bag."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from densegeo.errors import BagError, CalibrationError, ConfigError, ImageError, ResourceError
from densegeo.notices import Notices, warn_if_empty
from densegeo.ros import outputs
from densegeo.ros.bag_input import STORE, Bag, Item
from densegeo.ros.bag_output import Output
from densegeo.ros.bag_scene import Scene, Sensors, Source, base
from densegeo.ros.images import Picture, check_conversion, check_format, read_compressed, read_image
from densegeo.ros.metric import ImageContext, MetresOptions, calibrated, tracker_arguments
from densegeo.ros.ranges import Transform
from densegeo.runtime import Estimator
from densegeo.runtime.bundle import MANIFEST, read_manifest
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.tracker import ScaleTracker

RAW, COMPRESSED, INFO = (f"sensor_msgs/msg/{name}" for name in ("Image", "CompressedImage", "CameraInfo"))
IMU = "sensor_msgs/msg/Imu"
RANGES = tuple(f"sensor_msgs/msg/{name}" for name in ("PointCloud2", "LaserScan", "Range"))
_SHOWN = 20  # reasons that are printed
AHEAD = 2  # images in the estimator while results are written


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `densegeo bag --help`."""

    bundle: Path
    source: Path
    output: Path
    image_topics: tuple[str, ...] = ()
    sensors: Sensors = field(default_factory=Sensors)
    metres: MetresOptions = field(default_factory=MetresOptions)
    ycbcr: str = ""
    results: outputs.Options = field(default_factory=outputs.Options)
    overwrite: bool = False
    backend: str = "auto"
    device: str = "auto"


class Waiting(NamedTuple):
    """An image in the estimator."""

    source: Source
    number: int
    time: int
    header: Any
    picture: Picture
    info: Any
    context: ImageContext
    future: Future[Geometry]


def run(options: Options) -> int:
    """Work through the bag and print a summary; returns how many images failed, 1 more for a bag that was cut off, and
    1 more where metres were asked for and no image got any.

    Raises BagError and other densegeo errors for what keeps it from beginning or going on, and where no image could be
    used, so that there is no output.
    """
    read_manifest(options.bundle)
    check(options)
    bag = Bag.open(options.source)
    sources = choose(bag, options.image_topics)
    check_topic(bag, options.sensors.anchors_topic, RANGES, "anchors are")
    check_topic(bag, options.sensors.imu_topic, (IMU,), "an IMU's topic is")
    console = Console(stderr=True)
    notices = Notices(lambda notice: _say(console, "yellow", "warning", notice.text))
    try:
        with notices.collected(), Estimator(options.bundle, options.backend, options.device) as estimator:
            work = _Work(bag, sources, options, estimator)
            work.run(console)
    except OSError as error:
        raise ResourceError(f"Cannot write {options.output}: {error.strerror or error}.") from error
    finished = work.images - len(work.failures)
    console.print(f"{finished} of {work.images} images done, results in {escape(str(options.output))}", soft_wrap=True)
    console.print(f"depth is {escape(work.depth)}", soft_wrap=True)
    for reason, times in _grouped(work.failures):
        _say(console, "red", "failed", f"{times} images: {reason}")
    if bag.cut:
        console.print(
            f"[red]incomplete[/] {escape(str(bag.path))}: {escape(bag.cut)}; the rest was used", soft_wrap=True
        )
    for notice in (notice for notice in notices.kinds.values() if notice.count > 1):
        _say(console, "yellow", "warning", f"{notice.count} times, first: {notice.text}")
    lacking = len(work.without_metres)
    for reason, times in _grouped(work.without_metres)[:_SHOWN]:
        _say(console, "yellow", "no metres", f"{times} of {work.images} images: {reason}")
    return len(work.failures) + bool(bag.cut) + (0 < lacking == finished)


def _say(console: Console, colour: str, word: str, text: str) -> None:
    console.print(f"[{colour}]{word}[/] {escape(text)}", soft_wrap=True, highlight=False)


def check(options: Options) -> None:
    """Raises ConfigError for options that cannot be, before the bag is looked at."""
    if options.output.suffix != ".mcap":
        raise ConfigError(f"The output is one mcap file: name it {options.output.with_suffix('.mcap')}.")
    check_conversion(options.ycbcr)
    parts = sorted(options.source.iterdir()) if options.source.is_dir() else [options.source]
    if options.output.exists() and any(part.exists() and part.samefile(options.output) for part in parts):
        raise ConfigError(f"{options.output} is the bag that is read: choose another name.")
    if options.output.exists() and not options.overwrite:
        raise ConfigError(f"{options.output} exists. Choose another name, or say --overwrite.")
    near, far, height = options.metres
    if (near, far) != (0, 0) and not 0 < near < far < math.inf:
        raise ConfigError("--near and --far belong together, in metres with 0 < near < far.")
    if not 0 <= height < math.inf:
        raise ConfigError(f"--camera-height is metres above 0, not {height:g}.")
    if options.sensors.imu_topic and not height:
        raise ConfigError("--imu-topic says which way is up, which --camera-height alone needs: give it too.")
    sensors = options.sensors
    if far and (height or sensors.anchors_topic):
        other = "--camera-height" if height else "--anchors-topic"
        raise ConfigError(f"Give either --near and --far or {other}, not both: each says where metres come from.")
    if not 0 <= sensors.anchors_max_age < math.inf:
        raise ConfigError(f"--anchors-max-age is 0 or more seconds, not {sensors.anchors_max_age:g}.")
    for name, topic, transform in (
        ("anchors", sensors.anchors_topic, sensors.anchors_transform),
        ("imu", sensors.imu_topic, sensors.imu_transform),
    ):
        if transform and not topic:
            raise ConfigError(f"--{name}-transform says where a sensor sits: give --{name}-topic too.")
        if transform:
            try:
                Transform.of(transform)
            except ConfigError as error:
                raise ConfigError(f"--{name}-transform: {error}") from error


def choose(bag: Bag, topics: Sequence[str]) -> list[Source]:
    """The image topics to work on. Raises BagError for one that is not there or holds no pictures, and where none was
    asked for and none has a camera_info.
    """
    for topic in topics:
        if topic not in bag.topics:
            raise BagError(f"{bag.path} has no topic {topic}; it has {', '.join(sorted(bag.topics))}.")
        if bag.topics[topic] not in (RAW, COMPRESSED):
            raise BagError(f"{topic} is of type {bag.topics[topic]}, not {RAW} or {COMPRESSED}.")
    if topics:
        return [Source(topic, _info_of(bag, topic)) for topic in dict.fromkeys(topics)]
    images = [topic for topic, kind in bag.topics.items() if kind in (RAW, COMPRESSED)]
    plain = [topic for topic in images if topic == base(topic) or base(topic) not in images]
    problems = {topic: _no_pictures(bag, topic) for topic in sorted(plain) if _info_of(bag, topic)}
    if usable := [Source(topic, _info_of(bag, topic)) for topic, why in problems.items() if not why]:
        return usable
    if not images:
        raise BagError(f"{bag.path} has no image topic; it has {', '.join(sorted(bag.topics))}.")
    if problems:
        reasons = " ".join(f"{topic}: {why}" for topic, why in problems.items())
        raise BagError(f"No image topic of {bag.path} that has a camera_info holds pictures. {reasons}")
    places = ", ".join(f"{topic} (looked for {_info_name(topic)})" for topic in images)
    raise BagError(
        f"No image topic of {bag.path} has a camera_info: {places}. With --image-topic it is used without one: depth "
        "and normals, and no points."
    )


def check_topic(bag: Bag, topic: str, kinds: Sequence[str], are: str) -> None:
    """Raises BagError for a topic that was asked for and is not there, or is of none of these types."""
    if topic and topic not in bag.topics:
        raise BagError(f"{bag.path} has no topic {topic}; it has {', '.join(sorted(bag.topics))}.")
    if topic and bag.topics[topic] not in kinds:
        raise BagError(f"{topic} is of type {bag.topics[topic]}; {are} one of {', '.join(kinds)}.")


def _info_name(topic: str) -> str:
    return f"{base(topic).rpartition('/')[0]}/camera_info"


def _info_of(bag: Bag, topic: str) -> str:
    name = _info_name(topic)
    return name if bag.topics.get(name) == INFO else ""


def _no_pictures(bag: Bag, topic: str) -> str:
    """Why a topic's first message is no picture, or ""."""
    first = next(iter(bag.messages([topic])), None)
    if first is None:
        return "It has no message."
    try:
        check_format(bag.decode(first))
    except ImageError as error:
        return str(error)
    return ""


def _grouped(failures: Sequence[str]) -> list[tuple[str, int]]:
    return [(reason, failures.count(reason)) for reason in dict.fromkeys(failures)]


class _Work:
    """One run. images: of the chosen topics, worked on or done before. depth: why it is metric, or why not.

    without_metres: why, of each image that has none although they were asked for.
    """

    def __init__(self, bag: Bag, sources: Sequence[Source], options: Options, estimator: Estimator) -> None:
        self._bag, self._options, self._estimator = bag, options, estimator
        self._sources = {source.topic: source for source in sources}
        self.images, self.failures, self.depth = 0, list[str](), "not known: no image was worked on"
        self.without_metres: list[str] = []
        self._scene = Scene(bag, sources, options.sensors)
        self._trackers = {source.topic: ScaleTracker() for source in sources}
        # depth that rests on the frames before it needs them again when a run goes on
        has_metres = options.metres.camera_height > 0 or options.sensors.anchors_topic
        self._metres_asked = bool(has_metres or options.metres.far)
        alone = any(source.info for source in sources) and not options.metres.far
        self._steady = bool(has_metres or alone)

    def run(self, console: Console) -> None:
        columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        output = Output(self._options.output, self._note())
        waiting: deque[Waiting] = deque()
        total = sum(self._bag.counts[topic] for topic in self._sources)
        with output.open() as earlier, Progress(*columns, console=console) as progress:
            begin = 0 if self._steady else earlier.images
            task = progress.add_task("", total=total, completed=begin)
            if begin > earlier.written:
                self.failures += ["before the run was interrupted"] * (begin - earlier.written)
            for number, item in self._numbered():
                if number < begin:
                    continue
                try:
                    waiting.append(self._started(number, item))
                except ImageError as error:
                    self.failures.append(str(error))
                    progress.advance(task)
                while len(waiting) > AHEAD:
                    self._finish(waiting.popleft(), output, earlier.images)
                    progress.advance(task)
            while waiting:
                self._finish(waiting.popleft(), output, earlier.images)
                progress.advance(task)
            if len(self.failures) == self.images:
                output.discard()
                why = "; ".join(reason for reason, _ in _grouped(self.failures)) or "there is none"
                raise BagError(
                    f"None of {self.images} images could be used, so there is no {self._options.output}: {why}"
                )

    def _note(self) -> dict[str, str]:
        """What the output is made from: an interrupted run goes on only with the same."""
        options = self._options
        bundle = hashlib.sha256((options.bundle / MANIFEST).read_bytes()).hexdigest()
        settings = (sorted(self._sources), options.sensors, options.metres, options.ycbcr, options.results)
        counts = {topic: self._bag.counts[topic] for topic in sorted(self._bag.counts)}
        return {"bundle": bundle, "source": options.source.name, "options": repr(settings), "messages": repr(counts)}

    def _numbered(self) -> Iterator[tuple[int, Item]]:
        """Images in their order; what lies between them is remembered."""
        number = 0
        for item in self._bag.messages({*self._sources, *self._scene.topics}):
            if item.topic in self._sources:
                self.images += 1
                yield number, item
                number += 1
            else:
                self._scene.take(item)

    def _started(self, number: int, item: Item) -> Waiting:
        """Raises ImageError."""
        source, message = self._sources[item.topic], self._bag.decode(item)
        compressed = self._bag.topics[item.topic] == COMPRESSED
        picture = read_compressed(message) if compressed else read_image(message, self._options.ycbcr)
        context = self._scene.context(source, message.header, picture.size)
        info = self._scene.info(source)
        future = self._estimator.submit(picture.image, picture.color)
        return Waiting(source, number, item.time, message.header, picture, info, context, future)

    def _finish(self, waiting: Waiting, output: Output, written: int) -> None:
        """written: images whose results are there already, from before an interruption."""
        try:
            result = waiting.future.result()
        except ImageError as error:
            self.failures.append(str(error))
            return
        geometry = self._calibrated(waiting, result)
        if waiting.number < written:
            return
        fields_of = outputs.messages(
            geometry, waiting.picture, waiting.context.camera, outputs.TOPICS, self._options.results
        )
        for name, fields in fields_of.items():
            output.write(
                waiting.source.result(name),
                outputs.TOPICS[name],
                _message(name, waiting.header, fields),
                waiting.time,
                waiting.number,
            )
        if waiting.info is not None:
            info = type(waiting.info)(**{**vars(waiting.info), "header": waiting.header})
            output.write(waiting.source.result("camera_info"), INFO, info, waiting.time, waiting.number)

    def _calibrated(self, waiting: Waiting, result: Geometry) -> Geometry:
        """With depth where anything tells it, steady from image to image."""
        warn_if_empty(result)
        refusal: CalibrationError | None = None
        if (
            self._steady
            and result.prediction is not None
            and (arguments := tracker_arguments(waiting.context, self._options.metres))
        ):
            try:
                result = self._trackers[waiting.source.topic].update(result, **arguments)
            except CalibrationError as error:
                refusal = error
        geometry, self.depth = calibrated(result, refusal, waiting.context, self._options.metres)
        if self._metres_asked and geometry.depth_kind != "metric":
            self.without_metres.append(self.depth.partition(": ")[2])
        return geometry


def _message(name: str, header: Any, fields: outputs.Fields) -> Any:
    point_field = STORE.types["sensor_msgs/msg/PointField"]
    message_fields = dict(fields)
    if "fields" in message_fields:
        message_fields["fields"] = [point_field(**point_fields) for point_fields in message_fields["fields"]]
    return STORE.types[outputs.TOPICS[name]](header=header, **message_fields)
