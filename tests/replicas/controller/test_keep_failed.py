"""A machine that failed is held for a person to look at."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from replicas.lifecycle import State


async def crash(world: Any) -> None:
    """Replica 1 gets its machine after a while and serves, then its `run` ends; its machine is there."""
    world.provisioner.gate = asyncio.Event()
    world.waits(1)
    await world.steps(3)
    world.provisioner.gate.set()
    await world.become_ready()
    machine = world.provisioner.machines[world.id(1)]
    world.provisioner.machines[world.id(1)] = replace(machine, alive=False, detail="out of memory")
    world.prober.every = "refused"
    await world.steps(2)


def told(world: Any) -> dict[str, Any]:
    replica: dict[str, Any] = world.controller.status()["services"][0]["replicas"][0]
    return replica


async def test_a_failed_machine_is_ended_at_once_unless_it_is_to_be_kept(world: Any) -> None:
    await crash(world)
    assert world.provisioner.terminated == [world.id(1)]


async def test_a_kept_machine_stays_failed_with_a_countdown_and_is_ended_then(world: Any) -> None:
    world.provisioner.cost = 60.0
    world.start(keep_failed=1800.0)
    await crash(world)
    failed_at = world.replica(world.id(1)).since
    assert (told(world)["state"], told(world)["kept_until"]) == ("failed", failed_at + 1800.0)
    before = world.controller.status()["services"][0]["cost"]["total"]
    await world.steps(29, 60.0)
    assert world.states == [State.FAILED]
    assert world.provisioner.terminated == []
    assert world.controller.status()["services"][0]["cost"]["total"] == pytest.approx(before + 29)
    (event,) = world.events("kept")
    assert event["replica"] == world.id(1)
    assert event["reason"] == "its machine is kept for 1800 s: --keep-failed"
    await world.steps(3, 60.0)
    assert world.provisioner.terminated == [world.id(1)]


async def test_another_replica_is_launched_beside_a_kept_one(world: Any) -> None:
    world.start(keep_failed=1800.0)
    await crash(world)
    world.prober.every = True
    world.waits(1)
    await world.steps(5)
    assert world.states == [State.FAILED, State.READY]


async def test_the_countdown_goes_on_over_a_restart(world: Any) -> None:
    world.start(keep_failed=1800.0)
    await crash(world)
    until = told(world)["kept_until"]
    world.start()
    await world.steps(2)
    assert told(world)["kept_until"] == until
    world.start(keep_failed=0.0)
    await world.steps(2)
    assert world.provisioner.terminated == [world.id(1)]


async def test_what_has_no_machine_any_more_is_not_kept(world: Any) -> None:
    world.start(keep_failed=1800.0)
    await crash(world)
    world.provisioner.machines.clear()
    await world.steps(2)
    assert world.provisioner.terminated == [world.id(1)]


async def test_a_preempted_replica_is_not_kept(world: Any) -> None:
    world.start(keep_failed=1800.0)
    await world.become_ready()
    world.provisioner.machines.clear()
    world.prober.every = "refused"
    await world.steps(2)
    assert world.provisioner.terminated == [world.id(1)]


async def test_down_ends_what_is_kept(world: Any) -> None:
    world.start(keep_failed=1800.0)
    await crash(world)
    assert await world.controller.down(5.0, pause=0.01) == []
    assert world.machines_of() == set()
