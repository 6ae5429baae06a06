"""What the controller tells: status, events, generations, dollars."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from replicas.lifecycle import State
from replicas.loads import Load
from replicas.plans import Options
from replicas.provisioners import LaunchError
from replicas.spec import parse


async def test_the_status_has_the_shape_of_the_admin_api(world: Any) -> None:
    world.provisioner.cost = 60.0
    await world.become_ready()
    world.lease(world.id(1), 3)
    world.loads.results[world.id(1)] = Load(depth=5, foreign=2, max_running=32, supported=True)
    await world.step()
    status = world.controller.status()
    assert set(status) == {"generation", "owner", "provisioner", "services", "strays", "others"}
    assert status["owner"] == world.table.owner
    assert status["generation"] == world.control.published[-1].generation == world.table.generation
    (service,) = status["services"]
    assert {"name", "model", "limits", "target", "blocked", "demand", "replicas", "cost"} <= set(service)
    assert service["model"] == "deepseek-ai/DeepSeek-R1"
    assert service["target"]["replicas"] == 1
    assert service["target"]["reason"]
    assert service["blocked"] is None
    assert service["demand"] == {"waiting": 0, "in_flight": 3}
    assert service["cost"]["hourly"] == 60.0
    (replica,) = service["replicas"]
    keys = "id state phase progress eta_seconds since url in_flight queue_depth window hourly_cost outdated"
    assert {*keys.split(), "reason"} <= set(replica)
    assert (replica["state"], replica["in_flight"], replica["queue_depth"]) == ("ready", 3, 5)
    assert (replica["window"], replica["outdated"]) == (32, False)


async def test_dollars_add_up_while_a_replica_exists_and_over_restarts(world: Any) -> None:
    world.provisioner.cost = 60.0
    await world.become_ready()
    began = world.controller.status()["services"][0]["cost"]["total"]
    await world.steps(60, 10.0)
    cost = world.controller.status()["services"][0]["cost"]["total"]
    assert abs(cost - began - 10.0) < 0.01
    assert abs(world.observer.dollars - cost) < 1e-6
    await world.controller.close()
    world.start()
    assert abs(world.controller.status()["services"][0]["cost"]["total"] - cost) < 1e-6


async def test_a_generation_goes_out_for_each_change_and_for_nothing_else(world: Any) -> None:
    await world.step()
    first = world.control.published[-1].generation
    await world.steps(20)
    assert world.control.published[-1].generation == first
    await world.become_ready()
    generations = [s.generation for s in world.control.published]
    assert generations == [first, first + 1, first + 2]  # starting, ready
    await world.steps(20)
    assert world.control.published[-1].generation == first + 2


async def test_progress_goes_out_each_second_but_makes_no_generation(world: Any) -> None:
    for phase, seconds in (("provision", 10.0), ("load", 100.0)):
        world.table.add_cold_start("r1", world.service.hash, "", phase, seconds, 1.0)
    world.start()
    world.waits(1)
    await world.steps(15)
    generation, told = world.control.published[-1].generation, len(world.control.progressed)
    await world.steps(10)
    assert world.control.published[-1].generation == generation
    assert len(world.control.progressed) == told + 10
    etas = [cold.eta_seconds for _, cold in world.control.progressed[-3:]]
    assert etas[0] - etas[2] == 2


async def test_subscribers_get_past_events_and_then_each_new_one(world: Any) -> None:
    world.waits(1)
    await world.steps(3)
    events = world.controller.events(last=2)
    past = [await anext(events) for _ in range(2)]
    assert past == world.table.last_events(2)
    pending = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    world.prober.every = True
    await world.step()
    new = await asyncio.wait_for(pending, 1)
    assert new["service"] == "r1"
    assert {"at", "service", "replica", "kind", "reason", "id"} <= set(new)
    await events.aclose()


async def test_every_event_has_a_reason(world: Any) -> None:
    await world.become_ready()
    world.controller.set_limits("r1", max=0)
    await world.steps(4)
    events = world.events()
    kinds = {"decision", "launch", "transition", "phase", "limits", "cold_start"}
    assert kinds <= {e["kind"] for e in events}
    assert all(e["reason"] and e["code"] for e in events)
    assert [e["id"] for e in events] == sorted(e["id"] for e in events)
    states = [e["state"] for e in events if e["kind"] == "transition"]
    assert states == ["provisioning", "starting", "ready", "draining", "terminating", "gone"]


async def test_two_services_live_side_by_side(world: Any) -> None:
    world.others = [parse(world.text.replace("name: r1", "name: v3"), "v3.yaml")]
    world.start()
    world.prober.every = True
    world.board.cells[world.row.arrived + 1] = 1
    world.board.cells[world.row.waiting + 1] = 1
    await world.steps(4)
    assert world.states == []
    assert [r.state for r in world.controller.fleets["v3"].rows.values()] == [State.READY]
    one, two = world.control.published[-1].services
    assert (one.name, one.index, len(one.upstreams)) == ("r1", 0, 0)
    assert (two.name, two.index, len(two.upstreams)) == ("v3", 1, 1)
    assert one.replica_key != two.replica_key


async def test_reprs_say_what_a_log_needs(world: Any) -> None:
    await world.become_ready()
    assert "target=1" in repr(world.controller)
    assert "1:ready" in repr(world.controller)


async def test_the_speed_is_that_of_the_load_report_or_of_the_output_where_there_is_none(world: Any) -> None:
    def speed() -> float | None:
        (replica,) = world.controller.status()["services"][0]["replicas"]
        return replica["generation_tokens_per_second"]  # type: ignore[no-any-return]

    world.provisioner.placed = {"generation": 11.5}
    await world.become_ready()
    world.loads.results[world.id(1)] = Load(generation=2400.0, supported=True, at=world.clock.now)
    await world.step()
    assert speed() == 2400.0
    await world.steps(12)
    assert speed() is None   # the report is too old to tell
    world.loads.results[world.id(1)] = Load(supported=False)
    await world.step()
    assert speed() == 11.5


@pytest.mark.parametrize("how", ["launch", "run"])
async def test_no_secret_is_in_a_reason_an_event_or_the_status(world: Any, how: str) -> None:
    yaml = world.text + "\nsecrets: {TOKEN: yaml-secret}\n"
    world.start(yaml=yaml, launch=Options(secrets={"PLAN": "plan-secret"}))
    (key,) = world.controller.keys.values()
    why = f"curl -H 'x: yaml-secret' plan-secret {key}; --api-key other-key hf_abcdefghijklmnopqrst"
    world.provisioner.launch_error = LaunchError(why) if how == "launch" else None
    world.provisioner.dies = why
    world.waits(1)
    await world.steps(5)
    told = json.dumps([world.events(), world.controller.status(), world.observer.told])
    published = repr(world.control.published)
    assert "curl -H" in told
    for secret in ("yaml-secret", "plan-secret", key, "other-key", "hf_abcdefghijklmnopqrst"):
        assert secret not in told + published
