"""The table's file: older versions are read, newer and damaged ones are refused and lose nothing."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import fields, replace
from pathlib import Path

import pytest

from replicas import table as table_module
from replicas.lifecycle import Replica, State, new
from replicas.table import MIGRATIONS, Limits, Table, TableError

DATA = Path(__file__).parents[1] / "data"


def replica(n: int = 1) -> Replica:
    id = f"r1-gw-0a1b2c3d-{n}"
    return new(id, "r1", n, n, spec_hash="c0ffee", spec_text="name: r1", now=float(n), reason="needed")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def _fixture(path: Path, version: int) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript((DATA / f"state-v{version}.sql").read_text())
    db.close()


def _version(path: Path) -> int:
    db = sqlite3.connect(path)
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    db.close()
    return version


def test_an_empty_file_is_version_0_and_becomes_the_current_one(path: Path) -> None:
    path.touch()
    with Table(path) as table:
        assert table.replicas() == []
    assert _version(path) == len(MIGRATIONS)


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS) + 1))
def test_a_file_of_every_version_ever_released_is_read_in_full(path: Path, version: int) -> None:
    _fixture(path, version)
    assert _version(path) == version
    with Table(path) as table:
        assert table.owner == "0a1b2c3d"
        assert table.generation == 41
        assert table.next_n("r1") == 4
        assert table.replica_key("r1") == "ab" * 24
        assert table.limits("r1") == Limits(0, None, "c0ffee")
        assert table.breaker("r1") == {"failures": 2}
        assert sum(entry.dollars for entry in table.ledger() if entry.service == "r1") == 9.75
        assert [t.seconds for t in table.cold_starts("r1", "c0ffee", "local")] == [410.0]
        assert [event["kind"] for event in table.last_events()] == ["launch"]
        (starting,) = table.replicas()
        assert (starting.state, starting.progress, starting.slot) == (State.STARTING, 0.62, 2)
        assert [r.state for r in table.replicas(gone=True)] == [State.GONE, State.STARTING]
    assert _version(path) == len(MIGRATIONS)


def test_a_new_migration_runs_once_and_on_top_of_the_old_data(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Table(path) as table:
        table.save([replica()])
    step = ("ALTER TABLE replicas ADD COLUMN zone TEXT", "UPDATE replicas SET zone = 'unknown'")
    monkeypatch.setattr(table_module, "MIGRATIONS", (*MIGRATIONS, step))
    for _ in range(2):
        with Table(path) as table:
            assert table.replicas() == [replica()]
            assert table._rows("SELECT zone FROM replicas") == [("unknown",)]
    assert _version(path) == len(MIGRATIONS) + 1


def test_a_migration_that_fails_leaves_the_file_at_the_old_version(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Table(path) as table:
        table.save([replica()])
    with monkeypatch.context() as patched:
        patched.setattr(table_module, "MIGRATIONS", (*MIGRATIONS, ("DROP TABLE replicas", "no SQL at all")))
        with pytest.raises(TableError, match="syntax error"):
            Table(path)
    assert _version(path) == len(MIGRATIONS)
    with Table(path) as table:
        assert table.replicas() == [replica()]


def test_a_file_of_a_newer_version_is_refused_naming_both_versions(path: Path) -> None:
    Table(path).close()
    newer = len(MIGRATIONS) + 1
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {newer}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(TableError, match=rf"schema version {newer}, .*up to {newer - 1}.*newer gateway"):
        Table(path)
    assert path.read_bytes() == before


def test_every_field_of_a_replica_has_its_column(path: Path) -> None:
    """Whoever adds a field to Replica adds a migration."""
    with Table(path) as table:
        columns = {row[1] for row in table._rows("PRAGMA table_info(replicas)")}
    assert columns == {field.name for field in fields(Replica)}


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file that says something; SQLite's shared-memory index says nothing of its own."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith("-shm")}
    return {name: data for name, data in files.items() if data}


def _damage(path: Path) -> None:
    """Overwrite the heads of a third of the pages, as a bad disk may."""
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096, 3):
        data[page * 4096 : page * 4096 + 200] = b"\xa5" * 200
    path.write_bytes(data)


def test_a_damaged_file_is_a_clear_error_and_stays_as_it_is(path: Path) -> None:
    with Table(path) as table:
        table.save([replace(replica(n), spec_text="x" * 3_000) for n in range(50)])
    _damage(path)
    before = _contents(path.parent)
    with pytest.raises(TableError, match=r"state\.db is damaged .*Restore it.*Nothing was changed"):
        Table(path)
    assert _contents(path.parent) == before


def test_a_damaged_file_keeps_its_unfolded_log_too(path: Path, tmp_path: Path) -> None:
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    _fixture(path, 1)
    with Table(path) as table:
        table.save([replica(n) for n in range(4, 50)])
    with Table(path) as table:
        table.generation += 1  # in the log alone
        shutil.copy(path, crashed / "state.db")
        shutil.copy(path.with_name("state.db-wal"), crashed / "state.db-wal")
    _damage(crashed / "state.db")
    before = _contents(crashed)
    with pytest.raises(TableError, match="Nothing was changed"):
        Table(crashed / "state.db")
    assert _contents(crashed) == before


@pytest.mark.parametrize("content", [b"hello, this is a text\n", b"SQLite format 3\0" + b"\xff" * 5_000])
def test_a_file_that_is_no_database_is_a_clear_error_and_stays_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(TableError, match="Nothing was changed"):
        Table(path)
    assert _contents(path.parent) == {"state.db": content}


def test_a_missing_file_whose_log_remains_is_an_error_and_the_log_stays(path: Path) -> None:
    log = path.with_name("state.db-wal")
    log.write_bytes(b"all that is left")
    with pytest.raises(TableError, match=r"missing or empty, but its log state\.db-wal is not"):
        Table(path)
    assert _contents(path.parent) == {"state.db-wal": b"all that is left"}


def test_a_database_of_another_program_is_left_alone(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE recipes (name TEXT)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(TableError, match="another program"):
        Table(path)
    assert path.read_bytes() == before


def test_a_state_dir_that_does_not_exist_is_an_ordinary_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Table(tmp_path / "nowhere" / "state.db")


@pytest.mark.parametrize("version", [1, 2])
def test_the_ledger_goes_on_where_the_sums_per_replica_ended(path: Path, version: int) -> None:
    _fixture(path, version)
    db = sqlite3.connect(path)
    db.execute("INSERT INTO costs VALUES ('r1-gw-0a1b2c3d-1', 'r1', 0.25)")  # its row was forgotten
    db.commit()
    db.close()
    with Table(path) as table:
        old, gone, live = table.ledger()
    assert (old.begun, old.until, old.dollars, old.closed) == (1_700_000_000.0, 1_700_000_000.0, 0.25, True)
    assert (gone.begun, gone.until, gone.dollars, gone.closed) == (1.7e9, 1.7e9 + 500, 8.25, True)
    assert (live.price, live.dollars, live.closed) == (59.5, 1.5, False)
    assert live.hours * 59.5 == pytest.approx(1.5), "accounted for as long as was paid"
