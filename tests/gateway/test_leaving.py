"""What is said when the gateway stops: which replicas go on, what they cost, and when each ends itself."""

from __future__ import annotations

from typing import Any

from gateway.leaving import dead_man_text, keeps_running


def one(**values: Any) -> dict[str, Any]:
    replica = {"id": "r1-gw-0badcafe-1", "state": "ready", "hourly_cost": 60.0, "dead_man_seconds": None}
    return replica | values


def test_each_replica_is_told_with_the_time_after_which_it_ends_itself() -> None:
    first, second = keeps_running([{"replicas": [one(dead_man_seconds=7080.0)]}], cloud=True)
    told = "r1-gw-0badcafe-1 (ready, dead-man in 118 min)"
    assert first == f"1 replica keeps running and cost $60.00 an hour: {told}"
    assert "`gateway down` ends them" in second


def test_a_cloud_without_a_timer_says_that_there_is_none() -> None:
    assert keeps_running([{"replicas": [one()]}], cloud=True)[0].endswith("(ready, dead-man none)")


def test_a_replica_that_has_no_machine_yet_or_is_none_of_a_cloud_says_nothing_of_it() -> None:
    assert dead_man_text(one(state="provisioning"), True) == ""
    assert dead_man_text(one(), False) == ""
