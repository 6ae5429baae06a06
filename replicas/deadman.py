"""The alarm about dead-man's timers: a replica that our life does not keep alive any more will end itself.

A provisioner that has such timers (provisioners/deadman.py) says when each acts. While we can arm them again
that is never near; when half of the time has passed, people are told, once, and once more when it is over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from replicas.lifecycle import Replica, State

log = logging.getLogger(__name__)

ENDS = (
    "its dead-man's timer cannot be armed again: it ends itself in {minutes:.0f} min, with all that it"
    " serves, unless SkyPilot reaches it before (`gateway status` says whether its API server answers)"
)
ARMED = "its dead-man's timer is armed again"


class Fleet(Protocol):
    @property
    def rows(self) -> Mapping[str, Replica]: ...

    def tell(self, kind: str, reason: str, now: float, *, replica: str | None, **more: Any) -> None: ...


class Alarm:
    """Mutable: whom it was told about. `limit`: seconds from an order to the end. `source`: a provisioner."""

    def __init__(self, source: object, limit: float) -> None:
        self._source = source
        self._limit = limit
        self._told: set[str] = set()

    def __repr__(self) -> str:
        return f"<Alarm {self._limit:.0f} s, told of {sorted(self._told)}>"

    def left(self, id: str, now: float) -> float | None:
        """Seconds until the replica ends itself; None: it has no timer."""
        timers = getattr(self._source, "dead_man", None)  # what only some provisioners have
        at: float | None = None if timers is None else timers(id)
        return None if at is None else max(0.0, at - now)

    def look(self, fleets: Iterable[Fleet], now: float) -> None:
        """At each tick."""
        seen: set[str] = set()
        for fleet in fleets:
            for id, r in fleet.rows.items():
                left = self.left(id, now)
                if left is None or r.state in (State.TERMINATING, State.GONE):
                    continue
                seen.add(id)
                if left <= self._limit / 2 and id not in self._told:
                    self._told.add(id)
                    why = ENDS.format(minutes=left / 60)
                    log.error("%s: %s", id, why)
                    fleet.tell("dead_man", why, now, replica=id, code="half", seconds=left)
                elif left > self._limit / 2 and id in self._told:
                    self._told.discard(id)
                    fleet.tell("dead_man", ARMED, now, replica=id, code="armed")
        self._told &= seen

    def status(self, services: list[dict[str, Any]], now: float) -> dict[str, Any]:
        """`dead_man_seconds` and, of those that have a timer, `dead_man_limit_seconds` of each replica in
        there, and what the provisioner says of itself."""
        for service in services:
            for replica in service["replicas"]:
                left = self.left(replica["id"], now)
                replica["dead_man_seconds"] = left
                replica["dead_man_limit_seconds"] = None if left is None else self._limit
        says = getattr(self._source, "says", None)
        return {"says": says, "trouble": bool(getattr(self._source, "trouble", False))}
