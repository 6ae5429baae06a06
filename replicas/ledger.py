"""What the replicas have cost: hourly price times time, tick by tick, written to the table every ten seconds
and before anybody is told a figure.

PURE: it is told the time. A replica's entry is opened when its launch is decided, with who woke it; the money
begins with its machine. The time during which no controller ran counts, whole and at the old price, for a
machine that turns out to be still there; one that vanished meanwhile is accounted to its last known moment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final, Protocol

from replicas import plans
from replicas.costs import HOUR, Entry, Sums, Waker
from replicas.lifecycle import Replica, State
from replicas.provisioners import Instance, service_and_owner

SAVE_EVERY: Final = 10.0  # s


class Entries(Protocol):
    """Where the ledger is kept (replicas/table.py)."""

    def save_ledger(self, entries: Iterable[Entry]) -> None: ...
    def ledger(self, since: float | None = None, *, closed: bool | None = None) -> list[Entry]: ...


class Ledger:
    """Mutable, by the controller: the open entries, which of them the table has not, and the sums of the
    closed."""

    def __init__(self, table: Entries, now: float) -> None:
        self._table = table
        self._saved_at = now
        self._open = {e.replica: e for e in table.ledger(closed=False)}
        self._unsettled = set(self._open)  # not seen since this controller began
        self._awaited: set[str] = set()  # launched by this controller, without a machine so far
        self._dirty: dict[tuple[str, int], Entry] = {}
        self._urgent = False
        self._closed: dict[str, Sums] = {}
        self._last: dict[str, tuple[int, float]] = {}  # of closed entries: part and end, by replica
        for entry in table.ledger(closed=True):
            self._add(entry)

    def __repr__(self) -> str:
        return f"<Ledger open={sorted(self._open)} unsaved={len(self._dirty)}>"

    # ------------------------------------------------------------ what happens

    def launched(self, id: str, service: str, now: float, waker: Waker | None) -> None:
        """A launch was decided; `waker` None = nobody's request, or not known yet."""
        self._put(Entry(id, service, now, now))
        self._awaited.add(id)
        self._urgent = True
        if waker is not None:
            self.woken(id, waker)

    def woken(self, id: str, waker: Waker) -> None:
        """Who woke it, when that is known only after the launch."""
        entry = self._open.get(id)
        if entry is not None:
            self._put(replace(entry, key=waker.key, request=waker.request))
            self._urgent = True

    def accrue(
        self,
        replicas: Iterable[Replica],
        now: float,
        *,
        listed: Collection[str] | None,
        busy: Collection[str] = (),
        strays: Mapping[str, Instance] = MappingProxyType({}),
    ) -> dict[str, float]:
        """Account the time since the last call; returns the dollars by service.

        `listed`: ids of the machines there are, None = not known. `busy`: ids with something in flight.
        `strays`: machines of ours that no row knows, until they are gone.
        """
        added: dict[str, float] = {}
        rows = {r.id: r for r in replicas}
        for r in rows.values():
            if r.state in (State.PENDING, State.GONE) or (r.hourly_cost is None and r.launched_at is None):
                continue
            known = r.id not in self._unsettled
            if (not known or r.failure == "preempted") and (listed is None or r.id not in listed):
                continue  # until it is seen, or its row says that it is gone
            self._unsettled.discard(r.id)
            before = self._open.get(r.id)
            entry = before or self._first(r.id, r.service, now, since=now)
            if r.id in self._awaited:  # its machine is here
                self._awaited.discard(r.id)
                entry = replace(entry, begun=now, until=now)
            entry = _grown(entry, now, ready=known and r.state is State.READY, busy=r.id in busy)
            dollars = self._count(before, _placed(entry, r), r.hourly_cost)
            added[r.service] = added.get(r.service, 0.0) + dollars
        for machine in strays.values():
            before = self._open.get(machine.id)
            entry = _grown(before or self._stray(machine, now), now, ready=False, busy=False)
            dollars = self._count(before, entry, machine.hourly_cost)
            added[entry.service] = added.get(entry.service, 0.0) + dollars
        over = [id for id in self._open if id not in rows or _over(rows[id], listed)]
        for id in over:
            if id not in strays:
                self._close(id)
        return {service: dollars for service, dollars in added.items() if dollars}

    # ------------------------------------------------------------ what is told

    def sums(self, service: str) -> Sums:
        total = self._closed.get(service, Sums())
        for entry in self._open.values():
            if entry.service == service:
                total += Sums.of(entry)
        return total

    def due(self, now: float) -> bool:
        """Whether to save now."""
        return self._urgent or (bool(self._dirty) and now - self._saved_at >= SAVE_EVERY)

    def save(self, now: float) -> None:
        """Write what the table has not. What it raises loses nothing: the next call tries again."""
        if self._dirty:
            self._table.save_ledger(self._dirty.values())
        self._dirty, self._urgent, self._saved_at = {}, False, now

    # ------------------------------------------------------------ changes

    def _count(self, before: Entry | None, entry: Entry, price: float | None) -> float:
        """Take the entry on, at this price from now on; returns the dollars that it has more than before."""
        dollars = entry.dollars - (before.dollars if before else 0.0)
        if price is not None and price != entry.price:
            if entry.price is None:  # learned late: it counts from the beginning
                entry = replace(entry, price=price, dollars=price * entry.hours)
                dollars = entry.dollars
            else:
                entry = self._next_part(entry, price)
        self._put(entry)
        self._urgent = self._urgent or before is None
        return dollars

    def _stray(self, machine: Instance, now: float) -> Entry:
        """It has cost money since its last entry was closed, or, if it never had any, since its launch."""
        service, _ = service_and_owner(machine.id) or (machine.id, "")
        entry = self._first(machine.id, service, now, since=machine.launched_at or now)
        return replace(entry, region=machine.region, spot=machine.spot)

    def _first(self, id: str, service: str, now: float, *, since: float) -> Entry:
        """From `since`; of what was thought gone and is there after all, from where its last part ended."""
        part, until = self._last.get(id, (0, since))
        begun = min(until, now)
        return Entry(id, service, begun, begun, part + 1)

    def _put(self, entry: Entry) -> None:
        self._open[entry.replica] = entry
        self._dirty[entry.replica, entry.part] = entry

    def _next_part(self, entry: Entry, price: float) -> Entry:
        """At another price from here on."""
        ended = replace(entry, closed=True)
        self._dirty[entry.replica, entry.part] = ended
        self._add(ended)
        self._urgent = True
        part, now = entry.part + 1, entry.until
        return replace(entry, part=part, begun=now, price=price, dollars=0.0, ready=0.0, idle=0.0)

    def _close(self, id: str) -> None:
        entry = replace(self._open.pop(id), closed=True)
        self._dirty[entry.replica, entry.part] = entry
        self._add(entry)
        self._unsettled.discard(id)
        self._awaited.discard(id)
        self._urgent = True

    def _add(self, entry: Entry) -> None:
        self._closed[entry.service] = self._closed.get(entry.service, Sums()) + Sums.of(entry)
        part, until = self._last.get(entry.replica, (0, 0.0))
        self._last[entry.replica] = max(part, entry.part), max(until, entry.until)


def _over(r: Replica, listed: Collection[str] | None) -> bool:
    """It costs nothing any more: verified gone, or taken from us and not listed any more. What is listed may
    be stopped, or have lost one node of several: the rest bills until its `down` is verified."""
    if r.state is State.GONE:
        return True
    return r.failure == "preempted" and listed is not None and r.id not in listed


def _placed(entry: Entry, r: Replica) -> Entry:
    """With the plan, and where its machine really is; as far as that is not known, what the plan says."""
    plan = plans.read(r.plan)
    before = entry if r.plan == entry.plan else None  # what was known once stays
    region = r.region or (before and before.region) or plan.infra or ""
    spot = plan.use_spot if r.spot is None else r.spot
    if spot is None and before:
        spot = before.spot
    same = (entry.plan, entry.region, entry.spot) == (r.plan, region, spot)
    return entry if same else replace(entry, plan=r.plan, region=region, spot=spot)


def _grown(entry: Entry, now: float, *, ready: bool, busy: bool) -> Entry:
    """The entry, accounted up to now."""
    seconds = now - entry.until
    if seconds <= 0:  # the clock was set back: nothing is taken back
        return entry
    return replace(
        entry,
        until=now,
        dollars=entry.dollars + (entry.price or 0.0) * seconds / HOUR,
        ready=entry.ready + seconds * ready,
        idle=entry.idle + seconds * (ready and not busy),
    )
