"""What the controller tells: events for people, kept in the table, and facts for whoever counts them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Final, Protocol

log = logging.getLogger(__name__)

KEPT: Final = 1000  # events for a subscriber that does not read


class Observer(Protocol):
    """Whoever counts what the controller does; gateway/metrics.py has one."""

    def decision(self, service: str, code: str) -> None: ...
    def launch(self, service: str, outcome: str) -> None: ...  # ready | failed | cancelled
    def cold_start(self, service: str, phase: str, seconds: float) -> None: ...
    def cost(self, service: str, dollars: float) -> None: ...


class Events(Protocol):
    def add_event(self, event: Mapping[str, Any], at: float) -> dict[str, Any]: ...
    def last_events(self, n: int = 100) -> list[dict[str, Any]]: ...


class Journal:
    """Mutable: the subscribers. An event has at least id, at, service, replica, kind, code and reason."""

    def __init__(self, table: Events) -> None:
        self._table = table
        self._subscribers: set[asyncio.Queue[dict[str, Any]]] = set()

    def __repr__(self) -> str:
        return f"<Journal subscribers={len(self._subscribers)}>"

    def save(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Store it; returns it with its id, to be told once the transaction is through."""
        return self._table.add_event(event, event["at"])

    def tell(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            what = event.get("state") or event["kind"]  # a transition is named by where it leads
            log.info("%s %s: %s", event["replica"] or event["service"], what, event["reason"])
            for queue in self._subscribers:
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(event)

    async def follow(self, last: int = 0) -> AsyncIterator[dict[str, Any]]:
        """The `last` past events, then each new one as it comes. A reader that is slow loses the oldest."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(KEPT)
        self._subscribers.add(queue)
        try:
            for event in self._table.last_events(last) if last else ():
                yield event
            while True:
                yield await queue.get()
        finally:
            self._subscribers.discard(queue)
