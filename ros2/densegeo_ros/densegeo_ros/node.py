"""The lifecycle node: image and camera_info in; depth, normals, points, camera_info and diagnostics out."""

from __future__ import annotations

import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from densegeo.errors import BackendError, ConfigError, DensegeoError, ImageError
from densegeo.ros import outputs
from densegeo.ros.images import Picture, read_compressed, read_image
from densegeo.ros.metric import ImageContext, MetresOptions, calibrated, tracker_arguments, uncertainty
from densegeo.runtime import Estimator
from densegeo.runtime.stream import FrameResult
from densegeo_ros import convert, parameters, qos
from densegeo_ros.diagnostics import Tally
from densegeo_ros.sensors import RANGE_SENSORS, Frames, ImuSensor, RangeSensor
from densegeo_ros.worker import Worker

SUCCESS, FAILURE, ERROR = (getattr(TransitionCallbackReturn, name) for name in ("SUCCESS", "FAILURE", "ERROR"))
KEPT = 30  # camera_infos that may wait for their images


class InFlight(NamedTuple):
    """What goes with an image through the network."""

    header: Any
    picture: Picture
    info: CameraInfo | None
    context: ImageContext
    topics: frozenset[str]  # results that had subscribers when it came


class GeometryNode(LifecycleNode):
    """configure loads and checks the bundle, activate warms up and subscribes, deactivate keeps the model, cleanup
    frees it. A backend that fails or hangs is an error transition, which ends unconfigured.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("geometry", **options)
        parameters.declare(self)
        self.add_on_set_parameters_callback(self._check_parameters)
        self._values, self._metres_options = SimpleNamespace(), MetresOptions()
        self._estimator: Estimator | None = None
        self._worker: Worker | None = None
        self._sensors: list[RangeSensor | ImuSensor] = []
        self._infos: OrderedDict[int, CameraInfo] = OrderedDict()
        self._camera: tuple[Any, ImageContext] = (None, ImageContext.of(None, False))
        self._inputs: list[Any] = []
        self._results: dict[str, Any] = {}
        self._tally, self._last_run, self._reported = Tally(), 0, self.get_clock().now()
        self._failed = self.create_guard_condition(self._end_by_error)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._timer: Any = None

    # Transitions. What a callback raises rclpy takes for an error and says nothing of, so each is told here.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._tried(self._configure, state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._tried(self._activate, state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._stop()
        super().on_deactivate(state)
        return ERROR if "failure" in self._tally.problems else SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        self._tally.problems.clear()
        return SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        return SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._report()
        self._release()
        return SUCCESS  # unconfigured: whoever manages the node may configure it again

    def _tried(
        self, step: Callable[[LifecycleState], TransitionCallbackReturn], state: LifecycleState
    ) -> TransitionCallbackReturn:
        try:
            return step(state)
        except DensegeoError as error:
            self._problem("failure", str(error))
            self._report()
            return ERROR if isinstance(error, BackendError) and self._estimator is not None else FAILURE
        except Exception:
            self.get_logger().error(traceback.format_exc())
            return ERROR

    def _configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        self._tally = Tally()
        values = self._values = parameters.read(self)
        if self._timer is None:
            self._timer = self.create_timer(values.diagnostics_period, self._report)
        self._metres_options = MetresOptions(values.near, values.far, values.camera_height)
        self._sensors = self._make_sensors(values)
        self._estimator = Estimator(
            values.bundle, values.backend, values.device, fit=values.fit, timeout_s=values.timeout_s
        )
        has = self._estimator.manifest.decode.has
        lacking = set() if has("depth") else {"depth", "depth_up_to_scale", "relative_depth", "points"}
        lacking |= set() if has("normals") else {"normals", "depth_up_to_scale"}
        for topic, kind in convert.CLASSES.items():
            if topic not in lacking:
                self._results[topic] = self._publisher(kind, f"~/{topic}")
        running = f"{self._estimator.backend} on {self._estimator.device}"
        self.get_logger().info(f"{values.bundle}: {self._estimator.manifest.model}, {running}")
        return super().on_configure(state)

    def _activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        assert self._estimator is not None
        for size in {bucket.size for bucket in self._estimator.manifest.buckets}:
            blank = np.zeros((size.height, size.width, 3), np.uint8)
            self._estimator.submit(blank).result()
        self._worker = Worker(self._estimator, self._on_result, self._on_failure)
        compressed = self._values.image_transport == "compressed"
        kind, topic = (CompressedImage, "image/compressed") if compressed else (Image, "image")
        self._subscribe(kind, topic, self._on_image)
        self._subscribe(CameraInfo, "camera_info", self._on_camera_info)
        for sensor in self._sensors:
            self._subscribe(sensor.kind, sensor.topic, partial(self._on_reading, sensor))
        return super().on_activate(state)

    def _stop(self) -> None:
        """No images any more; the model stays."""
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._inputs.clear()
        if self._worker is not None:
            self._worker.close()
            self._tally.count("dropped", self._worker.dropped)
            self._worker = None
        self._tally.problems.pop("publisher", None)

    def _release(self) -> None:
        self._stop()
        for publisher in self._results.values():
            self.destroy_lifecycle_publisher(publisher)
        self._results.clear()
        self._sensors.clear()
        self._infos.clear()
        if self._estimator is not None:
            self._estimator.close(drain=False)
            self._estimator = None
        if self._timer is not None:
            self.destroy_timer(self._timer)
            self._timer = None

    def _make_sensors(self, values: SimpleNamespace) -> list[RangeSensor | ImuSensor]:
        sensors: list[RangeSensor | ImuSensor] = []
        if values.anchors:
            frames = Frames(self, values.anchors_transform, "anchors_transform")
            sensors.append(RangeSensor(RANGE_SENSORS[values.anchors], frames, values.anchors_max_age))
        if values.imu:
            sensors.append(ImuSensor(Frames(self, values.imu_transform, "imu_transform")))
        return sensors

    def _subscribe(self, kind: type, topic: str, callback: Callable[[Any], None]) -> None:
        name = self.resolve_topic_name(topic)
        events = qos.subscription_events(name, self._mismatch, lambda times: self._tally.count("lost", times))
        self._inputs.append(
            self.create_subscription(
                kind,
                topic,
                callback,
                qos.SENSOR_DATA,
                event_callbacks=events,
                qos_overriding_options=qos.overridable(),
            )
        )

    def _publisher(self, kind: type, topic: str) -> Any:
        name = self.resolve_topic_name(topic)
        return self.create_lifecycle_publisher(
            kind,
            topic,
            qos.RESULTS,
            event_callbacks=qos.publisher_events(name, self._mismatch),
            qos_overriding_options=qos.overridable(),
        )

    # What comes in

    def _on_reading(self, sensor: RangeSensor | ImuSensor, message: Any) -> None:
        self._tally.count(f"of {sensor.topic}")
        sensor.take(message)

    def _on_camera_info(self, info: CameraInfo) -> None:
        self._tally.count("of camera_info")
        self._infos[convert.nanoseconds(info.header)] = info
        while len(self._infos) > KEPT:
            self._infos.popitem(last=False)

    def _on_image(self, message: Any, about: Any) -> None:
        self._tally.receive(about["publication_sequence_number"] or 0)
        topics = self._subscribed()
        if self.get_parameter("lazy").value and not topics:
            self._tally.count("idle")
            return
        rate, now = self.get_parameter("max_rate").value, self.get_clock().now().nanoseconds
        if rate > 0 and 0 <= now - self._last_run < 1e9 / rate:
            self._tally.count("skipped")
            return
        self._last_run = now
        assert self._worker is not None
        try:
            frame = self._in_flight(message, topics)
            self._worker.put(frame.picture.image, frame.picture.color, frame, **self._tracker_arguments(frame))
        except BackendError as error:
            self._on_failure(error)
        except (ImageError, ConfigError) as error:
            self._reject(error)

    def _in_flight(self, message: Any, topics: frozenset[str]) -> InFlight:
        """Raises ImageError."""
        picture = read_compressed(message) if hasattr(message, "format") else read_image(message, self._values.ycbcr)
        header = message.header
        info = self._infos.get(convert.nanoseconds(header)) or next(reversed(self._infos.values()), None)
        context = self._camera_of(info)
        context = context if context.camera is None else context.at(picture.size)
        for sensor in self._sensors:
            context = sensor.add(context, header)
        return InFlight(header, picture, info, context, topics)

    def _tracker_arguments(self, frame: InFlight) -> dict[str, Any]:
        """What the stream is told. The camera alone gives depth of an unknown unit: only where somebody wants that."""
        has_metres = self._sensors or self._metres_options.camera_height
        return (
            tracker_arguments(frame.context, self._metres_options)
            if has_metres or "depth_up_to_scale" in frame.topics
            else {}
        )

    def _camera_of(self, info: CameraInfo | None) -> ImageContext:
        """Made anew only when the calibration changes."""
        if info is None:
            return ImageContext.of(None, False)
        key = (
            *info.k,
            *info.d,
            *info.p,
            info.distortion_model,
            info.width,
            info.height,
            info.binning_x,
            repr(info.roi),
        )
        if self._camera[0] != key:
            self._camera = key, ImageContext.of(info, self._values.rectified)
        return self._camera[1]

    # What goes out, in the worker's thread

    def _on_result(self, result: FrameResult) -> None:
        frame: InFlight = result.frame_id  # type: ignore[assignment]
        if isinstance(result.error, BackendError):
            raise result.error
        if result.error is not None:
            self._reject(result.error)
            return
        geometry, self._tally.depth = calibrated(result.geometry, result.refusal, frame.context, self._metres_options)
        self._tally.uncertainty = uncertainty(geometry)
        options = outputs.Options(self.get_parameter("depth_encoding").value, self.get_parameter("points_stride").value)
        fields = outputs.messages(geometry, frame.picture, frame.context.camera, frame.topics, options)
        header = convert.header(frame.header)
        for topic, content in fields.items():
            self._results[topic].publish(convert.message(topic, header, content))
        if frame.info is not None and "camera_info" in frame.topics:
            self._results["camera_info"].publish(convert.camera_info(frame.header, frame.info))
        self._tally.count("published")
        age = (self.get_clock().now().nanoseconds - convert.nanoseconds(frame.header)) / 1e6
        self._tally.observe({**geometry.timings, "stamp to publication": age})

    def _subscribed(self) -> frozenset[str]:
        return frozenset(topic for topic, publisher in self._results.items() if publisher.get_subscription_count())

    # What goes wrong

    def _reject(self, error: Exception) -> None:
        self._tally.count("failed")
        self._tally.error(str(error))
        self.get_logger().error(f"an image was not used: {error}", throttle_duration_sec=5.0)

    def _mismatch(self, sentence: str) -> None:
        self._problem("publisher" if sentence.startswith("a publisher") else "subscriber", sentence)

    def _problem(self, what: str, sentence: str) -> None:
        self.get_logger().error(sentence)
        self._tally.problems[what] = sentence

    def _on_failure(self, error: Exception) -> None:
        """From any thread; the executor's makes the transition."""
        if not self.context.ok():
            return  # the process ends
        self._problem("failure", f"{type(error).__name__}: {error}")
        self._failed.trigger()

    def _end_by_error(self) -> None:
        if self._state_machine.current_state[1] == "active":
            self.trigger_deactivate()

    def _check_parameters(self, changed: list[Any]) -> Any:
        return parameters.check(changed, self._estimator is not None)

    def _report(self) -> None:
        now = self.get_clock().now()
        seconds = max((now - self._reported).nanoseconds / 1e9, 1e-3)
        self._reported = now
        hardware = "" if self._estimator is None else f"{self._estimator.backend} on {self._estimator.device}"
        state = self._state_machine.current_state[1]
        dropped = 0 if self._worker is None else self._worker.dropped
        name = f"{self.get_fully_qualified_name().lstrip('/')}: geometry"
        status = self._tally.report(name, hardware, state, seconds, dropped, self._links())
        message = DiagnosticArray(status=[status])
        message.header.stamp = now.to_msg()
        self._diagnostics.publish(message)

    def _links(self) -> dict[str, int]:
        """Who is at the other end of each topic, and what came of those that go with the images."""
        links = {f"publishers of {end.topic_name}": qos.publishers(self, end) for end in self._inputs}
        links |= {f"subscribers of {end.topic_name}": end.get_subscription_count() for end in self._results.values()}
        beside = ["camera_info", *(sensor.topic for sensor in self._sensors)]
        return links | {f"messages of {self.resolve_topic_name(t)}": self._tally.counts[f"of {t}"] for t in beside}


def main(arguments: list[str] | None = None) -> int:
    """Run the node until it is told to end."""
    rclpy.init(args=arguments)
    node = GeometryNode()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node._release()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
