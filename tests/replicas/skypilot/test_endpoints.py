"""Where a replica is dialled: as SkyPilot exposes it now, not as it did once."""

from __future__ import annotations

from typing import Any

import pytest

from replicas.lifecycle import State


@pytest.mark.parametrize(
    ("exposed", "url"),
    [
        ("10.0.0.5:30000", "http://10.0.0.5:30000"),
        ("http://34.1.2.3/skypilot/ns/r1/30000/", "http://34.1.2.3/skypilot/ns/r1/30000"),
        ("https://r1.example.com/skypilot/ns/r1/30000", "https://r1.example.com/skypilot/ns/r1/30000"),
    ],
)
async def test_its_form_is_kept_and_it_may_come_late(world: Any, exposed: str, url: str) -> None:
    world.sky.exposed = {}  # a load balancer that has no address yet
    world.waits(1)
    await world.steps(60)
    assert world.states == [State.STARTING]
    world.sky.exposed = {30000: exposed}
    await world.steps(20, until=lambda: world.states == [State.READY])
    assert [u.url for u in world.info.upstreams] == [url]


async def test_a_cluster_that_recovers_elsewhere_is_dialled_there(world: Any) -> None:
    (id,) = await world.ready()
    assert world.replicas[0].url == "http://10.0.0.5:30000"
    world.sky.exposed = {30000: "10.9.9.9:30000"}
    await world.steps(30, until=lambda: world.replicas[0].url == "http://10.9.9.9:30000")
    await world.steps(3, until=lambda: world.states == [State.READY])
    assert [u.url for u in world.info.upstreams] == ["http://10.9.9.9:30000"]
    assert (world.launched, world.sky.downed) == ([id], [])


async def test_a_prefix_that_changes_is_dialled_anew(world: Any) -> None:
    world.sky.exposed = {30000: "http://34.1.2.3/skypilot/ns/r1-1/30000"}
    await world.ready()
    world.sky.exposed = {30000: "http://34.9.9.9/skypilot/ns/r1-1/30000"}
    await world.steps(30, until=lambda: "34.9.9.9" in (world.replicas[0].url or ""))
    await world.steps(3, until=lambda: world.states == [State.READY])


async def test_one_that_is_not_exposed_for_a_moment_may_be_back_as_it_was(world: Any) -> None:
    (id,) = await world.ready()
    was = world.sky.exposed
    world.sky.exposed = {}
    await world.steps(20)
    assert world.states == [State.NOT_READY]
    world.sky.exposed = was
    await world.steps(3, until=lambda: world.states == [State.READY])
    assert (world.launched, world.sky.downed) == ([id], [])


async def test_after_a_restart_of_the_gateway_it_is_read_anew(world: Any) -> None:
    (id,) = await world.ready()
    world.sky.exposed = {30000: "10.9.9.9:30000"}
    world.start()
    await world.steps(10, until=lambda: world.states == [State.READY] and "10.9.9.9" in world.replicas[0].url)
    assert world.launched == [id]
