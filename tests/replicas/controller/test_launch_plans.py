"""Plans are tried in turn, visibly; spot and money shorten the list."""

from __future__ import annotations

from typing import Any

import pytest

from replicas import plans
from replicas.lifecycle import State
from replicas.plans import Options
from replicas.provisioners import Infeasible, LaunchError, NoCapacity

HOUR = 3600.0
SPOT = "resources: {ports: 30000, any_of: [{use_spot: true}, {use_spot: false}]}"


def options(*texts: str, prices: tuple[str, ...] = (), **more: Any) -> Options:
    return Options(tuple(map(plans.parse, texts)), prices=plans.parse_prices(prices), **more)


def on_spot(world: Any) -> str:
    text: str = world.text.replace("resources: {ports: 30000}", SPOT)
    return text


def tried(world: Any) -> list[str]:
    return [plan.name for plan in world.provisioner.plans]


def replica(world: Any) -> dict[str, Any]:
    (only,) = world.controller.status()["services"][0]["replicas"]
    return dict(only)


@pytest.fixture
def three(world: Any) -> Any:
    world.start(launch=options("H200:8x1", "H100:8x2", "A100-80GB:8x4"))
    return world


async def test_without_capacity_the_next_plan_is_tried_a_second_later(three: Any) -> None:
    three.provisioner.full = {"H200:8x1": NoCapacity("none in us-east-1")}
    three.waits(1)
    await three.steps(3)
    assert tried(three) == ["H200:8x1", "H100:8x2"]
    assert three.replicas[0].plan == "H100:8x2"
    assert three.info.status == "open"


async def test_where_it_stands_is_seen_in_reason_status_and_beats(three: Any) -> None:
    three.provisioner.launch_error = NoCapacity("none in us-east-1")
    three.waits(1)
    await three.steps(2)
    seen = replica(three)
    assert (seen["plan"], seen["plan_place"], seen["attempt"]) == ("H100:8x2", "2/3", 2)
    assert seen["reason"] == "none in us-east-1; next try in 1 s: plan=2/3 attempt=2 (H100:8x2)"
    cold = three.control.progressed[-1][1]
    assert (cold.plan, cold.attempt) == ("2/3", 2)


async def test_the_list_through_it_begins_again_after_a_growing_pause(three: Any) -> None:
    three.provisioner.launch_error = NoCapacity("none")
    three.waits(1)
    await three.steps(60)
    assert tried(three)[:7] == ["H200:8x1", "H100:8x2", "A100-80GB:8x4"] * 2 + ["H200:8x1"]
    assert 9 <= len(tried(three)) <= 15
    assert "plan=" in replica(three)["reason"]


async def test_the_remaining_time_is_unknown_rather_than_invented(three: Any) -> None:
    for phase, seconds in (("provision", 60.0), ("load", 300.0)):
        three.table.add_cold_start("r1", three.service.hash, "H200:8x1", phase, seconds, 1.0)
    three.start()
    three.provisioner.launch_error = NoCapacity("none")
    three.waits(1)
    await three.step()
    assert replica(three)["eta_seconds"] == 360.0
    await three.step()
    assert replica(three)["eta_seconds"] is None


async def test_the_estimate_is_that_of_the_same_hardware(three: Any) -> None:
    three.table.add_cold_start("r1", three.service.hash, "H200:8x1 spot", "load", 300.0, 1.0)
    three.table.add_cold_start("r1", three.service.hash, "H100:8x2", "load", 900.0, 1.0)
    three.start()
    three.provisioner.full = {"H200:8x1": NoCapacity("none")}
    three.waits(1)
    await three.steps(4)
    assert replica(three)["plan"] == "H100:8x2"
    assert replica(three)["eta_seconds"] == 900.0


async def test_a_cold_start_is_remembered_with_its_plan(three: Any) -> None:
    await three.become_ready()
    assert {time.plan for time in three.table.cold_starts("r1")} == {"H200:8x1"}


async def test_a_plan_that_can_never_fit_is_not_tried_again(three: Any) -> None:
    three.provisioner.full = {
        "H200:8x1": Infeasible("no enabled cloud has H200:8"),
        "H100:8x2": NoCapacity("none"),
        "A100-80GB:8x4": NoCapacity("none"),
    }
    three.waits(1)
    await three.steps(30)
    assert tried(three).count("H200:8x1") == 1
    assert tried(three)[1:5] == ["H100:8x2", "A100-80GB:8x4"] * 2
    assert replica(three)["plan_place"] in ("1/2", "2/2")


async def test_when_no_plan_can_ever_fit_the_holds_end_with_the_reason(three: Any) -> None:
    three.provisioner.launch_error = Infeasible("nothing satisfies the request")
    three.waits(1)
    await three.steps(8, until=lambda: three.control.published and three.info.status == "blocked")
    assert len(tried(three)) == 3
    assert "nothing satisfies the request" in three.info.message


async def test_trouble_with_the_api_server_is_no_reason_for_another_plan(three: Any) -> None:
    three.provisioner.launch_error = LaunchError("the API server does not answer", permanent=False)
    three.waits(1)
    await three.steps(20)
    assert set(tried(three)) == {"H200:8x1"}
    assert 2 <= len(tried(three)) <= 4


async def test_a_permanent_error_ends_the_holds_whatever_plans_there_are(three: Any) -> None:
    three.provisioner.launch_error = LaunchError("no cloud access is set up")
    three.waits(1)
    await three.steps(3)
    assert three.info.status == "blocked"
    assert len(tried(three)) == 1


async def test_a_restart_goes_on_with_the_plan_that_was_saved(three: Any) -> None:
    three.provisioner.full = {"H200:8x1": NoCapacity("none")}
    three.provisioner.gate = None
    three.waits(1)
    await three.step()
    await three.step()
    assert three.replicas[0].plan == "H100:8x2"
    three.start(launch=options("L4:1"))  # and other flags
    await three.steps(2)
    assert tried(three)[-1] == "H100:8x2"


async def test_variables_reach_the_replica_on_every_plan_and_after_a_restart(world: Any) -> None:
    launch = options("H200:8", envs={"HF_HOME": "/data"}, secrets={"HF_TOKEN": "hf_x"})
    world.start(launch=launch)
    world.provisioner.launch_error = NoCapacity("none")
    world.waits(1)
    await world.step()
    world.start()
    world.provisioner.launch_error = None
    await world.steps(2)
    for plan in world.provisioner.plans:
        assert (plan.envs, plan.secrets) == ({"HF_HOME": "/data"}, {"HF_TOKEN": "hf_x"})
    assert "hf_x" not in str(world.controller.status()) + str(world.events())


async def test_a_secret_in_last_words_or_errors_reaches_nobody(world: Any) -> None:
    world.start(launch=Options(secrets={"HF_TOKEN": "hf_topsecret"}))
    world.provisioner.launch_error = NoCapacity("none for hf_topsecret")
    world.waits(1)
    await world.steps(2)
    assert "none for ***" in replica(world)["reason"]
    world.provisioner.launch_error = None
    world.provisioner.dies = "exit code 1: 401 for hf_topsecret"
    await world.steps(20, until=lambda: world.info.status == "blocked")
    assert "401 for ***" in world.info.message
    everything = f"{world.controller.status()} {world.events()} {world.control.published}"
    assert "hf_topsecret" not in everything


# ------------------------------------------------------------ spot


async def test_spot_comes_first_and_on_demand_when_there_is_none(world: Any) -> None:
    world.start(yaml=on_spot(world))
    world.provisioner.full = {"spot": NoCapacity("no spot")}
    world.waits(1)
    await world.steps(3)
    assert tried(world) == ["spot", "on-demand"]


MIXED = "resources: {ports: 30000, any_of: [{accelerators: H200:8, use_spot: true}, {accelerators: H100:8}]}"


async def test_spot_machines_that_a_mixed_yaml_got_count_as_losses_too(world: Any) -> None:
    world.start(yaml=world.text.replace("resources: {ports: 30000}", MIXED))
    world.provisioner.placed = {"region": "aws/us-east-1", "spot": True}
    for _ in range(3):
        await world.become_ready()
        assert tried(world)[-1] == ""
        world.provisioner.machines.clear()
        world.prober.every = "refused"
        await world.steps(60, 10.0, until=lambda: world.states == [])
        await world.step(300.0)
    world.provisioner.placed = {"region": "gcp/us-central1", "spot": False}
    world.start()
    await world.become_ready()
    assert tried(world)[-1] == "on-demand"
    (seen,) = world.controller.status()["services"][0]["replicas"]
    assert (seen["region"], seen["spot"]) == ("gcp/us-central1", False)
    entries = {e.replica: e for e in world.table.ledger()}
    assert (entries[world.id(1)].region, entries[world.id(1)].spot) == ("aws/us-east-1", True)


async def test_after_three_spot_losses_replicas_are_on_demand_for_six_hours(world: Any) -> None:
    world.start(yaml=on_spot(world))
    for _ in range(3):
        await world.become_ready()
        assert tried(world)[-1] == "spot"
        world.provisioner.machines.clear()
        world.prober.every = "refused"
        await world.steps(60, 10.0, until=lambda: world.states == [])
        await world.step(300.0)
    world.start()  # it is remembered
    await world.become_ready()
    assert tried(world)[-1] == "on-demand"
    (id,) = world.machines_of()
    world.provisioner.machines.clear()
    world.prober.every = "refused"
    await world.steps(60, 10.0, until=lambda: id not in [r.id for r in world.replicas])
    world.clock.now += 6 * HOUR
    await world.become_ready()
    assert tried(world)[-1] == "spot"


async def test_the_base_of_on_demand_replicas_is_filled_first(world: Any) -> None:
    policy = "max_replicas: 2, base_ondemand_fallback_replicas: 1"
    yaml = on_spot(world).replace("max_replicas: 2", policy)
    world.start(yaml=yaml, min_replicas=2)
    world.prober.every = True
    await world.steps(3)
    assert sorted(tried(world)) == ["on-demand", "spot"]


# ------------------------------------------------------------ money


async def test_a_plan_that_would_pass_the_hourly_limit_is_left_out(world: Any) -> None:
    prices = ("H200:8=40", "H100:8=15")
    world.start(launch=options("H200:8x1", "H100:8x2", prices=prices, max_hourly_cost=35.0))
    await world.become_ready()
    assert tried(world) == ["H100:8x2"]
    assert replica(world)["hourly_cost"] == 30.0  # which no provisioner told


async def test_a_second_replica_over_the_hourly_limit_is_not_launched_and_the_first_serves_on(
    world: Any,
) -> None:
    launch = options("H200:8", prices=("H200:8=40",), max_hourly_cost=60.0)
    world.start(launch=launch, target_in_flight=1.0, upscale_delay=0.0)
    await world.become_ready()
    world.lease(world.id(1), 5)
    await world.steps(30)
    assert world.states == [State.READY]
    target = world.controller.status()["services"][0]["target"]
    assert target["code"] == "budget"
    assert "--max-hourly-cost is $60.00" in target["reason"]
    assert (world.info.status, len(world.info.upstreams)) == ("open", 1)


async def test_two_replicas_wanted_at_once_do_not_pass_the_limit_together(world: Any) -> None:
    launch = options("H200:8", prices=("H200:8=40",), max_hourly_cost=60.0)
    world.start(launch=launch, min_replicas=2)
    world.prober.every = True
    await world.steps(10)
    assert len(world.machines_of()) == 1


async def test_when_every_plan_is_too_dear_a_request_is_told_so_at_once(world: Any) -> None:
    world.start(launch=options("H200:8", prices=("H200:8=40",), max_hourly_cost=30.0))
    world.waits(1)
    await world.steps(3)
    assert world.provisioner.launched == []
    assert world.info.status == "blocked"
    assert "the cheapest plan costs $40.00 an hour, and --max-hourly-cost is $30.00" in world.info.message


async def test_the_daily_limit_ends_no_stream_and_no_replica_but_allows_no_new_one(world: Any) -> None:
    world.provisioner.cost = 50.0
    world.start(launch=options(max_daily_cost=100.0), idle_timeout=600.0)
    await world.become_ready()
    world.lease(world.id(1))
    await world.steps(30, 600.0)  # 5 hours, $250
    assert world.states == [State.READY]
    assert world.info.status == "open"
    world.release(world.id(1))
    await world.steps(10, 300.0, until=lambda: world.states == [])
    world.waits(1)
    await world.steps(3)
    assert len(world.provisioner.launched) == 1
    assert world.info.status == "blocked"
    assert "--max-daily-cost is $100.00" in world.info.message
    world.start()  # it is remembered
    await world.steps(3)
    assert world.info.status == "blocked"
    world.clock.now += 25 * HOUR
    await world.steps(3)
    assert len(world.provisioner.launched) == 2
