"""Down when idle, never under anybody's answer, and not in a worker's face."""

from __future__ import annotations

from typing import Any

from replicas.lifecycle import State


async def test_idle_for_twenty_minutes_goes_to_zero_and_the_next_request_starts_again(world: Any) -> None:
    await world.become_ready()
    await world.steps(1195)
    assert world.states == [State.READY]
    await world.steps(10)
    assert world.replicas == []
    assert world.machines_of() == set()
    assert world.provisioner.terminated == [world.id(1)]
    world.waits(1)
    await world.steps(3)
    assert world.provisioner.launched == [world.id(1), world.id(2)]
    assert world.states == [State.READY]


async def test_a_long_answer_keeps_its_replica_and_idling_counts_from_its_end(world: Any) -> None:
    await world.become_ready()
    world.lease(world.id(1))
    await world.steps(200, 30.0)
    assert world.states == [State.READY]
    world.release(world.id(1))
    await world.steps(1195)
    assert world.states == [State.READY]
    await world.steps(10)
    assert world.replicas == []


async def test_after_a_longer_cold_start_it_idles_as_long_as_that_took(world: Any) -> None:
    world.waits(1)
    await world.steps(1100, 2.0, until=lambda: world.clock.now >= 1_800_000_000 + 1190)
    await world.become_ready()
    world.start(downscale_delay=100.0)
    world.prober.every = True
    await world.steps(1180)
    assert world.states == [State.READY]
    await world.steps(30)
    assert world.replicas == []


async def test_a_drain_waits_until_every_worker_has_acked_and_nothing_is_in_flight(world: Any) -> None:
    await world.become_ready()
    id = world.id(1)
    world.lease(id)
    world.controller.set_limits("r1", max=0)
    world.control.silent = True
    await world.steps(5)
    assert world.states == [State.DRAINING]
    assert world.info.upstreams == ()
    world.release(id)
    await world.steps(5)
    assert world.states == [State.DRAINING]  # the worker may still choose it
    world.lease(id)  # and does
    world.control.ack()
    await world.steps(5)
    assert world.states == [State.DRAINING]
    world.release(id)
    await world.steps(2)
    assert world.replicas == []


async def test_a_worker_that_is_alive_but_not_connected_has_not_acked(world: Any) -> None:
    await world.become_ready()
    world.control.workers.clear()
    world.controller.set_limits("r1", max=0)
    await world.steps(5)
    assert world.states == [State.DRAINING]
    world.board.cells[world.row.pid] = 0  # it was dead, and is reaped
    await world.steps(2)
    assert world.replicas == []


async def test_the_drain_limit_ends_a_drain(world: Any) -> None:
    world.start(drain_limit=100.0)
    await world.become_ready()
    world.lease(world.id(1))
    world.controller.set_limits("r1", max=0)
    await world.steps(99)
    assert world.states == [State.DRAINING]
    await world.steps(4)
    assert world.replicas == []
    assert any("drain limit" in e["reason"] for e in world.events("transition"))


async def test_a_draining_replica_comes_back_with_the_demand(world: Any) -> None:
    await world.become_ready()
    world.lease(world.id(1))
    world.controller.set_limits("r1", max=0)
    await world.steps(2)
    assert world.states == [State.DRAINING]
    world.controller.reset_limits("r1")
    world.waits(1)
    await world.step()
    assert world.states == [State.READY]
    assert len(world.info.upstreams) == 1
    assert world.provisioner.launched == [world.id(1)]


async def test_a_slot_is_not_reused_before_every_worker_has_forgotten_its_replica(world: Any) -> None:
    await world.become_ready()
    first = world.replica(world.id(1)).slot
    world.start(drain_limit=1.0)
    world.prober.every = True
    await world.step()
    world.lease(world.id(1))
    world.controller.set_limits("r1", max=0)
    await world.steps(4)
    assert world.replicas == []  # cut by the limit, with a lease open in some worker
    world.controller.reset_limits("r1")
    for n in range(2, 70):
        world.waits(1)
        await world.steps(9, until=lambda n=n: [r.n for r in world.replicas] == [n])
        assert world.replica(world.id(n)).slot != first
        world.waits(0)
        world.controller.set_limits("r1", max=0)
        await world.steps(9, until=lambda: world.replicas == [])
        world.controller.reset_limits("r1")


async def test_a_termination_that_fails_is_tried_until_it_is_verified(world: Any) -> None:
    await world.become_ready()
    world.provisioner.terminate_error = RuntimeError("API is down")
    world.controller.set_limits("r1", max=0)
    await world.steps(100)
    assert world.states == [State.TERMINATING]
    assert 3 <= len(world.provisioner.terminated) <= 6
    assert "API is down" in world.replicas[0].reason
    world.provisioner.terminate_error = None
    await world.steps(90, until=lambda: world.replicas == [])
    assert world.machines_of() == set()
