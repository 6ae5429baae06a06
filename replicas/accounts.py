"""Who pays: the ledger, told with each launch for whose request it was made, and saved before it is asked."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, Protocol

from replicas import costs
from replicas.costs import Sums, Waker
from replicas.journal import Observer
from replicas.ledger import Ledger
from replicas.lifecycle import Replica
from replicas.messages import WorkerState
from replicas.provisioners import Instance
from replicas.table import Table, TableError

log = logging.getLogger(__name__)

WAKER_LATE: Final = 2.0  # s; the board tells at once that somebody waits, a worker's message says who


class Workers(Protocol):
    workers: dict[int, WorkerState]


class Accounts:
    """Mutable, by the controller: the ledger, and the ids that were launched for somebody whose name is still
    on its way."""

    def __init__(self, table: Table, control: Workers, observer: Observer, now: float) -> None:
        self._table = table
        self._control = control
        self._observer = observer
        self._ledger = Ledger(table, now)
        self._unwoken: set[str] = set()

    def __repr__(self) -> str:
        return f"<Accounts {self._ledger!r} unwoken={sorted(self._unwoken)}>"

    def launched(self, id: str, service: str, now: float, *, asked: bool) -> None:
        """A launch was decided; `asked`: because of a request."""
        waker = self._waker(service) if asked else None
        self._ledger.launched(id, service, now, waker)
        if asked and waker is None:
            self._unwoken.add(id)

    def _waker(self, service: str) -> Waker | None:
        """Whose request waits, by what the workers said last."""
        said = (worker.woken.get(service) for worker in self._control.workers.values())
        return next((Waker(*who) for who in said if who is not None), None)

    def accrue(
        self,
        rows: Iterable[Replica],
        now: float,
        *,
        listed: Collection[str] | None,
        busy: Collection[str],
        strays: Mapping[str, Instance],
    ) -> None:
        """What the time since the last tick has cost; see Ledger.accrue."""
        rows = list(rows)
        for r in rows:
            if r.id in self._unwoken:
                if (waker := self._waker(r.service)) is not None:
                    self._ledger.woken(r.id, waker)
                if waker is not None or now - r.created_at > WAKER_LATE:
                    self._unwoken.discard(r.id)
        for name, dollars in self._ledger.accrue(rows, now, listed=listed, busy=busy, strays=strays).items():
            self._observer.cost(name, dollars)
        if self._ledger.due(now):
            self.save(now)

    def save(self, now: float) -> None:
        """Also before a figure is told: it is not taken back by a crash."""
        try:
            self._ledger.save(now)
        except TableError as error:  # nothing is lost yet: each tick tries again
            log.warning("the costs could not be saved: %s", error)

    def sums(self, service: str) -> Sums:
        return self._ledger.sums(service)

    def bill(self, since: str | None, by: str, now: float) -> dict[str, Any]:
        """The answer of GET /admin/cost. `since`: "7d" or a date. :raises ValueError: it cannot be read."""
        begin = None if since is None else costs.moment(since, now)
        self.save(now)
        return costs.bill(self._table.ledger(begin), by, now, begin)
