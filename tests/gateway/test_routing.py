"""Which replica takes the next request, and which one is left out for a while."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.routing import CONSECUTIVE_ERRORS, HEALTHY, MAX_EJECTION_SECONDS, Health, choose, failed

SEEDED = settings(deadline=None, derandomize=True)
NOW = 1000.0


@dataclass(frozen=True)
class Up:
    id: str
    depth: int = 0
    full: bool = False
    health: Health = HEALTHY


def chosen(ups: Sequence[Up], avoid: Sequence[str] = (), pick: int = 0) -> Up | None:
    return choose(
        ups,
        depth=lambda u: None if u.full else u.depth,
        now=NOW,
        avoid=avoid,
        pick=lambda best: best[pick % len(best)],
    )


healths = st.builds(
    Health,
    errors=st.integers(0, 4),
    ejections=st.integers(0, 2000),
    until=st.sampled_from([0.0, NOW - 1, NOW, NOW + 5]),
    unreachable=st.booleans(),
    last=st.sampled_from([NOW - 1, NOW - 0.5, NOW]),
)
ups = st.lists(
    st.builds(Up, id=st.sampled_from("abcdef"), depth=st.integers(0, 5), full=st.booleans(), health=healths),
    max_size=6,
    unique_by=lambda u: u.id,
)


def test_the_least_loaded_takes_it() -> None:
    assert chosen([Up("a", 2), Up("b", 1), Up("c", 3)]) == Up("b", 1)


def test_ties_are_drawn_by_lot() -> None:
    rng = random.Random(7)
    seen = {
        choose(
            [Up("a", 1), Up("b", 1), Up("c", 2)],
            depth=lambda u: u.depth,
            now=NOW,
            avoid=(),
            pick=rng.choice,
        )
        for _ in range(50)
    }
    assert seen == {Up("a", 1), Up("b", 1)}


def test_a_full_one_is_not_chosen_even_when_it_is_the_least_loaded() -> None:
    assert chosen([Up("a", 0, full=True), Up("b", 9)]) == Up("b", 9)


def test_when_all_are_full_the_request_waits() -> None:
    assert chosen([Up("a", full=True), Up("b", full=True)]) is None


def test_without_any_the_request_waits() -> None:
    assert chosen([]) is None


def test_an_ejected_one_is_left_out_until_its_time_is_over() -> None:
    assert chosen([Up("a", 0, health=Health(until=NOW + 1)), Up("b", 5)]) == Up("b", 5)
    assert chosen([Up("a", 0, health=Health(until=NOW)), Up("b", 5)]).id == "a"  # type: ignore[union-attr]


def test_one_that_was_tried_is_taken_again_only_when_no_other_is_in_rotation() -> None:
    assert chosen([Up("a", 0), Up("b", 5)], avoid=["a"]) == Up("b", 5)
    assert chosen([Up("a", 0), Up("b", 5, full=True)], avoid=["a"]) is None
    assert chosen([Up("a", 0)], avoid=["a"]) == Up("a")


def test_when_all_are_ejected_those_that_answer_dials_are_used_rather_than_none() -> None:
    dead = Up("a", 0, health=Health(until=NOW + 9, unreachable=True, last=NOW - 2))
    sick = Up("b", 5, health=Health(until=NOW + 9, last=NOW))
    assert chosen([dead, sick]) == sick


def test_when_no_dial_is_answered_one_is_made_a_second_after_the_last_however_long_the_ejection() -> None:
    def dead(last: float) -> Up:
        return Up("a", health=Health(until=NOW + 29, unreachable=True, last=last))

    assert chosen([dead(NOW - 0.9)]) is None
    assert chosen([dead(NOW - 1)]) is not None


@SEEDED
@given(ups, st.lists(st.sampled_from("abcdef"), max_size=3), st.integers(0, 5))
def test_the_choice_is_never_full_never_ejected_while_another_is_not_and_least_loaded(
    candidates: list[Up], avoid: list[str], pick: int
) -> None:
    best = chosen(candidates, avoid, pick)
    rotation = [u for u in candidates if u.health.until <= NOW]
    usable = rotation or [u for u in candidates if not u.health.unreachable]
    usable = usable or [u for u in candidates if u.health.last <= NOW - 1]
    usable = [u for u in usable if u.id not in avoid] or usable
    free = [u for u in usable if not u.full]
    if best is None:
        assert free == []
    else:
        assert best in free
        assert best.depth == min(u.depth for u in free)


def after(count: int, health: Health = HEALTHY, now: float = NOW, unreachable: bool = False) -> Health:
    for _ in range(count):
        health = failed(health, now, unreachable=unreachable)
    return health


def test_four_failures_in_a_row_do_not_eject_and_the_fifth_does() -> None:
    assert after(CONSECUTIVE_ERRORS - 1).until == 0
    assert after(CONSECUTIVE_ERRORS).until == NOW + 1


def test_one_refused_dial_ejects() -> None:
    health = after(1, unreachable=True)
    assert health.until == NOW + 1
    assert health.unreachable


def test_each_further_ejection_lasts_twice_as_long_up_to_30_seconds() -> None:
    health, pauses = HEALTHY, []
    now = NOW
    for _ in range(7):
        health = after(1, health, now, unreachable=True)
        pauses.append(health.until - now)
        now = health.until
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_fifty_requests_that_fail_together_are_one_failure() -> None:
    assert after(50, unreachable=True).until == NOW + 1
    assert after(50).until == NOW + 1


def test_a_refused_dial_at_an_ejected_one_tells_that_it_is_unreachable() -> None:
    health = failed(after(CONSECUTIVE_ERRORS), NOW, unreachable=True)
    assert (health.until, health.unreachable) == (NOW + 1, True)


def test_a_failure_that_reached_it_tells_that_it_is_reachable_again() -> None:
    health = after(1, unreachable=True)
    health = after(CONSECUTIVE_ERRORS, health, health.until)
    assert not health.unreachable


@pytest.mark.parametrize("unreachable", [True, False])
@SEEDED
@given(health=healths)
def test_no_ejection_is_longer_than_30_seconds_however_long_it_has_been_failing(
    unreachable: bool, health: Health
) -> None:
    health = failed(health, NOW, unreachable=unreachable)
    assert health.until <= NOW + MAX_EJECTION_SECONDS
    assert health.errors < CONSECUTIVE_ERRORS
