"""The life of one replica."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.lifecycle import (
    CAPACITY,
    COMING,
    SERVING,
    TRANSITIONS,
    Event,
    IllegalTransition,
    Replica,
    State,
    advance,
    diagram,
    new,
)


def replica(state: State = State.PENDING, **fields: object) -> Replica:
    values: dict[str, object] = {"spec_hash": "h", "spec_text": "t", "since": 1.0, "created_at": 1.0}
    return Replica("r1-gw-00000000-1", "r1", 1, 0, state=state, **{**values, **fields})  # type: ignore[arg-type]


def walk(*events: Event, now: float = 100.0) -> Replica:
    r = new("r1-gw-00000000-1", "r1", 1, 0, spec_hash="h", spec_text="t", now=now, reason="a request waits")
    for i, event in enumerate(events, 1):
        r = advance(r, event, now + i, **({"failure": "crashed"} if event is Event.FAIL else {}))
    return r


def test_the_good_life_goes_from_pending_to_gone() -> None:
    E = Event
    served = (E.LAUNCH, E.LAUNCHED, E.PASSED, E.FAILING, E.PASSED)
    gone = walk(*served, E.DRAIN, E.RESUME, E.DRAIN, E.DRAINED, E.ABSENT)
    assert gone.state is State.GONE
    assert (gone.created_at, gone.launched_at, gone.ready_at, gone.since) == (100, 102, 103, 110)
    assert gone.failure is None


@pytest.mark.parametrize("before", [(), (Event.LAUNCH,), (Event.LAUNCH, Event.LAUNCHED)])
def test_cancelling_what_is_not_ready_is_no_failure(before: tuple[Event, ...]) -> None:
    cancelled = walk(*before, Event.CANCEL)
    assert (cancelled.state, cancelled.failure) == (State.TERMINATING, None)


def test_everything_that_may_have_a_machine_can_fail_and_is_then_terminated() -> None:
    can_fail = {state for state, event in TRANSITIONS if event is Event.FAIL}
    assert can_fail == CAPACITY - {State.PENDING} | {State.DRAINING}
    failed = walk(Event.LAUNCH, Event.FAIL)
    assert (failed.state, failed.failure) == (State.FAILED, "crashed")
    assert advance(failed, Event.TERMINATE, 200.0).failure == "crashed"


@given(st.sampled_from(State), st.sampled_from(Event))
def test_what_the_table_does_not_list_raises(state: State, event: Event) -> None:
    changes = {"failure": "timeout"} if event is Event.FAIL else {}
    if (state, event) in TRANSITIONS:
        after = advance(replica(state), event, 5.0, **changes)
        assert (after.state, after.since) == (TRANSITIONS[state, event], 5.0)
    else:
        with pytest.raises(IllegalTransition, match=f"{event} is not possible"):
            advance(replica(state), event, 5.0, **changes)


def test_ready_ends_the_run_of_failed_probes_and_the_phase() -> None:
    failing = advance(replica(State.READY, failing_since=3.0), Event.FAILING, 9.0)
    assert failing.failing_since == 3.0
    assert advance(replica(State.READY), Event.FAILING, 9.0).failing_since == 9.0
    assert advance(failing, Event.PASSED, 10.0).failing_since is None
    ready = advance(replica(State.STARTING, phase="load", progress=0.5, phase_since=1.0), Event.PASSED, 10.0)
    assert (ready.phase, ready.progress, ready.phase_since) == (None, None, None)


def test_identity_is_fixed_for_life() -> None:
    with pytest.raises(ValueError, match="id, slot"):
        advance(replica(), Event.LAUNCH, 1.0, slot=2, id="x")


def test_a_failure_goes_with_fail_and_with_nothing_else() -> None:
    with pytest.raises(ValueError, match="failure"):
        advance(replica(State.STARTING), Event.FAIL, 1.0)
    with pytest.raises(ValueError, match="failure"):
        advance(replica(State.STARTING), Event.PASSED, 1.0, failure="crashed")


def test_every_state_has_a_place_and_gone_is_the_only_end() -> None:
    leaving = {State.DRAINING, State.FAILED, State.TERMINATING}
    assert COMING | SERVING | leaving | {State.GONE} == set(State)
    assert set(State) - {state for state, _ in TRANSITIONS} == {State.GONE}
    assert set(TRANSITIONS.values()) == set(State) - {State.PENDING}


def test_the_diagram_shows_each_transition_once() -> None:
    lines = diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert len(lines) == len(TRANSITIONS) + 3
    assert "    draining --> ready: resume" in lines


def test_repr_says_what_a_log_needs() -> None:
    assert repr(replica(State.READY)) == "<Replica r1-gw-00000000-1 ready slot=0>"
    assert repr(walk(Event.LAUNCH, Event.FAIL)) == "<Replica r1-gw-00000000-1 failed (crashed) slot=0>"
