"""Machines under our name that no row knows are ended and paid for; machines that are not ours are shown."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from replicas.costs import Entry
from replicas.lifecycle import State
from replicas.plans import Options
from replicas.provisioners import Instance, InstancesUnknown, Other


def stray(world: Any, n: int = 7, **more: Any) -> str:
    id: str = world.id(n)
    world.provisioner.machines[id] = Instance(id, True, hourly_cost=60.0, **more)
    return id


def entries(world: Any, id: str) -> list[Entry]:
    return [e for e in world.table.ledger() if e.replica == id]


def total(world: Any) -> float:
    return float(world.controller.status()["services"][0]["cost"]["total"])


async def test_a_stray_is_paid_for_from_its_launch_until_it_is_gone(world: Any) -> None:
    id = stray(world, launched_at=world.clock.now - 3600.0, region="aws/us-east-1", spot=True)
    world.provisioner.terminate_error = RuntimeError("the cloud does not answer")
    await world.steps(10, 30.0)
    (open,) = entries(world, id)
    assert (open.service, open.region, open.spot, open.closed) == ("r1", "aws/us-east-1", True, False)
    assert total(world) == pytest.approx(60.0 + 5.0)
    assert world.observer.dollars == pytest.approx(total(world))
    world.provisioner.terminate_error = None
    await world.steps(20, 30.0, until=lambda: not world.machines_of())
    await world.steps(2)
    (closed,) = entries(world, id)
    assert closed.closed
    paid = total(world)
    await world.steps(10, 60.0)
    assert total(world) == paid == pytest.approx(60.0 + (closed.until - closed.begun - 3600.0) / 60.0)


async def test_a_replica_that_was_called_gone_and_was_not_is_paid_for_without_a_gap(world: Any) -> None:
    world.provisioner.cost = 60.0
    await world.become_ready()
    machine = world.provisioner.machines[world.id(1)]
    world.controller.set_limits("r1", max=0)
    await world.steps(5, until=lambda: not world.replicas)
    before = total(world)
    world.provisioner.machines[world.id(1)] = machine
    world.clock.now += 600.0
    await world.steps(5)
    first, second = entries(world, world.id(1))
    assert (second.part, second.begun) == (2, first.until)
    assert total(world) > before + 10.0
    assert world.machines_of() == set()


async def test_the_bill_of_a_stray_goes_on_over_a_restart_and_is_never_counted_twice(world: Any) -> None:
    stray(world)
    world.provisioner.terminate_error = RuntimeError("no")
    await world.steps(10, 60.0)
    assert total(world) == pytest.approx(9.0, abs=1.1)
    world.clock.now += 3600.0
    world.start()
    await world.steps(5, 60.0)
    assert total(world) == pytest.approx(60.0 + 14.0, abs=1.1)
    world.provisioner.instances_error = InstancesUnknown("no answer")
    await world.steps(5, 60.0)
    world.provisioner.instances_error = None
    await world.steps(5, 60.0)
    assert total(world) == pytest.approx(60.0 + 24.0, abs=1.1)
    parts = entries(world, world.id(7))
    for one, next in pairwise(parts):
        assert next.begun == one.until


async def test_it_is_told_in_events_and_status_and_an_end_that_fails_is_repeated_with_a_back_off(
    world: Any,
) -> None:
    id = stray(world)
    world.provisioner.terminate_error = RuntimeError("the cloud does not answer")
    await world.steps(60)
    (found,) = world.events("stray")
    assert (found["replica"], found["service"], found["code"]) == (id, "r1", "found")
    assert "$60.00 an hour" in found["reason"]
    assert len(world.provisioner.terminated) == len(world.events("terminate_failed")) == 4, "5, 10, 20 s"
    (seen,) = world.controller.status()["strays"]
    assert (seen["id"], seen["hourly_cost"], seen["tries"]) == (id, 60.0, 4)
    assert "the cloud does not answer; next try in 40 s" in seen["reason"]
    world.provisioner.terminate_error = None
    await world.steps(45)
    assert world.controller.status()["strays"] == []
    assert [e["code"] for e in world.events("stray")] == ["found", "gone"]


async def test_what_a_stray_costs_counts_toward_the_limits_on_money(world: Any) -> None:
    prices = {"": 50.0}
    world.start(launch=Options(prices=prices, max_hourly_cost=100.0, max_daily_cost=1000.0))
    stray(world, launched_at=world.clock.now - 7200.0)  # $60 an hour
    world.provisioner.terminate_error = RuntimeError("no")
    await world.steps(3)
    world.waits(1)
    await world.steps(3)
    assert world.replicas == []
    assert "$60.00 an hour now" in world.info.message
    world.provisioner.terminate_error = None
    await world.steps(30, until=lambda: world.replicas)
    world.start(launch=Options(prices=prices, max_daily_cost=100.0))
    stray(world, launched_at=world.clock.now - 7200.0)
    world.provisioner.terminate_error = RuntimeError("no")
    await world.steps(3)
    assert world.controller.fleets["r1"].launches.elsewhere.day == pytest.approx(120.0, abs=0.2)


async def test_what_is_not_ours_is_shown_and_survives_start_crash_and_down(world: Any) -> None:
    theirs = ("r1-A100", "r1-gw-deadbeef-1", "training")
    world.provisioner.not_ours = [Other(name, "UP", 12.5) for name in theirs]
    await world.become_ready()
    shown = [{"name": name, "status": "UP", "hourly_cost": 12.5} for name in theirs[:2]]
    assert world.controller.status()["others"] == shown
    world.start()
    await world.steps(3)
    assert world.controller.status()["others"] == shown
    world.controller.set_limits("r1", max=0)
    await world.steps(5, until=lambda: not world.replicas)
    assert await world.controller.down(5) == []
    assert world.provisioner.terminated == [world.id(1)]


async def test_a_failure_to_show_what_is_not_ours_hurts_nothing(world: Any) -> None:
    async def broken(services: object) -> list[Other]:
        raise RuntimeError("a fault")

    world.provisioner.others = broken
    await world.become_ready()
    assert world.states == [State.READY]
    assert world.controller.status()["others"] == []


async def test_a_row_that_comes_back_from_the_dead_is_no_stray(world: Any) -> None:
    await world.become_ready()
    (row,) = world.replicas
    world.table.save([replace(row, state=State.NOT_READY)])
    world.start()
    await world.steps(5)
    assert world.events("stray") == []
