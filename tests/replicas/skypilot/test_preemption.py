"""A cluster that is taken from us: out of rotation, reported, replaced, its remains ended; and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from replicas.lifecycle import State

LIMIT = 30.0  # s; each of the two promises


@dataclass
class Times:
    """Seconds after the first failed probe."""

    out: float | None = None  # of rotation
    reported: float | None = None  # by SkyPilot
    launched: float | None = None  # its replacement
    gone: float | None = None  # its remains


async def watch(world: Any, id: str) -> Times:
    times, begun = Times(), None
    for _ in range(120):
        await world.step()
        probed = world.prober.results.get(id)
        if begun is None and probed is not None and probed.failures:
            begun = world.clock.now
        passed = world.clock.now - (begun or world.clock.now)
        times.out = passed if times.out is None and id not in str(world.info.upstreams) else times.out
        if times.reported is None and id not in world.sky.unnoticed:
            times.reported = passed
        if times.launched is None and len(world.launched) > 1:
            times.launched = passed
        if times.gone is None and id not in world.sky.machines and id not in world.sky.clusters:
            times.gone = passed
    return times


TAKEN = {
    "gone": ("", None, None),
    "a worker node is gone": ("INIT", "unhealthy", "1 of 2 nodes was preempted"),
    "stopped": ("STOPPED", None, None),
}


@pytest.mark.parametrize("autostops", [True, False], ids=["autostop", "no autostop"])
@pytest.mark.parametrize("how", TAKEN)
async def test_within_thirty_seconds_each_it_is_out_of_rotation_and_replaced(
    world: Any, how: str, autostops: bool
) -> None:
    (id,) = await world.ready()
    world.sky.autostops = autostops  # a refresh of those alone would never see it on clouds without
    await world.steps(19)
    world.sky.lose(id, *TAKEN[how])
    world.mute.add(id)
    times = await watch(world, id)
    print(f"\n{how}: {times}")
    assert times.out is not None
    assert times.out <= LIMIT
    assert times.reported is not None
    assert times.reported <= 2.0  # asked at once, not when the memory of 20 s is over
    assert times.launched is not None
    assert times.launched - times.reported <= LIMIT
    assert times.gone is not None
    assert world.sky.machines == {world.id(2)}
    assert world.states == [State.READY]
    (failed,) = (e for e in world.events("transition") if e["state"] == "failed")
    assert failed["replica"] == id
    if TAKEN[how][2]:
        assert "1 of 2 nodes was preempted" in failed["reason"]


async def test_with_two_the_other_one_serves_on_and_the_lost_one_is_replaced(world: Any) -> None:
    one, two = await world.ready(2)
    world.sky.lose(one, "INIT", "unhealthy", "1 of 2 nodes was preempted")
    world.mute.add(one)
    for _ in range(10):
        await world.step()
        assert two in [u.id for u in world.info.upstreams]
    assert world.sky.machines == {two, world.id(3)}
    assert sorted(world.launched) == [one, two, world.id(3)]


async def test_one_that_is_called_unhealthy_and_answers_is_left_alone(world: Any) -> None:
    (id,) = await world.ready()
    world.sky.clusters[id].become("INIT", "unhealthy", "ray is unhealthy")
    await world.steps(60, 5.0)
    assert (world.launched, world.sky.downed) == ([id], [])
    assert [u.id for u in world.info.upstreams] == [id]


async def test_while_it_does_not_answer_the_cloud_is_asked_every_ten_seconds(world: Any) -> None:
    (id,) = await world.ready(1)
    await world.steps(5)
    world.mute.add(id)
    asked = len(world.sky.asked)
    await world.steps(31)
    forced = [names for names, mode in world.sky.asked[asked:] if mode.value == "force"]
    assert forced == [[id]] * 4
    world.mute.clear()
    asked = len(world.sky.asked)
    await world.steps(31)
    assert all(mode.value != "force" for _, mode in world.sky.asked[asked:])


async def test_a_gateway_that_slept_or_a_clock_set_forward_ends_nothing_at_once(world: Any) -> None:
    """For an hour nobody has asked it: that is no hour of failed probes."""
    (one,) = await world.ready()
    await world.steps(70, 10.0)  # the first minutes, in which kernels compile, are over
    world.mute.add(one)
    await world.steps(10, until=lambda: world.states == [State.NOT_READY])
    world.clock.now += 3600.0
    await world.controller.tick()
    assert world.states == [State.NOT_READY]
    world.mute.clear()
    await world.steps(5, until=lambda: world.states == [State.READY])
    assert (world.launched, world.sky.downed) == ([one], [])


async def test_and_one_that_stays_silent_is_replaced_all_the_same(world: Any) -> None:
    (one,) = await world.ready()
    await world.steps(70, 10.0)
    world.mute.add(one)
    await world.steps(10, until=lambda: world.states == [State.NOT_READY])
    world.clock.now += 3600.0
    await world.steps(300, until=lambda: one in world.sky.downed)
    assert one in world.sky.downed
