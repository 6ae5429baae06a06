"""The table: the facts that survive the gateway, in one SQLite file (`state.db`). Alone knows SQLite,
with statefile.py and migrations.py.

The controller is its only user, from its event loop's thread; writes are a few rows. What must be known
before the world is acted upon (replicas, generation, numbers, keys, limits, breaker) is on the disk when the
call returns; what is only told later (dollars, events, cold starts) may lose its last seconds to a power cut,
though not to a crash.

Dollars are floats, times are wall-clock unix seconds. JSON is stored where the shape is the caller's
business.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from replicas import statefile
from replicas.costs import Entry
from replicas.lifecycle import Replica, State
from replicas.migrations import MIGRATIONS
from replicas.statefile import TableError, Unusable

__all__ = ["Limits", "PhaseTime", "Table", "TableError", "Unusable", "read_ledger", "read_owner"]

BUSY_SECONDS: Final = 2.0
"""How long a statement waits for another process (a person's sqlite3) that holds the file locked."""
KEEP_GONE: Final = 1_000
KEEP_EVENTS: Final = 10_000
KEEP_COLD_STARTS: Final = 1_000
"""Rows of history that are kept; older ones are deleted."""

_COLUMNS: Final = tuple(field.name for field in fields(Replica))
_LIST: Final = ", ".join(f'"{column}"' for column in _COLUMNS)  # quoted: "window" is a word of SQL
_SAVE: Final = (
    f"INSERT INTO replicas ({_LIST}) VALUES ({', '.join('?' * len(_COLUMNS))}) "
    "ON CONFLICT (id) DO UPDATE SET "
    + ", ".join(f'"{column}" = excluded."{column}"' for column in _COLUMNS[1:])
)

_LEDGER_COLUMNS: Final = tuple(field.name for field in fields(Entry))
_SAVE_LEDGER: Final = (
    f"INSERT OR REPLACE INTO ledger ({', '.join(_LEDGER_COLUMNS)}) "
    f"VALUES ({', '.join('?' * len(_LEDGER_COLUMNS))})"
)
_LEDGER: Final = (
    f"SELECT {', '.join(_LEDGER_COLUMNS)} FROM ledger WHERE until >= ifnull(?, until) "
    "AND closed = ifnull(?, closed) ORDER BY begun, replica, part"
)


@dataclass(frozen=True, slots=True)
class Limits:
    """An override of replica limits made by a person; None = the YAML's. Made for the spec with this hash."""

    min: int | None
    max: int | None
    spec_hash: str


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """How long one phase of one past cold start took. `plan`: on which hardware, in the caller's words."""

    service: str
    spec_hash: str
    plan: str
    phase: str
    seconds: float
    at: float


class Table:
    """An open `state.db`, made or migrated if need be. Mutable: the file.

    :raises Unusable: it is damaged, not ours, or of a newer version; then nothing was changed or deleted.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        statefile.inspect(self.path, len(MIGRATIONS))
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # it holds keys
        self._db = sqlite3.connect(self.path, isolation_level=None, timeout=BUSY_SECONDS)
        self._depth = 0
        try:
            with self._errors():
                self._db.execute("PRAGMA journal_mode = WAL")
                self._migrate()
            self.owner: str = self._owner()
        except BaseException:
            self._db.close()
            raise

    def __repr__(self) -> str:
        return f"<Table {self.path}>"

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """`with table.transaction():` all or nothing for the calls within; an exception undoes them.

        May be nested: the outermost counts. It is on the disk when the block ends.
        """
        return self._transaction(durable=True)

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[None]:
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        with self._errors():
            # NORMAL leaves the log to the system's next flush; FULL flushes it, and what came before.
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
        self._depth = 1
        try:
            yield
            with self._errors():
                self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
            raise
        finally:
            self._depth = 0

    # ------------------------------------------------------------ replicas

    def replicas(self, *, gone: bool = False) -> list[Replica]:
        """All replicas that are not GONE, oldest first; with `gone` those too, as far as they are kept."""
        where = "" if gone else f"WHERE state <> '{State.GONE}'"
        rows = self._rows(f"SELECT {_LIST} FROM replicas {where} ORDER BY created_at, service, n")
        return [_replica(row) for row in rows]

    def save(self, replicas: Iterable[Replica]) -> None:
        """Store these replicas as they are now, in one transaction, on the disk when it returns."""
        rows = [tuple(getattr(replica, column) for column in _COLUMNS) for replica in replicas]
        if not rows:
            return
        with self.transaction(), self._errors():
            self._db.executemany(_SAVE, rows)
            self._db.execute(
                "DELETE FROM replicas WHERE state = ? AND id IN "
                "(SELECT id FROM replicas WHERE state = ? ORDER BY since DESC LIMIT -1 OFFSET ?)",
                (State.GONE, State.GONE, KEEP_GONE),
            )

    # ------------------------------------------------------------ numbers, keys, settings

    @property
    def generation(self) -> int:
        """The last generation of the upstream list; 0 at first. Only grows: a lower value is a ValueError."""
        return int(self._meta("generation") or 0)

    @generation.setter
    def generation(self, value: int) -> None:
        if value < self.generation:
            raise ValueError(f"generation {value} after {self.generation}")
        self._set_meta("generation", str(value))

    @property
    def provisioner(self) -> str | None:
        """Where the replicas come from that are not GONE: only that one can end them. None = not known."""
        return self._meta("provisioner")

    @provisioner.setter
    def provisioner(self, name: str) -> None:
        self._set_meta("provisioner", name)

    def next_n(self, service: str) -> int:
        """The number of the service's next replica: 1, 2, ...; never given twice."""
        with self.transaction():
            self._write(
                "INSERT INTO services (name, last_n) VALUES (?, 1) "
                "ON CONFLICT (name) DO UPDATE SET last_n = last_n + 1",
                service,
            )
            return int(self._rows("SELECT last_n FROM services WHERE name = ?", service)[0][0])

    def replica_key(self, service: str) -> str:
        """The API key between gateway and the service's replicas: 48 hex digits, made once. A secret."""
        with self.transaction():
            rows = self._rows("SELECT replica_key FROM services WHERE name = ?", service)
            if rows and rows[0][0]:
                return str(rows[0][0])
            key = secrets.token_hex(24)
            self._write(
                "INSERT INTO services (name, replica_key) VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET replica_key = excluded.replica_key",
                service,
                key,
            )
            return key

    def limits(self, service: str) -> Limits | None:
        rows = self._rows("SELECT min, max, spec_hash FROM limits WHERE service = ?", service)
        return Limits(*rows[0]) if rows else None

    def set_limits(self, service: str, limits: Limits) -> None:
        values = (service, limits.min, limits.max, limits.spec_hash)
        self._write("INSERT OR REPLACE INTO limits VALUES (?, ?, ?, ?)", *values)

    def clear_limits(self, service: str) -> None:
        self._write("DELETE FROM limits WHERE service = ?", service)

    def breaker(self, service: str) -> dict[str, Any] | None:
        """What `set_breaker` stored: the launch breaker's state as JSON, in breaker.py's words."""
        rows = self._rows("SELECT breaker FROM services WHERE name = ?", service)
        return json.loads(rows[0][0]) if rows and rows[0][0] else None

    def set_breaker(self, service: str, state: Mapping[str, Any] | None) -> None:
        self._write(
            "INSERT INTO services (name, breaker) VALUES (?, ?) "
            "ON CONFLICT (name) DO UPDATE SET breaker = excluded.breaker",
            service,
            None if state is None else json.dumps(dict(state)),
        )

    # ------------------------------------------------------------ history

    def add_cold_start(
        self, service: str, spec_hash: str, plan: str, phase: str, seconds: float, at: float
    ) -> None:
        """Remember how long a phase of a cold start took; cold_starts() feeds the ETA."""
        with self._transaction(durable=False):
            self._write(
                "INSERT INTO cold_starts (service, spec_hash, plan, phase, seconds, at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                *(service, spec_hash, plan, phase, seconds, at),
            )
            self._write(
                "DELETE FROM cold_starts WHERE id <= (SELECT max(id) FROM cold_starts) - ?", KEEP_COLD_STARTS
            )

    def cold_starts(
        self, service: str, spec_hash: str | None = None, plan: str | None = None, *, last: int = 100
    ) -> list[PhaseTime]:
        """The service's last phase times, oldest first; None = of any spec, on any plan."""
        rows = self._rows(
            "SELECT service, spec_hash, plan, phase, seconds, at FROM cold_starts WHERE service = ? "
            "AND spec_hash = ifnull(?, spec_hash) AND plan = ifnull(?, plan) ORDER BY id DESC LIMIT ?",
            *(service, spec_hash, plan, last),
        )
        return [PhaseTime(*row) for row in reversed(rows)]

    def save_ledger(self, entries: Iterable[Entry]) -> None:
        """Store these entries as they are now, each by its replica and part."""
        rows = [tuple(getattr(entry, column) for column in _LEDGER_COLUMNS) for entry in entries]
        with self._transaction(durable=False), self._errors():
            self._db.executemany(_SAVE_LEDGER, rows)

    def ledger(self, since: float | None = None, *, closed: bool | None = None) -> list[Entry]:
        """What replicas have cost, the oldest first: all entries, or those open at or after `since`, or the
        closed or the open ones only."""
        return [_entry(row) for row in self._rows(_LEDGER, since, closed)]

    def add_event(self, event: Mapping[str, Any], at: float) -> dict[str, Any]:
        """Append to the log of events; returns it as `last_events` will: with its `id` (growing) and `at`."""
        with self._transaction(durable=False):
            self._write("INSERT INTO events (at, event) VALUES (?, ?)", at, json.dumps(dict(event)))
            self._write("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", KEEP_EVENTS)
            return {**event, "id": int(self._rows("SELECT max(id) FROM events")[0][0]), "at": at}

    def last_events(self, n: int = 100) -> list[dict[str, Any]]:
        """The last `n` events, oldest first."""
        rows = self._rows("SELECT id, at, event FROM events ORDER BY id DESC LIMIT ?", n)
        return [{**json.loads(event), "id": id, "at": at} for id, at, event in reversed(rows)]

    # ------------------------------------------------------------ SQLite

    def _owner(self) -> str:
        """This gateway's 8 hex digits, made when its table was."""
        if self._meta("owner") is None:
            self._write("INSERT OR IGNORE INTO meta VALUES ('owner', ?)", secrets.token_hex(4))
        return str(self._meta("owner"))

    def _meta(self, key: str) -> str | None:
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def _set_meta(self, key: str, value: str) -> None:
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)

    def _rows(self, sql: str, *values: Any) -> Sequence[Any]:
        with self._errors():
            return self._db.execute(sql, values).fetchall()

    def _write(self, sql: str, *values: Any) -> None:
        with self.transaction(), self._errors():
            self._db.execute(sql, values)

    def _migrate(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        for number, step in enumerate(MIGRATIONS[version:], start=version + 1):
            with self.transaction():
                for statement in step:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {number}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise TableError(f"{self.path}: {error}") from error


def _replica(row: Sequence[Any]) -> Replica:
    values = dict(zip(_COLUMNS, row, strict=True))
    values["state"] = State(values["state"])
    values["resumable"] = bool(values["resumable"])
    values["spot"] = None if values["spot"] is None else bool(values["spot"])
    return Replica(**values)


def _entry(row: Sequence[Any]) -> Entry:
    values = dict(zip(_LEDGER_COLUMNS, row, strict=True))
    values["closed"] = bool(values["closed"])
    values["spot"] = None if values["spot"] is None else bool(values["spot"])
    return Entry(**values)


def read_ledger(path: str | os.PathLike[str], since: float | None = None) -> list[Entry]:
    """The ledger of a gateway that does not run; looks, and changes nothing. As `Table.ledger`.

    :raises TableError: there is none, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise TableError(f"{path}: there is no such file, so nothing is known of any cost")
    return [_entry(row) for row in statefile.read(path, _LEDGER, since, None)]


def read_owner(path: str | os.PathLike[str]) -> str | None:
    """The owner of a gateway that may be running; None = it has no table yet.

    :raises TableError: it cannot be read.
    """
    if not Path(path).exists():
        return None
    rows = statefile.read(Path(path), "SELECT value FROM meta WHERE key = 'owner'")
    return str(rows[0][0]) if rows else None
