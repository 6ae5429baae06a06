"""Every way in which a machine could be left behind, and bill for ever."""

from __future__ import annotations

from typing import Any

from gateway.metrics import build_registry
from replicas.lifecycle import State


def gauge(world: Any, name: str) -> float | None:
    return build_registry(None, world.controller.status).get_sample_value(name, {"service": "r1"})


async def provisioning(world: Any) -> str:
    world.sky.may_finish.clear()
    world.waits(1)
    await world.steps(3)
    assert world.states == [State.PROVISIONING]
    return str(world.id(1))


async def nothing_left(world: Any, within: int = 30) -> None:
    await world.steps(within, until=lambda: not world.replicas and not world.sky.machines)
    assert world.sky.clusters == {}
    assert all(world.sky.jobs(name) <= 1 for name in set(world.launched))


async def test_a_launch_that_nobody_wants_any_more_is_cancelled_and_what_it_made_is_downed(
    world: Any,
) -> None:
    id = await provisioning(world)
    assert world.sky.machines == {id}
    world.waits(0)
    world.controller.set_limits("r1", max=0)
    await nothing_left(world)


async def test_a_launch_that_fails_half_way_leaves_nothing_when_it_is_given_up(world: Any) -> None:
    world.start(provision_timeout=120.0)
    world.sky.leaves_machines = True
    tried = [RuntimeError("InsufficientInstanceCapacity for the second node")]
    world.sky.launch_fails = [world.sky.unavailable("Failed to provision all", tried) for _ in range(999)]
    world.waits(1)
    await world.steps(3)
    assert world.sky.machines  # the first node bills
    await world.steps(200, until=lambda: not world.sky.machines)
    world.waits(0)
    await nothing_left(world)


async def test_a_launch_that_ends_after_its_termination_leaves_nothing(world: Any) -> None:
    id = await provisioning(world)
    world.waits(0)
    world.controller.set_limits("r1", max=0)
    await nothing_left(world)
    world.sky.appear(id)  # the cloud was already making it when the launch was cancelled
    await nothing_left(world)
    assert world.sky.downed.count(id) >= 2
    assert world.replicas == []


async def test_a_down_that_fails_again_and_again_is_repeated_ever_later_and_seen(world: Any) -> None:
    (id,) = await world.ready()
    world.sky.down_fails = [RuntimeError("UnauthorizedOperation: no permission to delete")] * 9999
    world.controller.set_limits("r1", max=0)
    await world.steps(3)
    begun = world.clock.now
    await world.steps(500, 5.0, until=lambda: gauge(world, "gateway_ends_failing") == 1)
    assert gauge(world, "gateway_terminating_seconds") >= world.clock.now - begun - 1
    (row,) = world.service_status["replicas"]
    assert "UnauthorizedOperation" in row["reason"]
    failed = world.events("terminate_failed")
    await world.steps(600, 5.0, until=lambda: len(world.events("terminate_failed")) >= len(failed) + 2)
    world.sky.down_fails.clear()
    await nothing_left(world, 200)
    assert gauge(world, "gateway_ends_failing") == 0
    assert gauge(world, "gateway_terminating_seconds") == 0
    assert world.launched == [id]


async def test_a_cluster_that_is_still_listed_after_its_down_is_not_called_gone(world: Any) -> None:
    await world.ready()
    world.sky.down_does_nothing = 20
    world.controller.set_limits("r1", max=0)
    await world.steps(15, 5.0)
    assert world.states == [State.TERMINATING]
    await nothing_left(world, 60)


async def test_a_status_that_is_stale_is_no_reason_to_launch_a_second_time(world: Any) -> None:
    (id,) = await world.ready()
    world.sky.unnoticed.clear()
    cluster = world.sky.clusters[id]
    cluster.become("INIT", "launching")  # the cluster's lock was busy: what is told is from before
    await world.steps(30)
    cluster.become("UP")
    await world.steps(5)
    assert (world.launched, world.sky.downed, world.states) == ([id], [], [State.READY])


async def test_an_api_server_that_forgot_its_requests_still_ends_what_they_made(world: Any) -> None:
    id = await provisioning(world)
    world.sky.restart()
    world.waits(0)
    world.controller.set_limits("r1", max=0)
    await nothing_left(world)
    assert id in world.sky.downed


async def test_an_api_server_that_is_away_while_a_replica_ends_does_not_let_it_go(world: Any) -> None:
    await world.ready()
    world.controller.set_limits("r1", max=0)
    world.sky.api_down = True
    await world.steps(300, 10.0)
    assert world.states == [State.TERMINATING]
    assert world.sky.machines != set()
    world.sky.api_down = False
    await nothing_left(world, 400)


async def test_no_name_is_launched_again_once_it_was_given_up(world: Any) -> None:
    for n in (1, 2, 3):
        world.sky.run_ended[world.id(n)] = 100
    world.sky.printed = "(tiny, pid=7) no such model\n"
    world.waits(1)
    await world.steps(400, until=lambda: len(world.launched) == 3)
    await world.steps(60)
    assert world.launched == [world.id(n) for n in (1, 2, 3)]
    world.waits(0)
    await nothing_left(world)


async def test_a_machine_that_skypilot_has_forgotten_is_not_called_gone_while_it_answers(world: Any) -> None:
    """A wiped `~/.sky` and one replica: SkyPilot would call its `down` done at once."""
    (one,) = await world.ready()
    world.sky.forget_all()
    world.controller.set_limits("r1", min=0, max=0)
    await world.steps(30, 10.0)
    assert world.sky.machines == {one}
    assert world.states == [State.DRAINING]
    (row,) = world.service_status["replicas"]
    assert "cloud's console" in row["reason"]
    assert gauge(world, "gateway_terminating_seconds") >= 200  # there is an alert on it
    assert [e["replica"] for e in world.events("terminate_failed")] == [one]
    assert await world.controller.down(0.3) == [one]
    world.sky.machines.clear()  # somebody has read it
    await world.steps(40, 10.0, until=lambda: not world.replicas)
    assert world.replicas == []


async def test_a_clock_that_is_set_back_puts_off_no_end_and_no_look(world: Any) -> None:
    (one,) = await world.ready()
    error = world.sky.error("CommandError", "the cloud does not let go")
    world.sky.down_fails = [error] * 200
    world.controller.set_limits("r1", min=0, max=0)
    await world.steps(70, 10.0, until=lambda: bool(world.events("terminate_failed")))
    assert world.sky.machines == {one}
    world.sky.down_fails.clear()
    world.clock.now -= 86_400.0
    stray = f"r1-gw-{world.table.owner}-99"
    world.sky.appear(stray)
    await world.steps(30)
    assert world.sky.machines == set()
