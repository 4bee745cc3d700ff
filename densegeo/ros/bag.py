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

from densegeo.errors import BagError, ConfigError, ImageError, ResourceError
from densegeo.ros import outputs
from densegeo.ros.bag_input import STORE, Bag, Item
from densegeo.ros.bag_output import Output
from densegeo.ros.images import ENCODINGS, Picture, check_conversion, read_compressed, read_image
from densegeo.ros.metric import Evidence, calibrated, explain
from densegeo.ros.ranges import Transform, read_points
from densegeo.ros.static import StaticTransforms
from densegeo.runtime import Camera, Estimator
from densegeo.runtime.bundle import MANIFEST
from densegeo.runtime.geometry import Geometry

RAW, COMPRESSED, INFO = (f"sensor_msgs/msg/{name}" for name in ("Image", "CompressedImage", "CameraInfo"))
RANGES = tuple(f"sensor_msgs/msg/{name}" for name in ("PointCloud2", "LaserScan", "Range"))
STATIC = "/tf_static"
AHEAD = 2  # images in the estimator while results are written


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `densegeo bag --help`."""

    bundle: Path
    source: Path
    output: Path
    image_topics: tuple[str, ...] = ()
    anchors_topic: str = ""
    anchors_transform: tuple[float, ...] = ()
    anchors_max_age: float = 0.2  # seconds
    near: float = 0.0  # metres
    far: float = 0.0
    ycbcr: str = ""
    results: outputs.Options = field(default_factory=outputs.Options)
    overwrite: bool = False
    backend: str = "auto"
    device: str = "auto"


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


class Waiting(NamedTuple):
    """An image in the estimator."""

    source: Source
    number: int
    time: int
    header: Any
    picture: Picture
    info: Any
    evidence: Evidence
    future: Future[Geometry]


def base(topic: str) -> str:
    """Without the transport's suffix."""
    return topic.removesuffix("/compressed")


def run(options: Options) -> int:
    """Work through the bag and print a summary; returns how many images failed, and 1 more for a bag that was cut off.

    Raises BagError and other densegeo errors for what keeps it from beginning or going on.
    """
    if options.output.suffix != ".mcap":
        raise ConfigError(f"The output is one mcap file: name it {options.output.with_suffix('.mcap')}.")
    check_conversion(options.ycbcr)
    parts = sorted(options.source.iterdir()) if options.source.is_dir() else [options.source]
    if options.output.exists() and any(part.exists() and part.samefile(options.output) for part in parts):
        raise ConfigError(f"{options.output} is the bag that is read: choose another name.")
    if options.output.exists() and not options.overwrite:
        raise ConfigError(f"{options.output} exists. Choose another name, or say --overwrite.")
    if (options.near, options.far) != (0, 0) and not 0 < options.near < options.far < math.inf:
        raise ConfigError("--near and --far belong together, in metres with 0 < near < far.")
    bag = Bag.open(options.source)
    sources = choose(bag, options.image_topics)
    check_ranges(bag, options.anchors_topic)
    console = Console(stderr=True)
    try:
        with Estimator(options.bundle, options.backend, options.device) as estimator:
            work = _Work(bag, sources, options, estimator)
            work.run(console)
    except OSError as error:
        raise ResourceError(f"Cannot write {options.output}: {error.strerror or error}.") from error
    done = work.images - len(work.failures)
    console.print(f"{done} of {work.images} images done, results in {escape(str(options.output))}", soft_wrap=True)
    console.print(f"depth is {escape(work.depth)}", soft_wrap=True)
    for reason, times in _grouped(work.failures):
        console.print(f"[red]failed[/] {times} images: {escape(reason)}", soft_wrap=True, highlight=False)
    if bag.cut:
        console.print(
            f"[red]incomplete[/] {escape(str(bag.path))}: {escape(bag.cut)}; the rest was used", soft_wrap=True
        )
    return len(work.failures) + bool(bag.cut)


def choose(bag: Bag, asked: Sequence[str]) -> list[Source]:
    """The image topics to work on. Raises BagError for one that is not there or holds no pictures, and where none was
    asked for and none has a camera_info.
    """
    for topic in asked:
        if topic not in bag.topics:
            raise BagError(f"{bag.path} has no topic {topic}; it has {', '.join(sorted(bag.topics))}.")
        if bag.topics[topic] not in (RAW, COMPRESSED):
            raise BagError(f"{topic} is of type {bag.topics[topic]}, not {RAW} or {COMPRESSED}.")
    if asked:
        return [Source(topic, _info_of(bag, topic)) for topic in dict.fromkeys(asked)]
    images = [topic for topic, kind in bag.topics.items() if kind in (RAW, COMPRESSED)]
    plain = [topic for topic in images if topic == base(topic) or base(topic) not in images]
    found = [Source(topic, info) for topic in sorted(plain) if (info := _info_of(bag, topic)) and _pictures(bag, topic)]
    if found:
        return found
    if not images:
        raise BagError(f"{bag.path} has no image topic; it has {', '.join(sorted(bag.topics))}.")
    places = ", ".join(f"{topic} (looked for {_info_name(topic)})" for topic in images)
    raise BagError(
        f"No image topic of {bag.path} has a camera_info: {places}. With --image-topic it is used without one: depth "
        "and normals, and no points."
    )


def check_ranges(bag: Bag, topic: str) -> None:
    """Raises BagError for a topic that is not there or measures nothing."""
    if topic and topic not in bag.topics:
        raise BagError(f"{bag.path} has no topic {topic}; it has {', '.join(sorted(bag.topics))}.")
    if topic and bag.topics[topic] not in RANGES:
        raise BagError(f"{topic} is of type {bag.topics[topic]}; anchors are one of {', '.join(RANGES)}.")


def _info_name(topic: str) -> str:
    return f"{base(topic).rpartition('/')[0]}/camera_info"


def _info_of(bag: Bag, topic: str) -> str:
    name = _info_name(topic)
    return name if bag.topics.get(name) == INFO else ""


def _pictures(bag: Bag, topic: str) -> bool:
    """Whether a topic's first message is a picture; depth cameras publish images that are none."""
    first = next(iter(bag.messages([topic])), None)
    if first is None:
        return False
    message = bag.decode(first)
    return "compressedDepth" not in message.format if hasattr(message, "format") else message.encoding in ENCODINGS


def _grouped(failures: Sequence[str]) -> list[tuple[str, int]]:
    return [(reason, failures.count(reason)) for reason in dict.fromkeys(failures)]


class _Work:
    """One run. images: of the chosen topics, worked on or done before. depth: why it is metric, or why not."""

    def __init__(self, bag: Bag, sources: Sequence[Source], options: Options, estimator: Estimator) -> None:
        self._bag, self._options, self._estimator = bag, options, estimator
        self._sources = {source.topic: source for source in sources}
        self.images, self.failures, self.depth = 0, list[str](), "not known: no image was worked on"
        self._infos: dict[str, Any] = {}
        self._cameras: dict[tuple[str, bool], Camera | None] = {}
        self._ranges: Any = None
        self._transforms = StaticTransforms()
        given = options.anchors_transform
        self._given = Transform.of(given) if given else None

    def run(self, console: Console) -> None:
        columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._look_ahead()
        output = Output(self._options.output, self._note())
        waiting: deque[Waiting] = deque()
        total = sum(self._bag.counts[topic] for topic in self._sources)
        with output.open() as done, Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=total, completed=done)
            for number, item in self._numbered():
                if number < done:
                    continue
                try:
                    waiting.append(self._started(number, item))
                except ImageError as error:
                    self.failures.append(str(error))
                    progress.advance(task)
                while len(waiting) > AHEAD:
                    self._finish(waiting.popleft(), output)
                    progress.advance(task)
            while waiting:
                self._finish(waiting.popleft(), output)
                progress.advance(task)

    def _note(self) -> dict[str, str]:
        """What the output is made from: an interrupted run goes on only with the same."""
        options = self._options
        bundle = hashlib.sha256((options.bundle / MANIFEST).read_bytes()).hexdigest()
        rest = (options.anchors_topic, options.anchors_transform, options.anchors_max_age, options.near, options.far)
        asked = (sorted(self._sources), *rest, options.ycbcr, options.results)
        counts = {topic: self._bag.counts[topic] for topic in sorted(self._bag.counts)}
        return {"bundle": bundle, "source": options.source.name, "options": repr(asked), "messages": repr(counts)}

    def _look_ahead(self) -> None:
        """Every topic's first camera_info, which may come after the first image, and all static transforms."""
        missing = {source.info for source in self._sources.values() if source.info}
        for item in self._bag.messages(missing):
            if item.topic in missing:
                self._infos[item.topic] = self._bag.decode(item)
                missing.discard(item.topic)
            if not missing:
                break
        if self._options.anchors_topic and self._given is None:
            for item in self._bag.messages([STATIC]):
                self._transforms.add(self._bag.decode(item))

    def _numbered(self) -> Iterator[tuple[int, Item]]:
        """Images in their order; what lies between them is remembered."""
        infos = {source.info for source in self._sources.values() if source.info}
        ranges = {self._options.anchors_topic} - {""}
        number = 0
        for item in self._bag.messages({*self._sources, *infos, *ranges}):
            if item.topic in infos:
                self._remember_info(item)
            elif item.topic in ranges:
                self._ranges = self._bag.decode(item)
            else:
                self.images += 1
                yield number, item
                number += 1

    def _remember_info(self, item: Item) -> None:
        self._infos[item.topic] = self._bag.decode(item)
        for rectified in (False, True):
            self._cameras.pop((item.topic, rectified), None)

    def _started(self, number: int, item: Item) -> Waiting:
        """Raises ImageError."""
        source, message = self._sources[item.topic], self._bag.decode(item)
        compressed = self._bag.topics[item.topic] == COMPRESSED
        picture = read_compressed(message) if compressed else read_image(message, self._options.ycbcr)
        info = self._infos.get(source.info)
        evidence = self._evidence(source, message.header)
        future = self._estimator.submit(picture.image, picture.color)
        return Waiting(source, number, item.time, message.header, picture, info, evidence, future)

    def _evidence(self, source: Source, header: Any) -> Evidence:
        found = Evidence(self._camera(source), near=self._options.near, far=self._options.far)
        ranges = self._ranges
        if ranges is None or abs(_seconds(ranges.header) - _seconds(header)) > self._options.anchors_max_age:
            return found
        transform = self._given or self._transforms.between(ranges.header.frame_id, header.frame_id)
        return found._replace(points=transform(read_points(ranges)))

    def _camera(self, source: Source) -> Camera | None:
        key = (source.info, source.rectified)
        if key not in self._cameras:
            info = self._infos.get(source.info)
            self._cameras[key] = None if info is None else Camera.from_camera_info(info, source.rectified)
        return self._cameras[key]

    def _finish(self, one: Waiting, output: Output) -> None:
        try:
            result = one.future.result()
        except ImageError as error:
            self.failures.append(str(error))
            return
        geometry, reason = calibrated(result, one.evidence)
        self.depth = reason or explain(geometry)
        everything = outputs.messages(geometry, one.picture, one.evidence.camera, outputs.TOPICS, self._options.results)
        for name, fields in everything.items():
            output.write(
                one.source.result(name), outputs.TOPICS[name], _message(name, one.header, fields), one.time, one.number
            )
        if one.info is not None:
            info = type(one.info)(**{**vars(one.info), "header": one.header})
            output.write(one.source.result("camera_info"), INFO, info, one.time, one.number)


def _seconds(header: Any) -> float:
    return float(header.stamp.sec + header.stamp.nanosec / 1e9)


def _message(name: str, header: Any, fields: outputs.Fields) -> Any:
    point_field = STORE.types["sensor_msgs/msg/PointField"]
    rest = dict(fields)
    if "fields" in rest:
        rest["fields"] = [point_field(**one) for one in rest["fields"]]
    return STORE.types[outputs.TOPICS[name]](header=header, **rest)
