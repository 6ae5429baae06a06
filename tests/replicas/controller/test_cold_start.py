"""From zero: one start for all who wait."""

from __future__ import annotations

import asyncio
from typing import Any

from replicas.lifecycle import State
from replicas.loads import Load
from replicas.provisioners import Instance, NoCapacity


async def test_nobody_asks_and_nothing_is_launched(world: Any) -> None:
    await world.steps(50)
    assert world.provisioner.launched == []
    assert world.info.state == "cold"
    assert world.info.status == "open"
    assert len(world.control.published) == 1


async def test_fifty_waiters_get_one_replica(world: Any) -> None:
    world.waits(50)
    await world.steps(20)
    assert world.provisioner.launched == [world.id(1)]
    assert world.states == [State.STARTING]
    assert world.info.upstreams == ()
    world.prober.every = True
    await world.steps(2)
    assert world.states == [State.READY]
    (upstream,) = world.info.upstreams
    assert (upstream.id, upstream.url, upstream.window) == (world.id(1), "http://127.0.0.1:30001", 16)
    assert world.info.state == "ready"


async def test_the_row_is_on_the_disk_before_launch_is_called(world: Any) -> None:
    found: list[State] = []
    launch = world.provisioner.launch

    async def look_first(id: str, *rest: Any) -> None:
        found.extend(r.state for r in world.table.replicas() if r.id == id)
        await launch(id, *rest)

    world.provisioner.launch = look_first
    world.waits(1)
    await world.steps(3)
    assert found == [State.PROVISIONING]


async def test_the_replica_is_given_the_key_that_the_workers_send(world: Any) -> None:
    world.waits(1)
    await world.steps(3)
    assert world.provisioner.envs == [{"REPLICA_API_KEY": world.info.replica_key}]
    assert world.prober.targets[world.id(1)].key == world.info.replica_key
    assert world.info.replica_key not in repr(world.info)
    assert world.info.replica_key not in repr(world.prober.targets)


async def test_a_request_that_is_refused_at_once_starts_the_service_too(world: Any) -> None:
    await world.step()
    world.arrives()
    await world.step()
    assert world.provisioner.launched == [world.id(1)]


async def test_a_start_that_bills_goes_on_when_the_callers_leave(world: Any) -> None:
    world.waits(1)
    await world.steps(2)
    world.waits(0)
    await world.steps(100)
    assert world.states == [State.STARTING]


async def test_a_start_without_a_machine_is_cancelled_when_nobody_has_asked_for_a_minute(world: Any) -> None:
    world.provisioner.gate = asyncio.Event()
    world.waits(1)
    await world.steps(3)
    world.waits(0)
    await world.steps(58)
    assert world.states == [State.PROVISIONING]
    await world.steps(5)
    assert world.replicas == []
    assert world.provisioner.terminated == [world.id(1)]
    assert ("launch", "cancelled") in world.observer.told


async def test_it_is_not_cancelled_while_anybody_waits(world: Any) -> None:
    world.provisioner.gate = asyncio.Event()
    world.waits(1)
    await world.steps(500)
    assert world.states == [State.PROVISIONING]
    world.provisioner.gate.set()
    await world.steps(2)
    assert world.states == [State.STARTING]


async def test_no_capacity_ends_no_hold_and_is_tried_again(world: Any) -> None:
    world.provisioner.launch_error = NoCapacity("no H200 in any zone")
    world.waits(1)
    await world.steps(120)
    assert 3 <= len(world.provisioner.launched) <= 6  # after 5, 10, 20, 40, 60, ... s
    assert set(world.provisioner.launched) == {world.id(1)}
    assert world.info.status == "open"
    assert "no H200 in any zone" in world.replicas[0].reason
    world.provisioner.launch_error = None
    world.prober.every = True
    await world.steps(62, until=lambda: world.states == [State.READY])


async def test_no_capacity_for_the_provision_timeout_gives_up_with_the_cause(world: Any) -> None:
    world.provisioner.launch_error = NoCapacity("no H200 in any zone")
    world.waits(1)
    await world.step()
    await world.steps(121, 10.0, until=lambda: world.info.status == "blocked")
    assert "no machine within 1200 s" in world.info.message
    assert "no H200 in any zone" in world.info.message
    assert world.events("transition")[-1]["reason"]


async def test_phases_come_from_the_provisioner_and_their_times_are_kept(world: Any) -> None:
    world.waits(1)
    await world.step()
    id = world.id(1)
    url = world.provisioner.machines[id].url
    for phase, seconds in (("download", 30), ("load", 20), ("warmup", 5)):
        world.provisioner.machines[id] = Instance(id, True, url, phase=phase, progress=0.5)
        await world.steps(seconds)
    cold = world.control.progressed[-1][1]
    assert (cold.replica, cold.phase, cold.progress, cold.eta_seconds) == (id, "warmup", 0.5, None)
    world.prober.every = True
    await world.step()
    times = {p.phase: p.seconds for p in world.table.cold_starts("r1")}
    assert times["download"] == 30
    assert times["load"] == 20
    assert times["warmup"] == 5
    assert times["total"] >= 56
    assert ("cold_start", "download", 30.0) in world.observer.told
    assert ("launch", "ready") in world.observer.told
    assert [e["code"] for e in world.events("phase")][-3:] == ["download", "load", "warmup"]


async def test_the_second_cold_start_has_an_eta_and_a_new_controller_knows_it_too(world: Any) -> None:
    for phase, seconds in (("provision", 10.0), ("load", 40.0), ("total", 50.0)):
        world.table.add_cold_start("r1", world.service.hash, "", phase, seconds, 1.0)
    world.start()
    world.provisioner.gate = asyncio.Event()
    world.waits(1)
    await world.step()
    assert world.info.cold.eta_seconds == 50
    await world.steps(4)
    assert world.control.progressed[-1][1].eta_seconds == 46
    (replica,) = world.controller.status()["services"][0]["replicas"]
    assert replica["eta_seconds"] == 46
    world.provisioner.gate.set()
    await world.steps(5)
    assert world.control.progressed[-1][1].phase == "provision"  # its output may yet tell more
    await world.steps(8)
    assert world.control.progressed[-1][1].phase == "load"


async def test_a_window_that_is_learned_reaches_the_workers(world: Any) -> None:
    await world.become_ready()
    world.loads.results[world.id(1)] = Load(max_running=4, supported=True)
    await world.step()
    assert world.info.upstreams[0].window == 4
    assert world.replica(world.id(1)).window == 4


async def test_sustained_demand_launches_a_second_replica(world: Any) -> None:
    await world.become_ready()
    world.loads.results[world.id(1)] = Load(max_running=4, supported=True)
    world.lease(world.id(1), 5)
    await world.steps(299)
    assert len(world.provisioner.launched) == 1
    await world.steps(3)
    assert len(world.provisioner.launched) == 2
    await world.steps(500)
    assert len(world.provisioner.launched) == 2
