"""The replicas of one service, as they are to be saved, and what is to be told of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from replicas.lifecycle import Event, Replica, State, advance


class Book:
    """Mutable, by the fleet and its starts, within a tick: `rows` by id (GONE ones leave once they are
    saved), the ids that are `dirty`, and the events in `news`; the controller saves these two and clears
    them."""

    def __init__(self, service: str, replicas: Iterable[Replica]) -> None:
        self.rows = {r.id: r for r in replicas}
        self.dirty: set[str] = set()
        self.news: list[dict[str, Any]] = []
        self._service = service

    def __repr__(self) -> str:
        states = " ".join(f"{r.id.rpartition('-')[2]}:{r.state}" for r in self.rows.values())
        return f"<Book {states}>"

    def count(self, *states: State) -> int:
        return sum(r.state in states for r in self.rows.values())

    def add(self, replica: Replica, now: float, code: str) -> None:
        self.rows[replica.id] = replica
        self.dirty.add(replica.id)
        self.tell("launch", replica.reason, now, replica=replica.id, code=code)

    def move(self, r: Replica, event: Event, now: float, reason: str, **changes: Any) -> Replica:
        """Along the table of lifecycle.py. Raises IllegalTransition."""
        self.rows[r.id] = after = advance(r, event, now, reason=reason, **changes)
        self.dirty.add(r.id)
        self.tell("transition", reason, now, replica=r.id, code=str(event), state=str(after.state))
        return after

    def set(self, r: Replica, **changes: Any) -> Replica:
        """Change what is not its state."""
        self.rows[r.id] = after = replace(self.rows[r.id], **changes)
        self.dirty.add(r.id)
        return after

    def tell(self, kind: str, reason: str, now: float, *, replica: str | None = None, **more: Any) -> None:
        event = {"at": now, "service": self._service, "replica": replica, "kind": kind, "reason": reason}
        self.news.append({**event, **more})
