"""Dollars as the controller knows them: over restarts, gaps, full disks; who woke what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from replicas.costs import Entry
from replicas.lifecycle import State
from replicas.provisioners import Ended, InstancesUnknown
from replicas.table import TableError


def cost(world: Any) -> dict[str, Any]:
    told: dict[str, Any] = world.controller.status()["services"][0]["cost"]
    return told


def entry(world: Any, n: int = 1) -> Entry:
    return next(e for e in world.table.ledger() if e.replica == world.id(n))


async def test_the_gap_between_two_controllers_counts_once_the_machine_is_seen(world: Any) -> None:
    world.provisioner.cost = 60.0
    await world.become_ready()
    await world.steps(10)
    before = cost(world)["total"]
    world.clock.now += 7200.0  # killed, not closed
    world.start()
    world.provisioner.instances_error = InstancesUnknown("its API does not answer")
    await world.steps(3)
    assert cost(world)["total"] == pytest.approx(before)
    world.provisioner.instances_error = None
    await world.steps(2)
    assert cost(world)["total"] == pytest.approx(before + (7200 + 5) / 60)
    assert world.observer.dollars == pytest.approx((7200 + 5) / 60)


async def test_a_replica_that_was_gone_when_somebody_looked_again_ends_at_the_last_moment_known(
    world: Any,
) -> None:
    world.provisioner.cost = 60.0
    await world.become_ready()
    await world.steps(10)
    before, at = cost(world)["total"], world.clock.now
    world.provisioner.machines.clear()
    world.clock.now += 7200.0
    world.start()
    world.prober.every = "refused"
    await world.steps(5)
    assert cost(world)["total"] == pytest.approx(before)
    assert (entry(world).closed, entry(world).until) == (True, at)


@pytest.mark.parametrize("ended", ["machine", "unreachable"])
async def test_the_node_that_a_preemption_left_bills_until_its_down_is_verified(
    world: Any, ended: Ended
) -> None:
    world.provisioner.cost = 60.0
    await world.become_ready()
    before = cost(world)["total"]
    id = world.id(1)
    machines = world.provisioner.machines
    machines[id] = replace(machines[id], alive=False, ended=ended, detail="1 of 2 nodes gone")
    world.prober.answers[id] = "no route to host"
    world.provisioner.terminate_error = RuntimeError("the cloud does not answer")
    world.controller.set_limits("r1", max=0)
    await world.steps(60, 60.0)
    (row,) = (r for r in world.replicas if r.id == id)
    assert (row.state, row.failure) == (State.TERMINATING, "preempted")
    assert cost(world)["total"] == pytest.approx(before + 60.0, abs=2.0)
    assert not entry(world).closed
    world.provisioner.terminate_error = None
    await world.steps(30, 60.0)
    assert world.states == []
    told = cost(world)["total"]
    await world.steps(10, 60.0)
    assert (entry(world).closed, cost(world)["total"]) == (True, told)


async def test_the_total_is_never_less_after_a_kill_than_what_was_told_before(world: Any) -> None:
    world.provisioner.cost = 3600.0
    await world.become_ready()
    await world.steps(3)
    told = cost(world)["total"]
    world.start()
    assert cost(world)["total"] == pytest.approx(told)
    await world.steps(1)
    assert cost(world)["total"] > told


async def test_dollars_that_could_not_be_written_are_written_later_and_nothing_else_stops(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    world.provisioner.cost = 60.0
    await world.become_ready()
    save = world.table.save_ledger

    def full(_: Any) -> None:
        raise TableError("database or disk is full")

    world.table.save_ledger = full
    world.clock.now += 60.0
    await world.steps(2)
    assert "costs could not be saved: database or disk is full" in caplog.text
    world.table.save_ledger = save
    await world.steps(11)
    assert sum(entry.dollars for entry in world.table.ledger()) > 1.0


async def test_idle_share_and_saving_against_always_on_are_told(world: Any) -> None:
    world.provisioner.cost = 60.0
    assert cost(world) == {"hourly": 0, "total": 0.0, "idle_share": None, "always_on": None, "saved": None}
    await world.become_ready()
    world.lease(world.id(1))
    await world.steps(60, 10.0)
    world.release(world.id(1))
    await world.steps(60, 10.0)
    told = cost(world)
    assert told["idle_share"] == pytest.approx(0.5, abs=0.02)
    assert told["saved"] == pytest.approx(0.0, abs=0.05)
    world.controller.set_limits("r1", max=0)
    await world.steps(360, 10.0)
    told = cost(world)
    assert told["total"] == pytest.approx(20.0, abs=0.5)
    assert told["saved"] == pytest.approx(60.0, abs=0.5)
    world.controller.set_limits("r1", min=2, max=2)
    assert cost(world)["always_on"] == pytest.approx(2 * told["always_on"], abs=0.1)


async def test_total_idle_share_and_saving_are_what_one_reckons_by_hand(world: Any) -> None:
    """An hour at $60, half of it busy; an hour without; an hour at $30, idle; an hour without."""
    world.start(idle_timeout=10_000.0)
    for price, busy in ((60.0, 1800.0), (30.0, 0.0)):
        world.controller.reset_limits("r1")
        world.provisioner.cost = price
        await world.become_ready()
        ready = world.replicas[-1]
        if busy:
            world.lease(ready.id)
            await world.steps(180, busy / 180)
            world.release(ready.id)
        await world.steps(180, (3600.0 - busy) / 180)
        world.controller.set_limits("r1", max=0)
        await world.steps(3)
        assert world.states == []
        await world.steps(36, 100.0)
    world.controller.reset_limits("r1")
    told = cost(world)
    assert told["total"] == pytest.approx(60 + 30, rel=0.002)
    assert told["idle_share"] == pytest.approx((1800 + 3600) / 7200, rel=0.002)
    assert told["always_on"] == pytest.approx(4 * (60 + 30) / 2, rel=0.002), "4 hours at $45 on average"
    assert told["saved"] == pytest.approx(180 - 90, rel=0.005)
    kept = sum(entry.dollars for entry in world.table.ledger())
    assert kept == pytest.approx(told["total"]), "after the figure is told"


async def test_the_ledger_says_whose_request_woke_a_replica(world: Any) -> None:
    worker = world.control.workers[0]
    world.control.workers[0] = replace(worker, woken={"r1": ("alice", "req-1")})
    await world.become_ready()
    assert (entry(world).key, entry(world).request) == ("alice", "req-1")
    world.start()
    world.prober.every = True
    await world.steps(2)
    assert entry(world).request == "req-1"


async def test_a_name_that_comes_a_moment_after_the_launch_is_added_and_a_late_one_is_not(world: Any) -> None:
    world.waits(1)
    await world.step()
    worker = world.control.workers[0]
    world.control.workers[0] = replace(worker, woken={"r1": ("alice", "req-1")})
    await world.step(0.1)
    assert entry(world).key == "alice"
    world.control.workers[0] = replace(worker, woken={})
    world.prober.every = True
    await world.steps(3)
    world.controller.set_limits("r1", min=2)
    await world.steps(5)
    world.control.workers[0] = replace(worker, woken={"r1": ("bob", "req-2")})
    await world.steps(2)
    assert world.states == [State.READY, State.READY]
    assert (entry(world).key, entry(world, 2).key) == ("alice", ""), "a person asked for the second"


async def test_the_bill_has_what_was_spent_up_to_now(world: Any) -> None:
    world.provisioner.cost = 60.0
    await world.become_ready()
    await world.steps(6, 10.0)
    bill = world.controller.cost(by="replica")
    assert [row["replica"] for row in bill["rows"]] == [world.id(1)]
    assert bill["total"] == pytest.approx(cost(world)["total"])
    assert world.controller.cost("30s", "day")["total"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="neither"):
        world.controller.cost("yesterday")
