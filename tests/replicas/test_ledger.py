"""The ledger: time times price, whatever happens to controllers, prices and machines meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from replicas.costs import HOUR, Entry, Waker
from replicas.ledger import SAVE_EVERY, Ledger
from replicas.lifecycle import Replica, State, new

T0 = 1_800_000_000.0


class FakeTable:
    """What was saved; `broken` is what a full disk does."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, int], Entry] = {}
        self.broken = False

    def save_ledger(self, entries: Iterable[Entry]) -> None:
        if self.broken:
            raise OSError("full")
        self.entries |= {(e.replica, e.part): e for e in entries}

    def ledger(self, since: float | None = None, *, closed: bool | None = None) -> list[Entry]:
        return [e for e in self.entries.values() if e.closed == closed]


class Life:
    """One replica, one ledger and the time; `tick` is the controller's, `restart` is a kill -9."""

    def __init__(self) -> None:
        self.table = FakeTable()
        self.now = T0
        self.row = replace(
            new("r1-1", "r1", 1, 0, spec_hash="x", spec_text="", now=T0, reason="needed"), state=State.READY,
            launched_at=T0, hourly_cost=36.0,
        )  # fmt: skip
        self.listed: set[str] | None = {"r1-1"}
        self.ledger = Ledger(self.table, self.now)

    def tick(self, seconds: float = 1.0, *, busy: bool = False, **changes: object) -> dict[str, float]:
        self.now += seconds
        self.row = replace(self.row, **changes)  # type: ignore[arg-type]
        working = {self.row.id} if busy else set[str]()
        added = self.ledger.accrue([self.row], self.now, listed=self.listed, busy=working)
        if self.ledger.due(self.now):
            self.ledger.save(self.now)
        return added

    def restart(self, after: float = 0.0) -> None:
        self.now += after
        self.ledger = Ledger(self.table, self.now)

    @property
    def dollars(self) -> float:
        return self.ledger.sums("r1").dollars

    @property
    def saved(self) -> list[Entry]:
        return sorted(self.table.entries.values(), key=lambda e: e.part)


@pytest.fixture
def life() -> Life:
    return Life()


def test_a_machine_costs_its_price_times_its_time(life: Life) -> None:
    life.tick()
    added = sum(life.tick().get("r1", 0.0) for _ in range(100))
    assert life.dollars == pytest.approx(1.0) == pytest.approx(added)
    assert life.ledger.sums("other").dollars == 0.0


def test_it_is_written_at_once_when_it_begins_or_ends_and_every_ten_seconds_between(life: Life) -> None:
    life.tick()
    assert life.saved[0].until == life.now
    for _ in range(int(SAVE_EVERY) - 1):
        life.tick()
    assert life.saved[0].until == T0 + 1
    life.tick()
    assert life.saved[0].until == life.now
    life.tick(state=State.GONE)
    assert life.saved[0].closed


def test_what_could_not_be_written_is_written_later(life: Life) -> None:
    life.table.broken = True
    with pytest.raises(OSError, match="full"):
        life.tick()
    life.table.broken = False
    life.tick(100.0)
    assert life.saved[0].dollars == pytest.approx(1.0)
    assert not life.ledger.due(life.now + 100), "nothing is left to be saved"


def test_the_launch_is_recorded_with_who_woke_it_and_costs_nothing_before_its_machine(life: Life) -> None:
    life.ledger.launched("r1-1", "r1", life.now, Waker("alice", "req-1"))
    life.listed = set()
    life.tick(300.0, state=State.PROVISIONING, launched_at=None, hourly_cost=None)
    assert [(e.key, e.request, e.dollars) for e in life.saved] == [("alice", "req-1", 0.0)]
    life.listed = {"r1-1"}
    life.tick(state=State.PROVISIONING, hourly_cost=36.0)
    life.tick(100.0)
    assert life.dollars == pytest.approx(1.0)
    assert life.ledger.sums("r1").begun == T0 + 301
    assert life.saved[0].key == "alice"


def test_a_name_that_comes_after_the_launch_is_added(life: Life) -> None:
    life.ledger.launched("r1-1", "r1", life.now, None)
    life.ledger.woken("r1-1", Waker("bob", "req-2"))
    life.ledger.woken("r1-7", Waker("carol", "req-3"))
    life.tick()
    assert [(e.replica, e.key, e.request) for e in life.saved] == [("r1-1", "bob", "req-2")]


def test_a_launch_that_came_to_nothing_is_closed_at_no_cost(life: Life) -> None:
    life.ledger.launched("r1-1", "r1", life.now, None)
    life.tick(60.0, state=State.PENDING, launched_at=None, hourly_cost=None)
    life.tick(state=State.GONE)
    assert [(e.closed, e.dollars, e.hours) for e in life.saved] == [(True, 0.0, 0.0)]


def test_time_without_a_controller_counts_once_the_machine_is_seen_again(life: Life) -> None:
    life.tick()
    life.tick(100.0)
    before = life.dollars
    life.restart(after=7 * HOUR)
    life.listed = None  # the cloud does not answer
    life.tick()
    assert life.dollars == before
    life.listed = {"r1-1"}
    assert life.tick() == {"r1": pytest.approx(36.0 * 7 + 0.02)}
    assert life.dollars == pytest.approx(before + 36.0 * 7 + 0.02)
    assert life.ledger.sums("r1").ready == 100.0, "whether it was ready or idle meanwhile is not known"


def test_a_machine_that_vanished_meanwhile_is_accounted_to_the_last_moment_known(life: Life) -> None:
    life.tick()
    life.tick(100.0)
    life.restart(after=7 * HOUR)
    life.listed = set()
    life.tick()  # its row still says READY: perhaps the list is wrong
    life.tick(state=State.FAILED, failure="preempted")
    assert life.dollars == pytest.approx(1.0)
    assert (life.saved[0].closed, life.saved[0].until) == (True, T0 + 101)


def test_a_row_that_was_gone_before_its_entry_was_closed_is_closed_at_the_next_start(life: Life) -> None:
    life.tick()
    life.restart(after=HOUR)
    life.ledger.accrue([], life.now, listed=set())
    life.ledger.save(life.now)
    assert (life.saved[0].closed, life.dollars) == (True, 0.0)


def test_a_launch_under_way_at_the_kill_counts_from_its_beginning_if_it_made_a_machine(life: Life) -> None:
    life.ledger.launched("r1-1", "r1", life.now, None)
    life.ledger.save(life.now)
    life.restart(after=HOUR)
    life.tick(state=State.PROVISIONING, launched_at=None)
    assert life.dollars == pytest.approx(36.0, rel=1e-3)


def test_the_sum_never_falls_over_a_kill_once_it_was_told(life: Life) -> None:
    life.tick()
    life.tick(5.0)
    life.ledger.save(life.now)  # what whoever tells it does
    told = life.dollars
    life.restart(after=1.0)
    assert life.dollars == told
    life.tick()
    assert life.dollars > told


def test_what_ended_before_a_restart_stays_in_the_sums(life: Life) -> None:
    life.tick()
    life.tick(100.0)
    life.tick(state=State.GONE)
    life.restart(after=HOUR)
    assert life.dollars == pytest.approx(1.0)
    assert life.ledger.sums("r1").ready == 100.0


def test_without_news_nothing_is_written(life: Life) -> None:
    life.ledger.accrue([], life.now, listed=None)
    assert not life.ledger.due(life.now + 100)
    life.ledger.save(life.now)
    assert life.saved == []


def test_a_new_price_begins_a_new_part(life: Life) -> None:
    life.tick()
    life.tick(100.0)
    life.tick(100.0, hourly_cost=72.0)
    life.tick(100.0)
    assert [(e.part, e.price, e.dollars, e.closed) for e in life.saved] == [
        (1, 36.0, pytest.approx(2.0), True),
        (2, 72.0, pytest.approx(2.0), False),
    ]
    assert life.saved[0].until == life.saved[1].begun
    assert life.dollars == pytest.approx(4.0)


def test_a_price_that_is_learned_late_counts_from_the_beginning(life: Life) -> None:
    life.tick(hourly_cost=None)
    life.tick(100.0)
    assert life.dollars == 0.0
    assert life.tick(100.0, hourly_cost=36.0) == {"r1": pytest.approx(2.0)}
    assert life.dollars == pytest.approx(2.0)


def test_a_price_that_is_not_known_any_more_goes_on(life: Life) -> None:
    life.tick()
    life.tick(100.0, hourly_cost=None)
    assert life.dollars == pytest.approx(1.0)


def test_idle_is_ready_with_nothing_in_flight(life: Life) -> None:
    life.tick(state=State.STARTING)
    life.tick(50.0)
    life.tick(30.0, state=State.READY)
    life.tick(10.0, busy=True)
    life.tick(20.0, state=State.DRAINING)
    sums = life.ledger.sums("r1")
    assert (sums.ready, sums.idle) == (40.0, 30.0)


def test_a_failed_machine_that_is_kept_goes_on_costing_and_a_preempted_one_that_is_gone_does_not(
    life: Life,
) -> None:
    life.tick()
    life.tick(100.0, state=State.FAILED, failure="crashed")
    assert life.dollars == pytest.approx(1.0)
    life.listed = set()
    life.tick(100.0, failure="preempted")
    assert life.saved[0].closed
    life.tick(100.0, state=State.TERMINATING)
    assert life.dollars == pytest.approx(1.0)


def test_what_is_left_of_a_preempted_replica_costs_until_it_is_gone(life: Life) -> None:
    """One node of two was taken, or it is stopped: SkyPilot still lists it, and the rest bills."""
    life.tick()
    life.tick(100.0, state=State.FAILED, failure="preempted")
    life.tick(100.0, state=State.TERMINATING)
    assert life.dollars == pytest.approx(2.0)
    life.restart(after=HOUR)
    life.tick()
    assert life.dollars == pytest.approx(2.0 + 36.0, rel=1e-3)
    told = life.dollars
    life.listed = set()
    life.tick(100.0)
    life.tick(100.0, state=State.GONE)
    assert life.dollars == told
    assert [e.closed for e in life.saved] == [True]


def test_a_preempted_replica_costs_nothing_while_nobody_can_say_what_is_left_and_all_of_it_if_it_was(
    life: Life,
) -> None:
    life.tick()
    life.tick(100.0, state=State.FAILED, failure="preempted")
    life.listed = None
    assert life.tick(100.0) == {}
    life.listed = {"r1-1"}
    life.tick(100.0)
    assert life.dollars == pytest.approx(3.0)
    life.listed = None
    life.tick(100.0)
    life.tick(100.0, state=State.GONE)
    assert life.dollars == pytest.approx(3.0)
    assert [(e.part, e.closed) for e in life.saved] == [(1, True)]


def test_a_preempted_replica_that_one_list_left_out_goes_on_in_a_part_of_its_own(life: Life) -> None:
    life.tick()
    life.tick(100.0, state=State.FAILED, failure="preempted")
    life.listed = set()
    life.tick(100.0)
    life.listed = {"r1-1"}
    life.tick(100.0)
    life.tick(100.0)
    assert life.dollars == pytest.approx(4.0)
    assert [(e.part, e.closed, round(e.dollars, 6)) for e in life.saved] == [(1, True, 1.0), (2, False, 3.0)]
    assert life.saved[0].until == life.saved[1].begun


def test_a_clock_that_is_set_back_takes_nothing_back(life: Life) -> None:
    life.tick()
    life.tick(100.0)
    assert life.tick(-50.0) == {}
    life.tick(50.0)
    assert life.dollars == pytest.approx(1.0)
    life.tick(100.0)
    assert life.dollars == pytest.approx(2.0)


def test_the_plan_is_kept_with_its_market_and_place(life: Life) -> None:
    life.tick(plan="H200:8x1 spot infra=aws/us-east-1")
    life.tick()
    (entry,) = life.saved
    assert (entry.plan, entry.spot, entry.region) == (life.row.plan, True, "aws/us-east-1")


def test_its_repr_says_what_is_open(life: Life) -> None:
    life.tick()
    assert repr(life.ledger) == "<Ledger open=['r1-1'] unsaved=0>"


def test_replicas_of_two_services_are_kept_apart(life: Life) -> None:
    other: Replica = replace(life.row, id="v3-1", service="v3", hourly_cost=72.0)
    for _ in range(2):
        life.now += 100.0
        life.ledger.accrue([life.row, other], life.now, listed=None)
    assert (life.dollars, life.ledger.sums("v3").dollars) == (pytest.approx(1.0), pytest.approx(2.0))


def test_where_the_machine_really_is_goes_before_what_its_plan_says(life: Life) -> None:
    life.tick(plan="H200:8x1 infra=aws")
    assert (life.saved[0].plan, life.saved[0].region) == ("H200:8x1 infra=aws", "aws")
    assert life.saved[0].spot is None
    life.tick(SAVE_EVERY, region="aws/us-east-1/us-east-1a", spot=True)
    assert (life.saved[0].region, life.saved[0].spot) == ("aws/us-east-1/us-east-1a", True)
    life.tick(SAVE_EVERY, region="", spot=None)
    assert life.saved[0].region == "aws/us-east-1/us-east-1a", "what was known once stays"
    life.tick(SAVE_EVERY, plan="H100:8x2 on-demand")
    assert (life.saved[0].region, life.saved[0].spot) == ("", False), "another plan is another machine"
