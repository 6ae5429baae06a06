"""When everything fails at once the fault is ours: nothing is ended or launched, and it is said aloud."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.metrics import build_registry
from replicas.lifecycle import State

MINUTES_10 = 600


def done(world: Any) -> tuple[list[str], list[str]]:
    return sorted(world.launched), world.sky.downed  # two may be launched at once


def gauge(world: Any, name: str) -> float | None:
    return build_registry(None, world.controller.status).get_sample_value(name, {"service": "r1"})


def lose_the_network(world: Any, sees: str) -> None:
    world.network = False
    if sees == "nobody answers":
        world.sky.api_down = True
    elif sees == "no ssh":  # the API server runs here, too: it cannot reach the machines either
        for id in sorted(world.sky.machines):
            world.sky.lose(id, "INIT", "unhealthy", "ray cluster is unhealthy")


def find_the_network(world: Any) -> None:
    world.network, world.sky.api_down = True, False
    for cluster in world.sky.clusters.values():
        cluster.become("UP")
    world.sky.unnoticed.clear()


@pytest.mark.parametrize("sees", ["all well", "nobody answers", "no ssh"])
async def test_ten_minutes_of_dropped_packets_end_and_launch_nothing(world: Any, sees: str) -> None:
    ids = await world.ready(2, grace=0.0)
    await world.steps(90, 10.0)
    lose_the_network(world, sees)
    for _ in range(MINUTES_10 // 5):
        await world.step(5.0)
    assert done(world) == (ids, [])
    assert world.states == [State.NOT_READY] * 2
    assert "all 2 replicas fail" in world.service_status["frozen"]
    assert gauge(world, "gateway_frozen") == 1.0
    find_the_network(world)
    await world.steps(10)
    assert [u.id for u in world.info.upstreams] == ids
    assert world.service_status["frozen"] is None
    assert gauge(world, "gateway_frozen") == 0.0
    assert done(world) == (ids, [])


@pytest.mark.parametrize("first", [0.0, 34.0])
async def test_probes_that_notice_it_one_after_the_other_freeze_as_well(world: Any, first: float) -> None:
    ids = await world.ready(2, grace=0.0)  # one was refused at once, the other waited 25 s in its next probe
    world.mute.add(ids[0])
    await world.step(first)
    world.network = False
    await world.steps(MINUTES_10 // 10, 10.0)
    assert done(world) == (ids, [])


async def test_a_wiped_home_of_skypilot_ends_and_launches_nothing(world: Any) -> None:
    ids = await world.ready(2, grace=0.0)
    kept = dict(world.sky.clusters)
    world.sky.forget_all()
    for n in range(MINUTES_10 // 5):
        world.mute = {ids[n % 2]} if n % 7 == 3 else set()  # a single probe fails now and then
        await world.step(5.0)
    assert done(world) == (ids, [])
    assert world.sky.machines == set(ids)
    assert {u.id for u in world.info.upstreams} == set(ids)
    assert "suddenly knows none of the 2" in world.service_status["frozen"]
    assert gauge(world, "gateway_frozen") == 1.0
    world.mute = set()
    world.sky.clusters.update(kept)  # from a backup
    await world.steps(3)
    assert world.service_status["frozen"] is None
    assert done(world) == (ids, [])


async def test_a_real_loss_of_both_is_dealt_with_once_their_probes_agree_for_the_threshold(
    world: Any,
) -> None:
    ids = await world.ready(2, grace=0.0)
    for id in ids:
        world.sky.lose(id)  # a zone's spot machines, all at once: SkyPilot knows of none any more
    waited = await world.steps(300, until=lambda: len(world.launched) > 2)
    assert 180 <= waited <= 190  # consecutive_failure_threshold_timeout of the YAML
    await world.steps(40, until=lambda: world.states.count(State.READY) == 2)
    assert sorted(world.launched) == [*ids, world.id(3), world.id(4)]
    assert world.sky.machines == {world.id(3), world.id(4)}


async def test_both_stopped_behind_our_back_are_replaced_at_once(world: Any) -> None:
    ids = await world.ready(2, grace=0.0)
    for id in ids:
        world.sky.lose(id, "STOPPED")
        world.mute.add(id)
    await world.steps(5, until=lambda: len(world.launched) == 4)
    await world.steps(10, until=lambda: world.states == [State.READY] * 2)
    assert world.sky.machines == {world.id(3), world.id(4)}


async def test_machines_that_are_said_to_be_well_and_never_answer_again_are_replaced_after_half_an_hour(
    world: Any,
) -> None:
    ids = await world.ready(2, grace=0.0)
    world.mute = set(ids)
    waited = await world.steps(300, 10.0, until=lambda: len(world.launched) > 2)
    assert 1800 <= 10 * waited <= 1830
    await world.steps(10, until=lambda: world.states == [State.READY] * 2)
    assert not set(ids) & world.sky.machines


async def test_gateway_down_and_scale_to_zero_are_obeyed_in_a_freeze(world: Any) -> None:
    ids = await world.ready(2, grace=0.0)
    world.mute = set(ids)
    await world.steps(5)
    assert world.service_status["frozen"]
    world.controller.set_limits("r1", max=0)
    await world.steps(10, until=lambda: not world.replicas)
    assert world.sky.machines == set()
