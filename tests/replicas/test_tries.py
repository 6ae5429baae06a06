"""What failed is let alone, for longer each time, and never for longer than that."""

from __future__ import annotations

import pytest

from replicas.tries import PAUSE_MOST, Tries, back_off

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("failed", "pause"), [(1, 5.0), (2, 10.0), (3, 20.0), (6, 160.0), (7, 300.0), (10_000, 300.0)]
)
def test_pauses_double_up_to_the_longest(failed: int, pause: float) -> None:
    assert back_off(failed, 5.0, 300.0) == pause


def test_what_failed_is_due_when_its_pause_is_over_and_not_before() -> None:
    tries = Tries()
    assert tries.due("r1", NOW)
    assert tries.failed("r1", NOW, 5.0, 300.0) == 5.0
    assert not tries.due("r1", NOW + 4.9)
    assert tries.due("r1", NOW + 5.0)
    assert tries.failed("r1", NOW + 5.0, 5.0, 300.0) == 10.0
    assert tries.failures("r1") == 2
    assert tries.due("r2", NOW)


def test_what_succeeds_starts_from_the_first_pause_again() -> None:
    tries = Tries()
    tries.failed("r1", NOW, 5.0, 300.0)
    tries.forget("r1")
    assert tries.due("r1", NOW)
    assert tries.failures("r1") == 0
    assert tries.failed("r1", NOW, 5.0, 300.0) == 5.0


def test_a_pause_alone_is_no_failure() -> None:
    tries = Tries()
    tries.pause("r1", NOW, 1.0)
    assert not tries.due("r1", NOW)
    assert tries.failures("r1") == 0


def test_a_clock_that_was_set_back_keeps_nothing_waiting() -> None:
    tries = Tries()
    tries.pause("r1", NOW, PAUSE_MOST)
    assert not tries.due("r1", NOW)
    assert tries.due("r1", NOW - 3600)
