"""Limits that a person sets: at once, over restarts, until reset or a changed YAML."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from replicas.controller import UnknownService
from replicas.lifecycle import State


async def test_max_0_pauses_at_once_and_drains(world: Any) -> None:
    await world.become_ready()
    world.waits(2)
    assert world.controller.set_limits("r1", max=0) == {"min": 0, "max": 0, "override": True}
    await world.step()
    assert world.info.status == "paused"
    assert world.info.code == "service_paused"
    assert "gateway scale r1" in world.info.message
    await world.steps(3)
    assert world.replicas == []
    world.waits(0)
    world.arrives()
    await world.steps(5)
    assert len(world.provisioner.launched) == 1


async def test_a_start_is_ended_by_a_pause_even_while_somebody_waits(world: Any) -> None:
    world.waits(1)
    await world.steps(3)
    world.controller.set_limits("r1", max=0)
    await world.steps(3)
    assert world.replicas == []


async def test_an_override_survives_a_restart_and_ends_with_a_changed_yaml(world: Any) -> None:
    world.controller.set_limits("r1", min=1, max=1)
    world.start()
    await world.steps(3)
    assert world.states == [State.STARTING]
    limits = world.controller.status()["services"][0]["limits"]
    assert limits == {"min": 1, "max": 1, "override": True}
    world.start(yaml=world.text.replace("max_replicas: 2", "max_replicas: 3"))
    limits = world.controller.status()["services"][0]["limits"]
    assert limits == {"min": 0, "max": 3, "override": False}


async def test_reset_goes_back_to_the_yaml(world: Any) -> None:
    world.controller.set_limits("r1", max=9)
    assert world.controller.reset_limits("r1") == {"min": 0, "max": 2, "override": False}
    assert [e["code"] for e in world.events("limits")] == []  # told with the next tick
    await world.step()
    assert [e["code"] for e in world.events("limits")] == ["set", "reset"]


async def test_one_limit_leaves_the_other_as_it_was(world: Any) -> None:
    world.controller.set_limits("r1", min=1)
    assert world.controller.set_limits("r1", max=5) == {"min": 1, "max": 5, "override": True}


async def test_flags_win_over_the_yaml(world: Any) -> None:
    world.start(min_replicas=1, max_replicas=1)
    await world.steps(3)
    assert len(world.provisioner.launched) == 1
    assert world.controller.status()["services"][0]["limits"] == {"min": 1, "max": 1, "override": False}


NONSENSE = [({"min": -1}, "0 or more"), ({"min": 3}, "min 3 is above max 2")]


@pytest.mark.parametrize(("limits", "why"), NONSENSE)
async def test_nonsense_is_refused(world: Any, limits: dict[str, int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        world.controller.set_limits("r1", **limits)
    assert world.controller.status()["services"][0]["limits"]["override"] is False


async def test_an_unknown_service_is_named_with_those_there_are(world: Any) -> None:
    for ask in (world.controller.set_limits, world.controller.reset_limits, world.controller.retry):
        with pytest.raises(UnknownService, match="no service 'nope'; there is: r1"):
            ask("nope")


async def test_a_change_is_in_force_at_once_while_the_controller_runs(world: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("replicas.controller.TICK", 3600.0)
    run = asyncio.create_task(world.controller.run())
    try:
        async with asyncio.timeout(10):
            await world.control.until("open")
            world.controller.set_limits("r1", max=0)
            await world.control.until("paused")
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)


async def test_a_tick_that_raises_is_not_the_end(world: Any, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("replicas.controller.TICK", 0.01)
    broken = [RuntimeError("once")]
    take = world.control.take_suspects

    def take_suspects() -> dict[str, str]:
        if broken:
            raise broken.pop()
        return dict(take())

    world.control.take_suspects = take_suspects
    run = asyncio.create_task(world.controller.run())
    try:
        async with asyncio.timeout(10):
            await world.control.until("open")
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
    assert "the tick failed" in caplog.text
