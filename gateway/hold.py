"""The waiting room: who waits for a replica, in which order they get one, and how long a client may wait.

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

from gateway.errors import BadRequest, GatewayError, WaitingRoomFull
from replicas.board import SERVICES, Board

if TYPE_CHECKING:
    from gateway.upstreams import Upstream, Upstreams

# How often a waiting request looks whether another worker's end, or the end of an ejection, lets it in. Whose
# turn may be next looks more often: who has the oldest waiter, or just left a free place to an older one.
POLL_SECONDS = 0.02
NEXT_POLL_SECONDS = 0.002
# A free place is left this long to the worker whose waiter is older; then that worker is taken to be stuck.
YIELD_SECONDS = 0.25
DEFAULT_PATIENCE = 300.0  # seconds: openai-node's undici gives up then, the shortest common default
MARGIN = 10.0  # seconds before the client gives up that `silent` answers
# At most ten beats a second, whatever patience a client claims: 1e-9 must not cost a core.
SHORTEST_PAUSE = 0.1
BODY_OVERHEAD = 1024  # bytes of the gateway's own that a held request costs at least


@dataclass(frozen=True, slots=True)
class Patience:
    """How one client is kept waiting. Seconds.

    `mode`: beats, silent or reject. `commit_after`: silence before 200 is sent; None = never. `every`:
    between beats.
    `beat_after`: a replica's silence before beats begin; None = never. `give_up`: silence before an honest
    503.
    """

    mode: str
    commit_after: float | None
    every: float
    beat_after: float | None
    give_up: float | None


def patience(
    read_timeout: bytes | None,
    wish: bytes | None,
    *,
    hold: str,
    commit_after: float,
    beat_every: float,
    beat_after: float,
) -> Patience:
    """What `x-stainless-read-timeout` (openai-python sends its own timeout, 600 s by default) and
    `X-Gateway-Hold` ask.

    Raises BadRequest for an unknown wish; an unreadable timeout counts as none.
    """
    mode = wish.decode("latin-1").strip().lower() if wish is not None else hold
    if mode not in ("beats", "silent", "reject"):
        raise BadRequest(
            f"X-Gateway-Hold must be beats, silent or reject, not {mode!r}.", param="X-Gateway-Hold"
        )
    limit: float | None = None
    if read_timeout is not None:
        try:
            limit = float(read_timeout)
        except ValueError:
            limit = None
        if limit is not None and not 0 < limit < 1e9:
            limit = None
    if mode != "beats":
        known = limit if limit is not None else DEFAULT_PATIENCE
        # `reject` waits too, if only for a free place in the window of a replica that is there.
        return Patience(mode, None, beat_every, None, max(known - MARGIN, known / 2))
    third = max(limit / 3, SHORTEST_PAUSE) if limit is not None else float("inf")
    return Patience(
        mode,
        min(commit_after, third),
        max(min(beat_every, third), SHORTEST_PAUSE),
        max(min(beat_after, third), SHORTEST_PAUSE) if beat_after > 0 else None,
        None,
    )


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

    def enter(self, since: int, size: int, avoid: Collection[str]) -> Place:
        """Take a place. Raises WaitingRoomFull over the bounds, which count all workers and services."""
        totals = [self._board.totals(s) for s in range(SERVICES)]
        cost = size + BODY_OVERHEAD
        if sum(t.waiting for t in totals) >= self._max_waiting:
            raise WaitingRoomFull(
                f"{self._max_waiting} requests already wait for a replica. Try again in half a minute."
            )
        if sum(t.waiting_bytes for t in totals) + cost > self._max_bytes:
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


def cold_headers(upstreams: Upstreams) -> dict[str, str]:
    """What a client that waits is told in the head."""
    cold = upstreams.cold
    eta = cold.eta_seconds if cold is not None else None
    return {
        "X-Gateway-State": "waiting" if len(upstreams) else "cold-start",
        "X-Gateway-ETA-Seconds": f"{eta:.0f}" if eta is not None else "unknown",
    }


def cold_text(upstreams: Upstreams, waited: float) -> str:
    """The comment of a held stream, e.g. `cold-start phase=load progress=62% eta=410s`, or while it looks for
    a machine `cold-start phase=provision plan=2/3 attempt=14 eta=unknown`."""
    if len(upstreams):
        return f"waiting for a free place, {waited:.0f} s"
    cold = upstreams.cold
    if cold is None:
        return f"cold-start phase=pending waited={waited:.0f}s"
    parts = [f"cold-start phase={cold.phase or 'pending'}"]
    if cold.progress is not None:
        parts.append(f"progress={cold.progress * 100:.0f}%")
    if cold.plan:
        parts.append(f"plan={cold.plan}")
    if cold.attempt > 1:
        parts.append(f"attempt={cold.attempt}")
    parts.append(f"eta={cold.eta_seconds:.0f}s" if cold.eta_seconds is not None else "eta=unknown")
    return " ".join(parts)
