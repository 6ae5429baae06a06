"""The waiting room: who waits for a replica, and in which order they get one.

Everything here is one worker's and one service's. Numbers that all workers must see (how many wait, their
bytes, since when the oldest) are on the board; so the bounds hold over all workers, and so does the order: a
free place in a window goes to the oldest waiter of all, unless the worker that holds it does not take it.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.errors import GatewayError, WaitingRoomFull
from replicas.board import SERVICES, Board

if TYPE_CHECKING:
    from gateway.upstreams import Upstream

# How often a waiting request looks whether another worker's end, or the end of an ejection, lets it in. Whose
# turn may be next looks more often: who has the oldest waiter, or just left a free place to an older one.
POLL_SECONDS = 0.02
NEXT_POLL_SECONDS = 0.002
# A free place is left this long to the worker whose waiter is older; then that worker is taken to be stuck.
YIELD_SECONDS = 0.25
BODY_OVERHEAD = 1024  # bytes of the gateway's own that a held request costs at least


@dataclass(eq=False, slots=True)
class Place:
    """One waiting request. `since`: monotonic_ns of its arrival, which is its turn, also when it comes
    back. `counted`: as `Lease.counted`."""

    since: int
    size: int
    avoid: Collection[str]
    future: asyncio.Future[Upstream]
    counted: tuple[int, int] = (0, 0)


class WaitingRoom:
    """Mutable: `_places`, oldest first, by this worker's event loop; its board cells, by nobody else.

    `take(place)` returns the upstream that may serve the place now (nothing is counted yet),
    `start(upstream)` counts it. `on_level` is called when the room becomes empty or stops being so. `polls`:
    whether news may come that nobody tells; without any upstream there is none.
    """

    def __init__(
        self,
        board: Board,
        worker: int,
        service: int,
        *,
        max_waiting: int,
        max_bytes: int,
        take: Callable[[Place], Upstream | None],
        start: Callable[[Upstream], None],
        on_level: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._board = board
        self._cells = board.cells
        row = board.worker(worker)
        self._waiting = row.waiting + service
        self._bytes = row.waiting_bytes + service
        self._oldest = row.oldest + service
        self._others = tuple(board.worker(i).oldest + service for i in range(board.workers) if i != worker)
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._take = take
        self._start = start
        self._on_level = on_level
        self._places: list[Place] = []
        self._poll: asyncio.Handle | None = None
        self._poll_due = 0.0  # loop time; of uvloop's call_at comes no `when` if it is due at once
        self.polls = False
        self._yielding_to: tuple[int, int] | None = None  # another worker's cell, and the waiter it shows
        self._yielding_since = 0.0
        self._stuck: dict[int, int] = {}  # the waiter in that cell was given its time and did not take it

    def limit(self, max_waiting: int, max_bytes: int) -> None:
        """Other bounds from now on; who is in stays."""
        self._max_waiting, self._max_bytes = max_waiting, max_bytes

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<WaitingRoom waiting={len(self._places)}>"

    def older_elsewhere(self, since: int) -> bool:
        """Whether another worker holds a request that came before `since` (and is not stuck)."""
        return self._elder(since) is not None

    def _elder(self, since: int) -> tuple[int, int] | None:
        cells, stuck = self._cells, self._stuck
        for cell in self._others:
            oldest = cells[cell]
            if 0 < oldest < since and stuck.get(cell) != oldest:
                return cell, oldest
        return None

    def enter(self, since: int, size: int, avoid: Collection[str], *, again: bool = False) -> Place:
        """Take a place. Raises WaitingRoomFull over the bounds, which count all workers and services.

        `again`: it was let out and found no replica; whoever came meanwhile must not cost it its place.
        """
        totals = [self._board.totals(s) for s in range(SERVICES)]
        cost = size + BODY_OVERHEAD
        if not again and sum(t.waiting for t in totals) >= self._max_waiting:
            raise WaitingRoomFull(
                f"{self._max_waiting} requests already wait for a replica. Try again in half a minute."
            )
        if not again and sum(t.waiting_bytes for t in totals) + cost > self._max_bytes:
            raise WaitingRoomFull(
                "The requests that wait for a replica already fill the memory set aside for them."
            )
        place = Place(since, cost, avoid, self._loop.create_future())
        bisect.insort(self._places, place, key=lambda p: p.since)
        self._cells[self._bytes] += cost
        self._count()
        if len(self._places) == 1:
            self._on_level()
        self.release()
        return place

    def leave(self, place: Place) -> None:
        """Free the place of a request that no longer waits, whatever became of it."""
        if place in self._places:
            self._places.remove(place)
            self._gone(place)

    def release(self) -> None:
        """Let in as many as there is room for now, oldest first. Called whenever that may have changed."""
        while self._places:
            place = self._places[0]
            before = time.monotonic_ns()
            upstream = self._take(place)
            if upstream is None:
                self._yielding_to = None
                break
            elder = self._elder(place.since)
            if elder is not None:
                if self._yields(elder):
                    break
                continue
            self._yielding_to = None
            self._start(upstream)
            place.counted = (before, time.monotonic_ns())
            self._places.pop(0)
            self._gone(place)
            place.future.set_result(upstream)
        self._schedule()

    def fail(self, error: Callable[[], GatewayError]) -> None:
        """End every wait."""
        places, self._places = self._places, []
        for place in places:
            self._cells[self._bytes] -= place.size
            if not place.future.done():
                place.future.set_exception(error())
        self._count()
        if places:
            self._on_level()

    def _yields(self, elder: tuple[int, int]) -> bool:
        """Whether to leave the free place to another worker's older waiter; each is given its time once."""
        now = self._loop.time()
        if elder != self._yielding_to:
            self._yielding_to, self._yielding_since = elder, now
        if now - self._yielding_since < YIELD_SECONDS:
            return True
        cell, oldest = elder
        self._stuck[cell] = oldest
        return False

    def _gone(self, place: Place) -> None:
        self._cells[self._bytes] -= place.size
        self._count()
        if not self._places:
            self._on_level()

    def _count(self) -> None:
        self._cells[self._waiting] = len(self._places)
        self._cells[self._oldest] = self._places[0].since if self._places else 0

    def _schedule(self) -> None:
        if not self._places or not self.polls:
            return
        next_ = self._yielding_to or (self._others and not self.older_elsewhere(self._places[0].since))
        due = self._loop.time() + (NEXT_POLL_SECONDS if next_ else POLL_SECONDS)
        if self._poll is not None:
            if self._poll_due <= due:
                return
            self._poll.cancel()
        self._poll, self._poll_due = self._loop.call_at(due, self._polled), due

    def _polled(self) -> None:
        self._poll = None
        self.release()


def monotonic_ns() -> int:
    """The clock of `Place.since`, the same in every process of this machine."""
    return time.monotonic_ns()
