"""How many replicas, told as timelines: what happens, and the target at that moment."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from replicas.autoscaler import CODES, Decision, Demand, Memory, Policy, decide, wanted

QUIET = Demand(0, 0, False, 0.0, asked_at=0.0, active_at=0.0, window=16.0, unlaunched=0, coming=0, serving=0)
ZERO_TO_TWO = Policy(min=0, max=2)


class Timeline:
    """A clock, the memory between ticks, and the last decision."""

    def __init__(self, policy: Policy, demand: Demand = QUIET) -> None:
        self.policy, self.demand, self.memory = policy, demand, Memory()
        self.now = 10_000.0

    def at(self, seconds: float, **demand: object) -> Decision:
        self.now = 10_000.0 + seconds
        self.demand = replace(self.demand, **demand)  # type: ignore[arg-type]
        decision = decide(self.policy, self.memory, self.demand, self.now)
        self.memory = decision.memory
        return decision


def expect(decision: Decision, target: int, code: str) -> None:
    assert (decision.target, decision.code) == (target, code), decision.reason
    assert decision.reason
    assert decision.code in CODES


def test_from_zero_one_replica_at_once_for_all_who_wait() -> None:
    t = Timeline(ZERO_TO_TWO)
    expect(t.at(0), 0, "cold")
    expect(t.at(1, waiting=500), 1, "wake")


def test_a_refused_request_wakes_the_service_too() -> None:
    expect(Timeline(ZERO_TO_TWO).at(0, arrived=True), 1, "wake")


def test_up_only_when_the_demand_has_been_above_for_the_upscale_delay() -> None:
    t = Timeline(ZERO_TO_TWO, replace(QUIET, serving=1))
    expect(t.at(0, in_flight=17), 1, "rising")
    expect(t.at(299), 1, "rising")
    expect(t.at(300), 2, "demand")


def test_a_dip_starts_the_upscale_delay_anew() -> None:
    t = Timeline(ZERO_TO_TWO, replace(QUIET, serving=1))
    expect(t.at(0, in_flight=17), 1, "rising")
    expect(t.at(200, in_flight=16), 1, "steady")
    expect(t.at(201, in_flight=17), 1, "rising")
    expect(t.at(499), 1, "rising")
    expect(t.at(501), 2, "demand")


def test_a_spike_counts_only_for_what_was_sustained() -> None:
    t = Timeline(Policy(min=0, max=9), replace(QUIET, serving=1))
    expect(t.at(0, in_flight=17), 1, "rising")
    expect(t.at(300, in_flight=140), 2, "demand")


def test_waiters_behind_a_starting_replica_launch_no_second_one_at_once() -> None:
    t = Timeline(ZERO_TO_TWO, replace(QUIET, coming=1, waiting=10))
    expect(t.at(0), 1, "steady")
    expect(t.at(5000), 1, "steady")
    expect(t.at(5001, waiting=17), 1, "rising")


def test_target_in_flight_wins_over_the_window() -> None:
    t = Timeline(Policy(min=0, max=9, target_in_flight=2, upscale_delay=0), replace(QUIET, serving=1))
    expect(t.at(0, in_flight=7), 4, "demand")


def test_target_qps_counts_arrivals_and_the_larger_of_both_targets_wins() -> None:
    qps = Policy(min=0, max=9, target_qps=2.0, upscale_delay=0)
    expect(Timeline(qps, replace(QUIET, serving=1, qps=5.0)).at(0), 3, "demand")
    expect(Timeline(qps, replace(QUIET, serving=1, qps=0.1, in_flight=100)).at(0), 1, "steady")
    both = replace(qps, target_in_flight=10.0)
    expect(Timeline(both, replace(QUIET, serving=1, qps=5.0, in_flight=100)).at(0), 9, "demand")


def test_overprovision_adds_to_any_demand_but_not_to_none() -> None:
    policy = Policy(min=0, max=9, overprovision=1)
    assert wanted(policy, replace(QUIET, in_flight=1))[0] == 2
    assert wanted(policy, QUIET)[0] == 0
    assert wanted(replace(policy, max=1), replace(QUIET, in_flight=1))[0] == 1


def test_down_to_fewer_only_after_the_downscale_delay() -> None:
    t = Timeline(Policy(min=0, max=9), replace(QUIET, serving=3))
    expect(t.at(0, in_flight=5), 3, "falling")
    expect(t.at(1000, in_flight=20), 3, "falling")
    expect(t.at(1199, in_flight=5), 3, "falling")
    expect(t.at(1200), 2, "surplus")  # the peak of the quiet time needs two


def test_a_moment_of_full_demand_starts_the_downscale_delay_anew() -> None:
    t = Timeline(Policy(min=0, max=9), replace(QUIET, serving=3))
    expect(t.at(0, in_flight=5), 3, "falling")
    expect(t.at(1000, in_flight=40), 3, "steady")
    expect(t.at(1200, in_flight=5), 3, "falling")


def test_to_zero_only_when_idle_since_the_last_completion() -> None:
    t = Timeline(ZERO_TO_TWO, replace(QUIET, serving=1))
    expect(t.at(0, in_flight=1, active_at=10_000.0), 1, "steady")
    expect(t.at(5000, active_at=15_000.0), 1, "steady")  # a long answer, and no arrival since
    expect(t.at(5001, in_flight=0), 1, "steady")
    expect(t.at(6199), 1, "steady")
    expect(t.at(6200), 0, "idle")


def test_a_replica_that_nobody_used_idles_from_its_first_ready() -> None:
    t = Timeline(ZERO_TO_TWO, replace(QUIET, serving=1, active_at=10_000.0))
    expect(t.at(1199), 1, "steady")
    expect(t.at(1200), 0, "idle")


def test_idle_goes_to_the_minimum() -> None:
    t = Timeline(Policy(min=1, max=3), replace(QUIET, serving=3))
    expect(t.at(1200), 1, "idle")
    expect(t.at(1201, serving=1), 1, "steady")


def test_nothing_is_given_up_while_something_starts_or_somebody_waits() -> None:
    t = Timeline(ZERO_TO_TWO, replace(QUIET, coming=1))
    expect(t.at(1e6), 1, "steady")
    expect(t.at(2e6, coming=0, serving=2, waiting=1), 2, "steady")


def test_a_start_without_a_machine_is_cancelled_when_nobody_has_waited_for_a_minute() -> None:
    t = Timeline(ZERO_TO_TWO, replace(QUIET, coming=1, unlaunched=1, asked_at=10_000.0))
    expect(t.at(59), 1, "steady")
    expect(t.at(60), 0, "nobody_waits")
    expect(t.at(60, waiting=1), 1, "steady")
    expect(t.at(60, waiting=0, unlaunched=0), 1, "steady")  # it bills: it goes on


def test_the_minimum_is_never_cancelled() -> None:
    t = Timeline(Policy(min=1, max=2), replace(QUIET, coming=1, unlaunched=1))
    expect(t.at(1e6), 1, "steady")


def test_limits_apply_at_once() -> None:
    expect(Timeline(Policy(min=2, max=3)).at(0), 2, "min_replicas")
    expect(Timeline(Policy(min=0, max=1), replace(QUIET, serving=3, in_flight=90)).at(0), 1, "max_replicas")
    expect(Timeline(Policy(min=0, max=0), replace(QUIET, serving=3, waiting=5)).at(0), 0, "paused")


demands = st.builds(
    Demand,
    waiting=st.integers(0, 300),
    in_flight=st.integers(0, 300),
    arrived=st.booleans(),
    qps=st.floats(0, 50),
    asked_at=st.floats(0, 10_000),
    active_at=st.floats(0, 10_000),
    window=st.floats(1, 64),
    unlaunched=st.integers(0, 2),
    coming=st.integers(2, 5),
    serving=st.integers(0, 5),
)
policies = st.builds(
    Policy,
    min=st.integers(0, 3),
    max=st.integers(3, 6),
    overprovision=st.integers(0, 2),
    target_in_flight=st.none() | st.floats(0.5, 64),
    target_qps=st.none() | st.floats(0.1, 5),
    upscale_delay=st.floats(0, 50),
    downscale_delay=st.floats(0, 50),
)


@given(policies, st.lists(demands | demands.map(lambda d: replace(d, coming=0, unlaunched=0)), max_size=8))
def test_the_target_stays_within_the_limits_and_never_falls_while_anybody_waits(
    policy: Policy, story: list[Demand]
) -> None:
    memory, now = Memory(), 10_000.0
    for demand in story:
        now += 20
        decision = decide(policy, memory, demand, now)
        memory = decision.memory
        current = demand.coming + demand.serving
        assert policy.min <= decision.target <= policy.max
        if demand.waiting and current <= policy.max:
            assert decision.target >= current
        assert decision.code in CODES
