"""From a target to actions."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from replicas.autoscaler import Demand, Memory, Policy, decide
from replicas.lifecycle import CAPACITY, COMING, SERVING, TRANSITIONS, Event, Replica, State, advance, new
from replicas.planner import Action, Drain, Launch, Resume, Terminate, plan


def make(n: int, state: State, **fields: object) -> Replica:
    r = new(f"r1-gw-0-{n}", "r1", n, n, spec_hash="h", spec_text="t", now=0.0, reason="test")
    return replace(r, state=state, **fields)  # type: ignore[arg-type]


def name(n: int) -> str:
    return f"r1-gw-0-{n}"


def run(target: int, *replicas: Replica, waiting: int = 0, **more: object) -> list[Action]:
    flight = more.pop("in_flight", {})
    return list(plan(target, "why", replicas, in_flight=flight, waiting=waiting, **more))  # type: ignore[arg-type]


def apply(actions: tuple[Action, ...] | list[Action], replicas: list[Replica]) -> list[Replica]:
    """What the controller does with a plan, without the world."""
    after = {r.id: r for r in replicas}
    for action in actions:
        match action:
            case Launch(reason=reason):
                n = max((r.n for r in after.values()), default=0) + 1
                after[name(n)] = replace(make(n, State.PENDING), reason=reason)
            case Resume(id=id):
                after[id] = advance(after[id], Event.RESUME, 1.0)
            case Drain(id=id):
                after[id] = advance(after[id], Event.DRAIN, 1.0, resumable=True)
            case Terminate(id=id):
                event = Event.TERMINATE if after[id].state is State.FAILED else Event.CANCEL
                after[id] = advance(after[id], event, 1.0)
    return list(after.values())


def test_what_is_missing_is_launched() -> None:
    assert run(2, make(1, State.READY)) == [Launch("why")]
    assert run(1, make(1, State.PENDING)) == []
    assert run(1, make(1, State.TERMINATING), make(2, State.GONE)) == [Launch("why")]
    assert run(1, may_launch=False) == []


def test_a_failed_replica_is_cleaned_up_whatever_the_target() -> None:
    failed = make(1, State.FAILED, failure="crashed", reason="exit code 1")
    assert run(0, failed) == [Terminate(name(1), "crashed: exit code 1")]


def test_a_failed_replica_that_is_kept_is_left_alone_and_counts_for_nothing() -> None:
    failed = make(1, State.FAILED, failure="crashed", reason="exit code 1")
    assert run(1, failed, kept={name(1)}) == [Launch("why")]


def test_a_draining_replica_comes_back_before_anything_is_launched() -> None:
    draining = [make(n, State.DRAINING, resumable=True) for n in (1, 2)]
    assert run(1, *draining) == [Resume(name(2), "demand is back: why")]
    assert run(3, *draining) == [*run(2, *draining), Launch("why")]


def test_a_replica_that_drains_for_good_or_fails_its_probes_does_not_come_back() -> None:
    assert run(1, make(1, State.DRAINING)) == [Launch("why")]
    assert run(1, make(1, State.DRAINING, resumable=True, failing_since=5.0)) == [Launch("why")]


def test_not_ready_goes_first_then_the_least_busy_and_the_newest_last() -> None:
    replicas = [make(1, State.READY), make(2, State.READY), make(3, State.READY), make(4, State.NOT_READY)]
    flight = {name(1): 2, name(2): 1, name(3): 1}
    drained = [action.id for action in run(0, *replicas, in_flight=flight) if isinstance(action, Drain)]
    assert drained == [name(4), name(2), name(3), name(1)]


def test_a_start_without_a_machine_goes_before_one_that_bills_and_that_before_what_serves() -> None:
    replicas = [make(1, State.READY), make(2, State.STARTING), make(3, State.PROVISIONING)]
    actions = run(0, *replicas, unlaunched={name(3)})
    why = "not wanted any more: why"
    assert actions == [Terminate(name(3), why), Terminate(name(2), why), Drain(name(1), "why")]


def test_the_old_yaml_goes_before_the_new() -> None:
    replicas = [make(1, State.READY), make(2, State.READY)]
    assert run(1, *replicas, outdated={name(2)}) == [Drain(name(2), "why")]


def test_what_starts_is_never_ended_while_anybody_waits() -> None:
    assert run(0, make(1, State.STARTING), make(2, State.PENDING), waiting=1) == []
    assert run(1, make(1, State.READY), make(2, State.STARTING), waiting=1) == []
    assert run(0, make(1, State.READY), make(2, State.STARTING), waiting=1) == [Drain(name(1), "why")]


def test_a_written_off_replica_is_replaced_without_being_ended() -> None:
    assert run(1, make(1, State.NOT_READY), written_off={name(1)}) == [Launch("why")]


replicas_st = st.lists(
    st.tuples(st.sampled_from(State), st.booleans(), st.booleans(), st.integers(0, 3)), max_size=8
)


@given(st.integers(0, 6), replicas_st, st.integers(0, 2), st.booleans())
def test_a_plan_applied_to_its_own_result_is_empty(
    target: int, drawn: list[tuple[State, bool, bool, int]], waiting: int, may_launch: bool
) -> None:
    replicas = [
        make(i, state, resumable=resumable, failing_since=1.0 if failing else None, failure="crashed")
        for i, (state, resumable, failing, _) in enumerate(drawn)
    ]
    flight = {name(i): load for i, (*_, load) in enumerate(drawn)}

    def go(rows: list[Replica]) -> tuple[Action, ...]:
        return plan(target, "why", rows, in_flight=flight, waiting=waiting, may_launch=may_launch)

    first = go(replicas)
    after = apply(first, replicas)
    assert go(after) == ()
    if any(isinstance(a, Launch | Resume) for a in first):
        assert sum(r.state in CAPACITY for r in after) <= target
    if waiting:
        starting = {r.id for r in replicas if r.state in COMING}
        assert not starting & {a.id for a in first if isinstance(a, Terminate)}


class Fleet(RuleBasedStateMachine):
    """A service under arbitrary demand, whose replicas do arbitrary legal things."""

    MAX = 3

    def __init__(self) -> None:
        super().__init__()
        self.replicas: list[Replica] = []
        self.memory = Memory()
        self.now = 1000.0
        self.waiting = 0
        self.active_at = 1000.0

    @rule(waiting=st.integers(0, 40), seconds=st.floats(1, 700), flight=st.integers(0, 60))
    def tick(self, waiting: int, seconds: float, flight: int) -> None:
        self.now += seconds
        self.waiting = waiting
        count = {state: sum(r.state is state for r in self.replicas) for state in State}
        serving = sum(count[s] for s in SERVING)
        flight = flight if serving else 0
        if flight:
            self.active_at = self.now
        unlaunched = {r.id for r in self.replicas if r.state is State.PENDING}
        coming = sum(count[s] for s in COMING)
        demand = Demand(
            waiting, flight, False, 0.0, self.now if waiting else 0.0, self.active_at, 16.0, len(unlaunched),
            coming, serving,
        )  # fmt: skip
        before = list(self.replicas)
        policy = Policy(min=0, max=self.MAX)
        decision = decide(policy, self.memory, demand, self.now)
        self.memory = decision.memory

        def go(rows: list[Replica]) -> tuple[Action, ...]:
            return plan(
                decision.target, decision.reason, rows, in_flight={}, waiting=waiting, unlaunched=unlaunched
            )

        actions = go(before)
        self.replicas = apply(actions, before)
        assert go(self.replicas) == ()
        if waiting:
            assert any(r.state in CAPACITY for r in self.replicas)
            starting = {r.id for r in before if r.state in COMING}
            assert not starting & {a.id for a in actions if isinstance(a, Terminate)}
        if flight:
            assert any(r.state in SERVING for r in self.replicas)
        if not before and not waiting:
            assert not self.replicas

    @rule(data=st.data())
    def something_happens(self, data: st.DataObject) -> None:
        living = [r for r in self.replicas if r.state is not State.GONE]
        if not living:
            return
        chosen = data.draw(st.sampled_from(living))
        own = {Event.DRAIN, Event.RESUME, Event.CANCEL, Event.TERMINATE}  # decided by plans alone
        possible = [e for s, e in TRANSITIONS if s is chosen.state and e not in own]
        if not possible:
            return
        event = data.draw(st.sampled_from(possible))
        changes = {"failure": "crashed"} if event is Event.FAIL else {}
        after = advance(chosen, event, self.now, **changes)
        self.replicas = [after if r.id == chosen.id else r for r in self.replicas]

    @invariant()
    def never_more_than_the_maximum(self) -> None:
        assert sum(r.state in CAPACITY for r in self.replicas) <= self.MAX

    @invariant()
    def ids_and_slots_are_for_life(self) -> None:
        assert len({r.id for r in self.replicas}) == len(self.replicas)
        assert all(r.n == r.slot for r in self.replicas)


TestFleet = Fleet.TestCase
