"""Qualities of service, and publishers and subscribers that do not fit together: said in the log and in diagnostics."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ImportError:  # before Iron
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_policy_name_from_kind
from rclpy.qos_overriding_options import QoSOverridingOptions, QoSPolicyKind

SENSOR_DATA = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
RESULTS = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)  # which best-effort readers take, too

Report = Callable[[str], None]


def overridable() -> QoSOverridingOptions:
    """Makes the parameters qos_overrides.TOPIC.subscription.reliability, and so on for depth, history, durability."""
    kinds = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
    return QoSOverridingOptions(kinds)


def subscription_events(topic: str, report: Report, lost: Callable[[int], None]) -> SubscriptionEventCallbacks:
    """report: is told, in a sentence, of publishers of this topic that cannot reach us; lost: a count of messages."""

    def incompatible(event: object) -> None:
        policy = _name(event)
        report(
            f"a publisher of {topic} is incompatible: its {policy} is less than what is asked for here. Set "
            f"qos_overrides.{topic}.subscription.{policy} to what `ros2 topic info -v {topic}` shows of it."
        )

    return _those_there_are(
        SubscriptionEventCallbacks,
        incompatible_qos=incompatible,
        incompatible_type=lambda event: report(f"a publisher of {topic} publishes another type of message"),
        message_lost=lambda event: lost(event.total_count_change),
    )


def publisher_events(topic: str, report: Report) -> PublisherEventCallbacks:
    """The same for subscribers of what is published here."""

    def incompatible(event: object) -> None:
        policy = _name(event)
        report(
            f"a subscriber of {topic} is incompatible: it asks for more {policy} than is offered. Change it, or set "
            f"qos_overrides.{topic}.publisher.{policy}."
        )

    return _those_there_are(
        PublisherEventCallbacks,
        incompatible_qos=incompatible,
        incompatible_type=lambda event: report(f"a subscriber of {topic} expects another type of message"),
    )


def publishers(node: Any, subscription: Any) -> int:
    """How many reach it; before Jazzy how many there are, compatible or not."""
    if hasattr(subscription, "get_publisher_count"):
        return int(subscription.get_publisher_count())
    return int(node.count_publishers(subscription.topic_name))


def _those_there_are(kind: Any, **callbacks: Any) -> Any:
    """Events that this ROS does not know are not listened to."""
    parameters = inspect.signature(kind).parameters
    return kind(**{name: callback for name, callback in callbacks.items() if name in parameters})


def _name(event: object) -> str:
    kind = qos_policy_name_from_kind(event.last_policy_kind)  # type: ignore[attr-defined]
    return str(kind).removesuffix("_QOS_POLICY").lower()
