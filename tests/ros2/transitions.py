"""Lifecycle transitions in any order, against a model of them."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.ros2.common import picture
from tests.ros2.robot import ACTIVATE, CLEANUP, CONFIGURE, DEACTIVATE, Client, robot, until
from tests.support.ros import image

ALLOWED = {  # state -> transition -> what it leads to
    "unconfigured": {CONFIGURE: "inactive"},
    "inactive": {ACTIVATE: "active", CLEANUP: "unconfigured"},
    "active": {DEACTIVATE: "inactive"},
}
SENT = image(picture(12), "rgb8")


class Transitions(RuleBasedStateMachine):
    """One node for all runs; each begins unconfigured, so that the same steps can be tried again."""

    client: Client

    def __init__(self) -> None:
        super().__init__()
        self.state = "unconfigured"

    @rule(transition=st.sampled_from([CONFIGURE, ACTIVATE, DEACTIVATE, CLEANUP]))
    def change(self, transition: int) -> None:
        goal = ALLOWED[self.state].get(transition)
        assert self.client.change(transition) == (goal is not None)
        self.state = goal or self.state

    @rule()
    def send(self) -> None:
        """In any state; only an active node answers."""
        self.client.send("image", SENT)

    @precondition(lambda self: self.state == "active")
    @rule()
    def answer(self) -> None:
        before = len(self.client.raw["normals"])

        def answered() -> bool:
            self.client.send("image", SENT)
            return len(self.client.raw["normals"]) > before

        until(answered, "an active node answers")

    def teardown(self) -> None:
        for transition in (DEACTIVATE, CLEANUP):
            if transition in ALLOWED[self.client.state]:
                assert self.client.change(transition)

    @invariant()
    def states_agree(self) -> None:
        assert self.client.state == self.state


def check(bundle: Path) -> None:
    with robot({"bundle": bundle}, active=False) as (client, _):
        client.listen("normals")
        Transitions.client = client
        options = settings(
            max_examples=12,
            stateful_step_count=12,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(Transitions, settings=options)
