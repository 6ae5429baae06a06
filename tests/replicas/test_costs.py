"""What is said about many entries of the ledger: sums, savings, bills, and the times people write."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicas.costs import HOUR, Entry, Sums, bill, duration, moment, summary

DAY = 24 * HOUR
NOON = 1_800_014_400.0  # 2027-01-15, 12:00 UTC
A = Entry(
    "r1-1", "r1", NOON, NOON + 2 * HOUR, price=60.0, dollars=120.0, ready=HOUR, idle=900.0, key="alice",
    closed=True,
)  # fmt: skip
B = Entry("r1-2", "r1", NOON + DAY, NOON + DAY + HOUR, price=30.0, dollars=30.0, ready=HOUR, key="bob")


def total(*entries: Entry) -> Sums:
    return sum(map(Sums.of, entries), Sums())


def test_always_on_is_at_the_average_price_paid_since_the_ledger_began() -> None:
    said = summary(total(A, B), 1, NOON + 30 * HOUR)
    assert said == {"total": 150.0, "idle_share": 0.125, "always_on": 1500.0, "saved": 1350.0}
    assert summary(total(A), 2, NOON + 2 * HOUR)["always_on"] == 240.0


def test_many_replicas_at_once_cost_more_than_one_that_is_always_on() -> None:
    assert summary(total(A, A), 1, NOON + 2 * HOUR)["saved"] == -120.0


def test_without_a_price_or_a_ready_replica_nothing_is_claimed() -> None:
    nothing = {"total": 0.0, "idle_share": None, "always_on": None, "saved": None}
    assert summary(Sums(), 1, NOON) == nothing
    assert summary(total(Entry("x", "r1", NOON, NOON + HOUR)), 1, NOON + HOUR) == nothing


def test_a_bill_by_replica_lists_each_with_its_times_and_who_woke_it() -> None:
    said = bill([B, A], "replica", NOON + 2 * DAY)
    assert (said["estimate"], said["total"], said["since"]) == (True, 150.0, None)
    assert [r["replica"] for r in said["rows"]] == ["r1-1", "r1-2"]
    first = said["rows"][0]
    assert (first["from"], first["to"], first["hours"], first["key"]) == (NOON, NOON + 2 * HOUR, 2.0, "alice")
    assert [r["open"] for r in said["rows"]] == [False, True]


def test_since_cuts_a_replica_where_it_begins() -> None:
    said = bill([A, B], "replica", NOON + 2 * DAY, NOON + HOUR)
    assert [(r["from"], r["dollars"]) for r in said["rows"]] == [(NOON + HOUR, 60.0), (NOON + DAY, 30.0)]
    assert said["total"] == 90.0
    assert bill([A, B], "replica", NOON + 2 * DAY, NOON + 5 * DAY)["rows"] == []


def test_a_bill_by_day_splits_a_replica_at_midnight_utc() -> None:
    long = replace(A, until=NOON + 48 * HOUR, dollars=48.0)
    said = bill([long, B], "day", NOON + 3 * DAY)
    assert [(r["day"], r["replicas"], r["hours"], r["dollars"]) for r in said["rows"]] == [
        ("2027-01-15", 1, 12.0, 12.0),
        ("2027-01-16", 2, 25.0, 54.0),
        ("2027-01-17", 1, 12.0, 12.0),
    ]
    late = bill([long], "day", NOON + 3 * DAY, NOON + 36 * HOUR)
    assert [(r["day"], r["dollars"]) for r in late["rows"]] == [("2027-01-17", 12.0)]
    assert late["total"] == 12.0
    middle = bill([long], "day", NOON + 3 * DAY, NOON + 18 * HOUR)
    assert [(r["day"], r["dollars"]) for r in middle["rows"]] == [("2027-01-16", 18.0), ("2027-01-17", 12.0)]


def test_a_bill_by_key_adds_up_what_each_key_woke() -> None:
    said = bill([A, B, replace(A, replica="r1-3", part=2), replace(B, replica="r1-4", key="")], "key", NOON)
    assert [(r["key"], r["replicas"], r["dollars"]) for r in said["rows"]] == [
        ("", 1, 30.0),
        ("alice", 2, 240.0),
        ("bob", 1, 30.0),
    ]


def test_a_launch_that_never_had_a_machine_is_on_no_bill_and_an_old_sum_without_times_is() -> None:
    never = Entry("r1-9", "r1", NOON, NOON, closed=True)
    old = replace(never, replica="r1-0", dollars=5.0)
    assert [r["replica"] for r in bill([never, old], "replica", NOON)["rows"]] == ["r1-0"]
    (day,) = bill([old], "day", NOON)["rows"]
    assert day == {"day": "2027-01-15", "replicas": 1, "hours": 0.0, "dollars": 5.0}
    assert bill([old], "day", NOON + DAY, NOON + 1)["rows"] == []


def test_another_way_to_group_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="day, replica, key, not 'week'"):
        bill([A], "week", NOON)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90.0), ("90s", 90.0), ("30m", 1800.0), ("1.5h", 5400.0), (" 7D ", 7 * DAY), ("0", 0.0)],
)
def test_a_duration_has_a_unit_or_is_seconds(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5m", "5 weeks", "1h30m", "1e3"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="such as 90s, 30m, 2h or 7d"):
        duration(text)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2h", NOON - 2 * HOUR),
        ("2027-01-15", NOON - 12 * HOUR),
        ("2027-01-15T13:00", NOON + HOUR),
        ("2027-01-15T13:00+01:00", NOON),
    ],
)
def test_a_moment_is_a_time_ago_or_a_date_in_utc(text: str, at: float) -> None:
    assert moment(text, NOON) == at


def test_what_is_no_moment_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a time ago such as 7d nor a date"):
        moment("yesterday", NOON)


def test_an_entrys_repr_says_what_a_log_needs() -> None:
    assert repr(A) == "<Entry r1-1/1 2.00 h $120.00>"
