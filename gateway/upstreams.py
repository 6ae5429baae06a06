"""A worker's live view of one service: which replicas may receive traffic, and the lease that counts a
request.

Choosing and counting happen with no await between, so within a worker the choice is exact; between workers it
can be off by one for each other worker. Load is keyed by the replica's board slot, never by its URL.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from gateway.errors import ColdStartFailed, GatewayError, LaunchBlocked, ServicePaused, Shutdown
from gateway.hold import Place, WaitingRoom
from gateway.routing import HEALTHY, Health, choose, failed
from gateway.upstream import Pool
from replicas import tls
from replicas.board import Board
from replicas.control import ColdStart, ServiceInfo, UpstreamInfo

FOREIGN_NS = 3_000_000_000  # a depth polled longer ago means nothing


@dataclass(slots=True, eq=False)
class Upstream:
    """One replica as this worker sees it. Mutable: `health`, and `window` with each generation."""

    id: str
    slot: int
    url: str
    window: int
    pool: Pool
    health: Health = HEALTHY


@dataclass(frozen=True, slots=True)
class Limits:
    """The waiting room's bounds over all workers, and how long a dial may take."""

    max_waiting: int
    max_waiting_bytes: int
    connect_timeout: float


class Upstreams:
    """One service. Mutable: by this worker's event loop alone."""

    def __init__(
        self,
        info: ServiceInfo,
        board: Board,
        worker: int,
        *,
        limits: Limits,
        on_level: Callable[[], None],
        on_suspect: Callable[[str, str], None],
        on_ejection: Callable[[str], None],
        rng: random.Random | None = None,
    ) -> None:
        self.info = info
        self.cold: ColdStart | None = info.cold
        self._board = board
        self._cells = board.cells
        row = board.worker(worker)
        self._started = row.started
        self._finished = row.finished
        self.chunks = row.chunks  # the relay counts there, by slot
        self._columns = tuple(
            (board.worker(i).finished, board.worker(i).started) for i in range(board.workers)
        )
        self._limits = limits
        self._on_suspect = on_suspect
        self._on_ejection = on_ejection
        self._pick = (rng or random.Random()).choice
        self._upstreams: dict[str, Upstream] = {}
        self._list: list[Upstream] = []
        self._stopping = False
        self.room = WaitingRoom(
            board,
            worker,
            info.index,
            max_waiting=limits.max_waiting,
            max_bytes=limits.max_waiting_bytes,
            take=lambda place: self._choose(place.avoid),
            start=self._start,
            on_level=on_level,
        )
        self.update(info)

    def __repr__(self) -> str:
        flight = sum(self._in_flight(u) for u in self._list)
        return f"<Upstreams ready={len(self._list)} in-flight={flight} waiting={len(self.room)}>"

    def __len__(self) -> int:
        return len(self._list)

    def has_other_than(self, ids: Collection[str]) -> bool:
        """Whether an upstream is in rotation that is none of `ids`: what `choose` would prefer to them."""
        now = time.monotonic()
        return any(u.id not in ids and u.health.until <= now for u in self._list)

    @property
    def reachable(self) -> bool:
        """Whether the last dial of any upstream was answered, as far as is known."""
        return any(not u.health.unreachable for u in self._list)

    def limit(self, limits: Limits) -> None:
        """Other limits from now on."""
        self._limits = limits
        self.room.limit(limits.max_waiting, limits.max_waiting_bytes)

    # --- what the controller says

    def update(self, info: ServiceInfo) -> None:
        """Apply a generation: same id, same upstream; what left keeps its open requests and closes its idle
        sockets."""
        self.info = info
        self.cold = info.cold
        known, upstreams = self._upstreams, {}
        for new in info.upstreams:
            old = known.get(new.id)
            if old is None or (old.url, old.slot) != (new.url, new.slot):
                upstreams[new.id] = self._made(new)
            else:
                old.window = new.window
                upstreams[new.id] = old
        for old in known.values():
            if upstreams.get(old.id) is not old:
                old.pool.close()
        self._upstreams = upstreams
        self._list = list(upstreams.values())
        self.room.polls = bool(upstreams)
        if self._refusal() is not None:
            self.room.fail(self._ended)
        self.room.release()

    def stop(self) -> None:
        """The worker is stopping: nobody is let in any more, held requests end (retryable)."""
        self._stopping = True
        self.room.fail(self._ended)

    def close(self) -> None:
        """Close the idle connections; the worker ends."""
        for upstream in self._list:
            upstream.pool.close()

    def sweep(self) -> None:
        """Close idle connections before the replicas do. Called about once a second."""
        for upstream in self._list:
            upstream.pool.sweep()

    def _made(self, info: UpstreamInfo) -> Upstream:
        cert = self.info.replica_cert if info.pinned else None
        context = tls.context_for(info.url, cert, self.info.replica_ca)
        pool = Pool(info.url, connect_timeout=self._limits.connect_timeout, context=context)
        return Upstream(info.id, info.slot, info.url, info.window, pool)

    def _refusal(self) -> GatewayError | None:
        """Why a request that comes now is not even held."""
        info = self.info
        if self._stopping:
            return Shutdown("This gateway is stopping. Try again: the next one takes over.")
        if info.status == "stopping":
            return Shutdown(info.message or "This gateway is going down.", retry_after=info.retry_after)
        if info.status == "paused":
            return ServicePaused(info.message or f"{info.name} is paused (gateway scale --max 0).")
        if info.status == "blocked" and not self._list:
            return LaunchBlocked(info.message, retry_after=info.retry_after)
        return None

    def _ended(self) -> GatewayError:
        """What ends the held ones: as `_refusal`, but a failed start is told as such."""
        error = self._refusal()
        if isinstance(error, LaunchBlocked):
            return ColdStartFailed(self.info.message, retry_after=self.info.retry_after)
        return error or Shutdown("This gateway is stopping.")

    # --- choosing and counting

    def lease(
        self, since: int, size: int, avoid: Collection[str] = (), *, again: bool = False
    ) -> Lease:
        """The right to send one request to one upstream, counted on the board until it is released.

        `since`: monotonic_ns of the request's arrival. `again`: it had a lease before.
        """
        return Lease(self, since, size, avoid, again)

    def _in_flight(self, upstream: Upstream) -> int:
        cells, slot = self._cells, upstream.slot
        total = 0
        for finished, started in self._columns:
            done = cells[finished + slot]
            open_ = cells[started + slot] - done
            if open_ > 0:  # below zero while the supervisor zeroes a dead worker's row
                total += open_
        return total

    def _depth(self, upstream: Upstream) -> int | None:
        """Queue depth; None when it has its window's worth of ours, whatever others send it."""
        depth = self._in_flight(upstream)
        if depth >= upstream.window:
            return None
        board, slot = self._board, upstream.slot
        foreign = self._cells[board.foreign + slot]
        if foreign > 0 and time.monotonic_ns() - self._cells[board.polled + slot] < FOREIGN_NS:
            depth += foreign
        return depth

    def _choose(self, avoid: Collection[str]) -> Upstream | None:
        return choose(
            self._list,
            depth=self._depth,
            now=time.monotonic(),
            avoid=avoid,
            pick=self._pick,
        )

    def _start(self, upstream: Upstream) -> None:
        self._cells[self._started + upstream.slot] += 1

    def _finish(self, upstream: Upstream) -> tuple[int, int]:
        before = time.monotonic_ns()
        self._cells[self._finished + upstream.slot] += 1
        after = time.monotonic_ns()
        if self.room:
            self.room.release()
        return before, after

    def check(self) -> None:
        """Raises why a request that comes now is not even held, if so."""
        error = self._refusal()
        if error is not None:
            raise error

    def _acquire(self, since: int, avoid: Collection[str]) -> Upstream | None:
        self.check()
        if self.room or self.room.older_elsewhere(since):
            return None
        upstream = self._choose(avoid)
        if upstream is not None:
            self._start(upstream)
        return upstream

    # --- passive health

    def succeeded(self, upstream: Upstream) -> None:
        """A request ended without the replica's fault."""
        if upstream.health is not HEALTHY:
            upstream.health = HEALTHY

    def failed(self, upstream: Upstream, reason: str, *, unreachable: bool = False) -> None:
        """A request failed by the replica's fault (5xx, died, timeout; never 4xx, never "queue full")."""
        before = upstream.health
        upstream.health = failed(before, time.monotonic(), unreachable=unreachable)
        if upstream.health.ejections > before.ejections:
            self._on_ejection(upstream.id)
        if unreachable:
            self._on_suspect(upstream.id, reason)


class Lease:
    """Taken once, at once or after a wait; whoever took it must release it, in a `finally`, or in the one
    place where a request ends.

    `upstream`: the one it was taken on, None before and after. `counted`, `released`: monotonic_ns before and
    after the replica was chosen and counted, and before and after the count went back; 0 = not yet. In
    between the board changed: what other processes did before or after is certain.
    """

    __slots__ = ("_again", "_avoid", "_since", "_size", "_upstreams", "counted", "released", "upstream")

    def __init__(
        self, upstreams: Upstreams, since: int, size: int, avoid: Collection[str], again: bool
    ) -> None:
        self._again = again
        self._upstreams = upstreams
        self._since = since
        self._size = size
        self._avoid = avoid
        self.upstream: Upstream | None = None
        self.counted = (0, 0)
        self.released = (0, 0)

    def take(self) -> Upstream | None:
        """The upstream, if there is a place for it now; None: `wait`. Raises why it is not even held."""
        before = time.monotonic_ns()
        upstream = self._upstreams._acquire(self._since, self._avoid)
        if upstream is not None:
            self.upstream = upstream
            self.counted = (before, time.monotonic_ns())
        return upstream

    async def wait(self, hold: Callable[[Place], Awaitable[None]]) -> Upstream:
        """The upstream, after a wait for a place. `hold(place)` is awaited: it returns when the place's
        future is done and may raise to give up."""
        upstreams = self._upstreams
        place = upstreams.room.enter(self._since, self._size, self._avoid, again=self._again)
        future = place.future
        try:
            await hold(place)
            self.upstream = upstream = future.result()
            self.counted = place.counted
            return upstream
        except BaseException:
            # Released and given up in the same moment: the count goes back.
            if future.done() and not future.cancelled() and future.exception() is None:
                upstreams._finish(future.result())
            raise
        finally:
            upstreams.room.leave(place)
            del place, future  # an error's traceback has this frame, and the future has the error: no cycle

    def release(self) -> None:
        """Count it back; again, or never taken: nothing."""
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            self.released = self._upstreams._finish(upstream)
