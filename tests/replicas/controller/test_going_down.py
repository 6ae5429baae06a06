"""`gateway down`: every replica ended, and verified against what truly exists."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from replicas.lifecycle import State
from replicas.provisioners import Instance, InstancesUnknown, NoCapacity


@contextmanager
def passing_time(world: Any, per_second: float = 2000.0) -> Iterator[None]:
    """The clock runs by itself meanwhile."""

    async def go() -> None:
        while True:
            await asyncio.sleep(0.005)
            world.clock.now += 0.005 * per_second

    task = asyncio.create_task(go())
    try:
        yield
    finally:
        task.cancel()


async def test_everything_is_ended_and_those_who_wait_are_told(world: Any) -> None:
    await world.become_ready()
    with passing_time(world):
        assert await world.controller.down(5, pause=0.01) == []
    assert world.info.status == "stopping"
    assert world.info.upstreams == ()
    assert world.replicas == []
    assert world.machines_of() == set()


async def test_with_nothing_there_it_returns_at_once(world: Any) -> None:
    assert await world.controller.down(5) == []


async def test_nothing_is_launched_any_more(world: Any) -> None:
    await world.become_ready()
    world.waits(5)
    with passing_time(world):
        await world.controller.down(5, pause=0.01)
    assert world.provisioner.launched == [world.id(1)]


async def test_a_start_and_a_launch_under_way_are_ended_too(world: Any) -> None:
    world.controller.set_limits("r1", min=2)
    world.provisioner.gate = asyncio.Event()
    await world.steps(2)
    assert world.states == [State.PROVISIONING] * 2
    with passing_time(world):
        assert await world.controller.down(5, pause=0.01) == []


async def test_streams_get_a_short_time_to_end(world: Any) -> None:
    world.start(down_drain_limit=30.0)
    await world.become_ready()
    world.lease(world.id(1))
    began = world.clock.now
    with passing_time(world, 1000.0):
        assert await world.controller.down(5, pause=0.01) == []
    assert world.clock.now - began >= 30
    assert any("drain limit of 30 s" in e["reason"] for e in world.events("transition"))


async def test_what_cannot_be_ended_is_named_and_tried_again_meanwhile(world: Any) -> None:
    await world.become_ready()
    world.provisioner.terminate_error = RuntimeError("API is down")
    with passing_time(world):
        assert await world.controller.down(0.5, pause=0.01) == [world.id(1)]
    assert len(world.provisioner.terminated) > 1
    world.provisioner.terminate_error = None
    with passing_time(world):
        assert await world.controller.down(5, pause=0.01) == []


async def test_a_machine_without_a_row_is_ended_before_down_is_finished(world: Any) -> None:
    stray = f"r1-gw-{world.table.owner}-99"
    world.provisioner.machines[stray] = Instance(stray, True)
    with passing_time(world):
        assert await world.controller.down(5, pause=0.01) == []
    assert world.provisioner.terminated == [stray]


async def test_an_unknown_state_of_the_world_is_not_verified(world: Any) -> None:
    world.provisioner.instances_error = InstancesUnknown("no answer")
    assert await world.controller.down(0.1, pause=0.01) == ["(unknown: no answer)"]


async def test_a_provisioner_that_never_answers_ends_the_wait_at_its_limit(world: Any) -> None:
    async def never(fresh: object = ()) -> Any:
        await asyncio.sleep(3600)

    world.provisioner.instances = never
    async with asyncio.timeout(5):
        assert await world.controller.down(0.2, pause=0.01) == ["(unknown: no answer in time)"]


async def test_the_pause_of_a_launch_that_failed_delays_no_end(world: Any) -> None:
    """What a failed attempt has left bills."""
    world.provisioner.launch_error = NoCapacity("none is free")
    world.waits(1)
    await world.steps(120)
    assert world.states == [State.PROVISIONING]
    world.waits(0)
    world.controller.set_limits("r1", max=0)
    await world.steps(3)
    assert world.provisioner.terminated == [world.id(1)]


async def test_an_unexpected_error_of_a_launch_is_logged_without_secrets(world: Any, caplog: Any) -> None:
    key = world.controller.keys["r1"]
    world.provisioner.launch_error = TypeError(f"unexpected argument {key}")
    world.waits(1)
    await world.steps(3)
    assert "TypeError: unexpected argument ***" in caplog.text
    assert key not in caplog.text


async def test_a_drain_under_way_gets_the_short_time_and_nobody_calls_it_back(world: Any) -> None:
    world.start(drain_limit=1e6)
    await world.become_ready()
    world.lease(world.id(1))
    world.controller.set_limits("r1", max=0)
    await world.steps(3)
    assert world.states == [State.DRAINING]
    world.controller.reset_limits("r1")
    world.waits(1)
    with passing_time(world):
        assert await world.controller.down(5, pause=0.01) == []
    assert "resume" not in [e["code"] for e in world.events("transition")]


@pytest.mark.parametrize("steps", range(6))
async def test_a_controller_that_is_poked_as_it_is_cancelled_ends_nevertheless(
    world: Any, steps: int
) -> None:
    """`gateway down` of a service at zero: the last look pokes it and the end cancels it, at one moment."""
    run = asyncio.create_task(world.controller.run())
    await asyncio.sleep(0.15)  # it waits for its next tick
    world.controller.poke(0)
    for _ in range(steps):
        await asyncio.sleep(0)
    run.cancel()
    done, _ = await asyncio.wait([run], timeout=1)
    run.cancel()
    assert done
