"""A seeded mess of deaths, failures, kills, callers and limits; what must hold at every moment, and in the
end."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from replicas.lifecycle import CAPACITY, State
from replicas.provisioners import InstancesUnknown, LaunchError, NoCapacity


def mess(world: Any, rng: random.Random) -> None:
    """One thing that happens in the world."""
    machines = list(world.provisioner.machines)
    match rng.randrange(14):
        case 0 | 1:
            world.waits(rng.choice([0, 1, 1, 40]))
        case 2 if machines:
            del world.provisioner.machines[rng.choice(machines)]
        case 3 if machines:
            id = rng.choice(machines)
            world.provisioner.machines[id] = replace(world.provisioner.machines[id], alive=False, detail="-9")
        case 4:
            errors = [None, NoCapacity("none"), LaunchError("bad"), OSError("x")]
            world.provisioner.launch_error = rng.choice(errors)
        case 5:
            world.provisioner.terminate_error = rng.choice([None, None, OSError("API down")])
        case 6:
            world.provisioner.instances_error = rng.choice([None, None, None, InstancesUnknown("no answer")])
        case 7 | 8:
            world.prober.every = rng.choice([True, True, True, "HTTP 503", None])
        case 9 if machines:
            world.prober.answers[rng.choice(machines)] = rng.choice([True, "HTTP 503"])
        case 10:
            every = world.prober.every
            world.start()
            world.prober.every = every
        case 11:
            low = rng.choice([0, 0, 0, 1])
            world.controller.set_limits("r1", low, rng.choice([low, 2, 3]))
        case 12:
            world.controller.retry("r1")
        case 13:
            for r in world.replicas:
                if r.state is State.READY and rng.random() < 0.5:
                    world.lease(r.id)
                elif world.board.in_flight(r.slot):
                    world.release(r.id)
        case _:
            pass


def check(world: Any) -> None:
    rows = {r.id: r for r in world.replicas}
    assert world.machines_of() <= set(rows), "a machine without a row"
    stored = {r.id: r.state for r in world.table.replicas()}
    assert stored == {id: r.state for id, r in rows.items()}, "the table lags behind"
    slots = [r.slot for r in rows.values()]
    assert len(slots) == len(set(slots)), "two replicas on one slot"
    capacity = [r for r in rows.values() if r.state in CAPACITY]
    written_off = world.controller.fleets["r1"].written_off
    if world.waiting == 0 and not world.controller.fleets["r1"].frozen:
        assert len(capacity) - len(written_off) <= world.controller.fleets["r1"].policy.max
    ready = {r.id for r in rows.values() if r.state is State.READY}
    assert {u.id for u in world.info.upstreams} == ready, "workers know another list"


@pytest.mark.parametrize("seed", range(8))
async def test_no_machine_is_lost_and_the_service_recovers(world: Any, seed: int) -> None:
    rng = random.Random(seed)
    world.settings = replace(world.settings, upscale_delay=20.0, grace=60.0, drain_limit=100.0)
    world.start()
    launched = 0
    for _ in range(250):
        mess(world, rng)
        await world.step(rng.choice([0.02, 1.0, 1.0, 1.0, 15.0]))
        check(world)
        launched = max(launched, len(world.provisioner.launched))
    assert launched > 3
    # The world is well again: the service serves, whatever state it was left in.
    provisioner = world.provisioner
    provisioner.launch_error = provisioner.terminate_error = provisioner.instances_error = None
    world.prober.answers.clear()
    world.prober.every = True
    world.controller.set_limits("r1", 0, 2)
    await world.steps(5)  # a launch that failed before is still to be heard of
    world.controller.retry("r1")
    world.waits(1)
    await world.steps(400, until=lambda: any(r.state is State.READY for r in world.replicas))
    # Nobody asks any more: nothing is left, and nothing bills.
    world.waits(0)
    for r in world.replicas:
        world.release(r.id, world.board.in_flight(r.slot))
    await world.steps(4000, 2.0, until=lambda: world.replicas == [])
    assert world.machines_of() == set()
