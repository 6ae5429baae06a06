"""SkyPilot's API server is away: what serves goes on, nothing is begun or ended; then all goes on."""

from __future__ import annotations

from typing import Any

from replicas.lifecycle import State

STEP = 15.0  # s
MINUTES_90 = int(90 * 60 / STEP)


async def test_ninety_minutes_without_it_end_and_launch_nothing(world: Any) -> None:
    ids = await world.ready(2)
    world.sky.api_down = True
    for n in range(MINUTES_90):
        for id in ids:
            world.chunk(id)
        world.mute = {ids[n % 2]} if n % 5 == 0 else set()  # a probe fails now and then
        await world.step(STEP)
    assert (sorted(world.launched), world.sky.downed) == (ids, [])
    assert world.states == [State.READY] * 2
    assert [u.id for u in world.info.upstreams] == ids
    assert world.service_status["frozen"] is None
    world.sky.api_down = False
    world.sky.lose(ids[0])
    await world.steps(30, until=lambda: world.states == [State.READY] * 2 and ids[0] not in world.id(3))
    await world.steps(30, until=lambda: world.sky.machines == {ids[1], world.id(3)})
    await world.steps(5, until=lambda: world.states == [State.READY] * 2)


async def test_one_that_stops_answering_meanwhile_is_not_ended_before_anybody_can_look(world: Any) -> None:
    ids = await world.ready(2)
    world.sky.api_down = True
    world.mute = {ids[0]}
    await world.steps(10)
    assert [u.id for u in world.info.upstreams] == [ids[1]]  # out of rotation it is
    await world.steps(MINUTES_90, STEP)
    assert world.sky.machines == set(ids)
    assert world.sky.downed == []
    assert sorted(world.launched) == ids
    world.mute.clear()
    await world.steps(3, until=lambda: world.states == [State.READY] * 2)
    world.sky.api_down = False
    await world.steps(30)
    assert (sorted(world.launched), world.sky.downed) == (ids, [])


async def test_one_that_still_does_not_answer_when_it_is_back_is_replaced(world: Any) -> None:
    ids = await world.ready(2, grace=0.0)
    world.sky.api_down = True
    world.mute = {ids[0]}
    await world.steps(40, STEP)
    world.sky.api_down = False
    await world.steps(60, until=lambda: world.sky.machines == {ids[1], world.id(3)})


async def test_who_waits_meanwhile_gets_a_replica_once_it_is_back(world: Any) -> None:
    await world.step()
    world.sky.api_down = True
    world.waits(1)
    await world.steps(40, STEP)
    assert world.launched == []
    assert world.info.status == "open"  # the hold goes on
    world.sky.api_down = False
    await world.steps(90, until=lambda: world.states == [State.READY])
    assert world.launched == [world.id(1)]
