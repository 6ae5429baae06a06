"""A controller that is killed at any moment leaves a table and machines; the next one goes on from there."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from replicas.lifecycle import State
from replicas.provisioners import Instance, InstancesUnknown


async def test_killed_while_serving(world: Any) -> None:
    await world.become_ready()
    generation = world.info and world.control.published[-1].generation
    world.start()
    await world.step()
    assert world.states == [State.READY]
    assert [u.id for u in world.info.upstreams] == [world.id(1)]
    assert world.control.published[0].generation > generation
    world.prober.every = True
    await world.steps(5)
    assert world.provisioner.launched == [world.id(1)]
    assert world.provisioner.terminated == []


async def test_killed_while_launching_launches_the_same_id_again(world: Any) -> None:
    world.provisioner.gate = asyncio.Event()
    world.waits(1)
    await world.steps(3)
    world.start()
    world.provisioner.gate.set()
    await world.steps(3)
    assert set(world.provisioner.launched) == {world.id(1)}
    assert world.machines_of() == {world.id(1)}
    assert world.states == [State.STARTING]


async def test_killed_while_starting_goes_on_starting(world: Any) -> None:
    world.waits(1)
    await world.steps(3)
    world.start()
    world.prober.every = True
    await world.steps(3)
    assert world.provisioner.launched == [world.id(1)]
    assert world.states == [State.READY]


async def test_killed_while_terminating_terminates_again(world: Any) -> None:
    await world.become_ready()
    world.provisioner.terminate_error = RuntimeError("no")
    world.controller.set_limits("r1", max=0)
    await world.steps(3)
    world.start()
    world.provisioner.terminate_error = None
    await world.steps(3)
    assert world.replicas == []
    assert world.machines_of() == set()


async def test_a_row_whose_machine_is_gone_has_failed_and_is_replaced(world: Any) -> None:
    await world.become_ready()
    world.provisioner.machines.clear()
    world.start()
    world.prober.answers[world.id(1)] = "connection refused"
    world.waits(1)
    await world.steps(4)
    assert world.provisioner.launched == [world.id(1), world.id(2)]
    assert world.events("transition")[-1]["replica"] == world.id(2)
    assert "gone" in str([e["state"] for e in world.events("transition") if e["replica"] == world.id(1)])


async def test_what_has_our_name_and_no_row_is_ended_and_nobody_elses_is_touched(world: Any) -> None:
    ours = f"old-name-gw-{world.table.owner}-7"
    theirs = ["r1-gw-deadbeef-1", "r1-A100", f"r1-gw-{world.table.owner}-x", f"gw-{world.table.owner}-1"]
    for id in (ours, *theirs):
        world.provisioner.machines[id] = Instance(id, True)
    await world.steps(10)
    assert world.provisioner.terminated == [ours]
    assert world.machines_of() == set(theirs)


async def test_while_nobody_can_say_what_exists_nothing_is_concluded(world: Any, caplog: Any) -> None:
    await world.become_ready()
    world.provisioner.instances_error = InstancesUnknown("its API does not answer")
    world.prober.every = "timeout"
    await world.steps(100)
    assert world.states == [State.NOT_READY]
    assert world.provisioner.terminated == []
    assert len([r for r in caplog.records if "does not answer" in r.message]) == 1
    world.provisioner.instances_error = None
    world.prober.every = True
    await world.step()
    assert world.states == [State.READY]


async def test_a_changed_yaml_keeps_serving_with_the_old_replicas_shown_as_outdated(world: Any) -> None:
    await world.become_ready()
    world.start(yaml=world.text.replace("max_replicas: 2", "max_replicas: 3"))
    world.prober.every = True
    await world.steps(10)
    (replica,) = world.controller.status()["services"][0]["replicas"]
    assert (replica["state"], replica["outdated"]) == ("ready", True)
    world.lease(world.id(1), 200)
    world.start(upscale_delay=0.0)
    world.prober.every = True
    await world.steps(5)
    replicas = world.controller.status()["services"][0]["replicas"]
    assert [r["outdated"] for r in replicas] == [True, False, False]


async def test_a_half_launched_replica_is_launched_from_the_yaml_it_was_decided_from(world: Any) -> None:
    world.provisioner.gate = asyncio.Event()
    world.waits(1)
    await world.steps(3)
    old = world.service.hash
    world.start(yaml=world.text.replace("--port", "--log-requests --port"))
    world.provisioner.gate.set()
    await world.steps(3)
    assert [s.hash for s in world.provisioner.services] == [old, old]


async def test_the_replicas_of_a_service_that_is_not_served_any_more_are_ended(world: Any) -> None:
    await world.become_ready()
    old = world.id(1)
    world.start(yaml=world.text.replace("name: r1", "name: r2"))
    world.prober.every = True
    await world.steps(4)
    assert world.provisioner.terminated == [old]
    assert [s.name for s in world.control.published[-1].services] == ["r2"]
    assert [s["name"] for s in world.controller.status()["services"]] == ["r2"]


async def test_closing_ends_no_replica(world: Any) -> None:
    await world.become_ready()
    await world.controller.close()
    assert world.machines_of() == {world.id(1)}


async def test_a_yaml_that_cannot_be_read_any_more_does_not_stop_the_gateway(world: Any, caplog: Any) -> None:
    await world.become_ready()
    (row,) = world.table.replicas()
    world.table.save([replace(row, spec_text="service: [")])
    world.start(yaml=world.text.replace("name: r1", "name: r2"))
    await world.steps(4)
    assert world.provisioner.terminated == [row.id]
    assert "cannot be read any more" in caplog.text


async def test_a_look_that_is_slow_holds_nothing_up_and_says_nothing_of_what_came_after_it(
    world: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("replicas.evidence.LOOK_WAIT", 0.01)
    gate, look = asyncio.Event(), world.provisioner.instances

    async def slow(fresh: Any) -> Any:
        found = await look()
        await gate.wait()
        return found

    world.provisioner.instances = slow
    world.waits(1)
    await world.steps(5)
    assert world.states == [State.STARTING]
    gate.set()  # the answer is from before the launch: it knows of no machine
    await world.step()
    assert world.states == [State.STARTING]
    world.prober.every = True
    await world.steps(2)
    assert world.states == [State.READY]


async def test_a_start_that_went_on_unwatched_is_not_too_late_before_it_was_asked(world: Any) -> None:
    world.waits(1)
    await world.steps(3, until=lambda: world.states == [State.STARTING])
    world.clock.now += 4000.0  # no gateway runs, and the initial delay of 1200 s passes
    world.start()
    world.prober.every = True
    await world.steps(4)
    assert world.states == [State.READY]
    assert world.provisioner.launched == [world.id(1)]
    assert world.provisioner.terminated == []
    assert world.events("cold_start") == []  # how long it took is not known, so no later estimate has it


async def test_a_start_that_is_found_too_late_and_stays_silent_fails_within_two_minutes(world: Any) -> None:
    world.waits(1)
    await world.steps(3, until=lambda: world.states == [State.STARTING])
    world.clock.now += 4000.0
    world.start()
    world.prober.every = "refused"
    await world.steps(50)
    assert world.provisioner.terminated == []
    await world.steps(70, until=lambda: world.provisioner.terminated == [world.id(1)])


async def test_a_launch_called_anew_after_a_restart_has_its_whole_time_again(world: Any) -> None:
    world.provisioner.gate = asyncio.Event()
    world.waits(1)
    await world.steps(3)
    world.clock.now += 9000.0
    world.start()
    await world.steps(5)
    assert world.states == [State.PROVISIONING]
    world.provisioner.gate.set()
    world.prober.every = True
    await world.steps(4)
    assert world.states == [State.READY]


async def test_a_machine_that_slept_during_a_start_asks_before_it_judges(world: Any) -> None:
    world.waits(1)
    await world.steps(3, until=lambda: world.states == [State.STARTING])
    await world.step(7200.0)
    assert world.states == [State.STARTING]
    world.prober.every = True
    await world.steps(2)
    assert world.states == [State.READY]
