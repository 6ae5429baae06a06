"""A replica that our life does not keep alive any more: a countdown, and an alarm at half time."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from replicas.lifecycle import State


class Timers:
    """Of a provisioner: armed again each tick while `armed`."""

    def __init__(self, world: Any, limit: float = 7200.0) -> None:
        self.world, self.limit, self.at = world, limit, world.clock.now + limit
        self.armed = True

    def __call__(self, id: str) -> float:
        if self.armed:
            self.at = self.world.clock.now + self.limit
        return self.at


@pytest.fixture
async def timers(world: Any) -> Timers:
    world.provisioner.dead_man = Timers(world)
    await world.become_ready()
    return world.provisioner.dead_man  # type: ignore[no-any-return]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]


def replica(world: Any) -> Any:
    return world.controller.status()["services"][0]["replicas"][0]


async def test_a_living_gateway_never_alarms(
    world: Any, timers: Timers, caplog: pytest.LogCaptureFixture
) -> None:
    world.start(min_replicas=1)
    await world.steps(100, 600.0)
    assert world.events("dead_man") == []
    assert errors(caplog) == []
    assert (replica(world)["dead_man_seconds"], replica(world)["dead_man_limit_seconds"]) == (7200.0, 7200.0)


async def test_at_half_time_there_is_an_alarm_once_and_the_end_of_the_trouble_is_told(
    world: Any, timers: Timers, caplog: pytest.LogCaptureFixture
) -> None:
    world.start(min_replicas=1)
    await world.step()
    timers.armed = False
    await world.steps(59, 60.0)
    assert world.events("dead_man") == []
    assert replica(world)["dead_man_seconds"] == 7200.0 - 59 * 60  # the countdown shows from the first on
    await world.steps(10, 60.0)
    (event,) = world.events("dead_man")
    assert (event["replica"], event["code"]) == (world.id(1), "half")
    assert "ends itself in 60 min" in event["reason"]
    assert [line for line in errors(caplog) if world.id(1) in line] == [f"{world.id(1)}: {event['reason']}"]
    timers.armed = True
    await world.steps(3)
    assert [e["code"] for e in world.events("dead_man")] == ["half", "armed"]
    assert world.states == [State.READY]  # nobody has ended it for that


async def test_the_alarm_comes_while_skypilot_does_not_answer(world: Any, timers: Timers) -> None:
    """That is when a timer cannot be armed: nothing else is known of the replica then."""
    world.start(min_replicas=1)
    await world.step()
    timers.armed = False
    world.provisioner.instances_error = RuntimeError("the API server is away")
    await world.steps(61, 60.0)
    assert [e["code"] for e in world.events("dead_man")] == ["half"]
    assert replica(world)["dead_man_seconds"] == 7200.0 - 61 * 60
    assert replica(world)["dead_man_limit_seconds"] == 7200.0
    assert world.states == [State.READY]


async def test_a_replica_that_is_being_ended_raises_no_alarm(world: Any, timers: Timers) -> None:
    timers.armed = False
    world.provisioner.terminate_error = RuntimeError("not yet")
    await world.controller.down(limit=0.0)
    await world.steps(80, 60.0)
    assert world.states == [State.TERMINATING]
    assert world.events("dead_man") == []


async def test_local_and_static_replicas_have_no_timer(world: Any) -> None:
    await world.become_ready()
    assert replica(world)["dead_man_seconds"] is None
    assert replica(world)["dead_man_limit_seconds"] is None
    assert world.controller.status()["provisioner"] == {"says": None, "trouble": False}


async def test_what_the_provisioner_says_of_itself_is_in_the_status(world: Any) -> None:
    world.provisioner.says, world.provisioner.trouble = "SkyPilot API server: does not answer", True
    await world.step()
    said = world.controller.status()["provisioner"]
    assert said == {"says": "SkyPilot API server: does not answer", "trouble": True}
