"""Alive, hung, lost, frozen: which evidence counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicas.health import GRACE, Signs, estimate, expired, frozen, hung, lost, not_ready

NOW = 100_000.0
OLD = NOW - 10 * GRACE
BUSY = Signs(listed="alive", running=3, chunk_at=OLD, stamp_at=OLD, stamped=True, ready_at=OLD)
FAILING = replace(BUSY, probe_failures=2, failing_since=NOW - 30)


def test_hung_needs_all_of_busy_silent_still_and_a_failed_probe() -> None:
    assert hung(replace(BUSY, probe_failures=1), NOW)
    for sign in (
        {"running": 0},
        {"probe_failures": 0},
        {"chunk_at": NOW - 19},
        {"stamp_at": NOW - 19},
        {"stamped": False},
        {"ready_at": None},
    ):
        assert not hung(replace(replace(BUSY, probe_failures=1), **sign), NOW), sign


def test_nothing_is_hung_in_the_ten_minutes_in_which_kernels_compile() -> None:
    young = replace(BUSY, probe_failures=1, ready_at=NOW - 599)
    assert not hung(young, NOW)
    assert hung(young, NOW + 1)


def test_one_failed_probe_takes_nothing_out_of_rotation() -> None:
    one = replace(FAILING, probe_failures=1, running=0)
    assert not not_ready(one, NOW)
    assert not_ready(replace(one, probe_failures=2), NOW)
    assert not_ready(replace(one, listed="run"), NOW)  # but for a process that is known to be dead
    assert not not_ready(replace(one, probe_failures=0, listed="run"), NOW)


def test_a_hung_replica_leaves_the_rotation_with_its_first_failed_probe() -> None:
    assert not_ready(replace(FAILING, probe_failures=1), NOW)


def test_tokens_that_flow_or_a_load_report_that_moves_are_life() -> None:
    assert not not_ready(replace(FAILING, chunk_at=NOW - 5, probe_failures=9), NOW)
    assert not not_ready(replace(FAILING, stamp_at=NOW - 5, probe_failures=9), NOW)


def test_two_503s_at_once_leave_the_rotation_though_tokens_flow_and_its_streams_may_end() -> None:
    """SGLang after SIGTERM: /health says 503 in milliseconds, its streams go on, what comes last is lost."""
    draining = Signs(listed="alive", probe_failures=2, failing_since=NOW - 1, chunk_at=NOW, turned_away=True)
    assert not_ready(draining, NOW)
    assert not not_ready(replace(draining, probe_failures=1), NOW)
    assert not not_ready(replace(draining, turned_away=False), NOW)
    late = replace(draining, failing_since=NOW - 1000, ready_at=NOW - 10_000)
    assert not expired(late, NOW, threshold=180)
    assert expired(replace(late, chunk_at=NOW - 30), NOW, threshold=180)


def test_a_start_is_lost_as_soon_as_its_process_is_dead_or_its_machine_gone() -> None:
    assert lost(Signs(listed="run"), NOW) == "crashed"
    assert lost(Signs(listed="absent"), NOW) == "preempted"
    assert lost(Signs(listed="alive"), NOW) is None
    assert lost(Signs(listed="unknown", probe_failures=9), NOW) is None


def test_what_answers_is_alive_whatever_the_list_says() -> None:
    assert lost(Signs(listed="absent", ready_at=OLD), NOW) is None
    assert lost(Signs(listed="absent", ready_at=OLD, probe_failures=1, chunk_at=NOW - 1), NOW) is None
    assert lost(Signs(listed="absent", ready_at=OLD, probe_failures=1, chunk_at=NOW - 9), NOW) == "preempted"


def test_probes_may_fail_for_the_threshold_and_in_the_first_minutes_for_longer() -> None:
    failing = Signs(listed="alive", ready_at=OLD, probe_failures=5, failing_since=NOW - 179)
    assert not expired(failing, NOW, threshold=180)
    assert expired(failing, NOW + 1, threshold=180)
    young = replace(failing, ready_at=NOW - 200)
    assert not expired(young, NOW + 300, threshold=180)
    assert expired(young, NOW - 200 + GRACE + 180, threshold=180)
    assert expired(replace(young, listed="absent"), NOW + 1, threshold=180)
    assert not expired(replace(failing, probe_failures=0), NOW + 999, threshold=180)
    assert not expired(replace(failing, failing_since=None), NOW + 999, threshold=180)


def freeze(*signs: Signs, now: float = NOW) -> str | None:
    return frozen(signs, now, period=10, threshold=180)


def test_all_failing_within_one_probe_period_freezes() -> None:
    assert freeze(FAILING, replace(FAILING, failing_since=NOW - 21)) is not None
    assert freeze(FAILING, replace(FAILING, failing_since=NOW - 300)) is None
    assert freeze(FAILING, BUSY) is None
    assert freeze(BUSY, BUSY) is None


def test_one_replica_alone_that_fails_has_failed() -> None:
    assert freeze(FAILING) is None
    assert freeze() is None


def test_a_list_that_knows_none_of_ours_freezes_until_the_probes_agree_for_the_threshold() -> None:
    absent = replace(FAILING, listed="absent", probe_failures=0, failing_since=None)
    reason = freeze(absent, absent)
    assert reason is not None
    assert "knows none of the 2" in reason
    failing = replace(FAILING, listed="absent")
    assert freeze(failing, failing) is not None
    assert freeze(failing, failing, now=NOW + 150) is None


def test_a_freeze_ends_when_one_is_known_to_be_dead_and_after_half_an_hour() -> None:
    assert freeze(FAILING, replace(FAILING, listed="run")) is None
    assert freeze(FAILING, FAILING, now=NOW + 1769) is not None
    assert freeze(FAILING, FAILING, now=NOW + 1770) is None


PHASES = ("provision", "setup", "download", "load", "warmup")
PROVISIONED = [("provision", 100.0), ("provision", 200.0), ("provision", 120.0)]
PAST = [*PROVISIONED, ("load", 60.0), ("warmup", 10.0), ("total", 1.0)]


@pytest.mark.parametrize(
    ("phase", "elapsed", "eta"),
    [
        (None, 0.0, 190.0),
        ("provision", 20.0, 170.0),
        ("provision", 500.0, 70.0),
        ("setup", 5.0, 70.0),
        ("load", 30.0, 40.0),
        ("warmup", 99.0, 0.0),
    ],
)
def test_the_eta_is_what_past_starts_took_from_here(phase: str | None, elapsed: float, eta: float) -> None:
    assert estimate(PAST, PHASES, phase, elapsed) == pytest.approx(eta)


def test_without_history_there_is_no_eta() -> None:
    assert estimate([], PHASES, "load", 1.0) is None
    assert estimate([("provision", 9.0)], PHASES, "load", 1.0) is None
    assert estimate([("load", 8.0), ("load", 10.0)], PHASES, "load", 1.0) == 8.0
