"""How long one client is kept waiting, and what it is told meanwhile."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.errors import BadRequest, HoldTimeout, NotHeld

if TYPE_CHECKING:
    from gateway.hold import Place
    from gateway.proxy import Exchange
    from gateway.upstreams import Upstreams

DEFAULT_PATIENCE = 300.0  # seconds: openai-node's undici gives up then, the shortest common default
MARGIN = 10.0  # seconds before the client gives up that `silent` answers
# At most ten beats a second, whatever patience a client claims: 1e-9 must not cost a core.
SHORTEST_PAUSE = 0.1


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


def check_wish(exchange: Exchange, upstreams: Upstreams) -> None:
    """`reject`: a client that does not want to be held only wakes the service. Raises NotHeld."""
    if exchange.patience.mode == "reject" and not len(upstreams):
        upstreams.check()
        exchange.worker.wake(upstreams, exchange.key, exchange.request_id)
        raise NotHeld(
            f"{upstreams.info.name} is starting. Try again later (X-Gateway-Hold: reject).",
            headers=cold_headers(upstreams),
            retry_after=int(upstreams.cold.eta_seconds or 30) if upstreams.cold else 30,
        )


def check_limit(exchange: Exchange, upstreams: Upstreams) -> float:
    """Loop time until which the request may wait. Raises HoldTimeout when that is over."""
    limit = exchange.started + upstreams.info.hold_max_seconds
    if exchange.patience.give_up is not None:
        limit = min(limit, exchange.started + exchange.patience.give_up)
    now = exchange.loop.time()
    if now >= limit:
        waited = now - exchange.started
        name, why = upstreams.info.name, "The cold start goes on"
        if len(upstreams):
            why = "All have their window's worth" if upstreams.reachable else "None answers a dial"
        message = f"No replica of {name} within {waited:.0f} s. {why}; try again."
        raise HoldTimeout(message, headers=cold_headers(upstreams))
    return limit


async def hold(exchange: Exchange, place: Place) -> None:
    """Wait in the room, with beats. Returns when the place's future is done; raises HoldTimeout."""
    assert exchange.upstreams is not None
    exchange.worker.waits(exchange.upstreams, exchange.key, exchange.request_id)
    entered = exchange.loop.time()
    wait = _Wait(exchange, exchange.upstreams, place)
    try:
        await wait.over
    finally:
        wait.end()
        exchange.held = (exchange.held or 0.0) + exchange.loop.time() - entered


class _Wait:
    """The clock of one held request: a timer that beats, without waking the request's task. `over`: done when
    the place's future is, or failed with HoldTimeout.

    Many that came at once are not to beat at once: only the first pause differs, from one to the next so that
    all of them are spread evenly.
    """

    __slots__ = ("_exchange", "_pause", "_place", "_timer", "_upstreams", "over")

    def __init__(self, exchange: Exchange, upstreams: Upstreams, place: Place) -> None:
        self._exchange = exchange
        self._upstreams = upstreams
        self._place = place
        self._pause = exchange.patience.every
        self._timer: asyncio.TimerHandle | None = None
        self.over: asyncio.Future[None] = exchange.loop.create_future()
        place.future.add_done_callback(self._placed)
        self._look()

    def end(self) -> None:
        """Nobody waits any more."""
        self._place.future.remove_done_callback(self._placed)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.over.done() and not self.over.cancelled():
            self.over.exception()  # seen, also where the request was cancelled in that moment

    def _placed(self, _: object) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def _look(self) -> None:
        self._timer = None
        if self.over.done() or self._place.future.done():
            return
        exchange, wait, reply = self._exchange, self._exchange.patience, self._exchange.reply
        try:
            now = exchange.loop.time()
            due = check_limit(exchange, self._upstreams)
            if wait.commit_after is not None:
                commit_due = exchange.started + wait.commit_after
                beat_due = reply.sent_at + self._pause if reply.started else commit_due
                if now >= beat_due:
                    self._pause = wait.every if reply.started else wait.every * exchange.worker.phases()
                    exchange.beat(now, cold_text(self._upstreams, now - exchange.started))
                    beat_due = now + max(self._pause, SHORTEST_PAUSE)
                due = min(due, beat_due)
            self._timer = exchange.loop.call_at(due, self._look)
        except Exception as error:
            self.over.set_exception(error.with_traceback(None))  # no cycle through this frame


_GOLDEN = (math.sqrt(5) - 1) / 2


class Phases:
    """Each call gives another share of a period, from 0 to 1: however many are taken in a row, they lie
    evenly (multiples of the golden ratio, whose gaps are of at most three lengths)."""

    def __init__(self) -> None:
        self._last = 0.0

    def __repr__(self) -> str:
        return f"<Phases {self._last:.3f}>"

    def __call__(self) -> float:
        self._last = (self._last + _GOLDEN) % 1.0
        return self._last


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
        what = "a free place" if upstreams.reachable else "a replica that can be reached"
        return f"waiting for {what}, {waited:.0f} s"
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
