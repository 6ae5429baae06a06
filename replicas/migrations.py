"""The schema of `state.db` (replicas/table.py), step by step from the first version to today's."""

from __future__ import annotations

from typing import Final

APPLICATION_ID: Final = 0x534B4754  # "SKGT": tells our file from any other SQLite database

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (  # 1
        f"PRAGMA application_id = {APPLICATION_ID}",
        """CREATE TABLE replicas (
            id TEXT PRIMARY KEY, service TEXT NOT NULL, n INTEGER NOT NULL, slot INTEGER NOT NULL,
            spec_hash TEXT NOT NULL, spec_text TEXT NOT NULL, state TEXT NOT NULL, since REAL NOT NULL,
            created_at REAL NOT NULL, url TEXT, phase TEXT, phase_since REAL, progress REAL,
            reason TEXT NOT NULL, failure TEXT, failing_since REAL, launched_at REAL, ready_at REAL,
            hourly_cost REAL, "window" INTEGER, resumable INTEGER NOT NULL,
            UNIQUE (service, n))""",
        "CREATE INDEX replicas_by_state ON replicas (state)",
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
        """CREATE TABLE services (
            name TEXT PRIMARY KEY, last_n INTEGER NOT NULL DEFAULT 0, replica_key TEXT, breaker TEXT)""",
        """CREATE TABLE limits (
            service TEXT PRIMARY KEY, min INTEGER, max INTEGER, spec_hash TEXT NOT NULL)""",
        """CREATE TABLE cold_starts (
            id INTEGER PRIMARY KEY, service TEXT NOT NULL, spec_hash TEXT NOT NULL, plan TEXT NOT NULL,
            phase TEXT NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL)""",
        """CREATE TABLE costs (
            replica TEXT PRIMARY KEY, service TEXT NOT NULL, dollars REAL NOT NULL)""",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, event TEXT NOT NULL)""",
    ),
    (  # 2
        "ALTER TABLE replicas ADD COLUMN plan TEXT NOT NULL DEFAULT ''",
    ),
    (  # 3: the ledger in place of a sum per replica; what was paid tells how long a live one was accounted
        """CREATE TABLE ledger (
            replica TEXT NOT NULL, part INTEGER NOT NULL, service TEXT NOT NULL, plan TEXT NOT NULL,
            region TEXT NOT NULL, spot INTEGER, price REAL, begun REAL NOT NULL, until REAL NOT NULL,
            dollars REAL NOT NULL, ready REAL NOT NULL, idle REAL NOT NULL, key TEXT NOT NULL,
            request TEXT NOT NULL, closed INTEGER NOT NULL, PRIMARY KEY (replica, part))""",
        """INSERT INTO ledger
            SELECT c.replica, 1, c.service, ifnull(r.plan, ''), '', NULL, r.hourly_cost,
                ifnull(r.created_at, old.est),
                CASE WHEN r.id IS NULL THEN old.est
                     WHEN r.state = 'gone' OR NOT ifnull(r.hourly_cost, 0) THEN r.since
                     ELSE r.created_at + 3600 * c.dollars / r.hourly_cost END,
                c.dollars, 0, 0, '', '',
                r.id IS NULL OR r.state = 'gone' OR ifnull(r.failure, '') = 'preempted'
            FROM costs AS c LEFT JOIN replicas AS r ON r.id = c.replica,
                (SELECT ifnull(min(created_at), 0) AS est FROM replicas) AS old""",
        "DROP TABLE costs",
    ),
    (  # 4: where a replica really is, and whether on a spot machine, which a plan may leave open
        "ALTER TABLE replicas ADD COLUMN region TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE replicas ADD COLUMN spot INTEGER",
    ),
)
"""Step i brings a file from schema version i to i + 1. A step that was released is never changed: add one."""
