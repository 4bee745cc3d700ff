"""The node in a process of its own, and a client that knows messages only as bytes that rosbags encodes and decodes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import DescribeParameters, GetParameters, SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu, LaserScan, PointCloud2, Range

from tests.support.ros import STORE

CONFIGURE, CLEANUP, ACTIVATE, DEACTIVATE, SHUTDOWN = 1, 2, 3, 4, 5
CLASSES = {cls.__name__: cls for cls in (CameraInfo, CompressedImage, Image, Imu, LaserScan, PointCloud2, Range)}
RESULTS = dict.fromkeys(("depth", "depth_up_to_scale", "relative_depth", "normals"), Image)
RESULTS |= {"points": PointCloud2, "camera_info": CameraInfo}
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PATIENCE = 60.0  # seconds; a loaded machine is slow
RELIABLE = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
BEST_EFFORT = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)


class Process:
    """The node's. module: what is run; parameters: given on the command line."""

    def __init__(self, parameters: dict[str, Any], module: str = "densegeo_ros.node") -> None:
        self.log = Path(tempfile.mkstemp(suffix=".log")[1])
        given = [word for name, value in parameters.items() for word in ("-p", f"{name}:={_text(value)}")]
        command = [sys.executable, "-m", module, "--ros-args", *given]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=_die_with_parent)
        self.pid = self._process.pid

    def end(self, how: int = signal.SIGINT) -> int:
        """Send a signal and wait; the exit status."""
        with suppress(ProcessLookupError):
            self._process.send_signal(how)
        try:
            return self._process.wait(PATIENCE)
        finally:
            self._process.kill()

    @property
    def said(self) -> str:
        return self.log.read_text()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"'{value}'" if value == "" else str(value)


class Client:
    """raw: topic -> the bytes of every message that came. diagnostics: the geometry node's statuses."""

    def __init__(self) -> None:
        rclpy.init()
        self.node = rclpy.create_node("client")
        self.raw: dict[str, list[bytes]] = defaultdict(list)
        self.diagnostics: list[Any] = []
        self._publishers: dict[str, Any] = {}
        self._listens: set[str] = set()
        self.node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: self.diagnostics.extend(m.status), 100)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        with suppress(Exception):
            self._executor.spin()

    def close(self) -> None:
        self._executor.shutdown()
        self._thread.join(5)
        rclpy.try_shutdown()

    def listen(self, *topics: str, qos: QoSProfile = RELIABLE) -> list[Any]:
        """To results of the node."""
        self._listens.update(topics)
        return [
            self.node.create_subscription(
                RESULTS[topic],
                f"/geometry/{topic}",
                lambda data, to=self.raw[topic]: to.append(bytes(data)),
                qos,
                raw=True,
            )
            for topic in topics
        ]

    def deafen(self, subscriptions: list[Any]) -> None:
        for subscription in subscriptions:
            self._listens.discard(subscription.topic_name.removeprefix("/geometry/"))
            self.node.destroy_subscription(subscription)

    def send(self, topic: str, message: Any, qos: QoSProfile = RELIABLE) -> None:
        """A message of rosbags' types."""
        kind = message.__msgtype__
        if topic not in self._publishers:
            self._publishers[topic] = self.node.create_publisher(CLASSES[kind.rpartition("/")[2]], topic, qos)
        self.send_encoded(topic, bytes(STORE.serialize_cdr(message, kind)))

    def send_encoded(self, topic: str, message: bytes) -> None:
        """A message's CDR bytes, to a topic that has a publisher."""
        self._publishers[topic].publish(message)

    def publishes(self, topic: str, message: Any, qos: QoSProfile = RELIABLE) -> None:
        """From now on."""
        kind = message.__msgtype__
        self._publishers[topic] = self.node.create_publisher(CLASSES[kind.rpartition("/")[2]], topic, qos)

    def met(self) -> None:
        """Wait until node and client know of each other's ends of every topic; what is sent before may be lost.

        Each side learns of the other by itself, so that a publisher's own count does not tell.
        """
        ends = {f"publishers of /{topic}": 1 for topic in self._publishers}
        ends |= {f"subscribers of /geometry/{topic}": int(topic in self._listens) for topic in RESULTS}
        until(lambda: all(one.get_subscription_count() for one in self._publishers.values()), "the node subscribes")
        seen = len(self.diagnostics)

        def known() -> bool:
            return any(
                all(said.get(end, "0") == str(count) for end, count in ends.items())
                for said in map(keys, self.diagnostics[seen:])
            )

        until(known, f"the node knows of {ends}")

    def took(self, topic: str, count: int) -> None:
        """Wait until so many messages of a topic that goes with images have reached the node."""
        until(lambda: self.values().get(f"messages of /{topic}") == str(count), f"{count} messages of {topic} came")

    def forget_publishers(self, *topics: str) -> None:
        """Of these topics, or all."""
        for topic in topics or tuple(self._publishers):
            self.node.destroy_publisher(self._publishers.pop(topic))

    def call(self, kind: Any, service: str, patience: float = PATIENCE, **fields: Any) -> Any:
        client = self.node.create_client(kind, f"/geometry/{service}")
        try:
            assert client.wait_for_service(patience), f"no service {service}"
            answer = client.call(kind.Request(**fields), timeout_sec=patience)
            assert answer is not None, f"{service} did not answer"
            return answer
        finally:
            self.node.destroy_client(client)

    def change(self, transition: int, patience: float = PATIENCE) -> bool:
        request = ChangeState.Request().transition
        request.id = transition
        return bool(self.call(ChangeState, "change_state", patience, transition=request).success)

    @property
    def state(self) -> str:
        return str(self.call(GetState, "get_state").current_state.label)

    def set(self, **values: Any) -> list[Any]:
        """Each parameter by itself; the results."""
        messages = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        return list(self.call(SetParameters, "set_parameters", parameters=messages).results)

    def describe(self, *names: str) -> list[Any]:
        return list(self.call(DescribeParameters, "describe_parameters", names=list(names)).descriptors)

    def get(self, *names: str) -> list[Any]:
        return list(self.call(GetParameters, "get_parameters", names=list(names)).values)

    def results(self, topic: str, count: int) -> list[Any]:
        """Wait for so many messages, and decode them."""
        until(lambda: len(self.raw[topic]) >= count, f"{count} messages on {topic}, not {len(self.raw[topic])}")
        kind = f"sensor_msgs/msg/{RESULTS[topic].__name__}"
        return [STORE.deserialize_cdr(data, kind) for data in self.raw[topic]]

    def values(self) -> dict[str, str]:
        """Of the newest diagnostics."""
        return keys(self.diagnostics[-1]) if self.diagnostics else {}


def keys(status: Any) -> dict[str, str]:
    """Of a diagnostics' status."""
    return {pair.key: pair.value for pair in status.values}


def until(condition: Callable[[], bool], event: str, patience: float = PATIENCE) -> None:
    """Wait; AssertionError when it does not come about."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"in {patience:g} s: {event}"
        time.sleep(0.01)


@contextmanager
def robot(
    parameters: dict[str, Any], *, active: bool = True, module: str = "densegeo_ros.node"
) -> Iterator[tuple[Client, Process]]:
    """A node and a client. active: configured and activated."""
    process, client = Process({"diagnostics_period": 0.2, **parameters}, module), Client()
    try:
        if active:
            assert client.change(CONFIGURE), process.said
            assert client.change(ACTIVATE), process.said
        yield client, process
    except AssertionError as error:
        raise AssertionError(f"{error}\nthe node said:\n{process.said}") from error
    finally:
        client.close()
        status = process.end()
        os.unlink(process.log)
        assert status in (0, -signal.SIGKILL), f"the node ended with {status}"
