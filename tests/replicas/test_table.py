"""The table: what a restarted gateway finds again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from replicas import table as table_module
from replicas.costs import Entry
from replicas.lifecycle import Event, Replica, State, advance, new
from replicas.table import Limits, PhaseTime, Table, TableError, read_ledger

ROOT = Path(__file__).parents[2]


def replica(n: int = 1, slot: int = 0) -> Replica:
    return new(
        f"r1-gw-0a1b2c3d-{n}",
        "r1",
        n,
        slot,
        spec_hash="c0ffee",
        spec_text="name: r1\nrun: ü\n",
        now=1_700_000_000.25 + n,
        reason="3 requests wait",
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def table(path: Path) -> Iterator[Table]:
    with Table(path) as table:
        yield table


def test_a_replica_comes_back_exactly_as_it_was_saved(table: Table, path: Path) -> None:
    full = replace(
        replica(1),
        state=State.DRAINING,
        url="http://10.0.0.1:30000",
        phase="load",
        phase_since=1_700_000_100.5,
        progress=0.62,
        failure="preempted",
        failing_since=3.5,
        launched_at=4.5,
        ready_at=5.5,
        hourly_cost=59.5,
        window=48,
        resumable=True,
        plan="H200:8x1 spot",
        region="aws/us-east-1/us-east-1a",
        spot=True,
    )
    assert None not in [getattr(full, field.name) for field in fields(full)], "the test covers every field"
    table.save([full, replica(2)])
    with Table(path) as again:
        assert again.replicas() == [full, replica(2)]
        assert isinstance(again.replicas()[0].state, State)
        assert again.replicas()[0].resumable is True
        assert again.replicas()[0].spot is True


def test_saving_again_replaces_and_touches_no_other_replica(table: Table) -> None:
    table.save([replica(1), replica(2)])
    later = advance(replica(2), Event.LAUNCH, 9.0)
    table.save([later])
    assert table.replicas() == [replica(1), later]
    table.save([])
    assert table.replicas() == [replica(1), later]


def test_gone_replicas_are_history_and_only_the_last_are_kept(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "KEEP_GONE", 3)
    table.save([replica(1)])
    gone = [replace(replica(n), state=State.GONE, since=float(n)) for n in range(2, 8)]
    for one in gone:
        table.save([one])
    assert table.replicas() == [replica(1)]
    assert table.replicas(gone=True) == [replica(1), *gone[-3:]]


def test_a_save_that_fails_in_the_middle_saves_nothing(table: Table) -> None:
    table.save([replica(1)])
    twin = replace(replica(1), id="r1-gw-0a1b2c3d-x")  # a number used twice
    with pytest.raises(TableError, match=r"state\.db: UNIQUE constraint failed"):
        table.save([replica(2), twin])
    assert table.replicas() == [replica(1)]
    table.save([replica(2)])


def test_calls_within_a_transaction_happen_together_or_not_at_all(table: Table, path: Path) -> None:
    def change_my_mind() -> None:
        with table.transaction():
            table.save([replica(table.next_n("r1"))])
            with table.transaction():
                table.generation += 1
            raise RuntimeError("changed my mind")

    with pytest.raises(RuntimeError, match="changed my mind"):
        change_my_mind()
    assert (table.replicas(), table.generation, table.next_n("r1")) == ([], 0, 1)
    with table.transaction(), Table(path) as other:
        table.save([replica(1)])
        table.save_ledger([Entry("x", "r1", 1.0, 2.0)])
        assert other.replicas() == []
    assert table.replicas() == [replica(1)]


def test_the_owner_is_eight_hex_digits_made_once(table: Table, path: Path, tmp_path: Path) -> None:
    assert len(table.owner) == 8
    assert int(table.owner, 16) >= 0
    with Table(path) as again, Table(tmp_path / "other.db") as other:
        assert again.owner == table.owner
        assert other.owner != table.owner


def test_the_generation_persists_and_only_grows(table: Table, path: Path) -> None:
    assert table.generation == 0
    table.generation += 1
    table.generation = 7
    with Table(path) as again:
        assert again.generation == 7
        with pytest.raises(ValueError, match="generation 6 after 7"):
            again.generation = 6


def test_replica_numbers_are_per_service_and_never_given_twice(table: Table, path: Path) -> None:
    assert [table.next_n("r1"), table.next_n("r1"), table.next_n("v3")] == [1, 2, 1]
    table.save([replace(replica(2), state=State.GONE)])
    with Table(path) as again:
        assert again.next_n("r1") == 3


def test_the_replica_key_is_made_once_per_service(table: Table, path: Path) -> None:
    table.next_n("r1")
    table.set_breaker("r1", {"failures": 1})
    key = table.replica_key("r1")
    assert len(bytes.fromhex(key)) == 24
    assert table.replica_key("v3") != key
    with Table(path) as again:
        assert again.replica_key("r1") == key
        assert again.next_n("r1") == 2
        assert again.breaker("r1") == {"failures": 1}


def test_limits_set_by_a_person_persist_until_cleared(table: Table, path: Path) -> None:
    assert table.limits("r1") is None
    table.set_limits("r1", Limits(0, 4, "c0ffee"))
    table.set_limits("r1", Limits(None, 0, "c0ffee"))
    with Table(path) as again:
        assert again.limits("r1") == Limits(None, 0, "c0ffee")
        assert again.limits("v3") is None
        again.clear_limits("r1")
    assert table.limits("r1") is None


def test_the_breakers_state_persists_as_it_was_given(table: Table, path: Path) -> None:
    assert table.breaker("r1") is None
    state = {"failures": 2, "open_until": 1_700_000_000.5, "cause": "run exited with 1: ü"}
    table.set_breaker("r1", state)
    with Table(path) as again:
        assert again.breaker("r1") == state
        again.set_breaker("r1", None)
    assert table.breaker("r1") is None


def test_past_cold_starts_are_found_by_service_spec_and_plan(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "KEEP_COLD_STARTS", 4)
    times = [
        PhaseTime("r1", "old", "H100:8", "load", 400.0, 1.0),
        PhaseTime("r1", "new", "H100:8", "load", 410.0, 2.0),
        PhaseTime("r1", "new", "H200:8", "load", 300.0, 3.0),
        PhaseTime("v3", "new", "H200:8", "load", 9.0, 4.0),
    ]
    for t in times:
        table.add_cold_start(t.service, t.spec_hash, t.plan, t.phase, t.seconds, t.at)
    assert table.cold_starts("r1") == times[:3]
    assert table.cold_starts("r1", "new") == times[1:3]
    assert table.cold_starts("r1", plan="H100:8") == times[:2]
    assert table.cold_starts("r1", "new", "H200:8") == [times[2]]
    assert table.cold_starts("r1", last=1) == [times[2]]
    table.add_cold_start("v3", "new", "H200:8", "warmup", 1.0, 5.0)
    assert table.cold_starts("r1") == times[1:3], "the oldest row went"


def test_the_ledger_keeps_an_entry_for_each_replica_and_price(table: Table, path: Path) -> None:
    assert table.ledger() == []
    first = Entry("r1-1", "r1", 10.0, 20.0, price=36.0, dollars=0.1, spot=True, key="alice", closed=True)
    second = Entry("r1-1", "r1", 20.0, 30.0, part=2, price=72.0, dollars=0.2)
    other = Entry("v3-1", "v3", 15.0, 90.0, dollars=100.0, spot=False, plan="H200:8x1", region="aws/us")
    table.save_ledger([second, other, replace(first, closed=False, dollars=0.05)])
    table.save_ledger([first])
    with Table(path) as again:
        assert again.ledger() == [first, other, second]
        assert again.ledger(25.0) == [other, second]
        assert again.ledger(closed=True) == [first]
        assert again.ledger(closed=False) == [other, second]


def test_the_ledger_is_read_without_a_gateway_and_nothing_is_changed(table: Table, path: Path) -> None:
    entry = Entry("r1-1", "r1", 10.0, 20.0, dollars=0.1)
    table.save_ledger([entry])
    assert read_ledger(path) == read_ledger(path, 20.0) == [entry]
    assert read_ledger(path, 21.0) == []
    table.close()
    before = path.read_bytes()
    assert read_ledger(path) == [entry]
    assert path.read_bytes() == before
    with pytest.raises(TableError, match="no such file"):
        read_ledger(path.with_name("none.db"))
    path.write_bytes(b"nonsense" * 100)
    with pytest.raises(TableError, match="not a database"):
        read_ledger(path)


def test_events_come_back_oldest_first_with_growing_ids(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "KEEP_EVENTS", 3)
    added = [table.add_event({"kind": "launch", "n": n}, at=10.0 + n) for n in range(5)]
    assert added[4] == {"kind": "launch", "n": 4, "id": 5, "at": 14.0}
    assert table.last_events() == added[-3:]
    assert table.last_events(1) == added[-1:]


def test_the_file_is_private_for_it_holds_keys(table: Table, path: Path) -> None:
    table.save([replica()])
    assert {p.name: p.stat().st_mode & 0o777 for p in path.parent.iterdir()} == {
        "state.db": 0o600,
        "state.db-wal": 0o600,
        "state.db-shm": 0o600,
    }


def test_what_was_saved_survives_a_kill_in_the_middle_of_writing(path: Path) -> None:
    script = f"""
import os, signal
from tests.replicas.test_table import replica, Table
table = Table({str(path)!r})
table.save([replica(1), replica(2)])
table.generation = 5
table._db.execute("BEGIN IMMEDIATE")
table._db.execute("DELETE FROM replicas")
os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True)
    assert died.returncode == -9, died.stderr
    assert path.with_name("state.db-wal").stat().st_size > 0, "nothing was folded in: the log holds it"
    with Table(path) as table:
        assert table.replicas() == [replica(1), replica(2)]
        assert table.generation == 5


def test_a_full_disk_undoes_the_save_and_the_table_can_be_used_again(table: Table) -> None:
    table.save([replica(1)])
    pages = table._rows("PRAGMA page_count")[0][0]
    table._rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(TableError, match="full"):
        table.save([replace(replica(2), spec_text="x" * 100_000)])
    assert table.replicas() == [replica(1)]
    table._rows("PRAGMA max_page_count = 1000000")
    table.save([replica(2)])
    assert table.replicas() == [replica(1), replica(2)]


def test_a_table_that_another_process_holds_locked_is_an_error_not_a_hang(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "BUSY_SECONDS", 0.01)
    with Table(path) as table, Table(path) as other, other.transaction():
        with pytest.raises(TableError, match="locked"):
            table.save([replica()])
        assert table.replicas() == []
