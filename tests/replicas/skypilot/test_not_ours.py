"""No leak, and nobody else's harm, with the real provisioner: what `sky status` lists at the end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from replicas.lifecycle import State

from ..provisioners.sky_records import Cluster

# A thread of a killed gateway ends by SystemExit, which Python passes over in silence and pytest does not.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

THEIRS = ("r1-A100", "r1-gw-deadbeef-1", "training")


@pytest.fixture
def theirs(world: Any) -> dict[str, Cluster]:
    """Clusters that other people run, and another gateway, one of them stopped."""
    found = {name: Cluster(name, SimpleNamespace(value="UP")) for name in THEIRS}
    found["r1-A100"].become("STOPPED")
    world.sky.clusters |= found
    world.sky.machines |= set(THEIRS)
    return found


async def ended(world: Any, **limits: Any) -> list[str]:
    """What `down` leaves, while time passes."""
    down = asyncio.create_task(world.controller.down(pause=0.01, **limits))
    while not down.done():
        world.clock.now += 1.0
        await world.settle()
        await asyncio.sleep(0.005)
    left: list[str] = await down
    return left


async def test_machines_of_others_survive_start_crash_and_down_and_are_shown(
    world: Any, theirs: dict[str, Cluster]
) -> None:
    shown = [
        {"name": "r1-A100", "status": "STOPPED", "hourly_cost": 60.0},
        {"name": "r1-gw-deadbeef-1", "status": "UP", "hourly_cost": 60.0},
    ]
    await world.ready()
    asked = len(world.sky.asked)
    await world.steps(3)
    looks = [names for names, _ in world.sky.asked[asked:] if names is None]
    assert len(looks) <= 4, "they come with the look at ours"
    assert world.controller.status()["others"] == shown
    world.start()  # after kill -9
    await world.steps(3, until=lambda: world.controller.status()["others"] == shown)
    assert await ended(world, limit=20) == []
    assert set(world.sky.clusters) == world.sky.machines == set(THEIRS)
    assert not {names for names in world.sky.downed if names in THEIRS}
    assert not {name for name, *_ in world.sky.armed if name in THEIRS}


async def test_down_goes_on_until_skypilot_lists_none_of_ours_and_names_what_is_left(
    world: Any, theirs: dict[str, Cluster]
) -> None:
    (id,) = await world.ready()
    world.sky.down_does_nothing = 10**6
    assert await ended(world, limit=0.3) == [id]
    await world.steps(30, until=lambda: world.states == [State.TERMINATING])
    assert await ended(world, limit=0.1) == [id]
    world.sky.down_does_nothing = 0
    assert await ended(world, limit=20) == []
    assert set(world.sky.clusters) == set(THEIRS)


async def test_a_cluster_of_ours_that_no_row_knows_is_downed_and_paid_for(world: Any) -> None:
    id = world.id(7)
    world.sky.clusters[id] = Cluster(id, SimpleNamespace(value="UP"), launched_at=int(world.clock.now) - 3600)
    world.sky.machines.add(id)
    await world.steps(6, until=lambda: id not in world.sky.clusters)
    await world.steps(2)
    (entry,) = world.table.ledger()
    assert (entry.replica, entry.closed, entry.region) == (id, True, "aws/us-east-1/us-east-1a")
    assert entry.dollars == pytest.approx(60.0, abs=0.2)
    assert world.sky.machines == set()
