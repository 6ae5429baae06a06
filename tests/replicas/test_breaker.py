"""What failed starts cost, at most."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from replicas.breaker import Breaker, failed, from_json, retried, succeeded


def after(*pauses: float) -> tuple[Breaker, float]:
    breaker, now = Breaker("h"), 1000.0
    for pause in pauses:
        now += pause
        breaker = failed(breaker, "exit code 1: no such model", now)
    return breaker, now


def test_a_failed_start_allows_no_other_for_thirty_seconds() -> None:
    assert Breaker().may_launch(0.0)
    breaker, now = after(0)
    assert not breaker.may_launch(now + 29.9)
    assert breaker.may_launch(now + 30)
    said = "the last start failed: exit code 1: no such model. Another can be made 30 s later."
    assert breaker.message(now) == said
    assert breaker.message(now + 30) == ""


def test_the_third_failure_in_a_row_blocks_until_a_person_helps() -> None:
    breaker, now = after(0, 31, 61)
    assert breaker.blocked()
    assert not breaker.may_launch(now + 1e9)
    assert breaker.retry_after(now + 1e9) == 60
    assert "3 starts in a row failed" in breaker.message(now + 1e9)
    assert "gateway retry" in breaker.message(now)


def test_retry_allows_a_start_at_once_but_the_cool_down_goes_on_doubling() -> None:
    breaker, now = after(0, 31, 61)
    breaker = retried(breaker)
    assert breaker.may_launch(now)
    breaker = failed(breaker, "again", now)
    assert not breaker.blocked()
    assert not breaker.may_launch(now + 239)  # 30, 60, 120, then 240
    assert breaker.may_launch(now + 240)


def test_the_cool_down_ends_at_six_hours() -> None:
    breaker = Breaker("h")
    for _ in range(60):
        breaker = failed(retried(breaker), "no", 0.0)
    assert breaker.cool_until == 6 * 3600


def test_a_ready_replica_forgets_everything_and_so_does_a_changed_yaml() -> None:
    breaker, _ = after(0, 31, 61)
    assert succeeded(breaker) == Breaker("h")
    assert from_json(breaker.to_json(), "other") == Breaker("other")
    assert from_json(None, "h") == Breaker("h")
    assert from_json(json.loads(json.dumps(breaker.to_json())), "h") == breaker


def test_no_capacity_cools_down_but_never_blocks() -> None:
    breaker = Breaker("h")
    for _ in range(10):
        breaker = failed(breaker, "no H200 anywhere", 0.0, counts=False)
    assert not breaker.blocked()
    assert not breaker.may_launch(1.0)


def test_a_preempted_start_paces_launches_but_nobody_is_sent_away() -> None:
    breaker = failed(Breaker("h"), "preempted", 0.0, counts=False, quiet=True)
    assert not breaker.may_launch(29.0)
    assert not breaker.ends_holds(29.0)
    loud = failed(breaker, "exit code 1", 100.0)
    assert loud.ends_holds(159.0)
    assert not loud.ends_holds(160.0)
    assert after(0, 31, 61)[0].ends_holds(1e12)


@given(st.integers(0, 50), st.floats(0, 1e9), st.floats(-1e9, 1e9))
def test_retry_after_is_always_within_one_and_sixty_seconds(failures: int, now: float, later: float) -> None:
    breaker = Breaker("h")
    for _ in range(failures):
        breaker = failed(breaker, "no", now, counts=False)
    assert 1 <= breaker.retry_after(now + later) <= 60
