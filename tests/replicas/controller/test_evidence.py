"""Probes, load reports, lists: what takes a replica out, what ends it, and what does neither."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from replicas.lifecycle import State
from replicas.loads import Load


async def two_ready(world: Any) -> tuple[str, str]:
    world.start(min_replicas=2, grace=0.0)
    world.prober.every = True
    await world.steps(4)
    assert world.states == [State.READY, State.READY]
    return world.id(1), world.id(2)


async def test_two_failed_probes_take_it_out_of_rotation_and_one_good_one_back(world: Any) -> None:
    one, two = await two_ready(world)
    world.prober.answers[one] = "HTTP 503"
    await world.step()
    assert len(world.info.upstreams) == 2
    await world.step()
    assert [u.id for u in world.info.upstreams] == [two]
    assert world.replica(one).state is State.NOT_READY
    world.prober.answers[one] = True
    await world.step()
    assert len(world.info.upstreams) == 2
    assert len(world.provisioner.launched) == 2  # NOT_READY is capacity


async def test_a_replica_whose_tokens_flow_is_alive_whatever_its_probe_says(world: Any) -> None:
    one, _ = await two_ready(world)
    world.lease(one)
    world.prober.answers[one] = "no answer in 25 s"
    for _ in range(50):
        world.chunk(one)
        await world.step(10)
    assert world.replica(one).state is State.READY


async def test_failing_for_the_threshold_ends_it_and_another_takes_its_place(world: Any) -> None:
    one, two = await two_ready(world)
    world.prober.answers[one] = "connection refused"
    await world.steps(170)
    assert world.replica(one).state is State.NOT_READY
    await world.steps(20)
    assert one not in world.machines_of()
    assert world.provisioner.launched == [one, two, world.id(3)]
    assert any(e["state"] == "failed" for e in world.events("transition") if e["replica"] == one)


async def test_in_its_first_ten_minutes_a_replica_may_fail_probes_for_longer(world: Any) -> None:
    await world.become_ready()
    world.prober.every = "no answer in 25 s"
    await world.steps(600)
    assert world.states == [State.NOT_READY]
    await world.steps(200)
    assert world.replicas == []


async def test_a_process_that_has_died_is_probed_at_once_and_then_replaced(world: Any) -> None:
    await world.become_ready()
    id = world.id(1)
    machine = world.provisioner.machines[id]
    world.provisioner.machines[id] = replace(machine, alive=False, detail="exit code -9")
    await world.step()
    assert id in world.prober.hurried
    assert world.states == [State.READY]  # it still answers, as far as is known
    world.prober.answers[id] = "connection refused"
    world.waits(1)
    await world.steps(2)
    failed = [e for e in world.events("transition") if e["state"] == "failed"]
    assert failed[0]["reason"] == "exit code -9"
    await world.steps(3)
    assert world.provisioner.launched == [id, world.id(2)]
    assert world.machines_of() == {world.id(2)}


async def test_a_suspect_is_probed_at_once(world: Any) -> None:
    await world.become_ready()
    world.control.suspects = {world.id(1): "connection refused"}
    await world.step()
    assert world.prober.hurried == [world.id(1)]
    assert world.states == [State.READY]


async def test_a_hung_last_replica_is_ended_only_when_its_replacement_is_ready(world: Any) -> None:
    world.start(grace=0.0)
    await world.become_ready()
    id = world.id(1)
    world.lease(id)
    world.loads.results[id] = Load(running=1, stamp=5.0, stamp_at=world.clock.now, supported=True)
    await world.steps(30)
    assert world.states == [State.READY]
    world.prober.answers[id] = "HTTP 503"
    world.prober.every = None
    world.waits(1)
    await world.step()
    assert world.states == [State.NOT_READY]  # hung: out with the first failed probe
    await world.steps(200)
    assert world.replica(id).state is State.NOT_READY
    assert world.replica(world.id(2)).state is State.STARTING
    world.prober.every = True
    await world.steps(4)
    assert world.machines_of() == {world.id(2)}
    assert world.states == [State.READY]


@pytest.mark.parametrize(
    ("since_ready", "stall"),
    [(0, 120), (700, 60)],
    ids=["120 s right after READY: kernels compile", "a prefill of 60 s, the minutes of grace long over"],
)
async def test_a_stall_ends_no_replica_launches_none_and_leaves_its_requests_alone(
    world: Any, since_ready: int, stall: int
) -> None:
    await world.become_ready()
    id, slot = world.id(1), world.replica(world.id(1)).slot
    await world.steps(since_ready)
    world.lease(id, 3)
    world.waits(2)  # beyond its window
    world.loads.results[id] = Load(running=3, stamp=5.0, stamp_at=world.clock.now, supported=True)
    world.prober.answers[id] = "no answer in 25 s"
    await world.steps(stall)
    assert world.replica(id).state in (State.READY, State.NOT_READY)
    assert world.board.in_flight(slot) == 3

    world.chunk(id)
    world.prober.answers[id] = True
    await world.steps(2)
    assert world.states == [State.READY]
    assert [u.id for u in world.info.upstreams] == [id]
    world.release(id, 3)
    world.waits(0)
    await world.steps(60)
    assert (world.provisioner.launched, world.provisioner.terminated) == ([id], [])
    states = [event["state"] for event in world.events("transition")]
    assert not {"draining", "failed", "terminating"} & set(states)


async def test_when_all_fail_at_once_nothing_is_ended_or_replaced(world: Any) -> None:
    await two_ready(world)
    world.prober.every = "network is unreachable"
    await world.steps(600)
    assert world.states == [State.NOT_READY, State.NOT_READY]
    assert world.provisioner.terminated == []
    assert len(world.provisioner.launched) == 2
    assert "all 2 replicas fail" in world.controller.status()["services"][0]["frozen"]
    world.prober.every = True
    await world.steps(2)
    assert world.states == [State.READY, State.READY]
    assert world.controller.status()["services"][0]["frozen"] is None
    assert [e["code"] for e in world.events("freeze")] == ["freeze", "freeze"]


async def test_a_list_that_suddenly_knows_none_of_ours_ends_nothing_that_answers(world: Any) -> None:
    await two_ready(world)
    machines = dict(world.provisioner.machines)
    world.provisioner.machines.clear()
    await world.steps(600)
    assert world.states == [State.READY, State.READY]
    assert len(world.info.upstreams) == 2
    world.provisioner.machines.update(machines)
    await world.steps(2)
    assert world.controller.status()["services"][0]["frozen"] is None


async def test_one_preempted_replica_is_replaced(world: Any) -> None:
    one, two = await two_ready(world)
    del world.provisioner.machines[one]
    world.prober.answers[one] = "no route to host"
    await world.steps(4)
    assert [r.id for r in world.replicas] == [two, world.id(3)]
    failed = [e for e in world.events("transition") if e["state"] == "failed"]
    assert failed[0]["replica"] == one
