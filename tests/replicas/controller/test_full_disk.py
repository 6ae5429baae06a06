"""A disk that is full: nothing is launched, nothing that should end bills on, and all goes on afterwards."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from replicas.table import TableError


def no_space(world: Any) -> None:
    def full(*_: Any) -> None:
        raise TableError("database or disk is full")

    world.table.save = full


async def steps(world: Any, count: int) -> None:
    for _ in range(count):
        with contextlib.suppress(TableError):
            await world.step()


async def test_a_crashed_replica_is_ended_though_nothing_can_be_saved(world: Any) -> None:
    await world.become_ready()
    id = world.id(1)
    save = world.table.save
    no_space(world)
    machine = world.provisioner.machines[id]
    world.provisioner.machines[id] = replace(machine, alive=False, detail="exit code -9")
    world.prober.answers[id] = "connection refused"
    await steps(world, 8)
    assert world.provisioner.terminated == [id]
    assert world.provisioner.machines == {}

    world.table.save = save
    await world.steps(3)
    assert [r.id for r in world.table.replicas()] == []


async def test_nobody_waits_for_a_launch_that_could_not_be_recorded(world: Any) -> None:
    no_space(world)
    world.waits(1)
    await steps(world, 5)
    assert world.provisioner.launched == []
