"""What replicas cost now, and within a day."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from replicas import budget
from replicas.lifecycle import Replica, State, new
from replicas.plans import Menu, Options, Plan, Spending

NOW = 1_800_000_000.0
HOUR = 3600.0
MENU = Menu(plans=(Plan("H200:8", 1),), options=Options(prices={"H200:8": 30.0}))


def replica(state: State = State.READY, **more: Any) -> Replica:
    row = new("r1-gw-0a1b2c3d-1", "r1", 1, 0, spec_hash="", spec_text="", now=NOW - 50 * HOUR, reason="")
    return replace(row, **{"state": state, "since": NOW - HOUR, **more})


def spent(*replicas: Replica) -> Spending:
    return budget.spending([(r, MENU) for r in replicas], NOW)


def test_a_replica_costs_what_the_provisioner_says_or_else_its_plan() -> None:
    assert budget.price(replica(hourly_cost=12.0, plan="H200:8x1"), MENU) == 12.0
    assert budget.price(replica(hourly_cost=0.0, plan="H200:8x2"), MENU) == 60.0
    assert budget.price(replica(plan="L4:1x1"), MENU) == 0.0


def test_a_machine_costs_from_its_launch_until_it_is_gone() -> None:
    live = replica(hourly_cost=10.0, launched_at=NOW - 3 * HOUR)
    gone = replica(State.GONE, hourly_cost=10.0, launched_at=NOW - 3 * HOUR)
    assert spent(live) == Spending(10.0, 30.0)
    assert spent(gone) == Spending(0.0, 20.0)
    assert spent(live, gone) == Spending(10.0, 50.0)


def test_only_the_last_24_hours_count() -> None:
    assert spent(replica(hourly_cost=10.0, launched_at=NOW - 48 * HOUR)).day == 240.0
    assert spent(replica(State.GONE, hourly_cost=10.0, launched_at=0.0, since=NOW - 25 * HOUR)).day == 0.0


def test_a_launch_counts_before_it_has_a_machine_and_a_wish_does_not() -> None:
    assert spent(replica(State.PROVISIONING, plan="H200:8x1")) == Spending(30.0, 0.0)
    assert spent(replica(State.PENDING, plan="H200:8x1")) == Spending(0.0, 0.0)


def test_only_a_preempted_spot_machine_is_a_spot_loss() -> None:
    assert budget.lost_to_spot(replica(failure="preempted", plan="H200:8x1 spot"))
    assert not budget.lost_to_spot(replica(failure="preempted", plan="H200:8x1 on-demand"))
    assert not budget.lost_to_spot(replica(failure="crashed", plan="spot"))


def test_what_it_was_placed_on_counts_and_not_what_its_plan_leaves_open_or_hoped_for() -> None:
    assert budget.lost_to_spot(replica(failure="preempted", plan="", spot=True))
    assert not budget.lost_to_spot(replica(failure="preempted", plan="", spot=False))
    assert not budget.lost_to_spot(replica(failure="preempted", plan=""))
    assert [budget.on_spot(replica(plan=p)) for p in ("spot", "on-demand", "L4:1x1")] == [True, False, None]
