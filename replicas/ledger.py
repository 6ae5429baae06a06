"""What the replicas have cost: hourly price times time, tick by tick, written to the table every ten
seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol

from replicas.lifecycle import Replica, State

SAVE_EVERY: Final = 10.0  # s; that much is lost when the controller is killed
FREE: Final = frozenset({State.PENDING, State.GONE})


class Costs(Protocol):
    def accrue(self, replica_id: str, service: str, dollars: float) -> None: ...
    def total_cost(self, service: str) -> float: ...


class Ledger:
    """Mutable: dollars not yet written. Time while no controller runs is not accounted."""

    def __init__(self, table: Costs, now: float) -> None:
        self._table = table
        self._at = self._saved_at = now
        self._open: dict[str, tuple[str, float]] = {}  # replica -> service, dollars

    def __repr__(self) -> str:
        return f"<Ledger unsaved=${sum(dollars for _, dollars in self._open.values()):.4f}>"

    def accrue(self, replicas: Iterable[Replica], now: float) -> dict[str, float]:
        """Dollars since the last call, by service. A preempted machine costs nothing any more."""
        hours, self._at = max(0.0, now - self._at) / 3600, now
        added: dict[str, float] = {}
        for r in replicas:
            if r.hourly_cost and r.state not in FREE and r.failure != "preempted":
                dollars = r.hourly_cost * hours
                self._open[r.id] = (r.service, self._open.get(r.id, ("", 0.0))[1] + dollars)
                added[r.service] = added.get(r.service, 0.0) + dollars
        if now - self._saved_at >= SAVE_EVERY:
            self.save(now)
        return added

    def save(self, now: float) -> None:
        self._saved_at = now
        unsaved, self._open = self._open, {}
        for id, (service, dollars) in unsaved.items():
            self._table.accrue(id, service, dollars)

    def total(self, service: str) -> float:
        return self._table.total_cost(service) + sum(d for s, d in self._open.values() if s == service)
