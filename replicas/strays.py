"""What exists under our owner's name without a row: a launch that went on after its row was gone, or that a
restored `state.db` does not know. It is ended, paid for until it is gone, and told; nothing of anybody else
is ever in here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from replicas import budget
from replicas.errands import Errands, Outcome
from replicas.evidence import Lookout
from replicas.plans import Spending
from replicas.provisioners import Instance, owned_by, service_and_owner
from replicas.tries import PAUSE_MOST, back_off

PAUSE_FIRST: Final = 5.0  # s from an end that was not verified to the next try
LOOK_AGAIN: Final = 60.0  # s; a look that began before it was verified gone may still list it


@dataclass(slots=True)
class Stray:
    """One of them. Mutable, by `Strays`."""

    machine: Instance
    service: str
    first: int  # number of the look that saw it first
    since: float  # unix seconds, of that look
    reason: str = ""
    told: bool = False  # a second look has seen it: it is none that ended while the first was under way
    tries: int = 0  # ends that could not be verified
    not_before: float = 0.0  # no further try


class Strays:
    """Mutable, by the controller, within a tick. `news` are events for it to save, as those of a fleet."""

    def __init__(self, owner: str, errands: Errands) -> None:
        self.news: list[dict[str, Any]] = []
        self._owner = owner
        self._errands = errands
        self._found: dict[str, Stray] = {}

    def __repr__(self) -> str:
        return f"<Strays {sorted(self._found)}>"

    def look(self, lookout: Lookout, rows: Collection[str], now: float) -> None:
        """What a look says. One that says nothing changes nothing."""
        if lookout.instances is None:
            return
        for id, machine in lookout.instances.items():
            if id in rows or not owned_by(id, self._owner):
                continue
            if id in self._found:
                self._seen_again(self._found[id], machine, lookout.number, now)
            elif id not in self._errands:
                service, _ = service_and_owner(id) or (id, "")
                self._found[id] = Stray(machine, service, lookout.number, now)
        for id in self._found.keys() - lookout.instances.keys():
            stray = self._found.pop(id)
            if stray.told:
                self._tell(stray, "stray", "verified gone", now, code="gone")

    def hear(self, outcomes: Iterable[Outcome], now: float) -> None:
        """How the attempts to end them went; those that succeeded are gone once a look agrees."""
        for outcome in outcomes:
            stray = self._found.get(outcome.id)
            if stray is None:
                continue
            pause = LOOK_AGAIN
            if outcome.kind == "not_gone":
                stray.tries += 1
                pause = back_off(stray.tries, PAUSE_FIRST, PAUSE_MOST)
                stray.reason = f"not verified gone: {outcome.reason}; next try in {pause:.0f} s"
                self._tell(stray, "terminate_failed", stray.reason, now, code="terminate_failed")
            stray.not_before = now + pause

    def end(self, now: float) -> None:
        """Terminate those that a second look has seen."""
        for id, stray in self._found.items():
            if stray.told and id not in self._errands and not 0 < stray.not_before - now <= PAUSE_MOST:
                self._errands.terminate(id)

    @property
    def machines(self) -> Mapping[str, Instance]:
        """Those that cost money for nothing, since their launch or since they were seen."""
        return {
            id: replace(stray.machine, launched_at=stray.machine.launched_at or stray.since)
            for id, stray in self._found.items()
            if stray.told
        }

    def spending(self, now: float) -> Spending:
        """What they cost an hour and have cost within a day, for the limits on money: those still there."""
        priced = [(m.hourly_cost or 0.0, m.launched_at or now) for m in self.machines.values()]
        day = sum(price * min(budget.DAY, max(0.0, now - begun)) / 3600 for price, begun in priced)
        return Spending(sum(price for price, _ in priced), day)

    def status(self) -> list[dict[str, Any]]:
        return [
            {
                "id": id,
                "service": stray.service,
                "since": stray.since,
                "hourly_cost": stray.machine.hourly_cost,
                "reason": stray.reason,
                "tries": stray.tries,
            }
            for id, stray in self._found.items()
            if stray.told
        ]

    def _seen_again(self, stray: Stray, machine: Instance, look: int, now: float) -> None:
        stray.machine = machine
        if stray.told or look == stray.first:
            return
        stray.told = True
        cost = "" if machine.hourly_cost is None else f" (${machine.hourly_cost:.2f} an hour)"
        stray.reason = f"it bears our name and no row knows it{cost}: it is ended"
        self._tell(stray, "stray", stray.reason, now, code="found")

    def _tell(self, stray: Stray, kind: str, reason: str, now: float, *, code: str) -> None:
        event = {"at": now, "service": stray.service, "replica": stray.machine.id, "kind": kind}
        self.news.append({**event, "reason": reason, "code": code})
