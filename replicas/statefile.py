"""The file `state.db` from outside: what is wrong with it, and reading it while another process has it."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from replicas.migrations import APPLICATION_ID


class TableError(Exception):
    """The file cannot be used, or a write did not happen (not even in part). The message says what to do."""


class Unusable(TableError):
    """It is damaged, not ours, or of a newer version: a person must act, and trying again is no use."""


def read(path: Path, sql: str, *values: Any) -> list[Any]:
    """Rows of a file that is not ours to write. Raises TableError."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            return db.execute(sql, values).fetchall()
    except sqlite3.Error as error:
        raise TableError(f"{path}: {error}") from error


def inspect(path: Path, versions: int) -> None:
    """Raise Unusable if `path` is not a file that this program may write: at most of schema version
    `versions`. Looks, and changes nothing.

    Opening a damaged database for writing may already lose something: SQLite folds its log in, or drops it.
    """
    keep = "Nothing was changed; the replicas it knows may still be running"
    restore = f"Restore it from a copy, or move it away. {keep}"
    wal = path.with_name(path.name + "-wal")
    size = path.stat().st_size if path.exists() else 0
    if size == 0:
        if wal.exists() and wal.stat().st_size:
            raise Unusable(f"{path} is missing or empty, but its log {wal.name} is not. {restore}")
        return
    with open(path, "rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise Unusable(f"{path} is not a SQLite database. {restore}")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            ours = db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
            foreign = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0 and not ours
            faults = [row[0].splitlines()[-1] for row in db.execute("PRAGMA quick_check(1)")]
    except sqlite3.OperationalError as error:
        raise TableError(f"{path} cannot be read: {error}. {keep}") from error
    except sqlite3.DatabaseError as error:
        faults, version, foreign = [str(error)], 0, False
    if faults != ["ok"]:
        raise Unusable(f"{path} is damaged ({'; '.join(faults)}). {restore}")
    if foreign:
        raise Unusable(f"{path} is a database of another program. Choose another state dir. {keep}")
    if version > versions:
        raise Unusable(
            f"{path} has schema version {version}, this gateway knows versions up to {versions}: "
            f"a newer gateway wrote it. Install that one again. {keep}"
        )
